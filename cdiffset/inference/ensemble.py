"""Several translations of one image: their mean or median, and how far they lie apart."""

from collections.abc import Sequence

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel

from cdiffset.config import MIDPOINT
from cdiffset.diffusion import translate


@torch.no_grad()
def ensemble(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler,  # of model.make_sampler
    sar: torch.Tensor,  # [B,3,H,W] in [-1,1], H and W multiples of f
    noise: torch.Tensor,  # [N,B,C,h,w], one for each member and image
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
    variance_timesteps: Sequence[int] = (MIDPOINT,),  # as for `diffusion.sample`
    batch_size: int | None = None,  # samples computed together [B]
):
    """N translations of every image => (samples [N, B, 3, H, W] in [-1, 1], σ², spread [B, 1, H, W]), float32.

    Member k is what `translate` makes from noise[k]. σ² is the members' mean, or None from a stage 1 U-Net. The spread is the
    per-pixel standard deviation of the samples (N - 1 in the denominator), mean over RGB, in 8-bit units; None if N = 1.
    """
    members, together = noise.shape[:2], batch_size or len(sar)  # (N, B)
    images = sar.repeat(len(noise), 1, 1, 1)  # [NB,3,H,W], one member after the other
    batches = zip(images.split(together), noise.flatten(0, 1).split(together), strict=True)
    parts = [
        translate(unet, vae, scheduler, *batch, prompt_embedding, num_inference_steps, variance_timesteps) for batch in batches
    ]
    samples = torch.cat([eo for eo, _ in parts]).unflatten(0, members)
    sigma2 = None if parts[0][1] is None else torch.cat([each for _, each in parts]).unflatten(0, members).mean(0)
    spread = samples.std(0).mean(1, keepdim=True) * 127.5 if len(noise) > 1 else None
    return samples, sigma2, spread


def reduce_samples(samples: torch.Tensor, output: str) -> torch.Tensor:
    """[N, ...] => [...]: one of ENSEMBLE_OUTPUTS, the first sample or the mean or median of all, pixel by pixel."""
    if output == "first":
        return samples[0]
    if output == "mean":
        return samples.mean(0)
    last = len(samples) - 1  # torch.median takes the lower of the two in the middle
    return samples.sort(0).values[last // 2 : last // 2 + 1 + last % 2].mean(0)
