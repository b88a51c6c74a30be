"""The diffusion step and the one sampler, shared by training, validation and translation. Shapes as in `model.py`."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from cdiffset.config import MIDPOINT
from cdiffset.losses import cdiff_loss, mse_loss, variance
from cdiffset.model import decode, encode, vae_factor


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


def image_seed(seed: int, pixels: np.ndarray) -> int:
    """Generator seed of one image [H, W, 3] in 0-255, before padding: a 63-bit hash of the run's seed and the pixels.

    Images of one size must not share their noise: it shapes the layout, so all pictures would show the same one.
    """
    digest = hashlib.sha256(str(seed).encode("ascii") + b"\0")
    digest.update(np.ascontiguousarray(pixels, "<f4"))
    return int.from_bytes(digest.digest()[:8], "big") >> 1


def starting_noise(generator_seed: int, shape: tuple[int, int, int]) -> torch.Tensor:
    """Standard normal noise [1, C, h, w] of a CPU generator: a function of its seed and the size alone."""
    return torch.randn(1, *shape, generator=torch.Generator("cpu").manual_seed(generator_seed))


def image_noise(vae: AutoencoderKL, seed: int, images: Sequence[np.ndarray]) -> torch.Tensor:
    """The noise [B, C, h, w], on the CPU, that images [H, W, 3] in 0-255 start from, each by its `image_seed`.

    The images may differ in size where they have one size once padded to multiples of f.
    """
    factor, channels = vae_factor(vae), vae.config.latent_channels
    shapes = [(channels, -(-pixels.shape[0] // factor), -(-pixels.shape[1] // factor)) for pixels in images]
    return torch.cat([starting_noise(image_seed(seed, pixels), shape) for pixels, shape in zip(images, shapes, strict=True)])


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler,  # of model.make_sampler or load_scheduler
    z_sar: torch.Tensor,  # [B,C,h,w]
    noise: torch.Tensor,  # [B,C,h,w]
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
    variance_timesteps: Sequence[int] = (MIDPOINT,),  # σ² is the mean of that at these timesteps
):
    """From noise to the EO latent => (z_eo [B, C, h, w], σ² [B, 1, h, w] or None from a stage 1 U-Net).

    The paper samples by DDIM (η = 0) in n = 50 steps and reads σ² for its confidence map at step index n // 2 of the loop. Here
    it is read at the timestep of that step, however many steps there are.
    """
    # On the CPU, since schedulers look at them, which would wait for a GPU in every step. Forgets earlier samplings, too.
    scheduler.set_timesteps(num_inference_steps)
    weights, read = variance_weights(variance_timesteps, scheduler.timesteps.tolist()), {}
    timesteps = scheduler.timesteps.to(z_sar.device)
    z_sar, prompt_embedding = z_sar.to(unet.dtype), prompt_embedding.to(unet.dtype)
    z_t = noise.float() * scheduler.init_noise_sigma  # float32 between the steps whatever the U-Net computes in
    for index, timestep in enumerate(scheduler.timesteps):
        prediction, raw = predict(unet, z_sar, z_t.to(unet.dtype), timesteps[index], prompt_embedding)
        if raw is not None and index in weights:
            read[index] = variance(raw)
        z_t = scheduler.step(prediction.float(), timestep, z_t).prev_sample
    return z_t, weighted_mean(read, weights) if read else None


def variance_weights(wanted: Sequence[int], timesteps: Sequence[int]) -> dict[int, float]:
    """Timesteps whose σ² is wanted, falling timesteps of a sampling => {index of a step: weight of its σ², above 0}.

    σ² at a timestep that the sampling leaves out is interpolated linearly between the two steps beside it.
    """
    rising = timesteps[::-1]
    weights = [float(np.interp(wanted, rising, step[::-1]).sum()) for step in np.eye(len(timesteps))]
    return {index: weight for index, weight in enumerate(weights) if weight > 0}


def weighted_mean(sigma2: Mapping[int, torch.Tensor] | Sequence[torch.Tensor], weights: dict[int, float]) -> torch.Tensor:
    """σ² of steps by their index, and the weights of `variance_weights` => their mean, of one step's shape."""
    return torch.stack([weight * sigma2[index] for index, weight in weights.items()]).sum(0) / sum(weights.values())


@torch.no_grad()
def translate(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler,  # as for `sample`
    sar: torch.Tensor,  # [B,3,H,W] in [-1,1], H and W multiples of f
    noise: torch.Tensor,  # [B,C,h,w], of `image_noise`
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
    variance_timesteps: Sequence[int] = (MIDPOINT,),  # as for `sample`
):
    """SAR images => (EO images [B, 3, H, W] in [-1, 1], σ² [B, 1, h, w] or None from a stage 1 U-Net), float32.

    A result depends on the image, its noise and the settings, never on the batch it came in.
    """
    z_sar = encode(vae, sar)
    noise = noise.to(z_sar.device)
    z_eo, sigma2 = sample(unet, scheduler, z_sar, noise, prompt_embedding, num_inference_steps, variance_timesteps)
    return decode(vae, z_eo), sigma2
