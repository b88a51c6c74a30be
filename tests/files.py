"""Image files that the tests write, and pages that they read."""

import base64
import io
from html.parser import HTMLParser
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


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


class Page(HTMLParser):
    """Elements in order, their attributes, and the text; every element is closed in its turn."""

    VOID = {"meta", "img", "input"}

    def __init__(self, text: str):
        super().__init__()
        self.elements, self.open, self.said = [], [], []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open += [] if tag in self.VOID else [tag]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.said.append(data)

    def images(self) -> list[tuple[str, np.ndarray]]:
        """(alt, pixels) of the embedded images."""
        embedded = [(found.get("alt", ""), found["src"].split("base64,")[1]) for tag, found in self.elements if tag == "img"]
        return [(alt, np.array(Image.open(io.BytesIO(base64.b64decode(data))))) for alt, data in embedded]
