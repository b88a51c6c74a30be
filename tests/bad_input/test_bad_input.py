"""Bad input of every kind through the commands' own main(argv): one line, the exit code, and nothing left behind.

Each table is (what it is, the input, words that the one line must hold). Exit code 2: nothing was begun. Exit code 1: one image
of a folder is bad and the others are done. What looks odd but is good must work, and with the right result.
"""

import contextlib
import importlib.util
import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import torch
import yaml
from conftest import REPO, tiny_unet, tiny_vae
from files import save_image
from PIL import Image
from safetensors.torch import save_file

import main as train_command
from cdiffset import errors
from cdiffset.config import load_config
from cdiffset.images import read_sar_valid, without_georeference
from cdiffset.inference.record import FILE_NAME
from data import data_split

WEIGHTS = "diffusion_pytorch_model.safetensors"
_spec = importlib.util.spec_from_file_location("command_for_bad_input", REPO / "test.py")  # `test` is Python's own package
translate_command = sys.modules["command_for_bad_input"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(translate_command)

pytestmark = pytest.mark.filterwarnings("ignore")


def everything(folder: Path) -> set[str]:
    """All files and folders under a folder, hidden ones included."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def said(capsys) -> list[str]:
    """Lines on stderr, without progress bars."""
    lines = re.split(r"[\r\n]+", capsys.readouterr().err)
    return [line for line in lines if line.strip() and not re.match(r"(translating|validating|training)\b", line)]


def assert_refused(main, argv: list, words, folder: Path, capsys) -> None:
    """Exit code 2, one line with all the words, nothing new in the folder."""
    before = everything(folder)
    capsys.readouterr()
    assert errors.run(main, [str(word) for word in argv]) == 2
    lines = said(capsys)
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert "Traceback" not in lines[0] and len(lines[0]) < 1000
    for word in (words,) if isinstance(words, str) else words:
        assert word in lines[0], lines[0]
    assert everything(folder) == before


def named(cases) -> list:
    return [pytest.param(*case[1:], id=case[0]) for case in cases]


# ------------------------------------------------------------------------------------------------------------ configuration
HERE = "run.yaml"
MAKING = "work_dir: !!python/object/apply:os.mknod [touched]\n"
CONFIGS = [
    ("unknown key", "batchsize: 4\n", (HERE, "unknown key 'batchsize'", "did you mean 'batch_size'")),
    ("key that is a number", "5: 4\n", (HERE, "unknown key 5")),
    ("text for a number", "batch_size: many\n", ("batch_size: expected a whole number", "'many'")),
    ("true for a count", "seed: true\n", ("seed: expected a whole number", "True")),
    ("text for a mapping", "train_feeder_args: x\n", ("train_feeder_args: expected a mapping", "'x'")),
    ("null where a value must be", "prediction_type: ~\n", ("prediction_type: expected one of epsilon", "None")),
    ("bytes as a feeder argument", "test_feeder_args: {a: !!binary aGk=}\n", ("test_feeder_args: expected", "b'hi'")),
    ("tag that does not fit", "seed: !!int ''\n", (HERE, "no valid YAML")),
    ("tag that makes an object", MAKING, (HERE, "could not determine a constructor")),
    ("duplicate key", "seed: 1\nseed: 2\n", (HERE, "'seed' stands twice")),
    ("duplicate feeder argument", "test_feeder_args: {a: 1, a: 2}\n", (HERE, "'a' stands twice")),
    ("recursive alias", "test_feeder_args: {x: &a [*a]}\n", (HERE, "found unconstructable recursive node")),
    ("endless brackets", "seed: " + "[" * 9000, (HERE, "no valid YAML")),
    ("tab", "seed: 1\n\tbatch_size: 2\n", (HERE, "line 2")),
    ("empty file", "", (HERE, "holds nothing", "expected lines of key: value")),
    ("no mapping", "- seed\n", (HERE, "holds no mapping")),
    ("not UTF-8", "work_dir: caf\u00e9\n".encode("latin-1"), (HERE, "not UTF-8")),
    ("zero byte", "seed: 1\0\n", (HERE, "special characters")),
    ("30 digits", "seed: " + "9" * 30, ("seed: expected", "at most 9223372036854775807")),
    ("6000 digits", "seed: 0x" + "f" * 6000, ("seed: expected", "thousands of digits")),
    ("infinite", "learning_rate: 1e999\n", ("learning_rate: expected a number above 0",)),
    ("not a number", "weight_decay: .nan\n", ("weight_decay: expected a number", "nan")),
    ("negative", "batch_size: -4\n", ("batch_size: expected a whole number of at least 1", "-4")),
    ("beyond its range", "num_inference_steps: 1000\n", ("num_inference_steps: expected", "at most 999", "1000")),
    ("warm-up longer than the run", "num_iter: 10\n", ("num_warmup: expected at most num_iter (10)", "100")),
    ("indivisible batch", "gradient_accumulation_steps: 3\n", ("gradient_accumulation_steps: expected a divisor", "3")),
    ("placeholder", "accelerator_path: /path/to/best\n", ("accelerator_path", "placeholder")),
    ("module that is not there", "feeder: nowhere.Feeder\n", ("feeder: cannot import 'nowhere.Feeder'",)),
    ("base that is not there", "pretrained_model_name_or_path: ./nowhere\n", ("pretrained_model_name_or_path", "./nowhere")),
]  # fmt: skip


@pytest.mark.parametrize("written, words", named(CONFIGS))
def test_configurations(written, words, tmp_path, tiny_base, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / HERE).write_bytes(written.encode() if isinstance(written, str) else written)
    base = [] if "pretrained" in str(written) else ["--pretrained-model-name-or-path", tiny_base]
    assert_refused(train_command.main, ["--config", tmp_path / HERE, *base], words, tmp_path, capsys)


COMMAND_LINES = [
    ("config that is not there", ["--config", "none.yaml"], ("--config: cannot read none.yaml", "No such file")),
    ("config that is a folder", ["--config", "."], ("--config: cannot read .", "directory")),
    ("unknown option", ["--batchsize", "4"], ("unknown key 'batchsize' on the command line", "batch_size")),
    ("stray word", ["train"], ("unexpected 'train'", "--key value")),
    ("option without a value", ["--seed"], ("--seed", "expected one argument")),
    ("broken inline YAML", ["--train-feeder-args", "{a: ["], ("--train_feeder_args", "no valid inline YAML")),
    ("inline YAML nested too deep", ["--train-feeder-args", "{a: " * 9000], ("--train_feeder_args", "no valid inline YAML")),
]


@pytest.mark.parametrize("argv, words", named(COMMAND_LINES))
def test_command_lines(argv, words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert_refused(train_command.main, argv, words, tmp_path, capsys)


ODD_BUT_GOOD = [
    ("1e-5 that YAML reads as text", "learning_rate: 1e-5\n", {"learning_rate": 1e-5}),
    ("Windows line ends and byte order mark", "\ufeffseed: 3\r\n\r\nprompt: ''\r\n", {"seed": 3, "prompt": ""}),
    (
        "anchor and merge key", "train_feeder_args: &a {x: 1, y: 2}\ntest_feeder_args: {<<: *a, y: 3}\n",
        {"test_feeder_args": {"x": 1, "y": 3}},
    ),
    (
        "merge keys in a chain", "test_feeder_args: {x: &a {size: 1}, y: &b {<<: *a, size: 2}, <<: *b}\n",
        {"test_feeder_args": {"size": 2, "x": {"size": 1}, "y": {"size": 2}}},
    ),
    ("a bare no", "mixed_precision: no\n", {"mixed_precision": "no"}),
]  # fmt: skip


@pytest.mark.parametrize("written, expected", named(ODD_BUT_GOOD))
def test_odd_configurations_that_are_good(written, expected, tmp_path):
    (tmp_path / HERE).write_bytes(written.encode())
    config = load_config(["--config", str(tmp_path / HERE)])
    assert {name: getattr(config, name) for name in expected} == expected


# ------------------------------------------------------------------------------------------------------- lists and feeders
class Touch:
    """Unpickled, it makes a file: what any code could do."""

    def __init__(self, file: str):
        self.file = file

    def __reduce__(self):
        return os.mknod, (self.file,)


def test_what_is_refused_would_have_made_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for load in (lambda: pickle.loads(pickle.dumps([Touch("touched")])), lambda: yaml.unsafe_load(MAKING)):
        load()
        (tmp_path / "touched").unlink()


def qxs(number: int, kind="opt") -> str:
    return f"{kind}_256_oc_0.2/{number}.png"


GOOD_LIST = f"{qxs(1)}\n{qxs(2)}\n"
HUGE_INDEX = b"\x80\x02]" + b"r\xff\xff\xff\x7f" + b"."  # a list, remembered under number 2^31 - 1
LISTS = [
    ("empty", "test.txt", "", ("test.txt: the list is empty",)),
    ("absolute path", "test.txt", GOOD_LIST + "/etc/passwd\n", ("test.txt, line 3: '/etc/passwd'", "relative to")),
    ("path upwards", "test.txt", "../../secret/opt_256_oc_0.2/1.png\n", ("test.txt, line 1", "without '..'")),
    ("backslashes", "test.txt", "opt_256_oc_0.2\\1.png\n", ("test.txt, line 1", "forward slashes")),
    ("drive", "test.txt", "C:/opt_256_oc_0.2/1.png\n", ("test.txt, line 1", "relative to the data root")),
    ("duplicate", "test.txt", f"{GOOD_LIST}\n{qxs(1)}\n", ("test.txt, line 4", qxs(1), "stands in line 1 already")),
    ("one name twice", "test.txt", f"{GOOD_LIST}./{qxs(1)}\n", ("two pairs of one name", "sar_256_oc_0.2/1.png")),
    ("other layout", "test.txt", "images/1.png\n", ("images/1.png does not fit the layout of QXSFeeder",)),
    ("files that are not there", "test.txt", f"{qxs(1)}\n{qxs(8)}\n", ("1 of 2 pairs are incomplete", "8.png", "missing: SAR")),
    ("not UTF-8", "test.txt", b"\xff\xfeo\0p\0", ("test.txt: the list is not UTF-8",)),
    ("zero byte", "test.txt", "opt_256_oc_0.2/1\0.png\n", ("test.txt, line 1", "control characters")),
    ("another suffix", "test.json", "[]", ("test.json: expected a list that ends in .txt or .pkl",)),
    ("name without a split", "eo.txt", GOOD_LIST, ("eo.txt: expected either train or test in its name; give split",)),
    ("pickle of a mapping", "test.pkl", pickle.dumps({"a": "b"}), ("test.pkl: refused", "nothing else")),
    ("pickle of numbers", "test.pkl", pickle.dumps([1, 2]), ("test.pkl: refused", "nothing else")),
    ("pickle of nothing", "test.pkl", pickle.dumps([]), ("test.pkl: the list is empty",)),
    ("pickle that makes a file", "test.pkl", pickle.dumps([qxs(1), Touch("touched")]), ("test.pkl: refused", "nothing else")),
    ("pickle that takes memory", "test.pkl", HUGE_INDEX, ("test.pkl: the list is empty",)),
    ("pickle cut short", "test.pkl", pickle.dumps([qxs(1), qxs(2)])[:-5], ("test.pkl: refused",)),
    ("no pickle", "test.pkl", GOOD_LIST, ("test.pkl: refused",)),
]  # fmt: skip


def with_feeder(feeder: str, tiny_base: str, *options: str, **arguments) -> list[str]:
    """main.py's command line for a feeder of which only the test part is read."""
    words = (
        f"--phase test --work_dir run --feeder feeders.feeder.{feeder} --accelerator_path none --report_to none --num_worker 0"
    )
    given = ["--pretrained-model-name-or-path", tiny_base, "--test-feeder-args", json.dumps({"crop_size": 16, **arguments})]
    return [*words.split(), *given, *options]


def in_qxs(tiny_base: str, *options: str, **changes) -> list[str]:
    return with_feeder("QXSFeeder", tiny_base, *options, **{"dataroot": "data", "listroot": "test.txt", **changes})


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """A data root of two pairs in QXS's layout, in a folder that is the working directory."""
    monkeypatch.chdir(tmp_path)
    for kind in ("opt", "sar"):
        (tmp_path / f"data/{kind}_256_oc_0.2").mkdir(parents=True)
        for number in (1, 2):
            Image.new("L", (16, 16), 60 * number).save(tmp_path / "data" / qxs(number, kind))
    (tmp_path / "test.txt").write_text(GOOD_LIST)
    return tmp_path / "data"


@pytest.mark.parametrize("name, content, words", named(LISTS))
def test_lists(name, content, words, root, tmp_path, tiny_base, capsys):
    (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    assert_refused(train_command.main, in_qxs(tiny_base, listroot=name), words, tmp_path, capsys)


FEEDER_ARGUMENTS = [
    ("no data root", {"dataroot": "none"}, ("dataroot: no such folder: none",)),
    ("data root that is a file", {"dataroot": "test.txt"}, ("dataroot: no such folder: test.txt",)),
    ("data root that is a number", {"dataroot": 5}, ("dataroot is 5; expected a path",)),
    ("no list", {"listroot": "test_none.txt"}, ("test_none.txt: cannot read the list", "No such file")),
    ("list that is a folder", {"listroot": "test_folder.txt"}, ("test_folder.txt: cannot read the list", "directory")),
    ("crop larger than load size", {"crop_size": 16, "load_size": 8}, ("crop_size 16 is larger than load_size 8",)),
    ("crop of zero", {"crop_size": 0}, ("crop_size is 0; expected a whole number",)),
    ("negative crop", {"crop_size": -8}, ("crop_size is -8; expected a whole number",)),
    ("crop that is true", {"crop_size": True}, ("crop_size is True; expected a whole number",)),
    ("load size with a fraction", {"load_size": 2.5}, ("load_size is 2.5; expected a whole number",)),
    ("crop in words", {"crop_size": "big"}, ("crop_size is 'big'; expected a whole number",)),
    ("unknown argument", {"cropsize": 8}, ("test_feeder_args", "unexpected keyword argument 'cropsize'")),
    ("unknown split", {"split": "val"}, ("split is 'val'; expected train or test",)),
    ("limit of zero pixels", {"max_pixels": 0}, ("max_pixels is 0; expected",)),
    ("augmentation in words", {"hflip": "no"}, ("hflip is 'no'; expected true or false",)),
    ("augmentation of test pairs", {"rot": True}, ("rot: split test shows images as they are",)),
]


@pytest.mark.parametrize("changes, words", named(FEEDER_ARGUMENTS))
def test_feeder_arguments(changes, words, root, tmp_path, tiny_base, capsys):
    (tmp_path / "test_folder.txt").mkdir()
    assert_refused(train_command.main, in_qxs(tiny_base, **changes), words, tmp_path, capsys)


PAIR_LISTS = [
    ("one column", "a.png\n", ("test.csv, line 1: expected 'sar,eo', found 'a.png'",)),
    ("three columns", "sar,eo\na.png,b.png,c.png\n", ("test.csv, line 2: expected 'sar,eo'",)),
    ("header alone", "sar,eo\n", ("test.csv: the list is empty",)),
    ("path upwards", "../a.png,b.png\n", ("test.csv, line 1: '../a.png'",)),
    ("empty field", "a.png,\n", ("test.csv, line 1", "expected a path")),
]


@pytest.mark.parametrize("content, words", named(PAIR_LISTS))
def test_lists_of_pairs(content, words, root, tmp_path, tiny_base, capsys):
    (tmp_path / "test.csv").write_text(content)
    argv = with_feeder("PairedFolderFeeder", tiny_base, dataroot="data", listroot="test.csv")
    assert_refused(train_command.main, argv, words, tmp_path, capsys)


def test_what_lists_and_work_dirs_lead_to(root, tmp_path, tiny_base, capsys):
    """Windows line ends and blank lines are good: the next mistake is the checkpoint's."""
    words = ("work_dir: cannot write into test.txt/run", "Not a directory")
    assert_refused(train_command.main, in_qxs(tiny_base, "--work_dir", "test.txt/run"), words, tmp_path, capsys)
    (tmp_path / "test.txt").write_bytes("\r\n \r\n\n".join(GOOD_LIST.split()).encode())
    assert errors.run(train_command.main, in_qxs(tiny_base)) == 2
    assert "accelerator_path: there is no none" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    (root / qxs(1)).unlink()
    (root / qxs(1)).symlink_to(root / "gone.png")
    assert_refused(train_command.main, in_qxs(tiny_base), (qxs(1), "(missing: EO)"), tmp_path, capsys)


# ------------------------------------------------------------------------------------------------- images: a folder of each
def saved(image: Image.Image | np.ndarray, format: str, **options) -> bytes:
    written = io.BytesIO()
    (Image.fromarray(image) if isinstance(image, np.ndarray) else image).save(written, format, **options)
    return written.getvalue()


def tiff(bands: np.ndarray | tuple[int, int, int], **profile) -> bytes:
    """[C, H, W] => GeoTIFF; given a shape alone, a file of any size in a few bytes, whose tiles are left out."""
    count, height, width = bands if isinstance(bands, tuple) else bands.shape
    if isinstance(bands, tuple):
        tiles = {"tiled": True, "blockxsize": 8192, "blockysize": 8192} if height > 8192 else {}
        profile |= {"dtype": "uint8", "SPARSE_OK": "TRUE"} | tiles
    else:
        profile |= {"dtype": bands.dtype}
    with without_georeference(), rasterio.MemoryFile() as memory:
        with memory.open(driver="GTiff", count=count, height=height, width=width, **profile) as target:
            if not isinstance(bands, tuple):
                target.write(bands)
        return memory.read()


def claiming(png: bytes, side: int) -> bytes:
    """A PNG whose header claims another size, with the checksum to go with it."""
    import zlib

    header = b"IHDR" + side.to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def npy(array, **header) -> bytes:
    written = io.BytesIO()
    np.save(written, array, allow_pickle=True)
    content = written.getvalue()
    return content.replace(b"(8, 8), }" + b" " * 8, b"(800000, 80000), }", 1) if header else content


GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 3
PNG = saved(GREY, "PNG")
NOISE = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
VRT = '<VRTDataset rasterXSize="8" rasterYSize="8"><VRTRasterBand dataType="Byte" band="1"/></VRTDataset>'
FRAMES = [Image.fromarray(GREY // k) for k in (1, 2, 3)]
UNREADABLE = "unreadable, truncated or not an image"
BAD_IMAGES = [
    ("truncated.png", saved(NOISE, "PNG")[:1500], UNREADABLE),
    ("truncated.jpg", saved(NOISE, "JPEG")[:500], UNREADABLE),
    ("truncated.tif", tiff(np.moveaxis(NOISE, -1, 0))[:1500], UNREADABLE),
    ("zero_bytes.tif", b"", UNREADABLE),
    ("png_by_name.tif", PNG, UNREADABLE),
    ("tiff_by_name.png", tiff(GREY[None]), UNREADABLE),
    ("postscript.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n", UNREADABLE),
    ("virtual.tif", VRT.encode(), UNREADABLE),
    ("animated.gif", saved(FRAMES[0], "GIF", save_all=True, append_images=FRAMES[1:]), "3 frames; expected one image"),
    ("animated.webp", saved(FRAMES[0], "WEBP", save_all=True, append_images=FRAMES[1:]), "3 frames; expected one image"),
    ("animated.png", saved(FRAMES[0], "PNG", save_all=True, append_images=FRAMES[1:]), "3 frames; expected one image"),
    ("pages.tif", saved(FRAMES[0], "TIFF", save_all=True, append_images=FRAMES[1:]), "3 pages; expected one image"),
    ("all_nan.tif", tiff(np.full((1, 8, 8), np.nan, np.float32)), "a band without a single valid pixel"),
    ("all_nodata.tif", tiff(np.full((1, 8, 8), -9999, np.float32), nodata=-9999), "a band without a single valid pixel"),
    ("seven_bands.tif", tiff(np.stack([GREY.astype(np.float32)] * 7)), "7 bands; a SAR image has 1 to 4"),
    ("complex.tif", tiff(np.ones((1, 8, 8), np.complex64)), "DERIVED_SUBDATASET:AMPLITUDE:complex.tif"),
    ("objects.npy", npy(np.array([[Touch("touched")]], dtype=object)), UNREADABLE),
    ("archive.npy", (lambda file: (np.savez(file, a=GREY), file.getvalue())[1])(io.BytesIO()), "expected one array"),
    ("bomb.png", claiming(PNG, 60_000), "60000 x 60000 px in 1 bands; at most 268435456 px are opened"),
    ("bomb.tif", tiff((1, 100_000, 100_000)), "100000 x 100000 px in 1 bands; at most 4294967296 px are opened"),
    ("bomb_of_bands.tif", tiff((1100, 1000, 1000)), "1000 x 1000 px in 1100 bands; at most 268435456 px are opened"),
    ("bomb.npy", npy(GREY, claims=True), UNREADABLE),
]  # fmt: skip


def translate(base, checkpoint, sar, out, *options) -> list[str]:
    words = ["--sar-dir", sar, "--output-dir", out, "--checkpoint", checkpoint, "--pretrained-model-name-or-path", base]
    return [str(word) for word in (*words, "--num-inference-steps", "1", "--device", "cpu", *options)]


@pytest.fixture(scope="module")
def stage2(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("stage2")
    tiny_unet(in_channels=8, out_channels=5).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def translated_bad(tiny_base, stage2, tmp_path_factory) -> tuple[Path, int, list[str]]:
    """One folder of all the bad images and a good one, translated => (folder, exit code, lines on stderr)."""
    folder = tmp_path_factory.mktemp("bad")
    for place, (name, content, _) in enumerate(BAD_IMAGES):  # a folder each: some names differ in the suffix alone
        (folder / f"sar/{place:02}").mkdir(parents=True)
        (folder / f"sar/{place:02}" / name).write_bytes(content)
    (folder / "sar/good.png").write_bytes(PNG)
    argv = translate(tiny_base, stage2, "sar", "out", "--variance-dir", "variance")
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as told:
        patch.chdir(folder)
        code = errors.run(translate_command.main, argv)
    return folder, code, re.split(r"[\r\n]+", told.getvalue())


@pytest.mark.parametrize("place", range(len(BAD_IMAGES)), ids=[name for name, _, _ in BAD_IMAGES])
def test_bad_images_are_named_in_one_line_each(place, translated_bad):
    name, _, words = BAD_IMAGES[place]
    folder, _, lines = translated_bad
    about = [line for line in lines if f"sar/{place:02}/{name}: " in line]
    assert len(about) == 1 and about[0].startswith("skipped: ") and words in about[0], lines


def test_bad_images_leave_nothing_and_the_good_one_is_done(translated_bad):
    folder, code, lines = translated_bad
    assert code == 1 and not any("Traceback" in line for line in lines)
    assert any(line.startswith(f"{len(BAD_IMAGES)} skipped: ") for line in lines)
    made = {name for name in everything(folder) if not name.startswith("sar")}
    records = {f"out/{FILE_NAME}", f"variance/{FILE_NAME}"}
    assert made == {"out", "out/good.png", "variance", "variance/good.tif"} | records


EXIF = Image.Exif()
EXIF[274] = 6  # to be turned by 90 degrees to the right
BINARY = ((GREY > 90) * 255).astype(np.uint8)
DEEP = np.where(GREY == GREY.max(), np.nan, GREY.astype(np.float32))
DEEP[0, 0] = np.inf
TWO = np.stack([GREY, GREY.T]) // 2 * 2  # so that their mean is whole
# Name, content, and the plain image of which it must be the equal; None: that it works is enough.
GOOD_IMAGES = [
    ("one_pixel.png", saved(GREY[5:6, 5:6], "PNG"), None),
    ("strip.png", saved(Image.fromarray(np.resize(GREY, (1, 4000))), "PNG"), None),
    ("column.png", saved(Image.fromarray(np.resize(GREY, (600, 1))), "PNG"), None),
    ("cmyk.tif.jpg", saved(Image.new("CMYK", (8, 8), (0, 255, 255, 0)), "JPEG"), None),
    ("exif_rotated.png", saved(GREY[:4], "PNG", exif=EXIF), np.rot90(GREY[:4], -1)),
    ("sixteen_bit.png", saved(Image.fromarray(BINARY.astype(np.uint16) * 200), "PNG"), BINARY),
    ("nan_and_inf.tif", tiff(DEEP[None]), None),
    ("two_bands.tif", tiff(TWO), np.stack([TWO[0], TWO[0] // 2 + TWO[1] // 2, TWO[1]], -1)),
    ("jpeg_by_content.png", saved(Image.new("L", (8, 8), 90), "JPEG"), np.full((8, 8), 90, np.uint8)),
    ("UPPER.PNG", PNG, GREY),
]  # fmt: skip


@pytest.fixture(scope="module")
def translated_good(tiny_base, stage2, tmp_path_factory) -> tuple[Path, int]:
    folder = tmp_path_factory.mktemp("good")
    for place, (name, content, plain) in enumerate(GOOD_IMAGES):
        (folder / f"sar/{place}").mkdir(parents=True)
        (folder / f"sar/{place}" / name).write_bytes(content)
        if plain is not None:
            (folder / f"sar/plain/{place}").mkdir(parents=True)
            Image.fromarray(np.ascontiguousarray(plain)).save(folder / f"sar/plain/{place}/x.png")
    options = ("--conf-dir", folder / "confidence", "--variance-dir", folder / "variance", "--batch-size", "8")
    return folder, errors.run(translate_command.main, translate(tiny_base, stage2, folder / "sar", folder / "eo", *options))


@pytest.mark.parametrize("place", range(len(GOOD_IMAGES)), ids=[name for name, _, _ in GOOD_IMAGES])
def test_odd_images_that_are_good(place, translated_good):
    name, content, plain = GOOD_IMAGES[place]
    folder, code = translated_good
    assert code == 0
    eo = np.array(Image.open((folder / f"eo/{place}" / name).with_suffix(".png")))
    confidence = np.array(Image.open((folder / f"confidence/{place}" / name).with_suffix(".png")))
    with rasterio.open((folder / f"variance/{place}" / name).with_suffix(".tif")) as source:
        variance = source.read(1)
    assert eo.ndim == 3 and eo.shape[:2] == confidence.shape == variance.shape and np.isfinite(variance).all()
    if plain is not None:
        expected = np.array(Image.open(folder / f"eo/plain/{place}/x.png")).astype(int)
        assert eo.shape == expected.shape and np.abs(eo - expected).max() <= 1


def test_a_mask_beside_a_raster_belongs_to_it(tmp_path):
    """Also one that names another file, which docs/security.md warns of."""
    (tmp_path / "x.tif").write_bytes(tiff(GREY[None].astype(np.float32) + 1))
    (tmp_path / "mask.tif").write_bytes(tiff(BINARY[None]))
    source = f"<SimpleSource><SourceFilename>{tmp_path / 'mask.tif'}</SourceFilename></SimpleSource>"
    (tmp_path / "x.tif.msk").write_text(
        '<VRTDataset rasterXSize="8" rasterYSize="8"><Metadata><MDI key="INTERNAL_MASK_FLAGS_1">2</MDI></Metadata>'
        f'<VRTRasterBand dataType="Byte" band="1">{source}</VRTRasterBand></VRTDataset>'
    )
    pixels, valid = read_sar_valid(tmp_path / "x.tif")
    assert (valid == (BINARY > 0)).all() and not pixels[~valid].any()


def test_a_translation_follows_links_but_writes_through_no_file(tiny_base, stage2, tmp_path, capsys):
    """To images, to folders of images, and to folders of results; a result that is a link is replaced, and none is writable by
    all. Then the limit of pixels is the user's."""
    sar, out, outside = (tmp_path / name for name in ("sar", "out", "outside"))
    for name in ("outside/1.png", "outside/2.png"):
        save_image(tmp_path / name, np.full((16, 16), 200))
    for folder in (sar / "sub", out, tmp_path / "elsewhere"):
        folder.mkdir(parents=True)
    (sar / "sub/x.png").write_bytes(PNG)
    (sar / "3.png").symlink_to(outside / "1.png")
    (sar / "more").symlink_to(outside)
    (out / "sub").symlink_to(tmp_path / "elsewhere")
    (out / "3.png").symlink_to(outside / "2.png")
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    old = os.umask(0o022)
    try:
        assert (
            errors.run(translate_command.main, translate(tiny_base, stage2, sar, out, "--variance-dir", tmp_path / "var")) == 0
        )
    finally:
        os.umask(old)
    assert everything(out) == {"3.png", "more", "more/1.png", "more/2.png", "sub", FILE_NAME}
    assert everything(tmp_path / "elsewhere") == {"x.png"} and not (out / "3.png").is_symlink()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    assert {path.stat().st_mode & 0o777 for path in (out / "3.png", tmp_path / "var/3.tif")} == {0o644}
    argv = translate(tiny_base, stage2, sar / "sub", tmp_path / "limited", "--max-pixels")
    assert errors.run(translate_command.main, [*argv, "63"]) == 1
    assert "8 x 8 px in 1 bands; at most 63 px" in capsys.readouterr().err and not (tmp_path / "limited").exists()
    assert errors.run(translate_command.main, [*argv, "64"]) == 0


# --------------------------------------------------------------------------------------------------------------- checkpoints


def net(**changes):
    """A maker of a folder of a U-Net of stage 2, unless changed, with its config.json."""

    def make(folder: Path) -> Path:
        tiny_unet(**{"in_channels": 8, "out_channels": 5, **changes}).save_pretrained(folder / "net")
        return folder / "net"

    return make


def bare(change=lambda tensors: None, name="unet.safetensors", **changes):
    """A maker of a bare safetensors file, its tensors changed before."""

    def make(folder: Path) -> Path:
        unet = tiny_unet(**{"in_channels": 8, "out_channels": 5, **changes})
        tensors = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
        change(tensors)
        (folder / name).parent.mkdir(exist_ok=True)
        save_file(tensors, folder / name)
        return folder / name

    return make


def inside(make):
    """A maker of the folder of what is made."""
    return lambda folder: make(folder).parent


def with_json(make, name: str = "config.json", **values):
    """A maker with other values in a JSON file beside what is made; a text in place of all of them."""

    def change(folder: Path) -> Path:
        made = make(folder)
        file = made / name
        content = values.get("text") or json.dumps({**json.loads(file.read_text()), **values})
        file.write_text(content)
        return made

    return change


def checkpoint(text: str):
    """A maker of a checkpoint's folder with this in its checkpoint.json."""

    def make(folder: Path) -> Path:
        tiny_unet(in_channels=8, out_channels=5).save_pretrained(folder / "best/unet")
        (folder / "best/checkpoint.json").write_text(text)
        return folder / "best"

    return make


def sharded(change=lambda shard, index: None):
    """A maker of a folder of several files and their index."""

    def make(folder: Path) -> Path:
        tiny_unet(in_channels=8, out_channels=5).save_pretrained(folder / "net", max_shard_size="300KB")
        shards = sorted((folder / "net").glob("*-of-*.safetensors"))
        assert len(shards) > 1
        change(shards[0], folder / f"net/{WEIGHTS}.index.json")
        return folder / "net"

    return make


def upwards(shard: Path, index: Path) -> None:
    shard.rename(shard.parent.with_name("outside.safetensors"))
    index.write_text(index.read_text().replace(shard.name, "../outside.safetensors"))


def spoiled(content):
    """A maker of a file unet.safetensors with another content, made from the right one."""

    def make(folder: Path) -> Path:
        file = bare()(folder)
        file.write_bytes(content(file.read_bytes()))
        return file

    return make


def pickled(name: str):
    def make(folder: Path) -> Path:
        torch.save({"conv_in.weight": Touch(str(folder / "touched"))}, folder / name)
        return folder / name

    return make


def rename_all(tensors):
    for name in sorted(tensors):
        tensors[f"net.{name}"] = tensors.pop(name)


def transpose(tensors):
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    tensors[name] = tensors[name].T.contiguous()


def poison(tensors):
    tensors["time_embedding.linear_1.weight"][0, 0] = torch.nan


CHECKPOINTS = [
    ("nothing there", lambda folder: folder / "none", ("--checkpoint: there is no", "none", "expected a .safetensors file")),
    ("empty folder", lambda folder: (folder / "net").mkdir() or folder / "net", ("--checkpoint", "holds none of")),
    ("unpatched", bare(in_channels=4, out_channels=4), ("unet.safetensors", "expected 8 input channels", "found 4 and 4")),
    ("7 outputs", bare(out_channels=7), ("unet.safetensors", "4 (stage 1) or 5 (stage 2)", "found 8 and 7")),
    ("stage 1, which has no variance", bare(out_channels=4), ("--variance-dir", "stage 1 checkpoint (4 output channels)")),
    ("missing tensor", bare(lambda tensors: tensors.pop("conv_norm_out.bias")), ("1 missing (conv_norm_out.bias",)),
    ("extra tensor", bare(lambda tensors: tensors.update(more=torch.ones(2))), ("1 unexpected (more",)),
    ("other names", bare(rename_all), ("unet.safetensors is no U-Net", "conv_in.weight")),
    ("transposed", bare(transpose), ("attn2.to_k.weight of shape [32, 64], found [64, 32]",)),
    ("NaN", bare(poison), ("time_embedding.linear_1.weight holds NaN or Inf",)),
    ("width of SD 1.5", net(cross_attention_dim=48), ("prompts of width 48", "gives 64")),
    ("folder of other layers", inside(bare(name=f"net/{WEIGHTS}", layers_per_block=2)), ("tensors, found", "wrong base")),
    ("config that is no U-Net's", with_json(net(), block_out_channels="many"), ("config.json of", "describes no U-Net")),
    ("config of another size", with_json(net(), block_out_channels=[16, 64]), ("of shape",)),
    ("truncated weights", spoiled(lambda content: content[:-100]), ("damaged or no safetensors file",)),
    ("header that claims 2^60 bytes", spoiled(lambda content: (2**60).to_bytes(8, "little") + content[8:]), ("damaged or no",)),
    ("empty file", spoiled(lambda content: b""), ("damaged or no safetensors file",)),
    ("pickle named .safetensors", pickled("unet.safetensors"), ("damaged or no safetensors file",)),
    ("pickle named .bin", pickled("unet.bin"), ("is a .bin file", "expected a .safetensors file")),
    ("folder of a pickle", inside(pickled("diffusion_pytorch_model.bin")), ("holds none of",)),
    ("shards out of the folder", sharded(upwards), ("is no index of safetensors files", "no .safetensors file beside it")),
    ("shard that is not there", sharded(lambda shard, _: shard.unlink()), ("-00001-of-", "No such file")),
    ("damaged checkpoint.json", checkpoint('{"iteration": '), ("checkpoint.json is damaged",)),
    ("checkpoint.json that is a list", checkpoint("[]"), ("checkpoint.json is damaged", "expected a mapping")),
]  # fmt: skip


@pytest.fixture
def sar(tmp_path) -> Path:
    (tmp_path / "sar").mkdir()
    (tmp_path / "sar/x.png").write_bytes(PNG)
    return tmp_path / "sar"


@pytest.mark.parametrize("make, words", named(CHECKPOINTS))
def test_checkpoints(make, words, tiny_base, sar, tmp_path, capsys):
    argv = translate(tiny_base, make(tmp_path), sar, tmp_path / "out", "--variance-dir", tmp_path / "variance")
    assert_refused(translate_command.main, argv, words, tmp_path, capsys)
    assert not (tmp_path / "touched").exists()


def test_networks_that_cannot_be_trained(argv, tiny_base, stage2, tmp_path, capsys):
    """A checkpoint of stage 2 starts no stage 1, and the U-Net of a base must be for its VAE."""
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    tiny_unet(in_channels=9).save_pretrained(base / "unet")
    for options, words in (
        ({"accelerator_path": stage2}, "accelerator_path: stage 1 (confidence: false) expects 4 output channels"),
        ({"pretrained_model_name_or_path": base}, "expected 4 input and output channels, as its vae/ has, found 9 and 4"),
    ):
        assert errors.run(train_command.main, argv(tmp_path / "run", **options)) == 2
        (line,) = (line for line in said(capsys) if line.startswith("error: "))
        assert words in line and not list((tmp_path).glob("run/**/*.safetensors"))


GOOD_CHECKPOINTS = {
    "half precision": bare(lambda tensors: tensors.update({name: tensor.half() for name, tensor in tensors.items()})),
    "sharded": sharded(),
    "bare": bare(name=WEIGHTS),
    "checkpoint.json without config": checkpoint("{}"),
}


@pytest.fixture(scope="module")
def expected(tiny_base, stage2, tmp_path_factory) -> np.ndarray:
    folder = tmp_path_factory.mktemp("expected")
    save_image(folder / "sar/x.png", GREY)
    assert errors.run(translate_command.main, translate(tiny_base, stage2, folder / "sar", folder / "out")) == 0
    return np.array(Image.open(folder / "out/x.png")).astype(int)


@pytest.mark.parametrize("form", GOOD_CHECKPOINTS)
def test_odd_checkpoints_that_are_good(form, tiny_base, sar, expected, tmp_path):
    argv = translate(tiny_base, GOOD_CHECKPOINTS[form](tmp_path), sar, tmp_path / "out")
    assert errors.run(translate_command.main, argv) == 0
    found = np.array(Image.open(tmp_path / "out/x.png")).astype(int)
    assert np.abs(found - expected).max() <= (2 if form == "half precision" else 0)


# --------------------------------------------------------------------------------------------------------------- base models
def pickle_in_place_of(weights: str, name: str):
    def change(base: Path) -> None:
        (base / weights).unlink()
        torch.save({"x": Touch(str(base / "touched"))}, base / name)

    return change


def vae_of_16_channels(base: Path) -> None:
    vae = tiny_vae()
    type(vae)(**{**vae.config, "latent_channels": 16}).save_pretrained(base / "vae")


def config_of(part: str, **values):
    return with_json(lambda base: base, part, **values)


def code_of_its_own(base: Path) -> None:
    """What trust_remote_code would run."""
    for name in ("text_encoder", "tokenizer"):
        (base / name / "own.py").write_text(f"open({str(base / 'touched')!r}, 'w')\nclass Own: pass\n")
    config = json.loads((base / "text_encoder/config.json").read_text())
    config |= {"auto_map": {"AutoModel": "own.Own", "CLIPTextModel": "own.Own"}, "model_type": "own"}
    (base / "text_encoder/config.json").write_text(json.dumps(config))
    (base / "text_encoder/model.safetensors").write_bytes(b"")


BASES = [
    ("no tokenizer", lambda base: shutil.rmtree(base / "tokenizer"), ("no complete Stable Diffusion", "lacks tokenizer/")),
    ("no weights of the VAE", lambda base: (base / "vae" / WEIGHTS).unlink(), ("vae/", f"lacks {WEIGHTS} (or ")),
    ("VAE cut short", lambda base: (base / "vae" / WEIGHTS).write_bytes(b"\x10"), ("cannot load vae/",)),
    ("VAE of 16 channels", vae_of_16_channels, ("--checkpoint", "expected 32 input channels", "found 8 and 5")),
    ("VAE config that is no mapping", config_of("vae/config.json", text="[]"), ("cannot load vae/",)),
    ("VAE of another size", config_of("vae/config.json", block_out_channels=[8, 8, 16]), ("vae/",)),
    ("pickle as the VAE", pickle_in_place_of(f"vae/{WEIGHTS}", "vae/diffusion_pytorch_model.bin"), ("cannot load vae/",)),
    ("pickle as the text encoder", pickle_in_place_of("text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
     ("cannot load text_encoder/",)),
    ("code of its own", code_of_its_own, ("text_encoder/",)),
    ("scheduler of words", config_of("scheduler/scheduler_config.json", beta_schedule="x"), ("cannot load scheduler/",)),
]  # fmt: skip


@pytest.mark.parametrize("damage, words", named(BASES))
def test_bases(damage, words, tiny_base, stage2, sar, tmp_path, capsys):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    damage(base)
    assert_refused(translate_command.main, translate(base, stage2, sar, tmp_path / "out"), words, tmp_path, capsys)
    assert not (base / "touched").exists()


# ----------------------------------------------------------------------------------------------------------- splitting data
SPLITS = [
    ("no data set", ["--dataroot", "data"], ("--dataset",)),
    ("unknown data set", ["--dataset", "x", "--dataroot", "data"], ("--dataset", "'x'", "qxs")),
    ("no data root", ["--dataset", "qxs", "--dataroot", "none"], ("--dataroot: no such folder: none",)),
    ("ratio of 0", ["--dataset", "qxs", "--dataroot", "data", "--ratio", "0"], ("--ratio is 0; expected 1 to 99",)),
    ("ratio of 100", ["--dataset", "qxs", "--dataroot", "data", "--ratio", "100"], ("--ratio is 100; expected 1 to 99",)),
    ("ratio in words", ["--dataset", "qxs", "--dataroot", "data", "--ratio", "half"], ("--ratio", "'half'")),
    ("other layout", ["--dataset", "saropt", "--dataroot", "data"], ("does not have the layout trainB/N.png",)),
    ("output that cannot be written", ["--dataset", "qxs", "--dataroot", "data", "--ratio", "50", "--output", "test.txt/x"],
     ("--output: cannot write into test.txt/x", "Not a directory")),
]  # fmt: skip


@pytest.mark.parametrize("argv, words", named(SPLITS))
def test_splits(argv, words, root, tmp_path, capsys):
    assert_refused(data_split.main, argv, words, tmp_path, capsys)


@pytest.mark.parametrize("name, code", [("a\nb.png", 2), (" 1.png", 0), ("a\\b.png", 2), (os.fsdecode(b"\xff.png"), 2)])
def test_names_that_no_list_can_hold(name, code, root, tmp_path):
    for kind in ("opt", "sar"):
        save_image(root / f"{kind}_256_oc_0.2" / name, GREY)
    argv = ["--dataset", "qxs", "--dataroot", "data", "--ratio", "50", "--output", "lists"]
    assert errors.run(data_split.main, argv) == code and (tmp_path / "lists").exists() == (code == 0)


# -------------------------------------------------------------------------------------------------- real processes, and speed


AND_THEN = """
import runpy, sys
sys.argv = {argv!r}
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
except SystemExit as ended:
    print("code", ended.code, "torch" in sys.modules, "diffusers" in sys.modules)
"""


HELP = [
    "main.py",
    "test.py",
    "calibrate.py",
    "evaluate.py",
    "audit.py",
    "results/table.py",
    "data/data_split.py",
    "data/simulate.py",
]
WRONG = ["main.py --seed x", "test.py --seed x", "data/data_split.py --ratio x"]


@pytest.mark.parametrize("command", [*(f"{program} --help" for program in HELP), *WRONG])
def test_help_and_mistakes_do_not_wait_for_pytorch(command, tmp_path):
    program, *options = command.split()
    for name in ("torch", "torchvision"):  # builds that fit each other; others are mended first, which imports PyTorch
        (tmp_path / f"{name}-9.dist-info").mkdir()
        (tmp_path / f"{name}-9.dist-info/METADATA").write_text(f"Name: {name}\nVersion: 9\n")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(REPO)])}
    code = AND_THEN.format(argv=[str(REPO / program), *options])
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    if "--help" in options:
        assert "usage:" in ended.stdout and ended.stdout.endswith("code 0 False False\n"), ended.stderr
    else:
        assert ended.stdout == "code 2 False False\n"
        assert re.fullmatch(r"error: .*\n", ended.stderr) and "x" in ended.stderr
