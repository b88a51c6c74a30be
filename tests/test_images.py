"""Reading any supported file into 0-255, and writing whole files or none."""

import os
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
from files import save_raster, touch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from cdiffset import images
from cdiffset.errors import UserError, run
from cdiffset.images import (
    list_images,
    read_eo,
    read_sar,
    require_writable,
    to_signed,
    without_georeference,
    write_png,
    write_tiff,
)
from cdiffset.pipeline import to_uint8

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(7)


def expected_stretch(values, valid=None):
    """The percentile stretch pixel by pixel, without the percentile function."""
    valid = np.ones(values.shape, bool) if valid is None else valid
    ordered = sorted(float(value) for value in values[valid])

    def percentile(share):
        place = share * (len(ordered) - 1)
        below = int(place)
        above = min(below + 1, len(ordered) - 1)
        return ordered[below] + (place - below) * (ordered[above] - ordered[below])

    low, high = percentile(0.01), percentile(0.99)
    return np.where(valid, np.clip((values.astype(float) - low) / (high - low), 0, 1) * 255, 0)


def listed(root: Path) -> list[str]:
    return [path.as_posix() for path in list_images(root)]


# 8 bits: as is


def test_grey_png_is_repeated_and_unscaled(tmp_path, rng):
    pixels = rng.integers(10, 90, (5, 7), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for read in (read_sar, read_eo):
        image = read(tmp_path / "a.png")
        assert image.dtype == np.float32 and image.shape == (5, 7, 3) and (image == pixels[..., None]).all()


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".tiff", ".webp", ".npy"])
def test_rgb_keeps_its_channels_in_every_lossless_format(tmp_path, rng, suffix):
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    path = tmp_path / f"a{suffix.upper()}"
    with path.open("wb") as file:
        options = {"lossless": True} if suffix == ".webp" else {}
        np.save(file, pixels) if suffix == ".npy" else Image.fromarray(pixels).save(path, **options)
    assert (read_eo(path) == pixels).all() and (read_sar(path) == pixels).all()


@pytest.mark.parametrize(("suffix", "options"), [(".png", {}), (".tif", {}), (".png", {"transparency": bytes([0, 128])})])
def test_palette_is_expanded_whatever_its_transparency(tmp_path, rng, suffix, options):
    colours = rng.integers(0, 256, (6, 3), dtype=np.uint8)
    indices = rng.integers(0, 6, (5, 7), dtype=np.uint8)
    image = Image.fromarray(indices).convert("L")
    image.putpalette(colours.flatten().tolist())
    image.save(tmp_path / f"a{suffix}", **options)
    assert (read_eo(tmp_path / f"a{suffix}") == colours[indices]).all()


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_alpha_is_dropped_not_blended(tmp_path, rng, suffix):
    pixels = rng.integers(0, 256, (5, 7, 4), dtype=np.uint8)
    pixels[0, 0, 3] = 0
    Image.fromarray(pixels).save(tmp_path / f"rgba{suffix}")
    Image.fromarray(pixels[..., 2:].copy(), "LA").save(tmp_path / f"la{suffix}")
    for read in (read_sar, read_eo):
        assert (read(tmp_path / f"rgba{suffix}") == pixels[..., :3]).all()
        assert (read(tmp_path / f"la{suffix}") == pixels[..., 2:3]).all()


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_becomes_rgb(tmp_path, suffix):
    pixels = np.empty((16, 16, 4), np.uint8)
    pixels[:] = (200, 100, 0, 51)
    Image.fromarray(pixels, "CMYK").save(tmp_path / f"a{suffix}")
    expected = [(255 - ink) * (255 - 51) / 255 for ink in (200, 100, 0)]
    assert np.abs(read_eo(tmp_path / f"a{suffix}") - expected).max() <= 4


@pytest.mark.parametrize(("suffix", "options"), [(".png", {}), (".tif", {}), (".tif", {"tiffinfo": {262: 0}})])
def test_one_bit_is_black_and_white(tmp_path, rng, suffix, options):
    bits = rng.random((9, 11)) < 0.5
    Image.fromarray(bits).save(tmp_path / f"a{suffix}", **options)
    assert (read_eo(tmp_path / f"a{suffix}")[..., 0] == bits * 255).all()


def test_packed_bits_and_booleans_fill_the_range(tmp_path):
    save_raster(tmp_path / "a.tif", np.array([[[0, 1, 2, 3]]], np.uint8), nbits=2)
    assert read_sar(tmp_path / "a.tif")[0, :, 0].tolist() == [0, 85, 170, 255]
    np.save(tmp_path / "a.npy", np.array([[True, False]]))
    assert read_sar(tmp_path / "a.npy")[0, :, 0].tolist() == [255, 0]


def test_exif_orientation_is_applied(tmp_path):
    image = Image.fromarray(np.array([[0, 0, 255], [0, 0, 0]], np.uint8))
    exif = image.getexif()
    exif[274] = 6  # turn clockwise to view
    image.save(tmp_path / "a.png", exif=exif)
    assert read_eo(tmp_path / "a.png")[..., 0].tolist() == [[0, 0], [0, 0], [0, 255]]


# deeper than 8 bits


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.uint32, np.float32, np.float64])
def test_deep_sar_tiff_is_stretched_per_band(tmp_path, rng, dtype):
    bands = (rng.gamma(1.0, [[[300.0]], [[30.0]], [[9.0]]], (3, 20, 21))).astype(dtype)
    save_raster(tmp_path / "a.tif", bands)
    image = read_sar(tmp_path / "a.tif")
    for k in range(3):
        assert image[..., k] == pytest.approx(expected_stretch(bands[k]), abs=1e-3)
    assert image.min() == 0 and image.max() == 255


@pytest.mark.parametrize("count", [1, 2, 4])
def test_bands_become_three_channels(tmp_path, rng, count):
    bands = rng.gamma(1.0, 5.0, (count, 12, 13)).astype(np.float32)
    save_raster(tmp_path / "a.tif", bands)
    np.save(tmp_path / "a.npy", np.moveaxis(bands, 0, -1))
    scaled = [expected_stretch(band) for band in bands]
    first, last = scaled[0], scaled[-1]
    middle = {1: scaled[0], 2: (first + last) / 2, 4: (scaled[1] + scaled[2]) / 2 if count == 4 else None}[count]
    for name in ("a.tif", "a.npy"):
        assert read_sar(tmp_path / name) == pytest.approx(np.stack([first, middle, last], -1), abs=1e-3)


def test_declared_alpha_is_not_a_polarisation(tmp_path, rng):
    bands = rng.integers(1, 60000, (4, 12, 13), dtype=np.uint16)
    save_raster(tmp_path / "a.tif", bands, photometric="RGB", alpha="yes")
    assert read_sar(tmp_path / "a.tif")[..., 2] == pytest.approx(expected_stretch(bands[2]), abs=1e-3)
    joint = expected_stretch(bands[:3])
    assert read_eo(tmp_path / "a.tif") == pytest.approx(np.moveaxis(joint, 0, -1), abs=1e-3)


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bit_eo_is_stretched_jointly(tmp_path, rng, suffix):
    bands = rng.integers(0, [[[60000]], [[20000]], [[3000]]], (3, 12, 13), dtype=np.uint16)
    save_raster(tmp_path / f"a{suffix}", bands, driver={".png": "PNG", ".tif": "GTiff"}[suffix])
    image = read_eo(tmp_path / f"a{suffix}")
    assert image == pytest.approx(np.moveaxis(expected_stretch(bands), 0, -1), abs=1e-3)
    assert image[..., 2].max() < 20  # the dark band stays dark


def test_nodata_and_non_finite_pixels_count_nowhere_and_become_zero(tmp_path, rng):
    band = rng.uniform(1, 2, (20, 20)).astype(np.float32)
    band[0], band[1], band[2, 0], band[2, 1] = -9999, np.nan, np.inf, -np.inf
    valid = np.isfinite(band) & (band > -9999)
    save_raster(tmp_path / "a.tif", band[None], nodata=-9999)
    image = read_sar(tmp_path / "a.tif")[..., 0]
    assert image == pytest.approx(expected_stretch(band, valid), abs=1e-3)
    assert (image[~valid] == 0).all() and image[valid].max() == 255


def test_bright_nodata_becomes_zero(tmp_path):
    band = np.array([[[1, 2, 3, 65535]]], np.uint16)
    save_raster(tmp_path / "a.tif", band, nodata=65535)
    assert read_sar(tmp_path / "a.tif")[0, :, 0] == pytest.approx([0, 127.5, 255, 0])


@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_constant_image_is_zero(tmp_path, value):
    np.save(tmp_path / "a.npy", np.full((4, 4), value, np.float32))
    assert (read_sar(tmp_path / "a.npy") == 0).all() and (read_eo(tmp_path / "a.npy") == 0).all()


# refusals


def test_missing_and_unsupported_files(tmp_path):
    with pytest.raises(UserError, match="gone.png: no such file"):
        read_sar(tmp_path / "gone.png")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(UserError, match="a.txt: unsupported image type"):
        read_sar(tmp_path / "a.txt")


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((4, 4), np.complex64), "complex"),
        (np.zeros((4, 4, 5), np.uint8), "5 bands"),
        (np.zeros((0, 4), np.uint8), "expected one array"),
        (np.full((4, 4), np.nan, np.float32), "without a single valid pixel"),
        (np.array([["a"]]), "type <U1"),
    ],
)
def test_unusable_arrays(tmp_path, array, message):
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(UserError, match=f"a.npy.*{message}"):
        read_sar(tmp_path / "a.npy")


def test_two_and_four_bands_are_no_eo(tmp_path):
    for count in (2, 4):
        np.save(tmp_path / "a.npy", np.zeros((4, 4, count), np.uint8))
        with pytest.raises(UserError, match=f"{count} bands besides alpha"):
            read_eo(tmp_path / "a.npy")


# the pixel range


def test_every_level_survives_the_round_trip_and_channels_end_up_last():
    levels = np.arange(256, dtype=np.float32)
    signed = to_signed(levels)
    assert signed[0] == -1 and signed[255] == 1 and signed[127] == pytest.approx(-1 / 255)
    image = np.stack(np.broadcast_arrays(signed, signed[:, None], signed[::-1])).repeat(2).reshape(3, 256, 512)
    pixels = to_uint8(torch.from_numpy(image.copy())[None])
    assert pixels.shape == (1, 256, 512, 3)
    assert (pixels[0, 7, ::2] == np.stack([levels, levels * 0 + 7, levels[::-1]], -1)).all()


@settings(database=None, deadline=None, max_examples=50)
@given(st.floats(-3, 3, width=32), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_to_uint8_rounds_and_clips(value, dtype):
    signed = torch.full((3, 1, 1), value).to(dtype)
    expected = min(max((signed[0, 0, 0].item() + 1) * 127.5, 0), 255)
    assert abs(int(to_uint8(signed)[0, 0, 0]) - expected) <= 0.5001


# writing


def test_png_and_tiff_round_trip(tmp_path, rng):
    pixels = rng.integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_png(tmp_path / "new/folder/a.png", pixels)
    assert (np.asarray(Image.open(tmp_path / "new/folder/a.png")) == pixels).all()
    values = rng.normal(size=(5, 7)).astype(np.float32)
    write_tiff(tmp_path / "new/v.tif", values)
    with without_georeference(), rasterio.open(tmp_path / "new/v.tif") as source:
        assert source.dtypes == ("float32",) and source.profile["compress"] == "deflate"
        assert (source.read(1) == values).all()
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a.png", "v.tif"]


@pytest.mark.parametrize("write", [write_png, write_tiff])
def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, write):
    path = tmp_path / "a.out"
    path.write_bytes(b"old")

    def half_written(*args, **kwargs):
        next(iter(tmp_path.glob(".*.out"))).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", lambda self, target, **kw: Path(target).touch() or half_written())
    monkeypatch.setattr(rasterio, "open", lambda target, *a, **kw: Path(target).touch() or half_written())
    with pytest.raises(OSError, match="disk full"):
        write(path, np.zeros((4, 4), np.uint8))
    assert [p.name for p in tmp_path.iterdir()] == ["a.out"] and path.read_bytes() == b"old"


# listing


def test_listing_is_recursive_ordered_and_skips_what_is_hidden(tmp_path):
    with pytest.raises(UserError, match="gone: no such folder"):
        list_images(tmp_path / "gone")
    with pytest.raises(UserError, match="holds no images"):
        list_images(tmp_path)
    touch(tmp_path, "10.png", "2.PNG", "b/1.tif", "a/1.npy", ".hidden.png", ".cache/1.png", "notes.txt", "c.jpeg/x.jpeg")
    assert listed(tmp_path) == ["2.PNG", "10.png", "a/1.npy", "b/1.tif", "c.jpeg/x.jpeg"]


def test_links_are_followed_under_each_of_their_names(tmp_path):
    """Out of the folder, within it, and through a link to a link; the folder that was named may be a link itself."""
    touch(tmp_path, "elsewhere/deep/1.png", "elsewhere/2.png", "root/b/3.png", "root/.store/4.png")
    root = tmp_path / "root"
    for name, target in (
        ("link", "../elsewhere/deep"), ("again", "link"), ("5.png", "../elsewhere/2.png"), ("a", "b"), ("c", ".store"),
        ("6.png", "nowhere.png"), ("7.png", "b"), ("gone", "nowhere"),
    ):  # fmt: skip
        (root / name).symlink_to(target)
    expected = ["5.png", "7.png/3.png", "a/3.png", "again/1.png", "b/3.png", "c/4.png", "link/1.png"]
    assert listed(root) == expected
    (tmp_path / "alias").symlink_to(root)
    assert listed(tmp_path / "alias") == expected


def test_loops_of_links_end(tmp_path):
    touch(tmp_path, "root/b/1.png", "root/c/d/2.png")
    root = tmp_path / "root"
    for name, target in (("b/loop", "."), ("c/d/up", "../.."), ("outwards", ".."), ("self", "self"), ("c/b", "../b")):
        (root / name).symlink_to(target)
    assert listed(root) == ["b/1.png", "c/b/1.png", "c/d/2.png"]
    (root / "b" / "c").symlink_to("../c")  # each now leads into the other
    assert listed(root) == ["b/1.png", "b/c/d/2.png", "c/b/1.png", "c/d/2.png"]


def test_folders_that_all_link_to_each_other_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "MAX_LINKS", 100)
    touch(tmp_path, *(f"{number}/x.png" for number in range(6)))
    for number, other in np.ndindex(6, 6):
        (tmp_path / f"{number}/{other}").symlink_to(f"../{other}")
    with pytest.raises(UserError, match="over 100 links to folders, expected fewer"):
        list_images(tmp_path)


@pytest.mark.parametrize("side, bands, allowed", [(8, 1, True), (9, 1, False), (8, 4, True), (8, 5, False)])
def test_the_limit_of_pixels(tmp_path, side, bands, allowed):
    np.save(tmp_path / "a.npy", np.ones((side, side, bands), np.uint8))
    save_raster(tmp_path / "a.tif", np.ones((bands, side, side), np.float32))
    Image.new("L" if bands == 1 else "RGBA", (side, side)).save(tmp_path / "a.png")
    for name in ["a.npy", "a.tif"] + ["a.png"] * (bands < 5):
        if allowed:
            assert read_sar(tmp_path / name, max_pixels=64).shape == (8, 8, 3)
        else:
            with pytest.raises(UserError, match=f"{name}: {side} x {side} px in {bands} bands; at most 64 px"):
                read_sar(tmp_path / name, max_pixels=64)


def test_trying_to_write_leaves_nothing_behind(tmp_path):
    (tmp_path / "there").mkdir()
    for folder in (tmp_path, tmp_path / "there", tmp_path / "new" / "deep" / "er"):
        require_writable("--output", folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    (tmp_path / "file").write_text("kept")
    for folder in ("file", "file/a", "there/" + "x" * 300, "new/" + "x" * 300):
        with pytest.raises(UserError, match="--output: cannot write into .*: "):
            require_writable("--output", tmp_path / folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "there"]


# commands


@pytest.mark.parametrize("name", [b"Stra\xdfe.png", b"\xfcber/1.png"], ids=["file", "folder"])
def test_names_that_are_not_utf8_are_refused_by_name(tmp_path, name):
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name))
    path.parent.mkdir(exist_ok=True)
    path.touch()
    (tmp_path / "\u00fcber.png").touch()  # which is UTF-8
    with pytest.raises(UserError, match="1 file names that are not UTF-8: ") as caught:
        list_images(tmp_path)
    assert name.decode(errors="backslashreplace") in str(caught.value) and str(caught.value).isascii()


@pytest.mark.parametrize("stem", ["a" * 251, "\u00e9" * 125, "b" * 100, "c"])
@pytest.mark.parametrize("write", [write_png, lambda path, pixels: write_tiff(path.with_suffix(".tif"), pixels)])
def test_a_name_of_any_length_can_be_written(tmp_path, stem, write):
    write(tmp_path / f"{stem}.png", np.zeros((2, 2), np.uint8))
    (path,) = tmp_path.iterdir()
    assert path.stem == stem


class Faulty(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        raise UserError("a.png: bad\nfile")


@pytest.mark.parametrize("workers", [0, 1])
def test_user_errors_become_one_line_and_exit_code_2(capsys, workers):
    """Those of a loader's workers lose their traceback."""
    assert run(lambda argv: list(torch.utils.data.DataLoader(Faulty(), num_workers=workers)), []) == 2
    assert capsys.readouterr().err == "error: a.png: bad file\n"


def test_other_endings_of_commands():
    def interrupted(argv):
        raise KeyboardInterrupt

    def broken(argv):
        raise ZeroDivisionError

    assert run(lambda argv: len(argv), ["one", "two", "three"]) == 3
    assert run(interrupted) == 130
    with pytest.raises(ZeroDivisionError):
        run(broken)


def test_real_samples(samples):
    for read, kind in ((read_sar, "sar"), (read_eo, "opt")):
        path = samples / f"QXSLAB_SAROPT/{kind}_256_oc_0.2/1.png"
        image = read(path)
        assert image.shape == (88, 88, 3)
        assert (image == np.asarray(Image.open(path)).reshape(88, 88, -1)).all()
    assert len(list_images(samples / "QXSLAB_SAROPT/opt_256_oc_0.2")) == 100


def test_a_band_dropped_as_alpha_is_said_once(tmp_path, capsys):
    images._note_alpha.cache_clear()
    save_raster(tmp_path / "a.tif", np.ones((4, 6, 7), np.uint8), photometric="RGB", alpha="yes")
    for _ in range(2):
        assert read_sar(tmp_path / "a.tif").shape == (6, 7, 3)
    assert capsys.readouterr().err.count("a band that a TIFF declares as alpha") == 1
