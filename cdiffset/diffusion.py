"""The diffusion step and the one sampler, shared by training, validation and translation. Shapes as in `model.py`."""

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from cdiffset.losses import cdiff_loss, mse_loss, variance
from cdiffset.model import decode, encode


def predict(unet, z_sar: torch.Tensor, z_t: torch.Tensor, timesteps: torch.Tensor, prompt_embedding: torch.Tensor):
    """One U-Net pass: latents [B, C, h, w] twice, timesteps [B] or scalar, prompt [1, L, D] => (prediction [B, C, h, w],
    raw variance [B, 1, h, w], or None from a stage 1 U-Net).

    The only place that knows the order of the channels: SAR first on the way in, the variance last on the way out.
    """
    channels = z_t.shape[1]
    prompt = prompt_embedding.expand(len(z_t), -1, -1)  # [B,L,D]
    output = unet(torch.cat([z_sar, z_t], dim=1), timesteps, encoder_hidden_states=prompt).sample  # [B,C or C+1,h,w]
    return output[:, :channels], (output[:, channels:] if output.shape[1] > channels else None)


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
    """The loss of one batch => (scalar, mean σ² of each sample [B] or None): MSE in stage 1, C-Diff in stage 2.

    A U-Net with a variance channel trains by the C-Diff loss, one without by the MSE.
    """
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


def starting_noise(seed: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """The noise [1, C, h, w] that the translation of an image starts from: a function of the seed and the size alone."""
    return torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(seed))


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler: DDIMScheduler,
    z_sar: torch.Tensor,  # [B,C,h,w]
    noise: torch.Tensor,  # [B,C,h,w]
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
):
    """DDIM (η = 0) from noise to the EO latent => (z_eo [B, C, h, w], σ² [B, 1, h, w] or None from a stage 1 U-Net).

    σ² is read at the midpoint of the loop, at step index n // 2 of n, as the paper does for its confidence map.
    """
    scheduler.set_timesteps(num_inference_steps, device=z_sar.device)
    z_sar, prompt_embedding = z_sar.to(unet.dtype), prompt_embedding.to(unet.dtype)
    z_t, sigma2 = noise.float() * scheduler.init_noise_sigma, None  # float32 between the steps whatever the U-Net computes in
    for index, timestep in enumerate(scheduler.timesteps):
        prediction, raw = predict(unet, z_sar, z_t.to(unet.dtype), timestep, prompt_embedding)
        if raw is not None and index == num_inference_steps // 2:
            sigma2 = variance(raw)
        z_t = scheduler.step(prediction.float(), timestep, z_t).prev_sample
    return z_t, sigma2


@torch.no_grad()
def translate(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler: DDIMScheduler,
    sar: torch.Tensor,  # [B,3,H,W] in [-1,1], H and W multiples of f
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
    seed: int,
):
    """SAR images => (EO images [B, 3, H, W] in [-1, 1], σ² [B, 1, h, w] or None), float32.

    Every image starts from the same noise for its size, so that a result depends on the image, the seed and the settings,
    never on the batch it came in.
    """
    z_sar = encode(vae, sar)
    noise = starting_noise(seed, tuple(z_sar.shape[1:])).to(z_sar.device).expand_as(z_sar)
    z_eo, sigma2 = sample(unet, scheduler, z_sar, noise, prompt_embedding, num_inference_steps)
    return decode(vae, z_eo), sigma2
