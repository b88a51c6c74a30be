"""The real pairs of the demo: registration against planted offsets, tiles, parts that do not touch, and what is shipped."""

import csv
import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import gaussian_filter, map_coordinates

from cdiffset.errors import UserError
from data import make_sentinel_demo as demo
from data.make_sentinel_demo import CORNERS, Fragment, Offset

SHIPPED = Path(demo.__file__).parent / "sentinel_demo"


def ground(rng: np.random.Generator) -> np.ndarray:
    """Patches with edges between them [1024, 1024], 0 to 1."""
    return (gaussian_filter(rng.standard_normal((1024, 1024)), 12) > 0).astype(float)


def planted(offset: Offset, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """SAR intensity at 20 m, speckled, and an EO at 10 m that has to move by `offset`, resampled point by point."""
    truth = ground(rng)
    y, x = np.mgrid[:1024, :1024].astype(float)
    there = np.stack([y, x], -1).reshape(-1, 2)
    moves = 2 * offset.at((there - 511.5) / 512)  # px at 10 m; small and smooth, so its inverse is itself to first order
    eo = map_coordinates(truth, (there + moves).T, order=1, mode="mirror").reshape(1024, 1024)
    speckle = rng.gamma(4, 1 / 4, truth.shape)
    return demo.averaged((0.2 + truth) * speckle, 2), np.repeat((40 + 120 * eo)[..., None], 3, -1)


@pytest.mark.parametrize(
    "offset",
    [
        Offset(np.array([0.0, 0.0]), np.zeros((2, 2))),
        Offset(np.array([2.5, -3.0]), np.zeros((2, 2))),
        Offset(np.array([-1.0, 2.0]), np.array([[0.5, -0.5], [1.5, -1.0]])),
    ],
)
def test_a_planted_offset_is_found_and_undone(offset):
    sar, eo = planted(offset, np.random.default_rng(0))
    found = demo.register(sar, demo.averaged(eo, 2))
    assert np.abs(found.at(CORNERS) - offset.at(CORNERS)).max() < 0.4
    again = demo.register(sar, demo.averaged(demo.moved(eo, found), 2))
    assert np.abs(again.at(CORNERS)).max() < 0.3


def test_what_does_not_match_is_not_registered():
    rng = np.random.default_rng(1)
    sar, _ = planted(Offset(np.zeros(2), np.zeros((2, 2))), rng)
    assert demo.register(sar, demo.averaged(np.repeat(100 * ground(rng)[..., None], 3, -1), 2)) is None


def test_fragments_lie_where_their_numbers_say():
    assert demo.locate(47).origin == (demo.locate(46).origin[0], demo.locate(46).origin[1] + 256)  # to the right
    assert demo.locate(59).origin == (demo.locate(46).origin[0] + 256, demo.locate(46).origin[1])  # below, 13 further
    assert demo.locate(50).gap(demo.locate(139)) == (847 - 1024) // 4  # T11SLT and T11SMT overlap by 177 px at 10 m
    assert demo.locate(46).gap(demo.locate(48)) == 256 and demo.locate(46).gap(demo.locate(47)) == 0
    assert demo.locate(46).gap(demo.locate(219)) == np.inf  # California and Texas


def test_the_overlap_of_two_mgrs_tiles_is_the_same_ground(samples):
    one, other = (np.asarray(Image.open(samples / f"sentinel/eo/{name}.jpg").convert("L"), float) for name in ("050", "139"))
    assert np.corrcoef(one[: 1024 - 183, 847:].ravel(), other[183:, : 1024 - 847].ravel())[0, 1] > 0.9


@pytest.mark.parametrize("margin", [0, 3])
def test_tiles_of_a_held_out_fragment_cover_it_within_the_margin(margin):
    offset = Offset(np.array([0.0, 2.0 * margin]), np.zeros((2, 2)))  # px at 20 m
    corners = demo.tile_corners(demo.locate(76), offset, [])
    assert len(corners) == 16
    assert {min(corner[axis] for corner in corners) for axis in (0, 1)} == {margin}
    assert {max(corner[axis] for corner in corners) for axis in (0, 1)} == {256 - 64 - margin}


def boxes() -> list[tuple[Fragment, int, int]]:
    """Fragment and upper left corner, in px at 40 m, of every tile that is shipped."""
    found = []
    for part in demo.WRITTEN:
        for path in (SHIPPED / part / "eo").glob("*.webp"):
            number, row, column = path.stem.split("_")
            found.append((demo.locate(int(number)), part, int(row[1:]), int(column[1:])))
    return found


def test_no_training_tile_is_nearer_to_another_part_than_the_guard_band():
    tiles = boxes()
    train = [tile for tile in tiles if tile[1] == "train"]
    others = [tile for tile in tiles if tile[1] != "train"]
    assert len(train) > 950 and len(others) > 200

    def places(these) -> np.ndarray:
        return np.array([np.add(fragment.origin, (y, x)) for fragment, _, y, x in these])

    gap = np.abs(places(train)[:, None] - places(others)[None]).max(-1) - demo.TILE_PX  # Chebyshev distance of equal squares
    same_zone = np.array([[a[0].zone == b[0].zone for b in others] for a in train])
    assert gap[same_zone].min() >= demo.GUARD_PX
    assert all(fragment.part == part for fragment, part, *_ in tiles)


def test_both_regions_are_in_both_parts():
    zones = {(part, fragment.zone) for fragment, part, *_ in boxes()}
    assert zones == {("train", "T11"), ("train", "T14"), ("test", "T11"), ("test", "T14"), ("unseen", "T11")}


def test_what_is_shipped_is_what_was_made():
    lines = [line.split() for line in (SHIPPED / "checksums.sha256").read_text().splitlines()]
    files = {path.relative_to(SHIPPED).as_posix() for path in SHIPPED.rglob("*.webp")}
    assert {name for _, name in lines} == files
    assert all(hashlib.sha256((SHIPPED / name).read_bytes()).hexdigest() == digest for digest, name in lines)
    assert sum((SHIPPED / name).stat().st_size for name in files) <= 10_000_000
    rows = list(csv.DictReader((SHIPPED / "scenes.csv").open()))
    assert sum(int(row["tiles"]) for row in rows) == len(files) / 2
    for path in list((SHIPPED / "test/eo").iterdir())[:3]:
        assert Image.open(path).size == (64, 64) and (SHIPPED / "test/sar" / path.name).is_file()


def test_tiles_are_made_again(samples, tmp_path):
    """One fragment: WebP encoders differ between versions, so pixels are compared, not bytes."""
    for kind in ("sar", "eo"):
        (tmp_path / "source" / kind).mkdir(parents=True)
        (tmp_path / "source" / kind / "076.jpg").write_bytes((samples / "sentinel" / kind / "076.jpg").read_bytes())
    assert demo.main(["--source", str(tmp_path / "source"), "--output", str(tmp_path / "out")]) == 0
    made = sorted((tmp_path / "out/test").rglob("*.webp"))
    assert len(made) == 32
    for path in made:
        one, other = (np.asarray(Image.open(each), float) for each in (path, SHIPPED / path.relative_to(tmp_path / "out")))
        assert np.abs(one - other).max() <= 2


def test_what_cannot_be_used_is_refused_in_one_line(tmp_path):
    for kind, numbers in (("sar", (3, 4)), ("eo", (3,))):
        (tmp_path / kind).mkdir()
        for number in numbers:
            Image.new("L", (100, 100)).save(tmp_path / kind / f"{number:03}.png")
    argv = ["--source", str(tmp_path), "--output", str(tmp_path / "out")]
    with pytest.raises(UserError, match="the same numbers in sar/ and eo/, found 2 and 1 files"):
        demo.main(argv)
    (tmp_path / "sar/004.png").unlink()
    with pytest.raises(UserError, match="003.png: expected 1024 x 1024 px, found 100 x 100"):
        demo.main(argv)
    (tmp_path / "out/test").mkdir(parents=True)
    with pytest.raises(UserError, match="exists: remove it"):
        demo.main(argv)
