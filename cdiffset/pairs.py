"""Folders of predictions and of ground truth => matched pairs of one size, with the SAR, maps and masks that stand beside them.

Files belong together by their stem: the path relative to the folder, without suffix. Whatever does not fit is named as a fault
and left out, so that one bad file of thousands does not cost the rest.
"""

import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from rasterio.errors import RasterioError
from torch.utils.data import Dataset

from cdiffset.errors import UserError
from cdiffset.images import IMAGE_SUFFIXES, list_images, read_eo, read_sar, read_tiff, to_signed
from cdiffset.judgement import image_columns, rivals, sample_pixels
from feeders.feeder import PAIR_SUFFIXES, read_list, read_pair_list

POOLED_PIXELS = 5_000_000  # pooled measures see at most about so many pixels, equally many of each image
MAPS = {
    "variance": "variance_dir",
    "expected error": "error_dir",
    "ensemble spread": "ensemble_dir",
}  # name: its field in Inputs
MASKS = ("sar_only", "eo_only")  # objects that only one of the two images shows
MAP_SUFFIXES = (".tif", ".tiff")  # test.py --error-dir writes a picture for the eye beside each map
LIST_SUFFIXES = (*PAIR_SUFFIXES, ".pkl")
FAULTS = {
    "missing": "ground truth without a prediction",
    "extra": "predictions without ground truth",
    "unlisted": "entries of the list without a file",
    "cropped": "ground truth larger than the prediction, centre-cropped to it",
    "size": "ground truth smaller than the prediction, left out",
    "unreadable": "unreadable pairs, left out",
    "beside": "pairs without a usable SAR, map or mask, left out of what needs it",
}


@dataclass(frozen=True)
class Inputs:
    """The folders to judge; None: not given."""

    pred_dir: Path  # EO as any method made it
    gt_dir: Path  # true EO
    sar_dir: Path | None = None
    variance_dir: Path | None = None  # float32 TIFF, σ² in units of the latent
    error_dir: Path | None = None  # float32 TIFF, expected absolute error in 8-bit units
    ensemble_dir: Path | None = None  # float32 TIFF, standard deviation over samples in 8-bit units
    mask_dir: Path | None = None  # mask_sar_only/ and mask_eo_only/, 8-bit, above 127 is positive
    split_list: Path | None = None  # which stems count


class SizeFault(UserError):
    """An image that is smaller than what it should be cropped to."""


class PairFolders(Dataset):
    """The pairs of `inputs` in counting order of their stems, each as a dict:

    {"stem"; "sar" (where given), "eo", "generated": float32 [3, H, W] in [-1, 1]; "maps": {name: float32 [H, W]};
    "values": {column: number} of this image; "sample": {name: [n]} of its pixels, or None; "faults": [(kind, text)]}.

    A pair that cannot be used has "stem" and "faults" alone. What the folders' lists tell already is in `faults`:
    {kind of FAULTS: [names]}. UserError where no pair is left.
    """

    def __init__(self, inputs: Inputs):
        self.inputs = inputs
        self.files = {"generated": images_by_stem(inputs.pred_dir), "eo": images_by_stem(inputs.gt_dir)}
        generated, eo = set(self.files["generated"]), set(self.files["eo"])
        self.faults: dict[str, list[str]] = {}
        if inputs.split_list is not None:
            listed, unlisted = read_split(inputs.split_list, generated | eo)
            generated, eo, self.faults["unlisted"] = generated & listed, eo & listed, unlisted
        self.faults["missing"] = [stem for stem in self.files["eo"] if stem in eo - generated]
        self.faults["extra"] = [stem for stem in self.files["generated"] if stem in generated - eo]
        self.stems = [stem for stem in self.files["eo"] if stem in eo & generated]
        if not self.stems:
            raise UserError(f"no image of {inputs.pred_dir} has a twin of the same relative path in {inputs.gt_dir}")
        self.map_names = [name for name, field in MAPS.items() if getattr(inputs, field) is not None]
        self.files |= {name: images_by_stem(getattr(inputs, MAPS[name]), MAP_SUFFIXES) for name in self.map_names}
        beside = {} if inputs.sar_dir is None else {"sar": inputs.sar_dir}
        if inputs.mask_dir is not None:
            beside |= {mask: inputs.mask_dir / f"mask_{mask}" for mask in MASKS}
        self.files |= {kind: images_by_stem(folder) for kind, folder in beside.items()}
        self.pixels_per_image = max(1, POOLED_PIXELS // len(self.stems))

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict:
        stem = self.stems[range(len(self))[index]]  # raises the IndexError that ends an iteration
        try:
            generated, eo = read_eo(self._path("generated", stem)), read_eo(self._path("eo", stem))  # [H, W, 3]
            faults = [] if eo.shape == generated.shape else [("cropped", f"{stem} ({_size(eo)} to {_size(generated)})")]
            eo = centre_crop(eo, generated.shape[:2], stem)
        except UserError as error:
            return {"stem": stem, "faults": [("size" if isinstance(error, SizeFault) else "unreadable", str(error))]}
        item = {"stem": stem, "generated": as_tensor(generated), "eo": as_tensor(eo)}
        item |= {"maps": {}, "values": {"8-bit/mae": float(np.abs(generated - eo).mean())}, "sample": None, "faults": faults}
        try:
            self._add_what_stands_beside(item, generated, eo)
        except UserError as error:
            faults.append(("beside", str(error)))
        return item

    def _add_what_stands_beside(self, item: dict, generated: np.ndarray, eo: np.ndarray) -> None:
        stem, size, sar = item["stem"], generated.shape[:2], None
        if "sar" in self.files:
            sar = centre_crop(read_sar(self._path("sar", stem)), size, f"{stem}: SAR")
            item["sar"], item["values"]["8-bit/mae_sar"] = as_tensor(sar), float(np.abs(generated - sar).mean())
        if not self.map_names:
            return
        maps = {name: centre_crop(read_map(self._path(name, stem)), size, f"{stem}: {name}") for name in self.map_names}
        masks = {}
        if self.inputs.mask_dir is not None:
            for name in MASKS:
                masks[name] = centre_crop(read_eo(self._path(name, stem)), size, f"{stem}: mask {name}")[..., 0] > 127
        difference = generated - eo
        errors = {"absolute": np.abs(difference).mean(-1), "squared": np.square(difference).mean(-1)}  # [H, W]
        candidates = maps | rivals(sar, size, stem)
        item["maps"] = maps
        item["values"] |= image_columns(candidates, errors)
        item["sample"] = sample_pixels({**errors, **candidates, **masks}, self.pixels_per_image, stem)

    def _path(self, kind: str, stem: str) -> Path:
        if stem not in self.files[kind]:
            raise UserError(f"{stem}: no {kind} file")
        return self.files[kind][stem]


def images_by_stem(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Images of these suffixes under a folder by stem, in counting order; UserError where there is none, or where two differ
    in the suffix alone.
    """
    stems: dict[str, Path] = {}
    listed = [path for path in list_images(folder) if path.suffix.lower() in suffixes]
    if not listed:
        raise UserError(f"{folder}: holds no {' or '.join(suffixes)}, expected a map for each image")
    for path in listed:
        if (twin := stems.setdefault(stem_of(path.as_posix()), folder / path)) != folder / path:
            raise UserError(f"{folder}: {twin.relative_to(folder)} and {path} differ in the suffix alone; keep one of them")
    return stems


def stem_of(relative_path: str) -> str:
    path = PurePosixPath(relative_path)
    return str(path.with_suffix("") if path.suffix.lower() in IMAGE_SUFFIXES else path)


def read_split(path: Path, stems: set[str]) -> tuple[set[str], list[str]]:
    """A list as the feeders read them, or of one path a line => (those of `stems` that it names, entries that name none).

    An entry may be relative to a folder further up: of `opt_256_oc_0.2/17.png`, `17` is enough. In lists of pairs the EO
    counts. UserError where two entries name one stem.
    """
    named: dict[str, str] = {}
    unlisted = []
    entries = read_list(path, LIST_SUFFIXES)
    if path.suffix.lower() in PAIR_SUFFIXES and re.search("[,\t]", entries[0][1]):
        entries = [(where, eo) for where, _, eo in read_pair_list(path)]
    for where, entry in entries:
        parts = PurePosixPath(stem_of(entry)).parts
        stem = next((tail for k in range(len(parts)) if (tail := "/".join(parts[k:])) in stems), None)
        if stem is None:
            unlisted.append(entry)
        elif named.setdefault(stem, entry) != entry:
            raise UserError(f"{where}: {entry} and {named[stem]} would both be {stem}")
    return set(named), unlisted


def centre_crop(image: np.ndarray, size: tuple[int, int], what: str) -> np.ndarray:
    """[H, W, ...] => [size, ...]; SizeFault if it is smaller."""
    (height, width), (new_height, new_width) = image.shape[:2], size
    top, left = (height - new_height) // 2, (width - new_width) // 2
    if min(height - new_height, width - new_width) < 0:
        raise SizeFault(f"{what} is {_size(image)}, the prediction {new_width} x {new_height} px")
    return image[top : top + new_height, left : left + new_width]


def read_map(path: Path) -> np.ndarray:
    """A float TIFF => float32 [H, W], finite and not negative; else UserError."""
    try:
        values = read_tiff(path)
    except RasterioError as error:
        raise UserError(f"{path}: unreadable, truncated or not a TIFF ({error})") from error
    if not (np.isfinite(values).all() and values.min() >= 0):
        raise UserError(f"{path}: expected finite values from 0, found {np.min(values):g} to {np.max(values):g}")
    return values


def as_tensor(pixels: np.ndarray) -> torch.Tensor:
    """[H, W, 3] in 0-255 => [3, H, W] in [-1, 1]."""
    return to_signed(torch.from_numpy(np.moveaxis(pixels, -1, 0).copy()))


def _size(image: np.ndarray) -> str:
    return f"{image.shape[1]} x {image.shape[0]} px"
