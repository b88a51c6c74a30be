"""SAR pixels in, EO pixels and maps out: everything between the reading and the writing of files."""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from cdiffset.checkpoint import PROMPT_FILE, PROMPT_TENSOR, meta_file, read_meta, read_weights, recorded_base
from cdiffset.device import AS_STORED, form_of, free_memory, keep_freed_memory, without_instructions
from cdiffset.errors import UserError
from cdiffset.inference.batching import batches_of_one_size, file_threads
from cdiffset.inference.options import MachineSettings, ModelSettings, SamplingSettings
from cdiffset.inference.variance_readout import VARIANCE_READOUTS
from cdiffset.model import build_unet, check_base, check_prompt_width, embed_prompt, load_scheduler, load_vae
from cdiffset.pipeline import Translation, decode, encode, image_noise, make_sampler, predict, translate_images, vae_factor

CPU_BATCH_PX = 4 * 256**2  # of a batch on a CPU: from there on, the U-Net of SD takes no less time per image
MAX_BATCH = 64  # images
MEMORY_FRACTION = 0.8  # of what is free


# ------------------------------------------------------------------------------------------------------------- the model
@dataclass(frozen=True)
class LoadedCheckpoint:
    """The networks of a checkpoint and its base, with what belongs to them, in the precision and on the device asked for."""

    unet: UNet2DConditionModel
    vae: AutoencoderKL
    scheduler: DDIMScheduler  # the noise schedule and the prediction type
    prompt_embedding: torch.Tensor  # [1, L, D]
    device: torch.device
    precision: str  # fp32, fp16 or bf16
    factor: int  # px that a latent cell spans in each direction
    meta: dict  # checkpoint.json; {} for weights of another origin
    source: str | None  # of weights from the Hub, see hub.Found
    fingerprint: str | None  # of all that a calibration depends on; None: not asked for, as it takes seconds for a large model


def load_checkpoint(
    model: ModelSettings,
    machine: MachineSettings,
    needing_variance: Sequence[str] = (),  # options that a stage 1 checkpoint cannot serve
    with_fingerprint: bool = False,
) -> LoadedCheckpoint:
    form = form_of(machine.device, machine.precision)
    device, dtype, memory_format = form
    keep_freed_memory(device)
    # The fingerprint is over the weights as they are stored.
    weights = read_weights(str(model.checkpoint), "--checkpoint", AS_STORED if with_fingerprint else form)
    vae = load_vae_of(model, torch.float32 if with_fingerprint else dtype)
    latent_channels = vae.config.latent_channels
    unet = build_unet(weights, model.base, latent_channels)
    if needing_variance and unet.config.out_channels == latent_channels:
        raise UserError(
            f"{', '.join(needing_variance)}: {weights.file} is a stage 1 checkpoint ({latent_channels} output channels), "
            f"a confidence takes one of stage 2 ({latent_channels + 1})"
        )
    prompt_embedding = load_prompt(model, unet.config.cross_attention_dim)
    check_prompt_width(unet, prompt_embedding, model.base, "--checkpoint")
    scheduler, found = load_scheduler(model.base, model.prediction_type), None
    if with_fingerprint:
        tensors = {"prompt": prompt_embedding, **vae.state_dict(prefix="vae."), **unet.state_dict()}
        found = fingerprint(tensors, model.prediction_type)
    unet, vae = (network.to(device, dtype, memory_format=memory_format) for network in (unet, vae))
    if machine.compile:
        unet.compile()
    print(f"{model.source or weights.file} on {device}, {machine.precision}, base {model.base}, prompt {model.prompt!r}")
    if note := without_instructions(device, machine.precision):
        print(note)
    embedding, factor, meta = prompt_embedding.to(device, dtype), vae_factor(vae), read_meta(model.checkpoint)
    return LoadedCheckpoint(unet, vae, scheduler, embedding, device, machine.precision, factor, meta, model.source, found)


def load_vae_of(model: ModelSettings, dtype: torch.dtype) -> AutoencoderKL:
    """The base's VAE. Where the checkpoint names a base that is not here, the error says whose word that was."""
    try:
        check_base(model.base)
        return load_vae(model.base, dtype)
    except UserError as error:
        if model.base != recorded_base(model.checkpoint):
            raise
        raise UserError(
            f"base model {model.base!r}, recorded in {meta_file(model.checkpoint)}, is not here or not whole: give "
            f"--pretrained-model-name-or-path ({error})"
        ) from error


def load_prompt(model: ModelSettings, width: int) -> torch.Tensor:
    """The prompt's embedding [1, L, width], float32: as training saved it, where base and prompt are the checkpoint's own."""
    meta, recorded = meta_file(model.checkpoint), read_meta(model.checkpoint).get("config", {})
    is_own = (model.base, model.prompt) == (recorded_base(model.checkpoint), recorded.get("prompt"))
    if not (meta and is_own and (file := meta.with_name(PROMPT_FILE)).is_file()):
        return embed_prompt(model.base, model.prompt)
    try:
        embedding = load_file(file)[PROMPT_TENSOR]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"--checkpoint: {file} is damaged ({error}), take another checkpoint") from error
    if embedding.shape[::2] != (1, width) or not embedding.isfinite().all():
        raise UserError(f"--checkpoint: {file}: expected finite numbers [1, tokens, {width}], found {list(embedding.shape)}")
    return embedding


def fingerprint(tensors: dict[str, torch.Tensor], settings: str) -> str:
    """SHA-256 over names, shapes and values: the same for the same model wherever its files lie."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().float().contiguous().numpy()
        digest.update(f"{name} {values.shape}".encode())
        digest.update(values.tobytes() if values.ndim == 0 else memoryview(values).cast("B"))
    return digest.hexdigest()


# ----------------------------------------------------------------------------------------------------------- batch sizes
class BatchSizes:
    """How many images of a padded size are computed together: --batch-size, or what `auto` comes to."""

    def __init__(self, checkpoint: LoadedCheckpoint, batch_size: int | None):
        self.checkpoint, self.batch_size = checkpoint, batch_size
        self.limit = math.inf  # images of any size; less once memory has not sufficed
        self.chosen: dict[tuple[int, int], int] = {}  # by padded size

    def __call__(self, height: int, width: int) -> int:
        """UserError where not even one image fits into the memory."""
        if (height, width) not in self.chosen:
            self.chosen[height, width] = self.choose(height, width)
        return min(self.chosen[height, width], self.limit)

    def choose(self, height: int, width: int) -> int:
        device, vae = self.checkpoint.device, self.checkpoint.vae
        free, least = free_memory(device), decoder_bytes(vae, height, width)
        if least > free:
            raise UserError(
                f"images of {width} x {height} px take more than {least / 2**30:.1f} GiB to decode, {free / 2**30:.1f} GiB are "
                f"free: as GeoTIFF they would be translated in tiles (--tile)"
            )
        together = self.batch_size
        if together is None:
            fitting = CPU_BATCH_PX // (height * width)
            if device.type == "cuda":
                fitting = int(MEMORY_FRACTION * free / self.measured_bytes(height, width))
            together = max(1, min(MAX_BATCH, fitting))
            tqdm.write(f"--batch-size auto: {together} together of {width} x {height} px")
        # One by one through the VAE, which is exact, where its activations would crowd the memory. Never switched off again.
        if together * least > free / 4:
            vae.enable_slicing()
        return together

    @torch.no_grad()
    def measured_bytes(self, height: int, width: int) -> int:
        """Memory that one image takes on a CUDA device beyond the weights: the most of encoder, U-Net and decoder."""
        device, unet, vae = self.checkpoint.device, self.checkpoint.unet, self.checkpoint.vae
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        latents = encode(vae, torch.zeros(1, 3, height, width, device=device)).to(unet.dtype)
        predict(unet, latents, latents, torch.tensor(0, device=device), self.checkpoint.prompt_embedding)
        decode(vae, latents.float())
        return torch.cuda.max_memory_allocated(device) - before


def decoder_bytes(vae: AutoencoderKL, height: int, width: int) -> int:
    """A lower bound of what decoding one image takes: input and output of its widest layer at full size."""
    widest = vae.config.block_out_channels[min(1, len(vae.config.block_out_channels) - 1)]
    return 2 * widest * height * width * vae.dtype.itemsize


# ----------------------------------------------------------------------------------------------------------- translation


OnProgress = Callable[[int, int], None]  # takes how many steps are done, and of how many; what it raises ends the translation


class Translator:
    """Called with a batch of SAR images it returns their EO images and maps."""

    def __init__(
        self,
        checkpoint: LoadedCheckpoint,
        sampling: SamplingSettings,
        batch_size: int | None,
        on_progress: OnProgress | None = None,
    ):
        self.checkpoint, self.sampling, self.on_progress = checkpoint, sampling, on_progress
        self.scheduler = make_sampler(checkpoint.scheduler, sampling.scheduler, sampling.timestep_spacing)
        self.batch_sizes = BatchSizes(checkpoint, batch_size)
        self.variance_timesteps = VARIANCE_READOUTS[sampling.readout][0]
        print(f"{sampling.scheduler}, {sampling.timestep_spacing} timesteps, {sampling.num_inference_steps} steps")

    def __call__(self, images: Sequence[np.ndarray], noise_of: Callable = image_noise) -> list[Translation]:
        """SAR images, float32 [H, W, 3] in 0-255, that have one size when padded => their translations.

        noise_of(vae, seed, images) => the noise [B, C, h, w] that they start from.
        Where the device's memory does not hold as many as are to be computed together, half as many are, from then on.
        """
        checkpoint, sampling = self.checkpoint, self.sampling
        device, factor = checkpoint.device, checkpoint.factor
        seeds = range(sampling.seed, sampling.seed + sampling.ensemble)
        noise = torch.stack([noise_of(checkpoint.vae, seed, images) for seed in seeds])  # [N,B,C,h,w]
        height, width = (side * factor for side in noise.shape[-2:])
        while True:
            together = self.batch_sizes(height, width)
            try:
                return translate_images(
                    checkpoint.unet, checkpoint.vae, self.scheduler, images, noise, checkpoint.prompt_embedding,
                    sampling.num_inference_steps, self.variance_timesteps, sampling.ensemble_output, together,
                    self.step_counter(sampling.num_inference_steps * -(-noise.shape[:2].numel() // together)),
                )  # fmt: skip
            except FloatingPointError as error:
                raise UserError(f"{error}: try --precision fp32") from error
            except torch.OutOfMemoryError as error:
                if together == 1:
                    size = f"{width} x {height} px"
                    raise UserError(f"not even one image of {size} fits into the memory of {device}") from error
            self.batch_sizes.limit = together // 2
            tqdm.write(f"{together} images together do not fit into the memory of {device}: from now on {together // 2}")

    def step_counter(self, total: int) -> Callable[[], None] | None:
        """What is to be called after every step of `total`."""
        if (on_progress := self.on_progress) is None:
            return None
        numbers = count(1)
        return lambda: on_progress(next(numbers), total)


def require_finite(values: torch.Tensor, what: str) -> None:
    if not values.isfinite().all():
        raise UserError(f"the {what} is not finite: this precision does not suit the checkpoint, try --precision fp32")


def translate_files(
    translator: Translator,
    items: Sequence,
    skip: Callable[[int, object], None],  # as for `batches_of_one_size`
    read: Callable,  # item => (float32 [H, W, 3] in 0-255,)
    noise_of: Callable = image_noise,  # as for Translator
) -> Iterator[tuple[int, Translation]]:
    """Read and translate files => (index of the item, translation), in no fixed order; see `batches_of_one_size`."""
    threads, factor = file_threads(translator.checkpoint.device), translator.checkpoint.factor
    for indices, (images,) in batches_of_one_size(items, read, factor, translator.batch_sizes, skip, "translating", threads):
        yield from zip(indices, translator(images, noise_of), strict=True)
