"""Georeferenced files as they come: sidecars, scales, nodata, formats, separate polarisations, and what their outputs say."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.transform import Affine
from rasterio.windows import Window
from test_translate import command, save_checkpoint

from cdiffset.errors import UserError
from cdiffset.images import read_sar
from cdiffset.scenes.geotiff import find_sources, group_polarisations, is_scene, open_scene, without_polarisation
from cdiffset.scenes.radiometry import RadiometryOptions, measure, read_whole, shared_stretch

RNG = np.random.default_rng(0)
UTM = {"crs": "EPSG:32631", "transform": Affine(10, 0, 500_000, 0, -10, 5_700_000)}
DB = RNG.normal(-12, 4, (40, 52)).astype(np.float32)
POWER = RNG.gamma(4, 0.02, (40, 52)).astype(np.float32)

pytestmark = pytest.mark.filterwarnings("ignore::rasterio.errors.NotGeoreferencedWarning")


def save(path: Path, *bands: np.ndarray, names=(), driver="GTiff", **profile) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = bands[0].shape
    size = {"driver": driver, "count": len(bands), "height": height, "width": width, "dtype": bands[0].dtype}
    with rasterio.open(path, "w", **size, **profile) as target:
        target.write(np.stack(bands))
        for index, name in enumerate(names, 1):
            target.set_band_description(index, name)
    return path


def read(path, **options):
    """=> (pixels [3, H, W], valid [H, W], notes)"""
    with open_scene(path) as scene:
        radiometry, notes = measure(scene, RadiometryOptions(**options))
        return *radiometry.read(scene, Window(0, 0, scene.width, scene.height)), notes


@pytest.fixture(scope="module")
def checkpoint(tiny_base, tmp_path_factory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("rasters"), tiny_base, 5)


def translate(checkpoint, sar: Path, out: Path, *further) -> int:
    given = ["--sar-dir", sar, "--output-dir", out / "eo", "--variance-dir", out / "variance", "--checkpoint", checkpoint]
    return command.main([str(word) for word in [*given, "--num-inference-steps", "1", *further]])


# -------------------------------------------------------------------------------------------------- which file is a scene
@pytest.mark.parametrize(
    ("georeference", "expected"),
    [
        (UTM, True),
        ({"transform": Affine(1, 0, 5, 0, -1, 5)}, True),
        ({"crs": "EPSG:4326", "gcps": [GroundControlPoint(r, c, c, -r) for r in (0, 9) for c in (0, 9)]}, True),
        ({}, False),
    ],
)
def test_a_georeferenced_tiff_of_any_size_is_a_scene(tmp_path, georeference, expected):
    assert is_scene(save(tmp_path / "a.tif", DB, **georeference), 1024) == expected
    assert is_scene(tmp_path / "a.tif", 51)


def test_a_world_file_makes_a_scene_of_a_picture_and_of_a_tiff(tmp_path, checkpoint):
    Image.fromarray(RNG.integers(0, 255, (24, 32), dtype=np.uint8)).save(tmp_path / "sar.png")
    save(tmp_path / "b.tif", DB)
    assert not is_scene(tmp_path / "sar.png", 1024) and not is_scene(tmp_path / "b.tif", 1024)
    for name in ("sar.pgw", "b.tfw"):
        (tmp_path / name).write_text("10\n0\n0\n-10\n500005\n5699995\n")
    (tmp_path / "sar.prj").write_text(rasterio.CRS.from_epsg(32631).to_wkt("WKT1_ESRI"))
    assert is_scene(tmp_path / "sar.png", 1024) and is_scene(tmp_path / "b.tif", 1024)
    assert translate(checkpoint, tmp_path / "sar.png", tmp_path / "out") == 0
    with rasterio.open(tmp_path / "out/eo/sar.tif") as result:
        assert result.transform == UTM["transform"] and result.crs.to_epsg() == 32631


def test_world_files_in_capitals_and_grey_tables(tmp_path):
    """Every 8-bit BMP has a colour table; one of greys is no palette."""
    grey = Image.fromarray(RNG.integers(0, 255, (24, 32), dtype=np.uint8))
    for name, world in (("A.JPG", "A.JGW"), ("b.bmp", "b.bpw")):
        grey.save(tmp_path / name)
        (tmp_path / world).write_text("10\n0\n0\n-10\n500005\n5699995\n")
        (tmp_path / name).with_suffix(".PRJ").write_text(rasterio.CRS.from_epsg(32631).to_wkt("WKT1_ESRI"))
        assert is_scene(tmp_path / name, 1024)
        with open_scene(tmp_path / name) as scene:
            assert scene.transform == UTM["transform"] and scene.crs.to_epsg() == 32631
            assert np.abs(scene.read([1], Window(0, 0, 32, 24))[0][0].astype(int) - np.array(grey)).mean() < 8  # JPEG


def test_a_picture_with_a_mask_beside_it_is_a_scene_and_what_a_plain_tiff_loses_is_said(tmp_path, checkpoint, capsys):
    grey = RNG.integers(1, 255, (24, 32), dtype=np.uint8)
    (tmp_path / "sar").mkdir()
    Image.fromarray(grey).save(tmp_path / "sar/a.png")
    valid = np.ones((24, 32), np.uint8) * 255
    valid[:9] = 0
    save(tmp_path / "mask.tif", valid).rename(tmp_path / "sar/a.png.msk")
    with rasterio.open(tmp_path / "sar/a.png.msk", "r+", driver="GTiff") as target:
        target.update_tags(INTERNAL_MASK_FLAGS_1="2")
    save(tmp_path / "sar/b.tif", np.where(valid > 0, grey, 0).astype(np.uint8), nodata=0)
    assert translate(checkpoint, tmp_path / "sar", tmp_path / "out") == 0
    with rasterio.open(tmp_path / "out/eo/a.tif") as result:
        assert np.array_equal(result.read(4), valid)
    assert (tmp_path / "out/eo/b.png").is_file()
    assert re.search("note: 1 images hold pixels that are no data .*--tile 1024, .*b.tif", capsys.readouterr().out)


def test_the_cache_of_gdal_is_of_megabytes(tmp_path):
    with open_scene(save(tmp_path / "a.tif", DB)):
        assert 2**26 <= rasterio.env.getenv()["GDAL_CACHEMAX"] <= 2**30


@pytest.mark.parametrize("name, driver", [("a.vrt", None), ("a.jp2", "JP2OpenJPEG"), ("a.img", "ENVI"), ("a.nc", "netCDF"),
                                           ("a.ntf", "NITF"), ("a.bin", "ENVI")])  # fmt: skip
def test_whatever_gdal_opens_is_read_as_a_scene(tmp_path, checkpoint, name, driver):
    pixels = RNG.integers(1, 255, (24, 32), dtype=np.uint8)
    if driver is None:
        save(tmp_path / "source.tif", pixels, **UTM)
        (tmp_path / name).write_text(
            '<VRTDataset rasterXSize="32" rasterYSize="24"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
            '<SourceFilename relativeToVRT="1">source.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
        )
    else:
        try:
            save(tmp_path / name, pixels, driver=driver, **({"QUALITY": 100, "REVERSIBLE": "YES"} if name == "a.jp2" else {}))
        except rasterio.errors.RasterioError as error:
            pytest.skip(f"this GDAL cannot write {driver} ({error})")
    with open_scene(tmp_path / name) as scene:
        assert np.array_equal(scene.read([1], Window(0, 0, 32, 24))[0][0], pixels)
    assert translate(checkpoint, tmp_path / name, tmp_path / "out") == 0
    assert (tmp_path / "out/eo/a.tif").is_file()
    listed = find_sources(tmp_path, [])
    assert (Path(name) in listed) == (name != "a.bin")  # only asked for by name


@pytest.mark.parametrize("suffix", [".bmp", ".gif", ".png", ".tif", ".webp"])
def test_a_picture_that_is_a_vrt_reads_no_other_file(tmp_path, checkpoint, suffix):
    save(tmp_path / "secret.tif", RNG.integers(1, 255, (24, 32), dtype=np.uint8), **UTM)
    disguised = tmp_path / f"a{suffix}"
    disguised.write_text(
        '<VRTDataset rasterXSize="32" rasterYSize="24"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>'
        '<SourceFilename relativeToVRT="1">secret.tif</SourceFilename></SimpleSource></VRTRasterBand></VRTDataset>'
    )
    with pytest.raises(UserError, match=f"a{suffix}: unreadable"):
        translate(checkpoint, disguised, tmp_path / "out", "--scale", "amplitude")


def test_what_cannot_be_read_is_told_before_networks_load(tmp_path, checkpoint, monkeypatch, capsys):
    monkeypatch.setattr("cdiffset.inference.translator.read_weights", lambda *_: pytest.fail("weights were read"))
    save(tmp_path / "complex.tif", np.ones((8, 8), np.complex64), **UTM)
    (tmp_path / "cut.jp2").write_bytes(b"no raster")
    with pytest.raises(UserError, match="gdal_translate DERIVED_SUBDATASET:AMPLITUDE:complex.tif amplitude.tif"):
        translate(checkpoint, tmp_path / "complex.tif", tmp_path / "out")
    with pytest.raises(UserError, match="cut.jp2: unreadable"):
        translate(checkpoint, tmp_path / "cut.jp2", tmp_path / "out")
    (tmp_path / "notes.txt").write_text("no raster")
    with pytest.raises(UserError, match="notes.txt: unreadable"):
        translate(checkpoint, tmp_path / "notes.txt", tmp_path / "out")


def test_files_of_several_rasters_name_them(tmp_path):
    frames = [Image.fromarray(np.full((8, 9), k, np.uint8)) for k in range(2)]
    frames[0].save(tmp_path / "pages.tif", save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match="2 rasters in one file, .*GTIFF_DIR:1:"), open_scene(tmp_path / "pages.tif"):
        pass


def test_the_recipe_for_complex_files_keeps_their_gcps(tmp_path):
    points = [GroundControlPoint(r, c, 4 + c / 1e3, 50 - r / 1e3) for r in (0, 40) for c in (0, 52)]
    save(tmp_path / "in.tif", (DB + 3j).astype(np.complex64), gcps=points, crs="EPSG:4326")
    with rasterio.open(f"DERIVED_SUBDATASET:AMPLITUDE:{tmp_path / 'in.tif'}") as amplitude:  # what gdal_translate copies
        np.testing.assert_allclose(amplitude.read(1), np.hypot(DB, 3), rtol=1e-6)
        assert len(amplitude.gcps[0]) == 4


# ------------------------------------------------------------------------------------------------------ what is data
def test_masks_beside_the_file_count(tmp_path):
    path = save(tmp_path / "a.tif", POWER, **UTM)
    valid = np.ones(POWER.shape, bool)
    valid[:, :9] = False
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=False), rasterio.open(path, "r+") as target:
        target.write_mask(valid)
    assert (tmp_path / "a.tif.msk").is_file()
    assert np.array_equal(read(path)[1], valid)
    plain = read_sar(path)
    low, high = np.percentile(POWER[valid].astype(float), (1, 99))
    np.testing.assert_allclose(plain[..., 0][valid], (np.clip(POWER[valid], low, high) - low) / (high - low) * 255, atol=1e-3)


def test_nodata_in_aux_xml_counts(tmp_path):
    path = save(tmp_path / "a.tif", np.where(POWER > 0.1, np.float32(5), POWER), **UTM)
    (tmp_path / "a.tif.aux.xml").write_text(
        '<PAMDataset><PAMRasterBand band="1"><NoDataValue>5</NoDataValue></PAMRasterBand></PAMDataset>'
    )
    assert np.array_equal(read(path)[1], POWER <= 0.1)


def test_scales_and_offsets_apply_before_anything_is_judged(tmp_path):
    stored = np.round(DB * 100).astype(np.int16)
    path = save(tmp_path / "a.tif", stored, **UTM)
    with rasterio.open(path, "r+") as target:
        target.scales, target.offsets = (0.01,), (1.5,)
    with open_scene(path) as scene:
        radiometry, _ = measure(scene, RadiometryOptions(scale="auto"))
        limits = np.percentile(10 ** ((stored * 0.01 + 1.5) / 20), (1, 99))
        assert radiometry.scale == "db"
        np.testing.assert_allclose(radiometry.limits, [limits], rtol=1e-6)
    values = stored * 0.01 + 1.5
    low, high = np.percentile(values, (1, 99))
    np.testing.assert_allclose(read_sar(path)[..., 0], (np.clip(values, low, high) - low) / (high - low) * 255, atol=1e-3)


def test_undeclared_fill_is_data_and_a_note_proposes_nodata(tmp_path):
    filled = DB.copy()
    filled[:, :12] = -9999
    path = save(tmp_path / "a.tif", filled, **UTM)
    _, valid, notes = read(path)
    assert (
        valid.all() and "23% of the values are exactly -9999, the smallest: if that means no data, give --nodata -9999" in notes
    )
    pixels, valid, notes = read(path, scale="auto", nodata=-9999)
    assert np.array_equal(valid, filled > -9999) and not notes
    clean = read(save(tmp_path / "b.tif", DB[:, 12:], **UTM), scale="db")[0]
    np.testing.assert_allclose(pixels[:, :, 12:], clean, atol=1e-3)
    for scale, asked in (("db", "--scale db:"), ("auto", "--scale auto, which takes them as db:")):
        with pytest.raises(UserError, match=f"{asked} .*23% of the values are beyond .*give --nodata -9999"):
            read(path, scale=scale)


@pytest.mark.parametrize("value", [0, 255])
def test_8_bit_zeros_and_saturation_are_data(tmp_path, value):
    pixels = RNG.integers(1, 255, (40, 50), dtype=np.uint8)
    pixels[:4] = value
    path = save(tmp_path / "a.tif", pixels, **UTM)
    assert read(path)[1].all() and f"--nodata {value}" in read(path)[2][0]
    assert np.array_equal(read(path, nodata=value)[1], pixels != value)


def test_a_blank_scene_is_refused(tmp_path, checkpoint):
    blank = save(tmp_path / "a.tif", np.zeros((2000, 1500), np.uint8), sparse_ok=True, tiled=True, **UTM)
    with pytest.raises(UserError, match="without contrast, every valid pixel is 0"):
        read(blank)
    with pytest.raises(UserError, match="without contrast as it is stretched: values of .* all become 0 of 255"):
        read(save(tmp_path / "b.tif", POWER), stretch="fixed:100,200")
    island = np.zeros((3000, 3000), np.uint8)
    island[2900:2910, 2900:2910] = RNG.integers(0, 255, (10, 10))
    assert read(save(tmp_path / "c.tif", island, **UTM))[0].any()  # however little there is to see


# ------------------------------------------------------------------------------------------------------ bands and scales
def test_auxiliary_bands_are_left_out_by_name(tmp_path):
    angle = RNG.uniform(30, 45, DB.shape).astype(np.float32)
    path = save(tmp_path / "a.tif", DB, DB - 6, angle, angle, names=("VV", "VH", "angle", "localIncidenceAngle"), **UTM)
    with open_scene(path) as scene:
        radiometry, notes = measure(scene, RadiometryOptions())
    assert radiometry.indexes == (1, 2)
    assert "auxiliary bands left out: 3 (angle), 4 (localIncidenceAngle); --bands chooses others" in notes


def test_a_band_dropped_as_alpha_is_said(tmp_path):
    bands = RNG.integers(1, 255, (4, 20, 30), dtype=np.uint8)
    path = save(tmp_path / "a.tif", *bands, photometric="RGB", alpha="yes", **UTM)
    assert "band 4 is declared as alpha" in read(path)[2][0]


@pytest.mark.parametrize(
    ("values", "name", "scale", "reason"),
    [
        (DB, "Gamma0_VV", "db", "negative, as decibels are"),
        (DB, "Amplitude_VV", "db", "negative, as decibels are"),
        (POWER, "Sigma0_VV_db", "dn", "no value is negative"),
        (DB, "Sigma0_VV_db", "db", "description"),
        (POWER, "", "intensity", "99th percentile 2.8 times the median"),
        (np.sqrt(POWER), "", "dn", "nothing names another"),
        (RNG.normal(0, 900, (40, 52)).astype(np.float32), "Gamma0_VV", "dn", "of the values are negative"),
    ],
)
def test_numbers_are_believed_before_words(tmp_path, values, name, scale, reason):
    path = save(tmp_path / "a.tif", values, names=(name,), **UTM)
    with open_scene(path) as scene:
        radiometry, _ = measure(scene, RadiometryOptions(scale="auto"))
    assert radiometry.scale == scale and reason in radiometry.scale_reason


@pytest.mark.parametrize(
    ("values", "scale", "fault"),
    [
        (POWER, "db", "no value is negative, and 98 % of them lie within"),
        (POWER * 1e4, "db", "beyond -100 to 100 dB"),
        (DB, "intensity", "100% of the values are negative"),
        (DB, "amplitude", "100% of the values are negative"),
    ],
)
def test_a_scale_that_the_numbers_contradict_is_refused(tmp_path, values, scale, fault):
    with pytest.raises(UserError, match=f"--scale {scale}: .*{re.escape(fault)}"):
        read(save(tmp_path / "a.tif", values, **UTM), scale=scale)


@pytest.mark.parametrize("options", [{"despeckle": "lee:3,4"}, {"despeckle": "multilook:3"}])
def test_filters_of_intensities_refuse_decibels(tmp_path, options):
    path = save(tmp_path / "a.tif", DB, **UTM)
    with pytest.raises(UserError, match="--despeckle: .*negative values .*give --scale db"):
        read(path, **options)
    filtered, plain = read(path, scale="db", **options)[0], read(path, scale="db")[0]
    assert np.corrcoef(filtered[0].ravel(), plain[0].ravel())[0, 1] > 0.3


# ------------------------------------------------------------------------------------------- several files, one scene
def test_polarisations_in_separate_files_are_one_scene():
    names = [
        "OPERA_L2_RTC-S1_T137-292323-IW1_20250102T015911Z_S1A_30_v1.0_VH.tif",
        "OPERA_L2_RTC-S1_T137-292323-IW1_20250102T015911Z_S1A_30_v1.0_VV.tif",
        "x/S1A_IW_20220104T170558_DVP_RTC30_G_gpuned_ABCD_VV.tif",
        "x/S1A_IW_20220104T170558_DVP_RTC30_G_gpuned_ABCD_VH.tif",
        "s1a-iw-grd-vv-20220104t170558-20220104t170623-041314-04e951-001.tiff",
        "s1a-iw-grd-vh-20220104t170558-20220104t170623-041314-04e951-002.tiff",
        "lonely_VV.tif",
        "scene.tif",
    ]
    found = group_polarisations([Path(name) for name in names], ["VV", "VH"])
    assert {str(name): [str(file) for file in files] for name, files in found.items()} == {
        names[1].replace("VV", "VV_VH"): [names[1], names[0]],
        names[2].replace("VV", "VV_VH"): [names[2], names[3]],
        names[4].replace("-vv-", "-VV_VH-"): [names[4], names[5]],
        "lonely_VV.tif": ["lonely_VV.tif"],
        "scene.tif": ["scene.tif"],
    }


def test_separate_polarisations_are_translated_as_their_stack_is(tmp_path, checkpoint, capsys):
    for name, band in (("VV", DB), ("VH", DB - 6 + RNG.normal(0, 1, DB.shape).astype(np.float32)), ("mask", np.ones_like(DB))):
        save(tmp_path / f"sar/p_{name}.tif", band, **UTM)
    with open_scene(tmp_path / "sar/p_VH.tif") as scene:
        vh = scene.read([1], Window(0, 0, 52, 40))[0][0]
    save(tmp_path / "one/p_VV_VH.tif", DB, vh, names=("VV", "VH"), **UTM)
    given = ["--bands", "VV,VH", "--channels", "ratio", "--scale", "db"]
    assert translate(checkpoint, tmp_path / "sar", tmp_path / "out", *given) == 0
    assert "1 files are left out by their names, as auxiliary or of another polarisation: p_mask.tif" in capsys.readouterr().out
    assert translate(checkpoint, tmp_path / "sar/p_VH.tif", tmp_path / "file", *given) == 0  # its product's others beside it
    assert translate(checkpoint, tmp_path / "one", tmp_path / "stack", *given) == 0
    eo = []
    for out in ("out", "file", "stack"):
        with rasterio.open(tmp_path / out / "eo/p_VV_VH.tif") as result:
            eo.append(result.read())
            assert json.loads(result.tags()["CDIFFSET_STRETCH"])["channels"] == "ratio"
    assert np.array_equal(eo[0], eo[1]) and np.array_equal(eo[0], eo[2])


def test_one_polarisation_of_a_folder_of_products_is_chosen_by_name(tmp_path, capsys):
    for product in "ab":
        for name in ("VV", "VH"):
            save(tmp_path / f"{product}_{name}.tif", DB, **UTM)
    found = find_sources(tmp_path, ["VH"])
    assert found == {Path("a_VH.tif"): (Path("a_VH.tif"),), Path("b_VH.tif"): (Path("b_VH.tif"),)}
    assert "2 files are left out by their names" in capsys.readouterr().out
    with open_scene(tmp_path / "a_VH.tif") as scene:
        assert measure(scene, RadiometryOptions(bands="vh"))[0].indexes == (1,)


@pytest.mark.parametrize(
    ("name", "without"), [("a__b_VV.tif", "a__b.tif"), ("VV_a.tif", "a.tif"), ("x/s1a-iw-vv-2022.tiff", "x/s1a-iw-2022.tiff")]
)
def test_a_name_without_its_polarisation(name, without):
    assert without_polarisation(Path(name)) == Path(without)


def test_polarisations_on_different_grids_are_refused(tmp_path):
    files = [save(tmp_path / "p_VV.tif", DB, **UTM), save(tmp_path / "p_VH.tif", DB[1:], **UTM)]
    with pytest.raises(UserError, match="lie on different grids"), open_scene(files):
        pass


def test_a_folder_shares_one_stretch(tmp_path, checkpoint):
    scenes = [save(tmp_path / f"sar/{k}.tif", POWER * 5**k, **UTM) for k in range(3)]
    stretch = shared_stretch([[path] for path in scenes], RadiometryOptions())
    pooled = np.concatenate([(POWER * 5**k).ravel() for k in range(3)]).astype(float)
    np.testing.assert_allclose([float(n) for n in stretch[6:].split(",")], np.percentile(pooled, (1, 99)), rtol=1e-6)
    assert translate(checkpoint, tmp_path / "sar", tmp_path / "out", "--stretch", "folder") == 0
    limits = set()
    for path in scenes:
        with rasterio.open(tmp_path / "out/eo" / path.name) as result:
            limits.add(str(json.loads(result.tags()["CDIFFSET_STRETCH"])["limits"]))
    assert len(limits) == 1


# ------------------------------------------------------------------------------------------------------ outputs
@pytest.mark.parametrize(
    ("name", "tags", "acquired"),
    [
        ("S1A_IW_GRDH_1SDV_20220104T170558_20220104T170623_041314.tif", {}, "2022-01-04T17:05:58"),
        ("s1a-iw1-slc-vv-20220104t170558-20220104t170623-041314.tif", {}, "2022-01-04T17:05:58"),
        ("OPERA_L2_RTC-S1_T137_20250102T015911Z_20250102T190143Z_S1A_30_v1.0_VV.tif", {}, "2025-01-02T01:59:11"),
        ("2023-04-12-14-05-33_UMBRA-05_GEC.tif", {}, "2023-04-12T14:05:33"),
        ("CAPELLA_C02_SM_GEO_HH_20210119154519_20210119154523.tif", {}, "2021-01-19T15:45:19"),
        ("a.tif", {"TIFFTAG_DATETIME": "2020:04:11 23:43:09"}, "2020-04-11T23:43:09"),
        ("a.tif", {"datetime": "2020-04-11T23:43:09.000000000"}, "2020-04-11T23:43:09"),
        ("a_99999999T999999.tif", {}, None),
    ],
)
def test_the_acquisition_time_is_found(tmp_path, name, tags, acquired):
    path = save(tmp_path / name, DB, **UTM)
    with rasterio.open(path, "r+") as target:
        target.update_tags(**tags)
    with open_scene(path) as scene:
        assert scene.acquired() == acquired


def test_outputs_say_what_they_are(tmp_path, checkpoint):
    name = "S1A_IW_20220104T170558_VV.tif"
    path = save(tmp_path / name, DB, names=("VV",), **UTM)
    with rasterio.open(path, "r+") as target:
        target.units = ("dB",)
    given = ["--scale", "db", "--ensemble", "2", "--spread-dir", tmp_path / "out/spread"]
    assert translate(checkpoint, path, tmp_path / "out", *given) == 0
    for kind, units in (("eo", ("DN", "DN", "DN")), ("variance", ("1",)), ("spread", ("DN",))):
        with rasterio.open(tmp_path / "out" / kind / name) as result:
            assert (result.crs, result.transform, result.shape) == (UTM["crs"], UTM["transform"], DB.shape)
            assert result.units[: len(units)] == units
            tags = result.tags()
            assert tags["CDIFFSET_SOURCE"] == name and tags["CDIFFSET_ACQUIRED"] == "2022-01-04T17:05:58"
            assert tags["CDIFFSET_SOURCE_UNITS"] == "dB"
            np.testing.assert_allclose([float(each) for each in tags["CDIFFSET_GSD_M"].split()], [10, 10], rtol=1e-3)
        assert (tmp_path / "out" / kind / name).with_suffix(".qml").is_file() == (kind != "eo")
    page = (tmp_path / "out/eo" / name).with_suffix(".swipe.html").read_text("utf-8")
    rows = dict(re.findall("<tr><th>(.*?)</th><td>(.*?)</td></tr>", page))
    assert rows["CRS"] == "EPSG:32631 (geotransform)" and rows["GSD"] == "10 m" and rows["acquired"] == "2022-01-04T17:05:58"
    assert (
        rows["bands"] == "1 (VV), as single" and rows["sampling"].startswith("ddim leading, 1 steps") and 'class="bar"' in page
    )


def test_scenes_are_read_as_those_that_the_training_images_were_cut_from(tmp_path, checkpoint, capsys):
    trained = Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))
    meta = json.loads((trained / "checkpoint.json").read_text())
    recorded = {"bands": "VH", "scale": "db", "stretch": "fixed:0,0.5", "despeckle": "multilook:3"}
    (trained / "checkpoint.json").write_text(json.dumps(meta | {"radiometry": recorded}))
    path = save(tmp_path / "a.tif", DB, DB - 6, names=("VV", "VH"), **UTM)
    assert translate(trained, path, tmp_path / "out") == 0
    assert translate(trained, path, tmp_path / "other", "--bands", "VV", "--stretch", "percentile:5,95") == 0
    with rasterio.open(tmp_path / "out/eo/a.tif") as result:
        found = json.loads(result.tags()["CDIFFSET_STRETCH"])
    assert (found["indexes"], found["scale"], found["limits"], found["despeckle"]) == ([2], "db", [[0, 0.5]], [3, None])
    with rasterio.open(tmp_path / "other/eo/a.tif") as result:
        found = json.loads(result.tags()["CDIFFSET_STRETCH"])
    assert (found["indexes"], found["scale"]) == ([1], "db") and found["limits"] != [[0, 0.5]]
    said = capsys.readouterr().out
    assert "scenes are read as those of the checkpoint's training images, unless options say otherwise: --bands VH" in said


def test_calibration_reads_files_as_translation_does(tmp_path):
    recorded = {"bands": "VH", "scale": "db"}
    scene = save(tmp_path / "a.tif", DB, np.where(DB > -6, np.nan, DB - 6), names=("VV", "VH"), **UTM)
    pixels, valid = read_whole(scene, RadiometryOptions().completed(recorded), {})
    expected, expected_valid, _ = read(scene, **recorded)
    assert np.array_equal(np.moveaxis(pixels, -1, 0), expected) and np.array_equal(valid, expected_valid) and not valid.all()
    Image.fromarray(RNG.integers(0, 255, (8, 9), dtype=np.uint8)).save(tmp_path / "a.png")
    assert np.array_equal(read_whole(tmp_path / "a.png", RadiometryOptions(), {})[0], read_sar(tmp_path / "a.png"))


def test_scenes_of_one_tile_are_batched(tmp_path, checkpoint):
    for k in range(3):
        save(tmp_path / f"sar/{k}.tif", RNG.gamma(4, 0.02, (48, 60)).astype(np.float32), **UTM)
    assert translate(checkpoint, tmp_path / "sar", tmp_path / "one") == 0
    assert translate(checkpoint, tmp_path / "sar", tmp_path / "three", "--batch-size", 3) == 0
    for k in range(3):
        pictures = []
        for out in ("one", "three"):
            with rasterio.open(tmp_path / out / f"eo/{k}.tif") as result:
                pictures.append(result.read().astype(int))
        assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_the_real_files_come_out_on_their_own_grid(samples, checkpoint, tmp_path, capsys):
    folder = samples / "scenes"
    if not folder.is_dir():
        pytest.skip(f"no real scenes in {folder}")
    small = [path for path in sorted(folder.glob("*.tif*")) if path.stat().st_size < 2**20 and "slc" not in path.name]
    assert len(small) >= 6
    (tmp_path / "sar").mkdir()
    for path in small:
        (tmp_path / "sar" / path.name).symlink_to(path)
    assert translate(checkpoint, tmp_path / "sar", tmp_path / "out", "--scale", "auto", "--tile", 512) == 0
    for path in small:
        with rasterio.open(path) as source, rasterio.open(tmp_path / "out/eo" / path.name) as result:
            assert (result.crs, result.transform, result.shape) == (source.crs, source.transform, source.shape)
            bands = source.read(masked=True)
            valid = ~np.ma.getmaskarray(bands).any(0) & np.isfinite(bands.filled(0)).all(0)
            assert np.array_equal(result.dataset_mask() > 0, valid), path.name
    slc = next(folder.glob("*slc*"))
    with pytest.raises(UserError, match="complex pixels"):
        translate(checkpoint, slc, tmp_path / "slc")
