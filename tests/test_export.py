"""Exported pipelines: equal to test.py in a process without this project, inputs of every form, the folder and its card."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPO, tiny_unet
from diffusers import DiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from test_calibrate import SETTINGS, translation

import calibrate
import export
from cdiffset import config, errors
from cdiffset.images import read_tiff
from cdiffset.inference import options
from cdiffset.model import patch_conv_in, patch_conv_out
from cdiffset.pipeline import MAX_FEW_STEPS, MIDPOINT

SIZES = {"a.png": (40, 40), "b.png": (21, 34), "c.png": (16, 40), "d.png": (16, 40)}  # H, W
FAST = {"preset": "fast", "readout": "early", "ensemble": 2, "ensemble_output": "mean"}
NEEDED = {"torch", "diffusers", "transformers", "numpy", "PIL"}
# What the pipeline does not need is out of reach: this project, by -I, and torchvision, which is found by no one.
CLEAN = """
import sys
sys.modules["torchvision"] = None
import json
from pathlib import Path
import numpy as np
from diffusers import DiffusionPipeline
from PIL import Image

folder, sar, output, settings = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]), json.loads(sys.argv[4])
pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
files = sorted(sar.iterdir())
out = pipe([Image.open(file) for file in files], **settings)
for index, file in enumerate(files):
    maps = {name: getattr(out, name) for name in ("variance", "spread", "expected_error")}
    maps = {name: values[index] for name, values in maps.items() if values is not None}
    np.savez(output / file.stem, eo=out.images[index], confidence=out.confidence[index], **maps)
assert not {"cdiffset", "rasterio", "torchmetrics", "lpips"} & {name.split(".")[0] for name in sys.modules}
"""


@pytest.fixture(scope="module")
def checkpoint(run, pair_folders, tmp_path_factory) -> Path:
    """A calibrated checkpoint of stage 2, whose variance is not flat."""
    folder = run(tmp_path_factory.mktemp("run"), confidence=True, learning_rate=1e-2, num_iter=6) / "latest"
    sampling = ["--num-inference-steps", "2"]
    pairs = ["--sar-dir", str(pair_folders / "train/sar"), "--eo-dir", str(pair_folders / "train/eo")]
    assert calibrate.main(["--checkpoint", str(folder), *pairs, *sampling]) == 0
    return folder


@pytest.fixture(scope="module")
def sar_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sar")
    for name, size in SIZES.items():
        pixels = np.random.default_rng([len(name), *size, ord(name[0])]).integers(0, 256, size, dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


@pytest.fixture(scope="module")
def exported(checkpoint, sar_dir, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("exported") / "pipeline"
    assert export.main(["--checkpoint", str(checkpoint), "--output", str(folder), "--examples", str(sar_dir)]) == 0
    return folder


@pytest.fixture(scope="module")
def pipe(exported):
    loaded = DiffusionPipeline.from_pretrained(str(exported), custom_pipeline=str(exported), trust_remote_code=True)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def by_command(checkpoint: Path, sar_dir: Path, out: Path, maps: tuple[str, ...], **options) -> Path:
    """test.py => the folder that holds eo/ and a folder for each map."""
    folders = {"output_dir": out / "eo", **{f"{name}_dir": out / name for name in maps}, **options}
    words = [word for name, value in folders.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    assert translation.main(["--sar-dir", str(sar_dir), "--checkpoint", str(checkpoint), *words]) == 0
    return out


# ----------------------------------------------------------------------------------------------------- equal to test.py
def test_the_file_imports_what_it_may():
    tree = ast.parse((REPO / "cdiffset/pipeline.py").read_text())
    found = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    found |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in found} - set(sys.stdlib_module_names) <= NEEDED


@pytest.mark.parametrize(
    ("settings", "maps"),
    [(SETTINGS, ("conf", "variance", "error")), ({**FAST, "seed": 5}, ("conf", "variance", "spread"))],
    ids=["calibrated", "fast"],
)
def test_a_process_without_this_project_gives_what_test_py_gives(checkpoint, exported, sar_dir, tmp_path, settings, maps):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1"}
    words = [sys.executable, "-I", "-c", CLEAN, str(exported), str(sar_dir), str(tmp_path), json.dumps(settings)]
    done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    if settings["ensemble"] == 1:
        settings = {name: value for name, value in settings.items() if name != "ensemble_output"}
    out = by_command(checkpoint, sar_dir, tmp_path / "out", maps, **settings)
    for name in SIZES:
        found, stem = np.load(tmp_path / f"{Path(name).stem}.npz"), Path(name).stem
        assert np.array_equal(found["eo"], np.asarray(Image.open(out / "eo" / name)))
        assert np.array_equal(found["confidence"], np.asarray(Image.open(out / "conf" / name)))
        for key, folder in (("variance", "variance"), ("spread", "spread"), ("expected_error", "error")):
            assert (key in found) == (folder in maps)
            if folder in maps:
                assert np.array_equal(found[key], read_tiff(out / folder / f"{stem}.tif"))
                assert np.ptp(found[key]) > 0


def test_test_py_takes_the_folder_and_runs_none_of_its_code(checkpoint, exported, sar_dir, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "pipeline")
    (folder / "pipeline.py").write_text("raise SystemExit('code of a stranger')\n")
    outs = [
        by_command(source, sar_dir, tmp_path / name, ("variance", "error"), num_inference_steps=2)
        for name, source in (("checkpoint", checkpoint), ("pipeline_folder", folder))
    ]
    for name in SIZES:
        assert (outs[0] / "eo" / name).read_bytes() == (outs[1] / "eo" / name).read_bytes()
        for kind in ("variance", "error"):
            assert (outs[0] / kind / name).with_suffix(".tif").read_bytes() == (outs[1] / kind / name).with_suffix(
                ".tif"
            ).read_bytes()


# --------------------------------------------------------------------------------------------------------------- inputs
def test_an_image_is_the_same_in_every_form(pipe, sar_dir):
    image = Image.open(sar_dir / "a.png")
    grey = np.asarray(image)
    colour = np.repeat(grey[..., None], 3, -1)
    tensor = torch.from_numpy(colour).movedim(-1, 0)
    forms = [
        image, image.convert("RGB"), image.convert("RGBA"), grey, grey[..., None], colour, colour[None], grey / 255,
        (colour / 255).astype(np.float32), tensor, tensor / 255, (tensor / 255)[None], torch.from_numpy(grey) / 255, [image],
        (tensor / 255).double(),
    ]  # fmt: skip
    expected = np.asarray(pipe(image, num_inference_steps=2).images[0])
    for form in forms:
        assert np.array_equal(np.asarray(pipe(form, num_inference_steps=2).images[0]), expected)
    several = pipe([grey, [colour / 255, tensor]], num_inference_steps=2, batch_size=2)
    assert len(several.images) == 3 and np.abs(np.asarray(several.images[2]).astype(int) - expected).max() <= 1


BAD = [
    ("16 bits", lambda: Image.new("I;16", (8, 8)), {}, "expected a picture of mode 1, L, .*, found I;16"),
    ("whole numbers", lambda: np.zeros((8, 8), np.int32), {}, "expected uint8 or floating numbers, found int32"),
    ("beyond 1", lambda: np.full((8, 8), 1.5), {}, "expected floating numbers in 0-1, found 1.5 to 1.5"),
    ("not a number", lambda: np.full((8, 8), np.nan), {}, "expected floating numbers in 0-1, found nan"),
    ("two channels", lambda: np.zeros((8, 8, 2)), {}, r"expected 1 or 3 channels .* shape \[8, 8, 2\]"),
    ("no pixel", lambda: np.zeros((0, 8)), {}, r"at least one pixel, found shape \[0, 8\]"),
    ("channels last in a tensor", lambda: torch.zeros(8, 8, 3), {}, r"found shape \[8, 8, 3\]"),
    ("five dimensions", lambda: np.zeros((1, 1, 8, 8, 3)), {}, "expected 1 or 3 channels"),
    ("a path", lambda: "sar.png", {}, "expected PIL images, arrays, tensors or a list of them, found str"),
    ("nothing", lambda: [], {}, "expected at least one image, found none"),
    ("preset", None, {"preset": "slow"}, "preset: expected one of balanced, fast, paper, found 'slow'"),
    ("readout", None, {"readout": "last"}, "readout: expected one of early, first, midpoint, found 'last'"),
    ("scheduler", None, {"scheduler": "euler"}, "scheduler: expected one of ddim, dpmsolver"),
    ("spacing", None, {"timestep_spacing": "linspace"}, "timestep_spacing: expected one of leading, trailing"),
    ("steps", None, {"num_inference_steps": 0}, "num_inference_steps: expected a whole number of at least 1, found 0"),
    ("many steps", None, {"num_inference_steps": 1000}, "num_inference_steps: expected at most 999, found 1000"),
    ("many steps, trailing", None, {"preset": "fast", "num_inference_steps": 51}, "at most 50 with ddim trailing, found 51"),
    ("ensemble", None, {"ensemble": 1.5}, "ensemble: expected a whole number of at least 1, found 1.5"),
    ("ensemble output", None, {"ensemble_output": "mode"}, "ensemble_output: expected one of first, mean, median"),
    ("batch size", None, {"batch_size": 0}, "batch_size: expected a whole number of at least 1"),
    ("output type", None, {"output_type": "latent"}, "output_type: expected one of pil, np, pt, found 'latent'"),
]


def test_limits_are_those_of_the_command():
    assert MAX_FEW_STEPS == options.MAX_FEW_STEPS and config.MIDPOINT == MIDPOINT


@pytest.mark.parametrize(("make", "options", "message"), [case[1:] for case in BAD], ids=[case[0] for case in BAD])
def test_what_it_cannot_take_is_said(pipe, make, options, message):
    with pytest.raises(ValueError, match=message):
        pipe(np.zeros((8, 8)) if make is None else make(), **options)


# -------------------------------------------------------------------------------------------------------------- outputs
def test_output_types_hold_the_same(pipe, sar_dir):
    image, settings = Image.open(sar_dir / "b.png"), pipe.config.calibration["settings"]
    pil, arrays, tensors = (pipe(image, **settings, output_type=kind) for kind in ("pil", "np", "pt"))
    assert arrays.images[0].shape == (21, 34, 3) and tensors.images[0].shape == (3, 21, 34)
    assert np.array_equal((arrays.images[0] * 255).round(), np.asarray(pil.images[0]))
    assert np.array_equal(arrays.images[0], tensors.images[0].movedim(0, -1).numpy())
    assert np.array_equal((arrays.confidence[0] * 255).round(), np.asarray(pil.confidence[0]))
    for name in ("variance", "expected_error", "confidence"):
        assert np.array_equal(getattr(arrays, name)[0], getattr(tensors, name)[0].numpy())
    assert pil.spread is None
    as_tuple = pipe(image, **settings, output_type="np", return_dict=False)
    assert len(as_tuple) == 5 and np.array_equal(as_tuple[0][0], arrays.images[0]) and as_tuple[3] is None


def test_the_expected_error_is_for_the_calibrated_settings_alone(pipe):
    assert pipe(np.zeros((8, 8)), **pipe.config.calibration["settings"]).expected_error is not None
    assert pipe(np.zeros((8, 8)), num_inference_steps=3).expected_error is None


def test_a_generator_draws_the_noise_image_by_image(pipe, sar_dir):
    images = [Image.open(sar_dir / name) for name in ("c.png", "d.png")]

    def drawn(seed: int, batch_size: int = 1) -> list[np.ndarray]:
        generator = torch.Generator().manual_seed(seed)
        out = pipe(images, num_inference_steps=2, ensemble=2, generator=generator, batch_size=batch_size, output_type="np")
        return out.images

    one, again, together, other = drawn(0), drawn(0), drawn(0, batch_size=4), drawn(1)
    assert all(np.array_equal(*pair) for pair in zip(one, again, strict=True))
    assert all(np.allclose(*pair, atol=1e-3) for pair in zip(one, together, strict=True))
    assert not np.allclose(one[0], other[0], atol=1e-2)


def test_every_step_is_told_and_can_end_the_call(pipe):
    steps = []
    pipe(np.zeros((8, 8)), num_inference_steps=3, ensemble=2, after_step=lambda: steps.append(1))
    assert len(steps) == 6

    def stop():
        raise InterruptedError

    with pytest.raises(InterruptedError):
        pipe(np.zeros((8, 8)), num_inference_steps=3, after_step=stop)


def test_it_computes_in_half_precision(exported, sar_dir):
    half = DiffusionPipeline.from_pretrained(
        str(exported), custom_pipeline=str(exported), trust_remote_code=True, torch_dtype=torch.bfloat16
    )
    assert half.unet.dtype == half.text_encoder.dtype == torch.bfloat16
    out = half(Image.open(sar_dir / "a.png"), num_inference_steps=2, output_type="pt")
    assert out.images[0].dtype == torch.float32 and out.images[0].isfinite().all()


def test_a_turned_picture_is_turned_as_by_test_py(exported, pipe, tmp_path):
    (tmp_path / "sar").mkdir()
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 256, (16, 24), dtype=np.uint8))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "sar/x.png", exif=exif)
    out = by_command(exported, tmp_path / "sar", tmp_path / "out", (), num_inference_steps=2)
    found = pipe(Image.open(tmp_path / "sar/x.png"), num_inference_steps=2).images[0]
    assert found.size == (16, 24) and np.array_equal(np.asarray(found), np.asarray(Image.open(out / "eo/x.png")))


def test_a_calibration_is_not_written_into_an_exported_folder(exported, pair_folders, capsys):
    pairs = ["--sar-dir", str(pair_folders / "train/sar"), "--eo-dir", str(pair_folders / "train/eo")]
    assert errors.run(calibrate.main, ["--checkpoint", str(exported), *pairs]) == 2
    assert "is an exported pipeline" in capsys.readouterr().err


# ----------------------------------------------------------------------------------------------------------- the folder
def test_the_card_says_how_it_was_made(exported):
    card = (exported / "README.md").read_text()
    header, body = card.split("---\n")[1:3]
    assert "library_name: diffusers" in header and body.startswith("\n# pipeline\n")
    assert "| iterations | 6 |" in body and "| prompt | 'electro-optical image' |" in body and "| training pairs | 12 |" in body
    assert "readout midpoint, scheduler ddim, timestep_spacing leading, num_inference_steps 2" in body
    assert "Held out:" in body and "Nothing yet." in body and "Object Generation}" in body
    pictures = sorted((exported / "examples").iterdir())
    assert [f"]({path.relative_to(exported)})" in body for path in pictures] == [True] * 4
    assert not list(exported.parent.glob(".*"))


def test_no_folder_of_this_machine_is_published(exported, tiny_base, pair_folders):
    texts = [(exported / name).read_text() for name in ("README.md", "checkpoint.json", "model_index.json")]
    texts += [file.read_text() for file in exported.glob("*/config.json")]
    for place in (tiny_base, str(pair_folders), str(exported.parent.parent)):
        assert not [text for text in texts if place in text]
    assert Path(tiny_base).name in texts[0]


def test_the_card_shows_a_report(checkpoint, pair_folders, tmp_path):
    import evaluate

    folders = ["--pred-dir", pair_folders / "test/eo", "--gt-dir", pair_folders / "test/eo", "--output", tmp_path / "report"]
    assert evaluate.main([str(word) for word in [*folders]]) == 0
    words = ["--checkpoint", checkpoint, "--output", tmp_path / "out", "--report", tmp_path / "report/report.json"]
    assert export.main([str(word) for word in words]) == 0
    card = (tmp_path / "out/README.md").read_text()
    assert "### standard convention" in card and "| this model | 5 |" in card and "Nothing yet." not in card


def test_a_bare_file_of_released_weights_becomes_a_folder(tiny_base, tmp_path, sar_dir):
    torch.manual_seed(3)
    unet = patch_conv_out(patch_conv_in(tiny_unet()))
    save_file({f"module.{name}": value for name, value in unet.state_dict().items()}, tmp_path / "model.safetensors")
    options = ["--checkpoint", tmp_path / "model.safetensors", "--pretrained-model-name-or-path", tiny_base]
    assert export.main([str(word) for word in [*options, "--output", tmp_path / "out", "--prompt", "from above"]]) == 0
    loaded = DiffusionPipeline.from_pretrained(
        str(tmp_path / "out"), custom_pipeline=str(tmp_path / "out"), trust_remote_code=True
    )
    assert all(torch.equal(value, loaded.unet.state_dict()[name]) for name, value in unet.state_dict().items())
    own = by_command(tmp_path / "out", sar_dir, tmp_path / "own", (), num_inference_steps=2)
    base = {"pretrained_model_name_or_path": tiny_base, "prompt": "from above"}
    plain = by_command(tmp_path / "model.safetensors", sar_dir, tmp_path / "plain", (), num_inference_steps=2, **base)
    assert all((own / "eo" / name).read_bytes() == (plain / "eo" / name).read_bytes() for name in SIZES)
    assert loaded(np.zeros((8, 8)), num_inference_steps=2).expected_error is None
    assert "None: `out.expected_error` is None." in (tmp_path / "out/README.md").read_text()


def test_a_stage_1_model_has_no_maps(run, tmp_path):
    folder = run(tmp_path / "run") / "latest"
    assert export.main(["--checkpoint", str(folder), "--output", str(tmp_path / "out")]) == 0
    loaded = DiffusionPipeline.from_pretrained(
        str(tmp_path / "out"), custom_pipeline=str(tmp_path / "out"), trust_remote_code=True
    )
    out = loaded(np.zeros((8, 8)), num_inference_steps=2, ensemble=2)
    assert out.confidence is None and out.variance is None and out.spread is not None
    assert "This is a stage 1 model" in (tmp_path / "out/README.md").read_text()


REFUSED = [
    ("output that is there", {"output": "."}, "--output: . exists: remove it"),
    ("no checkpoint", {"checkpoint": "nowhere"}, "--checkpoint: there is no nowhere"),
    ("private without push", {"private": None}, "--private: it goes with --push OWNER/NAME, found none"),
    ("push without owner", {"push": "name"}, "--push: expected OWNER/NAME, found 'name'"),
    ("merge and push", {"merge": None, "push": "a/b"}, "--merge: it writes the U-Net alone, leave out --push"),
    ("large examples", {"examples": "large"}, "--examples: large/x.png: 1200 x 1200 px"),
    ("no examples", {"examples": "empty"}, "--examples: empty: holds no images"),
    ("no report", {"report": "none.json"}, "--report: none.json: No such file"),
    ("no calibration", {"calibration": "none.json"}, "there is no calibration none.json"),
    ("calibration of another model", {"calibration": "other.json"}, "other.json was made for another checkpoint"),
]


@pytest.mark.parametrize(("options", "message"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_what_cannot_be_exported_is_refused_in_one_line(options, message, checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("large").mkdir()
    Image.new("L", (1200, 1200)).save("large/x.png")
    values = json.loads((checkpoint / "calibration.json").read_text()) | {"model": "other"}
    Path("other.json").write_text(json.dumps(values))
    before = sorted(tmp_path.rglob("*"))
    words = {"checkpoint": str(checkpoint), "output": "out", **options}
    argv = [word for name, value in words.items() for word in ([f"--{name}"] if value is None else [f"--{name}", value])]
    assert errors.run(export.main, argv) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: ") and message in lines[0]
    assert sorted(tmp_path.rglob("*")) == before
