"""An HTML page with a scene's SAR and EO under a slider and its uncertainty over both; opens from disk, loads nothing."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import rasterio
from rasterio.windows import Window

from cdiffset.calibration.error_pictures import ERROR_VIEW_MAX, VARIANCE_PERCENTILES, colours
from cdiffset.images import without_georeference, write_text
from cdiffset.pages import image_url, render_page
from cdiffset.scenes.geotiff import Scene, quicklook
from cdiffset.scenes.radiometry import Radiometry

STRIP = 128  # rows of the picture that are read together
QUALITY = 90  # of WebP, which has transparency and is a tenth of PNG


def write_swipe(
    outputs: dict[str, Path],
    scene: Scene,
    radiometry: Radiometry,
    facts: dict[str, str],  # rows of the table
    metres_along: float | None,  # size of a pixel of the scene along its rows, for the scale bar
) -> None:
    """Write the page beside the EO image of a scene, from the images and maps that are written already."""
    eo = quicklook(outputs["eo"])
    height, width = eo.shape[:2]
    found = next((kind for kind in ("error", "confidence", "variance") if kind in outputs), None)
    picture, legend = uncertainty_view(outputs[found]) if found else (None, "")
    page = render_page(
        "scenes/slider_page.html.jinja", title=outputs["eo"].name, width=width, height=height,
        sar=embedded(sar_view(scene, radiometry, (height, width))), eo=embedded(eo),
        overlay=embedded(picture) if found else None, legend=legend, facts=facts,
        bar=scale_bar(scene.width * metres_along) if metres_along else None,
    )  # fmt: skip
    write_text(outputs["eo"].with_suffix(".swipe.html"), page)


def slider(sar: np.ndarray, eo: np.ndarray) -> str:
    """The slider alone, of pictures [h, w, 3 or 4], as HTML for another page."""
    height, width = eo.shape[:2]
    pictures = {"sar": embedded(sar), "eo": embedded(eo), "overlay": None}
    return render_page("scenes/slider.html.jinja", width=width, height=height, bar=None, **pictures)


def written_radiometry(eo: Path) -> Radiometry:
    """How the scene was read that became this EO GeoTIFF."""
    with rasterio.open(eo) as source:
        return Radiometry(**json.loads(source.tags()["CDIFFSET_STRETCH"]))


def scale_bar(metres: float) -> dict[str, str]:
    """A bar of a round length, at most a quarter of a picture that is so many metres wide => its width in % and its label."""
    power = 10 ** math.floor(math.log10(metres / 4))
    length = next(step * power for step in (5, 2, 1) if step * power <= metres / 4)
    label = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    return {"width_percent": f"{100 * length / metres:.3f}", "label": label}


def sar_view(scene: Scene, radiometry: Radiometry, size: tuple[int, int]) -> np.ndarray:
    """The SAR as the network sees it, at the size of a quicklook => uint8 [h, w, 4], transparent where it is not valid."""
    pixel_ratio = tuple(side / wanted for side, wanted in zip(scene.shape, size, strict=True))
    smaller = replace(radiometry, pixel_ratio=pixel_ratio)
    strips = []
    for top in range(0, size[0], STRIP):
        pixels, valid = smaller.read(scene, Window(0, top, size[1], min(STRIP, size[0] - top)))
        strips.append(np.concatenate([pixels.round(), 255.0 * valid[None]]))
    return np.moveaxis(np.concatenate(strips, 1), 0, -1).astype(np.uint8)


def uncertainty_view(path: Path) -> tuple[np.ndarray, str]:
    """A map of a scene => (uint8 [h, w, 4] in colours, transparent without a value; what the colours say)."""
    with without_georeference(), rasterio.open(path) as source:
        name = source.descriptions[-1]
    values = quicklook(path)[..., -1]
    known = np.isfinite(values)
    if name == "variance":
        low, high = (
            (float(limit) for limit in np.percentile(values[known], VARIANCE_PERCENTILES)) if known.any() else (0.0, 1.0)
        )
        legend = f"uncertainty σ² (1 / confidence), dark {low:.3g} to light {high:.3g}"
    else:
        low, high, legend = 0.0, float(ERROR_VIEW_MAX), f"{name}, dark 0 to light {ERROR_VIEW_MAX} and more"
    shown = (np.where(known, values, low) - low) / max(high - low, 1e-12) * ERROR_VIEW_MAX
    return np.dstack([colours(shown), 255 * known.astype(np.uint8)]), legend


def embedded(pixels: np.ndarray) -> str:
    """uint8 [h, w, 3 or 4] => data URL."""
    return image_url(pixels, "webp", quality=QUALITY)
