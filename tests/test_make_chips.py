"""Chips: cut where their names say, warped to where they belong, filtered for the reason told, split without touching."""

import json
import re
from itertools import product
from pathlib import Path

import numpy as np
import pytest
import rasterio
import rasterio.warp
from files import save_raster, touch
from PIL import Image
from rasterio import Affine
from rasterio.control import GroundControlPoint
from rasterio.rpc import RPC
from training import train_lines

from cdiffset.errors import run as run_command
from cdiffset.images import read_eo, read_sar
from data.make_chips import main
from data.simulate import Simulation, simulate_scene
from feeders.feeder import PairedFolderFeeder

UTM = "EPSG:32631"
NORTH_UP = Affine(0.5, 0, 600_000, 0, -0.5, 5_750_000)  # 0.5 m, near Rotterdam


def write_raster(path: Path, pixels: np.ndarray, transform=NORTH_UP, crs=UTM, **profile) -> Path:
    """A GeoTIFF of [H, W] or [H, W, C]."""
    bands = np.moveaxis(pixels.reshape(*pixels.shape[:2], -1), -1, 0)
    if pixels.dtype == np.uint8 and len(bands) == 3:
        profile = {"photometric": "RGB"} | profile
    return save_raster(path, bands, transform=transform, crs=crs, **profile)


def write_pair(folder: Path, sar: np.ndarray, eo: np.ndarray, *place, eo_place=None, **profile) -> tuple[Path, Path]:
    """sar.tif and eo.tif, in one place unless told otherwise."""
    sar_path = write_raster(folder / "sar.tif", sar, *place)
    return sar_path, write_raster(folder / "eo.tif", eo, *(place if eo_place is None else eo_place), **profile)


def noise(*shape, seed=0, dtype=np.uint8, high=256):
    """Pixels from 1, so that none looks like nodata."""
    return np.random.default_rng(seed).integers(1, high, shape).astype(dtype)


def cut(sar: Path, eo: Path, output: Path, *options) -> dict:
    """Run the command => chips.json; small chips and blocks, no guard band, unless options say otherwise."""
    small = ["--size", "32", "--stride", "32", "--block", "64", "--guard", "0"]
    assert main(["--sar", str(sar), "--eo", str(eo), "--output", str(output), *small, *map(str, options)]) == 0
    return json.loads((output / "chips.json").read_text())


def chips_of(output: Path, split: str = "*") -> dict[tuple[str, int, int], dict[str, np.ndarray]]:
    """(scene, row, col) => {"sar", "eo"} of the chips written."""
    chips = {}
    for kind in ("sar", "eo"):
        for path in (output).glob(f"{split}/{kind}/**/*.png"):
            name, row, col = re.fullmatch(r"(.+)_r(\d+)_c(\d+)", path.stem).groups()
            chips.setdefault((name, int(row), int(col)), {})[kind] = np.array(Image.open(path))
    return chips


def as_scene(chips: dict, kind: str) -> np.ndarray:
    """Put the chips of one scene back together."""
    first = next(iter(chips.values()))[kind]
    size = len(first)
    height, width = (max(key[k] for key in chips) + size for k in (1, 2))
    scene = np.zeros((height, width, *first.shape[2:]), first.dtype)
    for (_, row, col), chip in chips.items():
        scene[row : row + size, col : col + size] = chip[kind]
    return scene


@pytest.fixture(scope="module")
def simulated():
    return simulate_scene(np.random.default_rng(3), Simulation(size=160))


@pytest.mark.parametrize("case", ["one grid", "contents shifted", "grid shifted"])
def test_chips_hold_what_the_scenes_hold_at_their_place(simulated, tmp_path, case):
    """A shift between the contents of two rasters of one grid is the data's own affair, and stays; an EO raster that begins
    7 px up and 10 px left of the SAR's, and says so, is put right."""
    eo, given, place = simulated["eo"], simulated["eo"], None
    if case == "contents shifted":
        eo = given = np.roll(eo, (6, -9), axis=(0, 1))
    if case == "grid shifted":
        given = np.pad(eo, ((7, 20), (10, 30), (0, 0)), mode="wrap")
        place = [Affine(0.5, 0, 600_000 - 10 * 0.5, 0, -0.5, 5_750_000 + 7 * 0.5)]
    report = cut(*write_pair(tmp_path, simulated["sar"], given, eo_place=place), tmp_path / "chips", "--min-std", 0)
    chips = chips_of(tmp_path / "chips")
    assert len(chips) == 25 == report["counts"]["train"] + report["counts"]["test"]
    assert (as_scene(chips, "sar") == simulated["sar"]).all() and (as_scene(chips, "eo") == eo).all()
    assert (report["scenes"][0]["registration"] == "same grid") == (case != "grid shifted")
    assert report["scenes"][0]["gsd_m"] == pytest.approx([0.5, 0.5], rel=1e-3)


def blobs_at(height: int, width: int, points: np.ndarray, sigma: float) -> np.ndarray:
    """Gaussian blobs centred on points (x, y) in px, upper left corner of the image 0, 0."""
    x, y = np.meshgrid(np.arange(width) + 0.5, np.arange(height) + 0.5)
    return sum(np.exp(-((x - px) ** 2 + (y - py) ** 2) / (2 * sigma**2)) for px, py in points)


@pytest.mark.parametrize(
    "crs, steps",
    [
        ("EPSG:4326", (6e-6, 0, 0, -4e-6)),  # 0.41 x 0.44 m
        ("EPSG:32632", (0.3, 0, 0, -0.3)),  # a zone away, where north is turned by 3.5 degrees
        (UTM, (0.35, 0.12, 0.12, -0.35)),  # turned by nothing but its geotransform
    ],
)
@pytest.mark.parametrize("sar_transform", [NORTH_UP, Affine(0.49, 0.1, 600_000, 0.1, -0.49, 5_750_000)])
def test_points_lie_where_they_belong_after_warping(tmp_path, crs, steps, sar_transform):
    """Blobs are planted at map coordinates with rasterio's point transformation, and found again by their centroids."""
    x, y = np.array([(32 * k + 10 + 3 * j, 32 * j + 14 + 2 * k) for k in range(4) for j in range(4)], float).T
    a, b, c, d, e, f = sar_transform[:6]
    eo_map = np.array(rasterio.warp.transform(UTM, crs, a * x + b * y + c, d * x + e * y + f))
    steps = np.reshape(steps, (2, 2))  # map units for each column and row
    eo_points = np.linalg.solve(steps, eo_map - eo_map[:, :1])
    margin = 60 - eo_points.min(axis=1, keepdims=True)  # the EO raster reaches 60 px beyond the points
    (west, north), eo_points = eo_map[:, 0] - steps @ margin[:, 0], eo_points + margin
    transform = Affine(*steps[0], west, *steps[1], north)
    width, height = np.ceil(eo_points.max(axis=1)).astype(int) + 60
    assert np.ptp(eo_points - [x, y], axis=1).max() > 10  # no copy and no shift would do
    eo = 20 + 200 * blobs_at(height, width, eo_points.T, 4)
    eo = np.repeat(eo.astype(np.uint8)[..., None], 3, -1)
    paths = write_pair(tmp_path, noise(128, 128), eo, sar_transform, eo_place=(transform, crs))
    report = cut(*paths, tmp_path / "chips", "--max-nodata", 0.99)
    assert report["scenes"][0]["registration"] == "warped"
    scene = as_scene(chips_of(tmp_path / "chips"), "eo")[..., 0].astype(float)
    for px, py in zip(x, y, strict=True):
        left, top = max(int(px) - 8, 0), max(int(py) - 8, 0)
        patch = np.maximum(scene[top : top + 17, left : left + 17] - 40, 0)
        rows, cols = np.indices(patch.shape) + 0.5
        assert abs((patch * rows).sum() / patch.sum() + top - py) < 0.5
        assert abs((patch * cols).sum() / patch.sum() + left - px) < 0.5


@pytest.mark.parametrize("bands, dtype", [*product([1, 2, 3, 4], [np.uint8]), (1, np.uint16), (2, np.float32), (4, np.uint16)])
def test_pixels_are_those_of_the_image_readers(tmp_path, bands, dtype):
    """One stretch for the scene: the chips put together are the scene as translation would read it."""
    high = 256 if dtype == np.uint8 else 5000
    alpha = {"alpha": "no"} if bands == 4 else {}
    sar = write_raster(tmp_path / "sar.tif", noise(128, 96, bands, dtype=dtype, high=high), **alpha)
    eo = write_raster(tmp_path / "eo.tif", noise(128, 96, 3, seed=1, dtype=dtype, high=high))
    report = cut(sar, eo, tmp_path / "chips")
    chips = chips_of(tmp_path / "chips")
    assert len(chips) == 12
    assert (as_scene(chips, "sar").reshape(128, 96, -1) == np.round(read_sar(sar))).all()
    assert (as_scene(chips, "eo") == np.round(read_eo(eo))).all()
    stretch = report["scenes"][0]["stretch"]
    if dtype == np.uint8:
        assert stretch == {"sar": [[0, 255]] * bands, "eo": None}
    else:
        with rasterio.open(eo) as source:
            assert np.allclose(stretch["eo"], np.percentile(source.read(), (1, 99)))


def test_a_large_scene_is_stretched_by_a_sample_of_its_pixels(tmp_path):
    sar = noise(32, 9000, dtype=np.uint16, high=60_000)
    report = cut(*write_pair(tmp_path, sar, noise(32, 9000, 3)), tmp_path / "chips", "--stride", 512)
    (limits,) = report["scenes"][0]["stretch"]["sar"]
    assert np.allclose(limits, np.percentile(sar, (1, 99)), atol=500)


def gaps(output: Path, transforms: dict[str, tuple[float, float]], size: int) -> np.ndarray:
    """Chebyshev gap in px between every training chip and every test chip, by their names and where their scenes begin."""
    corners = {
        split: np.array([np.add(transforms[name], (row, col)) for name, row, col in chips_of(output, split)])
        for split in ("train", "test")
    }
    return (np.abs(corners["train"][:, None] - corners["test"][None]) - size).max(-1)


@pytest.mark.parametrize("seed, guard, stride, share", [(0, 0, 32, 0.2), (2, 64, 24, 0.1), (3, 20, 32, 0.4)])
def test_no_training_chip_is_nearer_than_the_guard_band_to_a_test_chip(tmp_path, seed, guard, stride, share):
    """Tiles of one ground that overlap each other, as SpaceNet6's do."""
    places = {"a": (0, 0), "b": (40, 250), "c": (-30, -140), "d": (200, 90)}  # row, col of their corners
    for index, (name, (row, col)) in enumerate(places.items()):
        transform = Affine(0.5, 0, 600_000 + col * 0.5, 0, -0.5, 5_750_000 - row * 0.5)
        write_raster(tmp_path / f"sar/{name}.tif", noise(290, 310, seed=index), transform)
        write_raster(tmp_path / f"eo/{name}.tif", noise(290, 310, 3, seed=index), transform)
    options = ["--seed", seed, "--guard", guard, "--stride", stride, "--test-share", share]
    report = cut(tmp_path / "sar", tmp_path / "eo", tmp_path / "chips", *options)
    found = gaps(tmp_path / "chips", places, 32)
    assert found.min() >= guard
    counts = report["counts"]
    usable = counts["train"] + counts["test"] + counts["dropped"]["guard"]
    assert usable == 4 * len(range(0, 290 - 31, stride)) * len(range(0, 310 - 31, stride))
    assert abs(counts["test"] / usable - share) < 0.03
    assert found.shape == (counts["train"], counts["test"])


def test_scenes_without_a_place_are_split_each_by_itself(tmp_path):
    """Equal pixel coordinates mean nothing between them: none loses chips to the guard band of another."""
    for name in "ab":
        for kind, pixels in (("sar", noise(64, 64)), ("eo", noise(64, 64, 3))):
            write_raster(tmp_path / f"{kind}/{name}.tif", pixels, Affine.identity(), None)
    report = cut(tmp_path / "sar", tmp_path / "eo", tmp_path / "chips", "--guard", 1000, "--test-share", 0.5)
    assert [scene["registration"] for scene in report["scenes"]] == ["pixel by pixel"] * 2
    assert (report["counts"]["train"], report["counts"]["test"]) == (4, 4)
    assert {scene["crs"] for scene in report["scenes"]} == {None}


def test_every_dropped_chip_is_counted_for_its_first_reason(tmp_path):
    """One row of eight 32 px chips: faults are planted in known ones."""
    sar, eo, cloud = noise(32, 256), noise(32, 256, 3), np.zeros((32, 256), np.uint8)
    sar[:, 0:32] = 0  # nothing in the SAR
    eo[:16, 32:48] = 0  # a quarter without data
    sar[:1, 64:96] = 0  # 1 of 32 rows, within what is allowed
    cloud[:8, 96:128] = 1  # a quarter cloudy
    cloud[0, 128] = 200  # one pixel, within what is allowed
    eo[:, 160:192] = 90  # blank EO
    sar[:, 192:224] = 7  # blank SAR
    mask = write_raster(tmp_path / "cloud.tif", cloud, nodata=0)
    options = ["--cloud-mask", mask, "--block", 32, "--nodata", 0, "--eo-nodata", 0]
    report = cut(*write_pair(tmp_path, sar, eo), tmp_path / "chips", *options)
    assert report["counts"]["dropped"] == {"no_overlap": 0, "nodata": 2, "cloud": 1, "blank": 2, "guard": 0}
    assert sorted(col for _, _, col in chips_of(tmp_path / "chips")) == [64, 128, 224]


@pytest.mark.parametrize(
    "kind, warped",
    [*product(["declared", "alpha", "mask", "nan", "undeclared"], [True]), ("float alpha", False), ("mask", False)],
)
def test_pixels_without_data_are_known_and_out_of_the_stretch(tmp_path, kind, warped):
    """The right half of the EO scene holds nothing; its left half holds a zero in one band, which is data."""
    eo = noise(64, 128, 3, dtype=np.uint16, high=4000).astype(np.float32)
    eo[10, 10, 0] = 0
    eo[:, 64:] = {"declared": -9999, "nan": np.nan}.get(kind, 0)
    profile = {"nodata": -9999} if kind == "declared" else {}
    there = np.repeat([[65535] * 64 + [0] * 64], 64, axis=0)
    if kind.endswith("alpha"):
        eo, profile = np.dstack([eo, there]).astype(np.uint16), {"alpha": "yes", "photometric": "RGB"}
    if kind == "float alpha":
        eo = eo.astype(np.float32)
    transform = Affine(0.5, 0, 600_000 + (4 if warped else 0), 0, -0.5, 5_750_000)  # 8 px to the right
    if kind == "mask":
        profile["mask"] = there > 0
    paths = write_pair(tmp_path, noise(64, 128), eo, eo_place=[transform], **profile)
    told = ["--eo-nodata", 0] if kind == "undeclared" else []
    report = cut(*paths, tmp_path / "chips", "--max-nodata", 0.3, "--block", 32, *told)
    cols = {col for _, _, col in chips_of(tmp_path / "chips")}
    assert cols == {0, 32}
    assert report["counts"]["dropped"]["no_overlap"] == (4 if not warped else 2)
    assert report["counts"]["dropped"]["nodata"] == (0 if not warped else 2)
    low, high = report["scenes"][0]["stretch"]["eo"]
    assert np.allclose((low, high), np.percentile(eo[:, :64, :3], (1, 99)))


def test_undeclared_zeros_are_data_unless_told_otherwise(tmp_path, capsys):
    sar, eo = noise(64, 64), noise(64, 64, 3)
    sar[:, :32:2] = 0
    paths = write_pair(tmp_path, sar, eo)
    assert cut(*paths, tmp_path / "kept", "--block", 32)["counts"]["dropped"]["nodata"] == 0
    assert "25% of the values are exactly 0, the smallest: if that means no data, give --nodata 0" in capsys.readouterr().out
    assert cut(*paths, tmp_path / "dropped", "--nodata", 0, "--block", 32)["counts"]["dropped"]["nodata"] == 2


def test_a_cloud_mask_of_another_grid_and_what_it_does_not_cover(tmp_path):
    """At 2 m it covers the upper 96 of 128 rows, all clear but one corner; its nodata value is that of clear sky."""
    cloud = np.zeros((24, 32), np.uint8)
    cloud[:8, 24:] = 1
    mask = write_raster(tmp_path / "cloud.tif", cloud, Affine(2, 0, 600_000, 0, -2, 5_750_000), nodata=0)
    report = cut(*write_pair(tmp_path, noise(128, 128), noise(128, 128, 3)), tmp_path / "chips", "--cloud-mask", mask)
    assert report["counts"]["dropped"]["cloud"] == 5
    kept = {(row, col) for _, row, col in chips_of(tmp_path / "chips")}
    assert kept == {(row, col) for row in (0, 32, 64) for col in (0, 32, 64, 96)} - {(0, 96)}


@pytest.fixture(scope="module")
def spacenet(tmp_path_factory) -> tuple[Path, dict]:
    """Chips of tiles named and typed as SpaceNet6's: quad-pol float SAR, 8-bit RGB, part of it without data."""
    root = tmp_path_factory.mktemp("spacenet")
    for index in range(3):
        eo = noise(150, 150, 3, seed=index)
        eo[:, 140:] = 0
        transform = Affine(0.5, 0, 592_000 + 70 * index, 0, -0.5, 5_750_000)
        stem = f"SN6_Train_AOI_11_Rotterdam_{{}}_20190804111224_tile_{index + 5}.tif"
        write_raster(root / "PS-RGB" / stem.format("PS-RGB"), eo, transform)
        sar = np.random.default_rng(index).gamma(2, 20, (150, 150, 4)).astype(np.float32)
        write_raster(root / "SAR-Intensity" / stem.format("SAR-Intensity"), sar, transform)
    report = cut(root / "SAR-Intensity", root / "PS-RGB", root / "chips", "--guard", 8, "--scale", "amplitude")
    return root / "chips", report


def test_feeders_read_the_dataset_by_list_and_by_folder(spacenet):
    output, report = spacenet
    for split in ("train", "test"):
        by_list = PairedFolderFeeder(32, dataroot=output, listroot=output / f"{split}_list.csv")
        by_folder = PairedFolderFeeder(32, split, output / split / "sar", output / split / "eo")
        assert len(by_list) == len(by_folder) == report["counts"][split] > 0
        assert by_list.radiometry == by_folder.radiometry == {"scale": "amplitude"}
        assert by_list.gsd_m == by_folder.gsd_m == pytest.approx(0.5, rel=1e-3)
        assert by_list.augment == (split == "train")
        assert {pair.sar for pair in by_list.pairs} == {pair.sar for pair in by_folder.pairs}
        assert all(pair.sar.name == pair.eo.name for pair in by_list.pairs)
        assert by_list[0]["sar"].shape == by_list[0]["eo"].shape == (3, 32, 32)


def test_training_runs_on_the_dataset(spacenet, run, tmp_path):
    output, _ = spacenet
    arguments = {
        f"{split}_feeder_args": {"dataroot": str(output), "listroot": str(output / f"{split}_list.csv"), "crop_size": 32}
        for split in ("train", "test")
    }
    work_dir = run(tmp_path / "run", num_iter=1, **arguments)
    assert len(train_lines(work_dir)) == 1
    meta = json.loads((work_dir / "latest/checkpoint.json").read_text())
    assert meta["radiometry"] == {"scale": "amplitude"} and meta["gsd_m"] == pytest.approx(0.5, rel=1e-3)


def test_statistics_are_those_of_the_files(spacenet):
    output, report = spacenet
    for split in ("train", "test"):
        chips = chips_of(output, split)
        for kind in ("sar", "eo"):
            pixels = np.concatenate([chip[kind].reshape(-1, 3) for chip in chips.values()]).astype(float)
            assert np.allclose(report["statistics"][split][kind]["mean"], pixels.mean(0), atol=1e-3)
            assert np.allclose(report["statistics"][split][kind]["std"], pixels.std(0), atol=1e-3)
    for scene in report["scenes"]:
        assert scene["counts"]["train"] == sum(name == scene["name"] for name, _, _ in chips_of(output, "train"))
        assert scene["crs"] == UTM and scene["size"] == [150, 150] and len(scene["stretch"]["sar"]) == 4
    total = report["counts"]["train"] + report["counts"]["test"] + sum(report["counts"]["dropped"].values())
    assert total == 3 * 4 * 4


def test_the_seed_fixes_everything_and_the_bands_of_the_eo_are_chosen(tmp_path):
    eo = noise(160, 160, 5)
    paths = write_pair(tmp_path, noise(160, 160), eo, photometric="MINISBLACK")
    for name, seed in (("one", 5), ("two", 5), ("three", 6)):
        cut(*paths, tmp_path / name, "--seed", seed, "--eo-bands", 3, 2, 5)
    one, two, three = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*.*")}
        for folder in (tmp_path / name for name in ("one", "two", "three"))
    )
    assert one == two and one.keys() != three.keys()
    assert (as_scene(chips_of(tmp_path / "one"), "eo") == eo[:, :, [2, 1, 4]]).all()


def with_gcps(target):
    corners = [(0, 0, 600_000, 5_750_000), (0, 96, 600_048, 5_750_000), (64, 0, 600_000, 5_749_968)]
    target.gcps = [GroundControlPoint(*corner) for corner in corners], rasterio.CRS.from_string(UTM)


def with_rpcs(target):
    one, zero = [1.0] + [0.0] * 19, [0.0] * 20
    target.rpcs = RPC(0, 1, 51.9, 1, one, zero, 32, 32, 4.4, 1, one, zero, 48, 48)


SAR, EO, NOWHERE, FLAT = noise(64, 96), noise(64, 96, 3), (Affine.identity(), None), np.full((64, 96), 5, np.uint8)
MISTAKES = {  # what: (options, what else the pair of rasters is, the message)
    "EO without CRS": ([], {"eo_place": (NORTH_UP, None)}, "CRS on both .*sar.tif .*EPSG:32631.*eo.tif .*none"),
    "sizes": ([], {"eo": EO[:, :-1], "place": NOWHERE}, "same size .*96 x 64.*95 x 64"),
    "bands": ([], {"eo": EO[..., :2]}, "eo.tif: 2 bands"),
    "complex": ([], {"sar": SAR.astype(np.complex64)}, "sar.tif: complex pixels .*DERIVED_SUBDATASET:AMPLITUDE:sar.tif"),
    "one block": (["--block", 512], {}, "one block of 512 px"),
    "guard": (["--guard", 500], {}, "guard band of 500 px"),
    "blank SAR": ([], {"sar": FLAT}, "sar.tif: without contrast, every valid pixel is 5"),
    "blank EO": ([], {"eo": np.dstack([FLAT] * 3)}, r"no usable chip \(dropped: blank 6"),
    "GCPs alone": ([], {"place": NOWHERE, "eo_place": (), "change": with_gcps}, "ground control points alone, .*gdalwarp -tps"),
    "RPCs alone": ([], {"place": NOWHERE, "eo_place": (), "change": with_rpcs}, "sar.tif has RPCs alone, .*gdalwarp -rpc"),
    "too small": (["--size", 128], {}, r"no usable chip .*smaller than --size 128: eo \(96 x 64 px\)"),
    "share": (["--test-share", 1], {}, "--test-share is 1"),
    "stride": (["--stride", 0], {}, "--stride is 0"),
    "nodata": (["--max-nodata", 5], {}, "--max-nodata is 5"),
    "no mask": (["--cloud-mask", "none.tif"], {}, "none.tif"),
    "truncated": ([], {"eo_bytes": lambda content: content[:9000]}, "eo.tif"),
    "not a raster": ([], {"eo_bytes": lambda content: b"no raster"}, "eo.tif: unreadable"),
    "missing": (["--sar", "none.tif"], {}, "none.tif .does not exist"),
    "no folder": (["--output", "sar.tif"], {}, "--output: cannot write into .*sar.tif: "),
    "an earlier data set": (["--output", "earlier"], {}, "already holds train, test, chips.json"),
    "no twin": (["--sar", "twins/sar", "--eo", "twins/eo"], {}, "no twin"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISTAKES)
def test_mistakes_end_in_one_line_and_leave_nothing(tmp_path, monkeypatch, capsys, case):
    options, other, message = MISTAKES[case]
    monkeypatch.chdir(tmp_path)
    place = other.get("place", ())
    paths = write_pair(tmp_path, other.get("sar", SAR), other.get("eo", EO), *place, eo_place=other.get("eo_place"))
    if "change" in other:
        with rasterio.open(paths[0], "r+") as target:
            other["change"](target)
    if "eo_bytes" in other:
        paths[1].write_bytes(other["eo_bytes"](paths[1].read_bytes()))
    touch(
        tmp_path,
        "earlier/train/x",
        "earlier/test/x",
        "earlier/chips.json",
        "twins/sar/a.tif",
        "twins/eo/a.tif",
        "twins/eo/b.tif",
    )
    before = sorted(tmp_path.rglob("*"))
    argv = ["--sar", paths[0], "--eo", paths[1], "--output", "chips", "--size", 32, "--stride", 32, "--block", 32, "--guard", 0]
    assert run_command(main, [str(word) for word in (*argv, *options)]) == 2
    lines = [line for line in capsys.readouterr().err.replace("\r", "\n").splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and re.search(message, lines[0]), lines
    assert sorted(tmp_path.rglob("*")) == before


def test_a_scene_without_contrast_is_left_out_of_a_folder(tmp_path, capsys):
    for name, sar in (("a", noise(64, 96)), ("blank", np.full((64, 96), 7, np.uint8))):
        write_raster(tmp_path / f"sar/{name}.tif", sar)
        write_raster(tmp_path / f"eo/{name}.tif", noise(64, 96, 3))
    report = cut(tmp_path / "sar", tmp_path / "eo", tmp_path / "chips", "--block", 32)
    assert [scene["name"] for scene in report["scenes"]] == ["a"] and list(report["left_out"]) == ["blank"]
    assert "blank.tif: without contrast" in capsys.readouterr().out


def test_the_sar_is_read_as_test_py_reads_scenes(tmp_path, capsys):
    """Decibels in two files of one product, an auxiliary file beside them; the EO is named without a polarisation."""
    power = np.random.default_rng(0).gamma(4, 0.02, (2, 64, 96)).astype(np.float32)
    for name, band in zip(("VV", "VH"), power, strict=True):
        write_raster(tmp_path / f"sar/p_{name}.tif", 10 * np.log10(band))
    write_raster(tmp_path / "sar/p_inc_map.tif", noise(64, 96))
    write_raster(tmp_path / "eo/p.tif", noise(64, 96, 3))
    given = ["--bands", "VV,VH", "--channels", "ratio", "--scale", "auto", "--stretch", "folder", "--block", 32]
    report = cut(tmp_path / "sar", tmp_path / "eo", tmp_path / "chips", *given)
    kept = report["settings"]["radiometry"]
    assert (kept["bands"], kept["channels"], kept["scale"]) == ("VV,VH", "ratio", "db")  # as it was decided
    assert "db (auto: 100% of the values from -60 to 20" in capsys.readouterr().out
    amplitude = np.sqrt(power.astype(np.float64))
    bands = [*amplitude, amplitude[0] / amplitude[1]]
    limits = [np.percentile(band, (1, 99)) for band in bands]
    np.testing.assert_allclose([float(n) for n in kept["stretch"][6:].split(",")], np.ravel(limits), rtol=1e-5)
    expected = [np.clip((band - low) / (high - low), 0, 1) * 255 for band, (low, high) in zip(bands, limits, strict=True)]
    assert np.abs(as_scene(chips_of(tmp_path / "chips"), "sar") - np.stack(expected, -1)).max() < 0.51
