"""Is the map right? Uncertainty maps and trivial baselines against the error they should predict, per image and pooled.

Errors are those of the picture in 8-bit units (0 to 255): per pixel the mean over RGB of the absolute and of the squared
difference. More means less certain, for every map and baseline.
"""

import zlib
from contextlib import suppress
from functools import partial

import numpy as np
from scipy.ndimage import gaussian_gradient_magnitude, uniform_filter

from cdiffset.evaluation.uncertainty import auroc, average_precision, ence, rank_error, ranking_measures, reliability

ERRORS = ("absolute", "squared")
WINDOW_PX = 7  # of the local coefficient of variation
GRADIENT_SIGMA_PX = 1.0
BINS = 20  # of reliability diagrams, equally many pixels each
RANDOM, DRAWN = 1, 2  # purposes of random draws, so that no two share a stream

# Which errors a map is to predict in size. The variance claims no unit: its σ is scaled to the mean of the error.
CALIBRATED = {"variance": ("absolute", "squared"), "expected error": ("absolute",), "ensemble spread": ("squared",)}
POWERS = {"absolute": 1, "squared": 2}  # of `reliability`: means, or root mean squares


def trivial_baselines(sar: np.ndarray | None, size: tuple[int, int], stem: str) -> dict[str, np.ndarray]:
    """What any map must beat: chance and, given the SAR [H, W, 3] in 0-255, plain functions of it => {name: float32 [H, W]}."""
    maps = {"random": _generator(stem, RANDOM).random(size)}
    if sar is not None:
        grey = sar.mean(-1, dtype=np.float64)
        mean = uniform_filter(grey, WINDOW_PX)
        deviation = np.sqrt(np.maximum(uniform_filter(grey**2, WINDOW_PX) - mean**2, 0))
        maps["SAR brightness"] = grey
        maps["SAR local variation"] = np.divide(deviation, mean, out=np.zeros_like(mean), where=mean > 1e-6)
        maps["SAR gradient"] = gaussian_gradient_magnitude(grey, GRADIENT_SIGMA_PX)
    return {name: values.astype(np.float32) for name, values in maps.items()}


def _generator(stem: str, purpose: int) -> np.random.Generator:
    """Random draws of an image are a function of its stem, so that they depend neither on order nor on company."""
    return np.random.default_rng([zlib.crc32(stem.encode()), purpose])


def image_columns(maps: dict[str, np.ndarray], errors: dict[str, np.ndarray]) -> dict[str, float]:
    """Maps and errors [H, W] of one image => {"variance/ause_absolute": ..., ...}; what is undefined is left out."""
    columns = {}
    for name, kind in ((name, kind) for name, kinds in CALIBRATED.items() if name in maps for kind in kinds):
        with suppress(ValueError):  # no error at all, or fewer pixels than bins
            columns[f"{name}/ence_{kind}"] = _calibration(name, kind, maps[name], errors)["ence"]
    with suppress(ValueError):  # the error is the same everywhere, as in a perfect image
        ranked = {name: rank_error(error) for name, error in errors.items()}
        for name, values in maps.items():
            with suppress(ValueError):  # a constant map
                for error, measures in ranking_measures(values, ranked).items():
                    columns |= {f"{name}/{measure}_{error}": measures[measure] for measure in ("spearman", "ause", "aurg")}
    return columns


def draw_pixels(maps: dict[str, np.ndarray], at_most: int, stem: str) -> dict[str, np.ndarray]:
    """Maps [H, W] => the same pixels of each [n], all of them or `at_most` drawn at random by the stem."""
    pixels = next(iter(maps.values())).size
    if pixels <= at_most:
        return {name: values.ravel() for name, values in maps.items()}
    chosen = np.sort(_generator(stem, DRAWN).choice(pixels, at_most, replace=False))
    return {name: values.ravel()[chosen] for name, values in maps.items()}


def pooled_measures(drawn: list[dict[str, np.ndarray]], pixels_per_image: int) -> dict:
    """The pixels drawn from all images, together, as one set => the `uncertainty` part of a report.

    What is undefined is left out, with the reason under "absent".
    """
    values = {name: np.concatenate([pixels[name] for pixels in drawn]) for name in drawn[0]}
    masks = {name: values.pop(name) for name in list(values) if values[name].dtype == bool}
    errors = {name: values.pop(name) for name in ERRORS}
    part = {
        "images": len(drawn), "pixels": int(errors["absolute"].size), "pixels_per_image": pixels_per_image,
        "mean_error": {name: float(error.mean(dtype=np.float64)) for name, error in errors.items()},
        "discrepant_pixels": {name: int(mask.sum()) for name, mask in masks.items()},
        "maps": {name: {} for name in values},
        "absent": {name: "no pixel of any image is marked" for name, mask in masks.items() if not mask.any()},
    }  # fmt: skip
    try:
        ranked = {name: rank_error(error) for name, error in errors.items()}
        part["oracle"] = {name: (error.oracle * part["mean_error"][name]).tolist() for name, error in ranked.items()}
    except ValueError as error:
        ranked, part["absent"]["ranking"] = None, str(error)
    for name, score in values.items():
        measures = {mask: partial(_detection, score, positive, masks) for mask, positive in masks.items() if positive.any()}
        if ranked:
            measures["ranking"] = partial(ranking_measures, score, ranked)
        if name in CALIBRATED:
            measures["calibration"] = partial(_calibrations, name, score, errors)
        for measure, compute in measures.items():
            try:
                part["maps"][name][measure] = compute()
            except ValueError as error:
                part["absent"][f"{name}, {measure}"] = str(error)
    return part


def _detection(score: np.ndarray, positive: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, float]:
    """Pixels of one kind of discrepancy against all pixels without any."""
    clean = ~np.logical_or.reduce(list(masks.values()))
    return {"auroc": auroc(score, positive, clean), "average_precision": average_precision(score, positive, clean)}


def _calibrations(name: str, score: np.ndarray, errors: dict[str, np.ndarray]) -> dict[str, dict]:
    return {error: _calibration(name, error, score, errors) for error in CALIBRATED[name]}


def _calibration(name: str, error: str, score: np.ndarray, errors: dict[str, np.ndarray]) -> dict:
    """The reliability diagram and ENCE of a map against one kind of error, in 8-bit units."""
    power, observed = POWERS[error], np.asarray(errors[error], np.float64)
    predicted = np.asarray(score, np.float64)
    if name == "variance":  # σ^power, scaled to one mean with the error's
        scaled = predicted ** (power / 2)
        if not scaled.any():
            raise ValueError("calibration is undefined: the variance is 0 everywhere")
        predicted = (scaled * (observed.mean() / scaled.mean())) ** (1 / power)
    by_bin = reliability(predicted, observed ** (1 / power), power, BINS)
    return {"bins": BINS, "predicted": by_bin[0].tolist(), "observed": by_bin[1].tolist(), "ence": ence(*by_bin)}
