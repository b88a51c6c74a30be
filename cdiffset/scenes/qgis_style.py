"""A QGIS style beside a GeoTIFF of maps: NAME.qml, which QGIS takes for NAME.tif by itself, so that it opens in colour."""

from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np
import rasterio

from cdiffset.calibration.error_pictures import ANCHORS, ERROR_VIEW_MAX
from cdiffset.images import write_text

SHOWN_PX = 512  # the range of a variance is taken from a view of at most so many px a side
PERCENTILES = (2, 98)


def write_style(path: Path, unit: str) -> None:
    """Style the first band of a GeoTIFF: errors and spreads, in 8-bit units ("DN"), on the scale of `error_pictures`, which is
    the same for all scenes; a variance, whose unit is the latent's, between two percentiles of its own.
    """
    low, high = (0.0, float(ERROR_VIEW_MAX)) if unit == "DN" else range_of(path)
    root = Element("qgis", version="3.22", styleCategories="Symbology")
    renderer = SubElement(
        SubElement(root, "pipe"), "rasterrenderer", type="singlebandpseudocolor", band="1", opacity="1", alphaBand="-1",
        classificationMin=f"{low:.9g}", classificationMax=f"{high:.9g}",
    )  # fmt: skip
    shader = SubElement(
        SubElement(renderer, "rastershader"), "colorrampshader", colorRampType="INTERPOLATED", classificationMode="1", clip="0",
        minimumValue=f"{low:.9g}", maximumValue=f"{high:.9g}",
    )  # fmt: skip
    for value, colour in zip(np.linspace(low, high, len(ANCHORS)), ANCHORS.astype(int), strict=True):
        hexadecimal = "#{:02x}{:02x}{:02x}".format(*colour)
        SubElement(shader, "item", value=f"{value:.9g}", label=f"{value:.3g}", color=hexadecimal, alpha="255")
    indent(root)
    write_text(path.with_suffix(".qml"), tostring(root, "unicode") + "\n")


def range_of(path: Path) -> tuple[float, float]:
    """Two percentiles of a map's first band, from a reduced view; (0, 1) where it has no data."""
    with rasterio.open(path) as source:
        reduction = max(1, -(-max(source.shape) // SHOWN_PX))
        values = source.read(1, out_shape=tuple(-(-side // reduction) for side in source.shape), masked=True).compressed()
    values = values[np.isfinite(values)]
    if not values.size:
        return 0.0, 1.0
    low, high = np.percentile(values, PERCENTILES).tolist()
    return low, high if high > low else low + 1e-6
