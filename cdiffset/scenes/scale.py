"""On which scale the numbers of a scene are: by what the product calls them, and by the numbers themselves, which decide."""

import math
import re

import numpy as np

from cdiffset.errors import UserError
from cdiffset.scenes.geotiff import Scene

SCALE_WORDS = {  # how products name their numbers, in units, descriptions and tags
    "db": {"db", "decibel", "decibels"},
    "amplitude": {"amplitude", "magnitude"},
    "intensity": {"intensity", "power", "linear", "sigma0", "beta0", "gamma0"},
}
LIKELY_DB = (-60, 20)  # backscatter
POSSIBLE_DB = (-100, 100)  # of numbers that were never calibrated, too
MIN_DB_SPREAD = 1.0  # dB between the 1st and the 99th percentile of anything that was taken by radar
HEAVY_TAIL = 2.4  # 99th percentile / median: power of several looks is above, amplitude of several looks below
FILL_SHARE = 0.05  # of the pixels that have one extreme value, from which on they may mean that there is no data
SCALE_NAMES = {"intensity": "power", "db": "decibels"}


def likely_fill(numbers: np.ndarray) -> tuple[float | None, str | None]:
    """Values [bands, n] as in the file => (an extreme value of more than FILL_SHARE of them, a note), or (None, None)."""
    for extreme, word in ((float(numbers.min()), "smallest"), (float(numbers.max()), "largest")):
        if FILL_SHARE < (share := float(np.mean(numbers == extreme))) < 1:
            found = f"{share:.0%} of the values are exactly {extreme:g}, the {word}"
            return extreme, f"{found}: if that means no data, give --nodata {extreme:g}"
    return None, None


def detect_scale(scene: Scene, indexes: tuple[int, ...], values: np.ndarray) -> tuple[str, str]:
    """--scale auto => (the scale, why): the named one, unless the numbers [n] contradict it, else by the numbers alone."""
    by_numbers = scale_of_numbers(values, scene.is_float(indexes))
    if (named := scale_of_words(scene, indexes)) is None:
        return by_numbers or ("dn", f"nothing names another; {range_of(values)}")
    scale, words = named
    no_db, negative = why_no_db(values), float(np.mean(values < 0))
    if scale == "db":
        return (scale, words) if no_db is None else ("dn", f"{words}, but {no_db}")
    if not negative > 0.01:
        return scale, words
    found = f"{words}, but {negative:.0%} of the values are negative"
    if no_db is None and likely_db_share(values) >= 0.98:
        return "db", f"{found}, as decibels are; {range_of(values)}"
    return "dn", found


def scale_of_words(scene: Scene, indexes: tuple[int, ...]) -> tuple[str, str] | None:
    """The scale that units, descriptions and tags name, and where."""
    places = {
        "unit": [scene.units[k - 1] for k in indexes],
        "description": [scene.descriptions[k - 1] for k in indexes],
        "tags": [text for k in indexes for text in scene.tags(k).values()] + list(scene.tags().values()),
    }
    for place, texts in places.items():
        for scale, words in SCALE_WORDS.items():
            if named := [text for text in texts if text and words & set(re.split(r"[^a-z0-9]+", text.lower()))]:
                return scale, f"{place} {named[0][:60]!r}"
    return None


def scale_of_numbers(values: np.ndarray, is_float: bool) -> tuple[str, str] | None:
    """The scale that values [n] have by themselves, and why; None where that is open.

    Power has a heavier tail than an amplitude of several looks; amplitude in float of a single look has the tail of power, too.
    """
    if not values.size:
        return None
    negative, likely = float(np.mean(values < 0)), likely_db_share(values)
    if negative >= 0.5 and likely >= 0.98:
        return "db", f"{likely:.0%} of the values from {LIKELY_DB[0]} to {LIKELY_DB[1]}, {negative:.0%} negative"
    if is_float and not negative:
        middle, high = np.percentile(values, (50, 99))
        if middle > 0 and high / middle > HEAVY_TAIL:
            return "intensity", f"floats from 0, 99th percentile {high / middle:.2g} times the median (power from {HEAVY_TAIL})"
    return None


def likely_db_share(values: np.ndarray) -> float:
    return float(np.mean((values >= LIKELY_DB[0]) & (values <= LIKELY_DB[1])))


def range_of(values: np.ndarray) -> str:
    low, middle, high = np.percentile(values, (1, 50, 99)) if values.size else (math.nan,) * 3
    return f"percentiles 1, 50, 99: {low:.3g}, {middle:.3g}, {high:.3g}"


def why_no_db(values: np.ndarray) -> str | None:
    """Why values [n] cannot be decibels; None where they can."""
    low, high = POSSIBLE_DB
    if (beyond := float(np.mean((values < low) | (values > high)))) > 0.01:
        return f"{beyond:.0%} of the values are beyond {low} to {high} dB"
    spread = float(np.subtract(*np.percentile(values, (99, 1)))) if values.size else 0.0
    if not (values < 0).any() and spread < MIN_DB_SPREAD:
        return f"no value is negative, and 98 % of them lie within {spread:.3g} dB"
    return None


def check_scale(
    scene: Scene, option: str | None, scale: str, numbers: np.ndarray, backscatter: np.ndarray, note: str | None
) -> None:
    """Refuse a scale that the numbers contradict; `backscatter` are those that can mean it, `option` is --scale."""
    negative = float(np.mean(backscatter < 0)) if backscatter.size else 0.0
    fault = why_no_db(numbers) if scale == "db" else None
    if scale in ("intensity", "amplitude") and negative > 0.5:
        fault = f"{negative:.0%} of the values are negative, as decibels are"
    if fault:
        asked = scale if option == scale else f"{option}, which takes them as {scale}"
        hint = f"; {note}" if note else "; give the scale that they have, or --scale auto"
        raise UserError(f"--scale {asked}: {scene.name} does not hold that: {fault} ({range_of(backscatter)}){hint}")
