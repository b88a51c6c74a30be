"""What changed between the SAR and the EO of a pair: re-noise the true EO latent, predict, and see where the model is contradicted.

Nothing is sampled: the residual between the U-Net's prediction and its target is large where the EO does not follow from the
SAR. Shapes as in `model.py`.
"""

import torch

from cdiffset.diffusion import predict, target_of
from cdiffset.losses import variance
from cdiffset.model import encode

TIMESTEPS, DRAWS, STANDARDISE = (750,), 4, False


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
    standardise: bool = STANDARDISE,  # True: divide by σ², which takes a U-Net of stage 2
) -> torch.Tensor:
    """Pairs => squared residual [B, 1, h, w], float32, at least 0: mean over latent channels, timesteps and noise draws.

    The noise is a function of the seed and the latent's size alone, so a result depends on the pair, the seed and the
    settings, never on the batch it came in. ValueError without a timestep or a draw, or where there is no σ² to divide by.
    """
    if not timesteps or draws < 1:
        raise ValueError(f"expected at least one timestep and one draw, got {timesteps} and {draws}")
    z_sar, z_eo = encode(vae, sar), encode(vae, eo)
    generator = torch.Generator("cpu").manual_seed(seed)
    total = torch.zeros_like(z_eo[:, :1])
    for timestep in timesteps:
        for _ in range(draws):
            noise = torch.randn(1, *z_eo.shape[1:], generator=generator).to(z_eo.device)
            squared, sigma2 = squared_residual(unet, scheduler, z_sar, z_eo, noise, timestep, prompt_embedding)
            if standardise and sigma2 is None:
                raise ValueError("a U-Net of stage 1 predicts no variance to standardise by")
            total += squared / sigma2 if standardise else squared
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
