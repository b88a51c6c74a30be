"""test.py: any image of any size => EO, confidence and variance, equal to plain diffusers; what is refused and skipped."""

import errno
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
from conftest import tiny_unet
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import CLIPTextModel, CLIPTokenizer

from cdiffset import errors, pipeline
from cdiffset.config import Config
from cdiffset.errors import UserError
from cdiffset.inference import record
from cdiffset.pipeline import pad_to_multiple

REPO = Path(__file__).parents[1]
FACTOR, STEPS = 4, 3  # of the tiny VAE; DDIM steps
KINDS = (("eo", "png"), ("confidence", "png"), ("variance", "tif"))
SIZES = {"square.png": (16, 16), "a/wide.png": (10, 27), "a/b/one.png": (1, 1), "strip.png": (3, 50)}  # H, W
PROMPT = "electro-optical image"

_spec = importlib.util.spec_from_file_location("translation_command", REPO / "test.py")  # `test` is Python's own package
command = importlib.util.module_from_spec(_spec)
sys.modules["translation_command"] = command
_spec.loader.exec_module(command)


def save_checkpoint(folder: Path, base: str, outputs: int, **settings) -> Path:
    """A checkpoint folder as training leaves it, with random weights and a variance that reaches both its limits."""
    unet = tiny_unet(in_channels=8, out_channels=outputs)
    if outputs == 5:
        unet.conv_out.weight.data[4] *= 60
    unet.save_pretrained(folder / "unet")
    config = Config(pretrained_model_name_or_path=base, confidence=outputs == 5, **settings)
    (folder / "checkpoint.json").write_text(json.dumps({"iteration": 1, "config": asdict(config)}))
    return folder


@pytest.fixture(scope="module")
def stage1(tiny_base, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("stage1"), tiny_base, 4)


@pytest.fixture(scope="module")
def stage2(tiny_base, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("stage2"), tiny_base, 5)


def grey(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, height, width]).integers(0, 256, (height, width), dtype=np.uint8)


def save(path: Path, pixels: np.ndarray) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.fixture(scope="module")
def sar_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sar")
    for name, size in SIZES.items():
        save(folder / name, grey(*size))
    return folder


@pytest.fixture
def translate(stage2, tmp_path):
    """Run test.py in process into new folders => the folder that holds eo/, confidence/ and variance/."""

    def run(sar_dir: Path, name="out", maps=True, code=0, checkpoint=stage2, **options) -> Path:
        assert command.main(arguments(sar_dir, tmp_path / name, maps, checkpoint, **options)) == code
        return tmp_path / name

    return run


def arguments(sar_dir, out: Path, maps: bool, checkpoint, **options) -> list[str]:
    options = {"num_inference_steps": STEPS, "device": "cpu", **options}
    words = ["--sar-dir", sar_dir, "--output-dir", out / "eo", "--checkpoint", checkpoint]
    words += ["--conf-dir", out / "confidence", "--variance-dir", out / "variance"] if maps else []
    for name, value in options.items():
        words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [value])
    return [str(word) for word in words]


def read(path: Path) -> np.ndarray:
    """8-bit picture as int, so that differences do not wrap."""
    return np.array(Image.open(path)).astype(int)


def read_variance(path: Path) -> np.ndarray:
    with rasterio.open(path) as source:
        assert source.count == 1 and source.dtypes == ("float32",)
        return source.read(1)


def files(folder: Path) -> set[str]:
    """Relative paths of all but the records of settings."""
    paths = {path for path in folder.rglob("*") if path.is_file() and path.name != record.FILE_NAME}
    return {path.relative_to(folder).as_posix() for path in paths}


# ----------------------------------------------------------------------------------------------------------- the base model
@pytest.mark.parametrize("written", ["bases/gone", "./gone", "/nowhere/gone"])
def test_a_base_that_is_not_here_is_named_with_its_record_and_the_option(sar_dir, tiny_base, tmp_path, capsys, written):
    checkpoint = save_checkpoint(tmp_path / "checkpoint", written, 5)
    words = arguments(sar_dir, tmp_path / "out", False, checkpoint)
    assert errors.run(command.main, words) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: base model {written!r}, recorded in {checkpoint / 'checkpoint.json'}, is not here")
    assert "give --pretrained-model-name-or-path" in line and not (tmp_path / "out").exists()
    assert command.main([*words, "--pretrained-model-name-or-path", tiny_base]) == 0


# ---------------------------------------------------------------------------------------------- the same, by other means
def reflected(length: int) -> np.ndarray:
    """Indices that continue `length` pixels to a multiple of the VAE's factor by going back and forth."""
    index = np.arange(-(-length // FACTOR) * FACTOR)
    if length == 1:
        return index * 0
    index = index % (2 * length - 2)
    return np.minimum(index, 2 * length - 2 - index)


@torch.no_grad()
def by_hand(pixels: np.ndarray, base: str, unet_folder: Path, seed=0, prediction_type="epsilon", prompt=PROMPT, steps=STEPS):
    """SAR [H, W] in 0-255 => (EO [H, W, 3] in 0-255, confidence [H, W] in 0-255, σ² [H, W]), with nothing of this code."""
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(unet_folder).eval()
    tokens = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")(prompt, return_tensors="pt").input_ids
    text = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)(tokens).last_hidden_state
    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, set_alpha_to_one=False,
        steps_offset=1, timestep_spacing="leading", prediction_type=prediction_type,
    )  # fmt: skip
    height, width = pixels.shape
    padded = pixels[reflected(height)][:, reflected(width)].astype(np.float32) / 127.5 - 1
    sar = vae.encode(torch.from_numpy(padded).expand(1, 3, -1, -1)).latent_dist.mean * vae.config.scaling_factor
    content = np.repeat(pixels.astype("<f4")[..., None], 3, axis=2).tobytes()  # [H,W,3]
    own_seed = int(hashlib.sha256(f"{seed}\0".encode() + content).hexdigest()[:16], 16) // 2
    z = torch.randn(1, 4, *sar.shape[2:], generator=torch.Generator().manual_seed(own_seed))
    scheduler.set_timesteps(steps)
    at = {}  # timestep => σ²
    for t in scheduler.timesteps:
        output = unet(torch.cat([sar, z], 1), t, text).sample
        at[t.item()] = (F.softplus(output[:, 4:].double() + np.log(np.exp(1 - 1e-6) - 1)) + 1e-6).clamp(1e-6, 10)
        z = scheduler.step(output[:, :4], t, z).prev_sample
    below, above = max((t for t in at if t <= 481), default=min(at)), min((t for t in at if t >= 481), default=max(at))
    share = (481 - below) / (above - below) if below < above else 1.0
    sigma2 = share * at[above] + (1 - share) * at[below]
    eo = vae.decode(z / vae.config.scaling_factor).sample[0].clamp(-1, 1).permute(1, 2, 0).numpy()
    certain = 1 / sigma2
    certain = (
        (certain - certain.min()) / (certain.max() - certain.min()) if certain.min() < certain.max() else certain / certain
    )
    confidence, variance = (F.interpolate(m, padded.shape, mode="bicubic")[0, 0].numpy() for m in (certain, sigma2))
    whole = (eo + 1) * 127.5, confidence.clip(0, 1) * 255, variance.clip(sigma2.min(), sigma2.max())
    return tuple(image[:height, :width] for image in whole)


def assert_equal_to_by_hand(out: Path, name: str, expected) -> None:
    eo, confidence, variance = expected
    found = read(out / "eo" / f"{name}.png")
    assert found.shape == eo.shape and np.abs(found - eo).max() <= 1
    found = Image.open(out / "confidence" / f"{name}.png")
    assert found.mode == "L" and np.abs(np.array(found).astype(int) - confidence).max() <= 1
    found = read_variance(out / "variance" / f"{name}.tif")
    assert found.shape == variance.shape and np.allclose(found, variance, rtol=1e-2, atol=1e-3)
    assert found.min() >= np.float32(1e-6) and found.max() <= 10


def test_equal_to_plain_diffusers_at_every_size(translate, sar_dir, tiny_base, stage2):
    """Every image of the tree, at its relative path, in its own size."""
    out = translate(sar_dir)
    stems = {name.removesuffix(".png") for name in SIZES}
    for kind, suffix in KINDS:
        assert files(out / kind) == {f"{stem}.{suffix}" for stem in stems}  # and no temporary files
    for name, size in SIZES.items():
        expected = by_hand(grey(*size), tiny_base, stage2 / "unet")
        assert_equal_to_by_hand(out, name.removesuffix(".png"), expected)
    variance = read_variance(out / "variance" / "strip.tif")
    assert variance.min() < 0.01 and variance.max() > 5 and np.ptp(read(out / "confidence" / "strip.png")) > 200


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_equal_to_plain_diffusers_at_other_lengths_and_seeds(translate, tiny_base, stage2, tmp_path, steps):
    save(tmp_path / "sar" / "x.png", grey(12, 12))
    out = translate(tmp_path / "sar", num_inference_steps=steps, seed=7)
    assert_equal_to_by_hand(out, "x", by_hand(grey(12, 12), tiny_base, stage2 / "unet", seed=7, steps=steps))


def test_jpeg_and_16_bit_tiff(translate, tiny_base, stage2, tmp_path):
    (tmp_path / "sar").mkdir()
    Image.fromarray(grey(16, 16)).save(tmp_path / "sar" / "photo.jpeg", quality=90)
    deep = np.random.default_rng(1).gamma(1, 3000, (14, 18)).clip(0, 65535).astype(np.uint16)
    profile = {"driver": "GTiff", "height": 14, "width": 18, "count": 1, "dtype": "uint16"}
    with rasterio.open(tmp_path / "sar" / "deep.tif", "w", **profile) as target:
        target.write(deep, 1)
    out = translate(tmp_path / "sar")
    photo = np.array(Image.open(tmp_path / "sar" / "photo.jpeg"))
    assert_equal_to_by_hand(out, "photo", by_hand(photo, tiny_base, stage2 / "unet"))
    low, high = np.percentile(deep, (1, 99))
    stretched = (deep.clip(low, high) - low) / (high - low) * 255
    assert_equal_to_by_hand(out, "deep", by_hand(stretched, tiny_base, stage2 / "unet"))


# ------------------------------------------------------------------------------------- what a result does not depend on
def test_batches_of_4_equal_batches_of_1(translate, sar_dir, tmp_path):
    """7 images of one padded size among others: a full batch, a short one, and the others' own."""
    for index in range(7):
        save(tmp_path / "sar" / f"{index}.png", grey(16, 15 + index % 2, seed=index))
    for name, size in SIZES.items():
        save(tmp_path / "sar" / name, grey(*size))
    single, fours = translate(tmp_path / "sar", "single"), translate(tmp_path / "sar", "fours", batch_size=4)
    assert files(single) == files(fours) and len(files(single)) == 3 * (7 + len(SIZES))
    for name in files(single):
        if name.endswith(".tif"):
            assert np.allclose(read_variance(single / name), read_variance(fours / name), rtol=1e-2, atol=1e-3)
        else:
            assert np.abs(read(single / name) - read(fours / name)).max() <= 1
    distinct = {(single / "eo" / f"{index}.png").read_bytes() for index in range(7)}
    assert len(distinct) == 7


def test_an_image_alone_equals_itself_among_others(translate, sar_dir, tmp_path):
    out = translate(sar_dir, "all")
    save(tmp_path / "sar" / "renamed.png", grey(*SIZES["strip.png"]))
    alone = translate(tmp_path / "sar", "alone")
    for kind, suffix in KINDS:
        assert (alone / kind / f"renamed.{suffix}").read_bytes() == (out / kind / f"strip.{suffix}").read_bytes()


def test_the_seed_decides(translate, tmp_path):
    save(tmp_path / "sar" / "x.png", grey(16, 16))
    first, again, other = (
        read(translate(tmp_path / "sar", name, maps=False, **options) / "eo" / "x.png")
        for name, options in (("a", {}), ("b", {"seed": 0}), ("c", {"seed": 1}))
    )
    assert np.array_equal(first, again) and np.abs(first - other).max() > 10


def test_an_ensemble_gives_its_first_sample_or_what_all_agree_on(translate, tmp_path):
    save(tmp_path / "sar" / "x.png", grey(13, 16))
    singles = [read(translate(tmp_path / "sar", f"s{seed}", seed=seed) / "eo" / "x.png") for seed in (4, 5, 6)]
    runs = {
        output: translate(
            tmp_path / "sar", output, seed=4, ensemble=3, ensemble_output=output, spread_dir=tmp_path / output / "s"
        )
        for output in ("first", "mean", "median")
    }
    assert (runs["first"] / "eo" / "x.png").read_bytes() == (tmp_path / "s4" / "eo" / "x.png").read_bytes()
    for output, expected in (("mean", np.mean(singles, 0)), ("median", np.median(singles, 0))):
        assert np.abs(read(runs[output] / "eo" / "x.png") - expected).max() <= 1
    spread = np.std(singles, 0, ddof=1).mean(-1)
    found = read_variance(tmp_path / "mean" / "s" / "x.tif")
    assert found.shape == (13, 16) and np.abs(found - spread).max() < 1 and spread.max() > 5  # rounding of the singles
    together = translate(tmp_path / "sar", "3", seed=4, ensemble=3, ensemble_output="mean", batch_size=3)
    assert np.abs(read(together / "eo" / "x.png") - read(runs["mean"] / "eo" / "x.png")).max() <= 1


@pytest.mark.parametrize("readout", ["first", "early"])
def test_a_readout_changes_the_variance_alone(translate, tmp_path, readout):
    save(tmp_path / "sar" / "x.png", grey(13, 16))
    plain, other = translate(tmp_path / "sar", "plain"), translate(tmp_path / "sar", "other", readout=readout)
    assert (plain / "eo" / "x.png").read_bytes() == (other / "eo" / "x.png").read_bytes()
    values = [read_variance(out / "variance" / "x.tif") for out in (plain, other)]
    assert values[0].shape == values[1].shape == (13, 16) and not np.allclose(*values, rtol=0.05)


# ------------------------------------------------------------------------------------------------------- skip-existing
def stamps(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {name: ((folder / name).stat().st_mtime_ns, (folder / name).read_bytes()) for name in files(folder)}


def test_skip_existing_leaves_files_alone_and_makes_the_missing(translate, sar_dir, capsys):
    out = translate(sar_dir)
    before = stamps(out)
    assert stamps(translate(sar_dir, skip_existing=True)) == before
    (out / "eo" / "strip.png").unlink()
    (out / "confidence" / "square.png").unlink()
    (out / "variance" / "a" / "wide.tif").unlink()
    capsys.readouterr()
    translate(sar_dir, skip_existing=True)
    output = capsys.readouterr().out
    assert f"1 of {len(SIZES)} images are there already" in output and "3 images translated" in output
    after = stamps(out)
    assert {name: content for name, (_, content) in after.items()} == {name: content for name, (_, content) in before.items()}
    untouched = {name for name in before if "one" in name}
    assert len(untouched) == 3 and all(after[name] == before[name] for name in untouched)
    translate(sar_dir)  # without the option, everything is made anew
    assert all(stamp[0] > after[name][0] for name, stamp in stamps(out).items())


def test_an_image_that_has_changed_since_is_made_again(translate, tmp_path, capsys):
    Image.fromarray(np.full((8, 8), 9, np.uint8)).save(tmp_path / "a.png")
    out = translate(tmp_path / "a.png")
    before = stamps(out)
    Image.fromarray(np.full((8, 8), 90, np.uint8)).save(tmp_path / "a.png")
    later_ns = (out / "eo" / "a.png").stat().st_mtime_ns + 10**9
    os.utime(tmp_path / "a.png", ns=(later_ns, later_ns))
    translate(tmp_path / "a.png", skip_existing=True)
    assert stamps(out)["eo/a.png"] != before["eo/a.png"] and "there already" not in capsys.readouterr().out


def test_only_the_wanted_outputs_count_as_missing(translate, sar_dir, capsys):
    out = translate(sar_dir, maps=False)
    assert set(path.name for path in out.iterdir()) == {"eo"}
    before = stamps(out)
    assert stamps(translate(sar_dir, maps=False, skip_existing=True)) == before
    translate(sar_dir, skip_existing=True)  # now with maps
    assert len(files(out / "confidence")) == len(files(out / "variance")) == len(SIZES)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 5}, "seed: 0 -> 5"),
        ({"prompt": "radar"}, f"prompt: {PROMPT} -> radar"),
        ({"num_inference_steps": 4}, "num_inference_steps: 3 -> 4"),
        ({"precision": "bf16"}, "precision: fp32 -> bf16"),
        ({"tile": 512}, "tile: 1024 -> 512"),
        ({"checkpoint": "stage1"}, "weights: "),
        ({"base": True}, "base: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_skip_existing_refuses_files_of_other_settings(translate, sar_dir, stage1, tiny_base, tmp_path, changes, message):
    out = translate(sar_dir, maps=False)
    before = stamps(out)
    if "checkpoint" in changes:
        changes = {"checkpoint": stage1}
    if "base" in changes:
        changes = {"pretrained_model_name_or_path": shutil.copytree(tiny_base, tmp_path / "base")}
    with pytest.raises(UserError, match=re.escape(f"{out / 'eo'} holds files of other settings (")) as caught:
        translate(sar_dir, maps=False, skip_existing=True, **changes)
    assert message in str(caught.value) and "leave out --skip-existing" in str(caught.value) and stamps(out) == before


def test_the_record_holds_every_setting_that_changes_the_files(translate, sar_dir):
    """Under names that never change: a folder's record is compared by them."""
    out = translate(sar_dir, maps=False)
    recorded = json.loads((out / "eo" / record.FILE_NAME).read_text())["settings"]
    names = "weights base prompt prediction_type precision seed scheduler timestep_spacing num_inference_steps readout ensemble"
    names += " ensemble_output tile overlap bands channels scale stretch despeckle nodata gsd resample_gsd"
    assert recorded.keys() == set(names.split())


def test_skip_existing_does_not_mind_where_the_checkpoint_lies_nor_how_many_images_go_together(
    translate, sar_dir, stage2, tmp_path
):
    before = stamps(translate(sar_dir, maps=False))
    copy = shutil.copytree(stage2, tmp_path / "copy")
    assert stamps(translate(sar_dir, maps=False, skip_existing=True, checkpoint=copy, batch_size=2)) == before


def test_what_an_earlier_run_of_other_settings_left_does_not_count_as_there(translate, tmp_path, capsys):
    for folder, names in (("few", "a"), ("all", "ab")):
        for seed, name in enumerate(names):
            save(tmp_path / folder / f"{name}.png", grey(8, 8, seed=seed))
    out = translate(tmp_path / "all", maps=False)
    first = stamps(out)
    translate(tmp_path / "few", maps=False, seed=1)  # replaces a.png alone, and ends before b.png
    second = stamps(out)
    assert second["eo/a.png"] != first["eo/a.png"] and second["eo/b.png"] == first["eo/b.png"]
    capsys.readouterr()
    translate(tmp_path / "all", maps=False, seed=1, skip_existing=True)
    assert "1 of 2 images are there already" in capsys.readouterr().out and stamps(out)["eo/a.png"] == second["eo/a.png"]
    whole = translate(tmp_path / "all", "whole", maps=False, seed=1)
    assert all((out / name).read_bytes() == (whole / name).read_bytes() for name in files(whole))


def test_skip_existing_keeps_files_without_a_record_and_says_so(translate, sar_dir, capsys):
    out = translate(sar_dir, maps=False)
    (out / "eo" / record.FILE_NAME).unlink()
    before = stamps(out)
    (out / "eo" / "strip.png").unlink()
    capsys.readouterr()
    for _ in range(2):
        translate(sar_dir, maps=False, skip_existing=True, seed=1)
        assert f"note: {out / 'eo'} has no record of how its files were made" in capsys.readouterr().out
    del before["eo/strip.png"]
    assert before.items() <= stamps(out).items() and not (out / "eo" / record.FILE_NAME).exists()


# ------------------------------------------------------------------------------------------------------------ failures
@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_broken_image_is_named_and_the_rest_done(translate, tmp_path, capsys, batch_size):
    for index in range(3):
        save(tmp_path / "sar" / f"{index}.png", grey(8, 8, seed=index))
    broken = tmp_path / "sar" / "1.png"
    broken.write_bytes(broken.read_bytes()[:60])
    out = translate(tmp_path / "sar", code=1, batch_size=batch_size)
    captured = capsys.readouterr()
    assert f"skipped: {broken}: " in captured.err and f"1 skipped: {broken}" in captured.err
    assert "2 images translated" in captured.out and "Traceback" not in captured.err
    assert files(out) == {f"{kind}/{i}.{suffix}" for kind, suffix in KINDS for i in (0, 2)}


@pytest.mark.parametrize("long_path", [False, True], ids=["name", "path"])
def test_an_output_that_would_have_too_long_a_name_costs_no_other_image(translate, tmp_path, monkeypatch, capsys, long_path):
    """A path that only the deeper output folder makes too long; a name, on a file system that allows fewer bytes."""
    if long_path:
        folders = Path(*["d" * 200] * 18)
        name = f"{'e' * 200}/{'f' * 200}/long.png"
    else:
        folders, name, replace = Path("out"), f"{'n' * 251}.png", os.replace

        def shorter(source, target):
            if len(Path(target).name) > 200:
                raise OSError(errno.ENAMETOOLONG, os.strerror(errno.ENAMETOOLONG), str(source), None, str(target))
            replace(source, target)

        monkeypatch.setattr(os, "replace", shorter)
    for image in (name, "short.png"):
        save(tmp_path / "sar" / image, grey(8, 8))
    for skip in ({}, {"skip_existing": True}):
        out = translate(tmp_path / "sar", folders, maps=False, code=1, **skip)
        assert files(out) == {"eo/short.png"}
        captured = capsys.readouterr()
        assert f"skipped: {tmp_path / 'sar' / name}: an output of it would have too long a name or path" in captured.err
        assert "1 skipped: " in captured.err and "Traceback" not in captured.err


def test_a_name_as_long_as_the_file_system_allows_is_translated(translate, tmp_path):
    save(tmp_path / "sar" / f"{'n' * 251}.png", grey(8, 8))
    assert files(translate(tmp_path / "sar")) == {f"{kind}/{'n' * 251}.{suffix}" for kind, suffix in KINDS}


def test_a_file_whose_name_is_not_utf8_is_refused(stage2, tmp_path, capsys):
    path = save(tmp_path / os.fsdecode(b"\xff.png"), grey(8, 8))
    assert errors.run(command.main, arguments(path, tmp_path / "out", False, stage2)) == 2
    assert "file names that are not UTF-8" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_a_write_that_fails_leaves_nothing_half_done(translate, tmp_path, monkeypatch):
    save(tmp_path / "sar" / "x.png", grey(8, 8))
    replace = os.replace

    def fail(source, target):
        if Path(target).parent.name == "eo" and Path(target).suffix == ".png":
            raise OSError(28, "No space left on device")
        return replace(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match="No space left on device"):
        translate(tmp_path / "sar")
    assert files(tmp_path / "out") == {"confidence/x.png", "variance/x.tif"}  # the EO image is the last to come


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"--sar-dir": "missing"}, "--sar-dir: there is no folder .*missing"),
        ({"--sar-dir": "empty"}, ".*empty: holds no images"),
        ({"--sar-dir": "twins"}, "--sar-dir: x.jpg and x.png would both become x.png"),
        ({"--output-dir": "sar"}, "--output-dir: .*sar is --sar-dir already"),
        ({"--conf-dir": "out/../out"}, "--conf-dir: .*out is --output-dir already"),
        ({"--conf-dir": "maps", "--variance-dir": "maps"}, "--variance-dir: .*maps is --conf-dir already"),
        ({"--output-dir": "file"}, "--output-dir: .*file"),
        ({"--conf-dir": "file"}, "--conf-dir: .*file"),
        ({"--num-inference-steps": "0"}, "--num-inference-steps: expected at least 1 and at most 999, found 0"),
        ({"--num-inference-steps": "1000"}, "--num-inference-steps: .*found 1000"),
        ({"--batch-size": "0"}, "--batch-size: expected at least 1, found 0"),
        ({"--seed": "-1"}, "--seed: expected at least 0 .*found -1"),
        ({"--checkpoint": "missing"}, "--checkpoint: there is no .*missing"),
        ({"--checkpoint": "sar"}, "--checkpoint: .*sar holds none of"),
        ({"--pretrained-model-name-or-path": "./missing"}, "pretrained_model_name_or_path: there is no folder"),
        ({"--device": "cuda:77"}, "--device: 'cuda:77' is not available here"),
        ({"--device": "teapot"}, "--device: 'teapot' is not available here"),
    ],
    ids=lambda value: " ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else "",
)
def test_wrong_options_are_one_line(stage2, tmp_path, monkeypatch, capsys, changes, message):
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "sar" / "x.png", grey(8, 8))
    save(tmp_path / "twins" / "x.png", grey(8, 8))
    save(tmp_path / "twins" / "x.jpg", grey(8, 8))
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    before = files(tmp_path)
    options = {"--sar-dir": "sar", "--output-dir": "out", "--checkpoint": str(stage2), "--device": "cpu", **changes}
    assert errors.run(command.main, [word for pair in options.items() for word in pair]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line), line
    assert files(tmp_path) == before


@pytest.mark.parametrize("option", ["--conf-dir", "--variance-dir"])
def test_a_stage_1_checkpoint_has_no_confidence(translate, stage1, sar_dir, tmp_path, option):
    out = translate(sar_dir, "plain", maps=False, checkpoint=stage1)
    assert files(out / "eo") == set(SIZES)
    with pytest.raises(UserError, match=f"{option}.*stage 1 checkpoint \\(4 output channels\\), .* stage 2 \\(5\\)"):
        command.main([*arguments(sar_dir, tmp_path / "maps", False, stage1), option, str(tmp_path / "maps")])
    assert not (tmp_path / "maps").exists()


def test_a_translation_that_is_not_finite_is_refused(translate, tiny_base, tmp_path):
    """Weights that are finite, but lead out of the finite numbers."""
    unet = tiny_unet(in_channels=8, out_channels=4)
    unet.conv_out.weight.data *= 1e30
    unet.save_pretrained(tmp_path / "huge")
    save(tmp_path / "sar" / "x.png", grey(8, 8))
    options = {"checkpoint": tmp_path / "huge", "pretrained_model_name_or_path": tiny_base, "maps": False}
    with pytest.raises(UserError, match="not finite: .*--precision fp32"):
        translate(tmp_path / "sar", **options, precision="bf16", num_inference_steps=2)
    assert not (tmp_path / "out").exists()


# --------------------------------------------------------------------------------------------------- settings and types
def test_the_checkpoints_own_settings_are_the_defaults(translate, tiny_base, tmp_path):
    """Base, prompt and prediction type; each option overrides its own."""
    folder = save_checkpoint(tmp_path / "trained", tiny_base, 5, prompt="radar", prediction_type="sample")
    save(tmp_path / "sar" / "x.png", grey(12, 12))

    def expect(name, expected: dict, **options):
        out = translate(tmp_path / "sar", name, checkpoint=folder, **options)
        assert_equal_to_by_hand(out, "x", by_hand(grey(12, 12), tiny_base, folder / "unet", **expected))
        return read(out / "eo" / "x.png")

    own = expect("own", {"prompt": "radar", "prediction_type": "sample"})
    v = expect("v", {"prompt": "radar", "prediction_type": "v_prediction"}, prediction_type="v_prediction")
    null = expect("null", {"prompt": "", "prediction_type": "sample"}, prompt="")
    assert np.abs(own - v).max() > 10 and np.abs(own - null).max() > 0


def test_the_base_can_be_another(translate, tiny_base, stage2, tmp_path):
    other = shutil.copytree(tiny_base, tmp_path / "other")
    config = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps({**config, "scaling_factor": 0.3}))
    save(tmp_path / "sar" / "x.png", grey(12, 12))
    out = translate(tmp_path / "sar", pretrained_model_name_or_path=other)
    assert_equal_to_by_hand(out, "x", by_hand(grey(12, 12), str(other), stage2 / "unet"))
    assert not np.array_equal(read(translate(tmp_path / "sar", "own") / "eo" / "x.png"), read(out / "eo" / "x.png"))


def test_bf16_is_close_to_fp32(translate, sar_dir):
    full, half = translate(sar_dir, "full"), translate(sar_dir, "half", precision="bf16")
    differences = [np.abs(read(full / "eo" / name) - read(half / "eo" / name)) for name in SIZES]
    assert files(full) == files(half) and 0 < max(d.max() for d in differences) < 40
    assert np.mean(np.concatenate([d.ravel() for d in differences])) < 4


def test_auto_batches_equal_batches_of_1(translate, tmp_path, capsys):
    for index in range(3):
        save(tmp_path / "sar" / f"{index}.png", grey(16, 16, seed=index))
    single, auto = translate(tmp_path / "sar", "single"), translate(tmp_path / "sar", "auto", batch_size="auto")
    assert "--batch-size auto: 64 together of 16 x 16 px" in capsys.readouterr().out
    assert files(single) == files(auto)
    for name in files(single / "eo"):
        assert np.abs(read(single / "eo" / name) - read(auto / "eo" / name)).max() <= 1


def test_a_device_out_of_memory_gets_half_as_many(translate, tmp_path, monkeypatch, capsys):
    for index in range(5):
        save(tmp_path / "sar" / f"{index}.png", grey(12, 12, seed=index))
    expected, tried = translate(tmp_path / "sar", "expected", ensemble=2), []

    def limited(unet, vae, scheduler, sar, *rest, **named):
        tried.append(len(sar))
        if len(sar) > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(unet, vae, scheduler, sar, *rest, **named)

    original, limit = pipeline.translate, 1
    monkeypatch.setattr("cdiffset.pipeline.translate", limited)
    found = translate(tmp_path / "sar", "found", batch_size=4, ensemble=2)
    assert tried[:3] == [4, 2, 1] and set(tried[3:]) == {1} and len(tried) == 2 + 5 * 2
    assert "4 images together do not fit into the memory of cpu: from now on 2" in capsys.readouterr().out
    for name in files(expected):
        if name.endswith(".png"):
            assert np.abs(read(expected / name) - read(found / name)).max() <= 1
    limit = 0
    with pytest.raises(UserError, match="not even one image of 12 x 12 px fits into the memory of cpu"):
        translate(tmp_path / "sar", "none", batch_size=4)


def test_a_compiled_unet_translates_alike(translate, tmp_path, monkeypatch):
    """Traced as a whole, without the compiler of the machine behind it, which takes minutes."""
    save(tmp_path / "sar" / "x.png", grey(16, 16))
    traced, compile_module = [], torch.nn.Module.compile

    def backend(graph, _):
        traced.append(graph)
        return graph.forward

    monkeypatch.setattr(torch.nn.Module, "compile", lambda net: compile_module(net, backend=backend))
    plain, compiled = translate(tmp_path / "sar", "plain"), translate(tmp_path / "sar", "compiled", compile=True)
    assert len(traced) == 1
    for kind, suffix in KINDS[:2]:
        assert np.abs(read(plain / kind / f"x.{suffix}") - read(compiled / kind / f"x.{suffix}")).max() <= 1


# --------------------------------------------------------------------------------------------------------- command line
def test_the_command_line(sar_dir, tiny_base, pair_folders, tmp_path):
    """Help, and a translation by the checkpoint that a training run left, from another folder."""
    import main as training

    folders = {s: {f"{k}_dir": str(pair_folders / s / k) for k in ("sar", "eo")} | {"split": s} for s in ("train", "test")}
    settings = {
        "work_dir": str(tmp_path / "run"), "pretrained_model_name_or_path": tiny_base, "num_iter": 1, "batch_size": 2,
        "num_warmup": 0, "feeder": "feeders.feeder.PairedFolderFeeder", "num_worker": 0, "num_inference_steps": 1,
        "val_len": 1, "lpips": False, "train_feeder_args": {**folders["train"], "crop_size": 32},
        "test_feeder_args": {**folders["test"], "crop_size": 32}, "report_to": "none", "ema_decay": 0.5,
    }  # fmt: skip
    training.main(
        [
            word
            for key, value in settings.items()
            for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
        ]
    )
    script = [sys.executable, str(REPO / "test.py")]
    usage = subprocess.run([*script, "--help"], capture_output=True, text=True, timeout=120)
    assert usage.returncode == 0
    options = "sar-dir output-dir conf-dir variance-dir checkpoint num-inference-steps seed batch-size precision device"
    assert all(f"--{option} " in usage.stdout for option in f"{options} skip-existing prompt".split())
    words = arguments(sar_dir, tmp_path / "out", True, tmp_path / "run" / "best")
    done = subprocess.run([*script, *words], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert f"{len(SIZES)} images translated in" in done.stdout and str(tmp_path / "run/best/unet_ema") in done.stdout
    assert files(tmp_path / "out" / "eo") == set(SIZES)
    expected = by_hand(grey(16, 16), tiny_base, tmp_path / "run" / "best" / "unet_ema")
    assert np.abs(read(tmp_path / "out" / "eo" / "square.png") - expected[0]).max() <= 1


# --------------------------------------------------------------------------------------------------------------- padding
def mirrored(index: int, length: int) -> int:
    """Where an index beyond the end comes to lie, walking back and forth between the first and the last."""
    place = index % max(1, 2 * (length - 1))
    return min(place, 2 * (length - 1) - place)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([4, 8, 64]))
def test_padding_continues_any_size_by_reflection_and_crops_back(height, width, factor):
    pixels = np.arange(height * width * 3, dtype=np.float32).reshape(height, width, 3)
    padded = pad_to_multiple(pixels, factor)
    rows, columns = padded.shape[:2]
    assert rows % factor == columns % factor == 0 and 0 <= rows - height < factor and 0 <= columns - width < factor
    assert np.array_equal(padded[:height, :width], pixels)
    at = [mirrored(row, height) for row in range(rows)], [mirrored(column, width) for column in range(columns)]
    assert np.array_equal(padded, pixels[at[0]][:, at[1]])
