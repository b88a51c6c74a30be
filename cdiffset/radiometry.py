"""What a scene's numbers mean: which bands, on which scale and grid, stretched how. Measured once per scene, never per tile.

Files of ordinary size are read by `images.read_sar`; a scene without options is stretched by the same rule.
"""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader
from rasterio.windows import Window

from cdiffset.errors import UserError
from cdiffset.images import PIXEL_PERCENTILES, STRETCH_PERCENTILES
from cdiffset.resampling import apply_weights, gsd_of, require_gsd, resampled_size, steps_to, weights

SAMPLE_PX = 2**22  # what percentiles are taken of; a scene of at most so many pixels is read whole
SAMPLE_SIDE = 256  # px of a sampled block
READ_PX = 2**22  # about so many pixels are read at once where a scene is resampled to a coarser grid
MAX_BANDS = 4
MAX_PIXELS = 2**32  # of a scene, unless --max-pixels allows more: a few bytes may claim any size
MAX_SIDE = 31  # px
GSD_RANGE = (0.8, 1.25)  # of the training GSD, that pass without a warning
RANGE_FACTOR = 2.5  # by which the spread of brightness may differ without a warning

# What the file's numbers are => amplitude, in which they are stretched. "dn" and "amplitude" stay as they are.
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dn": lambda values: values,
    "amplitude": lambda values: values,
    "intensity": lambda values: np.sqrt(np.maximum(values, 0)),
    "db": lambda values: 10 ** (values / 20),
}
SCALE_WORDS = {  # how products name their numbers, in units, descriptions and tags
    "db": {"db", "decibel", "decibels"},
    "amplitude": {"amplitude", "magnitude"},
    "intensity": {"intensity", "power", "linear", "sigma0", "beta0", "gamma0"},
}
LIKELY_DB = (-60, 20)  # backscatter
CHANNELS = {  # preset => how many bands it takes
    "single": (1, "the band, repeated"),
    "pair": (2, "b1, (b1 + b2) / 2, b2"),
    "ratio": (2, "b1, b2, b1 / b2, e.g. VV, VH, VV / VH"),
    "three": (3, "as they are"),
    "spacenet6": (4, "HH, (HV + VH) / 2, VV"),
}
BY_COUNT = {1: "single", 2: "pair", 3: "three", 4: "spacenet6"}


@dataclass(frozen=True)
class Radiometry:
    """How pixels of one scene become three channels in 0-255, on the grid that is translated."""

    indexes: tuple[int, ...]  # GDAL's numbers of the bands, from 1
    channels: str  # of CHANNELS
    scale: str  # of SCALES
    limits: tuple[tuple[float, float], ...]  # (low, high) that become 0 and 255, one for each band, the ratio last
    steps: tuple[float, float] = (1.0, 1.0)  # pixels of the scene, down and along, per pixel that is translated
    despeckle: tuple[int, float | None] | None = None  # side of the window in px of the scene; looks, None for their mean
    scale_reason: str | None = None  # why --scale auto took this one

    def size(self, source: DatasetReader) -> tuple[int, int]:
        """(height, width) of the grid that is translated; windows are of that grid."""
        return resampled_size(source.shape, self.steps)

    def read(self, source: DatasetReader, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """A window => (float32 [3, h, w] in 0-255, valid [h, w]); what is not valid is filled smoothly from around it."""
        bands, valid = self.scaled(source, window)
        return fill(self.stretched(bands), valid).astype(np.float32), valid

    def stretched(self, bands: list[np.ndarray]) -> np.ndarray:
        """Bands as `scaled` gives them => three channels in 0-255, [3, ...]."""
        stretched = []
        for values, (low, high) in zip(bands, self.limits, strict=True):
            span = high - low
            stretched.append((np.clip(values, low, high) - low) / span * 255 if span > 0 else np.zeros_like(values))
        return np.stack(mixed(self.channels, stretched))

    def scaled(self, source: DatasetReader, window: Window) -> tuple[list[np.ndarray], np.ndarray]:
        """A window => (bands, float64 [h, w] each, before the stretch, 0 where not valid; valid [h, w])."""
        bands, valid = self.resampled(source, window)
        if self.channels == "ratio":
            valid = valid & (bands[1] > 0)
            bands.append(np.divide(bands[0], bands[1], out=np.zeros_like(bands[0]), where=valid))
        return bands, valid

    def resampled(self, source: DatasetReader, window: Window) -> tuple[list[np.ndarray], np.ndarray]:
        """`scaled` without the ratio. A coarser pixel is valid where half of its weight is; "dn" is averaged as it is."""
        if self.steps == (1, 1):
            return self.native(source, window)
        if window.height > 1 and window.height * window.width * math.prod(self.steps) > READ_PX:
            half = window.height // 2
            upper, there = self.resampled(source, Window(window.col_off, window.row_off, window.width, half))
            below = Window(window.col_off, window.row_off + half, window.width, window.height - half)
            lower, below_there = self.resampled(source, below)
            return [np.concatenate(parts) for parts in zip(upper, lower, strict=True)], np.concatenate([there, below_there])
        (row, down), (column, along) = (
            weights(first, first + count, step, length)
            for first, count, step, length in zip(
                (window.row_off, window.col_off), (window.height, window.width), self.steps, source.shape, strict=True
            )
        )
        bands, valid = self.native(source, Window(column, row, along.shape[1], down.shape[1]))
        share = apply_weights(down, along, valid.astype(np.float64))
        power = 1 if self.scale == "dn" else 2  # looks are averaged as intensity
        means = (
            np.divide(apply_weights(down, along, band**power), share, out=np.zeros_like(share), where=share > 0)
            for band in bands
        )
        kept = share >= 0.5
        return [np.where(kept, mean ** (1 / power), 0) for mean in means], kept

    def native(self, source: DatasetReader, window: Window) -> tuple[list[np.ndarray], np.ndarray]:
        """A window of the scene's own grid => (bands, float64 [h, w] each, 0 where not valid; valid [h, w]), despeckled."""
        margin = self.despeckle[0] // 2 if self.despeckle else 0
        row, column = max(0, window.row_off - margin), max(0, window.col_off - margin)
        last_row = min(source.height, window.row_off + window.height + margin)
        last_column = min(source.width, window.col_off + window.width + margin)
        bands, valid = read_valid(source, self.indexes, Window(column, row, last_column - column, last_row - row))
        bands = [np.where(valid, SCALES[self.scale](np.where(valid, band, 0).astype(np.float64)), 0) for band in bands]
        if self.despeckle:
            bands = [np.sqrt(despeckled(band**2, valid, *self.despeckle)) for band in bands]
        top, left = window.row_off - row, window.col_off - column
        inner = np.s_[top : top + window.height, left : left + window.width]
        return [band[inner] for band in bands], valid[inner]


def despeckled(intensity: np.ndarray, valid: np.ndarray, side: int, looks: float | None) -> np.ndarray:
    """Intensity [h, w] => the same with less speckle, by the filter of Lee (1980) in a window of `side` x `side` px.

    Without `looks` the mean of the window: multilooking that keeps the grid.
    With the mean m and variance v of the valid pixels around, and a speckle of variance m² / looks, a pixel becomes
    m + W (pixel - m), W = (v - m² / looks) / (v (1 + 1 / looks)), within 0 to 1. What is not valid takes part in nothing.
    """
    from scipy.ndimage import correlate1d  # slow to import, and few filter

    def total(values: np.ndarray) -> np.ndarray:
        for axis in (0, 1):  # no running sum, whose rounding would depend on where it began
            values = correlate1d(values, np.ones(side), axis, mode="constant")
        return values

    count = total(valid.astype(np.float64))
    totals = (total(np.where(valid, intensity**power, 0)) for power in (1, 2))
    mean, square = (np.divide(each, count, out=np.zeros_like(count), where=valid) for each in totals)
    if looks is None:
        return mean
    variance = np.maximum(square - mean**2, 0)
    weight = np.divide(
        variance - mean**2 / looks, variance * (1 + 1 / looks), out=np.zeros_like(mean), where=valid & (variance > 0)
    )
    return mean + np.clip(weight, 0, 1) * (np.where(valid, intensity, 0) - mean)


def mixed(channels: str, bands: list[np.ndarray]) -> list[np.ndarray]:
    """Bands, stretched => the three channels of a preset."""
    match channels, bands:
        case "single", [only]:
            return [only, only, only]
        case "pair", [first, second]:
            return [first, (first + second) / 2, second]
        case "spacenet6", [hh, hv, vh, vv]:
            return [hh, (hv + vh) / 2, vv]
        case "three" | "ratio", [_, _, _]:
            return bands
        case _:
            raise ValueError(f"{channels!r} does not take {len(bands)} bands")


def read_valid(source: DatasetReader, indexes: tuple[int, ...], window: Window) -> tuple[np.ndarray, np.ndarray]:
    """A window => (bands [n, h, w] in the file's type, valid [h, w]): finite, and neither nodata nor masked in any band."""
    try:
        bands, masks = source.read(indexes, window=window), source.read_masks(indexes, window=window)
    except Exception as error:  # GDAL's decoders raise many kinds
        where = f"rows {window.row_off} to {window.row_off + window.height}"
        reason = str(error.__cause__ or error).splitlines()[0]
        raise UserError(f"{source.name}: truncated or damaged in {where} ({reason}); copy or download it again") from error
    return bands, ((masks > 0) & np.isfinite(bands)).all(0)


def fill(pixels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Pixels [C, h, w] with what is not valid [h, w] replaced by ever coarser means of what is; 0 where nothing is valid."""
    if valid.all():
        return pixels
    if not valid.any():
        return np.zeros_like(pixels)
    height, width = valid.shape
    even = ((0, height % 2), (0, width % 2))
    weight = np.pad(valid.astype(np.float64), even)
    halves = (weight.shape[0] // 2, 2, weight.shape[1] // 2, 2)
    count = weight.reshape(halves).sum((1, 3))  # [h/2,w/2]
    total = np.pad(np.where(valid, pixels, 0), ((0, 0), *even)).reshape(-1, *halves).sum((2, 4))
    coarse = fill(total / np.maximum(count, 1), count > 0)
    return np.where(valid, pixels, doubled(coarse)[:, :height, :width])


def doubled(coarse: np.ndarray) -> np.ndarray:
    """[C, h, w] => [C, 2 h, 2 w], bilinear: each value 3/4 of its own cell and 1/4 of the nearer neighbour's, both ways."""
    for axis in (1, 2):
        shape = list(coarse.shape)
        padded = np.pad(coarse, [(1, 1) if k == axis else (0, 0) for k in range(3)], mode="edge")
        before, own, after = (np.take(padded, range(k, k + shape[axis]), axis) for k in range(3))
        shape[axis] *= 2
        coarse = np.stack([0.75 * own + 0.25 * before, 0.75 * own + 0.25 * after], axis + 1).reshape(shape)
    return coarse


@np.errstate(over="ignore", invalid="ignore")  # refused below
def measure(source: DatasetReader, args: argparse.Namespace, trained: dict | None = None) -> Radiometry:
    """The radiometry of a scene by the scene options; UserError where bands are missing or nothing is valid.

    trained: the checkpoint's record of its training images, `gsd_m` and `sar_statistics`, as far as it has them.
    """
    trained = trained or {}
    indexes = chosen_bands(source, args.bands)
    channels = args.channels or BY_COUNT[len(indexes)]
    if CHANNELS[channels][0] != len(indexes):
        raise UserError(
            f"--channels {channels}: it takes {CHANNELS[channels][0]} bands, {source.name} gives {len(indexes)}: "
            f"choose them by --bands"
        )
    scale, reason = tell_scale(source, indexes) if args.scale == "auto" else (args.scale, None)
    steps = chosen_steps(source, args, trained.get("gsd_m"))
    unstretched = Radiometry(indexes, channels, scale, (), steps, parse_despeckle(args.despeckle), reason)
    values = sample(source, unstretched)  # even where it sets no limits: it finds a scene without a valid pixel
    limits = chosen_limits(source, unstretched, args.stretch, values, trained.get("sar_statistics"))
    if not all(math.isfinite(high - low) for low, high in limits):
        raise UserError(
            f"{source.name}: its values overflow as --scale {scale}; give the scale that they have, or rescale them"
        )
    return replace(unstretched, limits=limits)


def chosen_limits(
    source: DatasetReader, unstretched: Radiometry, stretch: str | None, values: np.ndarray, statistics: dict | None
) -> tuple[tuple[float, float], ...]:
    """What becomes 0 and 255 by --stretch, for each band and the ratio; values: `sample`."""
    kind, numbers = parse_stretch(stretch)
    if kind == "fixed":
        limits = [numbers] * len(values)
    elif kind == "dataset":
        limits = dataset_limits(unstretched, statistics)
    else:
        limits = [tuple(np.percentile(band, numbers)) for band in values]
        if stretch is None and unstretched.scale in ("dn", "amplitude") and all_8_bit(source, unstretched.indexes):
            limits[: len(unstretched.indexes)] = [(0.0, 255.0)] * len(unstretched.indexes)
    return tuple((float(low), float(high)) for low, high in limits)


def dataset_limits(unstretched: Radiometry, statistics: dict | None) -> list[tuple[float, float]]:
    """The training images' limits by the checkpoint's record: 0 and 255 where they were 8-bit, which are taken as they are."""
    if statistics is None:
        raise UserError(
            "--stretch dataset: the checkpoint holds no statistics of its training images; give --stretch fixed:MIN,MAX"
        )
    if unstretched.scale != "dn" or unstretched.channels == "ratio":
        raise UserError(
            f"--stretch dataset: training takes the numbers of its files as they are, it knows no --scale {unstretched.scale} "
            f"with --channels {unstretched.channels}; leave these out, or give --stretch fixed:MIN,MAX"
        )
    limits = statistics["limits"]
    if len(limits) != len(unstretched.indexes):
        raise UserError(
            f"--stretch dataset: the training images had {len(limits)} bands, found {len(unstretched.indexes)}: "
            f"choose them by --bands"
        )
    return [(0.0, 255.0)] * len(limits) if statistics["dtype"] == "uint8" else limits


def chosen_steps(source: DatasetReader, args: argparse.Namespace, trained_gsd: float | None) -> tuple[float, float]:
    """Pixels of the scene per pixel that is translated, by --resample-gsd."""
    if args.resample_gsd is None:
        return 1.0, 1.0
    wanted = trained_gsd if args.resample_gsd is True else args.resample_gsd
    if not wanted:
        raise UserError("--resample-gsd: the checkpoint does not tell its training GSD; give it: --resample-gsd METRES")
    steps = steps_to(require_gsd(source, args.gsd, "--resample-gsd"), wanted)
    height, width = resampled_size(source.shape, steps)
    if height * width > max(args.max_pixels, MAX_PIXELS):
        raise UserError(
            f"{source.name}: {width} x {height} px when resampled to {wanted:g} m, more than {MAX_PIXELS}; is the GSD right? "
            f"Cut the scene, or raise --max-pixels"
        )
    return steps


def describe(source: DatasetReader, radiometry: Radiometry) -> str:
    """One line for the user: size, bands, scale and stretch, and what may surprise."""
    limits = ", ".join(f"{low:g} to {high:g}" for low, high in radiometry.limits)
    bands = ", ".join(source.descriptions[k - 1] or str(k) for k in radiometry.indexes)
    scale = radiometry.scale + (f" (auto: {radiometry.scale_reason})" if radiometry.scale_reason else "")
    text = f"{source.width} x {source.height} px, bands {bands} as {radiometry.channels}, {scale}, {limits} => 0 to 255"
    if radiometry.steps != (1, 1):
        height, width = radiometry.size(source)
        text += f"; translated as {width} x {height} px, then back on its own grid"
    if source.crs is None and not source.gcps[0]:
        text += "; no coordinate system, so neither has the result"
    if radiometry.scale == "dn" and all(high <= 10 and low < 0 for low, high in radiometry.limits):
        text += "; these look like decibels: --scale db stretches amplitudes instead"
    return text


def tell_scale(source: DatasetReader, indexes: tuple[int, ...]) -> tuple[str, str]:
    """--scale auto => (the scale, why), from units, descriptions and tags, else from the numbers themselves.

    Numbers tell decibels alone: floats, or integers with a sign, of which half or more are negative and 98 % lie where
    backscatter does. Amplitude and intensity do not look different, and stay as they are in the file.
    """
    places = {
        "unit": [source.units[k - 1] for k in indexes],
        "description": [source.descriptions[k - 1] for k in indexes],
        "tags": [text for k in indexes for text in source.tags(k).values()] + list(source.tags().values()),
    }
    for place, texts in places.items():
        for scale, words in SCALE_WORDS.items():
            if named := [text for text in texts if text and words & set(re.split(r"[^a-z0-9]+", text.lower()))]:
                return scale, f"{place} {named[0][:60]!r}"
    values = sample(source, Radiometry(indexes, "", "dn", ()))
    low, high = LIKELY_DB
    inside, negative = float(np.mean((values >= low) & (values <= high))), float(np.mean(values < 0))
    told = f"{inside:.0%} of the values from {low} to {high}, {negative:.0%} negative"
    return ("db", told) if inside >= 0.98 and negative >= 0.5 else ("dn", f"nothing names another; {told}")


def out_of_domain(source: DatasetReader, radiometry: Radiometry, stated_gsd: float | None, trained: dict) -> list[str]:
    """What of a scene, as it is translated, is far from the checkpoint's training images: a line each."""
    found = []
    gsd, trained_gsd = (stated_gsd, stated_gsd) if stated_gsd else gsd_of(source), trained.get("gsd_m")
    if gsd and trained_gsd:
        translated = math.sqrt(math.prod(gsd) * math.prod(radiometry.steps))
        if not GSD_RANGE[0] < translated / trained_gsd < GSD_RANGE[1]:
            found.append(f"{translated:.3g} m per pixel, the checkpoint was trained at {trained_gsd:g} m: see --resample-gsd")
    if (statistics := trained.get("sar_statistics")) is None:
        return found
    dtype, trained_dtype = source.dtypes[radiometry.indexes[0] - 1], statistics["dtype"]
    if (dtype == "uint8") != (trained_dtype == "uint8"):
        found.append(f"pixels of {dtype}, the training images had {trained_dtype}")
    if len(radiometry.indexes) != len(statistics["limits"]):
        found.append(f"{len(radiometry.indexes)} bands, the training images had {len(statistics['limits'])}")
    low, middle, high = np.percentile(radiometry.stretched(list(sample(source, radiometry))), PIXEL_PERCENTILES)
    least, usual, greatest = statistics["pixels"]
    if not least <= middle <= greatest:
        found.append(
            f"brightness {middle:.0f} of 255 in the median, 90 % of the training images' pixels lay from {least:.0f} to "
            f"{greatest:.0f}: see --scale and --stretch"
        )
    if not (greatest - least) / RANGE_FACTOR <= high - low <= (greatest - least) * RANGE_FACTOR:
        found.append(
            f"a range of {high - low:.0f} of 255 for 90 % of the pixels, the training images had {greatest - least:.0f}: "
            f"see --scale and --stretch"
        )
    return found


def all_8_bit(source: DatasetReader, indexes: tuple[int, ...]) -> bool:
    return all(source.dtypes[index - 1] == "uint8" for index in indexes)


def parse_stretch(text: str | None) -> tuple[str, tuple[float, float]]:
    """ "percentile:1,99", "fixed:MIN,MAX" or "dataset" => (kind, its numbers); None is the percentiles of all other reading."""
    if text is None:
        return "percentile", STRETCH_PERCENTILES
    if text == "dataset":
        return "dataset", ()
    kind, _, rest = text.partition(":")
    try:
        low, high = (float(number) for number in rest.split(","))
        if kind not in ("percentile", "fixed") or not low < high or not np.isfinite([low, high]).all():
            raise ValueError
        if kind == "percentile" and not 0 <= low < high <= 100:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--stretch: expected percentile:LOW,HIGH (0 to 100) or fixed:MIN,MAX, each rising, or dataset, found {text!r}"
        ) from None
    return kind, (low, high)


def parse_despeckle(text: str | None) -> tuple[int, float | None] | None:
    """ "lee:SIZE,LOOKS" or "multilook:SIZE" => (odd side of the window in px, equivalent number of looks or None)."""
    if text is None:
        return None
    try:
        side, looks = re.fullmatch(r"(?:multilook:(?=[0-9]+$)|lee:(?=.*,))([0-9]+)(?:,([0-9.]+))?", text).groups()
        side, looks = int(side), None if looks is None else float(looks)
        if side % 2 == 0 or not 3 <= side <= MAX_SIDE or looks == 0:
            raise ValueError
    except (AttributeError, ValueError):
        raise UserError(
            f"--despeckle: expected lee:SIZE,LOOKS or multilook:SIZE, an odd size from 3 to {MAX_SIDE} px and the equivalent "
            f"number of looks of the product, e.g. lee:7,4.4, found {text!r}"
        ) from None
    return side, looks


def chosen_bands(source: DatasetReader, wanted: str | None) -> tuple[int, ...]:
    """--bands => indexes from 1: numbers, or names as the bands' descriptions have them; None: all but alpha."""
    if wanted is None:
        indexes = tuple(k for k in source.indexes if source.colorinterp[k - 1] != ColorInterp.alpha)
        if not 1 <= len(indexes) <= MAX_BANDS:
            raise UserError(f"{source.name}: {len(indexes)} bands, expected 1 to {MAX_BANDS}: choose them by --bands")
        return indexes
    words = [word.strip() for word in wanted.split(",")]
    if not 1 <= len(words) <= MAX_BANDS:
        raise UserError(f"--bands: expected 1 to {MAX_BANDS} numbers or names with commas between, found {wanted!r}")
    return tuple(index_of(source, word) for word in words)


def index_of(source: DatasetReader, word: str) -> int:
    names = [(description or "").strip().upper() for description in source.descriptions]
    if word.isdecimal() and 1 <= int(word) <= source.count:
        return int(word)
    if names.count(word.upper()) == 1 and word:
        return names.index(word.upper()) + 1
    known = ", ".join(f"{k} ({name})" if name else str(k) for k, name in zip(source.indexes, names, strict=True))
    raise UserError(f"--bands: {source.name} has no single band {word!r}, its bands are {known}")


def sample(source: DatasetReader, radiometry: Radiometry) -> np.ndarray:
    """Valid values [bands, n], not yet stretched, of blocks spread evenly over the scene, the same ones every time.

    Where they hold nothing valid, as in a scene that is nearly all border, ever denser blocks are read.
    """
    height, width = radiometry.size(source)
    step = math.ceil(math.sqrt(height * width / SAMPLE_PX))
    while step >= 1:
        found = []
        for row in range(0, height, SAMPLE_SIDE * step):
            for column in range(0, width, SAMPLE_SIDE * step):
                window = Window(column, row, min(SAMPLE_SIDE, width - column), min(SAMPLE_SIDE, height - row))
                bands, valid = radiometry.scaled(source, window)
                found.append(np.stack(bands)[:, valid])
        values = np.concatenate(found, axis=1)
        if values.shape[1]:
            return values
        step //= 2
    raise UserError(f"{source.name}: not a single valid pixel (all NaN, infinite, nodata or masked)")
