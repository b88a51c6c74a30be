"""Image files <-> arrays: the one place that knows file formats, bit depths, band orders and the pixel range.

Files are read into 0-255 (float32 [H, W, 3]); networks work in [-1, 1]. SAR and EO differ in two rules only: SAR may have
1 to 4 bands, mapped to three channels, and each band deeper than 8 bits is scaled by itself; EO is scaled jointly.
"""

import hashlib
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import rasterio
from PIL import Image, ImageOps
from rasterio.enums import ColorInterp
from rasterio.errors import NotGeoreferencedWarning
from rasterio.windows import Window

from cdiffset.errors import UserError, reason_of

if TYPE_CHECKING:
    import torch  # slow to import, and lists can be made without it

STRETCH_PERCENTILES = (1, 99)
PIXEL_PERCENTILES = (5, 50, 95)  # by which images in 0-255 are compared
STATISTICS_IMAGES, STATISTICS_PX = 64, 2**14  # that a data set's statistics are taken of, and px of each
QUICKLOOK = ".quicklook.png"  # ends the name of a small picture beside a scene's EO
LONG_STEM_BYTES = 100
MAX_CLIPPED = 0.1  # fraction of an EO image's pixels beyond a declared range from which on the range is no longer believed
MAX_LINKS = 100_000  # to folders, followed in one listing
MAX_PIXELS = 2**28  # 16,384 x 16,384 px: a few kB can claim any size, and are then unpacked to it
PICTURE_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "WEBP")  # Pillow opens others too, some by running programs
Image.MAX_IMAGE_PIXELS = None  # Pillow's own limit, in whose place max_pixels stands


def read_sar(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """SAR file => float32 [H, W, 3] in 0-255.

    8-bit data is taken as is; each deeper band is stretched from its 1st-99th percentile. One band is repeated, two become
    (b1, mean, b2), four (HH, HV, VH, VV) become (HH, (HV + VH) / 2, VV). A band declared as alpha is dropped; note that GDAL
    takes the fourth band of an 8-bit TIFF for alpha unless the file says otherwise. UserError names the file if it is
    unreadable or claims more than max_pixels.
    """
    return read_sar_valid(path, max_pixels)[0]


def read_sar_valid(path: str | Path, max_pixels: int = MAX_PIXELS) -> tuple[np.ndarray, np.ndarray]:
    """As `read_sar` => (pixels, bool [H, W]: where every band is data, see `read_bands`)."""
    bands, valid = _read(path, max_pixels)
    return _to_channels(path, bands, valid), valid.all(-1)


def _to_channels(path: str | Path, bands: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Bands as they are in the file [H, W, C] => float32 [H, W, 3] in 0-255."""
    count = bands.shape[-1]
    if count > 4:
        raise UserError(f"{path}: {count} bands; a SAR image has 1 to 4")
    is_deep = bands.dtype != np.uint8
    channels = [stretch(bands[..., k], valid[..., k]) if is_deep else bands[..., k].astype(np.float32) for k in range(count)]
    return np.stack(three_channels(channels), axis=-1)


def three_channels(bands: list[np.ndarray]) -> list[np.ndarray]:
    """What the network sees of a SAR image of 1 to 4 bands, the four being HH, HV, VH, VV."""
    match bands:
        case [only]:
            return [only, only, only]
        case [first, second]:
            return [first, (first + second) / 2, second]
        case [hh, hv, vh, vv]:
            return [hh, (hv + vh) / 2, vv]
    return bands


def sar_statistics(paths: Sequence[Path], max_pixels: int = MAX_PIXELS) -> dict | None:
    """What SAR files hold, from at most STATISTICS_IMAGES of them spread evenly; None where their bands or types differ.

    "limits": STRETCH_PERCENTILES of each band's numbers as they are in the files, "pixels": PIXEL_PERCENTILES of what read_sar
    makes of them, "dtype" and the number of "images" read. UserError where one is unreadable.
    """
    numbers, pixels, kinds = [], [], set()
    for path in paths[:: -(-len(paths) // STATISTICS_IMAGES)]:
        bands, valid = _read(path, max_pixels)
        kinds.add((bands.shape[-1], bands.dtype.name))
        used = valid.all(-1)
        every = max(1, int(used.sum()) // STATISTICS_PX)
        numbers.append(bands[used][::every])
        pixels.append(_to_channels(path, bands, valid)[used][::every])
    if len(kinds) > 1 or not (numbers := np.concatenate(numbers)).size:
        return None
    low, high = np.percentile(numbers.astype(np.float64), STRETCH_PERCENTILES, axis=0)
    return {
        "images": len(pixels), "dtype": numbers.dtype.name, "limits": np.stack([low, high], 1).tolist(),
        "pixels": np.percentile(np.concatenate(pixels), PIXEL_PERCENTILES).tolist(),
    }  # fmt: skip


def read_eo(path: str | Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """EO file => float32 [H, W, 3] in 0-255: RGB, grey repeated, alpha dropped.

    8-bit data is taken as is; deeper data is stretched from the 1st-99th percentile of all bands together, which keeps its
    colours. UserError names the file if it is unreadable or claims more than max_pixels.
    """
    bands, valid = _read(path, max_pixels)
    _require_rgb(path, bands)
    if bands.dtype != np.uint8:
        bands = stretch(bands, valid)
    return np.repeat(bands, 3 // bands.shape[-1], axis=-1).astype(np.float32)


class UndeclaredRange(UserError):
    """EO to be compared that is deeper than 8 bits without a declared range, or 8-bit with one."""


class UnstretchedEO(NamedTuple):
    """EO to be compared, on the scale of its numbers: nothing is stretched by percentiles."""

    pixels: np.ndarray  # float32 [H, W, 3] in 0-255, 0 where not valid
    valid: np.ndarray  # bool [H, W]: finite in every band, and excluded neither by alpha 0, nor by nodata, nor by a mask
    clipped: float  # share of the valid pixels with a value beyond the declared range


def read_unstretched_eo(
    path: str | Path, limits: tuple[float, float] | None, option: str | None, max_pixels: int = MAX_PIXELS
) -> UnstretchedEO:
    """EO file to compare with another. 8-bit data is taken as is; of deeper data, the declared `limits` become 0 and 255.

    UndeclaredRange where deeper data comes without limits, or 8-bit data with limits other than 0 and 255; its message names
    `option`, which declares them (None: there is no such option). A file without a valid pixel is no error.
    """
    bands, valid = _decoded(Path(path), max_pixels)
    _require_rgb(path, bands)
    valid, clipped = valid.all(-1), 0.0
    values = bands[valid]  # [n, 1 or 3]
    if values.dtype == np.uint8:
        if limits not in (None, (0, 255)):
            raise UndeclaredRange(f"{path}: 8-bit pixels, which are taken as 0 to 255; leave out {option}")
    elif values.size:
        if limits is None:
            remedy = f"; declare what 0 and 255 are by {option} LOW,HIGH" if option else ""
            found = f"{values.dtype} pixels from {values.min():g} to {values.max():g}"
            raise UndeclaredRange(f"{path}: {found}, expected 8-bit{remedy}")
        low, high = limits
        clipped = float(((values < low) | (values > high)).any(-1).mean())
        if clipped > MAX_CLIPPED:
            found = f"values from {values.min():g} to {values.max():g}, of which {clipped:.0%} are beyond {option}"
            raise UndeclaredRange(f"{path}: {found} {low:g},{high:g}: give the range that they have")
        values = to_255(values, low, high)
    pixels = np.zeros((*valid.shape, 3), np.float32)
    pixels[valid] = values
    return UnstretchedEO(pixels, valid, clipped)


def require_declared_range(path: Path, limits: tuple[float, float] | None, option: str, max_pixels: int = MAX_PIXELS) -> None:
    """Raise UndeclaredRange if it is that for this file, one for all of its folder, before hours of work."""
    try:
        read_unstretched_eo(path, limits, option, max_pixels)
    except UndeclaredRange:
        raise
    except UserError:
        pass  # reported when its turn comes


def _require_rgb(path: str | Path, bands: np.ndarray) -> None:
    if bands.shape[-1] not in (1, 3):
        raise UserError(f"{path}: {bands.shape[-1]} bands besides alpha; an EO image has 1 or 3")


def stretch(values: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """`to_255` of the 1st-99th percentile of the valid values, float32; invalid pixels become 0."""
    values = values.astype(np.float64)
    scaled = np.zeros(values.shape, np.float32)
    scaled[valid] = to_255(values[valid], *np.percentile(values[valid], STRETCH_PERCENTILES))
    return scaled


def to_255(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Clip to `low` ... `high` and scale that to 0-255, float64; 0 everywhere where the two are equal."""
    if not high > low:
        return np.zeros(values.shape)
    return (np.clip(values.astype(np.float64, copy=False), low, high) - low) / (high - low) * 255


def to_signed(pixels):
    """0-255 => [-1, 1], for arrays and tensors."""
    return pixels / 127.5 - 1


def to_tensor(pixels: np.ndarray) -> "torch.Tensor":
    """[..., H, W, 3] in 0-255 => float32 [..., 3, H, W] in [-1, 1]."""
    import torch

    return to_signed(torch.from_numpy(np.moveaxis(pixels, -1, -3).astype(np.float32, order="C")))


def write_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write uint8 [H, W] or [H, W, 3]; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        Image.fromarray(pixels).save(temporary, format="PNG")


def write_tiff(path: str | Path, values: np.ndarray) -> None:
    """Write float32 [H, W], deflate-compressed; the file appears whole or not at all."""
    height, width = values.shape
    profile = {"driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": "float32", "compress": "deflate"}
    with written_whole(path) as temporary, without_georeference(), rasterio.open(temporary, "w", **profile) as target:
        target.write(values.astype(np.float32, copy=False), 1)


def read_tiff(path: str | Path) -> np.ndarray:
    """What write_tiff wrote: float32 [H, W]."""
    with without_georeference(), rasterio.open(path) as source:
        return source.read(1)


def require_writable(option: str, folder: str | Path) -> None:
    """UserError with the option's name where no file can be written into a folder, which need not exist yet.

    For use before hours of work. Nothing is left behind, neither a file nor a folder.
    """
    folder, missing = Path(folder), []
    try:
        missing = [each for each in (folder, *folder.parents) if not each.exists()]
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise UserError(f"{option}: cannot write into {folder}: {reason_of(error)}") from error
    finally:
        for each in missing:
            with suppress(OSError):  # it was not made, or someone else uses it by now
                each.rmdir()


@contextmanager
def written_whole(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path` to write to, then move it there; after a failure nothing is left of it.

    The name is always the same one, so that what a killed process left is gone once the file has been written after all.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = hidden_beside(path, f"part{path.suffix}")
    temporary.unlink(missing_ok=True)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8; the file appears whole or not at all."""
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def hidden_beside(path: Path, ending: str) -> Path:
    """`.STEM.ending` beside a file; a name that fits wherever the file's own name does."""
    stem = os.fsencode(path.stem)
    if len(stem) > LONG_STEM_BYTES:
        stem = hashlib.sha256(stem).hexdigest()[:32].encode()
    return path.with_name(f".{os.fsdecode(stem)}.{ending}")


def list_images(folder: str | Path, suffixes: Sequence[str] = ()) -> list[Path]:
    """Images under a folder, relative to it, numbers in names in counting order; hidden files and folders are skipped.

    `suffixes`: of what is listed, IMAGE_SUFFIXES where there are none. Symbolic links are followed, each under its own name;
    those that lead back to a folder they lie in, or nowhere, are left out. UserError where there are no images, and for names
    that are not UTF-8.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    found, dead, wanted = [], [], suffixes or IMAGE_SUFFIXES
    for file in _walk(folder):
        if not file.name.startswith(".") and file.suffix.lower() in wanted:
            (found if os.path.isfile(file) else dead).append(file)
    if dead:
        print(f"note: {len(dead)} links of {folder} lead to no file and are left out: {dead[0]}", file=sys.stderr)
    if not found:
        raise UserError(f"{folder}: holds no images ({' '.join(wanted)})")
    require_utf8(found)
    return sorted((path.relative_to(folder) for path in found), key=_counting_order)


def _walk(root: Path) -> Iterator[Path]:
    """Every file under root, links followed but for those back into a folder above."""
    links = 0
    real: dict[str, tuple[str, ...]] = {os.fspath(root): (os.path.realpath(root),)}  # of each folder and those above it
    for folder, folders, files in os.walk(root, followlinks=True):
        above, inner = real.pop(folder), {name: os.path.realpath(os.path.join(folder, name)) for name in folders}
        folders[:] = [name for name in folders if not name.startswith(".") and inner[name] not in above]
        real |= {os.path.join(folder, name): (*above, inner[name]) for name in folders}
        links += sum(os.path.islink(os.path.join(folder, name)) for name in folders)
        if links > MAX_LINKS:  # a few folders full of links to each other have endless paths
            raise UserError(f"{root}: over {MAX_LINKS} links to folders, expected fewer: do they lead to each other?")
        yield from map(Path(folder).joinpath, files)


def require_utf8(paths: Sequence[Path]) -> None:
    """Refuse names that are not UTF-8, as archives made on Windows leave them: they can stand in no report and no list."""
    refused = [os.fsencode(path).decode(errors="backslashreplace") for path in paths if re.search("[\ud800-\udfff]", str(path))]
    if refused:
        shown = ", ".join(refused[:3]) + (", ..." if len(refused) > 3 else "")
        raise UserError(f"{len(refused)} file names that are not UTF-8: {shown}; rename them, or unpack their archive again")


def _counting_order(path: Path) -> tuple:
    """Sort key: 2.png before 10.png; the path itself settles 2.png and 02.png."""
    pieces = re.split(r"([0-9]+)", path.as_posix())  # text and numbers take turns, text first
    return [int(piece) if k % 2 else piece for k, piece in enumerate(pieces)], path.as_posix()


@contextmanager
def without_georeference() -> Iterator[None]:
    """Plain images are welcome: keep rasterio from warning that they lie nowhere on Earth."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", NotGeoreferencedWarning)
        yield


def _read(path: str | Path, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """`_decoded`, but a deep band without a valid pixel is a UserError: it has no percentiles."""
    bands, valid = _decoded(Path(path), max_pixels)
    if bands.dtype != np.uint8 and not valid.any(axis=(0, 1)).all():
        raise UserError(f"{path}: a band without a single valid pixel (all NaN, infinite, nodata or masked)")
    return bands, valid


def _decoded(path: Path, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """Any supported file => (bands [H, W, C], alpha dropped, uint8 or deeper; valid [H, W, C] bool)."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    if (reader := READERS.get(path.suffix.lower())) is None:
        raise UserError(f"{path}: unsupported image type; supported are {' '.join(IMAGE_SUFFIXES)}")
    try:
        bands, unmasked = reader(path, max_pixels)
    except UserError:
        raise
    except Exception as error:  # on damaged files the decoders raise almost anything
        raise UserError(f"{path}: unreadable, truncated or not an image ({error or type(error).__name__})") from error
    if bands.dtype == bool:
        bands = bands.astype(np.uint8) * 255
    if bands.dtype.kind not in "uif":
        raise UserError(f"{path}: pixels of type {bands.dtype}; expected real numbers")
    return bands, unmasked & np.isfinite(bands)


def require_size(path: Path, height: int, width: int, bands: int, max_pixels: int) -> None:
    """Refuse the size that a header claims before memory is taken for it; bands beyond a SAR image's four count as pixels."""
    if height * width * max(bands, 4) > 4 * max_pixels:
        remedy = "cut it into tiles or raise the limit (--max-pixels, or max_pixels among the feeder's arguments)"
        raise UserError(f"{path}: {width} x {height} px in {bands} bands; at most {max_pixels} px are opened, {remedy}")


def _read_picture(path: Path, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    with Image.open(path, formats=PICTURE_FORMATS) as image:
        require_size(path, image.height, image.width, len(image.getbands()), max_pixels)
        # MPO is the JPEG of drones and phones: its later frames are previews and depth maps of the first.
        if (frames := getattr(image, "n_frames", 1)) > 1 and image.format != "MPO":
            raise UserError(f"{path}: {frames} frames; expected one image")
        if image.format == "PNG" and image.mode != "I;16" and "16" in str(image.tile[0].args):
            return _read_raster(path, max_pixels, "PNG")  # Pillow would cut 16-bit colour down to 8 bits
        upright = ImageOps.exif_transpose(image)
        bands = np.array(_plain_mode(upright))
        opaque = np.array(upright.convert("RGBA").getchannel("A")) > 0 if upright.has_transparency_data else True
    bands = bands.reshape(*bands.shape[:2], -1)
    return bands, np.broadcast_to(np.atleast_3d(opaque), bands.shape)


def _plain_mode(image: Image.Image) -> Image.Image:
    """Bilevel and grey with alpha => L; palette, CMYK, RGBA and other colour => RGB; deep grey stays."""
    if image.mode in ("1", "LA"):
        return image.convert("L")
    if image.mode in ("P", "PA"):
        image = image.convert("RGBA")  # straight to RGB, Pillow warns about transparency in palettes
    is_grey = image.mode in ("L", "I", "F") or image.mode.startswith("I;16")
    return image if is_grey else image.convert("RGB")


def _read_raster(path: Path, max_pixels: int, driver: str = "GTiff") -> tuple[np.ndarray, np.ndarray]:
    with open_raster(path, driver) as source:
        require_size(path, source.height, source.width, source.count, max_pixels)
        if source.subdatasets:
            raise UserError(f"{path}: {len(source.subdatasets)} pages; expected one image")
        if any("complex" in dtype for dtype in source.dtypes):
            raise UserError(complex_message(path, source.dtypes[0]))
        kept = [k for k in source.indexes if source.colorinterp[k - 1] != ColorInterp.alpha]
        if len(kept) < source.count:
            _note_alpha()
        if source.colorinterp[0] == ColorInterp.palette:
            colours = np.zeros((max(source.colormap(1)) + 1, 3), np.uint8)
            colours[list(source.colormap(1))] = [colour[:3] for colour in source.colormap(1).values()]
            bands, unmasked = np.moveaxis(colours[source.read(1)], -1, 0), np.repeat(source.read_masks(kept) > 0, 3, axis=0)
        else:
            bands, unmasked = read_bands(source, kept)
            if bands.dtype == np.uint8:  # GDAL unpacks 1 to 7 bits without scaling them
                bits = int(source.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
                bands = np.round(bands * (255 / (2**bits - 1))).astype(np.uint8)
    return np.moveaxis(bands, 0, -1), np.moveaxis(unmasked, 0, -1)


@cache
def _note_alpha() -> None:
    """Printed once, since it holds for all files alike."""
    print("note: a band that a TIFF declares as alpha is no part of the picture: it says where there is data", file=sys.stderr)


@contextmanager
def open_raster(path: Path, driver: str | None = None, **options) -> Iterator[rasterio.DatasetReader]:
    """Open a raster with the files that belong to it: mask (.msk), overviews (.ovr), .aux.xml, world file with .prj.

    `driver` None leaves the format to GDAL; options are the driver's own. The path is absolute, because GDAL reads beginnings
    like `GTIFF_DIR:1:` as more than a name.
    """
    with without_georeference(), rasterio.open(path.absolute(), driver=driver, **options) as source:
        yield source


def read_bands(
    source: rasterio.DatasetReader, indexes: Sequence[int], window: Window | None = None, nodata: float | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Bands of a raster, or of a window of it => (values [n, h, w], valid [n, h, w]).

    The one rule of what is data: neither declared as nodata, masked or transparent, nor NaN or infinite, nor equal to `nodata`,
    which is a value as it stands in the file. Undeclared zeros are data. Values are in the file's type; a band with a declared
    scale or offset becomes float64, scale * number + offset.
    """
    indexes = list(indexes)
    values, valid = source.read(indexes, window=window), source.read_masks(indexes, window=window) > 0
    if values.dtype.kind == "f":
        valid &= np.isfinite(values)
    if (alpha := alpha_band(source)) is not None:  # GDAL's masks overlook the alpha band of floating-point rasters
        valid &= source.read(alpha, window=window) > 0
    if nodata is not None:
        valid &= values != float(nodata)  # in the type of float bands, exactly for integers
    scales, offsets = (np.array(each)[np.array(indexes) - 1, None, None] for each in (source.scales, source.offsets))
    if (scales != 1).any() or (offsets != 0).any():
        values = values * scales + offsets
    return values, valid


def alpha_band(source: rasterio.DatasetReader) -> int | None:
    """Number of the alpha band, from 1."""
    return next((k for k in source.indexes if source.colorinterp[k - 1] == ColorInterp.alpha), None)


def complex_message(path: Path, dtype: str) -> str:
    remedy = f"gdal_translate DERIVED_SUBDATASET:AMPLITUDE:{path.name} amplitude.tif"
    return f"{path}: complex pixels ({dtype}), expected real ones; write the amplitude to a GeoTIFF first: {remedy}"


def _read_array(path: Path, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    array = np.load(path, mmap_mode="r", allow_pickle=False)  # so that a size the file does not have takes no memory
    if not isinstance(array, np.ndarray) or array.ndim not in (2, 3) or array.size == 0:
        raise UserError(f"{path}: expected one array [H, W] or [H, W, C], found {getattr(array, 'shape', 'an archive')}")
    bands = array.reshape(*array.shape[:2], -1)
    require_size(path, *bands.shape, max_pixels)  # type: ignore[call-arg]
    return np.array(bands), np.ones(bands.shape, bool)


READERS = dict.fromkeys((".bmp", ".gif", ".jpeg", ".jpg", ".png", ".webp"), _read_picture)
READERS |= {".npy": _read_array, ".tif": _read_raster, ".tiff": _read_raster}
IMAGE_SUFFIXES = tuple(sorted(READERS))
