"""From SAR to EO and confidence: latents, noise, the sampler, σ², its maps, and all of it as a diffusers pipeline.

Training, validation and translation share these functions. The file imports nothing of this project, since export.py copies it
into exported folders, where it needs torch, diffusers, transformers, numpy and Pillow alone:

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    out = pipe(sar_image)

Shapes used everywhere: B images of H x W px; f = the VAE's downsampling factor (8 in SD); h = H / f, w = W / f; C = latent
channels (4 in SD); L prompt tokens of width D. Pixels are RGB in [-1, 1].
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from diffusers.utils import BaseOutput
from PIL import Image, ImageOps

VARIANCE_MIN, VARIANCE_MAX = 1e-6, 10.0
# softplus(RAW_OFFSET) + 1e-6 = 1: a raw variance of 0, where conv_out's new channel starts, means unit variance.
RAW_OFFSET = math.log(math.exp(1 - VARIANCE_MIN) - 1)
MIDPOINT = 481  # timestep in the middle of the paper's 50 DDIM steps

NOISE_SCHEDULE = (
    "num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "rescale_betas_zero_snr",
    "prediction_type", "steps_offset",
)  # fmt: skip
MULTISTEP: dict[str, tuple[type, dict]] = {  # 2nd order, on predictions of the clean latent; the last step ends without noise
    "dpmsolver++": (DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++", "solver_type": "midpoint"}),
    "unipc": (UniPCMultistepScheduler, {"predict_x0": True, "solver_type": "bh2"}),
}
PICTURE_MODES = ("1", "L", "LA", "P", "RGB", "RGBA")  # of Pillow: 8 bits and less
OUTPUT_TYPES = ("pil", "np", "pt")
MAX_STEPS, MAX_FEW_STEPS = 999, 50  # the latter but by DDIM with leading spacing: others may leave their range of timesteps
LEVEL_TOLERANCE = 1e-3  # within which a number times 255 is an 8-bit level; float32 divides by 255 far more closely


# --------------------------------------------------------------------------------------------------- pixels and latents
def vae_factor(vae: AutoencoderKL) -> int:
    """f: how many pixels a latent cell spans in each direction."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: AutoencoderKL, pixels: torch.Tensor) -> torch.Tensor:
    """Pixels [B, 3, H, W] in [-1, 1] => latents [B, C, h, w], float32: the posterior's mean times the scaling factor."""
    return (vae.encode(pixels.to(vae.dtype)).latent_dist.mean * vae.config.scaling_factor).float()


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] => pixels [B, 3, H, W] in [-1, 1], float32."""
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype)).sample.float().clamp(-1, 1)


def to_uint8(signed: torch.Tensor) -> np.ndarray:
    """[..., 3, H, W] in [-1, 1] => uint8 array [..., H, W, 3], rounded; values outside are clipped."""
    pixels = ((signed.detach().float() + 1) * 127.5).round().clamp(0, 255).byte()
    return pixels.movedim(-3, -1).cpu().numpy()


def pad_to_multiple(pixels: np.ndarray, factor: int) -> np.ndarray:
    """[H, W, 3] => [H', W', 3] with sides that are multiples of `factor`, continued by reflection below and to the right."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="reflect")


def stack_padded(images: Sequence[np.ndarray], factor: int) -> torch.Tensor:
    """Images [H, W, 3] in 0-255, of one size once padded => [B, 3, H', W'] in [-1, 1] with sides that are multiples of it."""
    padded = np.stack([pad_to_multiple(pixels, factor) for pixels in images])  # [B,H',W',3]
    return torch.from_numpy(padded).permute(0, 3, 1, 2) / 127.5 - 1


# -------------------------------------------------------------------------------------------------------------- one pass
def variance(raw: torch.Tensor) -> torch.Tensor:
    """Raw variance channel v, any shape and range => σ² in [1e-6, 10], float32 (C-DiffSET, section on the C-Diff loss).

    σ² = clamp(softplus(v + c) + 1e-6, 1e-6, 10) with c = log(exp(1 - 1e-6) - 1), so that σ² = 1 at v = 0.
    """
    return (F.softplus(raw.float() + RAW_OFFSET) + VARIANCE_MIN).clamp(VARIANCE_MIN, VARIANCE_MAX)


def predict(unet, z_sar: torch.Tensor, z_t: torch.Tensor, timesteps: torch.Tensor, prompt_embedding: torch.Tensor):
    """One U-Net pass: latents [B, C, h, w] twice, timesteps [B] or scalar, prompt [1, L, D] => (prediction [B, C, h, w],
    raw variance [B, 1, h, w], or None from a stage 1 U-Net).

    The only place that knows the order of the channels: SAR first on the way in, the variance last on the way out.
    """
    channels = z_t.shape[1]
    prompt = prompt_embedding.expand(len(z_t), -1, -1)  # [B,L,D]
    output = unet(torch.cat([z_sar, z_t], dim=1), timesteps, encoder_hidden_states=prompt).sample  # [B,C or C+1,h,w]
    return output[:, :channels], (output[:, channels:] if output.shape[1] > channels else None)


# --------------------------------------------------------------------------------------------------------------- noise
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


# -------------------------------------------------------------------------------------------------------------- sampling
def encode_prompt(tokenizer, text_encoder, prompt: str, device: torch.device | str = "cpu") -> torch.Tensor:
    """Text => [1, L, D], tokenised without padding."""
    length = {"padding": "do_not_pad", "truncation": True, "max_length": text_encoder.config.max_position_embeddings}
    tokens = tokenizer(prompt, return_tensors="pt", **length)
    with torch.no_grad():
        return text_encoder(tokens.input_ids.to(device))[0]


def make_sampler(ddim: DDIMScheduler, scheduler: str = "ddim", timestep_spacing: str = "leading"):
    """ "ddim" or one of MULTISTEP, a new object, on the noise schedule and prediction type of `ddim`.

    Sources: DDIM, Song et al. (ICLR 2021); DPM-Solver++(2M), Lu et al. (2022); UniPC, Zhao et al. (NeurIPS 2023); the two
    spacings are those of Table 2 of Lin et al. (WACV 2024).
    """
    if scheduler == "ddim":
        return DDIMScheduler.from_config(ddim.config, timestep_spacing=timestep_spacing)
    solver, settings = MULTISTEP[scheduler]
    kept = {name: ddim.config[name] for name in NOISE_SCHEDULE}  # not what a base's own scheduler may say of sampling
    ours = {"solver_order": 2, "lower_order_final": True, "final_sigmas_type": "zero", "timestep_spacing": timestep_spacing}
    return solver(**kept, **settings, **ours)


@torch.no_grad()
def sample(
    unet: UNet2DConditionModel,
    scheduler,  # of make_sampler
    z_sar: torch.Tensor,  # [B,C,h,w]
    noise: torch.Tensor,  # [B,C,h,w]
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
    variance_timesteps: Sequence[int] = (MIDPOINT,),  # σ² is the mean of that at these timesteps
    after_step: Callable[[], None] | None = None,
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
        if after_step:
            after_step()
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
    after_step: Callable[[], None] | None = None,
):
    """SAR images => (EO images [B, 3, H, W] in [-1, 1], σ² [B, 1, h, w] or None from a stage 1 U-Net), float32.

    A result depends on the image, its noise and the settings, never on the batch it came in.
    """
    z_sar = encode(vae, sar)
    noise = noise.to(z_sar.device)
    z_eo, sigma2 = sample(unet, scheduler, z_sar, noise, prompt_embedding, num_inference_steps, variance_timesteps, after_step)
    return decode(vae, z_eo), sigma2


@torch.no_grad()
def ensemble(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler,  # of make_sampler
    sar: torch.Tensor,  # [B,3,H,W] in [-1,1], H and W multiples of f
    noise: torch.Tensor,  # [N,B,C,h,w], one for each member and image
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
    variance_timesteps: Sequence[int] = (MIDPOINT,),  # as for `sample`
    batch_size: int | None = None,  # samples computed together [B]
    after_step: Callable[[], None] | None = None,
):
    """N translations of every image => (samples [N, B, 3, H, W] in [-1, 1], σ², spread [B, 1, H, W]), float32.

    Member k is what `translate` makes from noise[k]. σ² is the members' mean, or None from a stage 1 U-Net. The spread is the
    per-pixel standard deviation of the samples (N - 1 in the denominator), mean over RGB, in 8-bit units; None if N = 1.
    """
    members, together = noise.shape[:2], batch_size or len(sar)  # (N, B)
    images = sar.repeat(len(noise), 1, 1, 1)  # [NB,3,H,W], one member after the other
    batches = zip(images.split(together), noise.flatten(0, 1).split(together), strict=True)
    parts = [
        translate(unet, vae, scheduler, *batch, prompt_embedding, num_inference_steps, variance_timesteps, after_step)
        for batch in batches
    ]
    samples = torch.cat([eo for eo, _ in parts]).unflatten(0, members)
    sigma2 = None if parts[0][1] is None else torch.cat([each for _, each in parts]).unflatten(0, members).mean(0)
    spread = samples.std(0).mean(1, keepdim=True) * 127.5 if len(noise) > 1 else None
    return samples, sigma2, spread


def reduce_samples(samples: torch.Tensor, output: str) -> torch.Tensor:
    """[N, ...] => [...]: by the name of `output` the first sample, or the mean or median of all, pixel by pixel."""
    if output == "first":
        return samples[0]
    if output == "mean":
        return samples.mean(0)
    last = len(samples) - 1  # torch.median takes the lower of the two in the middle
    return samples.sort(0).values[last // 2 : last // 2 + 1 + last % 2].mean(0)


# ----------------------------------------------------------------------------------------------------------------- maps
def confidence_map(variance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """σ² [B, 1, h, w], above 0, of the latent => confidence [B, 1, H, W] in [0, 1] at the image's size (H, W), float32.

    1/σ², min-max normalised per image, then upsampled bicubically and clamped (bicubic interpolation overshoots). The scale
    is each image's own, so confidences of different images do not compare. A constant σ² is 1 everywhere: nothing in the image
    is less certain than the rest. C-DiffSET, "confidence map".
    """
    if variance.ndim != 4 or variance.shape[1] != 1 or not bool(((variance > 0) & variance.isfinite()).all()):
        raise ValueError(f"variance must be finite, above 0 and of shape [B, 1, h, w], got shape {list(variance.shape)}")
    confidence = 1 / variance.float()  # [B, 1, h, w]
    low, high = confidence.aminmax(dim=3, keepdim=True)
    low, high = low.amin(2, keepdim=True), high.amax(2, keepdim=True)  # [B, 1, 1, 1]
    span = high - low
    confidence = torch.where(span > 0, (confidence - low) / span.clamp(min=torch.finfo(span.dtype).tiny), 1.0)
    return F.interpolate(confidence, size, mode="bicubic", align_corners=False).clamp(0, 1)


def variance_map(variance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """σ² [B, 1, h, w] of the latent => [B, 1, H, W] at the image's size (H, W), float32, on the latent's own scale.

    Bicubic like the confidence map, kept within each image's range of σ² (bicubic interpolation overshoots).
    """
    low, high = variance.float().flatten(1).aminmax(dim=1)  # [B] each
    upsampled = F.interpolate(variance.float(), size, mode="bicubic", align_corners=False)
    return torch.clamp(upsampled, low[:, None, None, None], high[:, None, None, None])


def expected_error(calibration: Mapping[str, Any], maps: Mapping[str, np.ndarray]) -> np.ndarray:
    """Maps of one shape, by name => expected error in 8-bit units, float64 of that shape.

    `calibration`: "curves" {map: {"x", "y"}}, each straight between its knots and constant beyond them; of two maps also
    "spread_weight" and the curve "joint", which corrects their join.
    """
    errors = [np.interp(maps[name], curve["x"], curve["y"]) for name, curve in calibration["curves"].items()]
    joined, joint = combine(errors, calibration["spread_weight"]), calibration["joint"]
    return joined if joint is None else np.interp(joined, joint["x"], joint["y"])


def combine(errors: list[np.ndarray], spread_weight: float | None) -> np.ndarray:
    """The expected errors by one map, or by variance and spread => one expected error."""
    return errors[0] if spread_weight is None else errors[0] ** (1 - spread_weight) * errors[1] ** spread_weight


# ---------------------------------------------------------------------------------------------------- images in, images out
@dataclass(frozen=True)
class Translation:
    """What becomes of one SAR image, in its own size [H, W]."""

    pixels: torch.Tensor  # the EO image, float32 [3, H, W] in [-1, 1], on the CPU like the rest
    variance: np.ndarray | None  # σ², float32 [H, W]; None from a stage 1 checkpoint
    certainty: np.ndarray | None  # the confidence map, float32 [H, W] in 0-1; None from a stage 1 checkpoint
    spread: np.ndarray | None  # standard deviation over the samples in 8-bit units, float32 [H, W]; None of one sample

    @property
    def eo(self) -> np.ndarray:
        """uint8 [H, W, 3]."""
        return to_uint8(self.pixels)

    @property
    def confidence(self) -> np.ndarray | None:
        """uint8 [H, W], on the image's own scale."""
        return None if self.certainty is None else (self.certainty * np.float32(255)).round().astype(np.uint8)

    @property
    def uncertainties(self) -> dict[str, np.ndarray]:
        """The maps that there are, by name."""
        return {name: getattr(self, name) for name in ("variance", "spread") if getattr(self, name) is not None}


def translate_images(
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    scheduler,  # of make_sampler
    images: Sequence[np.ndarray],  # SAR, float32 [H, W, 3] in 0-255, of one size once padded
    noise: torch.Tensor,  # [N,B,C,h,w], one for each sample and image
    prompt_embedding: torch.Tensor,  # [1,L,D]
    num_inference_steps: int,
    variance_timesteps: Sequence[int],
    output: str,  # which picture N samples give: first, mean or median
    batch_size: int | None = None,  # samples computed together [B]
    after_step: Callable[[], None] | None = None,
) -> list[Translation]:
    """SAR images to translations, by `ensemble`. FloatingPointError where half precision did not suffice."""
    sar = stack_padded(images, vae_factor(vae)).to(prompt_embedding.device)
    samples, sigma2, spread = ensemble(
        unet, vae, scheduler, sar, noise, prompt_embedding, num_inference_steps, variance_timesteps, batch_size, after_step
    )
    if not samples.isfinite().all():
        raise FloatingPointError("the translation is not finite: this precision does not suit the checkpoint")
    size, pictures = (sar.shape[-2], sar.shape[-1]), reduce_samples(samples, output).cpu()  # [B,3,H',W']
    maps = [None, None, spread]
    if sigma2 is not None:
        maps[:2] = variance_map(sigma2, size), confidence_map(sigma2.cpu(), size)
    maps = [None if each is None else each[:, 0].cpu().numpy() for each in maps]  # [B,H',W'] each
    translations = []
    for index, (height, width) in enumerate(pixels.shape[:2] for pixels in images):
        cropped = (None if each is None else each[index, :height, :width] for each in maps)
        translations.append(Translation(pictures[index, :, :height, :width], *cropped))
    return translations


def images_of(given) -> Iterator[np.ndarray]:
    """What a pipeline takes, see `CDiffSETPipeline.__call__` => images, float32 [H, W, 3] in 0-255. ValueError for others."""
    if isinstance(given, list | tuple):
        for each in given:
            yield from images_of(each)
        return
    if isinstance(given, Image.Image):
        if given.mode not in PICTURE_MODES:
            modes = ", ".join(PICTURE_MODES)
            raise ValueError(
                f"image: expected a picture of mode {modes}, found {given.mode}: convert it, or scale an array to 0-1"
            )
        given = np.asarray(ImageOps.exif_transpose(given).convert("RGB"))
    shape = list(getattr(given, "shape", ()))
    if isinstance(given, torch.Tensor):
        given = given.detach().cpu()
        given = given.float() if given.is_floating_point() else given  # NumPy has no bfloat16
        given = (given.movedim(-3, -1) if given.ndim > 2 else given).numpy()
    if not isinstance(given, np.ndarray):
        raise ValueError(f"image: expected PIL images, arrays, tensors or a list of them, found {type(given).__name__}")
    batch = given[None, ..., None] if given.ndim == 2 else given[None] if given.ndim == 3 else given
    if batch.ndim != 4 or batch.shape[-1] not in (1, 3) or 0 in batch.shape:
        raise ValueError(f"image: expected 1 or 3 channels of at least one pixel, found shape {shape}")
    yield from np.repeat(eight_bit_scale(batch), 3 // batch.shape[-1], -1)


def eight_bit_scale(values: np.ndarray) -> np.ndarray:
    """uint8, or floating in 0-1 => float32 in 0-255; levels divided by 255 in float32 or float64 are again what they were."""
    if values.dtype == np.uint8:
        return values.astype(np.float32)
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"image: expected uint8 or floating numbers, found {values.dtype}: scale it to 0-1 first")
    if not (values.min() >= 0 and values.max() <= 1):  # nor NaN
        raise ValueError(f"image: expected floating numbers in 0-1, found {values.min():g} to {values.max():g}")
    scaled = values.astype(np.float64) * 255
    level = scaled.round()
    return np.where(np.abs(scaled - level) < LEVEL_TOLERANCE, level, scaled).astype(np.float32)


def batches_of(images: Sequence[np.ndarray], factor: int, batch_size: int) -> Iterator[list[np.ndarray]]:
    """Neighbours of one padded size, at most so many together."""
    for _, group in groupby(images, key=lambda pixels: [-(-side // factor) for side in pixels.shape[:2]]):
        same = list(group)
        yield from (same[start : start + batch_size] for start in range(0, len(same), batch_size))


# -------------------------------------------------------------------------------------------------------------- pipeline
@dataclass
class CDiffSETOutput(BaseOutput):
    """One entry for each SAR image, in its own size [H, W]. Maps are float32 arrays; all are tensors for output_type "pt"."""

    images: list  # "pil": PIL images, "np": [H, W, 3] in 0-1, "pt": [3, H, W] in 0-1
    variance: list | None = None  # σ² of the latent, on one scale for all images; None from a stage 1 model
    confidence: list | None = None  # 0-1, on each image's own scale, 8-bit images for "pil"; None from a stage 1 model
    spread: list | None = None  # standard deviation over the samples in 8-bit units; None of one sample
    expected_error: list | None = None  # calibrated, in 8-bit units; None without a calibration for these very settings


class CDiffSETPipeline(DiffusionPipeline):
    """SAR to EO by C-DiffSET, with maps of its confidence.

    `presets` {name: {"scheduler", "timestep_spacing", "num_inference_steps"}} and `readouts` {name: {"timesteps": where σ² is
    read}} are those of the command line. `calibration` is empty or has the curves of calibrate.py and the settings that they
    hold for: `pipe(image, **pipe.config.calibration["settings"])` comes with the expected error.
    """

    model_cpu_offload_seq = "text_encoder->unet->vae"

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder,  # CLIPTextModel
        tokenizer,  # CLIPTokenizer
        unet: UNet2DConditionModel,  # SAR and noisy EO latent in, a prediction and from stage 2 on the raw variance out
        scheduler: DDIMScheduler,
        prompt: str = "",  # that of the training
        presets: dict[str, dict[str, Any]] | None = None,
        readouts: dict[str, dict[str, list[int]]] | None = None,
        calibration: dict[str, Any] | None = None,
    ):
        super().__init__()
        self.register_modules(vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler)
        self.register_to_config(prompt=prompt, presets=presets or {}, readouts=readouts or {}, calibration=calibration or {})

    @torch.no_grad()
    def __call__(
        self,
        image,
        preset: str = "paper",
        scheduler: str | None = None,
        timestep_spacing: str | None = None,
        num_inference_steps: int | None = None,
        readout: str = "midpoint",
        ensemble: int = 1,
        ensemble_output: str = "first",
        seed: int = 0,
        generator: torch.Generator | None = None,
        batch_size: int = 1,
        output_type: str = "pil",
        return_dict: bool = True,
        after_step: Callable[[], None] | None = None,
    ) -> CDiffSETOutput | tuple:
        """Translate SAR images of any size, as test.py does.

        image: a PIL image, an array [H, W], [H, W, C] or [B, H, W, C], a tensor [H, W], [C, H, W] or [B, C, H, W], or a list of
            these; C is 1 or 3; uint8, or floating in 0-1.
        preset: decides `scheduler` ("ddim", "dpmsolver++", "unipc"), `timestep_spacing` ("leading", "trailing") and
            `num_inference_steps` where they are not given.
        readout: where σ² is read. ensemble: samples per image; their "first", "mean" or "median" is the picture.
        seed: an image's noise follows from it and from the image. With a generator it is drawn from that, image by image.
        batch_size: samples of one size computed together.
        after_step: called after every denoising step; what it raises ends the call.

        ValueError for what it cannot take.
        """
        settings = self.settings(preset, scheduler, timestep_spacing, num_inference_steps, readout, ensemble, ensemble_output)
        require("output_type", output_type, OUTPUT_TYPES)
        require_at_least_1(batch_size=batch_size)
        images = list(images_of(image))
        if not images:
            raise ValueError("image: expected at least one image, found none")
        device = self._execution_device
        prompt = encode_prompt(self.tokenizer, self.text_encoder, self.config.prompt, device).to(device, self.unet.dtype)
        sampler, translations = make_sampler(self.scheduler, settings["scheduler"], settings["timestep_spacing"]), []
        with self.progress_bar(total=len(images)) as bar:
            for together in batches_of(images, vae_factor(self.vae), batch_size):
                noise = self.noise(together, ensemble, seed, generator)  # [N,B,C,h,w]
                translations += translate_images(
                    self.unet, self.vae, sampler, together, noise, prompt, settings["num_inference_steps"],
                    self.config.readouts[readout]["timesteps"], ensemble_output, batch_size, after_step,
                )  # fmt: skip
                bar.update(len(together))
        self.maybe_free_model_hooks()
        output = as_output(translations, [self.expected_error(each, settings) for each in translations], output_type)
        return output if return_dict else tuple(getattr(output, field.name) for field in fields(output))

    def settings(
        self, preset: str, scheduler: str | None, timestep_spacing: str | None, num_inference_steps: int | None, readout: str,
        ensemble: int, ensemble_output: str,
    ) -> dict[str, Any]:  # fmt: skip
        """All that the result depends on besides image and noise, checked, in the words of a calibration's settings."""
        require("preset", preset, self.config.presets)
        require("readout", readout, self.config.readouts)
        given = {"scheduler": scheduler, "timestep_spacing": timestep_spacing, "num_inference_steps": num_inference_steps}
        chosen = self.config.presets[preset] | {name: value for name, value in given.items() if value is not None}
        require("scheduler", chosen["scheduler"], ("ddim", *MULTISTEP))
        require("timestep_spacing", chosen["timestep_spacing"], ("leading", "trailing"))
        require("ensemble_output", ensemble_output, ("first", "mean", "median"))
        require_at_least_1(num_inference_steps=chosen["num_inference_steps"], ensemble=ensemble)
        how, steps = (chosen["scheduler"], chosen["timestep_spacing"]), chosen["num_inference_steps"]
        if steps > (most := MAX_STEPS if how == ("ddim", "leading") else MAX_FEW_STEPS):
            limit = f"{most}" if most == MAX_STEPS else f"{most} with {' '.join(how)}"
            raise ValueError(f"num_inference_steps: expected at most {limit}, found {steps}")
        return {"readout": readout, **chosen, "ensemble": ensemble, "ensemble_output": ensemble_output}

    def noise(self, images: list[np.ndarray], ensemble: int, seed: int, generator: torch.Generator | None) -> torch.Tensor:
        """What the samples of images of one padded size start from [N, B, C, h, w], on the CPU."""
        if generator is None:
            return torch.stack([image_noise(self.vae, seed + number, images) for number in range(ensemble)])
        factor, channels = vae_factor(self.vae), self.vae.config.latent_channels
        height, width = (-(-side // factor) for side in images[0].shape[:2])
        shape, device = (ensemble, channels, height, width), generator.device
        return torch.stack([torch.randn(shape, generator=generator, device=device).cpu() for _ in images], 1)

    def expected_error(self, translation: Translation, settings: dict[str, Any]) -> np.ndarray | None:
        """float32 [H, W] in 8-bit units; None without a calibration for these settings."""
        calibration = self.config.calibration
        if calibration.get("settings") != settings:
            return None
        return expected_error(calibration, translation.uncertainties).astype(np.float32)


def require(name: str, value: str, allowed) -> None:
    if value not in allowed:
        raise ValueError(f"{name}: expected one of {', '.join(allowed)}, found {value!r}")


def require_at_least_1(**values: int) -> None:
    for name, value in values.items():
        if not (isinstance(value, int) and value >= 1):
            raise ValueError(f"{name}: expected a whole number of at least 1, found {value!r}")


def as_output(translations: list[Translation], expected_errors: list[np.ndarray | None], output_type: str) -> CDiffSETOutput:
    """Translations in the form of OUTPUT_TYPES that is asked for."""
    if output_type == "pil":
        images: list = [Image.fromarray(each.eo) for each in translations]
        confidence: list = [
            each.confidence if each.confidence is None else Image.fromarray(each.confidence) for each in translations
        ]
    else:
        images = [(each.pixels + 1) / 2 for each in translations]  # [3,H,W]
        images = images if output_type == "pt" else [each.movedim(0, -1).numpy() for each in images]
        confidence = [each.certainty for each in translations]
    maps: dict[str, Any] = {"confidence": confidence, "expected_error": expected_errors}
    maps |= {name: [getattr(each, name) for each in translations] for name in ("variance", "spread")}
    if output_type == "pt":
        maps = {name: [None if each is None else torch.from_numpy(each) for each in values] for name, values in maps.items()}
    return CDiffSETOutput(images=images, **{name: None if values[0] is None else values for name, values in maps.items()})
