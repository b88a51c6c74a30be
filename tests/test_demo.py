"""The small bases that ship with the demos, and the demos' report."""

import json
import shutil

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from cdiffset.calibration.calibration import Calibration, Curve, save
from cdiffset.errors import UserError
from cdiffset.images import list_images, read_eo, write_png, write_tiff
from cdiffset.model import COMPONENTS, check_base, embed_prompt, load_base_unet, load_scheduler, load_vae
from cdiffset.pipeline import decode, encode
from data import simulate
from data.simulate import Simulation, simulate_scene
from demo import pretrain_base, report
from demo.pretrain_base import RECIPES

PAIRS = REPO / "data/sentinel_demo"
BASES = {kind: str(REPO / f"assets/{kind}_base") for kind in RECIPES}
MIN_PSNR = {"simulated": 29, "sentinel": 27}  # of the VAE, dB
MAX_ERROR = {"simulated": 0.2, "sentinel": 0.3}  # of the noise that the U-Net predicts where ᾱ is 0.28; nothing known gives 1


def unseen_eo(kind: str) -> torch.Tensor:
    """Images that no training has seen, [N, 3, H, W] in [-1, 1]."""
    if kind == "simulated":
        eo = [simulate_scene(np.random.default_rng([31, index]), Simulation())["eo"] for index in range(16)]
    else:
        eo = [read_eo(PAIRS / "test/eo" / name) for name in list_images(PAIRS / "test/eo")[::4]]
    return torch.from_numpy(np.stack(eo)).permute(0, 3, 1, 2) / 127.5 - 1


@pytest.mark.parametrize("kind", BASES)
def test_a_base_is_complete_and_small(kind):
    check_base(BASES[kind])
    files = [file for name in COMPONENTS for file in (REPO / BASES[kind] / name).rglob("*")]
    assert sum(file.stat().st_size for file in files) < 12e6


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_the_vae_reconstructs_images(kind):
    eo, vae = unseen_eo(kind), load_vae(BASES[kind])
    latents = encode(vae, eo)
    psnr = 10 * torch.log10(4 / ((decode(vae, latents) - eo) ** 2).mean((1, 2, 3)))
    assert psnr.mean() > MIN_PSNR[kind]
    assert latents.std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("kind", BASES)
@torch.no_grad()
def test_the_unet_denoises(kind):
    """Far better than by the mean, in the middle of SD's schedule, on latents of images that it has not seen."""
    base, eo = BASES[kind], unseen_eo(kind)
    latents, scheduler = encode(load_vae(base), eo), load_scheduler(base, RECIPES[kind].prediction_type)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    timestep = (scheduler.alphas_cumprod - 0.28).abs().argmin()  # SD's 500
    alpha, timesteps = scheduler.alphas_cumprod[timestep], timestep.expand(len(latents))
    noisy, prompt = scheduler.add_noise(latents, noise, timesteps), embed_prompt(base, pretrain_base.CAPTION)
    predicted = load_base_unet(base).eval()(noisy, timesteps, prompt.expand(len(latents), -1, -1)).sample
    if RECIPES[kind].prediction_type == "v_prediction":
        predicted = alpha.sqrt() * predicted + (1 - alpha).sqrt() * noisy
    assert ((predicted - noise) ** 2).mean() < MAX_ERROR[kind]


def test_an_interrupted_pretraining_ends_as_one_in_one_go(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrain_base, "KEPT_EVERY", 5)

    def run(steps_until_kill: int | None, kept):
        torch.manual_seed(0)
        model, data = torch.nn.Linear(3, 1), torch.randn(64, 3, generator=torch.Generator().manual_seed(1))
        steps = iter(range(steps_until_kill or 1000))

        def loss_of_step(generator):
            if next(steps, None) is None:
                raise KeyboardInterrupt
            return model(data[torch.randint(64, (4,), generator=generator)]).square().mean()

        pretrain_base.optimise(model, loss_of_step, 12, 1e-2, "test", 0.9, kept)
        return model.weight

    whole = run(None, None)
    with pytest.raises(KeyboardInterrupt):
        run(8, tmp_path / "kept")
    assert (tmp_path / "kept").is_file()
    torch.testing.assert_close(run(None, tmp_path / "kept"), whole, rtol=0, atol=0)


def make_translation(eo_dir, folder, maps: tuple[str, ...]):
    """The truth plus a constant that differs by the image; the maps rank the error perfectly."""
    for shift, file in enumerate(sorted(eo_dir.iterdir()), start=5):
        truth = read_eo(file).astype(int)
        write_png(
            folder / "eo" / f"{file.stem}.png", np.where(truth + shift <= 255, truth + shift, truth - shift).astype(np.uint8)
        )
        for name in maps:
            write_tiff(folder / name / f"{file.stem}.tif", np.full(truth.shape[:2], 0.01 * shift, np.float32))
        write_png(folder / "confidence" / f"{file.stem}.png", np.full(truth.shape[:2], 255, np.uint8))


def test_report_on_a_known_translation_of_simulated_scenes(tmp_path):
    scenes, translated, output = (tmp_path / name for name in ("scenes", "translated", "out"))
    options = ["--train", "3", "--test", "12", "--p-sar-only", "0.5", "--p-eo-only", "0.5"]
    assert simulate.main(["--output", str(scenes), *options]) == 0
    make_translation(scenes / "test/eo", translated / "test/sample", ("variance",))
    arguments = ["--scenes", scenes, "--translated", translated, "--base", BASES["simulated"], "--output", output]
    assert report.main([str(argument) for argument in arguments]) == 0
    part = json.loads((output / "report.json").read_text())["parts"]["test"]
    maps, psnr = part["maps"], part["pictures"]["one sample"]["psnr"]
    assert psnr == pytest.approx(np.mean([20 * np.log10(255 / shift) for shift in range(5, 17)]), abs=1e-3)
    ranked = maps["one sample: variance"]
    assert (ranked["spearman"], ranked["ause"]) == pytest.approx((1, 0), abs=1e-6)
    assert maps["one sample: SAR brightness"]["auroc_sar_only"] > 0.8
    assert "AUROC SAR-only" in (output / "report.md").read_text()


@pytest.fixture
def few_pairs(tmp_path):
    """A few of the demo's real pairs in each part, with translations of known error."""
    for part in ("train", "test", "unseen"):
        for kind in ("sar", "eo"):
            (tmp_path / "pairs" / part / kind).mkdir(parents=True)
            for name in list_images(PAIRS / part / kind)[:6]:
                shutil.copy(PAIRS / part / kind / name, tmp_path / "pairs" / part / kind)
        if part != "train":
            make_translation(tmp_path / "pairs" / part / "eo", tmp_path / "translated" / part / "sample", ("variance",))
            make_translation(tmp_path / "pairs" / part / "eo", tmp_path / "translated" / part / "mean", ("spread", "error"))
    return tmp_path


def test_report_on_a_known_translation_of_real_pairs(few_pairs):
    quantiles = {"0.5": 99.0, "0.8": 101.0, "0.9": 102.0}  # the error is 100 times its map
    calibrated = Calibration({}, "", {"variance": Curve([0.0, 1.0], [1.0, 2.0])}, quantiles=quantiles)
    calibrated.report.update({"images": {"held_out": 3}, "coverage": {"0.5": 0.51, "0.8": 0.79, "0.9": 0.88}})
    save(few_pairs / "calibration.json", calibrated)
    arguments = ["--scenes", few_pairs / "pairs", "--parts", "test", "unseen", "--translated", few_pairs / "translated"]
    arguments += ["--base", BASES["sentinel"], "--calibration", few_pairs / "calibration.json", "--output", few_pairs / "out"]
    assert report.main([str(argument) for argument in arguments]) == 0
    record, text = json.loads((few_pairs / "out/report.json").read_text()), (few_pairs / "out/report.md").read_text()
    for part in ("test", "unseen"):
        pictures = record["parts"][part]["pictures"]
        assert pictures["one sample"]["psnr"] == pytest.approx(
            np.mean([20 * np.log10(255 / s) for s in range(5, 11)]), abs=1e-3
        )
        assert pictures["one sample"]["squeezenet"] < pictures["the mean training image"]["squeezenet"]
        assert pictures["the VAE's reconstruction of the true EO (ceiling)"]["psnr"] > 24
        assert record["parts"][part]["maps"]["mean of 8 samples: expected error"]["spearman"] == pytest.approx(1)
    assert list(record["coverage"].values()) == [calibrated.report["coverage"], {"0.5": 0.0, "0.8": 1.0, "0.9": 1.0}]
    assert "AUROC" not in text and "unseen: all | 0.0% | 100.0% | 100.0% |" in text
    assert np.array(Image.open(few_pairs / "out/figure.png")).shape[1] > 4 * 128


def test_a_missing_translation_is_named(few_pairs):
    missing = sorted((few_pairs / "translated/test/mean/eo").iterdir())[2]
    missing.unlink()
    arguments = ["--scenes", few_pairs / "pairs", "--translated", few_pairs / "translated", "--base", BASES["sentinel"]]
    with pytest.raises(UserError, match=f"1 of 6 images have no translation in .*mean/eo, the first is {missing.name}"):
        report.main([str(argument) for argument in [*arguments, "--output", few_pairs / "out"]])
