"""The losses of both stages. Everything here but the U-Net's pass is computed in float32 whatever the autocast type."""

import math

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from cdiffset.pipeline import predict, variance


def mse_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Stage 1: mean squared error of two [B, C, h, w] tensors => scalar, float32."""
    return F.mse_loss(prediction.float(), target.float())


def cdiff_loss(prediction: torch.Tensor, target: torch.Tensor, sigma2: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Stage 2, the C-Diff loss: β-NLL (Seitzer et al., 2022) with one variance shared by the channels of a latent cell.

    L = mean over (B, C, h, w) of sg[σ²]^β · ½ · ((target - prediction)² / σ² + log σ² + log 2π), sg = stop-gradient.

    prediction, target [B, C, h, w]; sigma2 [B, 1, h, w], from `variance`; beta [B] in 0 ... 1 (0: the Gaussian NLL,
    1: the MSE's gradient for the mean) => scalar, float32.
    """
    squared_error = (target.float() - prediction.float()) ** 2  # [B,C,h,w]
    sigma2 = sigma2.float()  # [B,1,h,w]
    nll = 0.5 * (squared_error / sigma2 + sigma2.log() + math.log(2 * math.pi))  # [B,C,h,w]
    weight = sigma2.detach() ** beta.float()[:, None, None, None]  # [B,1,h,w]
    return (weight * nll).mean()


def target_of(scheduler: DDIMScheduler, z_eo: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor) -> torch.Tensor:
    """What the U-Net is to predict under the scheduler's prediction type, [B, C, h, w]."""
    match scheduler.config.prediction_type:
        case "epsilon":
            return noise
        case "sample":
            return z_eo
        case "v_prediction":
            return scheduler.get_velocity(z_eo, noise, timesteps)
        case other:
            raise ValueError(f"unknown prediction type {other!r}")


def training_loss(
    unet,
    scheduler: DDIMScheduler,
    z_sar: torch.Tensor,  # [B,C,h,w]
    z_eo: torch.Tensor,  # [B,C,h,w]
    noise: torch.Tensor,  # [B,C,h,w], standard normal
    timesteps: torch.Tensor,  # [B], 0 ... 999
    prompt_embedding: torch.Tensor,  # [1,L,D]
    beta: str | float,  # "timestep": β = sqrt(ᾱ_t), or a constant 0 ... 1
):
    """The loss of one batch => (scalar, mean σ² of each sample [B] or None): C-Diff with a variance channel, else the MSE."""
    z_t = scheduler.add_noise(z_eo, noise, timesteps)  # [B,C,h,w]
    prediction, raw = predict(unet, z_sar, z_t, timesteps, prompt_embedding)
    target = target_of(scheduler, z_eo, noise, timesteps)
    if raw is None:
        return mse_loss(prediction, target), None
    sigma2 = variance(raw)  # [B,1,h,w]
    if beta == "timestep":
        exponent = scheduler.alphas_cumprod.to(timesteps.device)[timesteps].sqrt()  # [B]
    else:
        exponent = torch.full(timesteps.shape, float(beta), device=timesteps.device)
    return cdiff_loss(prediction, target, sigma2, exponent), sigma2.detach().mean(dim=(1, 2, 3))
