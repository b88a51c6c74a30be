"""Importing cdiffset makes torchvision importable where its operators do not fit PyTorch. Each case is a new process."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
BROKEN_IMPORT = """import torch
torch.library.register_fake("torchvision::nms")(lambda dets, scores, iou_threshold: dets)
torch.library.register_fake("torchvision::qnms")(lambda dets, scores, iou_threshold: dets)
"""


def run(code: str, *path: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT)))}
    return subprocess.run([sys.executable, "-c", code], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.fixture
def broken_torchvision(tmp_path) -> Path:
    """A package that fails as a CUDA torchvision does beside a CPU PyTorch: a library that does not load, operators missing."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text(BROKEN_IMPORT)
    (package / "_C.so").write_bytes(b"not a library")
    installed(tmp_path, "torch", "2.13.0+cpu")
    installed(tmp_path, "torchvision", "0.28.0")
    return tmp_path


def installed(folder: Path, name: str, version: str) -> None:
    """Have Python believe that this version is installed."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {name}\nVersion: {version}\n")


def test_a_torchvision_whose_library_does_not_load_becomes_importable(broken_torchvision):
    assert "operator torchvision::nms does not exist" in run("import torchvision", broken_torchvision).stderr
    # Twice, because a second call must not declare the operators again.
    mended = run("import cdiffset, torchvision; cdiffset.mend_torchvision(); print(torchvision.__file__)", broken_torchvision)
    assert mended.returncode == 0 and str(broken_torchvision) in mended.stdout, mended.stderr


def test_a_torchvision_without_a_library_is_left_alone(broken_torchvision):
    (broken_torchvision / "torchvision" / "_C.so").unlink()
    left = run("import cdiffset; print(cdiffset._declared)", broken_torchvision)
    assert left.stdout.strip() == "None", left.stderr


@pytest.mark.parametrize("versions", [("2.13.0+cpu", "0.28.0+cpu"), ("2.13.0", "0.28.0"), ("2.13.0+cu130", "0.28.0+cu130")])
def test_where_the_two_fit_nothing_is_imported(tmp_path, versions):
    for name, version in zip(("torch", "torchvision"), versions, strict=True):
        installed(tmp_path, name, version)
    assert run("import sys, cdiffset; print('torch' in sys.modules)", tmp_path).stdout.strip() == "False"


def test_every_library_that_needs_torchvision_imports():
    code = (
        "import cdiffset, torchvision, diffusers, lpips, torchmetrics.image, pytorch_fid.fid_score\n"
        "from diffusers import UNet2DConditionModel\n"
        "from transformers import CLIPTextModel\n"
        "print('imported')"
    )
    done = run(code)
    assert done.stdout.strip() == "imported", done.stderr
