"""The image files that the tests write."""

from pathlib import Path

import numpy as np
import rasterio
from PIL import Image

from cdiffset.images import without_georeference


def save_image(path: Path, pixels: np.ndarray, **options) -> Path:
    """[H, W] or [H, W, C] in whole numbers from 0 to 255 as an ordinary picture."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels.round().astype(np.uint8)).save(path, **options)
    return path


def save_raster(path: Path, bands: np.ndarray, names=(), mask: np.ndarray | None = None, colours=(), **profile) -> Path:
    """[C, H, W] or [H, W] of any type as it is, with names of its bands, their colours and an internal mask."""
    bands = bands.reshape(-1, *bands.shape[-2:])
    count, height, width = bands.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype.name} | profile
    with without_georeference(), rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **profile) as target:
        target.write(bands)
        for index, name in enumerate(names, 1):
            target.set_band_description(index, name)
        if colours:
            target.colorinterp = colours
        if mask is not None:
            target.write_mask(mask)
    return path
