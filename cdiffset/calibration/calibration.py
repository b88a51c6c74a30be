"""From σ² and spread to an expected error in 8-bit EO units: fitting, held-out evaluation, and the JSON file.

The error of a pixel is the mean over RGB of |generated - true| in 0-255, both 8-bit. Every map (σ², or the spread over the
samples) gets a monotone curve to the expected error; with two maps, their expected errors e₁ and e₂ are joined as
e₁^(1 - w) · e₂^w, which a last monotone curve corrects.
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cdiffset.errors import UserError
from cdiffset.images import write_text

FILE_NAME = "calibration.json"
KNOTS = 200  # equal-count bins that a curve is fitted to, hence at most as many knots
SPREAD_WEIGHTS = (0.0, 0.25, 0.5, 0.75, 1.0)
LEVELS = (0.5, 0.8, 0.9)  # of the intervals
BINS = 20  # of the reliability diagram
MIN_ERROR = 0.01  # 8-bit units; no pixel is promised to be free of error
MAPS = ("variance", "spread")


class Curve(NamedTuple):
    """A monotone map: straight between its knots, constant beyond them."""

    x: list[float]
    y: list[float]

    def __call__(self, values: np.ndarray) -> np.ndarray:
        return np.interp(values, self.x, self.y)


@dataclass(frozen=True)
class Calibration:
    settings: dict  # of the translation, see options.calibrated_settings
    model: str  # fingerprint of networks, prompt and prediction type
    curves: dict[str, Curve]  # map => expected error
    spread_weight: float | None = None  # where there are two maps
    joint: Curve | None = None  # what corrects the two maps' join
    quantiles: dict[str, float] = field(default_factory=dict)  # level => q: |error| <= q * expected in so many of the pixels
    report: dict = field(default_factory=dict)  # what it was fitted on, and how it does on held-out images

    def expected_error(self, maps: dict[str, np.ndarray]) -> np.ndarray:
        """Maps of one shape, by name => expected error in 8-bit units, float64 of that shape."""
        from cdiffset.pipeline import expected_error  # here and below: slow to import, and no command needs it for --help

        return expected_error(self.applied(), maps)

    def applied(self) -> dict:
        """What `pipeline.expected_error` takes."""
        curves = {name: curve._asdict() for name, curve in self.curves.items()}
        return {"curves": curves, "spread_weight": self.spread_weight, "joint": self.joint and self.joint._asdict()}


# -------------------------------------------------------------------------------------------------------------- fitting
def fit_curve(values: np.ndarray, error: np.ndarray) -> Curve:
    """Isotonic regression (scikit-learn) of the error [n] on values [n], through the means of KNOTS equal-count bins."""
    from sklearn.isotonic import IsotonicRegression

    order = np.argsort(values, kind="stable")
    bins = [part for part in np.array_split(order, KNOTS) if len(part)]
    x, y = (np.array([source[part].mean(dtype=np.float64) for part in bins]) for source in (values, error))
    fitted = IsotonicRegression().fit(x, y, sample_weight=[len(part) for part in bins])
    return Curve(fitted.X_thresholds_.tolist(), np.maximum(fitted.y_thresholds_, MIN_ERROR).tolist())


def fit(maps: dict[str, np.ndarray], error: np.ndarray) -> tuple[dict[str, Curve], float | None, Curve | None]:
    """Maps, each [n], and the error [n] => (curves, weight of the spread, joint curve), by the least squared error."""
    from cdiffset.pipeline import combine

    curves = {name: fit_curve(values, error) for name, values in maps.items()}
    if len(maps) == 1:
        return curves, None, None
    errors = [curve(maps[name]) for name, curve in curves.items()]
    candidates = []
    for spread_weight in SPREAD_WEIGHTS:
        joined = combine(errors, spread_weight)
        joint = fit_curve(joined, error)
        candidates.append((float(np.mean((joint(joined) - error) ** 2)), spread_weight, joint))
    _, spread_weight, joint = min(candidates, key=lambda candidate: candidate[:2])
    return curves, spread_weight, joint


def conformal_quantile(expected: np.ndarray, error: np.ndarray, level: float) -> float:
    """Split conformal prediction: the ceil((n + 1) level)-th smallest error / expected, of n pixels not used for fitting.

    An exchangeable new error is then at most q times its expected error with at least the probability `level`.
    """
    scores = np.sort(error / expected)
    rank = math.ceil((len(scores) + 1) * level)
    return float(scores[min(rank, len(scores)) - 1])


def evaluate(calibration: Calibration, scales: dict[str, float], maps: dict[str, np.ndarray], error: np.ndarray) -> dict:
    """How a calibration does on pixels of images that it has not seen, beside each map times one global scale."""
    from cdiffset.evaluation.uncertainty import ence, reliability

    bins = min(BINS, error.size)
    expected = calibration.expected_error(maps)
    predicted, observed = reliability(expected, error, 1, bins)
    scaled = {name: np.maximum(scale * magnitude(name, maps[name]), MIN_ERROR) for name, scale in scales.items()}
    return {
        "mean_error": float(error.mean()),
        "ence_before": {name: ence(*reliability(values, error, 1, bins)) for name, values in scaled.items()},
        "ence_after": ence(predicted, observed),
        "coverage": {level: float(np.mean(error <= q * expected)) for level, q in calibration.quantiles.items()},
        "reliability": {"predicted": predicted.tolist(), "observed": observed.tolist()},
    }


def magnitude(name: str, values: np.ndarray) -> np.ndarray:
    """A map as a magnitude of errors, up to a scale: σ for σ², the spread as it is."""
    return np.sqrt(values) if name == "variance" else values


# ----------------------------------------------------------------------------------------------------------------- files
def path_beside(checkpoint: str | Path) -> Path:
    """Where the calibration of a checkpoint lies: in its folder, or as NAME.calibration.json beside NAME.safetensors."""
    path = Path(checkpoint).expanduser()
    return path / FILE_NAME if path.is_dir() else path.with_name(f"{path.stem}.{FILE_NAME}")


def save(path: Path, calibration: Calibration) -> None:
    write_text(path, json.dumps(asdict(calibration) | calibration.applied(), indent=1, allow_nan=False) + "\n")


def load(path: Path, settings: dict | None = None) -> Calibration:
    """Read a calibration and check its content; UserError where it is damaged or was made with other settings than given."""
    if not path.is_file():
        raise UserError(f"there is no calibration {path}: make one with calibrate.py, or name another by --calibration")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        calibration = _checked(values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{path} is no calibration, expected what calibrate.py writes: {reason}") from error
    if settings is not None and calibration.settings != settings:
        made, wanted = (", ".join(f"{key} {value}" for key, value in each.items()) for each in (calibration.settings, settings))
        raise UserError(f"{path} was made with {made}; this translation has {wanted}: give it the same, or calibrate anew")
    return calibration


def _checked(values: dict) -> Calibration:
    curves = {name: _checked_curve(name, values["curves"][name]) for name in MAPS if name in values["curves"]}
    joint = None if values["joint"] is None else _checked_curve("joint", values["joint"])
    spread_weight, quantiles = values["spread_weight"], values["quantiles"]
    if set(values["curves"]) != set(curves) or not curves:
        raise ValueError(f"curves of {', '.join(values['curves']) or 'nothing'}, expected of {' or '.join(MAPS)}")
    if (len(curves) == 2) != (joint is not None) or (len(curves) == 2) != (spread_weight is not None):
        raise ValueError("two curves need spread_weight and a joint curve, one curve has neither")
    if spread_weight is not None and not 0 <= spread_weight <= 1:
        raise ValueError(f"spread_weight {spread_weight}, expected 0 to 1")
    if not all(0 < quantile < math.inf for quantile in quantiles.values()):
        raise ValueError(f"quantiles {quantiles}, expected finite ones above 0")
    if not isinstance(values["settings"], dict) or not isinstance(values["model"], str):
        raise ValueError("settings or model of the wrong type")
    return Calibration(values["settings"], values["model"], curves, spread_weight, joint, quantiles, values["report"])


def _checked_curve(name: str, curve: dict) -> Curve:
    x, y = np.asarray(curve["x"], np.float64), np.asarray(curve["y"], np.float64)
    if x.ndim != 1 or x.shape != y.shape or x.size == 0:
        raise ValueError(f"curve {name!r}: x and y must be lists of one length, not empty")
    if not (np.isfinite(x).all() and np.isfinite(y).all() and (np.diff(x) > 0).all() and (np.diff(y) >= 0).all() and y[0] > 0):
        raise ValueError(f"curve {name!r}: x must be finite and rising, y finite, above 0 and not falling")
    return Curve(x.tolist(), y.tolist())
