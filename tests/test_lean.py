"""diffusers imported without its optional packages: nothing else is different, then or afterwards."""

import subprocess
import sys

import pytest
from conftest import REPO
from test_translate import arguments, command, files, grey, save, save_checkpoint

from cdiffset.lean import UNUSED, hidden


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, check=True).stdout.strip()


def test_nothing_unused_is_imported_and_all_of_it_is_there_for_others():
    said = python(
        "import sys, torch\nmark = torch.compiler.disable\nimport cdiffset.inference.translator\n"
        f"print([name for name in {UNUSED} if name in sys.modules], torch.compiler.disable is mark)\n"
        "import scipy, torch._dynamo, torchvision, transformers\n"
        "from transformers import CLIPTextModel\n"
        "print(CLIPTextModel.__name__, torch.compile(lambda x: 2 * x, backend='eager')(torch.tensor(3)).item())"
    )
    assert said.splitlines() == ["[] True", "CLIPTextModel 6"]


def test_the_result_is_that_of_diffusers_with_all_its_packages(tiny_base, tmp_path):
    """This process imported diffusers plainly, a new one does it leanly; the prompt's embedding is computed by both."""
    assert "transformers" in sys.modules
    for index in range(2):
        save(tmp_path / "sar" / f"{index}.png", grey(24, 16, seed=index))
    results = {}
    for name in ("plain", "lean"):
        words = arguments(tmp_path / "sar", tmp_path / name, True, save_checkpoint(tmp_path / f"{name}_net", tiny_base, 5))
        if name == "plain":
            assert command.main(words) == 0
        else:
            subprocess.run([sys.executable, str(REPO / "test.py"), *words], check=True, capture_output=True)
        results[name] = {file: (tmp_path / name / file).read_bytes() for file in files(tmp_path / name)}
    assert len(results["plain"]) == 6 and results["lean"] == results["plain"]


def test_what_is_hidden_comes_back_also_after_an_error(monkeypatch):
    monkeypatch.delitem(sys.modules, "colorsys", raising=False)
    with pytest.raises(ModuleNotFoundError), hidden("colorsys", "json"):
        import colorsys  # noqa: F401
        import json  # noqa: F401  imported long ago
    assert "colorsys" not in sys.modules
    import colorsys  # noqa: F401, F811
