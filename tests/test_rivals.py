"""The rivals: their networks, the equal budgets, the commands, spectra and tables."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import REPO

import test as translate_command
from benchmarks import real_confidence, rival_models, rivals
from benchmarks.rival_models import METHODS, PATCH_PX, Generator, discriminator, pixel_unet
from benchmarks.rivals import Job
from cdiffset.config import load_config
from cdiffset.images import write_png
from cdiffset.inference.options import sampling_settings
from cdiffset.model import load_base_unet, load_scheduler


def parameters(network: torch.nn.Module) -> int:
    return sum(weight.numel() for weight in network.parameters())


# -------------------------------------------------------------------------------------------------------------- networks
def test_networks_are_of_the_published_kinds_and_of_comparable_size():
    sar, eo = torch.zeros(2, 1, 64, 64), torch.zeros(2, 3, 64, 64)
    generated = Generator(width=25, dropout=0.0).eval()(sar)
    assert generated.shape == eo.shape and generated.abs().max() <= 1
    assert discriminator()(torch.cat([sar, eo], 1)).shape == (2, 1, 6, 6)  # 70 x 70 patches at a stride of 8 in 64 px
    ours = parameters(load_base_unet(str(rival_models.BASE)))
    assert parameters(pixel_unet()) == pytest.approx(ours, rel=0.05)
    assert parameters(Generator(width=25, dropout=0.0)) == pytest.approx(ours, rel=0.05)


def test_a_patch_of_the_discriminator_sees_70_px():
    network, image = discriminator().eval(), torch.zeros(1, 4, 128, 128, requires_grad=True)
    network(image)[0, 0, 7, 7].backward()
    seen = image.grad.abs().sum((0, 1)) > 0
    assert seen.any(0).sum() == seen.any(1).sum() == 70


def test_the_generator_reaches_the_whole_image():
    network, image = Generator(width=4, dropout=0.0).eval(), torch.rand(1, 1, 64, 64, requires_grad=True)
    network(image)[0, :, 32, 32].sum().backward()
    assert image.grad[0, 0, [0, -1]].abs().sum() > 0


def test_the_pixel_diffusion_is_weighted_as_v():
    """(v̂ - v)² of a prediction x̂ of the clean image, whose noise follows from it, is (x̂ - x)² / (1 - ᾱ)."""
    scheduler, generator = load_scheduler(str(rival_models.BASE), "sample"), torch.Generator().manual_seed(0)
    clean, noise, wrong = torch.randn(3, 4, 2, 2, 2, generator=generator).double()
    timesteps = torch.tensor([200, 500, 700, 990])
    alpha = scheduler.alphas_cumprod.double()[timesteps][:, None, None, None]
    noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
    implied = (noisy - alpha.sqrt() * wrong) / (1 - alpha).sqrt()
    v, v_wrong = (alpha.sqrt() * e - (1 - alpha).sqrt() * x for x, e in ((clean, noise), (wrong, implied)))
    weight = rival_models.v_weight(scheduler.alphas_cumprod[timesteps])
    torch.testing.assert_close((v_wrong - v) ** 2, weight[:, None, None, None] * (wrong - clean) ** 2, check_dtype=False)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_translates(method, monkeypatch, tmp_path):
    read = rival_models.read_tiles
    monkeypatch.setattr(rival_models, "read_tiles", lambda folder: {kind: images[:2] for kind, images in read(folder).items()})
    names = rival_models.list_images
    monkeypatch.setattr(rival_models, "list_images", lambda folder: names(folder)[:2])
    monkeypatch.setattr(rival_models, "SAMPLINGS", {"sample": ("leading", 3, 1), "mean": ("trailing", 2, 2)})
    monkeypatch.setattr(rival_models, "BATCH", 2)
    assert rival_models.main(["--method", method, "--updates", "2", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "record.json").read_text())
    assert record["updates"] == 2 and record["training_s"] > 0 and record["s_per_image"] > 0
    written = {str(file.parent.relative_to(tmp_path)) for file in tmp_path.rglob("*.png")}
    outputs = ("sample", "mean") if method == "pixel_diffusion" else ("sample",)
    assert written == {f"{part}/{name}/eo" for part in ("test", "unseen") for name in outputs}


def test_the_sampler_puts_the_predicted_patches_where_they_belong():
    image = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1

    class Knowing:
        dtype = torch.float32

        def __call__(self, patches, timestep, encoder_hidden_states):
            assert patches.shape == (2, 4 * PATCH_PX**2, 4, 4)  # SAR and noisy EO
            return SimpleNamespace(sample=torch.nn.functional.pixel_unshuffle(image, PATCH_PX))

    generated = rival_models.diffuse(Knowing(), torch.zeros(2, 1, 16, 16), "trailing", steps=3, samples=2)
    torch.testing.assert_close(generated, image, rtol=0, atol=0.15)  # SD's last step leaves 3 % of noise


# --------------------------------------------------------------------------------------------------------------- budgets
def test_budgets_are_equal_in_time_or_in_updates():
    seconds = {"regression": 0.1, "pix2pix": 0.5, "pixel_diffusion": 0.2, "mse": 0.24, "cdiffset": 0.25}
    planned = rivals.budgets({"encoding_s": 60, "update_s": seconds}, minutes=6)
    assert planned["minutes"] == {"regression": 3600, "pix2pix": 720, "pixel_diffusion": 1800, "mse": 1200, "cdiffset": 1200}
    assert set(planned["updates"].values()) == {1200}


def test_commands_are_those_that_the_programs_take(tmp_path):
    for method, total in (("mse", 140), ("cdiffset", 140)):
        job = Job(method, total, seed=3)
        configs = [load_config(command[1:]) for command in rivals.training_commands(job, tmp_path)]
        assert sum(config.num_iter for config in configs) == total
        assert [config.confidence for config in configs] == ([False, True] if method == "cdiffset" else [False])
        assert {config.seed for config in configs} == {3}
        commands = rivals.translation_commands(job, tmp_path)
        assert set(commands) == {(part, name) for part in ("test", "unseen") for name in ("sample", "mean")}
        for (_, name), command in commands.items():
            args = translate_command.make_parser().parse_args(command[1:])
            assert args.checkpoint == str(job.folder(tmp_path) / "stage2/best")
            assert sampling_settings(args).ensemble == (8 if name == "mean" else 1)
    assert rivals.training_commands(Job("pix2pix", 9, 0), tmp_path)[0][0] == "benchmarks/rival_models.py"


def test_what_is_compared_is_the_demo():
    first, second = (load_config(["--config", str(REPO / f"configs/{name}.yaml")]) for name in ("demo", "demo_conf"))
    assert rivals.STAGE1 == first.num_iter / (first.num_iter + second.num_iter)
    assert {first.num_warmup, second.num_warmup} == {rivals.WARMUP}
    assert {first.batch_size, second.batch_size} == {rival_models.BATCH}
    size = real_confidence.SIZES["small"]
    assert (size.stage1, size.stage2, size.batch_size) == (first.num_iter, second.num_iter, first.batch_size)


def test_the_mean_is_that_of_the_demo():
    written = " ".join(rivals.words(rivals.MEAN_OF_8))
    assert f"MEAN_OF_8 := {written}\n" in (REPO / "Makefile").read_text()


@pytest.fixture
def few_pairs(tmp_path, monkeypatch):
    """Six pairs of two places in each part, and a `timed` that pretends to train and translates to a darker truth."""
    for part in ("train", "test", "unseen"):
        for kind in ("sar", "eo"):
            (tmp_path / "pairs" / part / kind).mkdir(parents=True)
            names = rivals.list_images(REPO / "data/sentinel_demo" / part / kind)
            for name in [*names[:3], *names[-3:]]:
                shutil.copy(REPO / "data/sentinel_demo" / part / kind / name, tmp_path / "pairs" / part / kind)
    monkeypatch.setattr(rivals, "PAIRS", tmp_path / "pairs")

    def pretended(command, log):
        options = dict(zip(command[1::2], command[2::2], strict=True))
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("6 images translated in 3.0 s, 2.00 images/s")
        outputs = [Path(options["--output-dir"])] if command[0] == "test.py" else []
        if command[0].endswith("rival_models.py"):
            outputs = [Path(options["--output"]) / part / "sample/eo" for part in ("test", "unseen")]
            record = {"updates": int(options["--updates"]), "training_s": 7.0, "s_per_image": 0.1, "parameters": 1}
            rivals.write_json(Path(options["--output"]) / "record.json", record)
        for folder in outputs:
            for name in rivals.list_images(tmp_path / "pairs" / folder.parent.parent.name / "eo"):
                pixels = rivals.read_eo(tmp_path / "pairs" / folder.parent.parent.name / "eo" / name)
                write_png(folder / name.with_suffix(".png"), np.clip(pixels - 10, 0, 255).astype(np.uint8))
        return {"seconds": 5.0, "gib": 1.5}

    monkeypatch.setattr(rivals, "timed", pretended)
    return tmp_path


def test_jobs_are_evaluated_reported_and_kept(few_pairs, monkeypatch):
    output = few_pairs / "out"
    planned = {"minutes": {**dict.fromkeys(rivals.TITLES, 20), "regression": 40}, "updates": dict.fromkeys(rivals.TITLES, 20)}
    jobs = dict.fromkeys(Job(method, updates, 0) for each in planned.values() for method, updates in each.items())
    assert len(jobs) == 6  # only the regression differs between the budgets
    results = [rivals.run_job(job, output) for job in jobs]
    ours = next(result for result in results if result["method"] == "cdiffset")
    assert (ours["training_s"], ours["s_per_image"], ours["gib"]) == (10.0, 0.5, 1.5)  # two stages; what test.py says
    numbers = ours["parts"]["test"]["sample"]
    assert numbers["standard"]["psnr"] == pytest.approx(20 * np.log10(255 / 10), abs=0.5)
    assert len(numbers["images"]) == 6 and numbers["fine"] == pytest.approx(1, abs=0.05)
    assert numbers["set"]["identity_collapse"] > 1 and "squeezenet_frechet" in numbers["set"]
    monkeypatch.setattr(rivals, "timed", None)
    assert [rivals.run_job(job, output) for job in jobs] == results  # nothing runs again
    rivals.write_report(results, planned, {"encoding_s": 60.0, "update_s": {}}, 6, output)
    text = (output / "RIVALS.md").read_text()
    assert "| regression, L1 | 40 |" in text and "| C-DiffSET, mean of 8 minus pix2pix |" in text
    assert {"RIVALS.md", "results.json", "figure.png", "spectra.png"} <= {file.name for file in output.iterdir()}


# --------------------------------------------------------------------------------------------------------------- spectra
def test_a_wave_has_its_power_at_its_frequency():
    side, k = 64, 10
    wave = 100 + 50 * np.cos(2 * np.pi * k / side * np.arange(side))
    power = rivals.radial_power(np.tile(wave[None, None, :, None], (2, side, 1, 3)))
    assert power.shape == (side // 2 + 1,) and power.argmax() == k
    assert power[: k - 2].max() < 1e-3 * power[k] and power[k + 3 :].max() < 1e-3 * power[k]


def test_white_noise_has_equal_power_and_a_blur_loses_the_fine():
    noise = np.random.default_rng(0).normal(128, 30, (40, 64, 64, 1)).repeat(3, -1)
    power = rivals.radial_power(noise)
    expected = 30**2 * (np.outer(*[np.hanning(64)] * 2) ** 2).sum()
    np.testing.assert_allclose(power[4:], expected, rtol=0.15)
    blurred = (noise + np.roll(noise, 1, 1) + np.roll(noise, 1, 2) + np.roll(noise, (1, 1), (1, 2))) / 4
    assert rivals.radial_power(blurred)[-4:].sum() < 0.2 * power[-4:].sum()


# ---------------------------------------------------------------------------------------------------------------- tables
@pytest.fixture
def results():
    """Two seeds; C-DiffSET's pictures are 1 dB above those of the others, and the fourth place's 3 dB."""
    found = []
    for seed in (0, 1):
        for method in ("regression", "cdiffset"):
            ours = method == "cdiffset"
            images = {
                f"{place}_r0_c{tile}": [15 + seed + ours * (3 if place == 4 else 1), 0.3, 0.9]
                for place in range(5)
                for tile in "ab"
            }
            psnr = float(np.mean([values[0] for values in images.values()]))
            numbers = {"standard": {"psnr": psnr, "ssim": 0.3}, "set": {"fid": None}, "fine": 0.5, "images": images}
            parts = {part: {"sample": numbers} for part in ("test", "unseen")}
            found.append(
                {"method": method, "updates": 10, "seed": seed, "parts": parts, "training_s": 60, "s_per_image": 1, "gib": 2}
            )
    return found


def test_tables_show_means_over_seeds_and_differences_over_places(results):
    planned = {"regression": 10, "cdiffset": 10, "mse": 10, "pix2pix": 10, "pixel_diffusion": 10}
    pictures = rivals.picture_table(results, planned, "test").splitlines()
    assert "FID" not in pictures[0] and "PSNR" in pictures[0]
    assert pictures[2].startswith("| regression, L1 | 15.50 ± ") and pictures[3].startswith("| C-DiffSET | 16.90 ± ")
    difference = rivals.difference_table(results, planned, "test").splitlines()[2]
    assert difference.startswith("| C-DiffSET minus regression, L1 | +1.400 (+1.000 to +")
    assert "| C-DiffSET | 10 | 1 | 1 | 2 |" in rivals.cost_table(results, planned)
