"""An HTML page with a scene's SAR and EO under a slider and its uncertainty over both; opens from disk, loads nothing."""

import base64
import io
import math
from dataclasses import replace
from html import escape
from pathlib import Path

import numpy as np
import rasterio
from PIL import Image
from rasterio.windows import Window

from cdiffset.calibration.error_pictures import ERROR_VIEW_MAX, colours
from cdiffset.images import without_georeference, written_whole
from cdiffset.scenes.geotiff import Scene, quicklook
from cdiffset.scenes.radiometry import Radiometry

STRIP = 128  # rows of the picture that are read together
QUALITY = 90  # of WebP, which has transparency and is a tenth of PNG

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" \
content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>{title}</title>
<style>
body {{ margin: 0 auto; padding: 1rem; max-width: max({width}px, 48rem); font: 15px/1.4 system-ui, sans-serif; }}
h1 {{ font-size: 1.2rem; overflow-wrap: anywhere; }}
.frame {{ position: relative; aspect-ratio: {width} / {height}; background: #ddd; overflow: hidden; }}
.frame img, .frame input {{ position: absolute; inset: 0; width: 100%; height: 100%; margin: 0; }}
.frame input {{ opacity: 0; cursor: ew-resize; touch-action: pan-y; }}
#line {{ position: absolute; top: 0; bottom: 0; width: 2px; margin-left: -1px; background: #fff; box-shadow: 0 0 3px #000; }}
.frame span {{ position: absolute; top: .5rem; padding: 0 .4rem; background: #000a; color: #fff; }}
.frame:focus-within #line {{ background: #fd0; }}
.tools {{ display: flex; flex-wrap: wrap; gap: 1rem; margin: .6rem 0; }}
#bar {{ position: absolute; left: .5rem; bottom: .5rem; padding-bottom: 2px; box-sizing: border-box; text-align: center;
  border: solid #fff; border-width: 0 2px 3px; color: #fff; text-shadow: 0 0 3px #000, 0 0 3px #000; white-space: nowrap;
  filter: drop-shadow(0 0 1px #000); pointer-events: none; }}
table {{ border-collapse: collapse; margin-top: 1rem; }}
th, td {{ padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; border-top: 1px solid #ddd; }}
td {{ overflow-wrap: anywhere; }}
th {{ font-weight: 600; white-space: nowrap; }}
</style>
</head>
<body>
<h1>{title}</h1>
<div class="frame">
<img src="{sar}" alt="SAR">
<img src="{eo}" alt="EO, translated" id="eo">
{overlay}<div id="line"></div>
{bar}<span style="left: .5rem">EO, translated</span><span style="right: .5rem">SAR</span>
<input type="range" min="0" max="100" step="0.1" value="50" id="place" aria-label="EO to the left, SAR to the right of it">
</div>
{tools}<table>
{facts}
</table>
<script>
const find = name => document.getElementById(name);
function swipe() {{
  const share = Number(find("place").value);
  find("eo").style.clipPath = `inset(0 ${{100 - share}}% 0 0)`;
  find("line").style.left = `${{share}}%`;
}}
function shade() {{
  find("map").style.opacity = find("shown").checked ? find("opacity").value : 0;
}}
find("place").addEventListener("input", swipe);
swipe();
if (find("map")) {{
  find("shown").addEventListener("input", shade);
  find("opacity").addEventListener("input", shade);
  shade();
}}
</script>
</body>
</html>
"""
TOOLS = """<div class="tools">
<label><input type="checkbox" id="shown"> {legend}</label>
<label>opacity <input type="range" min="0" max="1" step="0.01" value="0.6" id="opacity"></label>
</div>
"""


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
    page = PAGE.format(
        title=escape(outputs["eo"].name), width=width, height=height,
        sar=embedded(sar_view(scene, radiometry, (height, width))), eo=embedded(eo),
        overlay=f'<img src="{embedded(picture)}" alt="uncertainty" id="map">\n' if found else "",
        bar=scale_bar(scene.width * metres_along) if metres_along else "",
        tools=TOOLS.format(legend=escape(legend)) if found else "",
        facts="\n".join(f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>" for name, value in facts.items()),
    )  # fmt: skip
    with written_whole(outputs["eo"].with_suffix(".swipe.html")) as temporary:
        temporary.write_text(page, "utf-8")


def scale_bar(metres: float) -> str:
    """A bar of a round length, at most a quarter of a picture that is so many metres wide."""
    power = 10 ** math.floor(math.log10(metres / 4))
    length = next(step * power for step in (5, 2, 1) if step * power <= metres / 4)
    label = f"{length / 1000:g} km" if length >= 1000 else f"{length:g} m"
    return f'<div id="bar" style="width: {100 * length / metres:.3f}%">{label}</div>\n'


def sar_view(scene: Scene, radiometry: Radiometry, size: tuple[int, int]) -> np.ndarray:
    """The SAR as the network sees it, at the size of a quicklook => uint8 [h, w, 4], transparent where it is not valid."""
    steps = tuple(side / wanted for side, wanted in zip(scene.shape, size, strict=True))
    smaller = replace(radiometry, steps=steps)
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
        low, high = (float(limit) for limit in np.percentile(values[known], (1, 99))) if known.any() else (0.0, 1.0)
        legend = f"uncertainty σ² (1 / confidence), dark {low:.3g} to light {high:.3g}"
    else:
        low, high, legend = 0.0, float(ERROR_VIEW_MAX), f"{name}, dark 0 to light {ERROR_VIEW_MAX} and more"
    shown = (np.where(known, values, low) - low) / max(high - low, 1e-12) * ERROR_VIEW_MAX
    return np.dstack([colours(shown), 255 * known.astype(np.uint8)]), legend


def embedded(pixels: np.ndarray) -> str:
    """uint8 [h, w, 4] => data URL."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, format="WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(stream.getvalue()).decode()}"
