"""The base that ships with the demo, and the demo's report."""

import json

import numpy as np
import pytest
import torch
from conftest import REPO
from PIL import Image

from cdiffset.images import write_png, write_tiff
from cdiffset.model import COMPONENTS, check_base, decode, embed_prompt, encode, load_base_unet, load_scheduler, load_vae
from data import simulate
from data.simulate import Simulation, simulate_scene
from demo import report

BASE = str(REPO / "assets/demo_base")


@pytest.fixture(scope="module")
def eo() -> torch.Tensor:
    """Scenes that no training has seen, [16, 3, 64, 64] in [-1, 1]."""
    scenes = [simulate_scene(np.random.default_rng([31, index]), Simulation())["eo"] for index in range(16)]
    return torch.from_numpy(np.stack(scenes)).permute(0, 3, 1, 2) / 127.5 - 1


def test_the_base_is_complete_and_small():
    check_base(BASE)
    assert sum(file.stat().st_size for name in COMPONENTS for file in (REPO / "assets/demo_base" / name).rglob("*")) < 12e6


@torch.no_grad()
def test_the_vae_reconstructs_scenes(eo):
    vae = load_vae(BASE)
    latents = encode(vae, eo)
    psnr = 10 * torch.log10(4 / ((decode(vae, latents) - eo) ** 2).mean((1, 2, 3)))
    assert psnr.mean() > 29
    assert latents.std() == pytest.approx(1, abs=0.2)


@torch.no_grad()
def test_the_unet_predicts_noise_on_scenes(eo):
    """Far better than predicting nothing (1.0) in the middle of the schedule, on latents of scenes it has not seen."""
    latents, scheduler = encode(load_vae(BASE), eo), load_scheduler(BASE, "epsilon")
    noise, timesteps = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)), torch.full((16,), 500)
    noisy, prompt = scheduler.add_noise(latents, noise, timesteps), embed_prompt(BASE, "satellite photograph")
    predicted = load_base_unet(BASE).eval()(noisy, timesteps, prompt.expand(16, -1, -1)).sample
    assert ((predicted - noise) ** 2).mean() < 0.2


def test_report_on_a_known_translation(tmp_path):
    """The translation is the truth plus a constant: its PSNR is known, and the variance is made to rank the error perfectly."""
    scenes, translated, output = (tmp_path / name for name in ("scenes", "translated", "out"))
    options = ["--train", "3", "--test", "12", "--p-sar-only", "0.5", "--p-eo-only", "0.5"]
    assert simulate.main(["--output", str(scenes), *options]) == 0
    for shift, file in enumerate(sorted((scenes / "test/eo").iterdir()), start=5):
        truth = np.array(Image.open(file)).astype(int)
        shifted = np.where(truth + shift <= 255, truth + shift, truth - shift)
        write_png(translated / "eo" / file.name, shifted.astype(np.uint8))
        write_tiff(translated / "variance" / f"{file.stem}.tif", np.full(truth.shape[:2], 0.01 * shift, np.float32))
        write_png(translated / "confidence" / file.name, np.full(truth.shape[:2], 255, np.uint8))
    arguments = ["--scenes", scenes, "--translated", translated, "--base", BASE, "--output", output]
    assert report.main([str(argument) for argument in arguments]) == 0
    record = json.loads((output / "report.json").read_text())
    confidence, psnr = record["confidence"], record["pictures"]["translation"]["psnr"]
    assert psnr == pytest.approx(np.mean([20 * np.log10(255 / shift) for shift in range(5, 17)]), abs=1e-3)
    assert (confidence["variance"]["spearman"], confidence["variance"]["ause"]) == pytest.approx((1, 0), abs=1e-6)
    assert confidence["SAR brightness"]["auroc_sar_only"] > 0.8
