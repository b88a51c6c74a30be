"""The style beside a map: its scale and colours, and that QGIS, where it is installed, shows them."""

import shutil
import subprocess
from xml.etree import ElementTree

import numpy as np
import pytest
import rasterio

from cdiffset.calibration.error_pictures import colours
from cdiffset.scenes.qgis_style import write_style

QGIS = """
import sys
from qgis.core import QgsApplication, QgsRasterLayer
app = QgsApplication([], False)
app.initQgis()
layer = QgsRasterLayer(sys.argv[1], "map")
renderer = layer.renderer()
shader = renderer.shader()
print(type(renderer).__name__, renderer.classificationMin(), renderer.classificationMax())
for value in map(float, sys.argv[2:]):
    print(*shader.shade(value)[1:4])
"""


@pytest.fixture
def write_map(tmp_path):
    def write(values: np.ndarray):
        path = tmp_path / "map.tif"
        profile = {"driver": "GTiff", "width": values.shape[1], "height": values.shape[0], "count": 1, "dtype": "float32"}
        with rasterio.open(
            path, "w", **profile, nodata=np.nan, crs="EPSG:32611", transform=rasterio.Affine(10, 0, 4e5, 0, -10, 4e6)
        ) as to:
            to.write(values.astype(np.float32), 1)
        return path

    return write


def scale_of(path) -> list[tuple[float, str]]:
    root = ElementTree.parse(path.with_suffix(".qml")).getroot()
    return [(float(item.get("value")), item.get("color")) for item in root.iter("item")]


def test_errors_have_one_scale_with_the_colours_of_their_pictures(write_map):
    path = write_map(np.full((4, 5), 7.0))
    write_style(path, "DN")
    scale = scale_of(path)
    assert [value for value, _ in scale] == pytest.approx(np.linspace(0, 64, 11))
    shown = ["#{:02x}{:02x}{:02x}".format(*pixel) for pixel in colours(np.linspace(0, 64, 11)[None])[0]]
    assert [colour for _, colour in scale] == shown


def test_a_variance_is_scaled_to_its_own_percentiles(write_map):
    values = np.arange(2000, dtype=float).reshape(40, 50)
    values[0, :7] = np.nan
    path = write_map(values)
    write_style(path, "1")
    scale = [value for value, _ in scale_of(path)]
    assert (scale[0], scale[-1]) == pytest.approx(tuple(np.nanpercentile(values, (2, 98))), rel=1e-6)
    assert scale == sorted(scale)


@pytest.mark.parametrize("values", [np.full((3, 3), 0.5), np.full((3, 3), np.nan)])
def test_a_map_without_a_range_has_a_scale(write_map, values):
    path = write_map(values)
    write_style(path, "1")
    scale = [value for value, _ in scale_of(path)]
    assert np.isfinite(scale).all() and scale[-1] > scale[0]


def test_qgis_shows_the_map_in_these_colours(write_map):
    python = shutil.which("python3", path="/usr/bin")
    if not python or subprocess.run([python, "-c", "import qgis.core"], capture_output=True).returncode:
        pytest.skip("QGIS is not installed (Debian: python3-qgis)")
    path = write_map(np.linspace(0, 64, 20).reshape(4, 5))
    write_style(path, "DN")
    command = [python, "-c", QGIS, str(path), "0", "32", "64"]
    done = subprocess.run(command, capture_output=True, text=True, env={"QT_QPA_PLATFORM": "offscreen"}, timeout=60)
    name, *shades = done.stdout.splitlines()
    assert name == "QgsSingleBandPseudoColorRenderer 0.0 64.0", done.stderr
    assert [tuple(map(int, shade.split())) for shade in shades] == [
        tuple(pixel) for pixel in colours(np.array([[0, 32, 64.0]]))[0]
    ]
