"""Scenes on disk: rasters read by windows, Cloud-Optimized GeoTIFFs written by strips on the very grid of their scene."""

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.crs import CRS
from rasterio.enums import ColorInterp, MaskFlags
from rasterio.errors import CRSError
from rasterio.io import DatasetReader
from rasterio.windows import Window

from cdiffset.errors import UserError
from cdiffset.images import (
    IMAGE_SUFFIXES,
    alpha_band,
    complex_message,
    list_images,
    open_raster,
    read_bands,
    require_size,
    without_georeference,
    written_whole,
)

MAX_PIXELS = 2**32  # of a scene, unless --max-pixels allows more: a few bytes may claim any size
CACHE_BYTES = 2**26  # GDAL would take 5 % of the machine's memory
QUICKLOOK_PX = 1024
RASTER_SUFFIXES = (".bil", ".img", ".j2k", ".jp2", ".nc", ".nitf", ".ntf", ".vrt")  # read as scenes alone, by GDAL
SUFFIXES = (*IMAGE_SUFFIXES, *RASTER_SUFFIXES)
# Suffixes that stand for one format, so that no picture is a VRT in disguise, which names other files; GDAL finds out the rest.
DRIVERS = {
    ".bmp": "BMP", ".gif": "GIF", ".jpeg": "JPEG", ".jpg": "JPEG", ".png": "PNG", ".tif": "GTiff", ".tiff": "GTiff",
    ".vrt": "VRT", ".webp": "WEBP",
}  # fmt: skip
POLARISATIONS = ("HH", "HV", "VH", "VV")
POLARISATION = re.compile(rf"(?<![A-Za-z0-9])({'|'.join(POLARISATIONS)})(?![A-Za-z0-9])", re.IGNORECASE)
AUXILIARY = re.compile(  # bands and files that go with the backscatter and are none
    r"angle|incid|layover|shadow|mask|(?<![a-z0-9])(inc|lia|ls|theta|dem|elevation)(?![a-z0-9])", re.IGNORECASE
)
TIMES = (  # acquisition times in product names: Sentinel-1, OPERA, HyP3; Umbra; Capella
    (r"(?<![0-9])[0-9]{8}[tT][0-9]{6}(?![0-9])", "%Y%m%dT%H%M%S"),
    (r"(?<![0-9])[0-9]{4}(?:-[0-9]{2}){5}(?![0-9])", "%Y-%m-%d-%H-%M-%S"),
    (r"(?<![0-9])[0-9]{14}(?![0-9])", "%Y%m%d%H%M%S"),
)
TIME_TAGS = ("datetime", "acquisition_datetime", "acquisitiondatetime", "acquisition_start_time", "tifftag_datetime")


# -------------------------------------------------------------------------------------------------------------- reading
class Scene:
    """A SAR scene of one raster, or of several on one grid (one for each polarisation). Bands are numbered from 1 over all."""

    def __init__(self, rasters: Sequence[DatasetReader]):
        self.rasters, first = rasters, rasters[0]
        self.name, self.paths = first.name, [Path(raster.name) for raster in rasters]
        self.height, self.width = self.shape = first.shape
        self.crs, self.transform, self.gcps, self.rpcs = crs_of(first), first.transform, first.gcps, first.rpcs
        for other in rasters[1:]:
            if grid_of(other) != grid_of(first):
                raise UserError(f"{first.name} and {other.name} lie on different grids, expected one for all polarisations")
        self.places = [(raster, index) for raster in rasters for index in raster.indexes]
        self.indexes = tuple(range(1, len(self.places) + 1))
        self.descriptions = tuple(
            raster.descriptions[index - 1] or (polarisation_of(Path(raster.name)) if raster.count == 1 else None)
            for raster, index in self.places
        )
        self.units = tuple(raster.units[index - 1] for raster, index in self.places)
        self.dtypes = tuple(raster.dtypes[index - 1] for raster, index in self.places)
        self.colorinterp = tuple(raster.colorinterp[index - 1] for raster, index in self.places)

    @property
    def count(self) -> int:
        return len(self.places)

    @property
    def is_georeferenced(self) -> bool:
        return is_georeferenced(self.rasters[0])

    def has_scale(self, index: int) -> bool:
        """Whether a band declares a scale or an offset of its numbers."""
        raster, place = self.places[index - 1]
        return (raster.scales[place - 1], raster.offsets[place - 1]) != (1, 0)

    def is_float(self, indexes: Sequence[int]) -> bool:
        """Whether all these bands hold numbers with a fraction, by their type or by a declared scale."""
        return all(self.dtypes[k - 1].startswith("float") or self.has_scale(k) for k in indexes)

    def is_8_bit(self, indexes: Sequence[int]) -> bool:
        return all(self.dtypes[k - 1] == "uint8" and not self.has_scale(k) for k in indexes)

    def tags(self, index: int | None = None) -> dict[str, str]:
        """Of a band, or of all files."""
        if index is not None:
            raster, place = self.places[index - 1]
            return raster.tags(place)
        return {name: value for raster in reversed(self.rasters) for name, value in raster.tags().items()}

    def read(self, indexes: Sequence[int], window: Window, nodata: float | None = None) -> tuple[np.ndarray, np.ndarray]:
        """A window => (bands [n, h, w], valid [h, w]: in every one of these bands, see `images.read_bands`)."""
        places = [self.places[index - 1] for index in indexes]
        chosen = {raster: [k for each, k in places if each is raster] for raster, _ in places}  # each is read once
        try:
            read = {raster: read_bands(raster, bands, window, nodata) for raster, bands in chosen.items()}
        except Exception as error:  # GDAL's decoders raise many kinds
            where = f"rows {window.row_off} to {window.row_off + window.height}"
            reason = str(error.__cause__ or error).splitlines()[0]
            raise UserError(f"{self.name}: truncated or damaged in {where} ({reason}); copy or download it again") from error
        bands, valid = (
            np.stack([read[raster][part][chosen[raster].index(place)] for raster, place in places]) for part in (0, 1)
        )
        return bands, valid.all(0)

    def acquired(self) -> str | None:
        """When the scene was taken, ISO 8601, from the product's name or from its tags; None where they do not say."""
        for pattern, form in TIMES:
            if found := re.search(pattern, self.paths[0].stem):
                with suppress(ValueError):
                    return datetime.strptime(found[0].upper(), form).isoformat()
        tags = {name.lower(): value for name, value in self.tags().items()}
        value = next((tags[name] for name in TIME_TAGS if tags.get(name)), None)
        if value and re.match(r"[0-9]{4}:[0-9]{2}:[0-9]{2} ", value):  # as the TIFF standard has it
            value = value.replace(":", "-", 2).replace(" ", "T")
        return value and re.sub(r"\.0+$", "", value)


def is_georeferenced(raster: DatasetReader) -> bool:
    """By CRS, geotransform or world file, GCPs or RPCs."""
    return bool(raster.crs or raster.gcps[0] or raster.rpcs or not raster.transform.is_identity)


def crs_of(raster: DatasetReader) -> CRS | None:
    """A raster's own CRS, or that of the .prj beside it, which GDAL does not read with a world file."""
    path = _beside(Path(raster.name), f"{Path(raster.name).stem}.prj")
    if raster.crs or raster.transform.is_identity or path is None:
        return raster.crs
    try:
        return CRS.from_wkt(path.read_text(encoding="utf-8").strip(), morph_from_esri_dialect=True)
    except (OSError, ValueError, CRSError) as error:
        raise UserError(f"{path}: cannot be read as a CRS in WKT ({str(error).splitlines()[0]})") from error


def grid_of(raster: DatasetReader) -> tuple:
    """What two rasters share that lie pixel on pixel."""
    return raster.shape, raster.crs, raster.transform, [(p.row, p.col, p.x, p.y, p.z) for p in raster.gcps[0]]


@contextmanager
def open_scene(path: Path | Sequence[Path], max_pixels: int = MAX_PIXELS) -> Iterator[Scene]:
    """Open a raster, or one for each polarisation; UserError where it is none, or holds what cannot be translated."""
    paths = [path] if isinstance(path, Path) else path
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), ExitStack() as stack:
        yield Scene([stack.enter_context(open_checked(each, max(max_pixels, MAX_PIXELS))) for each in paths])


@contextmanager
def open_checked(path: Path, max_pixels: float, expand: str = "gray", **options) -> Iterator[DatasetReader]:
    """Open one raster of real numbers without a colour table; `expand`: what gdal_translate is to make of such a table."""
    with ExitStack() as stack:
        try:
            source = stack.enter_context(open_raster(path, DRIVERS.get(path.suffix.lower()), **options))
        except rasterio.errors.RasterioIOError as error:
            what = "GeoTIFF" if path.suffix.lower() in (".tif", ".tiff") else "raster that GDAL reads"
            raise UserError(f"{path}: unreadable, truncated or no {what} ({str(error).splitlines()[0]})") from error
        if source.subdatasets or not source.count:
            names = ", ".join(source.subdatasets[:3])
            hint = f"; take one out by gdal_translate NAME one.tif, where NAME is one of {names}" if names else ""
            raise UserError(f"{path}: {len(source.subdatasets)} rasters in one file, expected one{hint}")
        require_size(path, source.height, source.width, 1, max_pixels)
        if any("complex" in dtype for dtype in source.dtypes):
            raise UserError(complex_message(path, source.dtypes[0]))
        if has_colours(source):
            raise UserError(
                f"{path}: a colour table, expected bands; gdal_translate -expand {expand} {path.name} bands.tif makes them"
            )
        yield source


def has_colours(raster: DatasetReader) -> bool:
    """Whether its numbers stand for colours of a table; those of 8-bit BMPs show each number as that grey."""
    if ColorInterp.palette not in raster.colorinterp:
        return False
    return any(colour[:3] != (number,) * 3 for number, colour in raster.colormap(1).items())


def is_scene(path: Path, side: float) -> bool:
    """Whether a file is a scene by itself: a georeferenced raster, a picture with a mask or nodata beside it, or a TIFF with a
    side above `side` px. What cannot be opened is left to the reader that names the fault.
    """
    suffix = path.suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        return True
    is_tiff = suffix in (".tif", ".tiff")
    if suffix == ".npy" or not path.is_file() or not (is_tiff or _has_sidecar(path)):
        return False
    try:
        with open_raster(path, DRIVERS.get(suffix)) as source:
            if is_georeferenced(source):
                return True
            if is_tiff:
                return max(source.shape) > side
            masks = {flag for flags in source.mask_flag_enums for flag in flags} & {MaskFlags.per_dataset, MaskFlags.nodata}
            return bool(masks) and alpha_band(source) is None
    except rasterio.errors.RasterioIOError:
        return False


def _has_sidecar(path: Path) -> bool:
    """Whether a world file, a mask or metadata of GDAL lies beside a picture."""
    kind = path.suffix[1:].lower()
    world_files = (f"{path.stem}.{ending}" for ending in (f"{kind[0]}{kind[-1]}w", f"{kind}w", "wld"))
    return any(_beside(path, name) for name in (*world_files, f"{path.name}.aux.xml", f"{path.name}.msk"))


def _beside(path: Path, name: str) -> Path | None:
    """A file of that name beside another one, its suffix in small letters or in capitals; None where there is none."""
    stem, _, suffix = name.rpartition(".")
    candidates = path.with_name(name), path.with_name(f"{stem}.{suffix.upper()}")
    return next(filter(os.path.isfile, candidates), None)  # a name that is too long is no error to os.path


# --------------------------------------------------------------------------------------- polarisations in separate files
def polarisation_of(path: Path) -> str | None:
    """HH, HV, VH or VV where a file's name has it as a word; of several the last."""
    found = POLARISATION.findall(path.stem)
    return found[-1].upper() if found else None


def is_auxiliary(name: str | None) -> bool:
    """Whether the name of a band or a file says incidence angle, mask, layover and so on."""
    return bool(AUXILIARY.search(name or ""))


def renamed(path: Path, polarisation: str) -> Path:
    """A path with its file's polarisation replaced."""
    before, after = _around_polarisation(path)
    return path.with_name(before + polarisation + after)


def without_polarisation(path: Path) -> Path:
    """A path without its file's polarisation and the character that joins it to the name."""
    before, after = _around_polarisation(path)
    return path.with_name(before[:-1] + after if before else after[1:])


def _around_polarisation(path: Path) -> tuple[str, str]:
    *_, last = POLARISATION.finditer(path.stem)
    return path.name[: last.start()], path.name[last.end() :]


def find_sources(source: Path, wanted: Sequence[str]) -> dict[Path, tuple[Path, ...]]:
    """A folder or a file => {relative path that names a scene or an image: its files}, relative to the folder, in its order.

    Where polarisations are wanted, the separate files of a product are grouped; its other polarisations, and files that are
    auxiliary by their names, are then left out, and that is said. Of a file the others of its product are looked for beside it.
    """
    if source.is_file():
        beside = sorted(source.parent.iterdir()) if len(wanted) > 1 else [source]
        alike = [Path(path.name) for path in beside if path.suffix.lower() == source.suffix.lower()]
        return {name: files for name, files in group_polarisations(alike, wanted).items() if Path(source.name) in files}
    images = list_images(source, SUFFIXES)
    if not wanted:
        return {image: (image,) for image in images}
    scenes = group_polarisations([image for image in images if not is_auxiliary(image.stem)], wanted)
    used = {file for files in scenes.values() for file in files}
    if left_out := [image for image in images if image not in used]:
        shown = ", ".join(map(str, left_out[:3])) + (", ..." if len(left_out) > 3 else "")
        print(f"note: {len(left_out)} files are left out by their names, as auxiliary or of another polarisation: {shown}")
    return scenes


def group_polarisations(images: Sequence[Path], wanted: Sequence[str]) -> dict[Path, tuple[Path, ...]]:
    """Relative paths of files => {relative path of a scene: its files, in the order of the polarisations wanted}.

    The files of one product differ in the polarisation alone, in Sentinel-1's own naming also in the number at the end
    (…-vv-…-001.tiff, …-vh-…-002.tiff). A product that lacks a wanted polarisation is left as the single files that it has; of
    one that has them all, the other polarisations are left out. A scene is named as its first file, with all its polarisations.
    """
    products: dict[Path, dict[str, Path]] = {}
    for image in images:
        if polarisation := polarisation_of(image):
            products.setdefault(_product_of(image), {})[polarisation] = image
    scenes: dict[Path, tuple[Path, ...]] = {}
    for image in images:
        files = products[_product_of(image)] if polarisation_of(image) else {}
        if not wanted or not files.keys() >= set(wanted):
            scenes[image] = (image,)
        elif polarisation_of(image) in wanted:
            first = files[wanted[0]]
            name = first if len(wanted) == 1 else renamed(first, "_".join(wanted))
            scenes[name] = tuple(files[each] for each in wanted)
    return scenes


def _product_of(image: Path) -> Path:
    product = renamed(image, "*")
    is_sentinel_1 = re.match(r"s1[a-d]-", image.name, re.IGNORECASE)
    return product.with_name(re.sub(r"-[0-9]{3}(?=\.)", "", product.name)) if is_sentinel_1 else product


# -------------------------------------------------------------------------------------------------------------- writing
def write_cog(
    path: Path,
    scratch: Path,  # folder for the uncooked file
    like: Scene,  # whose size, CRS, transform, GCPs and RPCs are carried over
    names: Sequence[str],  # of the bands; a last one named "alpha" is declared as such
    units: Sequence[str],  # of the bands
    dtype: str,
    strips: Iterator[tuple[int, np.ndarray]],  # (first row, [bands, rows, W]) from top to bottom
    tags: dict[str, str],
) -> None:
    """Write a tiled, compressed GeoTIFF with overviews; it appears whole or not at all. Float bands have nodata NaN."""
    is_float = dtype.startswith("float")
    raw, cooked = scratch / "raw.tif", scratch / "cog.tif"
    profile = {
        "driver": "GTiff", "height": like.height, "width": like.width, "count": len(names), "dtype": dtype,
        "interleave": "pixel", "compress": "deflate", "zlevel": 1, "blockysize": 1, "bigtiff": "if_safer",
    }  # fmt: skip
    with rasterio.Env(GDAL_CACHEMAX=CACHE_BYTES), without_georeference():
        with rasterio.open(raw, "w", **profile, **({"nodata": np.nan} if is_float else {"photometric": "rgb"})) as target:
            copy_georeference(like, target)
            target.descriptions, target.units = tuple(names), tuple(units)
            target.update_tags(**tags)
            if names[-1] == "alpha":
                target.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
            for top, values in strips:
                target.write(values, window=Window(0, top, like.width, values.shape[1]))
        block = min(512, max(128, -(-min(like.shape) // 64) * 64))  # a long strip would fill blocks of 512 px with nothing
        options = {"predictor": "yes", "bigtiff": "if_safer", "overview_resampling": "average", "blocksize": block}
        rasterio.shutil.copy(raw, cooked, driver="COG", compress="deflate", **options)
    with written_whole(path) as temporary:
        shutil.move(cooked, temporary)
    raw.unlink()


def copy_georeference(source: Scene, target) -> None:
    """CRS, transform, GCPs and RPCs, each where the source has it."""
    if source.gcps[0]:
        target.gcps = source.gcps
    else:
        if source.crs is not None:
            target.crs = source.crs
        if not source.transform.is_identity:
            target.transform = source.transform
    if source.rpcs is not None:
        target.rpcs = source.rpcs


def quicklook(path: Path) -> np.ndarray:
    """A GeoTIFF at most QUICKLOOK_PX a side, from its overviews => [h, w, bands]; masked floats are NaN."""
    with without_georeference(), rasterio.open(path) as source:
        factor = max(1, max(source.height, source.width) / QUICKLOOK_PX)
        size = (source.count, max(1, round(source.height / factor)), max(1, round(source.width / factor)))
        return np.moveaxis(source.read(out_shape=size), 0, -1)
