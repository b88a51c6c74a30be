"""The reference loop against the project, and the formulas that the speed and scaling tables hang on.

That every benchmark answers --help is tested with the other commands (test_terminal.py).
"""

import math

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from torch import nn

import test as test_py
from benchmarks import harness, reference, scaling, startup, train, translate
from cdiffset import losses, pipeline
from cdiffset.config import KNOBS
from cdiffset.images import read_sar, to_signed
from cdiffset.model import check_base, embed_prompt, load_scheduler, load_vae, patch_conv_in, patch_conv_out
from cdiffset.pipeline import encode, to_uint8


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
    ours, theirs = patch_conv_out(patch_conv_in(tiny_unet())).state_dict(), models.unet.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert torch.equal(models.prompt, embed_prompt(tiny_base, reference.PROMPT))


def test_reference_loss_and_gradient_are_the_projects(models, tiny_base):
    torch.manual_seed(0)
    z_sar, z_eo, noise = torch.randn(3, 5, 4, 8, 8)
    timesteps = torch.tensor([0, 10, 400, 800, 999])
    theirs = reference.training_loss(models, z_sar, z_eo, noise, timesteps)
    theirs_grad = torch.autograd.grad(theirs, list(models.unet.parameters()))
    scheduler = load_scheduler(tiny_base, "epsilon")
    ours, _ = losses.training_loss(models.unet, scheduler, z_sar, z_eo, noise, timesteps, models.prompt, "timestep")
    ours_grad = torch.autograd.grad(ours, list(models.unet.parameters()))
    torch.testing.assert_close(ours, theirs)
    for mine, other in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_reference_translation_is_the_projects(models, tiny_base):
    sar = torch.rand(1, 3, 40, 32) * 2 - 1
    theirs, theirs_sigma2 = reference.translate(models, sar, 50)
    scheduler, vae = load_scheduler(tiny_base, "epsilon"), load_vae(tiny_base)
    noise = pipeline.image_noise(vae, 0, to_uint8(sar))
    ours, sigma2 = pipeline.translate(models.unet, vae, scheduler, sar, noise, models.prompt, 50)
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
    before = models.unet.conv_in.weight.detach().clone()
    losses = list(reference.train(models, batches))
    assert len(losses) == 3 and all(map(math.isfinite, losses)) and not torch.equal(before, models.unet.conv_in.weight)


# ----------------------------------------------------------------------------------------------------------------- formulas
def test_ratios_are_of_the_same_round():
    results = {
        "reference": [{"speed": 1.0}, {"speed": 2.0}, {"speed": 4.0}],
        "fast": [{"speed": 3.0}, {"speed": 4.0}, {"failed": "out of memory"}],
        "broken": [{"failed": "x"}] * 3,
    }
    assert harness.ratio(results["fast"], results["reference"], "speed") == {"median": 2.5, "low": 2.0, "high": 3.0}
    assert harness.ratio(results["fast"], results["reference"], "speed", 2)["median"] == 1.25  # efficiency of two processes
    assert harness.ratio(results["broken"], results["reference"], "speed") is None
    _, fast, broken = harness.summarise(results)
    assert fast["speed"] == {"median": 3.5, "low": 3.0, "high": 4.0} and fast["failed"] == ["out of memory"]
    assert "failed: x | – |" in harness.arms_table("", [broken], {"speed": lambda row: row["speed"], "ratio": None})


def test_speed_counts_from_the_first_batch_where_there_are_more():
    assert translate.images_per_second(10.0, [12.0, 14.0], 2) == 0.5
    assert translate.images_per_second(10.0, [30.0, 30.1, 31.0, 32.0, 32.5, 33.1], 2) == pytest.approx(4 / 3)


def test_the_full_architecture_is_stable_diffusions():
    """Parameters, and FLOP against Stable Diffusion's own figures."""
    with torch.device("meta"):
        unet, vae = harness.build_unet("full"), harness.build_vae("full")
    assert sum(parameter.numel() for parameter in unet.parameters()) == scaling.PARAMETERS == 865_925_125
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    flops = harness.count_flops("full", 256)
    assert flops["unet"] / 1e12 == pytest.approx(0.178, rel=0.01)
    assert flops["unet_training"] / flops["unet"] == pytest.approx(3, rel=0.01)
    assert 2 * flops["encode"] / 1e12 == pytest.approx(0.545, rel=0.01)


def test_cost_of_many_gpus_by_hand():
    gpu, flop = (
        {"flops": 1e15, "memory": 5e12, "link": 4.5e11},
        {"unet_training": 5e11, "encode": 3e11, "unet": 2e11, "decode": 6e11},
    )
    one = scaling.step_seconds(gpu, 1, flop, cached=False)
    assert one["networks"] == pytest.approx(64 * 11e11 / 0.35e15) and one["launches"] == one["all-reduce"] == 0
    assert one["data"] == pytest.approx(64 * 2 * 256**2 * 17e-9 / 8)
    many = scaling.step_seconds(gpu, 64, flop, cached=True)
    assert many["networks"] + many["launches"] == pytest.approx(0.03)
    assert many["all-reduce"] == pytest.approx(2 * 63 / 64 * 865_925_125 * 4 / 4e11)  # over the network
    area = scaling.area_hours(gpu, 4, flop, 50)
    assert area["networks"] * 3600 == pytest.approx(1e12 / 384**2 * (3e11 + 1e13 + 6e11) / (0.35e15 * 4))


def test_options_of_the_arms_are_the_commands():
    required = ["--sar-dir", "a", "--output-dir", "b", "--checkpoint", "c"]
    for options in [*translate.ROWS.values(), *(options for _, options in startup.ROWS.values())]:
        test_py.make_parser().parse_args([*required, *harness.words(options)])
    for settings in train.ROWS.values():
        for name, value in settings.items():
            assert value == train.CACHE or KNOBS[name].metadata["kind"](value) == value


def test_a_throw_away_base_is_complete(tmp_path):
    harness.make_models(tmp_path, "tiny")
    check_base(str(tmp_path / "base"))
