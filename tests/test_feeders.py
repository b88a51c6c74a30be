"""Feeders: the same crop and orientation of both images, randomness tied to (seed, epoch, index), errors that name the file."""

import os
import pickle
from itertools import product
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from files import save_image, save_raster, touch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import DataLoader

from cdiffset.errors import UserError
from cdiffset.pairing import read_list, relative_path, split_of
from feeders.feeder import PairedFolderFeeder, QXSFeeder, SAR2EOFeeder, SAROptFeeder, SENMSFeeder, SpaceNetFeeder, StellarFeeder

SIZE, CROP = 12, 8
AUGMENTATIONS = {"hflip": True, "vflip": True, "rot": True}
ENTRIES = [f"opt_256_oc_0.2/{number}.png" for number in (1, 2, 3)]


def coded(size=SIZE, blue=0):
    """Pixels that tell their place: red is the row, green the column."""
    rows, columns = np.mgrid[:size, :size]
    return np.stack([rows, columns, np.full_like(rows, blue)], -1).astype(np.uint8)


@pytest.fixture
def root(tmp_path):
    """A QXS data root of 3 coded pairs, in a folder whose name would mislead a search for substrings."""
    root = tmp_path / "train_opt_256_oc_0.2"
    for number in (1, 2, 3):
        save_image(root / f"opt_256_oc_0.2/{number}.png", coded(blue=number))
        save_image(root / f"sar_256_oc_0.2/{number}.png", coded(blue=100 + number))
    return root


def qxs(root, entries=ENTRIES, name="train_eo_list_080.txt", **options):
    (root / name).write_text("\n".join(entries) + "\n")
    for_test = options.get("split") == "test" or name.startswith("test")
    augmentations = {} if for_test else AUGMENTATIONS
    return QXSFeeder(root, root / name, **{"crop_size": CROP} | augmentations | options)


def levels(image):
    """[3, H, W] in [-1, 1] => whole numbers 0-255 [H, W, 3]."""
    return np.rint((image.numpy().transpose(1, 2, 0) + 1) * 127.5).astype(int)


def same_items(first, second):
    return all(torch.equal(first[kind], second[kind]) for kind in ("sar", "eo")) and first["name"] == second["name"]


# what an item is


def test_item(root):
    feeder = qxs(root)
    item = feeder[2]
    assert len(feeder) == len(list(feeder)) == 3 and set(item) == {"sar", "eo", "name"}
    assert item["name"] == "opt_256_oc_0.2/3" and feeder.names == [f"opt_256_oc_0.2/{k}" for k in (1, 2, 3)]
    for kind, blue in (("sar", 103), ("eo", 3)):
        assert item[kind].dtype == torch.float32 and item[kind].shape == (3, CROP, CROP) and item[kind].is_contiguous()
        assert (levels(item[kind])[..., 2] == blue).all()
    assert item["eo"][2, 0, 0].item() == pytest.approx(3 / 127.5 - 1)
    assert same_items(feeder[-1], item)
    with pytest.raises(IndexError):
        feeder[0, 3]
    with pytest.raises(UserError, match="crop_size 256"):
        qxs(root, crop_size=None)[0]  # the data set's own


def test_sar_and_eo_stay_aligned_in_every_orientation_and_all_crops(root):
    feeder = qxs(root)
    orientations, corners, turned = set(), set(), []
    for epoch in range(130):
        for index in range(3):
            item = feeder[epoch, index]
            place = levels(item["eo"])[..., :2]
            assert (levels(item["sar"])[..., :2] == place).all()
            corners.add(tuple(place.min((0, 1))))
            assert (place.max((0, 1)) - place.min((0, 1)) == CROP - 1).all()
            orientations.add((tuple(place[0, 1] - place[0, 0]), tuple(place[1, 0] - place[0, 0])))
            turned.append(place[0, 0, 0] == place[1, 0, 0])  # rows lie along the width
    assert len(orientations) == 8 and np.mean(turned) == pytest.approx(0.5, abs=0.1)
    assert corners == {(top, left) for top in range(SIZE - CROP + 1) for left in range(SIZE - CROP + 1)}


def test_linked_and_renamed_datasets_have_a_feeder(tmp_path):
    """SAR2EO and rendered SpaceNet6: plain, and linked into one folder from outside it."""
    folders = {"A": tmp_path / "SAR-EO/SAR/train", "B": tmp_path / "SAR-EO/EO/train"}
    for letter, blue in (("A", 7), ("B", 5)):
        save_image(folders[letter] / "HH_0001.png", coded(blue=blue)[..., 2])
        (tmp_path / f"AB/train{letter}").mkdir(parents=True)
        (tmp_path / f"AB/train{letter}/HH_0001.png").symlink_to(folders[letter] / "HH_0001.png")
        save_image(tmp_path / f"chips/train{letter}/SN6_tile_1_2.png", coded(blue=blue)[..., 2])
    (tmp_path / "train.txt").write_text("trainB/HH_0001.png\n")
    (tmp_path / "chips_train.txt").write_text("trainB/SN6_tile_1_2.png\n")
    for feeder in (
        PairedFolderFeeder(SIZE, "train", sar_dir=folders["A"], eo_dir=folders["B"]),
        SAROptFeeder(tmp_path / "AB", tmp_path / "train.txt", crop_size=SIZE),
        SAROptFeeder(tmp_path / "chips", tmp_path / "chips_train.txt", crop_size=SIZE),
    ):
        assert (levels(feeder[0]["sar"]) == 7).all() and (levels(feeder[0]["eo"]) == 5).all()


@pytest.mark.parametrize("on", sorted(set(product((False, True), repeat=3)) - {(False,) * 3}))
def test_each_switch_turns_its_own_augmentation_on_and_leaves_the_crops(root, on):
    feeder = qxs(root, seed=3, **dict(zip(AUGMENTATIONS, on, strict=True)))
    for epoch in range(15):
        rng = np.random.default_rng([3, epoch, 1])
        top, left = rng.integers(SIZE - CROP + 1), rng.integers(SIZE - CROP + 1)
        flipped, upside_down, turned = (drawn < 0.5 and switch for drawn, switch in zip(rng.random(3), on, strict=True))
        expected = coded(blue=2)[top : top + CROP, left : left + CROP]
        expected = expected[:: -1 if upside_down else 1, :: -1 if flipped else 1]
        assert (levels(feeder[epoch, 1]["eo"]) == (np.rot90(expected) if turned else expected)).all()


def test_augmentations_are_off_unless_asked_for_and_for_training_alone(root):
    (root / "train.txt").write_text("\n".join(ENTRIES))
    folders = {"sar_dir": root / "sar_256_oc_0.2", "eo_dir": root / "opt_256_oc_0.2"}
    for feeder in (QXSFeeder(root, root / "train.txt", SIZE), PairedFolderFeeder(SIZE, "train", **folders)):
        assert all((levels(feeder[epoch, 0]["eo"]) == coded(blue=1)).all() for epoch in range(20))
    turned = PairedFolderFeeder(SIZE, "train", **folders, rot=True)
    assert any((levels(turned[epoch, 0]["eo"]) != coded(blue=1)).any() for epoch in range(20))
    qxs(root, name="test.txt", hflip=False)
    with pytest.raises(UserError, match="hflip, rot: split test shows images as they are, expected false"):
        qxs(root, name="test.txt", hflip=True, rot=True)
    with pytest.raises(UserError, match="vflip: split test"):
        PairedFolderFeeder(CROP, "test", **folders, vflip=True)
    with pytest.raises(UserError, match="rot is 1; expected true or false"):
        PairedFolderFeeder(CROP, "train", **folders, rot=1)


def test_test_split_is_the_centre_unaltered(root):
    feeder = qxs(root, name="test_eo_list_080.txt")
    item = feeder[5, 0]
    assert (levels(item["eo"]) == coded(blue=1)[2:10, 2:10]).all()
    assert (levels(item["sar"]) == coded(blue=101)[2:10, 2:10]).all()
    pixels = item["sar_pixels"]  # what the starting noise follows from
    assert pixels.dtype == np.float32 and (pixels == coded(blue=101)[2:10, 2:10]).all()


def test_items_depend_on_seed_epoch_and_index_alone(root):
    feeder, again, other = qxs(root), qxs(root), qxs(root, seed=1)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    forward = [feeder[7, index] for index in range(3)]
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()
    np.random.seed(0)
    torch.manual_seed(0)
    assert all(same_items(again[7, index], forward[index]) for index in (2, 0, 1))
    assert same_items(feeder[1], feeder[0, 1])
    place = [levels(item["eo"])[..., :2].tobytes() for k in range(50) for item in (feeder[k, 0], feeder[k, 1], other[k, 0])]
    for first, second in ((place[0:-3:3], place[3::3]), (place[::3], place[1::3]), (place[::3], place[2::3])):
        assert sum(a != b for a, b in zip(first, second, strict=True)) > 40


def test_workers_change_nothing(root):
    feeder = qxs(root)
    keys = [(epoch, index) for epoch in range(3) for index in (2, 0, 1)]
    batches = [
        list(DataLoader(feeder, batch_size=2, sampler=keys, num_workers=workers, multiprocessing_context=context))
        for workers, context in ((0, None), (2, "fork"))
    ]
    assert len(batches[0]) == 5 and batches[0][0]["sar"].shape == (2, 3, CROP, CROP)
    for alone, worked in zip(*batches, strict=True):
        assert torch.equal(alone["sar"], worked["sar"]) and torch.equal(alone["eo"], worked["eo"])
        assert alone["name"] == worked["name"]


def test_the_gsd_is_the_data_sets_or_that_of_your_own_pairs(pair_folders):
    facts = [(f.gsd_m, f.default_crop_size) for f in (QXSFeeder, SAROptFeeder, SpaceNetFeeder, SENMSFeeder)]
    assert facts == [(1.0, 256), (1.0, 512), (0.5, 512), (10.0, 256)]
    assert StellarFeeder.gsd_m is None and PairedFolderFeeder.gsd_m is None
    folders = {f"{kind}_dir": pair_folders / "train" / kind for kind in ("sar", "eo")}
    assert PairedFolderFeeder(32, "train", **folders, gsd_m=2.5).gsd_m == 2.5
    for wrong in (0, -1, True, "2.5"):
        with pytest.raises(UserError, match="gsd_m is .*; expected metres per pixel"):
            PairedFolderFeeder(32, "train", **folders, gsd_m=wrong)


# EO -> SAR


SN6 = "train/AOI_11_Rotterdam/{0}/SN6_Train_AOI_11_Rotterdam_{0}_20190804111224_20190804111453_tile_8679.tif"
ROI = "ROIs1158_spring/{0}_1/ROIs1158_spring_{0}_1_p30.png"


@pytest.mark.parametrize(
    ("feeder", "eo", "sar"),
    [
        (QXSFeeder, "opt_256_oc_0.2/17.png", "sar_256_oc_0.2/17.png"),
        (QXSFeeder, "opt/opt_256_oc_0.2/opt_256_oc_0.2.png", "opt/sar_256_oc_0.2/opt_256_oc_0.2.png"),
        (SAROptFeeder, "trainB/1.png", "trainA/1.png"),
        (SAROptFeeder, "testB/testB.png", "testA/testB.png"),
        (SAR2EOFeeder, "SAR-EO/EO/validation/00017.png", "SAR-EO/SAR/validation/00017.png"),
        (SpaceNetFeeder, SN6.format("PS-RGB"), SN6.format("SAR-Intensity")),
        (SENMSFeeder, ROI.format("s2"), ROI.format("s1")),
        (SENMSFeeder, "s2_2/s2_140/ROIs1970_fall_s2_140_p7.png", "s2_2/s1_140/ROIs1970_fall_s1_140_p7.png"),
    ],
)
def test_sar_path_follows_from_eo_path(feeder, eo, sar):
    assert feeder.eo_to_sar(PurePosixPath(eo)) == PurePosixPath(sar)


OUTSIDE = {
    QXSFeeder: ["sar_256_oc_0.2/1.png", "xopt_256_oc_0.2/1.png", "opt_256_oc_0.2", "opt_256_oc_0.2/opt_256_oc_0.2/1.png"],
    SAROptFeeder: ["trainA/1.png", "trainB/testB/1.png"],
    SpaceNetFeeder: ["PS-RGB/tile_8679.tif", "PS-MS/SN6_PS-RGB_1.tif", SN6.format("SAR-Intensity")],
    SENMSFeeder: [ROI.format("s1"), "ROIs1158_spring/s2_1/ROIs1158_spring_s2_2_p30.png", "ROIs1158_spring_s2_1_p30.png"],
}


@pytest.mark.parametrize(("feeder", "eo"), [(feeder, eo) for feeder, paths in OUTSIDE.items() for eo in paths])
def test_eo_paths_outside_the_layout(feeder, eo):
    with pytest.raises(UserError, match=f"{eo} does not fit the layout of {feeder.__name__}"):
        feeder.eo_to_sar(PurePosixPath(eo))


def test_spacenet_polarisations(tmp_path):
    folder = tmp_path / "train/AOI_11_Rotterdam"
    save_image(folder / "PS-RGB/SN6_PS-RGB_1.tif", coded(101))
    ramp = np.arange(101 * 101, dtype=np.float32).reshape(101, 101)
    save_raster(folder / "SAR-Intensity/SN6_SAR-Intensity_1.tif", np.stack([ramp, ramp * 2, ramp.T, -ramp]))
    (tmp_path / "test.txt").write_text("train/AOI_11_Rotterdam/PS-RGB/SN6_PS-RGB_1.tif\n")
    hh, cross, vv = SpaceNetFeeder(tmp_path, tmp_path / "test.txt", crop_size=101)[0]["sar"].numpy()
    assert hh == pytest.approx(-vv, abs=1e-5)  # opposite ramps
    assert hh == pytest.approx(np.clip((ramp / 10200 - 0.01) / 0.98, 0, 1) * 2 - 1, abs=1e-4)
    assert cross == pytest.approx((hh + hh.T) / 2, abs=1e-5)  # HV is HH's ramp, VH its transpose


# lists


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_malicious_pickle_is_refused_without_effect(root, protocol):
    (root / "train.pkl").write_bytes(pickle.dumps([*ENTRIES, Evil(root / "evil")], protocol))
    with pytest.raises(UserError, match="train.pkl: refused; a pickled list may hold strings and nothing else"):
        QXSFeeder(root, root / "train.pkl")
    assert not (root / "evil").exists()


# Letters, numbers and marks of all alphabets: what a file may be called and a line of a list can hold.
NAME = st.text(st.characters(categories=("L", "N", "M")), min_size=1, max_size=6)
RELATIVE = st.lists(NAME, min_size=1, max_size=4).map("/".join)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(RELATIVE, min_size=1, max_size=6, unique_by=str.strip),
    st.sampled_from(["\n", "\r\n", "\n\n", " \n"]),
    st.sampled_from([b"", b"\xef\xbb\xbf"]),
)
def test_any_list_of_names_comes_back_in_each_format(tmp_path_factory, names, line_end, bom):
    folder = tmp_path_factory.mktemp("lists")
    (folder / "a.txt").write_bytes(bom + line_end.join(names).encode())
    (folder / "a.pkl").write_bytes(pickle.dumps(names))
    for name in ("a.txt", "a.pkl"):
        entries = read_list(folder / name, (".txt", ".pkl"))
        assert [text for _, text in entries] == names
        assert [relative_path(text, where).as_posix() for where, text in entries] == names


@settings(max_examples=100, deadline=None)
@given(
    st.one_of(st.text(max_size=12), st.lists(st.sampled_from(["..", ".", "a", "", "/", "\\", "C:"]), max_size=6).map("/".join))
)
def test_any_path_stays_in_the_root_or_is_refused(text):
    try:
        path = relative_path(text, "list, line 1")
    except UserError as error:
        assert "list, line 1" in str(error)
    else:
        assert path.name and os.path.commonpath(["/top", os.path.normpath(f"/top/{path}")]) == "/top"
        assert os.path.normpath(f"/top/{path}") != "/top"


@pytest.mark.parametrize(("dataroot", "listroot"), [("/path/to/QXS", "train.txt"), (".", "/path/to/train.txt")])
def test_placeholders_are_named(dataroot, listroot):
    with pytest.raises(UserError, match="/path/to/.* is a placeholder"):
        QXSFeeder(dataroot, listroot)


def test_split_comes_from_the_lists_own_name(root):
    assert split_of("/data/train_runs/test_eo_list.txt") == "test"
    assert split_of("/data/test/TRAIN.pkl") == "train"
    for name in ("eo.txt", "train/eo.txt", "train_and_test.txt"):
        with pytest.raises(UserError, match="give split"):
            split_of(name)
    assert qxs(root, name="eo.txt", split="train").augment and not qxs(root, split="test").augment
    with pytest.raises(UserError, match="seed is -1"):
        qxs(root, seed=-1)


# files


def test_missing_files_are_counted_and_the_first_three_named(root):
    entries = [*ENTRIES, *(f"opt_256_oc_0.2/{number}.png" for number in range(10, 15))]
    save_image(root / "opt_256_oc_0.2/10.png", coded())
    save_image(root / "sar_256_oc_0.2/11.png", coded())
    with pytest.raises(UserError, match="^5 of 8 pairs are incomplete") as caught:
        qxs(root, entries)
    message = str(caught.value)
    assert f"SAR {root}/sar_256_oc_0.2/10.png, EO {root}/opt_256_oc_0.2/10.png (missing: SAR)" in message
    assert "11.png (missing: EO)" in message and "12.png (missing: SAR and EO)" in message
    assert "13.png" not in message and message.endswith("...")


def test_formats_that_are_not_read_are_refused_at_once(tmp_path):
    touch(tmp_path, "sar/a.jp2", "eo/a.png")
    (tmp_path / "train.csv").write_text("sar,eo\nsar/a.jp2,eo/a.png\n")
    with pytest.raises(UserError, match="1 files of formats that are not read for training: .*a.jp2; expected .*make_chips"):
        PairedFolderFeeder(CROP, dataroot=tmp_path, listroot=tmp_path / "train.csv")


def test_pairs_that_do_not_fit_name_both_files_and_sizes(root):
    feeder = qxs(root)
    save_image(root / "sar_256_oc_0.2/2.png", coded(SIZE)[:10])
    with pytest.raises(UserError, match=r"differ in size: SAR .*/2.png is 12 x 10 px, EO .*/2.png is 12 x 12 px"):
        feeder[1]
    with pytest.raises(UserError, match=r"smaller than crop_size 13: SAR .*/1.png is 12 x 12 px, EO .*/1.png is 12 x 12 px"):
        qxs(root, crop_size=13)[0]
    with pytest.raises(UserError, match=r"load_size is 16 px, but SAR .*/1.png is 12 x 12 px"):
        qxs(root, load_size=16)[0]
    assert qxs(root, load_size=12)[0]["name"] == "opt_256_oc_0.2/1"
    for kind, index in (("sar", 0), ("opt", 2)):
        path = root / f"{kind}_256_oc_0.2/{index + 1}.png"
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(UserError, match=f"{kind}_256_oc_0.2/{index + 1}.png: unreadable"):
            feeder[index]


# folders


def test_stellar_pairs_by_stem_and_never_augments(tmp_path):
    for name in ("a/1", "2"):
        save_image(tmp_path / f"EO/image/{name}.png", coded(blue=5))
    (tmp_path / "SAR/image/a").mkdir(parents=True)
    np.save(tmp_path / "SAR/image/a/1.npy", coded(blue=7))
    save_image(tmp_path / "SAR/image/2.png", coded(blue=7))
    feeder = StellarFeeder(tmp_path, CROP, "train")
    assert feeder.names == ["2", "a/1"]
    for epoch in range(5):
        assert (levels(feeder[epoch, 1]["sar"]) == coded(blue=7)[2:10, 2:10]).all()
        assert (levels(feeder[epoch, 1]["eo"]) == coded(blue=5)[2:10, 2:10]).all()
    with pytest.raises(UserError, match="split is 'val'"):
        StellarFeeder(tmp_path, CROP, "val")


def test_paired_folders(tmp_path):
    for number in (1, 2, 10):
        save_image(tmp_path / f"s/x/{number}.tif", coded(blue=7))
        save_image(tmp_path / f"o/x/{number}.png", coded(blue=5))
    feeder = PairedFolderFeeder(CROP, "test", sar_dir=tmp_path / "s", eo_dir=tmp_path / "o")
    assert feeder.names == ["x/1", "x/2", "x/10"]
    assert (levels(feeder[0]["sar"]) == coded(blue=7)[2:10, 2:10]).all()
    save_image(tmp_path / "s/3.png", coded())
    save_image(tmp_path / "o/4.png", coded())
    with pytest.raises(
        UserError, match=f"^2 images of .* have no twin of the same name: {tmp_path}/o/4.png; {tmp_path}/s/3.png$"
    ):
        PairedFolderFeeder(CROP, "test", sar_dir=tmp_path / "s", eo_dir=tmp_path / "o")
    save_image(tmp_path / "s/x/1.png", coded())
    with pytest.raises(UserError, match="x/1.* differ in the suffix alone"):
        PairedFolderFeeder(CROP, "test", sar_dir=tmp_path / "s", eo_dir=tmp_path / "o")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("test.csv", "sar,eo\ns/1.png,o/one.png\ns/2.png,o/two.png\n"),
        ("test.csv", '"s/1.png", o/one.png\r\ns/2.png,"o/two.png"\r\n'),
        ("test.txt", "SAR\tEO\n\ns/1.png\to/one.png\ns/2.png\to/two.png"),
        ("test.tsv", "s/1.png\to/one.png\ns/2.png\to/two.png\n"),
        ("test.csv", "eo,sar\no/one.png,s/1.png\no/two.png,s/2.png\n"),
        ("test.csv", "\ufeffSAR_path,EO_path\ns/1.png,o/one.png\ns/2.png,o/two.png\n"),
        ("test.csv", 'id,"optical image",place,sar file\n1,o/one.png,"a, b",s/1.png\n2,o/two.png,,s/2.png\n'),
        ("test.tsv", "EO\tvideo\tSAR\no/one.png\tx.mp4\ts/1.png\no/two.png\t\ts/2.png\n"),
    ],
)
def test_lists_of_pairs(tmp_path, name, text):
    for sar, eo in (("s/1.png", "o/one.png"), ("s/2.png", "o/two.png")):
        save_image(tmp_path / sar, coded(blue=7))
        save_image(tmp_path / eo, coded(blue=5))
    (tmp_path / name).write_bytes(text.encode())
    feeder = PairedFolderFeeder(CROP, dataroot=tmp_path, listroot=tmp_path / name)
    assert feeder.names == ["o/one", "o/two"] and not feeder.augment
    assert levels(feeder[1]["sar"])[0, 0, 2] == 7 and levels(feeder[1]["eo"])[0, 0, 2] == 5


HEADERS = ("sar,label", "id,eo", "sar,eo,opt", "sar_eo,file", "sar_1,sar_2")
ONE_OF_EACH = "line 1: expected a header with one column of SAR and one of EO paths, .*"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("id,sar,eo\n1,c.png,d.png\na.png,b.png\n", "train.csv, line 3: expected 'id,sar,eo', found 'a.png,b.png'"),
        *((f"{header}\na.png,b.png\n", ONE_OF_EACH + header[:3]) for header in HEADERS),
        ("a.png,b.png\n", "1 of 1 pairs are incomplete"),
    ],
)
def test_unusable_lists_of_pairs(tmp_path, text, message):
    (tmp_path / "train.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        PairedFolderFeeder(CROP, dataroot=tmp_path, listroot=tmp_path / "train.csv")


def test_paired_folder_options_must_make_sense(tmp_path):
    for options in ({}, {"sar_dir": tmp_path}, {"sar_dir": tmp_path, "eo_dir": tmp_path, "dataroot": tmp_path}):
        with pytest.raises(UserError, match="expected sar_dir and eo_dir, or dataroot and listroot"):
            PairedFolderFeeder(CROP, "train", **options)
    with pytest.raises(UserError, match="eo_dir: no such folder"):
        PairedFolderFeeder(CROP, "train", sar_dir=tmp_path, eo_dir=tmp_path / "gone")
    save_image(tmp_path / "1.png", coded())
    with pytest.raises(UserError, match="give split"):
        PairedFolderFeeder(CROP, sar_dir=tmp_path, eo_dir=tmp_path)


# real pairs


def test_real_pairs(samples, tmp_path):
    (tmp_path / "train.txt").write_text("".join(f"opt_256_oc_0.2/{number}.png\n" for number in range(1, 101)))
    feeder = QXSFeeder(samples / "QXSLAB_SAROPT", tmp_path / "train.txt", crop_size=64, load_size=88)
    items = [feeder[index] for index in range(0, 100, 10)]
    assert len(feeder) == 100 and all(item["eo"].shape == (3, 64, 64) for item in items)
    assert all(-1 <= image.min() < image.max() <= 1 for item in items for image in (item["sar"], item["eo"]))
    assert all((item["sar"][0] == item["sar"][2]).all() for item in items)
    (tmp_path / "test.txt").write_text("testB/4.png\n")
    item = SAROptFeeder(samples / "sar2opt", tmp_path / "test.txt", crop_size=248)[0]
    assert (levels(item["sar"])[..., 0] == np.asarray(Image.open(samples / "sar2opt/testA/4.png"))).all()
