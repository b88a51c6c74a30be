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
from cdiffset.evaluation.baselines import draw_pixels, image_columns, trivial_baselines
from cdiffset.images import (
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    QUICKLOOK,
    UndeclaredRange,
    list_images,
    open_raster,
    read_sar,
    read_unstretched_eo,
    require_declared_range,
    require_size,
    to_tensor,
)
from cdiffset.pairing import PAIR_SUFFIXES, by_stem, read_list, read_pair_list, size_words

POOLED_PIXELS = 5_000_000  # pooled measures see at most about so many pixels, equally many of each image
MAPS = {"variance": "variance_dir", "expected error": "error_dir", "ensemble spread": "ensemble_dir"}  # name: field of folders
MASKS = ("sar_only", "eo_only")  # objects that only one of the two images shows
MAP_SUFFIXES = (".tif", ".tiff")  # test.py --error-dir writes a picture to look at beside each map
LIST_SUFFIXES = (*PAIR_SUFFIXES, ".pkl")
FAULTS = {
    "missing": "ground truth without a prediction",
    "extra": "predictions without ground truth",
    "unlisted": "entries of the list without a file",
    "cropped": "ground truth larger than the prediction, centre-cropped to it",
    "size": "ground truth smaller than the prediction, left out",
    "range": "pairs whose value range is not declared, left out",
    "empty": "pairs without a pixel that is valid in both images, left out",
    "unreadable": "unreadable pairs, left out",
    "beside": "pairs without a usable SAR, map or mask, left out of what needs it",
}


@dataclass(frozen=True)
class EvaluationFolders:
    """What is evaluated against what, and what their numbers are; None: not given."""

    pred_dir: Path  # EO as any method made it
    gt_dir: Path  # true EO
    sar_dir: Path | None = None
    variance_dir: Path | None = None  # float32 TIFF, σ² in units of the latent
    error_dir: Path | None = None  # float32 TIFF, expected absolute error in 8-bit units
    ensemble_dir: Path | None = None  # float32 TIFF, standard deviation over samples in 8-bit units
    mask_dir: Path | None = None  # mask_sar_only/ and mask_eo_only/, 8-bit, above 127 is positive
    split_list: Path | None = None  # which stems count
    pred_range: tuple[float, float] | None = None  # what 0 and 255 are in pred_dir; None: its files are 8-bit
    gt_range: tuple[float, float] | None = None


class SizeFault(UserError):
    """An image that is smaller than what it should be cropped to."""


class EmptyFault(UserError):
    """A pair without a pixel that counts."""


FAULT_OF = {SizeFault: "size", EmptyFault: "empty", UndeclaredRange: "range"}  # others: unreadable


class EvaluationPairs(Dataset):
    """The pairs of `folders` in counting order of their stems, each as a dict:

    {"stem"; "sar" (where given), "eo", "generated": float32 [3, H, W] in [-1, 1]; "valid": bool [H, W], the pixels that count,
    which both EO images hold; the others are black in both; "maps": {name: float32 [H, W], NaN where not valid};
    "values": {column: number} of this image; "pixels": {name: [n]} of its pixels, or None; "faults": [(kind, text)]}.

    A pair that cannot be used has "stem" and "faults" alone. What the lists of files show already is in `faults`:
    {kind of FAULTS: [names]}. UserError where no pair is left, and where a range does not fit the first pair's files.
    """

    def __init__(self, folders: EvaluationFolders, max_pixels: int = MAX_PIXELS):
        self.folders, self.max_pixels = folders, max_pixels
        self.files = {"generated": images_by_stem(folders.pred_dir), "eo": images_by_stem(folders.gt_dir)}
        generated, eo = set(self.files["generated"]), set(self.files["eo"])
        self.faults: dict[str, list[str]] = {}
        if folders.split_list is not None:
            listed, unlisted = read_split(folders.split_list, generated | eo)
            if not listed:
                raise UserError(f"{folders.split_list}: no entry is an image of {folders.pred_dir} or {folders.gt_dir}")
            generated, eo, self.faults["unlisted"] = generated & listed, eo & listed, unlisted
        self.faults["missing"] = [stem for stem in self.files["eo"] if stem in eo - generated]
        self.faults["extra"] = [stem for stem in self.files["generated"] if stem in generated - eo]
        self.stems = [stem for stem in self.files["eo"] if stem in eo & generated]
        if not self.stems:
            raise UserError(f"no image of {folders.pred_dir} has a twin of the same relative path in {folders.gt_dir}")
        self.map_names = [name for name, field in MAPS.items() if getattr(folders, field) is not None]
        self.files |= {name: images_by_stem(getattr(folders, MAPS[name]), MAP_SUFFIXES) for name in self.map_names}
        beside = {} if folders.sar_dir is None else {"sar": folders.sar_dir}
        if folders.mask_dir is not None:
            beside |= {mask: folders.mask_dir / f"mask_{mask}" for mask in MASKS}
        self.files |= {kind: images_by_stem(folder) for kind, folder in beside.items()}
        self.pixels_per_image = max(1, POOLED_PIXELS // len(self.stems))
        self.ranges = {"generated": (folders.pred_range, "--pred-range"), "eo": (folders.gt_range, "--gt-range")}
        for kind, (limits, option) in self.ranges.items():
            require_declared_range(self._path(kind, self.stems[0]), limits, option, max_pixels)

    def __len__(self) -> int:
        return len(self.stems)

    def __getitem__(self, index: int) -> dict:
        stem = self.stems[range(len(self))[index]]  # raises the IndexError that ends an iteration
        try:
            generated, eo, valid, values, faults = self._read_pair(stem)
        except UserError as error:
            return {"stem": stem, "faults": [(FAULT_OF.get(type(error), "unreadable"), str(error))]}
        values |= {"fraction/counted": float(valid.mean()), "8-bit/mae": mean_difference(generated, eo, valid)}
        item = {"stem": stem, "generated": to_tensor(generated), "eo": to_tensor(eo), "valid": torch.from_numpy(valid)}
        item |= {"maps": {}, "values": values, "pixels": None, "faults": faults}
        try:
            self._add_what_stands_beside(item, generated, eo, valid)
        except UserError as error:
            faults.append(("beside", str(error)))
        return item

    def _read_pair(self, stem: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, dict[str, float], list[tuple[str, str]]]:
        """=> (generated and EO [H, W, 3] in 0-255; valid [H, W]; columns of the ranges; faults)."""
        (generated, valid, clipped), (eo, eo_valid, eo_clipped) = (
            read_unstretched_eo(self._path(kind, stem), limits, option, self.max_pixels)
            for kind, (limits, option) in self.ranges.items()
        )
        faults = [] if eo.shape == generated.shape else [("cropped", f"{stem} ({size_words(eo)} to {size_words(generated)})")]
        eo, eo_valid = (centre_crop(array, valid.shape, stem) for array in (eo, eo_valid))
        valid = valid & eo_valid
        if not valid.any():
            raise EmptyFault(f"{stem}: no pixel is valid in both images")
        generated, eo = (np.where(valid[..., None], image, np.float32(0)) for image in (generated, eo))
        declared = {"pred": (self.folders.pred_range, clipped), "gt": (self.folders.gt_range, eo_clipped)}
        clipped = {f"fraction/clipped_{kind}": fraction for kind, (limits, fraction) in declared.items() if limits is not None}
        return generated, eo, valid, clipped, faults

    def _add_what_stands_beside(self, item: dict, generated: np.ndarray, eo: np.ndarray, valid: np.ndarray) -> None:
        stem, sar = item["stem"], None
        if "sar" in self.files:
            sar = centre_crop(read_sar(self._path("sar", stem), self.max_pixels), valid.shape, f"{stem}: SAR")
            item["sar"], item["values"]["8-bit/mae_sar"] = to_tensor(sar), mean_difference(generated, sar, valid)
        if not self.map_names:
            return
        maps = {
            name: centre_crop(read_map(self._path(name, stem), self.max_pixels), valid.shape, f"{stem}: {name}")
            for name in self.map_names
        }
        masks = {name: self._read_mask(name, stem, valid.shape) for name in MASKS if name in self.files}
        valid = np.logical_and.reduce([valid, *(np.isfinite(values) for values in maps.values())])
        if not valid.any():
            raise UserError(f"{stem}: no pixel that counts is valid in every map")
        difference = generated - eo
        errors = {"absolute": np.abs(difference).mean(-1), "squared": np.square(difference).mean(-1)}  # [H, W]
        candidates = {name: values[valid] for name, values in (maps | trivial_baselines(sar, valid.shape, stem)).items()}  # [n]
        errors, masks = ({name: values[valid] for name, values in each.items()} for each in (errors, masks))
        item["maps"] = {name: np.where(valid, values, np.float32(np.nan)) for name, values in maps.items()}
        item["values"] |= {"fraction/counted_in_maps": float(valid.mean()), **image_columns(candidates, errors)}
        item["pixels"] = draw_pixels({**errors, **candidates, **masks}, self.pixels_per_image, stem)

    def _read_mask(self, name: str, stem: str, size: tuple[int, int]) -> np.ndarray:
        mask = read_unstretched_eo(self._path(name, stem), None, None, self.max_pixels).pixels[..., 0] > 127
        return centre_crop(mask, size, f"{stem}: mask {name}")

    def _path(self, kind: str, stem: str) -> Path:
        if stem not in self.files[kind]:
            raise UserError(f"{stem}: no {kind} file")
        return self.files[kind][stem]


def images_by_stem(folder: Path, suffixes: tuple[str, ...] = IMAGE_SUFFIXES) -> dict[str, Path]:
    """Images of these suffixes under a folder by stem, in counting order; UserError where there is none, or where two differ
    in the suffix alone.
    """
    listed = [path for path in list_images(folder) if path.suffix.lower() in suffixes and not path.name.endswith(QUICKLOOK)]
    if not listed:
        raise UserError(f"{folder}: holds no {' or '.join(suffixes)}, expected a map for each image")
    return by_stem(folder, listed)


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
        file = PurePosixPath(entry)
        parts = (file.with_suffix("") if file.suffix.lower() in IMAGE_SUFFIXES else file).parts
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
        raise SizeFault(f"{what} is {size_words(image)}, the prediction {new_width} x {new_height} px")
    return image[top : top + new_height, left : left + new_width]


def read_map(path: Path, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """A float TIFF => float32 [H, W], NaN where it is NaN, nodata or masked; UserError where it is infinite or negative."""
    try:
        with open_raster(path, "GTiff") as source:
            require_size(path, source.height, source.width, 1, max_pixels)
            values, masked = source.read(1).astype(np.float32), source.read_masks(1) == 0
    except RasterioError as error:
        raise UserError(f"{path}: unreadable, truncated or not a TIFF ({error})") from error
    values[masked] = np.nan
    known = values[~np.isnan(values)]
    if not (np.isfinite(known).all() and (known >= 0).all()):
        raise UserError(f"{path}: expected finite values from 0, found {known.min():g} to {known.max():g}")
    return values


def mean_difference(one: np.ndarray, other: np.ndarray, valid: np.ndarray) -> float:
    """Mean absolute difference of two images [H, W, 3] over the valid pixels [H, W]."""
    return float(np.abs(one - other)[valid].mean())
