"""What the discrepancy benchmark measures: a trained U-Net against scenes whose every discrepancy is known."""

from dataclasses import dataclass

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler
from scipy.ndimage import sum_labels
from torch.nn.functional import interpolate

from cdiffset.auditing.residual import residual_map
from cdiffset.config import MIDPOINT, PAPER_TIMESTEPS
from cdiffset.diffusion import image_noise, variance_weights, weighted_mean
from cdiffset.evaluation.uncertainty import auroc, ause, average_precision, ence, reliability, spearman
from cdiffset.images import to_signed, to_uint8
from cdiffset.inference.ensemble import ensemble
from cdiffset.losses import variance
from data.simulate import Simulation, simulate_scene
from utils import PairMetrics

SPLITS = {"train": 0, "test": 1}  # as in data/simulate.py
APPEARS = 0.5  # an object appears in a picture that goes at least half of the way from "absent" to "present"


@dataclass(frozen=True)
class Scenes:
    """N scenes with the truth about them. Pictures are float32 [N, 3, H, W] in [-1, 1], masks boolean [N, H, W]."""

    sar: torch.Tensor
    eo: torch.Tensor
    eo_all: torch.Tensor  # the EO with every ship and vehicle
    eo_none: torch.Tensor  # and with none
    masks: dict[str, np.ndarray]  # sar_only, eo_only, movable, permanent
    objects: np.ndarray  # [N, H, W]: 0, or the number of the ship or vehicle, unique over all scenes

    def __len__(self) -> int:
        return len(self.sar)

    @property
    def kinds(self) -> dict[str, np.ndarray]:
        """Numbers of the objects that only the SAR shows, only the EO, or both."""
        alone = {name: np.unique(self.objects[self.masks[name]]) for name in ("sar_only", "eo_only")}
        everything = np.unique(self.objects[self.objects > 0])
        return {**alone, "both": np.setdiff1d(everything, np.concatenate(list(alone.values())))}


def draw_scenes(simulation: Simulation, split: str, indices: range, seed: int) -> Scenes:
    """Scenes of a split, the same as `data/simulate.py --seed` writes."""
    drawn = [simulate_scene(np.random.default_rng([seed, SPLITS[split], index]), simulation) for index in indices]
    stacked = {name: np.stack([scene[name] for scene in drawn]) for name in drawn[0]}
    names = ("sar_only", "eo_only", "movable", "permanent")
    pictures = {name: stacked[name] if stacked[name].ndim == 4 else stacked[name][..., None].repeat(3, -1)
                for name in ("sar", "eo", "eo_all", "eo_none")}  # fmt: skip
    numbers = stacked["objects"].astype(np.int64)
    before = np.concatenate([[0], numbers.max((1, 2)).cumsum()[:-1]])[:, None, None]
    return Scenes(
        **{name: to_signed(torch.from_numpy(pixels).permute(0, 3, 1, 2).float()) for name, pixels in pictures.items()},
        masks={name: stacked[f"mask_{name}"] > 0 for name in names},
        objects=np.where(numbers > 0, numbers + before, 0),
    )


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
    inside = scenes.masks["sar_only"] | scenes.masks["eo_only"]
    regions = {"psnr_inside": inside, "psnr_outside": ~inside}
    drawn = {f"drawn_{kind}": share for kind, share in share_drawn(generated, scenes).items()}
    return {
        "psnr": float(np.mean(values["psnr"])),
        "ssim": float(np.mean(values["ssim"])),
        **{name: float(-10 * np.log10(squared[region].mean())) for name, region in regions.items()},
        **drawn,
    }


# --------------------------------------------------------------------------------------------------------------------- the maps
READ = {  # timesteps over which σ² is averaged
    "midpoint": (MIDPOINT,), "early": PAPER_TIMESTEPS[:13], "mean": PAPER_TIMESTEPS, "late": PAPER_TIMESTEPS[-13:],
}  # fmt: skip


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


def at_pixels(score: torch.Tensor, scenes: Scenes) -> np.ndarray:
    """A map [N, 1, h, w] of latent cells or pixels => [N, H, W] float64, bilinear."""
    return interpolate(score.float().cpu(), scenes.sar.shape[-2:], mode="bilinear", align_corners=False)[:, 0].double().numpy()


def to_tell_apart(scenes: Scenes) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{name: (what should score high, what should score low)}, masks [N, H, W]; a pair with an empty side is left out.

    `movable`: ships and vehicles in the SAR against permanent structures; the others: pixels of discrepant objects against all
    pixels without a discrepancy.
    """
    movable, permanent, sar_only, eo_only = (scenes.masks[name] for name in ("movable", "permanent", "sar_only", "eo_only"))
    clean = ~(sar_only | eo_only)
    pairs = {
        "movable": (movable & ~permanent, permanent & ~movable),
        "sar_only": (sar_only, clean), "eo_only": (eo_only, clean), "all": (~clean, clean),
    }  # fmt: skip
    return {name: masks for name, masks in pairs.items() if masks[0].any() and masks[1].any()}


def found(score: np.ndarray, scenes: Scenes) -> dict[str, float]:
    """AUROC and average precision of a score [N, H, W], all pixels pooled: {"auroc_movable": ..., "ap_movable": ..., ...}."""
    measures = {"auroc": auroc, "ap": average_precision}
    pairs = to_tell_apart(scenes).items()
    return {f"{measure}_{name}": of(score, *masks) for measure, of in measures.items() for name, masks in pairs}


def map_measures(map_: "Map", score: np.ndarray, error: np.ndarray, scenes: Scenes) -> dict[str, float]:
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


@dataclass(frozen=True)
class Map:
    """A map of uncertainty over scenes, of latent cells or pixels."""

    values: torch.Tensor  # [N, 1, h or H, w or W]
    passes: int  # of the U-Net, per scene
    power: float | None  # values ** power grows as an error does; None: it is no estimate of an error


@dataclass(frozen=True)
class Judge:
    """What is needed to use a U-Net, and how it is used."""

    vae: AutoencoderKL
    scheduler: DDIMScheduler
    prompt_embedding: torch.Tensor  # [1,L,D]
    num_inference_steps: int
    batch_size: int
    audit_timesteps: tuple[int, ...]
    audit_draws: int

    def noise(self, seed: int, sar: torch.Tensor) -> torch.Tensor:
        """The starting noise of 8-bit images [B, 3, H, W] in [-1, 1] => [B, C, h, w]."""
        return image_noise(self.vae, seed, to_uint8(sar))

    def batches(self, scenes: Scenes):
        device = self.prompt_embedding.device
        return zip(*(pixels.to(device).split(self.batch_size) for pixels in (scenes.sar, scenes.eo)), strict=True)

    def sampled(self, unet, scenes: Scenes, samples: int) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Translations [samples, N, 3, H, W], and σ² [samples, steps, N, 1, h, w] of every step, None from stage 1."""
        pictures, sigma2 = [], []
        for sar, _ in self.batches(scenes):
            recorder = Recorder(unet)
            noise = torch.stack([self.noise(seed, sar) for seed in range(samples)])
            made, _, _ = ensemble(
                recorder, self.vae, self.scheduler, sar, noise, self.prompt_embedding, self.num_inference_steps
            )
            pictures.append(made.cpu())
            if recorder.sigma2:
                sigma2.append(torch.stack(recorder.sigma2).cpu().unflatten(0, (samples, self.num_inference_steps)))
        return torch.cat(pictures, 1), torch.cat(sigma2, 2) if sigma2 else None

    def audit(self, unet, scenes: Scenes) -> torch.Tensor:
        """Residual of the true pairs [N, 1, h, w]."""
        options = dict(timesteps=self.audit_timesteps, draws=self.audit_draws)
        return torch.cat([
            residual_map(unet, self.vae, self.scheduler, sar, eo, self.prompt_embedding, **options).cpu()
            for sar, eo in self.batches(scenes)
        ])  # fmt: skip

    def uncertainty_maps(self, scenes: Scenes, samples: torch.Tensor, sigma2: torch.Tensor | None) -> dict[str, Map]:
        """The maps that `sampled` allows."""
        steps, members = self.num_inference_steps, len(samples)
        maps = {"SAR brightness": Map(scenes.sar[:, :1] + 1, 0, None)}
        if members > 1:
            maps[f"spread of {members} samples"] = Map(samples.std(0).mean(1, keepdim=True), members * steps, 1.0)
        if sigma2 is None:
            return maps
        for name, wanted in READ.items():
            weights = variance_weights(wanted, self.scheduler.timesteps.tolist())
            maps[f"σ² {name}"] = Map(weighted_mean(sigma2[0], weights), steps, 0.5)
        maps["σ² first step"] = Map(sigma2[0, 0], 1, 0.5)
        if members > 1:
            maps[f"σ² first step, {members} noises"] = Map(sigma2[:, 0].mean(0), members, 0.5)
        return maps


def judge_unet(judge: Judge, unet, scenes: Scenes, samples: int, thorough: bool) -> tuple[dict, dict[str, np.ndarray]]:
    """=> (numbers for the tables, maps [N, H, W] and pictures [N, 3, H, W] for the figure).

    `samples`: translations per scene, of which the first is judged.
    """
    pictures, sigma2 = judge.sampled(unet, scenes, samples)
    generated = pictures[0]
    error = (generated - scenes.eo).abs().mean(1).double().numpy() * 127.5  # [N,H,W]
    maps = judge.uncertainty_maps(scenes, pictures, sigma2)
    scores = {name: at_pixels(map_.values, scenes) for name, map_ in maps.items()}
    audit = at_pixels(judge.audit(unet, scenes), scenes)
    numbers = {
        "picture": picture_measures(generated, scenes),
        "maps": {name: map_measures(map_, scores[name], error, scenes) for name, map_ in maps.items()},
        "audit": found(audit, scenes),
    }
    if thorough and sigma2 is not None:
        pairs = to_tell_apart(scenes)
        numbers["by_timestep"] = {
            str(timestep): {f"auroc_{name}": auroc(at_pixels(at_step, scenes), *masks) for name, masks in pairs.items()}
            for timestep, at_step in zip(judge.scheduler.timesteps.tolist(), sigma2[0], strict=True)
        }
    if samples > 1:
        numbers["picture_of_mean"] = picture_measures(pictures.mean(0), scenes)
    return numbers, {**scores, "audit": audit, "generated": generated.numpy()}
