"""Is the map right? Uncertainty maps and their trivial rivals against the error they should foretell, per image and pooled.

Errors are those of the picture in 8-bit units (0 to 255): per pixel the mean over RGB of the absolute and of the squared
difference. More means less certain, for every map and rival.
"""

import zlib
from functools import partial

import numpy as np
from scipy.ndimage import gaussian_gradient_magnitude, uniform_filter

from cdiffset.uncertainty import auroc, average_precision, ence, judge_ranking, rank_error, reliability

ERRORS = ("absolute", "squared")
WINDOW_PX = 7  # of the local coefficient of variation
GRADIENT_SIGMA_PX = 1.0
BINS = 20  # of reliability diagrams, equally many pixels each
RANDOM, SAMPLE = 1, 2  # purposes of random draws, so that no two share a stream

# How a map is read as an error in 8-bit units: (power of `reliability`, note). The variance claims no such unit.
CALIBRATED = {
    "expected error": (1, "expected against mean absolute error"),
    "ensemble spread": (2, "root mean variance over samples against RMSE"),
}
SCALED_NOTE = "σ, after one global scale (mean absolute error / mean σ), against mean absolute error"


def rivals(sar: np.ndarray | None, size: tuple[int, int], stem: str) -> dict[str, np.ndarray]:
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
    try:
        ranked = {name: rank_error(error) for name, error in errors.items()}
    except ValueError:  # the error is the same everywhere, as in a perfect image
        return columns
    for name, values in maps.items():
        try:
            judged = judge_ranking(values, ranked)
        except ValueError:  # a constant map
            continue
        for error, measures in judged.items():
            columns |= {f"{name}/{measure}_{error}": measures[measure] for measure in ("spearman", "ause", "aurg")}
    return columns


def sample_pixels(maps: dict[str, np.ndarray], at_most: int, stem: str) -> dict[str, np.ndarray]:
    """Maps [H, W] => the same pixels of each [n], all of them or `at_most` drawn at random by the stem."""
    pixels = next(iter(maps.values())).size
    if pixels <= at_most:
        return {name: values.ravel() for name, values in maps.items()}
    chosen = np.sort(_generator(stem, SAMPLE).choice(pixels, at_most, replace=False))
    return {name: values.ravel()[chosen] for name, values in maps.items()}


def pooled(samples: list[dict[str, np.ndarray]], pixels_per_image: int) -> dict:
    """The sampled pixels of all images, together, as one set => the `uncertainty` part of a report.

    What is undefined is left out, with the reason under "absent".
    """
    values = {name: np.concatenate([sample[name] for sample in samples]) for name in samples[0]}
    masks = {name: values.pop(name) for name in list(values) if values[name].dtype == bool}
    errors = {name: values.pop(name) for name in ERRORS}
    part = {
        "images": len(samples), "pixels": int(errors["absolute"].size), "pixels_per_image": pixels_per_image,
        "mean_error": {name: float(error.mean(dtype=np.float64)) for name, error in errors.items()},
        "discrepant_pixels": {name: int(mask.sum()) for name, mask in masks.items()},
        "maps": {name: {} for name in values}, "absent": {},
    }  # fmt: skip
    try:
        ranked = {name: rank_error(error) for name, error in errors.items()}
    except ValueError as error:
        part["absent"]["ranking"] = str(error)
        return part
    for name, error in ranked.items():
        part.setdefault("oracle", {})[name] = (error.oracle * part["mean_error"][name]).tolist()
    for name, score in values.items():
        measures = {
            "ranking": partial(_ranking, score, ranked),
            "calibration": partial(_calibration, name, score, errors["absolute"], np.sqrt(errors["squared"])),
            **{mask: partial(_detection, score, positive, masks) for mask, positive in masks.items()},
        }
        if name not in ("variance", *CALIBRATED):
            del measures["calibration"]
        for measure, compute in measures.items():
            try:
                part["maps"][name][measure] = compute()
            except ValueError as error:
                part["absent"][f"{name}, {measure}"] = str(error)
    return part


def _ranking(score: np.ndarray, ranked: dict) -> dict[str, dict]:
    judged = judge_ranking(score, ranked)
    return {error: measures | {"discard": measures["discard"].tolist()} for error, measures in judged.items()}


def _detection(score: np.ndarray, positive: np.ndarray, masks: dict[str, np.ndarray]) -> dict[str, float]:
    """Pixels of one kind of discrepancy against all pixels without any."""
    clean = ~np.logical_or.reduce(list(masks.values()))
    return {"auroc": auroc(score, positive, clean), "average_precision": average_precision(score, positive, clean)}


def _calibration(name: str, score: np.ndarray, absolute_error: np.ndarray, rms_error: np.ndarray) -> dict:
    """The reliability diagram and ENCE, in 8-bit units."""
    if name in CALIBRATED:
        power, note = CALIBRATED[name]
        predicted = score
    else:
        power, note = 1, SCALED_NOTE
        sigma = np.sqrt(score, dtype=np.float64)
        predicted = sigma * (absolute_error.mean() / sigma.mean())
    by_bin = reliability(predicted, absolute_error if power == 1 else rms_error, power, BINS)
    return {"note": note, "bins": BINS, "predicted": by_bin[0].tolist(), "observed": by_bin[1].tolist(), "ence": ence(*by_bin)}
