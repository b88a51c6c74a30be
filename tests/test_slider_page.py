"""The page with a scene's SAR and EO under a slider: what it shows, and that it asks for nothing from elsewhere."""

import re

import numpy as np
import pytest
import rasterio
from files import Page, save_raster
from PIL import Image
from rasterio.transform import Affine

from cdiffset.scenes import geotiff
from cdiffset.scenes.geotiff import open_scene, write_cog
from cdiffset.scenes.radiometry import Radiometry
from cdiffset.scenes.slider_page import write_swipe

RNG = np.random.default_rng(0)
NAME = "<script>alert(1)</script>&\"'.tif".replace("/", "\u2215")


@pytest.fixture(scope="module")
def scene(tmp_path_factory):
    """A scene of 300 x 200 px with a hole, its EO and its map of σ² => (path, outputs)."""
    folder = tmp_path_factory.mktemp("scene")
    coarse = Image.fromarray(RNG.integers(1, 256, (8, 12), dtype=np.uint8))
    band = np.maximum(np.array(coarse.resize((300, 200), Image.Resampling.BILINEAR)), 1)
    band[:50, :100] = 0
    path = save_raster(folder / NAME, band, nodata=0, crs="EPSG:32631", transform=Affine(1, 0, 5e5, 0, -1, 5e6))
    outputs = {"confidence": folder / "conf" / NAME, "eo": folder / "eo" / NAME}
    with open_scene(path) as source:
        eo = np.stack([band, band, band, 255 * (band > 0)])
        write_cog(outputs["eo"], folder, source, ("red", "green", "blue", "alpha"), ("DN",) * 4, "uint8", iter([(0, eo)]), {})
        sigma2 = np.where(band > 0, np.linspace(1, 2, 300), np.nan).astype(np.float32)
        write_cog(outputs["confidence"], folder, source, ("variance",), ("1",), "float32", iter([(0, sigma2[None])]), {})
    return path, outputs


def page_of(scene, limits=((0.0, 255.0),), metres=None) -> Page:
    path, outputs = scene
    with open_scene(path) as source:
        facts = {"scene": path.name, "size": "300 x 200 px", "sampling": '{"a": "<b>"}'}
        write_swipe(outputs, source, Radiometry((1,), "single", "dn", limits), facts, metres)
    return Page(outputs["eo"].with_suffix(".swipe.html").read_text("utf-8"))


@pytest.mark.parametrize("shown_px", [1024, 150])
def test_it_shows_the_sar_the_eo_and_the_map_at_one_size(scene, monkeypatch, shown_px):
    monkeypatch.setattr(geotiff, "QUICKLOOK_PX", shown_px)
    images = dict(page_of(scene).images())
    factor = max(1, 300 / shown_px)
    size = round(200 / factor), round(300 / factor)
    with rasterio.open(scene[0]) as source:
        truth = np.array(Image.fromarray(source.read(1)).resize(size[::-1], Image.Resampling.BILINEAR)).astype(float)
        hole = np.array(Image.fromarray(source.read(1) == 0).resize(size[::-1]))
    for alt, expected in (("SAR", truth), ("EO, translated", truth)):
        assert images[alt].shape == (*size, 4)
        assert np.abs(images[alt][..., 0] - expected)[~hole].mean() < 4  # lossy
        assert (images[alt][..., 3] == 0)[hole].mean() > 0.95 and (images[alt][..., 3] == 255)[~hole].mean() > 0.95
    shades = images["uncertainty"][size[0] // 2 + 5, :, :3].sum(-1).astype(int)
    assert shades[-1] > shades[size[1] // 2] > shades[0] + 50  # from sure and dark to doubtful and light
    assert (images["uncertainty"][..., 3] == 0)[hole].mean() > 0.95


def test_it_loads_nothing_and_trusts_no_name(scene):
    page = page_of(scene)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("script") == 1 and "b" not in tags and "link" not in tags
    attributes = [found for _, found in page.elements]
    assert all(found.get("src", "data:image/webp;base64,").startswith("data:image/webp;base64,") for found in attributes)
    assert not [found for found in attributes if "href" in found or "onerror" in found]
    text = " ".join(page.said)
    assert NAME in text and '{"a": "<b>"}' in text and "300 x 200 px" in text and "σ²" in text
    assert str(scene[0].parent) not in text
    assert not re.search("https?:", scene[1]["eo"].with_suffix(".swipe.html").read_text("utf-8"))
    (script,) = [part for part in page.said if part.strip().startswith("const find")]
    assert set(re.findall(r'find\("(\w+)"\)', script)) <= {found.get("id") for found in attributes}


@pytest.mark.parametrize(
    ("metres", "label", "share"), [(10, "500 m", 500 / 3000), (0.5, "20 m", 20 / 150), (100, "5 km", 5 / 30)]
)
def test_the_scale_bar_has_a_round_length_of_at_most_a_quarter(scene, metres, label, share):
    page = page_of(scene, metres=metres)
    (bar,) = [attributes for tag, attributes in page.elements if attributes.get("class") == "bar"]
    assert label in page.said and bar["style"] == f"width: {100 * share:.3f}%"


def test_without_a_map_or_a_size_there_is_nothing_to_switch_and_no_bar(scene):
    page = page_of((scene[0], {"eo": scene[1]["eo"]}))
    assert set(dict(page.images())) == {"SAR", "EO, translated"}
    assert not [element for _, element in page.elements if element.get("type") == "checkbox" or element.get("class") == "bar"]
