"""Cut co-registered scene pairs into training chips, split by location.

    python data/make_chips.py --sar SCENE.tif --eo EO.tif --output chips [--cloud-mask MASK.tif]
    python data/make_chips.py --sar SAR-Intensity --eo PS-RGB --output chips     # folders of scenes or of SpaceNet6's tiles

writes {train,test}/{sar,eo}/SCENE_rROW_cCOL.png, the lists train_list.csv and test_list.csv (`sar,eo`, for PairedFolderFeeder)
and chips.json, which keeps how the SAR was read: for the checkpoint, and so for test.py. ROW and COL are the chip's upper left
pixel in the SAR scene, whose grid every chip has: the SAR is never resampled, and an EO raster of another grid or CRS is warped
onto it (bilinear). Scenes are read window by window.

The ground is divided into square blocks, the same ones for all scenes that have a CRS, so that scenes of the same ground agree.
Chips centred in test blocks are for testing; training chips nearer than the guard band to any of them are dropped (Chebyshev
distance, in px of the first scene).
"""

import csv
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np
import rasterio
import rasterio.warp
from rasterio.enums import Resampling
from rasterio.errors import CRSError, RasterioError
from rasterio.vrt import WarpedVRT
from rasterio.windows import Window
from scipy.spatial import cKDTree
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that the script runs from anywhere

from cdiffset.errors import Parser, UserError, run  # noqa: E402
from cdiffset.images import (  # noqa: E402
    STRETCH_PERCENTILES,
    alpha_band,
    list_images,
    to_255,
    write_png,
    write_text,
    written_whole,
)
from cdiffset.pairing import SPLITS  # noqa: E402
from cdiffset.scenes.geotiff import (  # noqa: E402
    SUFFIXES,
    Scene,
    crs_of,
    find_sources,
    open_checked,
    open_scene,
    without_polarisation,
)
from cdiffset.scenes.options import add_radiometry_options  # noqa: E402
from cdiffset.scenes.radiometry import Radiometry, RadiometryOptions, describe, measure, shared_stretch, wanted_polarisations  # noqa: E402
from cdiffset.scenes.resampling import gsd_of  # noqa: E402
from feeders.feeder import CHIPS, SpaceNetFeeder  # noqa: E402

SAMPLED_SIDE = 2048  # px: the EO's stretch is taken from every n-th pixel of larger scenes
REASONS = ("no_overlap", "nodata", "cloud", "blank", "guard")  # why chips are dropped, the first that applies


@dataclass(frozen=True)
class Options:
    """How scenes are cut, filtered and split; see the command's help."""

    size: int = 256
    stride: int = 256
    test_share: float = 0.2
    block: int = 1024
    guard: int = 64
    seed: int = 0
    max_nodata: float = 0.1
    max_cloud: float = 0.05
    min_std: float = 2.0
    eo_bands: tuple[int, ...] | None = None
    eo_nodata: float | None = None
    radiometry: RadiometryOptions = field(default_factory=RadiometryOptions)  # of the SAR

    def __post_init__(self):
        for name in ("size", "stride", "block"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name} is {getattr(self, name)}; expected px from 1")
        for name in ("guard", "seed", "min_std"):
            if not getattr(self, name) >= 0:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected a number from 0")
        for name in ("max_nodata", "max_cloud"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"--{name.replace('_', '-')} is {getattr(self, name)}; expected a share from 0 to 1")
        if not 0 < self.test_share < 1:
            raise UserError(f"--test-share is {self.test_share}; expected a share between 0 and 1")


class Pair(NamedTuple):
    name: str
    sar: tuple[Path, ...]  # one file, or one for each polarisation
    eo: Path


@dataclass(frozen=True)
class Surveyed:
    """What is known of a pair of scenes before its chips are read."""

    name: str
    sar: tuple[Path, ...]
    eo: Path
    cloud_mask: Path | None
    crs: rasterio.CRS | None
    transform: rasterio.Affine
    width: int
    height: int
    registration: str
    gsd: tuple[float, float] | None  # metres down the rows, along the columns
    radiometry: Radiometry  # of the SAR
    eo_limits: list[float] | None  # [low, high] of the stretch of all bands, which keeps the colours; None for 8-bit data


class Unmeasurable(UserError):
    """A SAR scene that gives no chip: it holds nothing valid, has no contrast, or lacks what the options ask for."""


class Chip(NamedTuple):
    sar: np.ndarray  # uint8 [size, size, 1 or 3]
    eo: np.ndarray  # uint8 [size, size, 3]
    sar_valid: np.ndarray  # bool [size, size]
    eo_valid: np.ndarray
    cloud: np.ndarray


def find_pairs(sar: Path, eo: Path, bands: str | None) -> list[Pair]:
    """Two files, or two folders matched by relative path without suffix or by SpaceNet6's names.

    Polarisations in separate files are one scene where --bands asks for them; its EO may be named without them.
    """
    wanted = wanted_polarisations(bands)
    if sar.is_file() and eo.is_file():
        (files,) = find_sources(sar, wanted).values()
        return [Pair(eo.stem, tuple(sar.parent / file for file in files), eo)]
    if not (sar.is_dir() and eo.is_dir()):
        found = ", ".join(f"{path} ({_kind(path)})" for path in (sar, eo))
        raise UserError(f"--sar and --eo must be two files or two folders; found {found}")
    scenes = {names_of(name, files): files for name, files in find_sources(sar, wanted).items()}
    pairs, unpaired = [], []
    for image in list_images(eo, SUFFIXES):
        name = image.with_suffix("").as_posix()
        twin = name
        if "_PS-RGB_" in image.name:
            twin = PurePosixPath(*SpaceNetFeeder.eo_to_sar(PurePosixPath("PS-RGB", image)).parts[1:]).with_suffix("").as_posix()
        key = next((key for key in scenes if twin in key), None)
        if key is None:
            unpaired.append(str(image))
        else:
            pairs.append(Pair(name, tuple(sar / file for file in scenes.pop(key)), eo / image))
    unpaired += [str(files[0]) for files in scenes.values()]
    if unpaired:
        raise UserError(f"{len(unpaired)} scenes of {sar} and {eo} have no twin of the same name: {', '.join(unpaired[:3])}")
    return pairs


def names_of(name: Path, files: tuple[Path, ...]) -> tuple[str, ...]:
    """What the EO of a SAR scene may be called: as the scene, and where that is of several files, without polarisations."""
    names = (name,) if len(files) == 1 else (name, without_polarisation(files[0]))
    return tuple(each.with_suffix("").as_posix() for each in names)


def find_masks(cloud_mask: Path | None, pairs: list[Pair]) -> list[Path | None]:
    """The cloud mask of every pair: one file for all, or the file of a folder that is named as the EO scene."""
    if cloud_mask is None or cloud_mask.is_file():
        return [cloud_mask] * len(pairs)
    masks = {path.with_suffix("").as_posix(): cloud_mask / path for path in list_images(cloud_mask, SUFFIXES)}
    if unpaired := [pair.name for pair in pairs if pair.name not in masks]:
        raise UserError(f"--cloud-mask: {cloud_mask} has no mask for {len(unpaired)} EO scenes: {', '.join(unpaired[:3])}")
    return [masks[pair.name] for pair in pairs]


def _kind(path: Path) -> str:
    return "a file" if path.is_file() else "a folder" if path.is_dir() else "does not exist"


def open_eo(path: Path) -> AbstractContextManager[rasterio.DatasetReader]:
    """Open a raster of EO or clouds, without its overviews, which may have been made of other pixels."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    return open_checked(path, math.inf, "rgb", OVERVIEW_LEVEL="NONE")


class Layer(NamedTuple):
    """What is read of an open EO raster: some bands, and a value that means no data where all of them have it."""

    raster: rasterio.DatasetReader | WarpedVRT
    bands: list[int]
    nodata: float | None


def eo_layer(raster, options: Options) -> Layer:
    if options.eo_bands is None:
        bands = [k for k in raster.indexes if k != alpha_band(raster)]
        if len(bands) not in (1, 3):
            raise UserError(f"{raster.name}: {len(bands)} bands besides alpha; expected 1 or 3, or --eo-bands")
    elif set(options.eo_bands) <= set(raster.indexes):
        bands = list(options.eo_bands)
    else:
        raise UserError(f"{raster.name}: --eo-bands {' '.join(map(str, options.eo_bands))} of {raster.count} bands")
    return Layer(raster, bands, raster.nodata if options.eo_nodata is None else options.eo_nodata)


@contextmanager
def damage_named(raster) -> Iterator[None]:
    try:
        yield
    except RasterioError as error:
        raise UserError(f"{raster.name}: damaged or truncated ({error})") from error


def read_valid(
    layer: Layer, window: Window | None = None, shape: tuple[int, int] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bands [H, W, C] and where they hold data [H, W], of a window and sampled to a shape (H, W)."""
    raster, bands, nodata = layer
    with damage_named(raster):
        values = raster.read(bands, window=window, out_shape=shape and (len(bands), *shape))
        if alpha := alpha_band(raster):
            # dataset_mask() overlooks the alpha of floating-point rasters.
            valid = raster.read(alpha, window=window, out_shape=shape) > 0
        else:
            valid = raster.dataset_mask(window=window, out_shape=shape) > 0
    if nodata is not None:
        valid &= (values != nodata).any(axis=0)
    return np.moveaxis(values, 0, -1), valid & np.isfinite(values).all(axis=0)


def stretch_limits(layer: Layer) -> list[float] | None:
    """[low, high] of all bands together, the percentiles of cdiffset.images; None for 8-bit data, taken as is."""
    raster, bands, _ = layer
    if all(raster.dtypes[k - 1] == "uint8" for k in bands):
        return None
    step = -(-max(raster.shape) // SAMPLED_SIDE)
    values, valid = read_valid(layer, shape=(-(-raster.height // step), -(-raster.width // step)))
    if not valid.any():
        return [0.0, 0.0]
    return np.percentile(values[valid].astype(np.float64), STRETCH_PERCENTILES).tolist()


def stretched(values: np.ndarray, valid: np.ndarray, limits: list[float] | None) -> np.ndarray:
    """Bands [H, W, C] => 0-255 (float64); pixels without data and constant scenes become 0."""
    values = np.where(valid[..., None], values, 0).astype(np.float64)
    if limits is not None:
        values = to_255(values, *limits)
    return values * valid[..., None]


def registration_of(sar: Scene, other) -> str:
    """How a raster comes onto the SAR's grid; UserError if that is not known."""
    if sar.crs is None and (sar.gcps[0] or sar.rpcs):
        found, way = ("ground control points", "-tps") if sar.gcps[0] else ("RPCs", "-rpc")
        raise UserError(
            f"{sar.name} has {found} alone, expected a raster on a grid with a CRS: warp it first, "
            f"gdalwarp {way} -t_srs EPSG:CODE {Path(sar.name).name} warped.tif"
        )
    crs = crs_of(other)
    same_grid = sar.shape == other.shape and sar.transform.almost_equals(other.transform, 1e-9)
    if sar.crs is None and crs is None and same_grid:
        return "pixel by pixel"
    if sar.crs is None or crs is None:
        found = ", ".join(f"{s.name} ({s.width} x {s.height} px, CRS {c or 'none'})" for s, c in ((sar, sar.crs), (other, crs)))
        raise UserError(f"a CRS on both rasters is needed, or on neither and the same size and geotransform; found {found}")
    return "same grid" if same_grid and sar.crs == crs else "warped"


@contextmanager
def on_grid(layer: Layer, sar: Scene, resampling: Resampling) -> Iterator[Layer]:
    """The layer on the SAR's grid, warped if it has another one; alpha then says what the raster covers."""
    raster, bands, nodata = layer
    if registration_of(sar, raster) != "warped":
        yield layer
        return
    grid = {"crs": sar.crs, "transform": sar.transform, "width": sar.width, "height": sar.height}
    try:
        # UNIFIED_SRC_NODATA: a pixel holds no data where all of its bands say so, as in read_valid().
        warped = WarpedVRT(
            raster,
            **grid,
            src_crs=crs_of(raster),
            resampling=resampling,
            src_nodata=nodata,
            add_alpha=not alpha_band(raster),
            UNIFIED_SRC_NODATA="YES",
        )
    except (CRSError, RasterioError) as error:
        raise UserError(f"{raster.name}: cannot be warped from {raster.crs} to {sar.crs} ({error})") from error
    with warped:
        yield Layer(warped, bands, None)  # interpolated data may happen to have the fill value


def survey(pair: Pair, cloud_mask: Path | None, options: Options) -> Surveyed:
    """Look at the headers of a pair, and at a sample of its pixels for the stretch. Unmeasurable: the SAR is to be left out."""
    with open_scene(pair.sar) as sar, open_eo(pair.eo) as eo:
        registration = registration_of(sar, eo)
        try:
            radiometry, notes = measure(sar, options.radiometry)
        except UserError as error:
            raise Unmeasurable(str(error)) from error
        for line in (describe(sar, radiometry), *(f"note: {note}" for note in notes)):
            tqdm.write(f"{sar.name}: {line}")
        if min(sar.shape) < options.size:
            tqdm.write(f"{sar.name}: note: {sar.width} x {sar.height} px, smaller than --size {options.size}: gives no chip")
        return Surveyed(
            *pair, cloud_mask, sar.crs, sar.transform, sar.width, sar.height, registration, gsd_of(sar), radiometry,
            eo_limits=stretch_limits(eo_layer(eo, options)),
        )  # fmt: skip


@contextmanager
def open_pair(scene: Surveyed, options: Options) -> Iterator[Callable[[int, int], Chip]]:
    """A function (row, col) => Chip."""
    with ExitStack() as stack:
        sar, eo_file = stack.enter_context(open_scene(scene.sar)), stack.enter_context(open_eo(scene.eo))
        eo = stack.enter_context(on_grid(eo_layer(eo_file, options), sar, Resampling.bilinear))
        mask = None
        if scene.cloud_mask is not None:
            mask_file = stack.enter_context(open_eo(scene.cloud_mask))
            mask = stack.enter_context(on_grid(Layer(mask_file, [1], None), sar, Resampling.nearest)).raster

        def read(row: int, col: int) -> Chip:
            window = Window(col, row, options.size, options.size)
            (channels, sar_valid), (eo_values, eo_valid) = scene.radiometry.read(sar, window), read_valid(eo, window)
            grey = slice(0, 1) if scene.radiometry.channels == "single" else slice(None)
            channels = np.moveaxis(channels[grey], 0, -1)
            colours = np.repeat(stretched(eo_values, eo_valid, scene.eo_limits), 3 // len(eo.bands), axis=-1)
            cloud = read_cloud(mask, window) if mask is not None else np.zeros_like(eo_valid)
            return Chip(np.round(channels).astype(np.uint8), np.round(colours).astype(np.uint8), sar_valid, eo_valid, cloud)

        yield read


def read_cloud(mask, window: Window) -> np.ndarray:
    """Where there are clouds or the mask does not reach. Its nodata value counts as any other: often it means clear."""
    with damage_named(mask):
        clouds = mask.read(1, window=window) != 0
        if isinstance(mask, WarpedVRT):
            clouds |= mask.read(alpha_band(mask), window=window) == 0
    return clouds


def fault_of(chip: Chip, options: Options) -> str | None:
    """Why a chip is of no use, None if it is."""
    both = chip.sar_valid & chip.eo_valid
    if not chip.sar_valid.any():
        return "nodata"
    if not both.any():
        return "no_overlap"
    if 1 - both.mean() > options.max_nodata:
        return "nodata"
    if chip.cloud.mean() > options.max_cloud:
        return "cloud"
    if min(image[both].std(axis=0).max() for image in (chip.sar, chip.eo)) < options.min_std:
        return "blank"
    return None


def positions_of(scene: Surveyed, options: Options) -> np.ndarray:
    """Upper left corners (row, col) of the chips of a scene, int [N, 2]."""
    rows = range(0, scene.height - options.size + 1, options.stride)
    cols = range(0, scene.width - options.size + 1, options.stride)
    return np.array([(row, col) for row in rows for col in cols], int).reshape(-1, 2)


def footprints(scene: Surveyed, place: int, reference: Surveyed, positions: np.ndarray, size: int) -> tuple[np.ndarray, float]:
    """Centres [N, 3] of chips as (x, y in px of the reference scene's grid, place) and the longest side of any of them, px.

    The places of scenes without a CRS are unknown: `place` keeps each apart from all others.
    """
    rows, cols = (positions[:, k, None] + size * np.array(corner) for k, corner in ((0, (0, 0, 1, 1)), (1, (0, 1, 0, 1))))
    if scene.crs is None:
        x, y = cols.astype(float), rows.astype(float)
    else:
        x, y = _apply(scene.transform, cols, rows)
        if scene.crs != reference.crs:
            x, y = (np.array(values) for values in rasterio.warp.transform(scene.crs, reference.crs, x.ravel(), y.ravel()))
        x, y = (values.reshape(cols.shape).round(3) for values in _apply(~reference.transform, x, y))
        place = 0
    low, high = np.stack([x.min(1), y.min(1)], 1), np.stack([x.max(1), y.max(1)], 1)
    side = float((high - low).max(initial=0))
    return np.column_stack([(low + high) / 2, np.full(len(x), place)]), side


def _apply(transform: rasterio.Affine, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, b, c, d, e, f = transform[:6]
    return a * x + b * y + c, d * x + e * y + f


def split_by_location(centres: np.ndarray, side: float, options: Options) -> np.ndarray:
    """ "train", "test" or "guard" for each chip, str [N]; UserError if a split would be empty.

    Blocks are drawn by the seed until the chips centred in them come nearest to the share asked for.
    """
    cells, cell_of, counts = np.unique(
        np.floor(centres / [options.block, options.block, 1]), axis=0, return_inverse=True, return_counts=True
    )
    if len(cells) < 2:
        raise UserError(f"all {len(centres)} usable chips lie in one block of {options.block} px; choose a smaller --block")
    drawn = np.random.default_rng(options.seed).permutation(len(cells))
    shortfall = np.abs(np.cumsum(counts[drawn]) - options.test_share * len(centres))
    test = np.isin(cell_of.ravel(), drawn[: min(int(shortfall.argmin()) + 1, len(cells) - 1)])
    apart = centres * [1, 1, 1e12]  # farther than any two points on Earth
    distance, _ = cKDTree(apart[test]).query(apart, p=np.inf)
    splits = np.where(test, "test", np.where(distance < side + options.guard, "guard", "train"))
    if "train" not in splits:
        raise UserError(
            f"the guard band of {options.guard} px leaves no chip to train on; choose a smaller --guard or --test-share"
        )
    return splits


class Moments:
    """Mean and standard deviation of three channels over all pixels seen."""

    def __init__(self):
        self.count, self.sum, self.squares = 0, np.zeros(3), np.zeros(3)

    def add(self, image: np.ndarray) -> None:
        """Take in uint8 [H, W, 1 or 3]; grey counts as three equal channels, as the feeder reads it."""
        pixels = np.broadcast_to(image, (*image.shape[:2], 3)).reshape(-1, 3).astype(np.float64)
        self.count += len(pixels)
        self.sum += pixels.sum(axis=0)
        self.squares += (pixels**2).sum(axis=0)

    def summary(self) -> dict[str, list[float]]:
        mean = self.sum / self.count
        std = np.sqrt(np.maximum(self.squares / self.count - mean**2, 0))
        return {"mean": mean.round(4).tolist(), "std": std.round(4).tolist()}


def inspect(scenes: list[Surveyed], options: Options) -> tuple[list[np.ndarray], list[Counter]]:
    """Corners of the usable chips of each scene, and how many it loses for which reason."""
    corners = [positions_of(scene, options) for scene in scenes]
    dropped = [Counter() for _ in scenes]
    with tqdm(total=sum(map(len, corners)), desc="inspecting", unit="chip", mininterval=1) as progress:
        for k, scene in enumerate(scenes):
            faults = []
            with open_pair(scene, options) as read:
                for row, col in corners[k].tolist():
                    faults.append(fault_of(read(row, col), options))
                    progress.update()
            dropped[k].update(fault for fault in faults if fault)
            corners[k] = corners[k][[fault is None for fault in faults]]
    return corners, dropped


def locate(scenes: list[Surveyed], corners: list[np.ndarray], options: Options) -> list[np.ndarray]:
    """The split of every usable chip, scene by scene."""
    if not any(map(len, corners)):
        raise UserError("no usable chip")
    reference = next((scene for scene in scenes if scene.crs is not None), scenes[0])
    found = [footprints(scene, k, reference, corners[k], options.size) for k, scene in enumerate(scenes)]
    splits = split_by_location(np.concatenate([centres for centres, _ in found]), max(side for _, side in found), options)
    return np.split(splits, np.cumsum([len(part) for part in corners])[:-1])


def write_chips(output: Path, scenes: list[Surveyed], corners: list, splits: list, options: Options) -> tuple[dict, dict]:
    """Write the chips => (rows of the lists, statistics), both by split."""
    rows = {split: [] for split in SPLITS}
    moments = {split: {"sar": Moments(), "eo": Moments()} for split in SPLITS}
    total = sum(int(np.isin(part, SPLITS).sum()) for part in splits)
    with tqdm(total=total, desc="writing", unit="chip", mininterval=1) as progress:
        for scene, places, parts in zip(scenes, corners, splits, strict=True):
            with open_pair(scene, options) as read:
                for (row, col), split in zip(places.tolist(), parts.tolist(), strict=True):
                    if split not in SPLITS:
                        continue
                    chip = read(row, col)
                    paths = [f"{split}/{kind}/{scene.name}_r{row:05d}_c{col:05d}.png" for kind in ("sar", "eo")]
                    for path, kind, image in zip(paths, ("sar", "eo"), (chip.sar, chip.eo), strict=True):
                        write_png(output / path, image[..., 0] if image.shape[-1] == 1 else image)
                        moments[split][kind].add(image)
                    rows[split].append(paths)
                    progress.update()
    return rows, {split: {kind: m.summary() for kind, m in kinds.items()} for split, kinds in moments.items()}


def report_of(scenes: list[Surveyed], splits: list, dropped: list[Counter], statistics: dict, options: Options) -> dict:
    """The contents of chips.json."""
    counts = []
    for parts, lost in zip(splits, dropped, strict=True):
        found = Counter(parts.tolist()) + lost
        counts.append({**{split: found[split] for split in SPLITS}, "dropped": {reason: found[reason] for reason in REASONS}})
    total = {split: sum(count[split] for count in counts) for split in SPLITS}
    total["dropped"] = {reason: sum(count["dropped"][reason] for count in counts) for reason in REASONS}
    records = [
        {
            "name": scene.name,
            "sar": ", ".join(map(str, scene.sar)),
            "eo": str(scene.eo),
            "cloud_mask": scene.cloud_mask and str(scene.cloud_mask),
            "size": [scene.width, scene.height],
            "crs": scene.crs and scene.crs.to_string(),
            "transform": list(scene.transform)[:6],
            "gsd_m": scene.gsd,  # down the rows, along the columns
            "registration": scene.registration,
            "scale": scene.radiometry.scale,
            "stretch": {"sar": scene.radiometry.limits, "eo": scene.eo_limits},
            "counts": count,
        }
        for scene, count in zip(scenes, counts, strict=True)
    ]
    settings = asdict(options) | {"nodata": options.radiometry.nodata, "radiometry": options.radiometry.kept()}
    return {"settings": settings, "counts": total, "statistics": statistics, "scenes": records}


def make_chips(pairs: list[Pair], masks: list[Path | None], output: Path, options: Options) -> dict:
    """Write the dataset => the contents of its chips.json. UserError if there is one already."""
    if there := [name for name in (*SPLITS, CHIPS) if (output / name).exists()]:
        raise UserError(f"--output {output} already holds {', '.join(there)}; remove it, or give another folder")
    if options.radiometry.stretch == "folder":
        shared = shared_stretch([pair.sar for pair in pairs], options.radiometry)
        options = replace(options, radiometry=replace(options.radiometry, stretch=shared))
    # A bar that is not closed would share its line with an error.
    scenes, faults = [], {}
    with tqdm(list(zip(pairs, masks, strict=True)), desc="surveying", unit="scene", mininterval=1) as progress:
        for pair, mask in progress:
            try:
                scenes.append(survey(pair, mask, options))
            except Unmeasurable as fault:
                faults[pair.name] = str(fault)
                if len(pairs) > 1:
                    tqdm.write(f"left out: {fault}")
    if not scenes:
        raise UserError(next(iter(faults.values())))
    if options.radiometry.scale == "auto" and len(scales := {scene.radiometry.scale for scene in scenes}) == 1:
        options = replace(options, radiometry=replace(options.radiometry, scale=scales.pop()))  # what translation is to take
    corners, dropped = inspect(scenes, options)
    try:
        splits = locate(scenes, corners, options)
    except UserError as error:
        lost = ", ".join(f"{reason} {count}" for reason, count in sum(dropped, Counter()).items())
        small = [
            f"{scene.name} ({scene.width} x {scene.height} px)" for scene in scenes if not len(positions_of(scene, options))
        ]
        smaller = f", smaller than --size {options.size}: {', '.join(small[:3])}" if small else ""
        raise UserError(
            f"{error} (dropped: {lost or 'none'}; {len(scenes)} scenes, chips of {options.size} px{smaller})"
        ) from error
    rows, statistics = write_chips(output, scenes, corners, splits, options)
    for split, paths in rows.items():
        with written_whole(output / f"{split}_list.csv") as temporary, open(temporary, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([("sar", "eo"), *paths])
    report = report_of(scenes, splits, dropped, statistics, options) | {"left_out": faults}
    write_text(output / CHIPS, json.dumps(report, indent=2) + "\n")
    return report


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Cut co-registered scene pairs into training chips, split by location.")
    parser.add_argument("--sar", type=Path, required=True, help="SAR scene of 1 to 4 bands, or a folder of scenes")
    parser.add_argument("--eo", type=Path, required=True, help="EO scene in any grid and CRS, or a folder of scenes")
    parser.add_argument("--output", type=Path, required=True, help="folder to write the dataset to")
    parser.add_argument("--size", type=int, default=Options.size, help="side of a chip, px (%(default)s)")
    parser.add_argument("--stride", type=int, default=Options.stride, help="from chip to chip, px (%(default)s)")
    parser.add_argument("--test-share", type=float, default=Options.test_share, help="share of test chips (%(default)s)")
    parser.add_argument("--block", type=int, default=Options.block, help="side of a block of one split, px (%(default)s)")
    parser.add_argument("--guard", type=int, default=Options.guard, help="least gap between train and test, px (%(default)s)")
    parser.add_argument("--seed", type=int, default=Options.seed, help="another seed draws other test blocks (%(default)s)")
    parser.add_argument("--max-nodata", type=float, default=Options.max_nodata, help="most nodata in SAR or EO (%(default)s)")
    parser.add_argument(
        "--cloud-mask", type=Path, help="raster, not 0 where there are clouds, or a folder of them named as --eo"
    )
    parser.add_argument("--max-cloud", type=float, default=Options.max_cloud, help="largest share of clouds (%(default)s)")
    parser.add_argument("--min-std", type=float, default=Options.min_std, help="less contrast is blank, of 255 (%(default)s)")
    parser.add_argument("--eo-bands", type=int, nargs=3, metavar="BAND", help="red, green, blue band, from 1 (1 2 3)")
    parser.add_argument("--eo-nodata", type=float, metavar="VALUE", help="no data where all EO bands have it (as declared)")
    add_radiometry_options(parser.add_argument_group("reading of the SAR, as in test.py"))
    args = vars(parser.parse_args(argv))
    sar, eo, output, cloud_mask = (args.pop(key) for key in ("sar", "eo", "output", "cloud_mask"))
    args["eo_bands"] = args["eo_bands"] and tuple(args["eo_bands"])
    if args["stretch"] == "dataset":
        raise UserError("--stretch dataset: a data set to be made has no statistics yet; expected percentile, fixed or folder")
    radiometry = RadiometryOptions(**{name: args.pop(name) for name in (*RadiometryOptions.KEPT, "nodata")})
    options = Options(**args, radiometry=radiometry)
    pairs = find_pairs(sar, eo, radiometry.bands)
    masks = find_masks(cloud_mask, pairs)
    try:
        report = make_chips(pairs, masks, output, options)
    except OSError as error:
        raise UserError(f"--output: cannot write into {output}: {error.strerror or error}") from error
    registrations = Counter(scene["registration"] for scene in report["scenes"])
    print("EO onto SAR:", ", ".join(f"{how} ({count} scenes)" for how, count in registrations.items()))
    print("dropped:", ", ".join(f"{reason} {count}" for reason, count in report["counts"]["dropped"].items()))
    print(", ".join(f"{split}: {report['counts'][split]} chips" for split in SPLITS), "in", output)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
