"""The confidence map that people look at, and the numbers that say whether an uncertainty deserves trust.

The measures take arrays of any one shape, are computed in float64 over all their values together, and refuse what leaves them
undefined instead of returning NaN. To judge a whole test set, pass the stacked maps of all its images.
"""

import numpy as np
import torch
from scipy.stats import rankdata, spearmanr


def confidence_map(variance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """σ² [B, 1, h, w], above 0, of the latent => confidence [B, 1, H, W] in [0, 1] at the image's size (H, W), float32.

    1/σ², min-max normalised per image, then upsampled bicubically and clamped (bicubic interpolation overshoots). The scale
    is each image's own, so confidences of different images do not compare. A constant σ² is 1 everywhere: nothing in the image
    is less certain than the rest. C-DiffSET, "confidence map".
    """
    if variance.ndim != 4 or variance.shape[1] != 1 or not bool(((variance > 0) & variance.isfinite()).all()):
        raise ValueError(f"variance must be finite, above 0 and of shape [B, 1, h, w], got shape {list(variance.shape)}")
    confidence = 1 / variance.float()  # [B, 1, h, w]
    low, high = confidence.aminmax(dim=3, keepdim=True)
    low, high = low.amin(2, keepdim=True), high.amax(2, keepdim=True)  # [B, 1, 1, 1]
    span = high - low
    confidence = torch.where(span > 0, (confidence - low) / span.clamp(min=torch.finfo(span.dtype).tiny), 1.0)
    return torch.nn.functional.interpolate(confidence, size, mode="bicubic", align_corners=False).clamp(0, 1)


def spearman(variance: np.ndarray, error: np.ndarray) -> float:
    """Spearman's rank correlation in [-1, 1] of an uncertainty and the error it should foretell; ties get average ranks.

    Source: scipy.stats.spearmanr. ValueError where one of the two is constant (the correlation is then undefined).
    """
    variance, error = _paired(variance, error)
    for name, values in (("uncertainty", variance), ("error", error)):
        if np.ptp(values) == 0:
            raise ValueError(f"rank correlation is undefined: the {name} is {values[0]:g} everywhere")
    return float(spearmanr(variance, error).statistic)


def sparsification_curve(uncertainty: np.ndarray, error: np.ndarray, steps: int = 100) -> tuple[np.ndarray, np.ndarray]:
    """How the mean error falls when the most uncertain values are removed (Ilg et al., ECCV 2018).

    Returns (fractions, curve), each [steps]: fractions = k / steps for k = 0 ... steps - 1, the share removed;
    curve = mean error of the ceil((1 - fraction) n) least uncertain values over the mean error of all n, so that curve[0] = 1.
    Equal uncertainties are removed in a random but reproducible order, so that a constant uncertainty stays near 1 whatever the
    layout of the image. `error` is not negative and not 0 everywhere; anything else is a ValueError.
    """
    uncertainty, error = _paired(uncertainty, error)
    if error.min() < 0 or error.max() == 0:
        raise ValueError(f"errors must not be negative and not all 0, got {error.min():g} to {error.max():g}")
    shuffled = np.random.default_rng(0).permutation(error.size)
    order = shuffled[np.argsort(uncertainty[shuffled], kind="stable")]  # least uncertain first
    removed = np.arange(steps) * error.size // steps
    kept = error.size - removed
    mean_of_kept = np.cumsum(error[order])[kept - 1] / kept
    return np.arange(steps) / steps, mean_of_kept / mean_of_kept[0]


def ause(uncertainty: np.ndarray, error: np.ndarray) -> float:
    """Area under the sparsification error (Ilg et al., ECCV 2018): 0 where the uncertainty ranks as the error itself does.

    The area between the sparsification curve of the uncertainty and the oracle's, which removes by the error itself, by the
    trapezoidal rule over the removed fractions 0, 0.01, ..., 0.99; the curves are relative to the mean error of all values, so
    the area has no unit. An uncertainty that knows nothing scores the area between 1 and the oracle's curve.
    """
    fractions, curve = sparsification_curve(uncertainty, error)
    _, oracle = sparsification_curve(error, error)
    return float(np.trapezoid(curve - oracle, fractions))


def auroc(score: np.ndarray, positive_mask: np.ndarray, negative_mask: np.ndarray) -> float:
    """Area under the ROC curve: the probability that a random positive scores above a random negative, ties counting half.

    The Mann-Whitney statistic from average ranks, over the number of pairs: 0.5 for a score that knows nothing. Values in
    neither mask are ignored. The masks are boolean, of the score's shape, disjoint and not empty; else ValueError.
    """
    score, positive, negative = (np.asarray(values) for values in (score, positive_mask, negative_mask))
    if not score.shape == positive.shape == negative.shape or not positive.dtype == negative.dtype == bool:
        raise ValueError(
            f"masks must be boolean and of the score's shape {score.shape}, got {positive.dtype} {positive.shape} "
            f"and {negative.dtype} {negative.shape}"
        )
    n_positive, n_negative = int(positive.sum()), int(negative.sum())
    if n_positive == 0 or n_negative == 0 or (positive & negative).any():
        raise ValueError(f"masks must be disjoint and not empty, got {n_positive} positive and {n_negative} negative values")
    scores = np.concatenate([score[positive], score[negative]]).astype(np.float64)
    if not np.isfinite(scores).all():
        raise ValueError("scores under the masks must be finite")
    rank_sum = rankdata(scores)[:n_positive].sum()
    return float((rank_sum - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))


def _paired(uncertainty: np.ndarray, error: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two arrays of one shape => flat float64 [n], checked to be finite and not empty."""
    uncertainty, error = np.asarray(uncertainty, np.float64), np.asarray(error, np.float64)
    if uncertainty.shape != error.shape or error.size == 0:
        raise ValueError(f"uncertainty and error must have one shape, not empty, got {uncertainty.shape} and {error.shape}")
    if not (np.isfinite(uncertainty).all() and np.isfinite(error).all()):
        raise ValueError("uncertainty and error must be finite")
    return uncertainty.ravel(), error.ravel()
