"""What changed between the SAR and the EO of a pair: re-noise the true EO latent, predict, and see what contradicts the SAR.

Nothing is sampled: the residual between the U-Net's prediction and its target is large where the EO does not follow from the
SAR. Shapes as in `model.py`.
"""

import numpy as np
import torch
from scipy import ndimage

from cdiffset.losses import target_of
from cdiffset.pipeline import encode, predict, variance

# Measured by benchmarks/audit.py: the more noise, the less of the EO is left to copy from, and the more the SAR has to explain.
# The residual is not divided by σ²: that costs discrimination, since the model is least certain where objects come and go.
TIMESTEPS, DRAWS = (950,), 4
LOCAL_QUANTILE = 0.99


@torch.no_grad()
def residual_map(
    unet,
    vae,
    scheduler,
    sar: torch.Tensor,  # [B,3,H,W] in [-1,1], H and W multiples of f
    eo: torch.Tensor,  # [B,3,H,W] in [-1,1]
    prompt_embedding: torch.Tensor,  # [1,L,D]
    timesteps: tuple[int, ...] = TIMESTEPS,  # each 0 ... 999
    draws: int = DRAWS,  # of noise, per timestep
    seed: int = 0,
) -> torch.Tensor:
    """Pairs => squared residual [B, 1, h, w], float32, at least 0: mean over latent channels, timesteps and noise draws.

    The noise is a function of the seed and the latent's size alone, so a result depends on the pair, the seed and the
    settings, never on the batch it came in. ValueError without a timestep or a draw.
    """
    if not timesteps or draws < 1:
        raise ValueError(f"expected at least one timestep and one draw, got {timesteps} and {draws}")
    z_sar, z_eo = encode(vae, sar), encode(vae, eo)
    generator = torch.Generator("cpu").manual_seed(seed)
    total = torch.zeros_like(z_eo[:, :1])
    for timestep in timesteps:
        for _ in range(draws):
            noise = torch.randn(1, *z_eo.shape[1:], generator=generator).to(z_eo.device)
            total += squared_residual(unet, scheduler, z_sar, z_eo, noise, timestep, prompt_embedding)[0]
    return total / (len(timesteps) * draws)


@torch.no_grad()
def squared_residual(unet, scheduler, z_sar, z_eo, noise, timestep: int, prompt_embedding):
    """One U-Net pass over latents [B, C, h, w] with noise [1, C, h, w] => (squared residual, mean over C [B, 1, h, w];
    σ² [B, 1, h, w], or None from a stage 1 U-Net), float32.
    """
    noise, timesteps = noise.expand_as(z_eo), torch.full((len(z_eo),), timestep, device=z_eo.device)
    z_t = scheduler.add_noise(z_eo, noise, timesteps)
    dtype = unet.dtype
    prediction, raw = predict(unet, z_sar.to(dtype), z_t.to(dtype), timesteps, prompt_embedding.to(dtype))
    residual = target_of(scheduler, z_eo, noise, timesteps) - prediction.float()  # [B,C,h,w]
    return residual.square().mean(1, keepdim=True), None if raw is None else variance(raw)


def upsampled(residual: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Map [B, 1, h, w] => [B, 1, H, W], bilinear: it stays within the map's range."""
    return torch.nn.functional.interpolate(residual, size, mode="bilinear", align_corners=False)


def scores_of(residual: np.ndarray) -> tuple[float, float]:
    """Map, of any shape => (mean, 99th percentile): the first ranks mismatched and shifted pairs, the second local changes."""
    return float(residual.mean(dtype=np.float64)), float(np.quantile(residual, LOCAL_QUANTILE))


def strongest_boxes(residual: np.ndarray, threshold: float, most: int) -> list[tuple[int, int, int, int]]:
    """Map [H, W], NaN where nothing is known => boxes (x0, y0, x1, y1) in px, x1 and y1 exclusive, of its connected regions
    above `threshold`.

    The strongest come first and no more than `most`; a region is as strong as its excess over the threshold, summed.
    """
    labels, count = ndimage.label(residual > threshold, structure=np.ones((3, 3)))
    if not count:
        return []
    strengths = ndimage.sum_labels(np.nan_to_num(residual) - threshold, labels, np.arange(1, count + 1))
    regions = ndimage.find_objects(labels)
    order = np.argsort(-strengths, kind="stable")[:most]
    return [(columns.start, rows.start, columns.stop, rows.stop) for rows, columns in (regions[k] for k in order)]
