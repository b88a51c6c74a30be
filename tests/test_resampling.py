"""GSD of scenes, and resampling: closed forms, GDAL's own warper, windows and strips against the whole."""

import numpy as np
import pytest
import rasterio.warp
from files import save_raster as save
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from rasterio.transform import Affine
from rasterio.windows import Window

from cdiffset.errors import UserError
from cdiffset.scenes import radiometry as radiometry_module
from cdiffset.scenes.geotiff import open_scene
from cdiffset.scenes.radiometry import Radiometry, RadiometryOptions, chosen_pixel_ratio
from cdiffset.scenes.resampling import apply_weights, gsd_of, pixel_ratio_to, resample_strips, resampled_size, weights

RNG = np.random.default_rng(0)


def resample(values: np.ndarray, steps: tuple[float, float]) -> np.ndarray:
    size = resampled_size(values.shape, steps)
    (_, down), (_, along) = (weights(0, n, step, m) for n, step, m in zip(size, steps, values.shape, strict=True))
    return apply_weights(down, along, values)


# ------------------------------------------------------------------------------------------------------------------ GSD
TURN = Affine.translation(5e5, 5e6) @ Affine.rotation(17) @ Affine.scale(3, -2)
POINTS = [GroundControlPoint(row, col, 5e5 + 4 * col, 5e6 - 3 * row) for row in (0, 50) for col in (0, 80)]


@pytest.mark.parametrize(
    ("georeference", "expected"),
    [
        ({"crs": "EPSG:32631", "transform": Affine(10, 0, 5e5, 0, -10, 5.7e6)}, (10, 10)),
        ({"crs": "EPSG:32631", "transform": TURN}, (2, 3)),
        ({"crs": "EPSG:2263", "transform": Affine(3, 0, 9e5, 0, -3, 2e5)}, (0.9144018, 0.9144018)),  # US survey feet
        ({"crs": "EPSG:32631", "gcps": POINTS}, (3, 4)),
        ({"crs": "EPSG:4326", "transform": Affine(1e-4, 0, 4, 0, -1e-4, 60 + 25e-4)}, (11.14123, 5.57998)),  # geodesic, WGS 84
        ({"transform": Affine(10, 0, 0, 0, -10, 0)}, None),
        ({"crs": "EPSG:32631"}, None),
        ({}, None),
    ],
)
def test_the_gsd_is_that_of_the_ground(tmp_path, georeference, expected):
    with open_scene(save(tmp_path / "a.tif", np.ones((50, 80), np.uint8), **georeference)) as source:
        assert gsd_of(source) == (None if expected is None else pytest.approx(expected, rel=6e-4))  # UTM's scale: 0.9996


MERCATOR = {"crs": "EPSG:3857", "transform": Affine(18.5, 0, 4e5, 0, -18.5, 7.76e6)}  # 57 degrees north
POLAR = {"crs": "EPSG:3413", "transform": Affine(40, 0, -9e5, 0, -40, -2.6e6)}
RPCS = RPC(
    height_off=0, height_scale=1, lat_off=50, lat_scale=0.005, long_off=4, long_scale=0.005, line_off=25, line_scale=25,
    samp_off=40, samp_scale=40, line_num_coeff=[0, 0, -1] + 17 * [0], line_den_coeff=[1] + 19 * [0],
    samp_num_coeff=[0, 1] + 18 * [0], samp_den_coeff=[1] + 19 * [0],
)  # fmt: skip


@pytest.mark.parametrize("georeference", [MERCATOR, POLAR, {"crs": "EPSG:32631", "transform": TURN}, {"rpcs": RPCS}])
def test_the_gsd_is_the_geodesic_distance_of_neighbouring_pixels(tmp_path, georeference):
    """Against PROJ's own geodesics; RPCs: 0.0002 degrees down, 0.000125 along, at 50 degrees north."""
    pyproj = pytest.importorskip("pyproj")
    if "rpcs" in georeference:
        corners = [[4, 50.0001], [4, 49.9999], [3.9999375, 50], [4.0000625, 50]]
    else:
        to_degrees = pyproj.Transformer.from_crs(georeference["crs"], "EPSG:4326", always_xy=True)
        places = [(40, 24.5), (40, 25.5), (39.5, 25), (40.5, 25)]
        corners = [to_degrees.transform(*(georeference["transform"] @ place)) for place in places]
    geod = pyproj.Geod(ellps="WGS84")
    expected = [geod.inv(*corners[k], *corners[k + 1])[2] for k in (0, 2)]
    with open_scene(save(tmp_path / "a.tif", np.ones((50, 80), np.uint8), **georeference)) as source:
        assert gsd_of(source) == pytest.approx(expected, rel=1e-5)
    if georeference is MERCATOR:
        assert expected == pytest.approx([10.09, 10.06], rel=0.01)


def test_steps_come_from_the_option_the_checkpoint_and_the_file(tmp_path):
    utm = {"crs": "EPSG:32631", "transform": Affine(4, 0, 5e5, 0, -4, 5.7e6)}
    with open_scene(save(tmp_path / "a.tif", np.ones((50, 80), np.uint8), **utm)) as source:
        assert chosen_pixel_ratio(source, RadiometryOptions(), 10) == (1, 1)
        assert chosen_pixel_ratio(source, RadiometryOptions(resample_gsd=True), 10) == pytest.approx((2.5, 2.5), rel=1e-3)
        assert chosen_pixel_ratio(source, RadiometryOptions(resample_gsd=True), 4.05) == (1, 1)
        assert chosen_pixel_ratio(source, RadiometryOptions(resample_gsd=2.0, gsd=5.0), None) == (0.4, 0.4)
        with pytest.raises(UserError, match="--resample-gsd: the checkpoint does not record"):
            chosen_pixel_ratio(source, RadiometryOptions(resample_gsd=True), None)
        with pytest.raises(UserError, match="px when resampled to 0.0001 m, .* is the GSD right"):
            chosen_pixel_ratio(source, RadiometryOptions(resample_gsd=0.0001), None)
    with open_scene(save(tmp_path / "b.tif", np.ones((50, 80), np.uint8))) as source:
        with pytest.raises(UserError, match="b.tif does not record its GSD .* --gsd METRES"):
            chosen_pixel_ratio(source, RadiometryOptions(resample_gsd=True), 10)
        assert chosen_pixel_ratio(source, RadiometryOptions(resample_gsd=True, gsd=5.0), 10) == (2, 2)


# ----------------------------------------------------------------------------------------------------------- resampling
def test_a_step_of_one_changes_nothing_and_a_constant_stays_one():
    values = RNG.normal(size=(2, 13, 7))
    _, same = weights(0, 13, 1.0, 13)
    assert np.array_equal(apply_weights(same, weights(0, 7, 1.0, 7)[1], values), values)
    for steps in ((0.3, 0.7), (2.5, 1.3), (40.0, 9.0)):
        assert np.abs(resample(np.full((13, 7), 3.5), steps) - 3.5).max() < 1e-12


@pytest.mark.parametrize("step", [0.4, 2.5, 7.0])
def test_a_ramp_is_sampled_at_the_centres_of_the_pixels(step):
    ramp = np.tile(np.arange(70.0), (3, 1))
    centres = (np.arange(resampled_size((70, 70), (step, step))[0]) + 0.5) * step - 0.5
    inner = (centres >= max(step, 1)) & (centres <= 69 - max(step, 1))
    assert inner.sum() >= 7
    np.testing.assert_allclose(resample(ramp, (1.0, step))[0][inner], centres[inner], atol=1e-9 if step < 1 else 0.5 / step)


@pytest.mark.parametrize("step", [0.25, 2.5, 5.0])
def test_resampling_is_what_gdal_makes_of_it(step):
    values = RNG.gamma(2, 30, (60, 40)).astype(np.float64)
    ours = resample(values, (step, step))
    theirs = np.zeros_like(ours)
    rasterio.warp.reproject(
        values, theirs, src_transform=Affine.identity(), dst_transform=Affine.scale(step), src_crs="EPSG:32631",
        dst_crs="EPSG:32631", resampling=rasterio.warp.Resampling.bilinear, tolerance=0,
    )  # fmt: skip
    border = int(np.ceil(1 / min(step, 1))) + 1
    inner = np.s_[border:-border, border:-border]
    np.testing.assert_allclose(ours[inner], theirs[inner], rtol=1e-5)


@pytest.mark.parametrize(
    "steps, despeckle", [((0.3, 0.45), (5, 3.0)), ((2.5, 3.1), None), ((2.5, 3.1), (5, 3.0)), ((12.0, 0.5), None)]
)
def test_a_window_is_the_same_as_that_part_of_the_whole(tmp_path, monkeypatch, steps, despeckle):
    band = RNG.gamma(2, 30, (61, 83)).astype(np.float32)
    band[20:44, 50:70] = np.nan
    radiometry = Radiometry((1,), "single", "amplitude", ((3.0, 200.0),), steps, despeckle)
    with open_scene(save(tmp_path / "a.tif", band)) as source:
        height, width = radiometry.size(source)
        whole, valid = radiometry.scaled(source, Window(0, 0, width, height))
        monkeypatch.setattr(radiometry_module, "READ_PX", 40)  # parts of windows as well
        for top, left in ((0, 0), (height // 3, width // 2), (height - 2, width - 3)):
            rows, columns = min(9, height - top), min(11, width - left)
            (part,), there = radiometry.scaled(source, Window(left, top, columns, rows))
            assert np.array_equal(part, whole[0][top : top + rows, left : left + columns])
            assert np.array_equal(there, valid[top : top + rows, left : left + columns])
    assert 0.8 < valid.mean() < 1


def test_looks_are_averaged_as_intensity_without_what_is_not_valid(tmp_path):
    amplitude = RNG.gamma(2, 30, (8, 8)).astype(np.float32)
    amplitude[:, 4:] = 0
    with open_scene(save(tmp_path / "a.tif", amplitude, nodata=0)) as source:
        (got,), valid = Radiometry((1,), "single", "amplitude", (), (8.0, 2.0)).scaled(source, Window(0, 0, 4, 1))
    down = np.maximum(0, 1 - np.abs(np.arange(8) - 3.5) / 8)
    along = np.maximum(0, 1 - np.abs(np.arange(8) - (np.arange(4)[:, None] * 2 + 0.5)) / 2)
    shares = along[:, None, :] * down[:, None]  # [4,8,8]
    power, known = amplitude.astype(np.float64) ** 2, amplitude > 0
    expected = np.sqrt((shares * power).sum((1, 2)) / np.maximum((shares * known).sum((1, 2)), 1e-9))
    share = (shares * known).sum((1, 2)) / shares.sum((1, 2))
    assert valid[0].tolist() == (share >= 0.5).tolist() == [True, True, False, False]
    np.testing.assert_allclose(got[0], np.where(valid[0], expected, 0), rtol=1e-12)


@pytest.mark.parametrize(
    "steps, rows", [((0.3, 0.45), 1), ((0.3, 0.45), 16), ((2.5, 3.1), 16), ((1.0, 6.0), 1000), ((1 / 7, 1 / 5), 16)]
)
def test_strips_become_the_whole_resampled(steps, rows):
    values = RNG.normal(size=(2, 47, 31)).astype(np.float32)
    wanted = resampled_size((47, 31), steps)
    (_, down), (_, along) = (weights(0, n, step, m) for n, step, m in zip(wanted, steps, (47, 31), strict=True))
    padded = np.pad(values, ((0, 0), (0, 3), (0, 2)), constant_values=99)  # beyond the size: never looked at
    cuts = [0, 1, 2, 19, 40, 48, 50]
    strips = ((top, padded[:, top:stop]) for top, stop in zip(cuts, cuts[1:], strict=False))
    got = list(resample_strips(strips, (47, 31), steps, wanted, rows))
    assert [top for top, _ in got] == np.cumsum([0] + [strip.shape[1] for _, strip in got])[:-1].tolist()
    assert all(strip.shape[1] <= rows for _, strip in got)
    np.testing.assert_allclose(np.concatenate([s for _, s in got], 1), apply_weights(down, along, values), atol=1e-6)


def test_steps_and_sizes():
    assert pixel_ratio_to((2.0, 4.0), 4.0) == (2.0, 1.0) and pixel_ratio_to((10.1, 9.9), 10) == (1.0, 1.0)
    assert resampled_size((100, 101), (2.5, 2.0)) == (40, 51) and resampled_size((3, 3), (0.1, 50.0)) == (30, 1)
