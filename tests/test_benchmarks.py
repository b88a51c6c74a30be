"""The speed benchmarks: the reference loop against this project, their arithmetic, and every script on a tiny model."""

import json
import math
import os
import sys
import time

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from torch import nn

import test as test_py
from benchmarks import reference, scaling, speed, startup, train, translate
from cdiffset import diffusion
from cdiffset.config import KNOBS
from cdiffset.images import read_sar, to_signed, to_uint8
from cdiffset.model import embed_prompt, encode, load_scheduler, load_vae, patch_conv_in, patch_conv_out


@pytest.fixture(scope="module")
def models(tiny_base):
    """The reference's models, its variance channel away from 0."""
    models = reference.load_models(tiny_base, "cpu")
    torch.manual_seed(3)
    nn.init.normal_(models.unet.conv_out.weight, std=0.1)
    return models


# ----------------------------------------------------------------------------------------- the reference loop is the method
def test_reference_loads_what_the_project_loads(tiny_base):
    models = reference.load_models(tiny_base, "cpu")
    ours = patch_conv_out(patch_conv_in(tiny_unet())).state_dict()
    theirs = models.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(models.prompt, embed_prompt(tiny_base, reference.PROMPT))


def test_reference_loss_and_gradient_are_the_projects(models, tiny_base):
    torch.manual_seed(0)
    z_sar, z_eo, noise = torch.randn(3, 5, 4, 8, 8)
    timesteps = torch.tensor([0, 10, 400, 800, 999])
    theirs = reference.training_loss(models, z_sar, z_eo, noise, timesteps)
    theirs_grad = torch.autograd.grad(theirs, list(models.unet.parameters()))
    scheduler = load_scheduler(tiny_base, "epsilon")
    ours, _ = diffusion.training_loss(models.unet, scheduler, z_sar, z_eo, noise, timesteps, models.prompt, "timestep")
    ours_grad = torch.autograd.grad(ours, list(models.unet.parameters()))
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_reference_translation_is_the_projects(models, tiny_base):
    sar = torch.rand(1, 3, 40, 32) * 2 - 1
    theirs, theirs_sigma2 = reference.translate(models, sar, 50)
    scheduler = load_scheduler(tiny_base, "epsilon")
    vae = load_vae(tiny_base)
    noise = diffusion.image_noise(vae, 0, to_uint8(sar))
    ours, sigma2 = diffusion.translate(models.unet, vae, scheduler, sar, noise, models.prompt, 50)
    torch.testing.assert_close(ours, theirs.clamp(-1, 1), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sigma2, theirs_sigma2, rtol=1e-4, atol=1e-5)


def test_reference_reads_writes_and_encodes_as_the_project(models, pair_folders, tmp_path):
    file = pair_folders / "train/sar/0.png"
    pixels = to_signed(torch.from_numpy(read_sar(file)).permute(2, 0, 1))
    theirs = reference.read_image(file)
    assert torch.equal(theirs, pixels)
    torch.testing.assert_close(reference.encode(models, theirs[None]), encode(models.vae, pixels[None]))
    reference.write_image(tmp_path / "a/b.png", theirs)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a/b.png"))[..., 0], np.asarray(Image.open(file)))


def test_reference_training_takes_a_step_for_every_batch(models, pair_folders):
    loader = reference.make_loader(pair_folders / "train/sar", pair_folders / "train/eo", 2, 3, 0)
    batches = [tuple(images[..., :32, :32] for images in batch) for batch in loader]
    assert len(batches) == 3 and batches[0][0].shape == (2, 3, 32, 32)
    before = [parameter.detach().clone() for parameter in models.unet.parameters()]
    losses = list(reference.train(models, batches))
    assert len(losses) == 3 and all(map(math.isfinite, losses))
    assert any(not torch.equal(a, b) for a, b in zip(before, models.unet.parameters(), strict=True))


def test_reference_augments_both_images_alike(tmp_path):
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8)
    for kind in ("sar", "eo"):
        (tmp_path / kind).mkdir()
        Image.fromarray(pixels).save(tmp_path / kind / "0.png")
    pairs = reference.Pairs(tmp_path / "sar", tmp_path / "eo")
    torch.manual_seed(0)
    seen = set()
    for _ in range(60):
        sar, eo = pairs[0]
        assert torch.equal(sar, eo)
        seen.add(sar.numpy().tobytes())
    assert len(seen) == 8  # all flips and turns


# ----------------------------------------------------------------------------------------------------------------- arithmetic
def test_ratios_are_of_the_same_round():
    results = {
        "reference": [{"images_per_s": 1.0}, {"images_per_s": 2.0}, {"images_per_s": 4.0}],
        "fast": [{"images_per_s": 3.0}, {"images_per_s": 4.0}, {"failed": "out of memory"}],
        "broken": [{"failed": "x"}] * 3,
    }
    ratios = speed.compare(results, "images_per_s")
    assert ratios["reference"] == {"median": 1.0, "low": 1.0, "high": 1.0}
    assert ratios["fast"] == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert "broken" not in ratios
    assert speed.in_one(results["fast"], "images_per_s") == {"median": 3.5, "low": 3.0, "high": 4.0}
    assert speed.in_one(results["broken"], "images_per_s") is None


def test_speed_counts_from_the_first_batch_where_there_are_more():
    assert translate.images_per_second(10.0, [12.0, 14.0], 2) == 0.5
    assert translate.images_per_second(10.0, [30.0, 30.1, 31.0, 32.0, 32.5, 33.1], 2) == pytest.approx(4 / 3)


def test_psnr_of_files(tmp_path):
    for folder, value in (("a", 100), ("b", 110)):
        (tmp_path / folder).mkdir()
        Image.fromarray(np.full((4, 4, 3), value, np.uint8)).save(tmp_path / folder / "0.png")
    assert translate.psnr(tmp_path / "a", tmp_path / "b") == pytest.approx(20 * math.log10(25.5))
    assert translate.psnr(tmp_path / "a", tmp_path / "a") == pytest.approx(130)


def test_parts_are_timed_where_the_work_is():
    parts = speed.Parts("cpu")
    network = nn.Linear(2, 2)
    parts.watch(network, "forward")
    network(torch.ones(1, 2))
    assert list(parts.seconds()) == ["forward"]

    def slow():
        for _ in range(2):
            time.sleep(0.02)
            yield 1

    assert list(parts.watch_batches(slow())) == [1, 1]
    assert 0.04 <= parts.seconds()["load"] < 1
    parts.reset()
    assert parts.seconds() == {}


def test_flops_of_known_sizes():
    """Against the convolution's closed form, and Stable Diffusion's own figures."""
    flops = speed.count_flops("full", 256)
    assert flops["unet"] / 1e12 == pytest.approx(0.178, rel=0.01)
    assert flops["unet_training"] / flops["unet"] == pytest.approx(3, rel=0.01)
    assert 2 * flops["encode"] / 1e12 == pytest.approx(0.545, rel=0.01)
    tiny = speed.count_flops("tiny", 64)
    assert speed.count_flops("tiny", 64, batch=3) == {name: 3 * count for name, count in tiny.items()}


def test_full_architecture_is_stable_diffusions():
    with torch.device("meta"):
        unet, vae = speed.build_unet("full"), speed.build_vae("full")
    assert len(unet.state_dict()) == 686
    assert sum(parameter.numel() for parameter in unet.parameters()) == scaling.PARAMETERS == 865_925_125
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863


def test_curves_are_within_the_spread_of_seeds_or_not():
    flat = [1.0] * train.CURVE_WINDOW
    curves = {"a": flat, "b": [1.2] * len(flat), "near": [1.1] * len(flat), "far": [0.7] * len(flat)}
    rows = {row["name"]: row for row in train.judge_curves(curves, ["a", "b"])}
    assert rows["near"]["within"] and not rows["far"]["within"]
    assert rows["far"]["deviations"] == pytest.approx([0.3]) and rows["a"]["spread"] == pytest.approx([0.2])


def test_utilisation_counts_the_encoder_only_where_it_runs(monkeypatch):
    monkeypatch.setitem(train.ROWS, "cached", {"latent_cache": "x", "mixed_precision": "bf16"})
    result = {"images_per_s": 2.0, "parts": {"load": 1.0}, "peak_ram_gib": 3.0}
    results = {"reference": [result], "cached": [{**result, "images_per_s": 8.0}]}
    flops, ceiling = {"unet_training": 300, "encode": 100}, {"fp32": 2000.0, "bf16": 8000.0}
    plain, cached = train.judge(results, flops, ceiling)
    assert (plain["utilisation"], plain["utilisation_of"]) == (2 * 500 / 2000, "fp32")
    assert (cached["utilisation"], cached["utilisation_of"]) == (8 * 300 / 8000, "bf16")
    assert cached["ratio"]["median"] == 4 and cached["peak_ram_gib_ratio"]["median"] == 1
    assert "4×" in train.tables([plain, cached], "cpu")


def test_scaling_efficiency_is_of_the_same_round():
    def rounds(*speeds):
        return [{"images_per_s": speed, "peak_ram_gib": 9.0, "parts": {}} if speed else {"failed": "x"} for speed in speeds]

    results = {"a: 1 process": rounds(1.0, 2.0, 5.0), "a: 2 processes": rounds(2.0, 3.0, None)}
    results |= {"b: 1 process": rounds(None), "b: 2 processes": rounds(1.0)}
    a, b = train.judge_processes(results, 2)
    assert a["efficiency"] == {"median": 0.875, "low": 0.75, "high": 1.0} and a["failed"] == ["x"]
    assert (b["name"], b["efficiency"], b["failed"]) == ("b", None, ["x"])
    assert "| a | 2 (1 to 5) | 2.5 (2 to 3) | 0.875 (0.75 to 1) | 9 | 9 |" in train.processes_tables([a, b], 2, "cpu")


def test_cost_model_recovers_what_made_the_points():
    flop = [1e9, 3e9, 5e9, 9e9, 2e10]
    rate, fixed = scaling.fit([{"flop": f, "seconds": f / 2e11 + 0.01} for f in flop])
    assert rate == pytest.approx(2e11) and fixed == pytest.approx(0.01)
    rate, fixed = scaling.fit([{"flop": f, "seconds": f / 2e11 * (1 + f / 1e11)} for f in flop])  # would fit below zero
    assert fixed == 0 and rate > 0


def test_cost_of_many_gpus_by_hand():
    gpu = {"flops": 1e15, "memory": 5e12, "link": 4e11}
    flop = {"unet_training": 5e11, "encode": 3e11, "unet": 2e11, "decode": 6e11}
    one = scaling.training_cost(gpu, 1, flop, cached=False, read_s_per_px=1e-8)
    assert one["networks"] == pytest.approx(64 * 11e11 / 0.35e15) and one["kernel launches"] == 0
    assert one["gradient exchange"] == 0
    assert one["data"] == pytest.approx(64 * 2 * 256**2 * 1e-8 / 8)
    many = scaling.training_cost(gpu, 64, flop, cached=True, read_s_per_px=1e-8)
    assert many["networks"] + many["kernel launches"] == pytest.approx(0.03)
    assert many["gradient exchange"] == pytest.approx(2 * 63 / 64 * 865_925_125 * 4 / 4e11)
    area = scaling.area_cost(gpu, 4, flop, 50, 1e-7)
    assert area["networks"] == pytest.approx(1e12 / 384**2 * (3e11 + 1e13 + 6e11) / (0.35e15 * 4))
    assert scaling.latent_bytes(16_001, 8) == 16_001 * 8 * 2 * 4 * 32 * 32 * 4


# ----------------------------------------------------------------------------------------------------------------- the scripts
def run_script(script, work_dir, *options: str) -> dict:
    """Run a benchmark on the tiny model => its record."""
    file = work_dir / f"{script.__name__}.json"
    always = ["--quick", "--device", "cpu", "--rounds", "1", "--work-dir", str(work_dir), "--json", str(file)]
    assert script.main([*always, *options]) == 0
    record = json.loads(file.read_text())
    assert {"benchmark", "date", "machine", "versions", "command", "device", "architecture"} <= record.keys()
    assert record["ceiling_flops_per_s"]["fp32"] > 1e9
    return record


@pytest.fixture(scope="module")
def work_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("speed")


def test_training_benchmark(work_dir):
    record = run_script(train, work_dir, "--rows", "defaults", "--workers", "0")
    plain, ours = record["rows"]
    assert (plain["name"], ours["name"]) == ("reference", "defaults")
    for row in (plain, ours):
        assert {"load", "VAE encode", "U-Net forward", "backward", "optimizer", "other"} == row["parts_s"].keys()
        assert all(seconds >= 0 for seconds in row["parts_s"].values()), row["parts_s"]
        assert sum(row["parts_s"].values()) * row["images_per_s"]["median"] == pytest.approx(2)  # the batch
        assert row["peak_ram_gib"]["median"] > 0.2 and 0 < row["utilisation"] < 1
    assert ours["ratio"]["median"] == pytest.approx(ours["images_per_s"]["median"] / plain["images_per_s"]["median"])


def test_benchmark_of_two_processes(work_dir):
    record = run_script(train, work_dir, "--processes", "2", "--rows", "fsdp", "--workers", "0")
    (row,) = record["rows"]
    one, two = (spread["median"] for spread in row["images_per_s"])
    assert row["efficiency"]["median"] == pytest.approx(two / (2 * one))
    for parts, images_per_s, batch in zip(row["parts_s"], (one, two), (2, 4), strict=True):
        assert parts["backward"] > 0 and sum(parts.values()) * images_per_s == pytest.approx(batch)
    jobs = [json.loads(file.read_text()) for file in sorted(work_dir.glob("tiny/processes/*/0/job.json"))]
    assert [(job["batch_size"], job["settings"]) for job in jobs] == [(2, {}), (4, {"fsdp": True})]


def test_rows_that_need_another_package_are_refused_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(train, "find_spec", lambda name: None)
    with pytest.raises(SystemExit):
        train.main(["--quick"])  # of the headline rows one needs it
    line = capsys.readouterr().err.splitlines()[-1]
    assert "bf16_copy, AdamW8bit, gradient_checkpointing: needs pip install -r requirements-extra.txt" in line


def test_processes_below_two_are_refused(capsys):
    with pytest.raises(SystemExit):
        train.main(["--processes", "1"])
    assert "--processes: expected at least 2, found 1" in capsys.readouterr().err


def test_translation_benchmark(work_dir):
    record = run_script(translate, work_dir, "--rows", "paper, fp32")
    plain, ours = record["rows"]
    assert plain["unet_passes_per_image"] == ours["unet_passes_per_image"] == 50
    assert ours["psnr_db"]["median"] > 60  # two programs, one method
    for row in (plain, ours):
        assert {"load", "VAE encode", "U-Net forward", "VAE decode", "write"} == row["parts_s"].keys()
    assert ours["ratio"]["median"] > 0 and plain["ratio"]["median"] == 1


def test_startup_benchmark(work_dir, monkeypatch):
    """With a stand-in for both commands, which takes their options and writes an image, and then takes its time to end."""
    script = work_dir / "stand_in.py"
    script.write_text(
        "import sys, time, pathlib\n"
        "output = pathlib.Path(sys.argv[sys.argv.index('--output-dir') + 1])\n"
        "output.mkdir(parents=True, exist_ok=True)\n"
        "(output / '00000.png').touch()\n"
        "time.sleep(0.5)\n"
    )
    rows = {name: [str(script), *options] for name, (_, *options) in startup.ROWS.items()}
    monkeypatch.setattr(startup, "ROWS", rows)
    record = run_script(startup, work_dir)
    assert [row["name"] for row in record["rows"]] == list(startup.ROWS)
    for row in record["rows"]:
        assert row["first_image_s"]["median"] + 0.3 < row["end_s"]["median"]
        assert row["ratio"]["median"] > 0


def test_options_of_the_contestants_are_test_pys():
    required = ["--sar-dir", "a", "--output-dir", "b", "--checkpoint", "c"]
    for options in [*translate.ROWS.values(), *(options for _, *options in startup.ROWS.values())]:
        test_py.make_parser().parse_args([*required, *options])


def test_settings_of_the_contestants_are_the_configurations():
    for settings in train.ROWS.values():
        for name, value in settings.items():
            assert value == train.CACHE or KNOBS[name].metadata["kind"](value) == value


def test_a_contestant_that_fails_is_told_and_has_no_figures(tmp_path):
    log = tmp_path / "log.txt"
    result = startup.first_image([sys.executable, "-c", "raise SystemExit('no memory')"], tmp_path / "x.png", "cpu", log)
    assert result == {"failed": f"exit code 1: no memory; see {os.path.relpath(log)}"}
    log.write_text("first\n  Signal 9 (SIGKILL) received \n\n=====\n")
    assert speed.last_words(log) == "Signal 9 (SIGKILL) received"
    log.write_text("step 1 is slow\ntraining:   0%|          | 0/3\rtraining:  33%|███▎      | 1/3 [00:45<01:30]")
    assert speed.last_words(log) == "step 1 is slow"
    assert speed.run_worker("nowhere.py", {"device": "cpu"}, tmp_path / "w")["failed"].startswith("exit code 2: ")
