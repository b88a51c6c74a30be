"""Metrics in both conventions of the field, reports, and the pictures people look at.

B, H, W: batch, height, width of images. Images are float tensors [B, 3, H, W] in [-1, 1] unless a name says otherwise.
"""

import csv
import io
import json
import math
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

# First of all, because importing cdiffset mends torchvision, which the metric libraries import.
from cdiffset.images import to_uint8, written_whole

# isort: split
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    spatial_correlation_coefficient,
    structural_similarity_index_measure,
)

MIN_SIDE_PX = {"psnr": 1, "ssim": 6, "scc": 8, "lpips": 16}  # SSIM's reflected border, SCC's window, VGG's four poolings
FID_DIMS = 2048  # Inception pool3
IS_MIN_IMAGES = 11
CONNECT_TIMEOUT_S = 10.0  # a host that does not answer must not hold up a run for minutes
WEIGHT_ERRORS = (ImportError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, HTTPException)
LABELS = {  # with the unit, and an arrow towards better
    "psnr": "PSNR [dB] ↑",
    "ssim": "SSIM ↑",
    "scc": "SCC ↑",
    "lpips": "LPIPS (VGG) ↓",
    "fid": "FID ↓",
    "inception_score": "IS ↑",
}
GAP_PX = 4  # between the pictures of a panel
TITLE_PX = 14


class MetricUnavailable(Exception):
    """A metric that cannot be computed here; `str(error)` is the reason, on one line."""


class Convention(NamedTuple):
    """How images in [-1, 1] become the inputs of a metric; numbers of different conventions never compare.

    `standard` is what the metrics were defined for: x * 0.5 + 0.5, and LPIPS in [-1, 1]. `paper` is what the published
    C-DiffSET tables were computed with: clamp(x + 0.5, 0, 1), a 2x contrast stretch of both images with half of the range
    clamped away, and LPIPS fed with that [0, 1] image where it expects [-1, 1] (about 0.05 lower).
    """

    pixels: Callable[[torch.Tensor], torch.Tensor]  # => [0, 1], for PSNR, SSIM and SCC with data_range 1
    lpips: Callable[[torch.Tensor], torch.Tensor]  # => what LPIPS is fed with, its `normalize` off
    description: str


def _to_unit(images: torch.Tensor) -> torch.Tensor:
    return images * 0.5 + 0.5


def _stretch(images: torch.Tensor) -> torch.Tensor:
    return (images + 0.5).clamp(0, 1)


CONVENTIONS = {
    "standard": Convention(_to_unit, lambda images: images, "images as x * 0.5 + 0.5; LPIPS in [-1, 1]"),
    "paper": Convention(_stretch, _stretch, "images as clamp(x + 0.5, 0, 1); LPIPS in [0, 1] with normalize=False"),
}


def _psnr(generated: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
    return peak_signal_noise_ratio(generated, eo, data_range=1.0, reduction="none", dim=(1, 2, 3))


def _ssim(generated: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
    return structural_similarity_index_measure(generated, eo, data_range=1.0, reduction="none")


def _scc(generated: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
    return spatial_correlation_coefficient(generated, eo, reduction="none")


PIXEL_METRICS = {"psnr": _psnr, "ssim": _ssim, "scc": _scc}  # two images [B, 3, H, W] in [0, 1] => [B]


class PairMetrics:
    """PSNR, SSIM, SCC (torchmetrics) and LPIPS with VGG (lpips) of image pairs, per image, in every convention of CONVENTIONS.

    `absent` holds the reason for each metric that could not be computed, so far, for some image. LPIPS's weights are fetched
    here, once; where that fails the rest is still computed.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        with_lpips: bool = True,  # False: spare the VGG network
        lpips_model: torch.nn.Module | None = None,  # None: lpips.LPIPS(net="vgg")
    ):
        self.device = torch.device(device)
        self.absent: dict[str, str] = {}
        self._lpips = None
        if not with_lpips:
            self.absent["lpips"] = "switched off"
            return
        try:
            self._lpips = (lpips_model or _load_lpips()).to(self.device).eval()
        except MetricUnavailable as error:
            self.absent["lpips"] = str(error)

    @torch.inference_mode()
    def __call__(self, generated: torch.Tensor, eo: torch.Tensor) -> dict[str, dict[str, list[float]]]:
        """Two batches [B, 3, H, W] in [-1, 1] => {convention: {metric: [one value per image]}}; `generated` is clamped.

        A metric that these images are too small for is left out, with its reason in `absent`. PSNR of equal images is inf.
        ValueError where the shapes differ, a value is not finite, or `eo` leaves [-1, 1].
        """
        if generated.shape != eo.shape or eo.ndim != 4 or eo.shape[1] != 3:
            raise ValueError(f"image pairs must be [B, 3, H, W], got {list(generated.shape)} and {list(eo.shape)}")
        generated, eo = generated.to(self.device, torch.float32), eo.to(self.device, torch.float32)
        if not generated.isfinite().all():
            raise ValueError("generated images must be finite")
        if not (eo.abs() <= 1 + 1e-3).all():
            raise ValueError(f"EO images must be in [-1, 1], got {eo.min():g} to {eo.max():g}")
        generated = generated.clamp(-1, 1)
        return {name: self._measure(convention, generated, eo) for name, convention in CONVENTIONS.items()}

    def _measure(self, convention: Convention, generated: torch.Tensor, eo: torch.Tensor) -> dict[str, list[float]]:
        pixels = convention.pixels(generated), convention.pixels(eo)
        values = {name: metric(*pixels).tolist() for name, metric in PIXEL_METRICS.items() if self._fits(name, eo)}
        if self._lpips is not None and self._fits("lpips", eo):
            values["lpips"] = self._lpips(convention.lpips(generated), convention.lpips(eo)).flatten().tolist()
        return values

    def _fits(self, metric: str, images: torch.Tensor) -> bool:
        height, width = images.shape[-2:]
        fits = min(height, width) >= MIN_SIDE_PX[metric]
        if not fits:
            self.absent[metric] = f"needs sides of at least {MIN_SIDE_PX[metric]} px, an image has {height} x {width}"
        return fits


@contextmanager
def _weights_within_reach() -> Iterator[None]:
    """Around a library's own loading of weights: whatever keeps them out of reach becomes a one-line MetricUnavailable."""
    timeout_before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(CONNECT_TIMEOUT_S)
    try:
        yield
    except WEIGHT_ERRORS as error:
        detail = " ".join(str(error).split())[:200]
        raise MetricUnavailable(f"its network cannot be loaded ({type(error).__name__}: {detail})") from error
    finally:
        socket.setdefaulttimeout(timeout_before)


def _load_lpips() -> torch.nn.Module:
    with _weights_within_reach(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The parameter 'pretrained'|Arguments other than a weight enum")  # lpips's own call
        import lpips

        return lpips.LPIPS(net="vgg", verbose=False)


def fid(folder_a: Path | str, folder_b: Path | str, device: torch.device | str = "cpu") -> float:
    """Fréchet Inception distance, at least 0, of all PNGs in two folders and below, through pytorch-fid (pool3, 2048-d).

    Ground truth must be cropped to the size of the outputs beforehand: images are read as they are. Up to 2048 images leave the
    covariances rank-deficient and the FID biased upwards: compare FIDs of equally many images only.
    MetricUnavailable with fewer than two images in a folder, without the weights, or where the matrix root fails.
    """
    images = [_images_in(folder) for folder in (folder_a, folder_b)]
    for folder, paths in zip((folder_a, folder_b), images, strict=True):
        if len(paths) < 2:
            raise MetricUnavailable(f"needs at least 2 PNG images in a folder, {folder} has {len(paths)}")
    with _weights_within_reach():
        from pytorch_fid.fid_score import calculate_activation_statistics, calculate_frechet_distance
        from pytorch_fid.inception import InceptionV3

        model = InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[FID_DIMS]])
    model = model.to(device)
    moments = []
    for paths in images:
        batch_size = min(50, len(paths)) if len({_size_of(path) for path in paths}) == 1 else 1
        moments += calculate_activation_statistics(paths, model, batch_size, FID_DIMS, device, num_workers=0)
    try:
        return float(calculate_frechet_distance(*moments))
    except ValueError as error:
        raise MetricUnavailable(f"its matrix root fails ({error})") from error


def inception_score(folder: Path | str, device: torch.device | str = "cpu") -> float:
    """Inception score, at least 1, mean over up to 10 splits, of all PNGs in a folder and below, through torchmetrics.

    The splits are drawn from a fixed seed. MetricUnavailable with 10 images or fewer, or without the weights.
    """
    paths = _images_in(folder)
    if len(paths) < IS_MIN_IMAGES:
        raise MetricUnavailable(f"needs more than {IS_MIN_IMAGES - 1} PNG images, {folder} has {len(paths)}")
    with _weights_within_reach():
        from torchmetrics.image.inception import InceptionScore

        metric = InceptionScore()
    metric = metric.to(device)
    for path in paths:
        pixels = np.array(Image.open(path).convert("RGB"))  # [H, W, 3] uint8
        metric.update(torch.from_numpy(pixels).permute(2, 0, 1)[None].to(device))
    with torch.random.fork_rng(devices=[]):  # the metric shuffles with the global generator
        torch.manual_seed(0)
        return float(metric.compute()[0])


def _images_in(folder: Path | str) -> list[Path]:
    return sorted(Path(folder).rglob("*.png"))


def _size_of(path: Path) -> tuple[int, int]:
    with Image.open(path) as image:
        return image.size


def set_metrics(
    generated_dir: Path | str, eo_dir: Path | str, device: torch.device | str = "cpu"
) -> tuple[dict[str, float], dict[str, str]]:
    """FID and IS of a folder of generated PNGs: ({"fid", "inception_score": value}, {metric: why it is absent}).

    Both are functions of the 8-bit pictures, so the conventions do not touch them.
    """
    values, absent = {}, {}
    measures = {"fid": (fid, generated_dir, eo_dir), "inception_score": (inception_score, generated_dir)}
    for name, (measure, *folders) in measures.items():
        try:
            values[name] = measure(*folders, device=device)
        except MetricUnavailable as error:
            absent[name] = str(error)
    return values, absent


def image_rows(names: list[str], values: dict[str, dict[str, list[float]]]) -> list[dict]:
    """PairMetrics's answer for a batch => one flat row per image: {"name": ..., "standard/psnr": ..., ...}."""
    rows = [{"name": name} for name in names]
    for convention, metrics in values.items():
        for metric, per_image in metrics.items():
            for row, value in zip(rows, per_image, strict=True):
                row[f"{convention}/{metric}"] = value
    return rows


def summarise(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Rows of image_rows => {convention: {metric: {"mean", "n", "infinite"}}}, the mean being over n images.

    The PSNR of equal images is infinite; those are left out of the mean and counted apart. mean is None where n is 0.
    """
    summary: dict[str, dict[str, dict]] = {}
    for column in _columns(rows):
        convention, metric = column.split("/")
        values = [row[column] for row in rows if column in row]
        finite = [value for value in values if math.isfinite(value)]
        mean = math.fsum(finite) / len(finite) if finite else None
        entry = {"mean": mean, "n": len(finite), "infinite": len(values) - len(finite)}
        summary.setdefault(convention, {})[metric] = entry
    return summary


def flat_means(rows: list[dict]) -> dict[str, float]:
    """Rows of image_rows => {"standard/psnr": mean, ...} for logs, as in `summarise`, but inf where every image's value is."""
    summary = summarise(rows)
    return {
        f"{convention}/{metric}": math.inf if entry["mean"] is None else entry["mean"]
        for convention, metrics in summary.items()
        for metric, entry in metrics.items()
    }


def _columns(rows: list[dict]) -> list[str]:
    """The metric columns of all rows, in order of first appearance."""
    return [column for column in dict.fromkeys(key for row in rows for key in row) if column != "name"]


def write_report(folder: Path | str, rows: list[dict], set_values: dict[str, float], absent: dict[str, str]) -> dict:
    """Write report.json, report.md and metrics.csv (one line per image), each whole or not at all => report.json's content.

    rows: of image_rows. set_values: metrics of the whole set. absent: {metric: reason} for what could not be computed.
    """
    report = {
        "images": len(rows),
        "conventions": {name: convention.description for name, convention in CONVENTIONS.items()},
        "means": summarise(rows),
        "set": set_values,
        "absent": absent,
    }
    table = io.StringIO()
    writer = csv.DictWriter(table, ["name", *_columns(rows)], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = {
        "metrics.csv": table.getvalue(),
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.md": _markdown(report),
    }
    for name, text in texts.items():
        with written_whole(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return report


def _markdown(report: dict) -> str:
    images, means = report["images"], report["means"]
    lines = [f"# Metrics over {images} images", "", f"| metric | {' | '.join(means)} |", "|---" * (len(means) + 1) + "|"]
    for metric in dict.fromkeys(metric for entries in means.values() for metric in entries):
        cells = [_cell(entries.get(metric), images) for entries in means.values()]
        lines.append(f"| {LABELS[metric]} | {' | '.join(cells)} |")
    lines += ["", *(f"- {name}: {text}" for name, text in report["conventions"].items())]
    if report["set"]:
        lines += ["", "| metric of the set | value |", "|---|---|"]
        lines += [f"| {LABELS[name]} | {value:.4f} |" for name, value in report["set"].items()]
    if "fid" in report["set"] and images <= FID_DIMS:
        lines += ["", f"FID of {images} images is biased upwards: compare it with FIDs of equally many images only."]
    if report["absent"]:
        lines += ["", "Not computed, at least not for every image:", ""]
        lines += [f"- {LABELS.get(name, name).split(' ')[0]}: {reason}" for name, reason in report["absent"].items()]
    return "\n".join(lines) + "\n"


def _cell(entry: dict | None, images: int) -> str:
    """One mean as text, with the number of images wherever it is not all of them."""
    if entry is None:
        return "–"
    text = "∞" if entry["mean"] is None else f"{entry['mean']:.4f}"
    if entry["n"] == images:
        return text
    return f"{text} (n = {entry['n']}" + (f", {entry['infinite']} infinite)" if entry["infinite"] else ")")


def panel(images: list[torch.Tensor], titles: list[str] | None = None) -> np.ndarray:
    """n pictures of one size, [3, H, W] in [-1, 1] or [1, H, W] in [0, 1] => uint8 [H, n W + (n - 1) GAP_PX, 3], side by side.

    With titles, one per picture, the panel is TITLE_PX higher, for a line of text above each.
    """
    header_px = 0 if titles is None else TITLE_PX
    height, width = images[0].shape[-2:]
    canvas = Image.new("RGB", (len(images) * (width + GAP_PX) - GAP_PX, header_px + height), "white")
    for column, image in enumerate(images):
        left = column * (width + GAP_PX)
        canvas.paste(Image.fromarray(_picture(image)), (left, header_px))
        if titles is not None:
            canvas.paste(_title(titles[column], width, header_px), (left, 0))
    return np.array(canvas)


def _picture(image: torch.Tensor) -> np.ndarray:
    """[3, H, W] in [-1, 1] or [1, H, W] in [0, 1] => uint8 [H, W, 3]."""
    return to_uint8(image if image.shape[0] == 3 else image.expand(3, -1, -1) * 2 - 1)


def _title(text: str, width_px: int, height_px: int) -> Image.Image:
    """A line of black text on white, in the largest size that fits and cut off where none does."""
    strip = Image.new("RGB", (width_px, height_px), "white")
    fonts = [ImageFont.load_default(size) for size in (11, 10, 9, 8)]
    font = next((font for font in fonts if font.getlength(text) <= width_px), fonts[-1])
    ImageDraw.Draw(strip).text((0, 0), text, "black", font)
    return strip
