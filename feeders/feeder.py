"""Paired SAR-EO datasets: list or folders -> pairs of files -> the same crop and orientation of both -> tensors in [-1, 1].

PairedFeeder does the work; its subclasses say how pairs are found. Nearly all of them read a list of EO paths and
derive each SAR path from it, so such a subclass is little more than the facts of its dataset.
"""

import importlib
import json
import math
import operator
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from cdiffset.errors import UserError
from cdiffset.images import MAX_PIXELS, read_eo, read_sar, sar_statistics, to_tensor
from cdiffset.pairing import (
    SPLITS,
    Pair,
    existing_folder,
    match_folders,
    read_list,
    read_pairs,
    relative_path,
    require_distinct_names,
    require_files,
    require_formats,
    require_same_size,
    sizes_of,
    split_of,
)

if TYPE_CHECKING:
    from cdiffset.config import Config

CHIPS = "chips.json"


class View(NamedTuple):
    """What an item shows of its pair: a square crop, and what is then done to it, in this order."""

    top: int  # px
    left: int  # px
    flip_horizontally: bool = False
    flip_vertically: bool = False
    rotate: bool = False  # by 90 degrees, counter-clockwise


class PairedFeeder:
    """A map-style dataset of pairs as {"sar", "eo": float32 [3, crop, crop] in [-1, 1], "name": str}.

    `split="train"` takes a random crop and, where `hflip`, `vflip` and `rot` say so, flips it horizontally, vertically and
    rotates it by 90 degrees, each with p = 0.5, the same for both images. `split="test"` takes the centre crop; an item has
    "sar_pixels" as well, the SAR as float32 [crop, crop, 3] in 0-255, from which its starting noise follows. `load_size` is
    the side in px that every image must have (None: any).

    An item is asked for as feeder[index] or feeder[epoch, index], an index alone meaning epoch 0. All its randomness is a
    function of (seed, epoch, index), whichever worker or rank reads it, in whatever order and after any resume.
    """

    gsd_m: float | None = None  # ground sampling distance
    radiometry: dict = {}  # how the SAR scenes were read that the images were cut from: RadiometryOptions by name

    def __init__(
        self,
        pairs: list[Pair],
        crop_size: int,
        split: str,
        load_size: int | None = None,
        seed: int = 2024,
        max_pixels: int = MAX_PIXELS,
        hflip: bool = False,
        vflip: bool = False,
        rot: bool = False,
    ):
        self.pairs = pairs
        self.crop_size = _whole("crop_size", crop_size)
        self.load_size = None if load_size is None else _whole("load_size", load_size)
        if load_size is not None and crop_size > load_size:
            raise UserError(f"crop_size {crop_size} is larger than load_size {load_size}")
        if split not in SPLITS:
            raise UserError(f"split is {split!r}; expected train or test")
        self.split, self.augment = split, split == "train"
        augmentations = {"hflip": hflip, "vflip": vflip, "rot": rot}
        for option, value in augmentations.items():
            if not isinstance(value, bool):
                raise UserError(f"{option} is {value!r}; expected true or false")
        self.augmentations = tuple(augmentations.values())
        if split == "test" and any(self.augmentations):
            on = ", ".join(name for name, value in augmentations.items() if value)
            raise UserError(f"{on}: split test shows images as they are, expected false; leave it to the training feeder")
        self.seed, self.max_pixels = _whole("seed", seed, 0), _whole("max_pixels", max_pixels)
        require_files(pairs)
        if type(self).read is PairedFeeder.read:
            require_formats(pairs)
        if split == "test":
            require_distinct_names(pairs)

    @property
    def names(self) -> list[str]:
        return [pair.name for pair in self.pairs]

    def sar_statistics(self) -> dict | None:
        """What the SAR files hold, for the checkpoint's record; see `images.sar_statistics`."""
        return sar_statistics([pair.sar for pair in self.pairs], self.max_pixels)

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, key: int | tuple[int, int]) -> dict:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        index = range(len(self))[operator.index(index)]  # raises the IndexError that ends an iteration
        images = self.read(self.pairs[index])
        return self.item(index, images, self.view(epoch, index, *images[0].shape[:2]))

    def view(self, epoch: int, index: int, height: int, width: int) -> View:
        """What the item [epoch, index] shows of its images, of height x width px: a function of these and the seed."""
        free_rows, free_columns = height - self.crop_size, width - self.crop_size
        if not self.augment:
            return View(free_rows // 2, free_columns // 2)
        rng = np.random.default_rng([self.seed, epoch, index])
        top, left = rng.integers(free_rows + 1), rng.integers(free_columns + 1)
        # All three are drawn, whichever are on: the switches change neither the crops nor each other.
        drawn = rng.random(3) < 0.5
        return View(int(top), int(left), *(bool(on and each) for on, each in zip(self.augmentations, drawn, strict=True)))

    def item(self, index: int, images: tuple[np.ndarray, np.ndarray], view: View) -> dict:
        """A view of the images [H, W, 3] that `read` gave for a pair."""
        sar, eo = (_seen(image, view, self.crop_size) for image in images)
        item = {"sar": to_tensor(sar), "eo": to_tensor(eo), "name": self.pairs[index].name}
        return item | {"sar_pixels": sar} if self.split == "test" else item

    def read(self, pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        """SAR and EO of a pair, whole: float32 [H, W, 3] in 0-255 each, of one size."""
        sar, eo = read_sar(pair.sar, self.max_pixels), read_eo(pair.eo, self.max_pixels)
        require_same_size(pair, sar, eo)
        if self.load_size is not None and sar.shape[:2] != (self.load_size, self.load_size):
            raise UserError(f"load_size is {self.load_size} px, but {sizes_of(pair, sar, eo)}")
        if min(sar.shape[:2]) < self.crop_size:
            raise UserError(f"images are smaller than crop_size {self.crop_size}: {sizes_of(pair, sar, eo)}")
        return sar, eo


class ListFeeder(PairedFeeder):
    """Pairs from a list of EO paths relative to `dataroot`; the dataset's rule gives each SAR path.

    The list is a .txt file, one path a line, or a .pkl file of a list of strings. `split` defaults to what the list's own
    name says. `crop_size` None is the dataset's own. Other options are those of PairedFeeder.
    """

    layout: str  # EO -> SAR, in words
    folders: dict[str, str]  # EO folder -> SAR folder
    default_crop_size: int  # px

    def __init__(
        self, dataroot: str | Path, listroot: str | Path, crop_size: int | None = None, split: str | None = None, **options
    ):
        root = existing_folder("dataroot", dataroot)
        paths = [relative_path(text, where) for where, text in read_list(listroot, (".txt", ".pkl"))]
        pairs = [Pair(str(eo.with_suffix("")), root / self.eo_to_sar(eo), root / eo) for eo in paths]
        crop_size = self.default_crop_size if crop_size is None else crop_size
        super().__init__(pairs, crop_size, split or split_of(listroot), **options)

    @classmethod
    def eo_to_sar(cls, eo: PurePosixPath) -> PurePosixPath:
        """EO path => SAR path, both relative to the data root; UserError if the path is not of the dataset's layout."""
        *parents, name = eo.parts
        places = [k for k, part in enumerate(parents) if part in cls.folders]
        if len(places) != 1:
            raise cls._misfit(eo)
        parents[places[0]] = cls.folders[parents[places[0]]]
        return PurePosixPath(*parents, name)

    @classmethod
    def _misfit(cls, eo: PurePosixPath) -> UserError:
        return UserError(f"EO path {eo} does not fit the layout of {cls.__name__}: {cls.layout}")


class QXSFeeder(ListFeeder):
    """QXS-SAROPT: GF-3 spotlight SAR and Google Earth EO at 1 m, 20,000 pairs of 256 x 256 px."""

    gsd_m = 1.0
    layout = "opt_256_oc_0.2/N.png -> sar_256_oc_0.2/N.png"
    folders = {"opt_256_oc_0.2": "sar_256_oc_0.2"}
    default_crop_size = 256


class SAROptFeeder(ListFeeder):
    """SAR2Opt: TerraSAR-X and Google Earth EO at 1 m, 1,450 training and 627 test pairs of 600 x 600 px."""

    gsd_m = 1.0
    layout = "trainB/N.png -> trainA/N.png, testB/N.png -> testA/N.png"
    folders = {"trainB": "trainA", "testB": "testA"}
    default_crop_size = 512


class SAR2EOFeeder(ListFeeder):
    """SAR2EO: UNICORN airborne SAR and monochrome EO of one channel, 68,151 training and 21,260 test pairs of 256 x 256 px."""

    layout = "SAR-EO/EO/train/N.png -> SAR-EO/SAR/train/N.png, and so for validation/"
    folders = {"EO": "SAR"}
    default_crop_size = 256


class SpaceNetFeeder(ListFeeder):
    """SpaceNet 6: Capella X-band SAR (float HH, HV, VH, VV) and WorldView-2 EO at 0.5 m, 3,401 pairs of 900 x 900 px."""

    gsd_m = 0.5
    layout = "train/AOI_11_Rotterdam/PS-RGB/*_PS-RGB_*.tif -> train/AOI_11_Rotterdam/SAR-Intensity/*_SAR-Intensity_*.tif"
    folders = {"PS-RGB": "SAR-Intensity"}
    default_crop_size = 512

    @classmethod
    def eo_to_sar(cls, eo: PurePosixPath) -> PurePosixPath:
        if eo.name.count("_PS-RGB_") != 1:
            raise cls._misfit(eo)
        return super().eo_to_sar(eo).with_name(eo.name.replace("_PS-RGB_", "_SAR-Intensity_"))


class SENMSFeeder(ListFeeder):
    """SEN1-2: Sentinel-1 and Sentinel-2 at 10 m, 256 x 256 px, in scenes s1_K and s2_K of four seasons."""

    gsd_m = 10.0
    layout = "ROIs1158_spring/s2_K/ROIs1158_spring_s2_K_pN.png -> ROIs1158_spring/s1_K/ROIs1158_spring_s1_K_pN.png"
    default_crop_size = 256

    @classmethod
    def eo_to_sar(cls, eo: PurePosixPath) -> PurePosixPath:
        scene = re.fullmatch(r"s2_([0-9]+)", eo.parent.name)
        name = scene and re.fullmatch(rf"(.+)_s2_{scene[1]}_(p[0-9]+\.[^.]+)", eo.name)
        if not name:
            raise cls._misfit(eo)
        return eo.parent.with_name(f"s1_{scene[1]}") / f"{name[1]}_s1_{scene[1]}_{name[2]}"


class StellarFeeder(PairedFeeder):
    """Stellar-Vision: SAR/image/* and EO/image/* (.png or .npy), paired by relative path without suffix.

    Centre crop and no augmentation in either split.
    """

    def __init__(
        self, dataroot: str | Path, crop_size: int, split: str = "test", load_size: int | None = None, seed: int = 2024,
        max_pixels: int = MAX_PIXELS,
    ):  # fmt: skip
        root = existing_folder("dataroot", dataroot)
        super().__init__(match_folders(root / "SAR/image", root / "EO/image"), crop_size, split, load_size, seed, max_pixels)
        self.augment = False


class PairedFolderFeeder(PairedFeeder):
    """Your own pairs: two folders matched by relative path without suffix, or a list of pairs.

    Give `sar_dir` and `eo_dir`, or `dataroot` and `listroot`: a .csv, .tsv or .txt file of pairs relative to `dataroot`, see
    `read_pair_list`. `split` may be left to the list's own name. `gsd_m` is the ground sampling distance in metres, for the
    checkpoint's record [that of chips.json, which data/make_chips.py writes]. Other options are those of PairedFeeder.
    """

    def __init__(
        self,
        crop_size: int,
        split: str | None = None,
        sar_dir: str | Path | None = None,
        eo_dir: str | Path | None = None,
        dataroot: str | Path | None = None,
        listroot: str | Path | None = None,
        gsd_m: float | None = None,
        **options,
    ):
        sources = {"sar_dir": sar_dir, "eo_dir": eo_dir, "dataroot": dataroot, "listroot": listroot}
        given = [name for name, value in sources.items() if value is not None]
        if given == ["sar_dir", "eo_dir"]:
            pairs = match_folders(existing_folder("sar_dir", sar_dir), existing_folder("eo_dir", eo_dir))
        elif given == ["dataroot", "listroot"]:
            pairs = read_pairs(existing_folder("dataroot", dataroot), listroot)
        else:
            raise UserError(f"expected sar_dir and eo_dir, or dataroot and listroot; found {', '.join(given) or 'none'}")
        if split is None and listroot is None:
            raise UserError("the names of two folders do not set the split: give split, train or test")
        super().__init__(pairs, crop_size, split or split_of(listroot), **options)
        if gsd_m is not None and (isinstance(gsd_m, bool) or not isinstance(gsd_m, int | float) or not 0 < gsd_m < 1e5):
            raise UserError(f"gsd_m is {gsd_m!r}; expected metres per pixel")
        chips = _chips_record(Path(dataroot or sar_dir))
        sizes = [math.sqrt(math.prod(scene["gsd_m"])) for scene in chips.get("scenes", []) if scene.get("gsd_m")]
        self.gsd_m = gsd_m or (sum(sizes) / len(sizes) if sizes else None)  # the mean of the scenes that chips were cut from
        self.radiometry = chips.get("settings", {}).get("radiometry", {})


def build_feeder(config: "Config", which: str):
    """Feeder class by dotted name, with the arguments of `which` (train or test); the run's seed unless they say otherwise."""
    module, _, name = config.feeder.rpartition(".")
    arguments = getattr(config, f"{which}_feeder_args")
    try:
        feeder_class = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"feeder: cannot import {config.feeder!r} ({error}), expected e.g. feeders.feeder.QXSFeeder") from error
    try:
        return feeder_class(**{"seed": config.seed, **arguments})
    except TypeError as error:
        raise UserError(f"{which}_feeder_args: {str(error).replace('.__init__()', '')}") from error


def _chips_record(folder: Path) -> dict:
    """chips.json of data/make_chips.py, which lies in the data root, two folders above train/sar; {} for other pairs."""
    for file in (folder / CHIPS, folder.absolute().parent.parent / CHIPS):
        if file.is_file():
            try:
                return dict(json.loads(file.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UserError(f"{file} is damaged ({error}); expected what data/make_chips.py writes") from error
    return {}


def _whole(option: str, value: int, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"{option} is {value!r}; expected a whole number from {least}")
    return value


def _seen(image: np.ndarray, view: View, size: int) -> np.ndarray:
    image = image[view.top : view.top + size, view.left : view.left + size]
    if view.flip_horizontally:
        image = image[:, ::-1]
    if view.flip_vertically:
        image = image[::-1]
    return np.rot90(image) if view.rotate else image
