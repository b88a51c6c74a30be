"""The discrepancy benchmark: its measures on constructed pictures, its control, and its statistics."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from PIL import Image
from scipy import stats
from sklearn.metrics import roc_auc_score

from benchmarks import discrepancy, discrepancy_report
from benchmarks.harness import Model
from benchmarks.measures import TEST, Map, appearance, draw_scenes, found, map_measures, picture_measures, sampled, share_drawn
from cdiffset.inference.variance_readout import VARIANCE_READOUTS
from cdiffset.losses import cdiff_loss
from cdiffset.model import embed_prompt, load_scheduler, load_vae, patch_conv_in, patch_conv_out
from cdiffset.pipeline import image_noise, to_uint8, translate, variance_weights, weighted_mean
from data import simulate


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(discrepancy.STANDARD, TEST, range(24), 0)


def test_scenes_are_those_that_the_simulator_writes(scenes, tmp_path):
    settings = vars(discrepancy.STANDARD).items()
    options = [word for name, value in settings for word in (f"--{name.replace('_', '-')}", str(value))]
    assert simulate.main(["--output", str(tmp_path), "--train", "0", "--test", "1", "--seed", "0", *options]) == 0
    for kind, mine in (("sar", scenes.sar[0, 0]), ("eo", scenes.eo[0].permute(1, 2, 0))):
        np.testing.assert_allclose((mine + 1) * 127.5, np.array(Image.open(tmp_path / f"test/{kind}/00000.png")), atol=1e-3)


# --------------------------------------------------------------------------------------------------------------- hallucination
def test_a_pasted_object_appears_and_an_absent_one_does_not(scenes):
    assert share_drawn(scenes.eo_all, scenes) == {"sar_only": 1, "eo_only": 1, "both": 1}
    assert share_drawn(scenes.eo_none, scenes) == {"sar_only": 0, "eo_only": 0, "both": 0}
    assert share_drawn(scenes.eo, scenes) == {"sar_only": 0, "eo_only": 1, "both": 1}  # the truth hallucinates nothing
    some = torch.from_numpy(np.isin(scenes.objects, scenes.kinds["sar_only"][:3]))[:, None]
    pasted = torch.where(some, scenes.eo_all, scenes.eo)
    assert share_drawn(pasted, scenes)["sar_only"] == pytest.approx(3 / len(scenes.kinds["sar_only"]))
    without_contrast = replace(scenes, eo_all=scenes.eo_none)
    assert set(share_drawn(scenes.eo, without_contrast).values()) == {None}


def test_appearance_is_linear_between_absent_and_present(scenes):
    numbers = np.concatenate(list(scenes.kinds.values()))
    assert sorted(numbers) == np.unique(scenes.objects[scenes.objects > 0]).tolist()  # each object is of one kind
    for share in (0.0, 0.4, 0.6, 1.0):
        blended = torch.lerp(scenes.eo_none, scenes.eo_all, share)
        np.testing.assert_allclose(appearance(blended, scenes, numbers), share, atol=1e-4)
        assert set(share_drawn(blended, scenes).values()) == {float(share > 0.5)}  # drawn: more than half of the way


# ------------------------------------------------------------------------------------------------------------ pictures and maps
def test_regions_of_the_psnr(scenes):
    """An error of 0.2 (of pixels in [0, 1]) inside the discrepancies alone, of 0.1 outside alone."""
    eo = scenes.eo.clamp(-0.5, 0.5)
    shifted = torch.where(torch.from_numpy(scenes.discrepant)[:, None], eo + 0.4, eo - 0.2)
    measures = picture_measures(shifted, replace(scenes, eo=eo))
    assert measures["psnr_inside"] == pytest.approx(-20 * math.log10(0.2), abs=1e-4)
    assert measures["psnr_outside"] == pytest.approx(-20 * math.log10(0.1), abs=1e-4)


def test_auroc_of_brightness_by_an_independent_computation():
    scenes = draw_scenes(discrepancy.STANDARD, TEST, range(80), discrepancy.SCENE_SEED)
    brightness, masks, numbers = scenes.sar[:, 0].numpy(), scenes.masks, found(scenes.sar[:, 0].numpy(), scenes)
    assert numbers["auroc_movable"] == pytest.approx(0.5, abs=0.1)  # it does not tell what moves from what stays
    targets = {
        "movable": (masks["movable"], masks["movable"] ^ masks["permanent"]),
        "sar_only": (masks["sar_only"], ~masks["eo_only"] | masks["sar_only"]),
        "all": (scenes.discrepant, np.ones_like(scenes.discrepant)),
    }
    for name, (positive, counted) in targets.items():
        assert numbers[f"auroc_{name}"] == pytest.approx(roc_auc_score(positive[counted], brightness[counted]))


@pytest.mark.parametrize("power", [1.0, 0.5, None])
def test_a_map_that_is_the_error_is_a_perfect_one(scenes, power):
    """In any unit, and squared where it is a variance; the discrepancies are found as far as the error lies in them."""
    error = np.random.default_rng(0).uniform(1, 2, scenes.discrepant.shape) + 2 * scenes.discrepant
    score = 7 * error if power != 0.5 else 7 * error**2
    numbers = map_measures(Map(torch.empty(0), 3, power), score, error, scenes)
    assert numbers["spearman"] == pytest.approx(1) and numbers["ause"] == pytest.approx(0, abs=1e-9)
    assert numbers["auroc_all"] == numbers["ap_all"] == pytest.approx(1) and numbers["passes"] == 3
    assert numbers.get("ence") == (None if power is None else pytest.approx(0, abs=1e-9))


def test_recorded_variances_are_the_samplers_own_readouts(tiny_base, scenes):
    unet = patch_conv_out(patch_conv_in(tiny_unet())).eval()
    torch.nn.init.normal_(unet.conv_out.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    vae, scheduler, prompt = load_vae(tiny_base), load_scheduler(tiny_base, "epsilon"), embed_prompt(tiny_base, "x")
    some = replace(scenes, sar=scenes.sar[:5])
    pictures, sigma2 = sampled(Model(unet, vae, scheduler, prompt), some, 8, 2)
    noise = image_noise(vae, 1, to_uint8(some.sar))
    for wanted, _ in VARIANCE_READOUTS.values():
        picture, expected = translate(unet, vae, scheduler, some.sar, noise, prompt, 8, wanted)
        torch.testing.assert_close(pictures[1], picture, atol=1e-4, rtol=1e-4)
        weights = variance_weights(wanted, scheduler.timesteps.tolist())
        torch.testing.assert_close(weighted_mean(sigma2[1], weights), expected, atol=1e-4, rtol=1e-4)


# ------------------------------------------------------------------------------------------------------ control and statistics
def test_the_controls_weights_are_those_of_cdiffs_gradient(tiny_base):
    """C-Diff's gradient on the mean, with a σ² that depends on the timestep alone, is that of the weighted MSE."""
    scheduler, timesteps = load_scheduler(tiny_base, "epsilon"), torch.tensor([5, 400, 990])
    table, target = torch.linspace(0.9, 0.02, 1000), torch.zeros(3, 4, 2, 2)  # σ² by timestep
    weights = discrepancy.cdiff_weights(scheduler, table)
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    prediction = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sigma2 = table[timesteps][:, None, None, None].expand(3, 1, 2, 2)
    loss = cdiff_loss(prediction, target, sigma2, scheduler.alphas_cumprod[timesteps].sqrt())
    (by_cdiff,) = torch.autograd.grad(loss, prediction)
    (by_mse,) = torch.autograd.grad((weights[timesteps][:, None, None, None] * prediction**2).mean(), prediction)
    ratio = by_cdiff / by_mse
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))


def test_interval_is_students():
    values = [19.1, 19.4, 19.9]
    mean, half = discrepancy_report.interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    verdicts = {"supported": ([1.0, 1.1], 1), "contradicted": ([1.0, 1.1], -1), "undecided": ([1.0, -1.0], 1)}
    assert all(discrepancy_report.verdict(*given) == expected for expected, given in verdicts.items())
    assert discrepancy_report.verdict([1.0]) == "too few seeds"


def test_differences_are_taken_within_a_seed():
    results = {
        ("standard", name): {seed: {"picture": {"psnr": psnr}} for seed, psnr in values.items()}
        for name, values in (("cdiff", {0: 20.0, 1: 22.0}), ("mse", {1: 21.0, 0: 19.5, 2: 1.0}))
    }
    assert discrepancy_report.difference(results, "cdiff", "mse", "picture/psnr") == [0.5, 1.0]
