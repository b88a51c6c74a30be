"""Metrics of image pairs, in both conventions of the field, metrics of image sets, and panels of pictures.

B, H, W: batch, height, width of images. Images are float tensors [B, 3, H, W] in [-1, 1] unless a name says otherwise.
"""

import json
import math
import pickle
import socket
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import NamedTuple

# First of all, because importing cdiffset mends torchvision, which the metric libraries import.
from cdiffset.errors import UserError
from cdiffset.pipeline import to_uint8

# isort: split
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torchmetrics.functional.image import (
    peak_signal_noise_ratio,
    spatial_correlation_coefficient,
    structural_similarity_index_measure,
)
from torchmetrics.functional.image.scc import _scc_per_channel_compute  # the one way to the local values

# SSIM's reflected border, SCC's window, VGG's four poolings (DISTS pads them, and would compare single pixels below), a patch.
MIN_SIDE_PX = {"psnr": 1, "ssim": 6, "scc": 8, "lpips": 16, "dists": 16, "squeezenet": 21, "dino": 16}
# VGG's first features of an image of so many px take 4 GiB.
MAX_PX = {"lpips": 2**24, "dists": 2**24, "squeezenet": 2**24, "dino": 2**22}
WHOLE_PX = 2**22  # larger images are measured by strips
STRIP_ROWS, HALO_ROWS = 256, 8
SSIM_WINDOW_PX, SCC_WINDOW_PX = 11, 8  # torchmetrics' own: a Gaussian, σ = 1.5 px, and a mean
NEEDS_WHOLE = "a network sees whole images: those with excluded pixels are left out"
FID_DIMS = 2048  # Inception pool3
KID_SUBSETS, KID_SUBSET_SIZE = 100, 500
IS_MIN_IMAGES = 11
CONNECT_TIMEOUT_S = 10.0  # a host that does not answer must not hold up a run for minutes
SATELLITE_MEAN, SATELLITE_STD = (0.430, 0.411, 0.296), (0.213, 0.156, 0.143)  # of DINOv3's satellite images, SAT-493M
WEIGHT_ERRORS = (ImportError, OSError, RuntimeError, EOFError, pickle.UnpicklingError, HTTPException)
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

    pixels: Callable[[torch.Tensor], torch.Tensor]  # => [0, 1], for DISTS, and for PSNR, SSIM and SCC with data_range 1
    lpips: Callable[[torch.Tensor], torch.Tensor]  # => what LPIPS is fed with, its `normalize` off
    description: str


def _stretch(images: torch.Tensor) -> torch.Tensor:
    return (images + 0.5).clamp(0, 1)


CONVENTIONS = {
    "standard": Convention(lambda x: x * 0.5 + 0.5, lambda x: x, "images as x * 0.5 + 0.5; LPIPS in [-1, 1]"),
    "paper": Convention(_stretch, _stretch, "images as clamp(x + 0.5, 0, 1); LPIPS in [0, 1] with normalize=False"),
}
PIXEL_METRICS = {  # two images [B, 3, H, W] in [0, 1] => [B]
    "psnr": partial(peak_signal_noise_ratio, data_range=1.0, reduction="none", dim=(1, 2, 3)),
    "ssim": partial(structural_similarity_index_measure, data_range=1.0, reduction="none"),
    "scc": partial(spatial_correlation_coefficient, reduction="none"),
}


def _masked_psnr(generated: torch.Tensor, eo: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    squared = (generated - eo).square().mean(1)  # [B, H, W]
    mean = (squared * valid).sum((1, 2), dtype=torch.float64) / valid.sum((1, 2))
    return -10 * mean.log10()


def _masked_ssim(generated: torch.Tensor, eo: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean of the local SSIM over the windows, reflected at the border as they are, that hold valid pixels only."""

    def local(generated: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
        return PIXEL_METRICS["ssim"](generated, eo, return_full_image=True)[1]

    reach = SSIM_WINDOW_PX // 2
    invalid = F.pad((~valid).float()[:, None], (reach, reach, reach, reach), mode="reflect")
    return _mean_by_strips(local, generated, eo, F.max_pool2d(invalid, SSIM_WINDOW_PX, 1) == 0)


def _masked_scc(generated: torch.Tensor, eo: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The mean of the local SCC over the windows, 0 beyond the border as they are, whose high-pass sees valid pixels only."""
    kernel = torch.tensor([[-1.0, -1, -1], [-1, 8, -1], [-1, -1, -1]], device=eo.device)[None, None]

    def local(generated: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
        channels = zip(generated.split(1, 1), eo.split(1, 1), strict=True)
        return torch.cat([_scc_per_channel_compute(*pair, kernel, SCC_WINDOW_PX) for pair in channels], 1)

    before, after = SCC_WINDOW_PX // 2, (SCC_WINDOW_PX - 1) // 2
    invalid = F.max_pool2d(F.pad((~valid).float()[:, None], (1, 1, 1, 1), mode="replicate"), 3, 1)
    invalid = F.max_pool2d(F.pad(invalid, (before, after, before, after)), SCC_WINDOW_PX, 1)
    return _mean_by_strips(local, generated, eo, invalid == 0)


def _mean_by_strips(local: Callable, generated: torch.Tensor, eo: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """The mean of `local`(images) [B, 3, H, W] where `counted` [B, 1, H, W] => [B], NaN where nothing is; strip by strip,
    since the local values of a whole scene would not fit into memory."""
    height, total = eo.shape[2], torch.zeros(len(eo), dtype=torch.float64, device=eo.device)
    for top in range(0, height, STRIP_ROWS):
        bottom = min(top + STRIP_ROWS, height)
        rows = slice(max(0, top - HALO_ROWS), min(bottom + HALO_ROWS, height))
        values = local(generated[:, :, rows], eo[:, :, rows])[:, :, top - rows.start : bottom - rows.start]
        total += (values * counted[:, :, top:bottom]).sum((1, 2, 3), dtype=torch.float64)
    return total / (counted.sum((1, 2, 3)) * eo.shape[1])


MASKED_METRICS = {"psnr": _masked_psnr, "ssim": _masked_ssim, "scc": _masked_scc}  # with valid, bool [B, H, W]; NaN: undefined


class PairMetrics:
    """PSNR, SSIM, SCC, DISTS (torchmetrics), LPIPS with VGG (lpips), SqueezeNet and DINO of pairs, in CONVENTIONS.

    `absent` holds the reason for each metric that could not be computed, so far, for some image.
    """

    def __init__(
        self,
        device: torch.device | str = "cpu",
        with_lpips: bool = True,  # False: leave out the VGG network
        with_dists: bool | None = None,  # None: do not even list it as absent
        with_squeezenet: bool | None = None,  # likewise
        dino: Path | None = None,  # folder of DINOv3's weights; UserError where they cannot be loaded
        conventions: Sequence[str] = tuple(CONVENTIONS),
    ):
        self.device = torch.device(device)
        self.conventions = {name: CONVENTIONS[name] for name in conventions}
        self.absent: dict[str, str] = {}
        self._lpips = _loaded(_load_lpips, with_lpips, self.device, self.absent, "lpips")
        self._dists = _loaded(_load_dists, with_dists, self.device, self.absent, "dists")
        self._squeezenet = _loaded(_load_squeezenet, with_squeezenet, self.device, self.absent, "squeezenet")
        self._dino = DinoSimilarity(dino).to(self.device) if dino else None

    @torch.inference_mode()
    def __call__(
        self,
        generated: torch.Tensor,  # [B, 3, H, W] in [-1, 1], else clamped
        eo: torch.Tensor,  # [B, 3, H, W] in [-1, 1]
        valid: torch.Tensor | None = None,  # bool [B, H, W], the pixels that count; None: all
    ) -> dict[str, dict[str, list[float | None]]]:
        """=> {convention: {metric: [one value per image, None where it is undefined]}}. PSNR of equal images is inf.

        Where `valid` is given, PSNR is of the valid pixels, SSIM and SCC are means over the windows of valid pixels only, and
        the networks' metrics are left out, as is any metric that these images are too small or too large for.
        """
        if generated.shape != eo.shape or eo.ndim != 4 or eo.shape[1] != 3:
            raise ValueError(f"image pairs must be [B, 3, H, W], got {list(generated.shape)} and {list(eo.shape)}")
        generated, eo = generated.to(self.device, torch.float32), eo.to(self.device, torch.float32)
        if not generated.isfinite().all():
            raise ValueError("generated images must be finite")
        if not (eo.abs() <= 1 + 1e-3).all():
            raise ValueError(f"EO images must be in [-1, 1], got {eo.min():g} to {eo.max():g}")
        generated = generated.clamp(-1, 1)
        valid = None if valid is None else valid.to(self.device)
        return {name: self._measure(convention, generated, eo, valid) for name, convention in self.conventions.items()}

    def _measure(
        self, convention: Convention, generated: torch.Tensor, eo: torch.Tensor, valid: torch.Tensor | None
    ) -> dict[str, list[float | None]]:
        pixels = convention.pixels(generated), convention.pixels(eo)
        fitting = [name for name in PIXEL_METRICS if self._fits(name, eo)]
        if valid is None and eo.shape[-2:].numel() <= WHOLE_PX:
            values = {name: PIXEL_METRICS[name](*pixels).tolist() for name in fitting}
        else:
            counted = torch.ones_like(eo[:, 0], dtype=torch.bool) if valid is None else valid
            values = {name: self._defined(name, MASKED_METRICS[name](*pixels, counted).tolist()) for name in fitting}
        networks = {
            "lpips": (self._lpips, (convention.lpips(generated), convention.lpips(eo))),
            "dists": (self._dists, pixels),
            "squeezenet": (self._squeezenet, pixels),
            "dino": (self._dino, pixels),
        }
        for name, (network, images) in networks.items():
            if network is None or not self._fits(name, eo):
                continue
            if valid is None:
                values[name] = network(*images).flatten().tolist()
            else:
                self.absent[name] = NEEDS_WHOLE
        return values

    def _defined(self, metric: str, values: list[float]) -> list[float | None]:
        if any(map(math.isnan, values)):
            self.absent[metric] = "no window of an image is free of excluded pixels"
        return [None if math.isnan(value) else value for value in values]

    def _fits(self, metric: str, images: torch.Tensor) -> bool:
        if reason := misfit(metric, *images.shape[-2:]):
            self.absent[metric] = reason
        return reason is None


def misfit(metric: str, height: int, width: int) -> str | None:
    """Why a metric cannot measure images of this size; None where it can."""
    if min(height, width) < MIN_SIDE_PX[metric]:
        return f"needs sides of at least {MIN_SIDE_PX[metric]} px, an image has {height} x {width}"
    if height * width > MAX_PX.get(metric, math.inf):
        return f"takes images of at most {MAX_PX[metric]} px, one has {height} x {width}"
    return None


class DinoSimilarity(torch.nn.Module):
    """Cosine similarity of two images' DINOv3 class tokens, as later papers report: 1 for equal images."""

    def __init__(self, folder: Path):
        """`folder`: a DINOv3 ViT in the layout of transformers, config.json and model.safetensors; nothing is downloaded."""
        from transformers import DINOv3ViTModel

        super().__init__()
        try:
            options = {"local_files_only": True, "use_safetensors": True, "output_loading_info": True}
            self.model, loaded = DINOv3ViTModel.from_pretrained(folder, **options)
            if faults := {kind: len(names) for kind, names in loaded.items() if kind.endswith("_keys") and names}:
                raise ValueError(", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in faults.items()))
            self.model.eval()
            file = folder / "preprocessor_config.json"
            stated = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            mean, std = stated.get("image_mean", SATELLITE_MEAN), stated.get("image_std", SATELLITE_STD)
            self.mean, self.std = (torch.nn.Buffer(torch.tensor(each).view(1, 3, 1, 1)) for each in (mean, std))
        except Exception as error:  # transformers raises almost anything
            expected = "a DINOv3 ViT as transformers has it, config.json and model.safetensors"
            reason = (str(error) or type(error).__name__).splitlines()[0]
            raise UserError(f"--dino-weights: {folder}: expected {expected}: {reason}") from error

    def forward(self, generated: torch.Tensor, eo: torch.Tensor) -> torch.Tensor:
        """[B, 3, H, W] in [0, 1] each => [B]."""
        tokens = [self.model((images - self.mean) / self.std).pooler_output for images in (generated, eo)]
        return F.cosine_similarity(*tokens)


def _loaded(load: Callable, wanted: bool | None, device: torch.device, absent: dict[str, str], *metrics: str):
    """The network of some metrics, or None with the reason in `absent`, where `wanted` is not None."""
    try:
        if wanted:
            return load().to(device)
        reason = "switched off"
    except MetricUnavailable as error:
        reason = str(error)
    if wanted is not None:
        absent |= dict.fromkeys(metrics, reason)
    return None


@contextmanager
def _reachable_weights() -> Iterator[None]:
    """Around a library's own loading of weights: whatever makes that fail becomes a one-line MetricUnavailable."""
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
    with _reachable_weights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The parameter 'pretrained'|Arguments other than a weight enum")  # lpips's own call
        import lpips

        return lpips.LPIPS(net="vgg", verbose=False)


def _load_dists() -> torch.nn.Module:
    with _reachable_weights():
        from torchmetrics.functional.image.dists import DISTSNetwork  # the metric's own class loads it anew with every call

        return DISTSNetwork().eval()


def _load_squeezenet() -> torch.nn.Module:
    with _reachable_weights():
        from cdiffset.squeezenet import SqueezeNet

        return SqueezeNet()


def _load_inception() -> torch.nn.Module:
    """pytorch-fid's Inception, [B, 3, H, W] in [0, 1] => [pool3 features]."""
    with _reachable_weights():
        from pytorch_fid.inception import InceptionV3

        return InceptionV3([InceptionV3.BLOCK_INDEX_BY_DIM[FID_DIMS]]).eval()


def _load_inception_score():
    with _reachable_weights(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Metric `InceptionScore` will save all extracted features")
        from torchmetrics.image.inception import InceptionScore

        return InceptionScore()


class SetMetrics:
    """FID, KID, IS (torchmetrics) and a Fréchet distance of SqueezeNet's features, of a set that comes batch by batch.

    They see the 8-bit pictures, so the conventions do not touch them. FID and KID share pytorch-fid's pool3 features (2048-d),
    IS has torch-fidelity's copy of the same network, SqueezeNet's are 512-d. Weights are fetched here, once.
    """

    def __init__(self, device: torch.device | str = "cpu", wanted: bool = True):
        self.device = torch.device(device)
        self.absent: dict[str, str] = {}
        self._features: dict[str, list[torch.Tensor]] = {"generated": [], "eo": []}
        self._squeezed: dict[str, list[torch.Tensor]] = {"generated": [], "eo": []}
        self._inception = _loaded(_load_inception, wanted, self.device, self.absent, "fid", "kid")
        self._squeezenet = _loaded(_load_squeezenet, wanted, self.device, self.absent, "squeezenet_frechet")
        self._score = _loaded(_load_inception_score, wanted, self.device, self.absent, "inception_score")
        self.images = 0

    @torch.inference_mode()
    def update(self, generated: torch.Tensor, eo: torch.Tensor) -> None:
        """Two batches [B, 3, H, W] in [-1, 1], both rounded to 8 bits."""
        self.images += len(generated)
        for kind, images in (("generated", generated), ("eo", eo)):
            pixels = torch.from_numpy(to_uint8(images)).movedim(-1, 1).to(self.device)  # [B, 3, H, W]
            if self._inception is not None:
                features = self._inception(pixels / 255)[0]
                self._features[kind].append(features.mean((2, 3)).cpu())  # the mean matters where FID_DIMS is not 2048
            if self._squeezenet is not None:
                if reason := misfit("squeezenet", *pixels.shape[-2:]):
                    self.absent["squeezenet_frechet"] = reason  # of the whole set or not at all
                else:
                    self._squeezed[kind].append(self._squeezenet.pooled(pixels / 255).cpu())
            if self._score is not None and kind == "generated":
                self._score.update(pixels)

    def compute(self) -> dict[str, dict]:
        """{metric: {"value": ...}}, for KID and IS with "std" over subsets or splits, for KID with "subsets" and "subset_size".

        What cannot be computed is left out, with the reason in `absent`.
        """
        values = {}
        measures = {
            "fid": self._fid, "kid": self._kid, "inception_score": self._inception_score,
            "squeezenet_frechet": self._squeezenet_frechet,
        }  # fmt: skip
        for name, measure in measures.items():
            if name not in self.absent:
                try:
                    values[name] = measure()
                except MetricUnavailable as error:
                    self.absent[name] = str(error)
        return values

    def _stacked(self, features: dict[str, list[torch.Tensor]]) -> list[torch.Tensor]:
        if self.images < 2:
            raise MetricUnavailable(f"needs at least 2 images, got {self.images}")
        return [torch.cat(each).double() for each in features.values()]

    def _fid(self) -> dict[str, float]:
        """Up to 2048 images leave the covariances rank-deficient and the FID biased upwards."""
        return {"value": frechet_distance(*(features.numpy() for features in self._stacked(self._features)))}

    def _squeezenet_frechet(self) -> dict[str, float]:
        """Biased upwards as the FID is, up to 512 images."""
        return {"value": frechet_distance(*(features.numpy() for features in self._stacked(self._squeezed)))}

    def _kid(self) -> dict[str, float]:
        """A set of at most KID_SUBSET_SIZE images is its own and only subset; more are drawn from, KID_SUBSETS times."""
        generated, eo = self._stacked(self._features)
        subsets, size = (KID_SUBSETS, KID_SUBSET_SIZE) if self.images > KID_SUBSET_SIZE else (1, self.images)
        with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):  # the metric draws from the global generator
            warnings.filterwarnings("ignore", "Metric `Kernel Inception Distance` will save all extracted features")
            from torchmetrics.image.kid import KernelInceptionDistance

            torch.manual_seed(0)
            metric = KernelInceptionDistance(torch.nn.Identity(), subsets=subsets, subset_size=size)
            metric.update(eo, real=True)
            metric.update(generated, real=False)
            mean, std = metric.compute()
        spread = {"std": float(std)} if subsets > 1 else {}
        return {"value": float(mean), **spread, "subsets": subsets, "subset_size": size}

    def _inception_score(self) -> dict[str, float]:
        """At least 1, mean over 10 splits drawn from a fixed seed."""
        if self.images < IS_MIN_IMAGES:
            raise MetricUnavailable(f"needs more than {IS_MIN_IMAGES - 1} images, got {self.images}")
        with torch.random.fork_rng(devices=[]):  # the metric shuffles with the global generator
            torch.manual_seed(0)
            mean, std = self._score.compute()
        return {"value": float(mean), "std": float(std)}


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Squared Fréchet distance of the Gaussians with the moments of two sets of features [n, d], float64.

    Tr √(C₁ C₂) of two covariances Rᵀ R is the sum of the singular values of R₁ R₂ᵀ, which needs no root of a matrix.
    """
    centred = [(features - features.mean(0)) / math.sqrt(len(features) - 1) for features in (first, second)]
    one, other = (np.linalg.qr(each, mode="r") for each in centred)
    variances = sum(float(np.square(each).sum()) for each in centred)
    distance = float(np.square(first.mean(0) - second.mean(0)).sum())
    return distance + variances - 2 * float(np.linalg.svd(one @ other.T, compute_uv=False).sum())


def image_rows(names: list[str], values: dict[str, dict[str, list[float]]]) -> list[dict]:
    """PairMetrics's answer for a batch => one flat row per image: {"name": ..., "standard/psnr": ..., ...}."""
    columns = {f"{convention}/{metric}": each for convention, metrics in values.items() for metric, each in metrics.items()}
    rows = [{"name": name} | {column: each[index] for column, each in columns.items()} for index, name in enumerate(names)]
    return [{key: value for key, value in row.items() if value is not None} for row in rows]


def summarise(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """Rows of image_rows => {convention: {metric: {"mean", "n", "infinite"}}}, the mean being over n images.

    The PSNR of equal images is infinite; those are left out of the mean and counted apart. mean is None where n is 0.
    """
    summary: dict[str, dict[str, dict]] = {}
    for column in columns_of(rows):
        convention, metric = column.split("/")
        values = [row[column] for row in rows if column in row]
        finite = [value for value in values if math.isfinite(value)]
        mean = math.fsum(finite) / len(finite) if finite else None
        entry = {"mean": mean, "n": len(finite), "infinite": len(values) - len(finite)}
        summary.setdefault(convention, {})[metric] = entry
    return summary


def flat_means(rows: list[dict]) -> dict[str, float]:
    """Rows of image_rows => {"standard/psnr": mean, ...} for logs, as in `summarise`, but inf where every image's value is."""
    return {
        f"{convention}/{metric}": math.inf if entry["mean"] is None else entry["mean"]
        for convention, metrics in summarise(rows).items()
        for metric, entry in metrics.items()
    }


def columns_of(rows: list[dict]) -> list[str]:
    """The metric columns of all rows, in order of first appearance."""
    return [column for column in dict.fromkeys(key for row in rows for key in row) if column != "name"]


def panel(images: list[torch.Tensor], titles: list[str] | None = None) -> np.ndarray:
    """n pictures of one size, [3, H, W] in [-1, 1] or [1, H, W] in [0, 1] => uint8 [H, n W + (n - 1) GAP_PX, 3], side by side.

    With titles, one per picture, the panel is TITLE_PX higher, for a line of text above each.
    """
    header_px = 0 if titles is None else TITLE_PX
    height, width = images[0].shape[-2:]
    canvas = Image.new("RGB", (len(images) * (width + GAP_PX) - GAP_PX, header_px + height), "white")
    for column, image in enumerate(images):
        left = column * (width + GAP_PX)
        rgb = image if image.shape[0] == 3 else image.expand(3, -1, -1) * 2 - 1
        canvas.paste(Image.fromarray(to_uint8(rgb)), (left, header_px))
        if titles is not None:
            canvas.paste(_title(titles[column], width, header_px), (left, 0))
    return np.array(canvas)


def _title(text: str, width_px: int, height_px: int) -> Image.Image:
    """A line of black text on white, in the largest size that fits and cut off where none does."""
    strip = Image.new("RGB", (width_px, height_px), "white")
    fonts = [ImageFont.load_default(size) for size in (11, 10, 9, 8)]
    font = next((font for font in fonts if font.getlength(text) <= width_px), fonts[-1])
    ImageDraw.Draw(strip).text((0, 0), text, "black", font)
    return strip
