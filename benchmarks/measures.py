"""What the discrepancy benchmark measures: a trained U-Net against scenes whose every discrepancy is known."""

import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from scipy.ndimage import sum_labels
from torch.nn.functional import interpolate

from benchmarks.harness import Model
from cdiffset.auditing.residual import residual_map
from cdiffset.config import MIDPOINT, PAPER_TIMESTEPS
from cdiffset.errors import UserError
from cdiffset.evaluation.uncertainty import auroc, ause, average_precision, ence, reliability, spearman
from cdiffset.images import to_signed
from cdiffset.pipeline import image_noise, to_uint8, translate, variance, variance_weights, weighted_mean
from data.simulate import Simulation, simulate_scene
from utils import PairMetrics

TRAIN, TEST, OTHER = 0, 1, 2  # splits: those of data/simulate.py, and scenes that it never writes
APPEARS = 0.5  # an object appears in a picture that goes at least half of the way from "absent" to "present"
BATCH_SIZE = 32


# ------------------------------------------------------------------------------------------------------------------- the scenes
@dataclass(frozen=True)
class Scenes:
    """N scenes with the truth about them. Pictures are float32 [N, 3, H, W] in [-1, 1], masks boolean [N, H, W]."""

    sar: torch.Tensor
    eo: torch.Tensor
    eo_all: torch.Tensor  # the EO with every ship and vehicle
    eo_none: torch.Tensor  # and with none
    masks: dict[str, np.ndarray]  # sar_only, eo_only, movable, permanent
    objects: np.ndarray  # [N, H, W]: 0, or the number of the ship or vehicle, unique over all scenes

    @property
    def discrepant(self) -> np.ndarray:
        """[N, H, W]: pixels of objects that only one of both shows."""
        return self.masks["sar_only"] | self.masks["eo_only"]

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """Numbers of the objects that only the SAR shows, only the EO, or both."""
        alone = {name: np.unique(self.objects[self.masks[name]]) for name in ("sar_only", "eo_only")}
        everything = np.unique(self.objects[self.objects > 0])
        return {**alone, "both": np.setdiff1d(everything, np.concatenate(list(alone.values())))}


def draw_scenes(simulation: Simulation, split: int, indices: range, seed: int) -> Scenes:
    """Scenes of a split, the same as `data/simulate.py --seed` writes."""
    drawn = [simulate_scene(np.random.default_rng([seed, split, index]), simulation) for index in indices]
    stacked = {name: np.stack([scene[name] for scene in drawn]) for name in drawn[0]}
    pictures = {}
    for name in ("sar", "eo", "eo_all", "eo_none"):
        pixels = stacked[name] if stacked[name].ndim == 4 else stacked[name][..., None].repeat(3, -1)
        pictures[name] = to_signed(torch.from_numpy(pixels).permute(0, 3, 1, 2).float())
    numbers = stacked["objects"].astype(np.int64)
    before = np.concatenate([[0], numbers.max((1, 2)).cumsum()[:-1]])[:, None, None]
    masks = {name: stacked[f"mask_{name}"] > 0 for name in ("sar_only", "eo_only", "movable", "permanent")}
    return Scenes(**pictures, masks=masks, objects=np.where(numbers > 0, numbers + before, 0))


def read_simulation(data: Path) -> tuple[Simulation, int, int]:
    """A folder that data/simulate.py wrote => (what its scenes look like, its seed, number of its held-out scenes)."""
    file = data / "simulation.json"
    if not file.is_file():
        raise UserError(f"--data: {data} lacks simulation.json, expected a folder of data/simulate.py (`make demo-simulated`)")
    record = json.loads(file.read_text())
    own = {field.name: record.get(field.name, field.default) for field in fields(Simulation)}
    return Simulation(**own), record["seed"], record["test"]


# ---------------------------------------------------------------------------------------------------------------- hallucination
def appearance(generated: torch.Tensor, scenes: Scenes, numbers: np.ndarray) -> np.ndarray:
    """How much of each object a picture [N, 3, H, W] shows: 0 as in the EO without it, 1 as in the EO with it => [objects].

    The projection of (generated - eo_none) on (eo_all - eo_none) over the object's pixels and colours. NaN for an object whose
    presence changes nothing.
    """
    absent = scenes.eo_none.numpy()
    contrast = scenes.eo_all.numpy() - absent
    along = ((generated.numpy() - absent) * contrast).sum(1)  # [N,H,W]
    with np.errstate(invalid="ignore", divide="ignore"):
        return sum_labels(along, scenes.objects, numbers) / sum_labels((contrast**2).sum(1), scenes.objects, numbers)


def share_drawn(generated: torch.Tensor, scenes: Scenes) -> dict[str, float | None]:
    """Share of the objects of each kind that the picture shows; for "sar_only" this is the hallucination rate.

    None where there is no object of a kind.
    """
    shares = {}
    for kind, numbers in scenes.kinds.items():
        shown = appearance(generated, scenes, numbers)
        shown = shown[~np.isnan(shown)]
        shares[kind] = float(np.mean(shown > APPEARS)) if shown.size else None
    return shares


# ------------------------------------------------------------------------------------------------------------------ the picture
def picture_measures(generated: torch.Tensor, scenes: Scenes) -> dict[str, float | None]:
    """PSNR and SSIM per image, averaged (standard convention); PSNR of all pixels inside and outside the discrepancies."""
    values = PairMetrics(with_lpips=False)(generated, scenes.eo)["standard"]
    squared = (((generated - scenes.eo) / 2) ** 2).mean(1).numpy()  # [N,H,W], of pixels in [0, 1]
    regions = {"psnr_inside": scenes.discrepant, "psnr_outside": ~scenes.discrepant}
    return {
        **{name: float(np.mean(values[name])) for name in ("psnr", "ssim")},
        **{name: float(-10 * np.log10(squared[region].mean())) for name, region in regions.items()},
        **{f"drawn_{kind}": share for kind, share in share_drawn(generated, scenes).items()},
    }


# --------------------------------------------------------------------------------------------------------------------- the maps
class Map(NamedTuple):
    """A map of uncertainty over scenes, of latent cells or pixels."""

    values: torch.Tensor  # [N, 1, h or H, w or W]
    passes: int  # of the U-Net, per scene
    power: float | None  # values ** power grows as an error does; None: it is no estimate of an error


READ = {  # timesteps over which σ² is averaged
    "midpoint": (MIDPOINT,), "early": PAPER_TIMESTEPS[:13], "mean": PAPER_TIMESTEPS, "late": PAPER_TIMESTEPS[-13:],
}  # fmt: skip


def uncertainty_maps(scenes: Scenes, samples: torch.Tensor, sigma2: torch.Tensor | None, timesteps: list[int]) -> dict:
    """The maps that the outcome of `sampled` allows: {name: Map}."""
    steps, members = len(timesteps), len(samples)
    maps = {"SAR brightness": Map(scenes.sar[:, :1] + 1, 0, None)}
    if members > 1:
        maps[f"spread of {members} samples"] = Map(samples.std(0).mean(1, keepdim=True), members * steps, 1.0)
    if sigma2 is None:
        return maps
    for name, wanted in READ.items():
        maps[f"σ² {name}"] = Map(weighted_mean(sigma2[0], variance_weights(wanted, timesteps)), steps, 0.5)
    maps["σ² first step"] = Map(sigma2[0, 0], 1, 0.5)
    if members > 1:
        maps[f"σ² first step, {members} noises"] = Map(sigma2[:, 0].mean(0), members, 0.5)
    return maps


def at_pixels(score: torch.Tensor, scenes: Scenes) -> np.ndarray:
    """A map [N, 1, h, w] of latent cells or pixels => [N, H, W] float64, bilinear."""
    return interpolate(score.float().cpu(), scenes.sar.shape[-2:], mode="bilinear", align_corners=False)[:, 0].double().numpy()


def to_distinguish(scenes: Scenes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (what should score high, what should score low)}, masks [N, H, W]; a pair with an empty side is left out.

    `movable`: ships and vehicles in the SAR against permanent structures; the others: pixels of discrepant objects against all
    pixels without a discrepancy.
    """
    movable, permanent, sar_only, eo_only = (scenes.masks[name] for name in ("movable", "permanent", "sar_only", "eo_only"))
    clean = ~scenes.discrepant
    pairs = {
        "movable": (movable & ~permanent, permanent & ~movable),
        "sar_only": (sar_only, clean), "eo_only": (eo_only, clean), "all": (~clean, clean),
    }  # fmt: skip
    return {name: masks for name, masks in pairs.items() if masks[0].any() and masks[1].any()}


def found(score: np.ndarray, scenes: Scenes) -> dict[str, float]:
    """AUROC and average precision of a score [N, H, W], all pixels pooled: {"auroc_movable": ..., "ap_movable": ..., ...}."""
    measures, pairs = {"auroc": auroc, "ap": average_precision}, to_distinguish(scenes).items()
    return {f"{measure}_{name}": of(score, *masks) for measure, of in measures.items() for name, masks in pairs}


def map_measures(map_: Map, score: np.ndarray, error: np.ndarray, scenes: Scenes) -> dict[str, float]:
    """A map at the pixels [N, H, W] against the error |generated - eo|, mean over RGB, in 8-bit units, and the discrepancies.

    ENCE is that of 20 bins of equally many pixels, after one global scale that makes the mean squares of both equal, since no
    map but the spread is in units of the error.
    """
    numbers = {"passes": map_.passes, **found(score, scenes), "spearman": spearman(score, error), "ause": ause(score, error)}
    if map_.power is not None:
        predicted = score**map_.power
        predicted *= np.sqrt((error**2).mean() / (predicted**2).mean())
        numbers["ence"] = ence(*reliability(predicted, error, 2))
    return numbers


# -------------------------------------------------------------------------------------------------------------------- the model
class Recorder:
    """Stands in for a U-Net and keeps the σ² [B, 1, h, w] of every pass, so that one sampling serves every readout."""

    def __init__(self, unet):
        self.unet, self.dtype, self.sigma2 = unet, unet.dtype, []

    def __call__(self, latents: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor):
        output = self.unet(latents, timestep, encoder_hidden_states=encoder_hidden_states)
        channels = latents.shape[1] // 2
        if output.sample.shape[1] > channels:
            self.sigma2.append(variance(output.sample[:, channels:]))
        return output


def sampled(model: Model, scenes: Scenes, steps: int, samples: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Translations [samples, N, 3, H, W], and σ² [samples, steps, N, 1, h, w] of every step, None from stage 1."""
    pictures, sigma2 = [], []
    for sar in scenes.sar.contiguous().to(model.prompt_embedding.device).split(BATCH_SIZE):  # networks round by the layout
        recorder, made = Recorder(model.unet), []
        for seed in range(samples):
            noise = image_noise(model.vae, seed, to_uint8(sar))
            eo, _ = translate(recorder, model.vae, model.scheduler, sar, noise, model.prompt_embedding, steps)
            made.append(eo.cpu())
        pictures.append(torch.stack(made))
        if recorder.sigma2:
            sigma2.append(torch.stack(recorder.sigma2).cpu().unflatten(0, (samples, steps)))
    return torch.cat(pictures, 1), torch.cat(sigma2, 2) if sigma2 else None


def residuals(model: Model, sar: torch.Tensor, eo: torch.Tensor, **options) -> torch.Tensor:
    """The audit's map of pairs [N, 3, H, W] => [N, 1, h, w]; options of residual_map."""
    batches = zip(*(pixels.to(model.prompt_embedding.device).split(BATCH_SIZE) for pixels in (sar, eo)), strict=True)
    unet, vae, scheduler, prompt = model
    return torch.cat([residual_map(unet, vae, scheduler, *batch, prompt, **options).cpu() for batch in batches])


def evaluate(model: Model, scenes: Scenes, size, samples: int, thorough: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """=> (numbers for the tables, maps [N, H, W] and pictures [N, 3, H, W] for the figure).

    `size`: discrepancy.Size; `samples`: translations per scene, of which the first is evaluated.
    """
    pictures, sigma2 = sampled(model, scenes, size.steps, samples)
    generated, timesteps = pictures[0], model.scheduler.timesteps.tolist()
    error = (generated - scenes.eo).abs().mean(1).double().numpy() * 127.5  # [N,H,W]
    maps = uncertainty_maps(scenes, pictures, sigma2, timesteps)
    scores = {name: at_pixels(map_.values, scenes) for name, map_ in maps.items()}
    audit = residuals(model, scenes.sar, scenes.eo, timesteps=size.audit_timesteps, draws=size.audit_draws)
    scores["audit"] = at_pixels(audit, scenes)
    numbers = {
        "picture": picture_measures(generated, scenes),
        "maps": {name: map_measures(map_, scores[name], error, scenes) for name, map_ in maps.items()},
        "audit": found(scores["audit"], scenes),
    }
    if thorough and sigma2 is not None:
        pairs = to_distinguish(scenes)
        numbers["by_timestep"] = {
            str(timestep): {f"auroc_{name}": auroc(at_pixels(at_step, scenes), *masks) for name, masks in pairs.items()}
            for timestep, at_step in zip(timesteps, sigma2[0], strict=True)
        }
    if samples > 1:
        numbers["picture_of_mean"] = picture_measures(pictures.mean(0), scenes)
    return numbers, {**scores, "generated": generated.numpy()}
