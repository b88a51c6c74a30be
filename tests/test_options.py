"""No option of test.py is ignored in silence: over a PNG, a small and a large GeoTIFF each changes the files or is refused."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.transform import Affine
from safetensors.torch import load_file, save_file
from test_translate import command, save_checkpoint

from cdiffset.errors import UserError

UTM = {"crs": "EPSG:32631", "transform": Affine(10, 0, 500_000, 0, -10, 5_700_000)}
INPUTS = {"picture": "picture.png", "small": "small.tif", "large": "large.tif"}
TAGS_ALONE = {("small", "--tile"), ("small", "--overlap"), ("small", "--gsd"), ("large", "--gsd")}
GIVEN = {"--sar-dir", "--output-dir", "--variance-dir", "--checkpoint", "--num-inference-steps", "--help"}
# What is computed, not what comes out: these change nothing but speed, memory or the files that are left alone.
SPEED = {"--batch-size": ["2"], "--device": ["cpu"], "--skip-existing": []}
CHANGING = {
    "--conf-dir": ["conf"], "--spread-dir": ["spread", "--ensemble", "2"], "--error-dir": ["error"],
    "--overlay-dir": ["overlay", "--overlay-threshold", "9"], "--overlay-threshold": ["9"], "--calibration": ["c.json"],
    "--pretrained-model-name-or-path": ["OTHER_BASE"], "--prompt": ["another"], "--prediction-type": ["sample"],
    "--preset": ["fast"], "--scheduler": ["unipc"], "--timestep-spacing": ["trailing"], "--readout": ["first"],
    "--ensemble": ["2"], "--ensemble-output": ["mean", "--ensemble", "2"], "--seed": ["3"], "--precision": ["bf16"],
    "--tile": ["64"], "--overlap": ["16"], "--bands": ["1"],
    "--channels": ["ratio"], "--scale": ["intensity"], "--stretch": ["fixed:10,200"], "--despeckle": ["lee:3,4"],
    "--nodata": ["7"], "--gsd": ["5"], "--resample-gsd": ["20"],
}  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> Path:
    """A folder with a PNG, a GeoTIFF of one tile and one of three (of two with an overlap of 16)."""
    folder = tmp_path_factory.mktemp("inputs")
    rng = np.random.default_rng(0)
    for name, (height, width) in (("picture.png", (24, 32)), ("small.tif", (24, 32)), ("large.tif", (16, 2024))):
        pixels = np.array(Image.fromarray(rng.integers(0, 256, (6, 6), dtype=np.uint8)).resize((width, height)))
        pixels[:4, :4] = 7  # what --nodata names
        if name.endswith("png"):
            Image.fromarray(pixels).save(folder / name)
            continue
        size = {"driver": "GTiff", "count": 2, "height": height, "width": width, "dtype": "uint8"}
        with rasterio.open(folder / name, "w", **size, photometric="minisblack", alpha="no", **UTM) as target:
            target.write(np.stack([pixels, np.roll(pixels, 5, 1)]))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("options"), tiny_base, 5)


@pytest.fixture(scope="module")
def outputs(inputs, checkpoint, tmp_path_factory):
    """What a run leaves: {relative path: bytes of the pixels and what the bands are}; {relative path: tags} of GeoTIFFs."""

    def make(*further: str, only: str = "") -> tuple[dict[str, bytes], dict[str, dict]]:
        out = tmp_path_factory.mktemp("out")
        steps = [] if "--preset" in further else ["--num-inference-steps", "2"]
        argv = ["--sar-dir", inputs / only, "--output-dir", out / "eo", "--variance-dir", out / "variance", *steps]
        further = [out / word if word in ("conf", "spread", "error", "overlay") else word for word in further]
        assert command.main([str(word) for word in [*argv, "--checkpoint", checkpoint, *further]]) in (0, 1)
        pixels, tags = {}, {}
        for path in sorted(path for path in out.rglob("*") if path.suffix in (".png", ".tif")):
            with rasterio.open(path) as source:
                name = path.relative_to(out).as_posix()
                pixels[name], tags[name] = source.read().tobytes() + str(source.descriptions).encode(), source.tags()
        return pixels, tags

    return make


@pytest.fixture(scope="module")
def plain(outputs) -> tuple[dict[str, bytes], dict[str, dict]]:
    return outputs()


def of(stem: str, files: dict) -> dict:
    return {name: content for name, content in files.items() if Path(name).name.startswith(stem)}


def options_of_the_command() -> set[str]:
    return {max(action.option_strings, key=len) for action in command.make_parser()._actions}


def test_every_option_is_walked():
    assert options_of_the_command() == GIVEN | SPEED.keys() | CHANGING.keys() | {
        "--compile",
        "--max-pixels",
    }  # minutes; a limit


@pytest.mark.parametrize("option", CHANGING)
def test_an_option_changes_the_pixels_or_is_refused(outputs, plain, tiny_base, tmp_path, option):
    """Of what fits into one tile, --tile and --overlap have nothing to change; --gsd states a fact. Tags say them."""
    values = CHANGING[option]
    if values == ["OTHER_BASE"]:
        values = [str(shutil.copytree(tiny_base, tmp_path / "base"))]
        weights = tmp_path / "base/vae/diffusion_pytorch_model.safetensors"
        save_file({name: tensor * 1.01 for name, tensor in load_file(weights).items()}, weights)
    for stem, name in INPUTS.items():
        try:
            pixels, tags = outputs(option, *values, only=name)
        except UserError as error:
            assert any(word in str(error) for word in (option, *values) if word.startswith("--")), error
            continue
        if (stem, option) in TAGS_ALONE:
            assert of(stem, tags) != of(stem, plain[1])
        else:
            assert of(stem, pixels) != of(stem, plain[0]), name


def test_options_of_speed_change_nothing(outputs, plain):
    for option, values in SPEED.items():
        after = outputs(option, *values)
        assert after[0].keys() == plain[0].keys()
        assert after == plain or option == "--batch-size", option


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--readout", "early"], "--readout early: it changes maps alone"),
        (["--ensemble", "2"], "--ensemble 2: nothing shows it"),
        (["--ensemble-output", "mean"], "--ensemble-output mean: it chooses among samples"),
        (["--scale", "db"], "--scale: .*picture.npy is an array"),
    ],
)
def test_options_without_an_effect_are_refused(inputs, checkpoint, tmp_path, given, message):
    sar = inputs / "picture.png"
    if "--scale" in given:
        sar = tmp_path / "picture.npy"
        np.save(sar, np.ones((8, 8), np.float32))
    argv = ["--sar-dir", sar, "--output-dir", tmp_path / "eo", "--checkpoint", checkpoint, *given]
    with pytest.raises(UserError, match=message):
        command.main([str(word) for word in argv])
