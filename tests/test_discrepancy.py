"""The discrepancy benchmark: its measures on constructed pictures, its control, its statistics, and the command as a whole."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from scipy import stats

from benchmarks import discrepancy, discrepancy_report
from benchmarks.measures import (
    Judge,
    Map,
    Recorder,
    appearance,
    draw_scenes,
    found,
    map_measures,
    picture_measures,
    share_drawn,
)
from cdiffset.diffusion import image_noise, translate, variance_weights, weighted_mean
from cdiffset.images import to_uint8
from cdiffset.inference.variance_readout import VARIANCE_READOUTS
from cdiffset.losses import RAW_OFFSET, cdiff_loss, mse_loss
from cdiffset.model import embed_prompt, load_scheduler, load_vae, patch_conv_in, patch_conv_out
from data.simulate import Simulation


@pytest.fixture(scope="module")
def scenes():
    return draw_scenes(discrepancy.STANDARD, "test", range(24), 0)


@pytest.fixture(scope="module")
def unet():
    """Stage 2, with a variance that is not constant."""
    patched = patch_conv_out(patch_conv_in(tiny_unet()))
    torch.nn.init.normal_(patched.conv_out.weight, std=0.05, generator=torch.Generator().manual_seed(0))
    return patched.eval()


# --------------------------------------------------------------------------------------------------------------- hallucination
def test_objects_are_numbered_over_all_scenes_and_sorted_by_what_shows_them(scenes):
    kinds = scenes.kinds
    together = np.concatenate(list(kinds.values()))
    assert min(map(len, kinds.values())) >= 3
    assert sorted(together) == sorted(set(together)) == np.unique(scenes.objects[scenes.objects > 0]).tolist()
    for number in together:
        assert len(np.unique(np.nonzero(scenes.objects == number)[0])) == 1
    for name in ("sar_only", "eo_only"):
        assert (np.isin(scenes.objects, kinds[name]) == scenes.masks[name]).all()


def test_a_pasted_object_appears_and_an_absent_one_does_not(scenes):
    assert share_drawn(scenes.eo_all, scenes) == {"sar_only": 1, "eo_only": 1, "both": 1}
    assert share_drawn(scenes.eo_none, scenes) == {"sar_only": 0, "eo_only": 0, "both": 0}
    assert share_drawn(scenes.eo, scenes) == {"sar_only": 0, "eo_only": 1, "both": 1}  # the truth hallucinates nothing
    pasted = torch.where(
        torch.from_numpy(np.isin(scenes.objects, scenes.kinds["sar_only"][:3]))[:, None], scenes.eo_all, scenes.eo
    )
    assert share_drawn(pasted, scenes)["sar_only"] == pytest.approx(3 / len(scenes.kinds["sar_only"]))


def test_appearance_is_linear_between_absent_and_present(scenes):
    numbers = np.concatenate(list(scenes.kinds.values()))
    for share in (0.0, 0.4, 0.6, 1.0):
        blended = torch.lerp(scenes.eo_none, scenes.eo_all, share)
        np.testing.assert_allclose(appearance(blended, scenes, numbers), share, atol=1e-4)
        assert set(share_drawn(blended, scenes).values()) == {float(share > 0.5)}  # drawn: more than half of the way
    dark = torch.full_like(scenes.eo, -1)  # a dark picture shows no light ship
    assert np.median(appearance(dark, scenes, numbers)) < 0


def test_objects_without_contrast_are_left_out():
    scenes = draw_scenes(Simulation(contrast=0, movables=3), "test", range(6), 0)
    drawn = replace(scenes, eo_all=scenes.eo_none)
    assert set(share_drawn(scenes.eo, drawn).values()) == {None}


def test_regions_of_the_psnr(scenes):
    """An error of 0.2 (of pixels in [0, 1]) inside the discrepancies alone, of 0.1 outside alone."""
    inside = torch.from_numpy(scenes.masks["sar_only"] | scenes.masks["eo_only"])[:, None]
    eo = scenes.eo.clamp(-0.5, 0.5)
    shifted = torch.where(inside, eo + 0.4, eo - 0.2)
    measures = picture_measures(shifted, replace(scenes, eo=eo))
    assert measures["psnr_inside"] == pytest.approx(-20 * math.log10(0.2), abs=1e-4)
    assert measures["psnr_outside"] == pytest.approx(-20 * math.log10(0.1), abs=1e-4)


# ------------------------------------------------------------------------------------------------------------------------ maps
def test_brightness_tells_no_movable_from_a_permanent_structure_at_the_benchmarks_setting():
    scenes = draw_scenes(discrepancy.STANDARD, "test", range(80), discrepancy.SCENE_SEED)
    assert found(scenes.sar[:, 0].numpy(), scenes)["auroc_movable"] == pytest.approx(0.5, abs=0.1)
    assert found(scenes.masks["movable"].astype(float), scenes)["auroc_movable"] == 1


@pytest.mark.parametrize("power", [1.0, 0.5, None])
def test_a_map_that_is_the_error_is_a_perfect_one(scenes, power):
    """In any unit, and squared where it is a variance; the discrepancies are found as far as the error lies in them."""
    inside = scenes.masks["sar_only"] | scenes.masks["eo_only"]
    error = np.random.default_rng(0).uniform(1, 2, inside.shape) + 2 * inside
    score = 7 * error if power != 0.5 else 7 * error**2
    numbers = map_measures(Map(torch.empty(0), 3, power), score, error, scenes)
    assert numbers["spearman"] == pytest.approx(1) and numbers["ause"] == pytest.approx(0, abs=1e-9)
    assert numbers["auroc_all"] == numbers["ap_all"] == pytest.approx(1) and numbers["passes"] == 3
    assert numbers.get("ence") == (None if power is None else pytest.approx(0, abs=1e-9))


def test_scenes_are_those_that_the_simulator_writes(scenes, tmp_path):
    from PIL import Image

    from data import simulate

    options = [
        word for name, value in vars(discrepancy.STANDARD).items() for word in (f"--{name.replace('_', '-')}", str(value))
    ]
    assert simulate.main(["--output", str(tmp_path), "--train", "0", "--test", "2", "--seed", "0", *options]) == 0
    for index in range(2):
        written = np.array(Image.open(tmp_path / f"test/eo/{index:05d}.png"))
        np.testing.assert_allclose((scenes.eo[index].permute(1, 2, 0).numpy() + 1) * 127.5, written, atol=1e-3)


def test_recorded_variances_are_the_samplers_own_readouts(tiny_base, unet, scenes):
    vae, scheduler, prompt = load_vae(tiny_base), load_scheduler(tiny_base, "epsilon"), embed_prompt(tiny_base, "x")
    some = replace(scenes, sar=scenes.sar[:5], eo=scenes.eo[:5])
    judge = Judge(vae, scheduler, prompt, num_inference_steps=8, batch_size=2, audit_timesteps=(900,), audit_draws=1)
    pictures, sigma2 = judge.sampled(unet, some, 2)
    assert pictures.shape == (2, 5, 3, 64, 64) and sigma2.shape == (2, 8, 5, 1, 16, 16)
    for seed in (0, 1):
        noise = image_noise(vae, seed, to_uint8(some.sar))
        for wanted, _ in VARIANCE_READOUTS.values():
            picture, expected = translate(unet, vae, scheduler, some.sar, noise, prompt, 8, wanted)
            torch.testing.assert_close(pictures[seed], picture, atol=1e-4, rtol=1e-4)
            weights = variance_weights(wanted, scheduler.timesteps.tolist())
            torch.testing.assert_close(weighted_mean(sigma2[seed], weights), expected, atol=1e-4, rtol=1e-4)
    stage1 = Recorder(patch_conv_in(tiny_unet()))
    stage1(torch.zeros(1, 8, 16, 16), torch.tensor(3), encoder_hidden_states=prompt)
    assert stage1.sigma2 == []


# --------------------------------------------------------------------------------------------------------------------- control
def test_the_controls_weights_are_those_of_cdiffs_gradient(tiny_base):
    """C-Diff's gradient on the mean, with a σ² that depends on the timestep alone, is that of the weighted MSE."""
    scheduler = load_scheduler(tiny_base, "epsilon")
    table = torch.linspace(0.9, 0.02, 1000)  # σ² by timestep
    weights = discrepancy.cdiff_weights(scheduler, table)
    assert weights.mean() == pytest.approx(1, abs=1e-5)
    timesteps, target = torch.tensor([5, 400, 990]), torch.zeros(3, 4, 2, 2)
    prediction = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0)).requires_grad_()
    sigma2 = table[timesteps][:, None, None, None].expand(3, 1, 2, 2)
    (by_cdiff,) = torch.autograd.grad(
        cdiff_loss(prediction, target, sigma2, scheduler.alphas_cumprod[timesteps].sqrt()), prediction
    )
    (by_mse,) = torch.autograd.grad((weights[timesteps][:, None, None, None] * prediction**2).mean(), prediction)
    ratio = by_cdiff / by_mse
    torch.testing.assert_close(ratio, ratio.flatten()[0].expand_as(ratio))


def test_weighted_mse(tiny_base):
    """Weights of 1 give the MSE; a weight of 0 leaves a sample out."""
    scheduler, prompt = load_scheduler(tiny_base, "epsilon"), embed_prompt(tiny_base, "x")
    unet, generator = patch_conv_in(tiny_unet()), torch.Generator().manual_seed(0)
    z_sar, z_eo, noise = (torch.randn(2, 4, 8, 8, generator=generator) for _ in range(3))
    timesteps, weights = torch.tensor([10, 700]), torch.ones(1000)
    batch = (unet, scheduler, z_sar, z_eo, noise, timesteps, prompt)
    expected, _ = discrepancy.training_loss(*batch, 1.0)
    assert discrepancy.weighted_mse(*batch, weights).item() == pytest.approx(expected.item(), rel=1e-5)
    weights[700] = 0
    prediction, _ = discrepancy.predict(unet, z_sar, scheduler.add_noise(z_eo, noise, timesteps), timesteps, prompt)
    assert discrepancy.weighted_mse(*batch, weights).item() == pytest.approx(
        mse_loss(prediction[0], noise[0]).item() / 2, rel=1e-5
    )


def test_expected_variance_by_timestep(tiny_base):
    """A U-Net whose variance channel holds a constant raw value has that variance at every timestep."""
    scheduler, prompt = load_scheduler(tiny_base, "epsilon"), embed_prompt(tiny_base, "x")
    unet = patch_conv_out(patch_conv_in(tiny_unet()))
    with torch.no_grad():
        unet.conv_out.bias[-1] = -2.0
    table = discrepancy.expected_sigma2(unet, scheduler, torch.randn(4, 2, 4, 8, 8), prompt, bins=3)
    assert table.shape == (1000,)
    torch.testing.assert_close(table, torch.full((1000,), math.log1p(math.exp(RAW_OFFSET - 2.0)) + 1e-6))


# ------------------------------------------------------------------------------------------------------------------ statistics
def test_interval_is_students():
    values = [19.1, 19.4, 19.9]
    mean, half = discrepancy_report.interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert math.isnan(discrepancy_report.interval([1.0])[1])


@pytest.mark.parametrize(
    ("values", "sign", "expected"),
    [([1.0, 1.1, 0.9], 1, "supported"), ([1.0, 1.1, 0.9], -1, "contradicted"), ([1.0, -1.0, 0.1], 1, "undecided"),
     ([1.0], 1, "too few seeds"), ([], 1, "too few seeds")],
)  # fmt: skip
def test_verdicts(values, sign, expected):
    assert discrepancy_report.verdict(values, sign) == expected


def test_differences_are_taken_within_a_seed():
    results = {
        ("standard", "cdiff"): {0: {"picture": {"psnr": 20.0}}, 1: {"picture": {"psnr": 22.0}}},
        ("standard", "mse"): {1: {"picture": {"psnr": 21.0}}, 0: {"picture": {"psnr": 19.5}}, 2: {"picture": {"psnr": 1.0}}},
    }
    assert discrepancy_report.difference(results, "cdiff", "mse", discrepancy_report.at("picture", "psnr")) == [0.5, 1.0]


# ----------------------------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize("name", ["small", "large"])
def test_variants_wait_for_what_they_start_from(name):
    size, done = discrepancy.SIZES[name], set()
    for wave in discrepancy.all_jobs(size, [level for level in discrepancy.LEVELS if level != "standard"]):
        for job in wave:
            variant = discrepancy.VARIANTS[job.variant]
            earlier = [replace(job, variant=name) for name in (variant.start, variant.weighted_like) if name]
            trained = job.level == discrepancy.trained_at(job.level, size)
            assert all(each in done for each in earlier) if trained else replace(job, level="standard") in done
        done |= set(wave)
    assert {job.variant for job in done if job.level == "standard"} == set(discrepancy.VARIANTS)
    assert {job.level for job in done} == set(discrepancy.LEVELS) and len(size.seeds) >= 3


def test_training_is_reproducible_and_a_variant_is_not_trained_twice(tiny_base, tmp_path):
    size, job = discrepancy.SIZES["tiny"], discrepancy.Job("standard", 0, "stage1")
    weights = []
    for output in (tmp_path / "a", tmp_path / "b"):
        discrepancy.train_job(job, output, tiny_base, size, "cpu")
        file = job.folder(output) / "unet/diffusion_pytorch_model.safetensors"
        weights.append(file.read_bytes())
        discrepancy.train_job(job, output, tiny_base, replace(size, learning_rate=1.0), "cpu")
        assert file.read_bytes() == weights[-1]
    assert weights[0] == weights[1]


def test_the_command(tiny_base, tmp_path, monkeypatch, capsys):
    """Both waves of a level, judged and reported; the report is of what was measured; other settings are refused."""
    monkeypatch.setattr(discrepancy, "run_all", lambda waves, workers, do_job: [do_job(job) for wave in waves for job in wave])
    monkeypatch.setitem(discrepancy.LEVELS, "standard", replace(discrepancy.STANDARD, p_sar_only=0.4, p_eo_only=0.4))
    some = ("stage1", "mse", "cdiff", "mse_weighted")
    monkeypatch.setattr(discrepancy, "VARIANTS", {name: discrepancy.VARIANTS[name] for name in some})
    monkeypatch.setattr(discrepancy, "JUDGED", list(some[1:]))
    arguments = ["--size", "tiny", "--output", str(tmp_path), "--base", tiny_base, "--levels", "few looks"]
    assert discrepancy.main(arguments) == 0
    text = (tmp_path / "DISCREPANCY.md").read_text()
    record = json.loads((tmp_path / "results.json").read_text())
    assert {numbers["level"] for numbers in record} == {"standard", "few looks"}
    record = {numbers["variant"]: numbers for numbers in record if numbers["level"] == "standard"}
    assert set(record) == set(discrepancy.JUDGED) and all(discrepancy.VARIANTS[name].label in text for name in record)
    assert f"| {record['cdiff']['picture']['psnr']:.2f} |" in text
    assert (tmp_path / "figure.png").stat().st_size < 300_000
    before = (tmp_path / "results.json").read_bytes()
    assert discrepancy.main([*arguments, "--report-only"]) == 0
    assert (tmp_path / "results.json").read_bytes() == before
    monkeypatch.setitem(discrepancy.SIZES, "tiny", replace(discrepancy.SIZES["tiny"], steps=5))
    assert discrepancy.run(discrepancy.main, arguments) == 2
    assert "other settings" in capsys.readouterr().err
