"""The scene simulator: reproducible, and its masks say exactly what only one of the two images shows."""

import hashlib
from functools import cache

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_dilation

from data.simulate import FOLDERS, SAR_DB_RANGE, Simulation, acquire_sar, main, simulate_scene


@cache
def scene(index: int, **changes) -> dict[str, np.ndarray]:
    return simulate_scene(np.random.default_rng([7, index]), Simulation(**changes))


@pytest.fixture(scope="module")
def with_movables() -> list[int]:
    """Scenes with movable objects."""
    return [index for index in range(20) if scene(index, p_sar_only=1, p_eo_only=0)["mask_sar_only"].any()][:10]


def test_masks_hold_all_that_differs(with_movables):
    """The same draws with every movable object in both images, only in the SAR, or only in the EO."""
    assert len(with_movables) == 10
    for index in with_movables:
        both = scene(index, p_sar_only=0, p_eo_only=0)
        sar_only = scene(index, p_sar_only=1, p_eo_only=0)
        eo_only = scene(index, p_sar_only=0, p_eo_only=1)
        objects = sar_only["mask_sar_only"] > 0
        assert not both["mask_sar_only"].any() and not both["mask_eo_only"].any()
        assert (objects == (eo_only["mask_eo_only"] > 0)).all()
        np.testing.assert_array_equal(sar_only["sar"], both["sar"])
        np.testing.assert_array_equal(eo_only["eo"], both["eo"])
        reach = binary_dilation(objects, iterations=6)  # the blur of the optics
        np.testing.assert_array_equal(sar_only["eo"][~reach], both["eo"][~reach])
        np.testing.assert_array_equal(eo_only["sar"][~reach], both["sar"][~reach])
        assert eo_only["sar"][objects].mean() < both["sar"][objects].mean() - 40
        assert np.abs(sar_only["eo"].astype(float) - both["eo"])[objects].mean() > 30


def test_default_scenes_are_those_that_the_demos_base_was_trained_on():
    """New knobs and outputs must neither change a picture nor move the order of the random draws."""
    digest = hashlib.sha256()
    for index in range(4):
        drawn = simulate_scene(np.random.default_rng([0, 1, index]), Simulation())
        for name in FOLDERS:
            digest.update(drawn[name].tobytes())
    assert digest.hexdigest() == "dc2687fbd477e6eda8eca467c485d53bb1e284c5ffa14bbaedeee4d376be3f15"


def test_would_be_pictures_are_the_same_acquisition_with_all_objects_and_with_none(with_movables):
    for index in with_movables:
        drawn = scene(index, p_sar_only=0.4, p_eo_only=0.3)
        np.testing.assert_array_equal(drawn["eo_all"], scene(index, p_sar_only=0, p_eo_only=0)["eo"])
        np.testing.assert_array_equal(drawn["eo_none"], scene(index, p_sar_only=1, p_eo_only=0)["eo"])


def test_object_numbers_and_masks_agree():
    seen = {"sar_only": 0, "eo_only": 0, "both": 0}
    for index in range(20):
        drawn = scene(index, movables=3)
        objects, masks = drawn["objects"], {name: drawn[f"mask_{name}"] > 0 for name in ("sar_only", "eo_only", "movable")}
        numbers = np.unique(objects[objects > 0])
        assert numbers.tolist() == list(range(1, len(numbers) + 1))
        np.testing.assert_array_equal(objects > 0, masks["movable"] | masks["eo_only"])
        assert not (masks["movable"] & masks["eo_only"]).any() and not (masks["sar_only"] & ~masks["movable"]).any()
        for number in numbers:
            here = objects == number
            fates = [name for name in ("sar_only", "eo_only") if masks[name][here].any()]
            assert all(masks[name][here].all() for name in fates) and len(fates) <= 1
            seen[fates[0] if fates else "both"] += 1
    assert min(seen.values()) >= 5


def test_permanent_mask_marks_what_is_bright_and_stays():
    """Without movables, nearly all that is as bright as they are lies in the mask or within the blur around it."""
    scenes = [scene(index, movables=0, looks=1000) for index in range(25)]
    above = np.stack([drawn["sar"] > (2 - SAR_DB_RANGE[0]) / np.diff(SAR_DB_RANGE) * 255 for drawn in scenes])
    near = np.stack([binary_dilation(drawn["mask_permanent"] > 0) for drawn in scenes])
    assert above.sum() > 600 and (above & near).sum() > 0.98 * above.sum()
    assert not any(drawn["objects"].any() or drawn["mask_movable"].any() for drawn in scenes)


@pytest.mark.parametrize(
    ("changes", "measure", "grows"),
    [
        ({"object_scale": 0.7}, lambda drawn: (drawn["objects"] > 0).sum() / max(1, drawn["objects"].max()), False),
        ({"contrast": 0.3}, lambda drawn: np.abs(drawn["eo_all"].astype(float) - drawn["eo_none"]).sum(), False),
        ({"movable_db": 3.0}, lambda drawn: drawn["sar"][drawn["mask_movable"] > 0].astype(float).sum(), True),
        ({"movables": 4.0}, lambda drawn: drawn["objects"].max(), True),
        ({"statics": 4.0}, lambda drawn: (drawn["mask_permanent"] > 0).sum(), True),
    ],
)  # fmt: skip
def test_knobs(changes, measure, grows):
    usual, changed = (np.mean([float(measure(scene(index, **options))) for index in range(24)]) for options in ({}, changes))
    assert changed > usual * 1.03 if grows else changed < usual * 0.8


def test_permanent_structures_are_as_bright_as_movables():
    """Else the SAR's brightness alone would tell the doubtful objects."""
    movable, permanent = [], []
    for index in range(40):
        drawn = scene(index, p_sar_only=1, p_eo_only=0)
        objects = drawn["mask_sar_only"] > 0
        movable += drawn["sar"][objects].tolist()
        permanent += drawn["sar"][~binary_dilation(objects, iterations=2)].tolist()
    bright = np.percentile(movable, 25)
    assert np.sum(np.array(permanent) > bright) > np.sum(np.array(movable) > bright)


@pytest.mark.parametrize("looks", [1, 4, 16])
def test_speckle_is_gamma_of_the_stated_looks(looks):
    low, high = SAR_DB_RANGE
    shown = acquire_sar(np.random.default_rng(0), np.full((400, 400), -8.0), looks)
    intensity = 10 ** ((shown / 255 * (high - low) + low) / 10) / 10**-0.8
    assert intensity.mean() == pytest.approx(1, abs=0.01)
    assert intensity.var() == pytest.approx(1 / looks, rel=0.03)


def test_command_is_reproducible_and_scenes_do_not_depend_on_the_count(tmp_path):
    for folder, count in (("a", 3), ("b", 3), ("c", 1)):
        assert main(["--output", str(tmp_path / folder), "--train", str(count), "--test", "1", "--size", "48"]) == 0
    files = sorted(path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*.png"))
    assert len(files) == 4 * (3 + 1)
    for file in files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
        if (tmp_path / "c" / file).exists():
            assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "c" / file).read_bytes()
    with Image.open(tmp_path / "a/train/eo/00000.png") as eo, Image.open(tmp_path / "a/train/eo/00001.png") as other:
        assert eo.size == (48, 48) and eo.tobytes() != other.tobytes()
    assert (tmp_path / "a/train/sar/00000.png").read_bytes() != (tmp_path / "a/test/sar/00000.png").read_bytes()


@pytest.mark.parametrize(
    "wrong", ["--size=8", "--looks=0", "--object-scale=0", "--contrast=-1", "--p-sar-only=.8 --p-eo-only=.4"]
)
def test_wrong_options_are_refused(tmp_path, wrong):
    with pytest.raises(SystemExit) as stopped:
        main(["--output", str(tmp_path / "out"), *wrong.split()])
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
