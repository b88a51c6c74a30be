"""The confidence benchmark on real pairs: planted changes, three ideas, calibration across places, and the whole command."""

import json

import numpy as np
import pytest
import torch
from conftest import tiny_unet, tiny_vae

from benchmarks import confidence_ideas, real_confidence, registration
from benchmarks.confidence_ideas import blanked_contrast, predict_error, swapped_surprise, train_error_network
from benchmarks.harness import Model
from benchmarks.measures import residuals
from cdiffset.auditing.residual import DRAWS, TIMESTEPS
from cdiffset.losses import target_of
from cdiffset.model import embed_prompt, load_scheduler, patch_conv_in, patch_conv_out
from cdiffset.pipeline import encode, predict, variance
from data.make_sentinel_demo import TILE_PX


@pytest.fixture(scope="module")
def pairs():
    return real_confidence.read_part("test", 12)


@pytest.fixture
def model(tiny_base):
    torch.manual_seed(3)
    unet = patch_conv_out(patch_conv_in(tiny_unet()))
    torch.nn.init.normal_(unet.conv_in.weight, std=0.1)
    torch.nn.init.normal_(unet.conv_out.weight, std=0.1)
    return Model(unet.eval(), tiny_vae(), load_scheduler(tiny_base, "v_prediction"), embed_prompt(tiny_base, "x"))


# --------------------------------------------------------------------------------------------------------- planted changes
def test_changes_are_where_the_masks_say_and_nowhere_else(pairs):
    scenes, places = pairs
    planted = real_confidence.plant_changes(scenes, places)
    for kind, before, after in (("sar_only", scenes.sar, planted.sar), ("eo_only", scenes.eo, planted.eo)):
        mask = planted.masks[kind]
        assert not (before != after).any(1).numpy()[~mask].any()
        assert (before != after).any(1).numpy()[mask].mean() > 0.5  # most pixels of another place differ
        sides = [(image.any(1).sum(), image.any(0).sum()) for image in mask if image.any()]
        assert len(sides) == 6 and all(8 <= side <= 24 for both in sides for side in both)
    assert not (planted.masks["sar_only"] & planted.masks["eo_only"]).any()
    assert not scenes.discrepant.any()


def test_a_pasted_piece_comes_from_another_place(pairs):
    scenes, places = pairs
    planted = real_confidence.plant_changes(scenes, places)
    inside = torch.from_numpy(planted.masks["sar_only"][0])
    piece = planted.sar[0][:, inside]
    origins = [place for place, sar in zip(places, scenes.sar, strict=True) if torch.equal(sar[:, inside], piece)]
    assert origins and places[0] not in origins


# --------------------------------------------------------------------------------------------------------------- ideas
def test_blanking_compares_each_square_with_the_residual_without_it(model):
    torch.manual_seed(0)
    sar, eo = torch.rand(2, 3, 64, 64) * 2 - 1, torch.rand(2, 3, 64, 64) * 2 - 1
    contrast = blanked_contrast(model, sar, eo)
    one_by_hand = sar.clone()  # the squares of the second phase: even rows, odd columns
    cell = confidence_ideas.CELL_PX
    for top in range(0, 64, 2 * cell):
        for left in range(cell, 64, 2 * cell):
            one_by_hand[:, :, top : top + cell, left : left + cell] = sar.mean((2, 3), keepdim=True)
    expected = residuals(model, sar, eo) - residuals(model, one_by_hand, eo)
    latent = cell // 4
    torch.testing.assert_close(contrast[..., :latent, latent : 2 * latent], expected[..., :latent, latent : 2 * latent])


@torch.no_grad()
def test_the_swapped_surprise_is_the_likelihood_of_the_sar(model):
    torch.manual_seed(1)
    sar, eo = torch.rand(1, 3, 32, 32) * 2 - 1, torch.rand(1, 3, 32, 32) * 2 - 1
    z_sar, z_eo, generator = encode(model.vae, sar), encode(model.vae, eo), torch.Generator().manual_seed(0)
    expected, timesteps = [], torch.tensor([TIMESTEPS[0]])
    for _ in range(DRAWS):
        noise = torch.randn(z_sar.shape, generator=generator)
        noisy = model.scheduler.add_noise(z_sar, noise, timesteps)
        prediction, raw = predict(model.unet, z_eo, noisy, timesteps, model.prompt_embedding)
        normal = torch.distributions.Normal(prediction, variance(raw).sqrt())
        per_channel = -2 * normal.log_prob(target_of(model.scheduler, z_sar, noise, timesteps)) - np.log(2 * np.pi)
        expected.append(per_channel.mean(1, keepdim=True))
    torch.testing.assert_close(swapped_surprise(model, sar, eo), torch.stack(expected).mean(0), rtol=1e-4, atol=1e-4)


def test_the_error_network_learns_an_error_that_the_features_show():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(16, 6, 16, 16, generator=generator)
    expected = 10 + 10 * (features[:, :1] > 0)
    error = expected * torch.rand(expected.shape, generator=generator).log().neg()  # exponentially distributed
    network = train_error_network(features, error, updates=150, seed=0)
    predicted = predict_error(network, features)
    assert predicted[expected == 20].mean() == pytest.approx(20, rel=0.15)
    assert predicted[expected == 10].mean() == pytest.approx(10, rel=0.25)


# --------------------------------------------------------------------------------------------------------- evaluation
class Known(real_confidence.Sampled):
    """Errors that are exponentially distributed about a scale, which the spread and σ² know."""

    def __init__(self, count: int, seed: int):
        rng = np.random.default_rng(seed)
        scale = rng.uniform(5, 50, (count, 24, 24))
        self.errors = {"mean": rng.exponential(scale), "sample": rng.exponential(1.4 * scale)}
        self.mean, self.spread_name = np.zeros(count), "spread"
        self.maps = {"spread": scale / 127.5, "σ² mean": (scale / 100) ** 2, "SAR brightness": rng.random(scale.shape)}


def test_calibrated_intervals_cover_other_places_and_the_unseen():
    places = [f"{place:03}" for place in range(8) for _ in range(4)]
    test, unseen = Known(32, 0), Known(12, 1)
    coverage = real_confidence.add_calibrated_error(test, places, unseen)
    for levels in coverage.values():
        assert {float(level): covered for level, covered in levels.items()} == pytest.approx(
            {0.5: 0.5, 0.8: 0.8, 0.9: 0.9}, abs=0.03
        )
    assert np.corrcoef(test.maps["expected error"].ravel(), test.maps["spread"].ravel())[0, 1] > 0.95
    ranked = real_confidence.ranking(test)
    assert ranked["expected error"]["mean"]["spearman"] > 0.35 > 0.1 > abs(ranked["SAR brightness"]["mean"]["spearman"])


def test_no_place_helps_to_calibrate_itself():
    """Errors of odd places are 3 times as large as their maps say: what they are given must come from the even ones."""
    places = [f"{place:03}" for place in range(8) for _ in range(4)]
    test, unseen = Known(32, 0), Known(12, 1)
    odd = np.array([int(place) % 2 == 1 for place in places])
    test.errors["mean"][odd] *= 3
    real_confidence.add_calibrated_error(test, places, unseen)
    given = test.maps["expected error"]
    assert given[odd].mean() / test.errors["mean"][odd].mean() == pytest.approx(1 / 3, rel=0.1)
    assert given[~odd].mean() / test.errors["mean"][~odd].mean() == pytest.approx(3, rel=0.1)


def test_a_rise_is_of_whole_tiles():
    test, unseen = Known(32, 0), Known(12, 1)
    unseen.maps["spread"] = unseen.maps["spread"] * 2
    numbers = real_confidence.rise(test, unseen)
    assert numbers["spread"] == {"ratio": pytest.approx(2, rel=0.05), "auroc": 1.0}
    assert numbers["SAR brightness"]["ratio"] == pytest.approx(1, rel=0.05)


def test_detection_counts_each_kind_against_unchanged_pixels(pairs):
    planted = real_confidence.plant_changes(*pairs)
    found = real_confidence.detection({"right": planted.discrepant.astype(float)}, planted)
    assert found == {"right": {"sar_only": 1.0, "eo_only": 1.0}}


def test_the_command_writes_a_report_and_continues(tmp_path, monkeypatch):
    assert real_confidence.main(["--size", "tiny", "--output", str(tmp_path)]) == 0
    text = (tmp_path / "REAL_CONFIDENCE.md").read_text()
    for row in ("C-Diff, β = timestep", "σ² midpoint", "SAR gradient", "learnt error", "blanked SAR", "swapped", "audit"):
        assert f"| {row} |" in text
    assert (tmp_path / "figure.png").is_file() and len(json.loads((tmp_path / "results.json").read_text())) == 1
    monkeypatch.setattr(real_confidence, "train_all", None)  # nothing is trained again
    assert real_confidence.main(["--size", "tiny", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "REAL_CONFIDENCE.md").read_text() == text


# -------------------------------------------------------------------------------------------------------- registration
def test_scores_of_tiles_are_the_audits(model):
    rng = np.random.default_rng(0)
    sar, eo = rng.uniform(0, 255, (140, 150)), rng.uniform(0, 255, (140, 150, 3))
    corners = [(0, 3), (12, 22)]
    found = registration.scores(model, sar, eo, corners)
    for score, (y, x) in zip(found, corners, strict=True):
        tile = np.s_[y : y + TILE_PX, x : x + TILE_PX]
        signed = [
            torch.from_numpy(image[tile].round().astype(np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
            for image in (np.repeat(sar[..., None], 3, -1), eo)
        ]
        assert score == pytest.approx(residuals(model, *signed).mean().item(), rel=1e-4)


def test_tables_of_the_registration_count_fragments_and_tiles():
    rows = [
        {"part": "test", "offset": 6.0, "came": np.array([2.0, 3.0]), "registered": np.array([1.0, 2.5])},
        {"part": "test", "offset": 20.0, "came": np.array([4.0, 1.0]), "registered": np.array([1.0, 2.0])},
    ]
    lines = registration.offset_table(rows).splitlines()
    assert lines[2] == "| 4 to 8 px | 1 | 2 | 2.500 | 1.750 | 100% | 1 of 1 | 0.75 |"
    assert lines[3] == "| 16 px and more | 1 | 2 | 2.500 | 1.500 | 50% | 1 of 1 | 0.62 |"
    rows += [{"part": "mismatched", "offset": None, "came": np.array([2.4]), "registered": None}]
    rows += [{"part": "train", "offset": None, "came": np.array([9.0]), "registered": None}]
    text = registration.unusable_table(rows)
    assert "| not registered | 1 | 9.000 | 100% |" in text and "| EO of another place | 1 | 2.400 | 0% |" in text
