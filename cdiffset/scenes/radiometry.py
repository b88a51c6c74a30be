"""What a scene's numbers mean: which bands, on which scale and grid, stretched how. Measured once per scene, never per tile.

Plain images are read by `images.read_sar`; a scene without options is stretched by the same rule.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from rasterio.enums import ColorInterp
from rasterio.windows import Window

from cdiffset.errors import UserError
from cdiffset.images import PIXEL_PERCENTILES, STRETCH_PERCENTILES, read_sar_valid, three_channels, to_255
from cdiffset.scenes.geotiff import MAX_PIXELS, POLARISATIONS, Scene, is_auxiliary, is_scene, open_scene
from cdiffset.scenes.resampling import apply_weights, gsd_of, pixel_ratio_to, require_gsd, resampled_size, weights
from cdiffset.scenes.scale import SCALE_NAMES, check_scale, detect_scale, likely_fill, scale_of_numbers

SAMPLE_PX = 2**22  # what percentiles are taken of; a scene of at most so many pixels is read whole
SAMPLE_SIDE = 256  # px of a sampled block
FOLDER_SAMPLE_PX = 2**18  # of each scene, where a folder shares one stretch
READ_PX = 2**22  # about so many pixels are read at once where a scene is resampled to a coarser grid
MAX_BANDS = 4
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
CHANNELS = {  # preset => how many bands it takes
    "single": (1, "the band, repeated"),
    "pair": (2, "b1, (b1 + b2) / 2, b2"),
    "ratio": (2, "b1, b2, b1 / b2, e.g. VV, VH, VV / VH"),
    "three": (3, "as they are"),
    "spacenet6": (4, "HH, (HV + VH) / 2, VV"),
}
BY_COUNT = {1: "single", 2: "pair", 3: "three", 4: "spacenet6"}


@dataclass(frozen=True)
class RadiometryOptions:
    """How a SAR scene is to be read; None: not given. The options of test.py and data/make_chips.py, see their help."""

    bands: str | None = None
    channels: str | None = None
    scale: str | None = None
    stretch: str | None = None
    despeckle: str | None = None
    nodata: float | None = None
    gsd: float | None = None  # metres
    resample_gsd: float | bool | None = None  # metres; True: those of the training images
    max_pixels: int = MAX_PIXELS

    KEPT = ("bands", "channels", "scale", "stretch", "despeckle")  # with a data set, and with the checkpoint trained on it

    def __post_init__(self):
        parse_stretch(self.stretch)
        parse_despeckle(self.despeckle)

    def given(self) -> list[str]:
        """Names of the options that are given."""
        named = (*self.KEPT, "nodata", "gsd", "resample_gsd")
        return [f"--{name.replace('_', '-')}" for name in named if getattr(self, name) is not None]

    def kept(self) -> dict[str, str]:
        """What a data set that is made with these options records."""
        return {name: value for name in self.KEPT if (value := getattr(self, name)) is not None}

    def completed(self, recorded: dict[str, str] | None) -> "RadiometryOptions":
        """What is not given is as the training images' scenes were read, by the checkpoint's record."""
        missing = {name: value for name, value in (recorded or {}).items() if name in self.KEPT and getattr(self, name) is None}
        return replace(self, **missing)


@dataclass(frozen=True)
class Radiometry:
    """How pixels of one scene become three channels in 0-255, on the grid that is translated."""

    indexes: tuple[int, ...]  # GDAL's numbers of the bands, from 1
    channels: str  # of CHANNELS
    scale: str  # of SCALES
    limits: tuple[tuple[float, float], ...]  # (low, high) that become 0 and 255, one for each band, the ratio last
    pixel_ratio: tuple[float, float] = (1.0, 1.0)  # pixels of the scene per translated pixel, down and along
    despeckle: tuple[int, float | None] | None = None  # side of the window in px of the scene; looks, None for their mean
    nodata: float | None = None  # a value of the file that means no data, besides those that it declares
    scale_reason: str | None = None  # why --scale auto took this one

    def size(self, scene: Scene) -> tuple[int, int]:
        """(height, width) of the grid that is translated; windows are of that grid."""
        return resampled_size(scene.shape, self.pixel_ratio)

    def read(self, scene: Scene, window: Window) -> tuple[np.ndarray, np.ndarray]:
        """A window => (float32 [3, h, w] in 0-255, valid [h, w]); what is not valid is filled smoothly from around it."""
        bands, valid = self.scaled(scene, window)
        return fill(self.stretched(bands), valid).astype(np.float32), valid

    def stretched(self, bands: list[np.ndarray]) -> np.ndarray:
        """Bands as `scaled` gives them => three channels in 0-255, [3, ...]."""
        limits = zip(bands, self.limits, strict=True)
        return np.stack(three_channels([to_255(values, low, high) for values, (low, high) in limits]))

    def scaled(self, scene: Scene, window: Window) -> tuple[list[np.ndarray], np.ndarray]:
        """A window => (bands, float64 [h, w] each, before the stretch, 0 where not valid; valid [h, w])."""
        bands, valid = self.resampled(scene, window)
        if self.channels == "ratio":
            valid = valid & (bands[1] > 0)
            bands.append(np.divide(bands[0], bands[1], out=np.zeros_like(bands[0]), where=valid))
        return bands, valid

    def resampled(self, scene: Scene, window: Window) -> tuple[list[np.ndarray], np.ndarray]:
        """`scaled` without the ratio. A coarser pixel is valid where half of its weight is; "dn" is averaged as it is."""
        if self.pixel_ratio == (1, 1):
            return self.native(scene, window)
        if window.height > 1 and window.height * window.width * math.prod(self.pixel_ratio) > READ_PX:
            half = window.height // 2
            upper, there = self.resampled(scene, Window(window.col_off, window.row_off, window.width, half))
            below = Window(window.col_off, window.row_off + half, window.width, window.height - half)
            lower, below_there = self.resampled(scene, below)
            return [np.concatenate(parts) for parts in zip(upper, lower, strict=True)], np.concatenate([there, below_there])
        row, down = weights(window.row_off, window.row_off + window.height, self.pixel_ratio[0], scene.height)
        column, along = weights(window.col_off, window.col_off + window.width, self.pixel_ratio[1], scene.width)
        bands, valid = self.native(scene, Window(column, row, along.shape[1], down.shape[1]))
        covered = apply_weights(down, along, valid.astype(np.float64))
        power = 1 if self.scale == "dn" else 2  # looks are averaged as intensity
        if power == 2:
            self.refuse_negative(scene, bands, "--resample-gsd")
        kept = covered >= 0.5
        sums = (apply_weights(down, along, band**power) for band in bands)
        means = (np.divide(total, covered, out=np.zeros_like(covered), where=kept) for total in sums)
        return [mean ** (1 / power) for mean in means], kept

    def native(self, scene: Scene, window: Window) -> tuple[list[np.ndarray], np.ndarray]:
        """A window of the scene's own grid => (bands, float64 [h, w] each, 0 where not valid; valid [h, w]), despeckled."""
        margin = self.despeckle[0] // 2 if self.despeckle else 0
        row, column = max(0, window.row_off - margin), max(0, window.col_off - margin)
        last_row = min(scene.height, window.row_off + window.height + margin)
        last_column = min(scene.width, window.col_off + window.width + margin)
        bands, valid = scene.read(self.indexes, Window(column, row, last_column - column, last_row - row), self.nodata)
        bands = [np.where(valid, SCALES[self.scale](np.where(valid, band, 0).astype(np.float64)), 0) for band in bands]
        if self.despeckle:
            self.refuse_negative(scene, bands, "--despeckle")
            bands = [np.sqrt(despeckled(band**2, valid, *self.despeckle)) for band in bands]
        top, left = window.row_off - row, window.col_off - column
        inner = np.s_[top : top + window.height, left : left + window.width]
        return [band[inner] for band in bands], valid[inner]

    def refuse_negative(self, scene: Scene, bands: list[np.ndarray], option: str) -> None:
        """Filters and averages of intensities square the amplitudes: decibels would come out upside down."""
        if (lowest := min(float(band.min(initial=0)) for band in bands)) < 0:
            found = f"{scene.name} holds negative values (down to {lowest:g})"
            raise UserError(f"{option}: {found}, which no amplitude has; for decibels give --scale db")


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
    for _ in range(2):  # along h, then along w
        coarse = coarse.swapaxes(1, 2)
        padded = np.pad(coarse, ((0, 0), (0, 0), (1, 1)), mode="edge")
        halves = [0.75 * coarse + 0.25 * neighbour for neighbour in (padded[..., :-2], padded[..., 2:])]
        coarse = np.stack(halves, -1).reshape(*coarse.shape[:2], -1)
    return coarse


# ------------------------------------------------------------------------------------------------------------ measuring
def read_whole(path: Path, options: RadiometryOptions, trained: dict) -> tuple[np.ndarray, np.ndarray]:
    """A SAR file as test.py reads it, on its own grid => (float32 [H, W, 3] in 0-255, valid [H, W])."""
    if not is_scene(path, math.inf):
        return read_sar_valid(path, options.max_pixels)
    with open_scene(path, options.max_pixels) as scene:
        radiometry, _ = measure(scene, options, trained)
        pixels, valid = radiometry.read(scene, Window(0, 0, scene.width, scene.height))
    return np.ascontiguousarray(np.moveaxis(pixels, 0, -1)), valid


@np.errstate(over="ignore", invalid="ignore")  # refused below
def measure(scene: Scene, options: RadiometryOptions, trained: dict | None = None) -> tuple[Radiometry, list[str]]:
    """The radiometry of a scene by its options, and notes for the user.

    trained: the checkpoint's record of its training images, `gsd_m` and `sar_statistics`, as far as it has them.
    """
    trained = trained or {}
    indexes, notes = chosen_bands(scene, options.bands)
    channels = options.channels or BY_COUNT[len(indexes)]
    if CHANNELS[channels][0] != len(indexes):
        expected = f"it takes {CHANNELS[channels][0]} bands"
        raise UserError(f"--channels {channels}: {expected}, {scene.name} gives {len(indexes)}: choose them by --bands")
    numbers = sampled_values(scene, Radiometry(indexes, "", "dn", (), nodata=options.nodata))
    fill_value, note = likely_fill(numbers)
    notes += [note] if note else []
    # A border of one value does not speak for the scene.
    backscatter = numbers.ravel() if fill_value is None else numbers[numbers != fill_value]
    scale, reason = detect_scale(scene, indexes, backscatter) if options.scale == "auto" else (options.scale or "dn", None)
    check_scale(scene, options.scale, scale, numbers, backscatter, note)
    if options.scale is None and (proposed := scale_of_numbers(backscatter, scene.is_float(indexes))):
        name, why = proposed
        notes.append(f"{why}: this looks like {SCALE_NAMES[name]}, which --scale {name} stretches as amplitude")
    pixel_ratio = chosen_pixel_ratio(scene, options, trained.get("gsd_m"))
    despeckle = parse_despeckle(options.despeckle)
    unstretched = Radiometry(indexes, channels, scale, (), pixel_ratio, despeckle, options.nodata, reason)
    is_read_so = unstretched.pixel_ratio == (1, 1) and not despeckle and channels != "ratio"
    values = SCALES[scale](numbers.astype(np.float64)) if is_read_so else sampled_values(scene, unstretched)
    limits = chosen_limits(scene, unstretched, options.stretch, values, trained.get("sar_statistics"))
    if not all(math.isfinite(high - low) for low, high in limits):
        raise UserError(f"{scene.name}: its values overflow as --scale {scale}; give the scale that they have, or rescale them")
    radiometry = replace(unstretched, limits=limits)
    require_contrast(scene, radiometry, numbers, values)
    return radiometry, notes


def chosen_bands(scene: Scene, wanted: str | None) -> tuple[tuple[int, ...], list[str]]:
    """--bands => (indexes from 1, notes): numbers, or names as descriptions and file names have them.

    None: all but alpha and auxiliary bands (incidence angle, mask, layover), which are named in a note.
    """
    if wanted is not None:
        words = [word.strip() for word in wanted.split(",")]
        if not 1 <= len(words) <= MAX_BANDS:
            raise UserError(f"--bands: expected 1 to {MAX_BANDS} numbers or names with commas between, found {wanted!r}")
        return tuple(index_of(scene, word) for word in words), []
    alpha = [k for k in scene.indexes if scene.colorinterp[k - 1] == ColorInterp.alpha]
    others = [k for k in scene.indexes if k not in alpha]
    auxiliary = [k for k in others if is_auxiliary(scene.descriptions[k - 1])] if len(others) > 1 else []
    indexes = tuple(k for k in others if k not in auxiliary)
    if not 1 <= len(indexes) <= MAX_BANDS:
        raise UserError(f"{scene.name}: {len(indexes)} bands, expected 1 to {MAX_BANDS}: choose them by --bands")
    notes = [f"band {k} is declared as alpha: it says where there is data, and is no SAR band" for k in alpha]
    if auxiliary:
        left_out = ", ".join(f"{k} ({scene.descriptions[k - 1]})" for k in auxiliary)
        notes.append(f"auxiliary bands left out: {left_out}; --bands chooses others")
    return indexes, notes


def index_of(scene: Scene, word: str) -> int:
    names = [(description or "").strip().upper() for description in scene.descriptions]
    if word.isdecimal() and 1 <= int(word) <= scene.count:
        return int(word)
    if names.count(word.upper()) == 1 and word:
        return names.index(word.upper()) + 1
    known = ", ".join(f"{k} ({name})" if name else str(k) for k, name in zip(scene.indexes, names, strict=True))
    raise UserError(f"--bands: {scene.name} has no single band {word!r}, its bands are {known}")


def chosen_limits(
    scene: Scene, unstretched: Radiometry, stretch: str | None, values: np.ndarray, statistics: dict | None
) -> tuple[tuple[float, float], ...]:
    """What becomes 0 and 255 by --stretch, for each band and the ratio; values: `sampled_values`."""
    kind, numbers = parse_stretch(stretch)
    if kind == "fixed":
        if len(numbers) not in (2, 2 * len(values)):
            expected = f"expected MIN,MAX for all bands or for each of {len(values)}"
            raise UserError(f"--stretch {stretch}: {expected}, a ratio counts as one")
        pairs = list(zip(numbers[::2], numbers[1::2], strict=True))
        limits = pairs * (len(values) // len(pairs))
    elif kind == "dataset":
        limits = dataset_limits(unstretched, statistics)
    elif kind == "folder":
        raise UserError("--stretch folder: expected a folder of scenes, which test.py and data/make_chips.py measure together")
    else:
        limits = [tuple(np.percentile(band, numbers)) for band in values]
        if stretch is None and unstretched.scale in ("dn", "amplitude") and scene.is_8_bit(unstretched.indexes):
            limits[: len(unstretched.indexes)] = [(0.0, 255.0)] * len(unstretched.indexes)
    return tuple((float(low), float(high)) for low, high in limits)


def shared_stretch(files: Sequence[Sequence[Path]], options: RadiometryOptions, trained: dict | None = None) -> str:
    """--stretch folder => the `fixed:` stretch of percentiles 1 and 99 of all scenes together, equally many pixels of each.

    files: those of each scene. A scene that cannot be measured is left out; it is refused when its own turn comes.
    """
    samples: list[np.ndarray] = []
    for paths in files:
        with open_scene(paths, options.max_pixels) as scene:
            try:
                radiometry, _ = measure(scene, replace(options, stretch=None), trained)
            except UserError:
                continue
            values = sampled_values(scene, radiometry)
        samples.append(values[:, :: -(-values.shape[1] // FOLDER_SAMPLE_PX)])
    if not samples:
        raise UserError("--stretch folder: no scene of it can be measured")
    if len(counts := {len(values) for values in samples}) > 1:
        found = " and ".join(map(str, sorted(counts)))
        raise UserError(f"--stretch folder: the scenes have {found} bands: choose them by --bands")
    least = min(values.shape[1] for values in samples)
    pooled = np.concatenate([values[:, :: max(1, values.shape[1] // least)] for values in samples], axis=1)
    limits = np.percentile(pooled, STRETCH_PERCENTILES, axis=1).T
    return "fixed:" + ",".join(f"{limit:.9g}" for limit in limits.ravel())


def dataset_limits(unstretched: Radiometry, statistics: dict | None) -> list[tuple[float, float]]:
    """The training images' limits by the checkpoint's record: 0 and 255 where they were 8-bit, which are taken as they are."""
    count, scale, channels = len(unstretched.indexes), unstretched.scale, unstretched.channels
    if statistics is None:
        fault = "the checkpoint holds no statistics of its training images; give --stretch fixed:MIN,MAX"
    elif scale != "dn" or channels == "ratio":
        fault = f"it knows no --scale {scale} with --channels {channels}; leave these out, or give --stretch fixed:MIN,MAX"
    elif count != len(statistics["limits"]):
        fault = f"the training images had {len(statistics['limits'])} bands, found {count}: choose them by --bands"
    else:
        return [(0.0, 255.0)] * count if statistics["dtype"] == "uint8" else statistics["limits"]
    raise UserError(f"--stretch dataset: {fault}")


def require_contrast(scene: Scene, radiometry: Radiometry, numbers: np.ndarray, values: np.ndarray) -> None:
    """Refuse a scene of one value, which would be translated for hours into nothing."""
    stretched = radiometry.stretched(list(values))
    if np.ptp(stretched):
        return
    if np.ptp(numbers):
        limits = ", ".join(f"{low:g} to {high:g}" for low, high in radiometry.limits)
        raise UserError(
            f"{scene.name}: without contrast as it is stretched: values of {numbers.min():g} to {numbers.max():g} all become "
            f"{stretched.flat[0]:.0f} of 255 ({radiometry.scale}, {limits} => 0 to 255); see --scale and --stretch"
        )
    raise UserError(f"{scene.name}: without contrast, every valid pixel is {numbers.flat[0]:g}: there is nothing to see in it")


def chosen_pixel_ratio(scene: Scene, options: RadiometryOptions, trained_gsd: float | None) -> tuple[float, float]:
    """Pixels of the scene per translated pixel, down and along, by --resample-gsd."""
    if options.resample_gsd is None:
        return 1.0, 1.0
    wanted = trained_gsd if options.resample_gsd is True else options.resample_gsd
    if not wanted:
        raise UserError("--resample-gsd: the checkpoint does not record its training GSD; give it: --resample-gsd METRES")
    pixel_ratio = pixel_ratio_to(require_gsd(scene, options.gsd, "--resample-gsd"), wanted)
    height, width = resampled_size(scene.shape, pixel_ratio)
    if height * width > max(options.max_pixels, MAX_PIXELS):
        found = f"{width} x {height} px when resampled to {wanted:g} m, more than {MAX_PIXELS}"
        raise UserError(f"{scene.name}: {found}; is the GSD right? Cut the scene, or raise --max-pixels")
    return pixel_ratio


def wanted_polarisations(bands: str | None) -> list[str]:
    """--bands => the polarisations that it asks for; [] where it asks for anything else."""
    words = [word.strip().upper() for word in (bands or "").split(",")]
    return words if all(word in POLARISATIONS for word in words) else []


def describe(scene: Scene, radiometry: Radiometry) -> str:
    """One line for the user: size, bands, scale and stretch."""
    limits = ", ".join(f"{low:g} to {high:g}" for low, high in radiometry.limits)
    bands = ", ".join(f"{k} ({name})" if (name := scene.descriptions[k - 1]) else str(k) for k in radiometry.indexes)
    scale = radiometry.scale + (f" (auto: {radiometry.scale_reason})" if radiometry.scale_reason else "")
    text = f"{scene.width} x {scene.height} px, bands {bands} as {radiometry.channels}, {scale}, {limits} => 0 to 255"
    if radiometry.pixel_ratio != (1, 1):
        height, width = radiometry.size(scene)
        text += f"; translated as {width} x {height} px, then back on its own grid"
    if not scene.is_georeferenced:
        text += "; no coordinate system, so neither has the result"
    return text


def out_of_domain(scene: Scene, radiometry: Radiometry, stated_gsd: float | None, trained: dict) -> list[str]:
    """What of a scene, as it is translated, is far from the checkpoint's training images: a line each."""
    found = []
    gsd, trained_gsd = (stated_gsd, stated_gsd) if stated_gsd else gsd_of(scene), trained.get("gsd_m")
    if gsd and trained_gsd:
        translated = math.sqrt(math.prod(gsd) * math.prod(radiometry.pixel_ratio))
        if not GSD_RANGE[0] < translated / trained_gsd < GSD_RANGE[1]:
            found.append(f"{translated:.3g} m per pixel, the checkpoint was trained at {trained_gsd:g} m: see --resample-gsd")
    if (statistics := trained.get("sar_statistics")) is None:
        return found
    if not trained.get("radiometry"):  # else the training images are 8-bit chips of such scenes
        dtype, trained_dtype = scene.dtypes[radiometry.indexes[0] - 1], statistics["dtype"]
        if (dtype == "uint8") != (trained_dtype == "uint8"):
            found.append(f"pixels of {dtype}, the training images had {trained_dtype}")
        if len(radiometry.indexes) != len(statistics["limits"]):
            found.append(f"{len(radiometry.indexes)} bands, the training images had {len(statistics['limits'])}")
    low, middle, high = np.percentile(radiometry.stretched(list(sampled_values(scene, radiometry))), PIXEL_PERCENTILES)
    least, _, greatest = statistics["pixels"]
    hint = "see --scale and --stretch"
    if not least <= middle <= greatest:
        usual = f"90 % of the training images' pixels lay from {least:.0f} to {greatest:.0f}"
        found.append(f"brightness {middle:.0f} of 255 in the median, {usual}: {hint}")
    if not (greatest - least) / RANGE_FACTOR <= high - low <= (greatest - least) * RANGE_FACTOR:
        usual = f"the training images had {greatest - least:.0f}"
        found.append(f"a range of {high - low:.0f} of 255 for 90 % of the pixels, {usual}: {hint}")
    return found


def sampled_values(scene: Scene, radiometry: Radiometry) -> np.ndarray:
    """Valid values [bands, n], not yet stretched, of blocks spread evenly over the scene, the same ones every time.

    Where they hold nothing valid or one value alone, as in a scene that is nearly all border, ever denser blocks are read.
    """
    height, width = radiometry.size(scene)
    step = math.ceil(math.sqrt(height * width / SAMPLE_PX))
    while step >= 1:
        found = []
        for row in range(0, height, SAMPLE_SIDE * step):
            for column in range(0, width, SAMPLE_SIDE * step):
                window = Window(column, row, min(SAMPLE_SIDE, width - column), min(SAMPLE_SIDE, height - row))
                bands, valid = radiometry.scaled(scene, window)
                found.append(np.stack(bands)[:, valid])
        values = np.concatenate(found, axis=1)
        if values.shape[1] and (step == 1 or np.ptp(values)):
            return values
        step //= 2
    raise UserError(f"{scene.name}: not a single valid pixel (all NaN, infinite, nodata or masked)")


# -------------------------------------------------------------------------------------------------------------- options
def parse_stretch(text: str | None) -> tuple[str, tuple[float, ...]]:
    """ "percentile:1,99", "fixed:MIN,MAX" (or a pair for each band), "dataset" or "folder" => (kind, its numbers)."""
    if text is None:
        return "percentile", STRETCH_PERCENTILES
    if text in ("dataset", "folder"):
        return text, ()
    kind, _, rest = text.partition(":")
    try:
        numbers = tuple(map(float, rest.split(",")))
        fits = all(-math.inf < low < high < math.inf for low, high in zip(numbers[::2], numbers[1::2], strict=True))
        if kind == "percentile":
            fits = fits and len(numbers) == 2 and 0 <= numbers[0] and numbers[1] <= 100
    except ValueError:
        fits = False
    if not fits or kind not in ("percentile", "fixed"):
        expected = "percentile:LOW,HIGH (0 to 100), fixed:MIN,MAX, each rising, dataset or folder"
        raise UserError(f"--stretch: expected {expected}, found {text!r}")
    return kind, numbers


def parse_despeckle(text: str | None) -> tuple[int, float | None] | None:
    """ "lee:SIZE,LOOKS" or "multilook:SIZE" => (odd side of the window in px, equivalent number of looks or None)."""
    if text is None:
        return None
    found = re.fullmatch(r"multilook:([0-9]{1,2})|lee:([0-9]{1,2}),([0-9]+\.?[0-9]*|\.[0-9]+)", text)
    side, looks = (int(found[1] or found[2]), float(found[3]) if found[3] else None) if found else (0, None)
    if side % 2 == 0 or not 3 <= side <= MAX_SIDE or looks == 0:
        expected = f"lee:SIZE,LOOKS or multilook:SIZE, an odd size from 3 to {MAX_SIDE} px and the equivalent looks"
        raise UserError(f"--despeckle: expected {expected}, e.g. lee:7,4.4, found {text!r}")
    return side, looks
