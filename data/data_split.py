"""Split a dataset into training and test lists of EO paths, the same on every machine.

    python data/data_split.py --dataset qxs --dataroot /data/QXSLAB_SAROPT --ratio 80

writes train_eo_list_080 and test_eo_list_080, each as .txt and .pkl, under data/QXS_split/ (SpaceNet_split, SAROpt_split,
SENMS_split, SAR2EO_split, SpaceNetChips_split). Paths are relative to the data root and sorted. SAR2Opt, SAR2EO and the
rendered chips of SpaceNet 6 keep their official folders, and their lists no suffix.
"""

import pickle
import random
import re
import sys
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import NamedTuple

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))  # so that the script runs from anywhere

from cdiffset.errors import Parser, UserError, run  # noqa: E402
from cdiffset.images import list_images, written_whole  # noqa: E402
from cdiffset.pairing import relative_path  # noqa: E402
from feeders.feeder import ListFeeder, QXSFeeder, SAR2EOFeeder, SAROptFeeder, SENMSFeeder, SpaceNetFeeder  # noqa: E402

Split = tuple[list[str], list[str]]  # train, test: EO paths relative to the data root


PUBLISHED = {(20_000, 80): 3_999}  # (count, ratio) => held out: QXS-SAROPT's split
SAR2EO_TEST = 4_000  # of the validation pairs, the first so many are those of the published tables


def held_out(count: int, ratio: int) -> int:
    """How many of `count` are held out, but for a published split: what training leaves, whose share is rounded, a half up.

    At least one on either side.
    """
    if (count, ratio) in PUBLISHED:
        return PUBLISHED[count, ratio]
    trained = (2 * count * ratio + 100) // 200
    return count - min(max(trained, 1), count - 1)


def shuffled_split(items: list[str], ratio: int, seed: int) -> Split:
    """Hold out a random share of the items. They are sorted first: a file system lists them in any order it likes."""
    items = sorted(items)
    random.Random(seed).shuffle(items)
    count = held_out(len(items), ratio)
    return sorted(items[count:]), sorted(items[:count])


def eo_paths(root: Path, folder: str) -> list[str]:
    """Images under a folder of the data root, relative to the root."""
    return [(PurePosixPath(folder) / path.as_posix()).as_posix() for path in list_images(root / folder)]


def split_qxs(root: Path, ratio: int, seed: int) -> Split:
    (folder,) = QXSFeeder.folders
    return shuffled_split(eo_paths(root, folder), ratio, seed)


def split_spacenet(root: Path, ratio: int, seed: int) -> Split:
    (folder,) = SpaceNetFeeder.folders
    return shuffled_split(eo_paths(root, f"train/AOI_11_Rotterdam/{folder}"), ratio, seed)


def split_saropt(root: Path, ratio: int, seed: int) -> Split:
    """The official folders; ratio and seed play no part."""
    train, test = SAROptFeeder.folders
    return sorted(eo_paths(root, train)), sorted(eo_paths(root, test))


def split_sar2eo(root: Path, ratio: int, seed: int) -> Split:
    """The official folders, of the second the first SAR2EO_TEST; ratio and seed play no part."""
    return sorted(eo_paths(root, "SAR-EO/EO/train")), sorted(eo_paths(root, "SAR-EO/EO/validation"))[:SAR2EO_TEST]


def split_senms(root: Path, ratio: int, seed: int) -> Split:
    """Whole scene folders, season by season: patches of one scene overlap, and must not lie in both splits."""
    seasons = sorted(path.name for path in root.iterdir() if re.fullmatch(r"ROIs[0-9]+_(spring|summer|fall|winter)", path.name))
    train, test = [], []
    for season in seasons:
        scenes = [f"{season}/{path.name}" for path in (root / season).iterdir() if re.fullmatch(r"s2_[0-9]+", path.name)]
        for paths, chosen in zip((train, test), shuffled_split(scenes, ratio, seed), strict=True):
            paths += [path for scene in chosen for path in eo_paths(root, scene)]
    return sorted(train), sorted(test)


class Source(NamedTuple):
    feeder: type[ListFeeder]
    split: Callable[[Path, int, int], Split]
    output: str  # default folder of the lists, under data/
    has_ratio: bool = True


SOURCES = {
    "qxs": Source(QXSFeeder, split_qxs, "QXS_split"),
    "spacenet": Source(SpaceNetFeeder, split_spacenet, "SpaceNet_split"),
    "saropt": Source(SAROptFeeder, split_saropt, "SAROpt_split", has_ratio=False),
    "sar2eo": Source(SAR2EOFeeder, split_sar2eo, "SAR2EO_split", has_ratio=False),
    "chips": Source(SAROptFeeder, split_saropt, "SpaceNetChips_split", has_ratio=False),
    "senms": Source(SENMSFeeder, split_senms, "SENMS_split"),
}


def split_dataset(source: Source, root: Path, ratio: int, seed: int) -> Split:
    """EO paths of both splits, every one with its SAR twin on disk; UserError otherwise."""
    if not 1 <= ratio <= 99:
        raise UserError(f"--ratio is {ratio}; expected 1 to 99, the percentage of training pairs")
    if not root.is_dir():
        raise UserError(f"--dataroot: no such folder: {root}")
    try:
        train, test = source.split(root, ratio, seed)
    except UserError as error:
        raise UserError(f"--dataroot {root} does not have the layout {source.feeder.layout}: {error}") from error
    if not train + test:
        raise UserError(f"--dataroot {root} holds no images of the layout {source.feeder.layout}")
    if not train or not test:
        raise UserError(f"too few images or scenes for --ratio {ratio}: {len(train)} pairs to train on, {len(test)} to test on")
    require_twins(source.feeder, root, train + test)
    return train, test


def require_twins(feeder: type[ListFeeder], root: Path, paths: list[str]) -> None:
    """Every path can stand in a list, and its SAR image is there."""
    sar = {path: root / feeder.eo_to_sar(relative_path(path, f"--dataroot {root}")) for path in paths}
    unpaired = [path for path in paths if not sar[path].is_file()]
    if unpaired:
        named = ", ".join(unpaired[:3]) + (", ..." if len(unpaired) > 3 else "")
        raise UserError(f"{len(unpaired)} of {len(paths)} EO images under {root} have no SAR image: {named}")


def write_list(path: Path, paths: list[str]) -> None:
    """Write path.txt and path.pkl, each whole or not at all."""
    contents = {".txt": "".join(f"{line}\n" for line in paths).encode(), ".pkl": pickle.dumps(paths)}
    for suffix, content in contents.items():
        with written_whole(path.with_name(path.name + suffix)) as temporary:
            temporary.write_bytes(content)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Split a dataset into training and test lists of EO paths.")
    parser.add_argument("--dataset", required=True, choices=SOURCES)
    parser.add_argument("--dataroot", type=Path, required=True, help="folder of the dataset; the lists are relative to it")
    parser.add_argument("--ratio", type=int, default=80, help="percentage of training pairs; not for official splits (80)")
    parser.add_argument("--seed", type=int, default=2025, help="another seed is another split; not for official ones (2025)")
    parser.add_argument("--output", type=Path, help="folder to write the lists to (data/QXS_split etc. of this repository)")
    args = parser.parse_args(argv)
    source = SOURCES[args.dataset]
    splits = split_dataset(source, args.dataroot, args.ratio, args.seed)
    output = args.output or REPO / "data" / source.output
    suffix = f"_{args.ratio:03d}" if source.has_ratio else ""
    for name, paths in zip(("train", "test"), splits, strict=True):
        try:
            write_list(output / f"{name}_eo_list{suffix}", paths)
        except OSError as error:
            raise UserError(f"--output: cannot write into {output}: {error.strerror}") from error
        print(f"{name}: {len(paths)} pairs in {output / f'{name}_eo_list{suffix}'}.txt and .pkl")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
