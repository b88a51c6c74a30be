"""Scenes on disk: GeoTIFFs read by windows, Cloud-Optimized GeoTIFFs written by strips on the very grid of their scene."""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import numpy as np
import rasterio
import rasterio.shutil
from rasterio.enums import ColorInterp
from rasterio.io import DatasetReader
from rasterio.windows import Window

from cdiffset.errors import UserError
from cdiffset.images import open_alone, require_size, without_georeference, write_png, written_whole
from cdiffset.radiometry import MAX_PIXELS

SUFFIXES = (".tif", ".tiff")
CACHE_MB = 256  # GDAL would take 5 % of the machine's memory
QUICKLOOK_PX = 1024


@contextmanager
def open_scene(path: Path, max_pixels: int = MAX_PIXELS) -> Iterator[DatasetReader]:
    """Open a GeoTIFF for reading by windows; UserError where it is none, or holds what cannot be translated."""
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), ExitStack() as stack:
        try:
            source = stack.enter_context(open_alone(path, "GTiff"))
        except rasterio.errors.RasterioIOError as error:
            raise UserError(f"{path}: unreadable, truncated or no GeoTIFF ({str(error).splitlines()[0]})") from error
        require_size(path, source.height, source.width, 1, max(max_pixels, MAX_PIXELS))
        if any("complex" in dtype for dtype in source.dtypes):
            raise UserError(
                f"{path}: complex pixels ({source.dtypes[0]}); write the amplitude to a GeoTIFF first: gdal_calc.py "
                f"-A {path.name} --calc='abs(A)' --type=Float32 --outfile=amplitude.tif"
            )
        if source.subdatasets:
            raise UserError(f"{path}: {len(source.subdatasets)} images in one file; take one out by gdal_translate")
        if ColorInterp.palette in source.colorinterp:
            raise UserError(
                f"{path}: a colour table, not SAR data; gdal_translate -expand gray {path.name} grey.tif resolves it"
            )
        yield source


def is_larger_than(path: Path, side: int) -> bool:
    """Whether a file is a GeoTIFF with a side of more pixels; what cannot be opened is left to the reader of all images."""
    if path.suffix.lower() not in SUFFIXES or not path.is_file():
        return False
    try:
        with open_alone(path, "GTiff") as source:
            return max(source.height, source.width) > side
    except rasterio.errors.RasterioIOError:
        return False


def write_cog(
    path: Path,
    scratch: Path,  # folder for the uncooked file
    like: DatasetReader,  # whose size, CRS, transform, GCPs and RPCs are carried over
    names: Sequence[str],  # of the bands; a last one named "alpha" is declared as such
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
    with rasterio.Env(GDAL_CACHEMAX=CACHE_MB), without_georeference():
        with rasterio.open(raw, "w", **profile, **({"nodata": np.nan} if is_float else {"photometric": "rgb"})) as target:
            copy_georeference(like, target)
            target.descriptions = tuple(names)
            target.update_tags(**tags)
            if names[-1] == "alpha":
                target.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
            for top, values in strips:
                target.write(values, window=Window(0, top, like.width, values.shape[1]))
        block = min(512, -(-min(like.shape) // 64) * 64)  # a long strip would fill blocks of 512 px with nothing
        options = {
            "compress": "deflate", "predictor": "yes", "bigtiff": "if_safer", "overview_resampling": "average",
            "blocksize": block,
        }  # fmt: skip
        rasterio.shutil.copy(raw, cooked, driver="COG", **options)
    with written_whole(path) as temporary:
        shutil.move(cooked, temporary)
    raw.unlink()


def copy_georeference(source: DatasetReader, target) -> None:
    """CRS, transform, GCPs and RPCs, each where the source has it."""
    gcps, gcp_crs = source.gcps
    if gcps:
        target.gcps = (gcps, gcp_crs)
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


def write_quicklook(path: Path, picture: Path) -> None:
    """PNG of an 8-bit GeoTIFF, as `quicklook`."""
    write_png(path, quicklook(picture))
