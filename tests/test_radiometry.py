"""A scene's bands, scale, stretch and nodata: equal to the reader of ordinary images, and measured once."""

import numpy as np
import pytest
import rasterio
from files import save_raster as save
from rasterio.windows import Window

from cdiffset.errors import UserError
from cdiffset.images import read_sar, sar_statistics
from cdiffset.scenes import radiometry
from cdiffset.scenes.geotiff import open_scene
from cdiffset.scenes.radiometry import Radiometry, RadiometryOptions, describe, despeckled, fill, measure, out_of_domain

RNG = np.random.default_rng(0)


def read_with(scene, trained=None, **options) -> Radiometry:
    return measure(scene, RadiometryOptions(**options), trained)[0]


def read(path, window=None, **changes):
    with open_scene(path) as source:
        return read_with(source, **changes).read(source, window or Window(0, 0, source.width, source.height))


@pytest.mark.parametrize(
    "bands, dtype", [(1, "uint8"), (2, "uint8"), (3, "uint8"), (4, "uint8"), (2, "uint16"), (4, "float32"), (3, "uint32")]
)
def test_a_scene_is_read_as_an_ordinary_image_is(tmp_path, bands, dtype):
    factor, top = {"uint8": (1, 255), "uint32": (16_000_000, 4e9)}.get(dtype, (30, 65_535))
    values = (RNG.gamma(2, 60, (bands, 37, 53)) * factor).clip(0, top)
    path = save(tmp_path / "a.tif", values.astype(dtype), photometric="minisblack", alpha="no")
    pixels, valid = read(path)
    np.testing.assert_allclose(pixels, read_sar(path).transpose(2, 0, 1), atol=1e-4)
    assert valid.all()
    part, _ = read(path, Window(10, 5, 20, 30))
    assert np.array_equal(part, pixels[:, 5:35, 10:30])  # the stretch is the scene's, not the window's


def test_scales_bring_power_and_decibels_to_amplitude(tmp_path):
    amplitude = RNG.gamma(2, 60, (1, 40, 40)) + 1
    plain, _ = read(save(tmp_path / "a.tif", amplitude), scale="amplitude")
    for scale, values in (("intensity", amplitude**2), ("db", 20 * np.log10(amplitude))):
        other, _ = read(save(tmp_path / f"{scale}.tif", values), scale=scale)
        np.testing.assert_allclose(other, plain, atol=1e-3)


@pytest.mark.parametrize("stretch", ["fixed:20,70", "percentile:10,35"])
def test_fixed_limits_and_percentiles(tmp_path, stretch):
    values = 2 * np.arange(101.0)
    pixels, _ = read(save(tmp_path / "a.tif", values[None]), stretch=stretch)
    assert np.allclose(pixels[1, 0], np.clip((values - 20) / 50 * 255, 0, 255))


@pytest.mark.parametrize("stretch", ["percentile", "percentile:5,101", "fixed:3,3", "fixed:a,b", "fixed:0,nan", "dataset:1"])
def test_a_stretch_that_makes_no_sense_is_refused(stretch):
    with pytest.raises(UserError, match="--stretch: expected"):
        radiometry.parse_stretch(stretch)


def test_bands_by_name_and_number_and_the_ratio(tmp_path):
    values = RNG.gamma(2, 60, (3, 20, 20)) + 1
    path = save(tmp_path / "a.tif", values, names=("VH", "angle", "vv"))
    with open_scene(path) as source:
        assert read_with(source, bands="VV,1").indexes == (3, 1)
        with pytest.raises(UserError, match=r"no single band 'HH', its bands are 1 \(VH\), 2 \(ANGLE\), 3 \(VV\)"):
            read_with(source, bands="HH")
        with pytest.raises(UserError, match="--channels spacenet6: it takes 4 bands"):
            read_with(source, bands="VV,VH", channels="spacenet6")
    pixels, _ = read(path, bands="VV,VH", channels="ratio", stretch="fixed:0,2")
    np.testing.assert_allclose(pixels[2], np.clip(values[2] / values[0] / 2, 0, 1) * 255, atol=1e-3)


def test_what_is_not_valid_is_left_out_of_statistics_and_filled_within_range(tmp_path):
    values = RNG.uniform(100, 200, (1, 60, 70)).astype(np.float32)
    path = save(tmp_path / "whole.tif", values[:, :40])
    values[:, 40:] = -9999
    broken = values.copy()
    broken[0, 45, :9], broken[0, 50, :9] = np.nan, np.inf
    pixels, valid = read(save(tmp_path / "a.tif", broken, nodata=-9999))
    assert valid[:40].all() and not valid[40:].any()
    np.testing.assert_allclose(pixels[:, :40], read(path)[0], atol=1e-4)
    assert pixels[:, 40:].min() > 60 and pixels[:, 40:].max() < 195  # means of many, no value of its own


def test_filling_continues_a_constant_and_keeps_what_is_valid():
    valid = RNG.uniform(size=(33, 47)) < 0.2
    pixels = np.where(valid, 7.5, np.nan)[None]
    assert np.array_equal(fill(pixels, valid), np.full((1, 33, 47), 7.5))
    assert not fill(pixels, np.zeros_like(valid)).any()
    noise = RNG.normal(size=(3, 33, 47))
    assert np.array_equal(fill(noise, valid)[:, valid], noise[:, valid])


def test_a_scene_without_a_valid_pixel_is_refused_and_one_with_few_is_not(tmp_path, monkeypatch):
    monkeypatch.setattr(radiometry, "SAMPLE_PX", 64)
    monkeypatch.setattr(radiometry, "SAMPLE_SIDE", 4)
    values = np.zeros((1, 64, 64), np.uint16)
    with pytest.raises(UserError, match="not a single valid pixel"):
        read(save(tmp_path / "a.tif", values, nodata=0))
    values[0, 21, 22:24] = 3, 9
    with open_scene(save(tmp_path / "b.tif", values, nodata=0)) as source:
        assert read_with(source, stretch="percentile:0,100").limits == ((3.0, 9.0),)


def test_complex_and_truncated_files_name_the_way_out(tmp_path):
    with pytest.raises(UserError, match=r"complex pixels .*gdal_translate DERIVED_SUBDATASET:AMPLITUDE:a.tif amplitude.tif"):
        read(save(tmp_path / "a.tif", np.zeros((1, 4, 4), np.complex64)))
    path = save(tmp_path / "b.tif", RNG.integers(1, 9, (1, 900, 900)).astype(np.uint16))
    path.write_bytes(path.read_bytes()[:600_000])
    with pytest.raises(UserError, match="truncated or damaged in rows"):
        read(path)


def test_ranges_that_overflow_are_told(tmp_path):
    pixels, _ = read(save(tmp_path / "a.tif", np.array([[[-(2**62), 0, 2**62]]])))
    np.testing.assert_allclose(pixels[0, 0], [0, 127.5, 255])
    with pytest.raises(UserError, match="--scale db: .*beyond -100 to 100 dB"):
        read(save(tmp_path / "b.tif", np.array([[[-1e30, 0, 1e30]]], np.float32)), scale="db")
    with pytest.raises(UserError, match="overflow as --scale dn"):
        read(save(tmp_path / "c.tif", np.array([[[-1e308, 0, 1.7e308]]])))


# ------------------------------------------------------------------------------------------------ scale, limits, speckle
POWER, LEVELS = RNG.gamma(2, 0.1, (40, 40)).astype(np.float32), RNG.gamma(2, 60, (40, 40)).astype(np.float32)


@pytest.mark.parametrize(
    ("values", "named", "scale"),
    [
        (RNG.normal(-12, 5, (40, 40)).astype(np.float32), {}, "db"),
        (RNG.normal(-1200, 300, (40, 40)).astype(np.int16), {}, "dn"),
        (POWER, {}, "intensity"),
        (np.sqrt(RNG.gamma(4, 0.1, (40, 40))).astype(np.float32), {}, "dn"),  # no tail as heavy as that of power
        (LEVELS.astype(np.uint16), {}, "dn"),
        (POWER, {"description": "Sigma0_VV"}, "intensity"),
        (RNG.normal(8, 2, (40, 40)).astype(np.float32), {"description": "Sigma0_VV_dB"}, "db"),
        (LEVELS, {"description": "Amplitude_HH"}, "amplitude"),
        (LEVELS, {"unit": "intensity", "description": "amplitude"}, "intensity"),
        (LEVELS, {"tag": "calibrated to gamma0, linear"}, "intensity"),
    ],
)
def test_scale_auto_decides_by_names_and_by_values_that_can_only_be_decibels(tmp_path, values, named, scale):
    path = save(tmp_path / "a.tif", values, names=[named.get("description", "")])
    with rasterio.open(path, "r+") as target:
        target.units = (named.get("unit", ""),)
        target.update_tags(**({"TIFFTAG_IMAGEDESCRIPTION": named["tag"]} if "tag" in named else {}))
    with open_scene(path) as source:
        told = read_with(source, scale="auto")
        assert told.scale == scale and f"{scale} (auto: {told.scale_reason})" in describe(source, told)
        assert read_with(source).scale == "dn"
        assert told.limits == read_with(source, scale=scale).limits


def test_the_limits_of_the_training_images(tmp_path):
    rng = np.random.default_rng(1)
    images = [rng.gamma(2, 60 + 10 * k, (2, 30, 30)).astype(np.uint16) for k in range(5)]
    statistics = sar_statistics([save(tmp_path / f"{k}.tif", image) for k, image in enumerate(images)])
    pooled = np.concatenate([image.reshape(2, -1) for image in images], 1)
    np.testing.assert_allclose(statistics["limits"], np.percentile(pooled, (1, 99), axis=1).T)
    read_so = np.stack([read_sar(tmp_path / f"{k}.tif") for k in range(5)])
    np.testing.assert_allclose(statistics["pixels"], np.percentile(read_so, (5, 50, 95)))
    assert (statistics["images"], statistics["dtype"]) == (5, "uint16")
    trained = {"sar_statistics": statistics}
    with open_scene(tmp_path / "2.tif") as source:
        assert read_with(source, trained, stretch="dataset").limits == tuple(map(tuple, statistics["limits"]))
        assert out_of_domain(source, read_with(source), None, trained) == []
        for changes, message in (
            ({"scale": "intensity"}, "it knows no --scale intensity"),
            ({"channels": "ratio"}, "--channels ratio"),
            ({"bands": "1"}, "the training images had 2 bands, found 1"),
        ):
            with pytest.raises(UserError, match=message):
                read_with(source, trained, stretch="dataset", **changes)
        with pytest.raises(UserError, match="the checkpoint holds no statistics"):
            read_with(source, {}, stretch="dataset")


def test_statistics_look_at_a_share_of_many_images_and_at_nothing_that_differs(tmp_path):
    paths = [save(tmp_path / f"{k:03}.tif", np.full((1, 4, 4), k, np.uint8)) for k in range(130)]
    statistics = sar_statistics(paths)
    assert statistics["images"] == 44 and statistics["pixels"][1] == 64.5  # each third
    assert statistics["limits"] == [np.percentile(np.repeat(np.arange(0, 130, 3), 16), (1, 99)).tolist()]
    assert sar_statistics([paths[0], save(tmp_path / "deep.tif", np.ones((1, 4, 4), np.uint16))]) is None


def test_the_lee_filter_is_its_formula_and_leaves_structure(tmp_path):
    rng = np.random.default_rng(2)
    looks, side = 4.0, 5
    speckle = rng.gamma(looks, 1 / looks, (90, 90))
    valid = rng.uniform(size=(90, 90)) < 0.9
    intensity = np.where(np.arange(90) < 45, 10.0, 1000.0) * speckle
    got = despeckled(np.where(valid, intensity, 0), valid, side, looks)
    for row, column in ((0, 0), (20, 30), (50, 44), (89, 70)):
        if not valid[row, column]:
            continue
        around = np.s_[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
        values = intensity[around][valid[around]]
        weight = (values.var() - values.mean() ** 2 / looks) / (values.var() * (1 + 1 / looks))
        expected = values.mean() + np.clip(weight, 0, 1) * (intensity[row, column] - values.mean())
        np.testing.assert_allclose(got[row, column], expected, rtol=1e-9)
    for half, level in ((np.s_[:, 5:40], 10), (np.s_[:, 50:85], 1000)):
        inside = got[half][valid[half]]
        assert abs(inside.mean() / level - 1) < 0.03 and inside.std() / inside.mean() < 0.6 * looks**-0.5
    path = save(tmp_path / "a.tif", np.sqrt(intensity)[None].astype(np.float32))
    with open_scene(path) as source:
        filtered = Radiometry((1,), "single", "amplitude", (), despeckle=(side, looks))
        (band,), _ = filtered.scaled(source, Window(7, 9, 50, 40))
        full = despeckled(
            source.read([1], Window(0, 0, 90, 90))[0][0].astype(np.float64) ** 2, np.ones((90, 90), bool), side, looks
        )
    np.testing.assert_allclose(band**2, full[9:49, 7:57], rtol=1e-9)


def test_multilooking_is_the_mean_intensity_of_valid_pixels(tmp_path):
    rng = np.random.default_rng(3)
    amplitude, valid = rng.uniform(1, 9, (40, 30)), rng.uniform(size=(40, 30)) < 0.8
    path = save(tmp_path / "a.tif", np.where(valid, amplitude, np.nan)[None].astype(np.float32))
    with open_scene(path) as source:
        (band,), found = Radiometry((1,), "single", "amplitude", (), despeckle=(5, None)).scaled(source, Window(0, 0, 30, 40))
    assert (found == valid).all() and radiometry.parse_despeckle("multilook:5") == (5, None)
    for row, column in np.argwhere(valid)[::50]:
        around = np.s_[max(0, row - 2) : row + 3, max(0, column - 2) : column + 3]
        expected = np.sqrt((amplitude[around][valid[around]] ** 2).mean())
        assert band[row, column] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("text", ["lee", "lee:4,1", "lee:33,1", "lee:5,0", "boxcar:5,1", "lee:5,1.2.3", "multilook:5,2"])
def test_a_filter_that_makes_no_sense_is_refused(text):
    with pytest.raises(UserError, match="--despeckle: expected lee:SIZE,LOOKS or multilook:SIZE"):
        radiometry.parse_despeckle(text)


def test_a_colour_table_is_refused(tmp_path):
    path = save(tmp_path / "a.tif", np.ones((1, 4, 4), np.uint8), photometric="palette")
    with rasterio.open(path, "r+") as target:
        target.write_colormap(1, {0: (0, 0, 0), 1: (9, 200, 30)})
    with pytest.raises(UserError, match="a colour table, .*-expand gray"):
        read(path)
