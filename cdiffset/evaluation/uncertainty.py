"""Measures of whether an uncertainty deserves trust.

They take arrays of any one shape, are computed in float64 over all their values together, and raise ValueError for what leaves
them undefined instead of returning NaN. For a whole test set, pass the stacked maps of all its images.
"""

from typing import NamedTuple

import numpy as np
from scipy.integrate import trapezoid
from scipy.stats import rankdata, spearmanr

STEPS = 100  # of a sparsification curve


def spearman(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Spearman's rank correlation in [-1, 1] of an uncertainty and the error that it should predict; ties get average ranks."""
    uncertainty, error = _paired(uncertainty, error)
    _require_varied("uncertainty", uncertainty)
    _require_varied("error", error)
    return float(spearmanr(uncertainty, error).statistic)


def sparsification_curve(uncertainty: np.ndarray, error: np.ndarray, steps: int = STEPS) -> tuple[np.ndarray, np.ndarray]:
    """How the mean error falls when the most uncertain values are removed (Ilg et al., ECCV 2018).

    Returns (fractions, curve), each [steps]: fractions = k / steps for k = 0 ... steps - 1, the fraction removed;
    curve = mean error of the ceil((1 - fraction) n) least uncertain values over the mean error of all n, so that curve[0] = 1.
    Equal uncertainties are removed in a random but reproducible order. `error` is not negative and not 0 everywhere.
    """
    uncertainty, error = _paired(uncertainty, error)
    if error.min() < 0 or error.max() == 0:
        raise ValueError(f"errors must not be negative and not all 0, got {error.min():g} to {error.max():g}")
    remaining = _mean_of_kept(_least_uncertain_first(uncertainty), error, steps)
    return np.arange(steps) / steps, remaining / remaining[0]


def _least_uncertain_first(uncertainty: np.ndarray) -> np.ndarray:
    shuffled = np.random.default_rng(0).permutation(uncertainty.size)
    return shuffled[np.argsort(uncertainty[shuffled], kind="stable")]


def _mean_of_kept(order: np.ndarray, error: np.ndarray, steps: int) -> np.ndarray:
    """Mean error of the first ceil((1 - k / steps) n) values in the order, for k = 0 ... steps - 1."""
    kept = error.size - np.arange(steps) * error.size // steps
    return np.cumsum(error[order])[kept - 1] / kept


def ause(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Area under the sparsification error (Ilg et al., ECCV 2018): 0 where the uncertainty ranks as the error itself does.

    The area between the sparsification curve of the uncertainty and the oracle's, which removes by the error itself.
    """
    fractions, curve = sparsification_curve(uncertainty, error)
    _, oracle = sparsification_curve(error, error)
    return float(trapezoid(curve - oracle, fractions))


def aurg(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Area under the random gain (Poggi et al., CVPR 2020): between 1, a random order's curve, and the sparsification curve.

    0 for an uncertainty that knows nothing, below 0 for one that misleads; AUSE + AURG is the same for every uncertainty.
    """
    fractions, curve = sparsification_curve(uncertainty, error)
    return float(trapezoid(1 - curve, fractions))


class RankedError(NamedTuple):
    """The errors of a set of pixels, ranked once, to compare several uncertainties with; made by rank_error."""

    values: np.ndarray  # [n] float64, not negative
    ranks: np.ndarray  # [n] average ranks
    oracle: np.ndarray  # [100] sparsification curve by the error itself


def rank_error(error: np.ndarray) -> RankedError:
    """ValueError where the measures are undefined: an error that is constant, negative or not finite."""
    _, oracle = sparsification_curve(error, error)
    values = np.ravel(error).astype(np.float64)
    _require_varied("error", values)
    return RankedError(values, rankdata(values), oracle)


def ranking_measures(uncertainty: np.ndarray, errors: dict[str, RankedError]) -> dict[str, dict]:
    """{error: {"spearman", "ause", "aurg": float, "discard": [100]}}, sorting the uncertainty once for all errors.

    discard: the sparsification curve in the error's unit. ValueError where the uncertainty is constant.
    """
    uncertainty, _ = _paired(np.ravel(uncertainty), next(iter(errors.values())).values)
    _require_varied("uncertainty", uncertainty)
    order, ranks = _least_uncertain_first(uncertainty), rankdata(uncertainty)
    measures = {}
    for name, error in errors.items():
        remaining = _mean_of_kept(order, error.values, STEPS)
        curve = remaining / remaining[0]
        measures[name] = {
            "spearman": float(np.corrcoef(ranks, error.ranks)[0, 1]),
            "ause": float(trapezoid(curve - error.oracle, dx=1 / STEPS)),
            "aurg": float(trapezoid(1 - curve, dx=1 / STEPS)),
            "discard": remaining.tolist(),
        }
    return measures


def reliability(predicted: np.ndarray, error: np.ndarray, power: int, bins: int = 20) -> tuple[np.ndarray, np.ndarray]:
    """Predicted against observed error, (predicted [bins], observed [bins]), in bins of equally many values by prediction.

    power 1: `predicted` is an expected absolute error, and both are means. power 2: it is a standard deviation, and both are
    root mean squares, RMV and RMSE of Levi et al. (Sensors 2022). Both inputs are in one unit and not negative.
    """
    predicted, error = _paired(predicted, error)
    if predicted.min() < 0 or error.min() < 0:
        raise ValueError(f"predicted errors and errors must not be negative, got {predicted.min():g} and {error.min():g}")
    if predicted.size < bins:
        raise ValueError(f"{bins} bins need at least as many values, got {predicted.size}")
    binned = np.array_split(_least_uncertain_first(predicted), bins)
    means = [[np.mean(values[chosen] ** power) ** (1 / power) for chosen in binned] for values in (predicted, error)]
    return np.array(means[0]), np.array(means[1])


def ence(predicted: np.ndarray, observed: np.ndarray) -> float:
    """Expected normalised calibration error (Levi et al., Sensors 2022) of the bins of `reliability`: 0 where calibrated.

    The mean over bins of |observed - predicted| / predicted. ValueError where a bin predicts 0.
    """
    if (predicted == 0).any():
        raise ValueError(f"ENCE is undefined: {int((predicted == 0).sum())} of {predicted.size} bins predict an error of 0")
    return float(np.mean(np.abs(observed - predicted) / predicted))


def auroc(score: np.ndarray, positive_mask: np.ndarray, negative_mask: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a random positive scores above a random negative, ties counting half.

    Values in neither mask are ignored. The masks are boolean, of the score's shape, disjoint and not empty.
    """
    from sklearn.metrics import roc_auc_score  # slow to import, and few reports have masks

    return float(roc_auc_score(*_truth_and_scores(score, positive_mask, negative_mask)))


def average_precision(score: np.ndarray, positive_mask: np.ndarray, negative_mask: np.ndarray) -> float:
    """Average precision, the precision at every threshold weighted by the recall gained. Masks as for `auroc`."""
    from sklearn.metrics import average_precision_score

    return float(average_precision_score(*_truth_and_scores(score, positive_mask, negative_mask)))


def _truth_and_scores(score: np.ndarray, positive_mask: np.ndarray, negative_mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the values under either mask: which are positive, and their scores, float64; checked."""
    score, positive, negative = (np.asarray(values) for values in (score, positive_mask, negative_mask))
    if not score.shape == positive.shape == negative.shape or not positive.dtype == negative.dtype == bool:
        found = " and ".join(f"{mask.dtype} {mask.shape}" for mask in (positive, negative))
        raise ValueError(f"masks must be boolean and of the score's shape {score.shape}, got {found}")
    n_positive, n_negative = int(positive.sum()), int(negative.sum())
    if n_positive == 0 or n_negative == 0 or (positive & negative).any():
        raise ValueError(f"masks must be disjoint and not empty, got {n_positive} positive and {n_negative} negative values")
    counted = positive | negative
    scores = score[counted].astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores under the masks must be finite")
    return positive[counted], scores


def _paired(uncertainty: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of one shape => flat float64 [n], checked to be finite and not empty."""
    uncertainty, error = np.asarray(uncertainty, np.float64), np.asarray(error, np.float64)
    if uncertainty.shape != error.shape or error.size == 0:
        raise ValueError(f"uncertainty and error must have one shape, not empty, got {uncertainty.shape} and {error.shape}")
    if not (np.isfinite(uncertainty).all() and np.isfinite(error).all()):
        raise ValueError("uncertainty and error must be finite")
    return uncertainty.ravel(), error.ravel()


def _require_varied(name: str, values: np.ndarray) -> None:
    if np.ptp(values) == 0:
        raise ValueError(f"rank correlation is undefined: the {name} is {values[0]:g} everywhere")
