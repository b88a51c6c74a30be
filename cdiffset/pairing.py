"""Which SAR file belongs to which EO file: lists, folders matched by stem, and what every pair has to be."""

import csv
import os
import pickletools
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import numpy as np

from cdiffset.errors import UserError
from cdiffset.images import IMAGE_SUFFIXES, list_images, read_unstretched_eo

SPLITS = ("train", "test")
PAIR_SUFFIXES = (".csv", ".tsv", ".txt")
PICKLED_STRINGS = {"UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
PICKLED_LIST = PICKLED_STRINGS | {"PROTO", "FRAME", "LIST", "EMPTY_LIST", "MARK", "APPEND", "APPENDS", "STOP"}
PICKLED_LIST |= {"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"}  # of what is never asked for again
SHOWN = 3  # how many of many faulty pairs a message names


class Pair(NamedTuple):
    name: str  # EO path relative to its root, without suffix
    sar: Path
    eo: Path


def split_of(listroot: str | Path) -> str:
    """The split that a list's own file name contains, whatever folder it lies in."""
    found = [split for split in SPLITS if split in Path(listroot).stem.lower()]
    if len(found) != 1:
        raise UserError(f"{listroot}: expected either train or test in its name; give split, train or test")
    return found[0]


def read_list(listroot: str | Path, suffixes: tuple[str, ...]) -> list[tuple[str, str]]:
    """Entries of a list as (place, for messages; text), blank lines left out, none of them twice."""
    path = real_path("listroot", listroot)
    if path.suffix.lower() not in suffixes:
        raise UserError(f"{path}: expected a list that ends in {' or '.join(suffixes)}")
    try:
        texts = _unpickle_strings(path) if path.suffix.lower() == ".pkl" else path.read_text("utf-8-sig").split("\n")
    except OSError as error:
        raise UserError(f"{path}: cannot read the list ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: the list is not UTF-8 text") from error
    numbers: dict[str, int] = {}
    for number, text in enumerate(map(str.strip, texts), start=1):
        if text and (earlier := numbers.setdefault(text, number)) != number:
            raise UserError(f"{path}, line {number}: {text!r} stands in line {earlier} already; keep one of them")
    if not numbers:
        raise UserError(f"{path}: the list is empty")
    return [(f"{path}, line {number}", text) for text, number in numbers.items()]


def _unpickle_strings(path: Path) -> list[str]:
    """A pickled list of strings, read off its operations: unpickling could run any code, and take any memory."""
    refusal = f"{path}: refused; a pickled list may hold strings and nothing else"
    try:
        operations = [(operation.name, argument) for operation, argument, _ in pickletools.genops(path.read_bytes())]
    except ValueError as error:
        raise UserError(f"{refusal} ({error})") from error
    names = [name for name, _ in operations]
    if not PICKLED_LIST.issuperset(names) or sum(name in ("LIST", "EMPTY_LIST") for name in names) != 1:
        raise UserError(refusal)
    return [str(argument) for name, argument in operations if name in PICKLED_STRINGS]


def relative_path(text: str, where: str) -> PurePosixPath:
    """Path of a list entry, relative to the data root and without a way out but symbolic links."""
    path = PurePosixPath(real_path(where, text))
    if text != text.strip() or re.search("[\x00-\x1f\x7f\ud800-\udfff]", text):
        raise UserError(f"{where}: {text!r} has spaces at an end, control characters or is not UTF-8; rename the file")
    if "\\" in text or path.is_absolute() or ".." in path.parts or re.match("[A-Za-z]:", text) or not path.name:
        raise UserError(f"{where}: {text!r} is not a path relative to the data root with forward slashes and without '..'")
    return path


def read_pairs(root: Path, listroot: str | Path) -> list[Pair]:
    """Pairs from a list as `read_pair_list` reads it, relative to `root`."""
    paths = [[relative_path(text, where) for text in pair] for where, *pair in read_pair_list(listroot)]
    return [Pair(str(eo.with_suffix("")), root / sar, root / eo) for sar, eo in paths]


def read_pair_list(listroot: str | Path) -> list[tuple[str, str, str]]:
    """Entries of a text or CSV list of pairs as (place, for messages; SAR; EO).

    A header names the columns, in any order and among others: `eo,sar`, `id,SAR_path,EO_path`. Without one, lines are `sar,eo`.
    """
    lines = []
    for where, text in read_list(listroot, PAIR_SUFFIXES):
        try:
            row = [field.strip() for field in next(csv.reader([text], delimiter="\t" if "\t" in text else ","))]
        except csv.Error as error:
            raise UserError(f"{where}: expected 'sar,eo' ({error})") from error
        lines.append((where, text, row))
    where, header, names = lines[0]
    columns = _pair_columns(names, where)
    if columns is None:
        header, names, columns = "sar,eo", ["sar", "eo"], (0, 1)
    elif not (lines := lines[1:]):
        raise UserError(f"{listroot}: the list is empty")
    for where, text, row in lines:
        if len(row) != len(names):
            raise UserError(f"{where}: expected {header!r}, found {text!r}")
    return [(where, row[columns[0]], row[columns[1]]) for where, _, row in lines]


def _pair_columns(names: list[str], where: str) -> tuple[int, int] | None:
    """The columns of SAR and EO by the words of their names; None for a line of paths, which is no header."""
    if any("/" in name or PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES for name in names):
        return None
    kinds = (r"(?<![a-z])sar", r"(?<![a-z])(eo|opt)")  # each as the beginning of a word
    sar, eo = ([column for column, name in enumerate(names) if re.search(kind, name.lower())] for kind in kinds)
    if not sar and not eo:
        return None
    if len(sar) != 1 or len(eo) != 1 or sar == eo:
        raise UserError(f"{where}: expected a header with one column of SAR and one of EO paths, found {', '.join(names)}")
    return sar[0], eo[0]


def match_folders(sar_dir: Path, eo_dir: Path) -> list[Pair]:
    """Pairs of the images in two folders that share a relative path but for the suffix; every image needs its twin."""
    sar, eo = by_stem(sar_dir, list_images(sar_dir)), by_stem(eo_dir, list_images(eo_dir))
    unpaired = [eo[stem] for stem in eo if stem not in sar] + [sar[stem] for stem in sar if stem not in eo]
    if unpaired:
        raise UserError(f"{len(unpaired)} images of {sar_dir} and {eo_dir} have no twin of the same name: {_first(unpaired)}")
    return [Pair(stem, sar[stem], eo[stem]) for stem in eo]


def by_stem(folder: Path, files: Sequence[Path]) -> dict[str, Path]:
    """Files, relative to a folder => {path without suffix: file}; UserError where two differ in the suffix alone."""
    stems: dict[str, Path] = {}
    for file in files:
        twin = stems.setdefault(file.with_suffix("").as_posix(), folder / file)
        if twin != folder / file:
            raise UserError(f"{folder}: {twin.relative_to(folder)} and {file} differ in the suffix alone; keep one of them")
    return stems


def require_files(pairs: list[Pair]) -> None:
    faults = []
    for pair in pairs:
        if missing := [kind for kind, path in (("SAR", pair.sar), ("EO", pair.eo)) if not os.path.isfile(path)]:
            faults.append(f"SAR {pair.sar}, EO {pair.eo} (missing: {' and '.join(missing)})")
    if faults:
        raise UserError(f"{len(faults)} of {len(pairs)} pairs are incomplete: {_first(faults)}")


def require_formats(pairs: list[Pair]) -> None:
    """Before networks are loaded, which takes longer."""
    if others := [path for pair in pairs for path in (pair.sar, pair.eo) if path.suffix.lower() not in IMAGE_SUFFIXES]:
        raise UserError(
            f"{len(others)} files of formats that are not read for training: {_first(others)}; expected "
            f"{' '.join(IMAGE_SUFFIXES)} (data/make_chips.py cuts scenes of other formats into PNG)"
        )


def require_distinct_names(pairs: list[Pair]) -> None:
    """Results are filed by name. In training one EO image may well be paired with several SAR images."""
    first: dict[str, Pair] = {}
    for pair in pairs:
        if (other := first.setdefault(pair.name, pair)) is not pair:
            pairs_of_name = "; ".join(f"SAR {each.sar}, EO {each.eo}" for each in (other, pair))
            raise UserError(f"two pairs of one name, whose results would overwrite each other: {pairs_of_name}")


def _first(faults: list) -> str:
    return "; ".join(str(fault) for fault in faults[:SHOWN]) + ("; ..." if len(faults) > SHOWN else "")


def existing_folder(option: str, folder: str | Path) -> Path:
    if not (path := real_path(option, folder)).is_dir():
        raise UserError(f"{option}: no such folder: {folder}")
    return path


def real_path(option: str, path: str | Path) -> Path:
    if not isinstance(path, str | Path) or not str(path):
        raise UserError(f"{option} is {path!r}; expected a path")
    if "/path/to/" in f"/{path}/":
        raise UserError(f"{option}: {path} is a placeholder; put the real path there")
    return Path(path)


def read_unstretched_pair(
    pair: Pair, sar: tuple[np.ndarray, np.ndarray], eo_range: tuple[float, float] | None, max_pixels: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A pair and its SAR as read (pixels, valid) => SAR and true EO [H, W, 3] in 0-255, and valid [H, W]: data in both.

    UserError where the EO is unreadable, their sizes differ, no pixel counts, or --eo-range does not fit the EO.
    """
    pixels, sar_valid = sar
    eo, valid, _ = read_unstretched_eo(pair.eo, eo_range, "--eo-range", max_pixels)
    require_same_size(pair, pixels, eo)
    if not (valid & sar_valid).any():
        raise UserError(f"{pair.sar} and {pair.eo}: no pixel is valid in both")
    return pixels, eo, valid & sar_valid


def require_same_size(pair: Pair, sar: np.ndarray, eo: np.ndarray) -> None:
    if sar.shape != eo.shape:
        raise UserError(f"the images of a pair differ in size: {sizes_of(pair, sar, eo)}")


def sizes_of(pair: Pair, sar: np.ndarray, eo: np.ndarray) -> str:
    return f"SAR {pair.sar} is {size_words(sar)}, EO {pair.eo} is {size_words(eo)}"


def size_words(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} px"
