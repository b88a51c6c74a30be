"""What a scene's numbers mean: which bands, on which scale, stretched how. Measured once per scene, never per tile.

Files of ordinary size are read by `images.read_sar`; a scene without options is stretched by the same rule.
"""

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader
from rasterio.windows import Window

from cdiffset.errors import UserError
from cdiffset.images import STRETCH_PERCENTILES

SAMPLE_PX = 2**22  # what percentiles are taken of; a scene of at most so many pixels is read whole
SAMPLE_SIDE = 256  # px of a sampled block
MAX_BANDS = 4

# What the file's numbers are => amplitude, in which they are stretched. "dn" and "amplitude" stay as they are.
SCALES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "dn": lambda values: values,
    "amplitude": lambda values: values,
    "intensity": lambda values: np.sqrt(np.maximum(values, 0)),
    "db": lambda values: 10 ** (values / 20),
}
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
    """How pixels of one scene become three channels in 0-255."""

    indexes: tuple[int, ...]  # GDAL's numbers of the bands, from 1
    channels: str  # of CHANNELS
    scale: str  # of SCALES
    limits: tuple[tuple[float, float], ...]  # (low, high) that become 0 and 255, one for each band, the ratio last

    def read(self, source: DatasetReader, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """A window => (float32 [3, h, w] in 0-255, valid [h, w]); what is not valid is filled smoothly from around it."""
        bands, valid = self.scaled(source, window)
        stretched = []
        for values, (low, high) in zip(bands, self.limits, strict=True):
            span = high - low
            stretched.append((np.clip(values, low, high) - low) / span * 255 if span > 0 else np.zeros_like(values))
        pixels = fill(np.stack(mixed(self.channels, stretched)), valid)
        return pixels.astype(np.float32), valid

    def scaled(self, source: DatasetReader, window: Window) -> tuple[list[np.ndarray], np.ndarray]:
        """A window => (bands, float64 [h, w] each, before the stretch, 0 where not valid; valid [h, w])."""
        bands, valid = read_valid(source, self.indexes, window)
        bands = [SCALES[self.scale](np.where(valid, values, 0).astype(np.float64)) for values in bands]
        if self.channels == "ratio":
            valid = valid & (bands[1] > 0)
            bands.append(np.divide(bands[0], bands[1], out=np.zeros_like(bands[0]), where=valid))
        return bands, valid


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
def measure(source: DatasetReader, args: argparse.Namespace) -> Radiometry:
    """The radiometry of a scene by the scene options; UserError where bands are missing or nothing is valid."""
    indexes = chosen_bands(source, args.bands)
    channels = args.channels or BY_COUNT[len(indexes)]
    if CHANNELS[channels][0] != len(indexes):
        raise UserError(
            f"--channels {channels}: it takes {CHANNELS[channels][0]} bands, {source.name} gives {len(indexes)}: "
            f"choose them by --bands"
        )
    unstretched = Radiometry(indexes, channels, args.scale, ())
    kind, numbers = parse_stretch(args.stretch)
    count = len(indexes) + (channels == "ratio")
    values = sample(source, unstretched)  # even where it sets no limits: it finds a scene without a valid pixel
    if kind == "fixed":
        limits = [numbers] * count
    elif args.stretch is None and args.scale in ("dn", "amplitude") and all_8_bit(source, indexes):
        limits = [(0.0, 255.0)] * len(indexes) + [tuple(np.percentile(values[-1], numbers))] * (channels == "ratio")
    else:
        limits = [tuple(np.percentile(band, numbers)) for band in values]
    limits = tuple((float(low), float(high)) for low, high in limits)
    if not all(math.isfinite(high - low) for low, high in limits):
        raise UserError(
            f"{source.name}: its values overflow as --scale {args.scale}; give the scale that they have, or rescale them"
        )
    return Radiometry(indexes, channels, args.scale, limits)


def all_8_bit(source: DatasetReader, indexes: tuple[int, ...]) -> bool:
    return all(source.dtypes[index - 1] == "uint8" for index in indexes)


def parse_stretch(text: str | None) -> tuple[str, tuple[float, float]]:
    """ "percentile:1,99" or "fixed:MIN,MAX" => (kind, the two numbers); None is the percentiles of all other reading."""
    if text is None:
        return "percentile", STRETCH_PERCENTILES
    kind, _, rest = text.partition(":")
    try:
        low, high = (float(number) for number in rest.split(","))
        if kind not in ("percentile", "fixed") or not low < high or not np.isfinite([low, high]).all():
            raise ValueError
        if kind == "percentile" and not 0 <= low < high <= 100:
            raise ValueError
    except ValueError:
        raise UserError(
            f"--stretch: expected percentile:LOW,HIGH (0 to 100) or fixed:MIN,MAX, each rising, found {text!r}"
        ) from None
    return kind, (low, high)


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


def sample(source: DatasetReader, unstretched: Radiometry) -> np.ndarray:
    """Valid values [bands, n] of blocks spread evenly over the scene, the same ones every time.

    Where they hold nothing valid, as in a scene that is nearly all border, ever denser blocks are read.
    """
    step = math.ceil(math.sqrt(source.height * source.width / SAMPLE_PX))
    while step >= 1:
        found = []
        for row in range(0, source.height, SAMPLE_SIDE * step):
            for column in range(0, source.width, SAMPLE_SIDE * step):
                height, width = min(SAMPLE_SIDE, source.height - row), min(SAMPLE_SIDE, source.width - column)
                bands, valid = unstretched.scaled(source, Window(column, row, width, height))
                found.append(np.stack(bands)[:, valid])
        values = np.concatenate(found, axis=1)
        if values.shape[1]:
            return values
        step //= 2
    raise UserError(f"{source.name}: not a single valid pixel (all NaN, infinite, nodata or masked)")
