"""Splits: the published sizes, the same lists on every machine, and roots or ratios that make no sense refused."""

import os
import pickle
import random
import subprocess
import sys
from collections import Counter
from itertools import product
from pathlib import Path

import pytest
from conftest import REPO
from files import touch

from cdiffset.errors import UserError
from data.data_split import held_out, main, shuffled_split
from feeders.feeder import QXSFeeder, SAR2EOFeeder, SAROptFeeder, SENMSFeeder, SpaceNetFeeder

SEASONS = ("ROIs1158_spring", "ROIs1868_summer", "ROIs1970_fall", "ROIs2017_winter")


def fill_qxs(root, count=50):
    touch(root, *(f"{kind}_256_oc_0.2/{k}.png" for kind in ("opt", "sar") for k in range(1, count + 1)))


def fill_spacenet(root, count=25):
    folder = "train/AOI_11_Rotterdam"
    touch(root, *(f"{folder}/{kind}/SN6_{kind}_tile_{k}.tif" for kind in ("PS-RGB", "SAR-Intensity") for k in range(count)))


def fill_saropt(root):
    touch(root, *(f"{folder}/{k}.png" for folder in ("trainA", "trainB") for k in range(7)))
    touch(root, *(f"{folder}/{k}.png" for folder in ("testA", "testB") for k in range(3)))


def fill_senms(root, scenes=10, patches=3):
    for season, sensor, k in product(SEASONS, ("s1", "s2"), range(scenes)):
        touch(root, *(f"{season}/{sensor}_{k}/{season}_{sensor}_{k}_p{p}.png" for p in range(patches)))


def fill_sar2eo(root, tests=6):
    for split, count in (("train", 4), ("validation", tests)):
        touch(root, *(f"SAR-EO/{kind}/{split}/{k:05}.png" for kind in ("SAR", "EO") for k in range(count)))


FILL = {"qxs": fill_qxs, "spacenet": fill_spacenet, "saropt": fill_saropt, "senms": fill_senms}
FILL |= {"sar2eo": fill_sar2eo, "chips": fill_saropt}
FEEDERS = {"qxs": QXSFeeder, "spacenet": SpaceNetFeeder, "saropt": SAROptFeeder, "senms": SENMSFeeder}
FEEDERS |= {"sar2eo": SAR2EOFeeder, "chips": SAROptFeeder}
OFFICIAL = ("saropt", "sar2eo", "chips")  # splits


def split(dataset, root, output, *options):
    assert main(["--dataset", dataset, "--dataroot", str(root), "--output", str(output), *options]) == 0
    return {path.name: path.read_bytes() for path in output.iterdir()}


def lines(files, name):
    return files[name].decode().splitlines()


SIZES = [(20000, 80, 3999), (3401, 80, 680), (5, 80, 1), (8, 80, 2), (50, 80, 10), (3, 50, 1), (5, 90, 1), (2, 80, 1)]
SIZES += [(2, 10, 1), (19990, 80, 3998)]


@pytest.mark.parametrize(("count", "ratio", "size"), SIZES)
def test_sizes_are_rounded_and_those_of_qxs_are_the_published_ones(count, ratio, size):
    assert held_out(count, ratio) == size


@pytest.mark.parametrize("dataset", FILL)
def test_lists_are_complete_sorted_disjoint_and_feed(dataset, tmp_path, capsys):
    FILL[dataset](tmp_path / "root")
    suffix = "" if dataset in OFFICIAL else "_080"
    files = split(dataset, tmp_path / "root", tmp_path / "out")
    assert set(files) == {f"{name}_eo_list{suffix}{kind}" for name in ("train", "test") for kind in (".txt", ".pkl")}
    train, test = (lines(files, f"{name}_eo_list{suffix}.txt") for name in ("train", "test"))
    assert train == sorted(train) and test == sorted(test) and len(set(train + test)) == len(train) + len(test)
    sizes = {"qxs": (40, 10), "spacenet": (20, 5), "senms": (96, 24), "saropt": (7, 3), "chips": (7, 3), "sar2eo": (4, 6)}
    sizes = sizes[dataset]
    assert (len(train), len(test)) == sizes
    assert f"train: {sizes[0]} pairs" in (printed := capsys.readouterr().out) and f"test: {sizes[1]} pairs" in printed
    for name, paths in (("train", train), ("test", test)):
        assert pickle.loads(files[f"{name}_eo_list{suffix}.pkl"]) == paths
        for kind in (".txt", ".pkl"):
            feeder = FEEDERS[dataset](tmp_path / "root", tmp_path / f"out/{name}_eo_list{suffix}{kind}")
            assert feeder.names == [path.rpartition(".")[0] for path in paths] and feeder.augment == (name == "train")


def test_of_sar2eo_the_first_4000_are_tested(tmp_path):
    fill_sar2eo(tmp_path / "root", tests=4002)
    test = lines(split("sar2eo", tmp_path / "root", tmp_path / "out"), "test_eo_list.txt")
    assert (len(test), test[0], test[-1]) == (4000, "SAR-EO/EO/validation/00000.png", "SAR-EO/EO/validation/03999.png")


@pytest.mark.parametrize("dataset", FILL)
def test_the_order_of_the_file_system_does_not_matter(dataset, tmp_path, monkeypatch):
    FILL[dataset](tmp_path / "root")
    plain = split(dataset, tmp_path / "root", tmp_path / "plain")
    chaos = random.Random(3)
    walk, iterdir = os.walk, Path.iterdir

    def shuffled(items):
        items = list(items)
        chaos.shuffle(items)
        return items

    def shuffled_walk(*args, **options):
        for parent, folders, files in walk(*args, **options):
            folders[:] = shuffled(folders)
            yield parent, folders, shuffled(files)

    monkeypatch.setattr(os, "walk", shuffled_walk)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(shuffled(iterdir(self))))
    assert split(dataset, tmp_path / "root", tmp_path / "chaotic") == plain


def test_seed_and_ratio_decide(tmp_path):
    fill_qxs(tmp_path / "root")
    first, again, other = (
        split("qxs", tmp_path / "root", tmp_path / name, "--seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))
    )
    assert first == again != other
    assert len(lines(split("qxs", tmp_path / "root", tmp_path / "d", "--ratio", "5"), "test_eo_list_005.txt")) == 47
    assert shuffled_split([f"{k}.png" for k in range(10)], 70, 2025)[1] == ["3.png", "5.png", "6.png"]  # as it always was


def test_scenes_stay_whole_and_every_season_gives_its_share_whatever_the_others(tmp_path):
    fill_senms(tmp_path / "root")
    files = split("senms", tmp_path / "root", tmp_path / "out", "--ratio", "70")
    train, test = (lines(files, f"{name}_eo_list_070.txt") for name in ("train", "test"))
    scenes = [{path.rpartition("/")[0] for path in paths} for paths in (train, test)]
    assert not scenes[0] & scenes[1]
    for chosen, share in zip(scenes, (7, 3), strict=True):
        assert Counter(scene.partition("/")[0] for scene in chosen) == dict.fromkeys(SEASONS, share)
    (tmp_path / "alone").mkdir()
    (tmp_path / "root" / SEASONS[2]).rename(tmp_path / "alone" / SEASONS[2])
    alone = split("senms", tmp_path / "alone", tmp_path / "b", "--ratio", "70")
    assert lines(alone, "test_eo_list_070.txt") == [path for path in test if path.startswith(SEASONS[2])]


@pytest.mark.parametrize("dataset", FILL)
def test_roots_of_another_layout(dataset, tmp_path):
    touch(tmp_path / "root", "images/1.png")
    with pytest.raises(UserError, match=f"--dataroot {tmp_path}/root .*layout") as caught:
        split(dataset, tmp_path / "root", tmp_path / "out")
    assert FEEDERS[dataset].layout in str(caught.value) and not (tmp_path / "out").exists()


def test_too_few_images_and_eo_without_sar(tmp_path):
    fill_qxs(tmp_path / "root", count=1)
    with pytest.raises(UserError, match="too few images or scenes for --ratio 80: 0 pairs to train on, 1 to test on"):
        split("qxs", tmp_path / "root", tmp_path / "out")
    fill_qxs(tmp_path / "root")
    for number in (3, 17):
        (tmp_path / f"root/sar_256_oc_0.2/{number}.png").unlink()
    with pytest.raises(UserError, match="2 of 50 EO images .* have no SAR image") as caught:
        split("qxs", tmp_path / "root", tmp_path / "out")
    assert "opt_256_oc_0.2/3.png" in str(caught.value) and "opt_256_oc_0.2/17.png" in str(caught.value)


def test_as_a_script_from_anywhere(tmp_path):
    fill_saropt(tmp_path / "root")
    command = [sys.executable, REPO / "data/data_split.py", "--dataset", "saropt", "--dataroot", "root", "--output", "out"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0 and len(list((tmp_path / "out").iterdir())) == 4, ended.stderr


def test_real_samples(samples, tmp_path):
    files = split("qxs", samples / "QXSLAB_SAROPT", tmp_path / "qxs")
    assert [len(lines(files, f"{name}_eo_list_080.txt")) for name in ("train", "test")] == [80, 20]
    files = split("saropt", samples / "sar2opt", tmp_path / "sar2opt")
    assert lines(files, "train_eo_list.txt") == ["trainB/1.png", "trainB/2.png", "trainB/3.png"]
    assert lines(files, "test_eo_list.txt") == ["testB/4.png"]
