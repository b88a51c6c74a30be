"""The uncertainty measures against closed forms, hand counts and direct library calls."""

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from cdiffset.evaluation.uncertainty import (
    aurg,
    auroc,
    ause,
    average_precision,
    ence,
    rank_error,
    ranking_measures,
    reliability,
    sparsification_curve,
    spearman,
)
from cdiffset.pipeline import confidence_map, variance_map


def pixels(n: int = 20_000) -> np.ndarray:
    """Errors uniform in [0, 1], for which the curves have closed forms."""
    return np.random.default_rng(7).uniform(0, 1, n)


def test_confidence_map_is_the_normalised_then_upsampled_inverse_variance():
    variance = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    got = confidence_map(variance, (32, 48))
    assert got.shape == (2, 1, 32, 48) and got.min() >= 0 and got.max() <= 1
    for index in range(2):
        inverse = 1 / variance[index : index + 1]
        normalised = (inverse - inverse.min()) / (inverse.max() - inverse.min())
        expected = torch.nn.functional.interpolate(normalised, (32, 48), mode="bicubic").clamp(0, 1)
        torch.testing.assert_close(got[index : index + 1], expected)


def test_confidence_map_at_latent_size_spans_0_to_1_and_peaks_at_the_smallest_variance():
    variance = torch.tensor([[[[4.0, 2.0], [1.0, 10.0]]]])
    expected = torch.tensor([[[[(0.25 - 0.1) / 0.9, (0.5 - 0.1) / 0.9], [1.0, 0.0]]]])
    torch.testing.assert_close(confidence_map(variance, (2, 2)), expected)


def test_confidence_map_of_a_constant_variance_is_1_and_leaves_the_other_images_alone():
    variance = torch.stack([torch.full((1, 3, 3), 0.7), torch.arange(1.0, 10.0).view(1, 3, 3)])
    got = confidence_map(variance, (12, 12))
    torch.testing.assert_close(got[0], torch.ones(1, 12, 12))
    torch.testing.assert_close(got[1:], confidence_map(variance[1:], (12, 12)))
    assert got[1].min() < 0.1


@pytest.mark.parametrize("variance", [torch.zeros(1, 1, 2, 2), torch.full((1, 1, 2, 2), float("nan")), torch.ones(1, 4, 2, 2)])
def test_confidence_map_refuses_what_is_no_variance(variance):
    with pytest.raises(ValueError, match=r"\[B, 1, h, w\]"):
        confidence_map(variance, (8, 8))


def test_spearman_is_scipys_on_the_flattened_maps():
    error = pixels(600).reshape(2, 3, 10, 10)
    variance = error + np.random.default_rng(1).normal(0, 0.3, error.shape)
    assert spearman(variance, error) == pytest.approx(spearmanr(variance.ravel(), error.ravel()).statistic, abs=1e-12)
    assert spearman(error**3, error) == pytest.approx(1.0)
    assert spearman(-error, error) == pytest.approx(-1.0)


def test_sparsification_by_hand():
    # Removing 0, 1, 2, 3 of four values, the most uncertain first: means of {1,2,3,6}, {1,2,3}, {1,3}, {3} over 3.
    fractions, curve = sparsification_curve(np.array([1.0, 3.0, 0.5, 9.0]), np.array([1.0, 2.0, 3.0, 6.0]), steps=4)
    np.testing.assert_allclose(fractions, [0, 0.25, 0.5, 0.75])
    np.testing.assert_allclose(curve, [1, 2 / 3, 2 / 3, 1])
    assert len(sparsification_curve(np.arange(4.0), np.arange(1.0, 5))[1]) == 100  # fewer values than steps


def test_ause_and_aurg_in_closed_form_for_uniform_errors():
    """The oracle's curve is 1 - f, chance's 1 and the reversed 1 + f, each over f = 0 ... 0.99."""
    error, half = pixels(), 0.99**2 / 2
    noise, ordered = np.random.default_rng(3).uniform(size=error.shape), np.sort(error)
    assert ause(error, error) == ause(np.exp(error), error) == 0  # only the ranking counts
    for uncertainty, area in ((error, 0), (noise, half), (-error, 2 * half)):
        assert ause(uncertainty, error) == pytest.approx(area, abs=0.02)
        assert aurg(uncertainty, error) == pytest.approx(half - area, abs=0.02)
    for rows in (ordered, ordered[::-1]):  # a constant is chance even where the image is ordered, and the same each time
        assert ause(np.ones_like(rows), rows) == ause(np.ones_like(rows), rows) == pytest.approx(half, abs=0.02)


EMPTY, FULL, ERROR = np.zeros(4, bool), np.ones(4, bool), {"absolute": rank_error(np.arange(5.0))}


@pytest.mark.parametrize(
    ("measure", "arguments", "message"),
    [
        (ause, (np.ones(3), np.zeros(3)), "not all 0"),
        (ause, (np.ones(3), np.array([1.0, -1.0, 1.0])), "not be negative"),
        (ause, (np.ones(3), np.ones(4)), "one shape"),
        (ause, (np.ones(0), np.ones(0)), "not empty"),
        (ause, (np.array([1.0, np.nan]), np.ones(2)), "finite"),
        (spearman, (np.ones(5), np.arange(5.0)), "uncertainty is 1 everywhere"),
        (rank_error, (np.full(5, 2.0),), "error is 2 everywhere"),
        (ranking_measures, (np.full(5, 3.0), ERROR), "uncertainty is 3 everywhere"),
        (auroc, (np.arange(4.0), EMPTY, FULL), "not empty"),
        (auroc, (np.arange(4.0), FULL, FULL), "disjoint"),
        (auroc, (np.arange(4.0), FULL * 1.0, EMPTY * 1.0), "boolean"),
        (auroc, (np.arange(4.0), FULL[:3], FULL), "shape"),
        (average_precision, (np.arange(4.0), FULL, FULL), "disjoint and not empty"),
        (reliability, (np.arange(-1.0, 29), np.ones(30), 1), "must not be negative"),
        (reliability, (np.ones(3), np.ones(3), 1), "20 bins need at least as many"),
        (ence, (np.array([0.0, 1.0]), np.ones(2)), "1 of 2 bins predict an error of 0"),
    ],
)
def test_what_is_undefined_is_refused(measure, arguments, message):
    with pytest.raises(ValueError, match=message):
        measure(*arguments)


def test_auroc_equals_counting_all_pairs():
    """With ties, and pixels of neither class."""
    rng = np.random.default_rng(5)
    score, kind = rng.integers(0, 20, (20, 15)), rng.integers(0, 3, (20, 15))
    difference = score[kind == 1][:, None] - score[kind == 2][None]
    assert auroc(score, kind == 1, kind == 2) == pytest.approx(((difference > 0) + 0.5 * (difference == 0)).mean(), abs=1e-12)


def test_discard_curve_by_hand():
    # 100 errors 1 ... 100, the largest the most uncertain: what remains without k of them has the mean (101 - k) / 2.
    error = np.arange(1.0, 101)
    evaluated = ranking_measures(error**2, {"absolute": rank_error(error)})
    np.testing.assert_allclose(evaluated["absolute"]["discard"], (101 - np.arange(100)) / 2)


def test_evaluating_by_ranked_errors_equals_every_measure_alone():
    rng = np.random.default_rng(2)
    error = rng.gamma(2, size=(30, 40)).round(1)  # with ties
    errors = {"absolute": error, "squared": error**2 + rng.uniform(0, 0.1, error.shape)}
    ranked = {name: rank_error(values) for name, values in errors.items()}
    for uncertainty in (rng.uniform(size=error.shape), (error + rng.normal(0, 1, error.shape)).round()):
        evaluated = ranking_measures(uncertainty, ranked)
        for name, values in errors.items():
            assert evaluated[name]["spearman"] == pytest.approx(spearman(uncertainty, values), abs=1e-12)
            assert evaluated[name]["ause"] == pytest.approx(ause(uncertainty, values), abs=1e-12)
            assert evaluated[name]["aurg"] == pytest.approx(aurg(uncertainty, values), abs=1e-12)
            curve = sparsification_curve(uncertainty, values)[1]
            np.testing.assert_allclose(evaluated[name]["discard"], curve * values.mean())


# ---- calibration


def test_reliability_and_ence_by_hand():
    # Two bins: predictions 1, 1 | 2, 4 against errors 2, 0 | 3, 9.
    predicted, error = np.array([4.0, 1.0, 2.0, 1.0]), np.array([9.0, 2.0, 3.0, 0.0])
    bins = reliability(predicted, error, power=1, bins=2)
    np.testing.assert_allclose(bins, [[1, 3], [1, 6]])
    assert ence(*bins) == pytest.approx((0 / 1 + 3 / 3) / 2)
    bins = reliability(predicted, error, power=2, bins=2)
    np.testing.assert_allclose(bins, np.sqrt([[1, 10], [2, 45]]))
    assert ence(*bins) == pytest.approx((np.sqrt(2) - 1 + np.sqrt(4.5) - 1) / 2)


def test_a_calibrated_gaussian_has_ence_near_0_and_one_at_twice_its_sigma_one_half():
    rng = np.random.default_rng(0)
    sigma = rng.uniform(1, 5, 100_000)
    error = np.abs(rng.normal(0, sigma))
    assert ence(*reliability(sigma, error, power=2)) == pytest.approx(0, abs=0.02)
    assert ence(*reliability(2 * sigma, error, power=2)) == pytest.approx(0.5, abs=0.02)
    assert ence(*reliability(sigma * np.sqrt(2 / np.pi), error, power=1)) == pytest.approx(0, abs=0.02)


def test_average_precision_by_hand():
    # Ranked 3 (positive), 2, 1 (positive), 0: precision 1 at recall 1/2, 2/3 at recall 1. 99 is ignored.
    score = np.array([2.0, 3.0, 99.0, 0.0, 1.0])
    positive, negative = np.array([0, 1, 0, 0, 1], bool), np.array([1, 0, 0, 1, 0], bool)
    assert average_precision(score, positive, negative) == pytest.approx((1 + 2 / 3) / 2)
    assert average_precision(np.ones(5), positive, negative) == pytest.approx(0.5)


def test_variance_map_is_bicubic_within_the_range_of_each_image():
    variance = torch.rand(2, 1, 4, 6, generator=torch.Generator().manual_seed(0)) + 0.1
    got = variance_map(variance, (32, 48))
    for index in range(2):
        alone = variance[index : index + 1]
        expected = torch.nn.functional.interpolate(alone, (32, 48), mode="bicubic").clamp(alone.min(), alone.max())
        torch.testing.assert_close(got[index : index + 1], expected)
