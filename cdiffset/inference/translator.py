"""SAR pixels in, EO pixels and maps out: everything between the reading and the writing of files."""

import argparse
import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from safetensors.torch import load_file
from tqdm import tqdm

from cdiffset.checkpoint import Weights, meta_file, read_meta, recorded_base
from cdiffset.confidence import confidence_map, variance_map
from cdiffset.device import form_of, free_memory, without_instructions
from cdiffset.diffusion import image_noise, predict
from cdiffset.errors import UserError
from cdiffset.images import to_signed, to_uint8
from cdiffset.inference.batching import batches_of_one_size, file_threads
from cdiffset.inference.ensemble import ensemble, reduce_samples
from cdiffset.inference.options import model_settings
from cdiffset.inference.variance_readout import VARIANCE_READOUTS
from cdiffset.model import (
    build_unet,
    check_base,
    check_prompt_width,
    decode,
    embed_prompt,
    encode,
    load_scheduler,
    load_vae,
    make_sampler,
    vae_factor,
)

PIXELS_TOGETHER = 4 * 256**2  # of a batch on a CPU: from there on, the U-Net of SD takes no less time per image
MOST_TOGETHER = 64  # images of a batch on a GPU
MEMORY_SHARE = 0.8  # of what is free
PROMPT_FILE, PROMPT_TENSOR = "prompt_embedding.safetensors", "prompt_embedding"  # beside checkpoint.json


class Translation(NamedTuple):
    """What becomes of one SAR image, in its own size."""

    eo: np.ndarray  # uint8 [H, W, 3]
    variance: np.ndarray | None  # σ², float32 [H, W]; None from a stage 1 checkpoint
    confidence: np.ndarray | None  # uint8 [H, W], on the image's own scale; None from a stage 1 checkpoint
    spread: np.ndarray | None  # standard deviation over the samples in 8-bit units, float32 [H, W]; None of one sample

    @property
    def uncertainties(self) -> dict[str, np.ndarray]:
        """The maps that there are, by name."""
        return {name: getattr(self, name) for name in ("variance", "spread") if getattr(self, name) is not None}


class Model:
    """Networks, scheduler and prompt embedding of a checkpoint, loaded once, in the precision and on the device asked for."""

    def __init__(
        self,
        args: argparse.Namespace,  # the model and machine options of options.py
        weights: Weights,  # of `options.begin_reading`
        needing_variance: Sequence[str] = (),  # options that a stage 1 checkpoint cannot serve
        with_fingerprint: bool = False,  # `fingerprint`, else None: it takes seconds for a large model
    ):
        base, prompt, prediction_type = model_settings(args)
        self.device, dtype, memory_format = form_of(args)
        try:
            check_base(base)
            self.vae = load_vae(base, weights.form.dtype)
        except UserError as error:
            if args.pretrained_model_name_or_path or meta_file(args.checkpoint) is None:
                raise
            raise UserError(
                f"base model {base!r}, recorded in {meta_file(args.checkpoint)}, is not here or not whole: give "
                f"--pretrained-model-name-or-path ({error})"
            ) from error
        latent_channels = self.vae.config.latent_channels
        self.unet = build_unet(weights, base, latent_channels)
        if needing_variance and self.unet.config.out_channels == latent_channels:
            raise UserError(
                f"{', '.join(needing_variance)}: {weights.file} is a stage 1 checkpoint ({latent_channels} output channels), "
                f"a confidence takes one of stage 2 ({latent_channels + 1})"
            )
        self.prompt_embedding = load_prompt(args.checkpoint, base, prompt, self.unet.config.cross_attention_dim)
        check_prompt_width(self.unet, self.prompt_embedding, base, "--checkpoint")
        self.scheduler = load_scheduler(base, prediction_type)
        self.args, self.factor, self.fingerprint, self.trained = args, vae_factor(self.vae), None, read_meta(args.checkpoint)
        if with_fingerprint:
            tensors = {"prompt": self.prompt_embedding, **self.vae.state_dict(prefix="vae."), **self.unet.state_dict()}
            self.fingerprint = fingerprint(tensors, prediction_type)
        self.unet, self.vae = (net.to(self.device, dtype, memory_format=memory_format) for net in (self.unet, self.vae))
        self.prompt_embedding = self.prompt_embedding.to(self.device, dtype)
        if args.compile:
            self.unet.compile()
        self.most, self.known_sizes = None, {}  # images that have turned out to fit; images together by padded size
        print(f"{weights.file} on {self.device}, {args.precision}, base {base}, prompt {prompt!r}")
        if note := without_instructions(self.device, args.precision):
            print(note)

    def stack(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Images [H, W, 3] in 0-255 => [B, 3, H', W'] in [-1, 1] on the device, padded to multiples of the VAE's factor."""
        padded = np.stack([pad_to_multiple(pixels, self.factor) for pixels in images])  # [B,H',W',3]
        return to_signed(torch.from_numpy(padded).permute(0, 3, 1, 2)).to(self.device)

    def images_together(self, height: int, width: int) -> int:
        """How many images of a padded size are computed together: --batch-size, or what `auto` comes to.

        UserError where not even one fits into the memory.
        """
        if (height, width) not in self.known_sizes:
            self.known_sizes[height, width] = self.choose_batch_size(height, width)
        known = self.known_sizes[height, width]
        return known if self.most is None else min(known, self.most)

    def choose_batch_size(self, height: int, width: int) -> int:
        free, least = free_memory(self.device), decoder_bytes(self.vae, height, width)
        if least > free:
            raise UserError(
                f"images of {width} x {height} px take more than {least / 2**30:.1f} GiB to decode, {free / 2**30:.1f} GiB are "
                f"free: as GeoTIFF they would be translated in tiles (--tile)"
            )
        together = self.args.batch_size
        if together == "auto":
            if self.device.type == "cuda":
                each = self.measured_bytes(height, width)
                together = max(1, min(MOST_TOGETHER, int(MEMORY_SHARE * free / each)))
            else:
                together = max(1, min(MOST_TOGETHER, PIXELS_TOGETHER // (height * width)))
            tqdm.write(f"--batch-size auto: {together} together of {width} x {height} px")
        # One by one through the VAE, which is exact, where its activations would crowd the memory. Never switched off again.
        if together * least > free / 4:
            self.vae.enable_slicing()
        return together

    @torch.no_grad()
    def measured_bytes(self, height: int, width: int) -> int:
        """Memory that one image takes on a CUDA device beyond the weights: the most of encoder, U-Net and decoder."""
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        latents = encode(self.vae, torch.zeros(1, 3, height, width, device=self.device)).to(self.unet.dtype)
        predict(self.unet, latents, latents, torch.tensor(0, device=self.device), self.prompt_embedding)
        decode(self.vae, latents.float())
        return torch.cuda.max_memory_allocated(self.device) - before


def load_prompt(checkpoint: str, base: str, prompt: str, width: int) -> torch.Tensor:
    """The prompt's embedding [1, L, width], float32: as training saved it, where base and prompt are the checkpoint's own."""
    meta = meta_file(checkpoint)
    is_own = (base, prompt) == (recorded_base(checkpoint), read_meta(checkpoint).get("config", {}).get("prompt"))
    if not (meta and is_own and (file := meta.with_name(PROMPT_FILE)).is_file()):
        return embed_prompt(base, prompt)
    try:
        embedding = load_file(file)[PROMPT_TENSOR]
    except (OSError, SafetensorError, KeyError) as error:
        raise UserError(f"--checkpoint: {file} is damaged ({error}), take another checkpoint") from error
    if embedding.shape[::2] != (1, width) or not embedding.isfinite().all():
        raise UserError(f"--checkpoint: {file}: expected finite numbers [1, tokens, {width}], found {list(embedding.shape)}")
    return embedding


class Translator(Model):
    """Called with a batch of SAR images it returns their EO images and maps."""

    def __init__(self, args: argparse.Namespace, *options, **more):
        super().__init__(args, *options, **more)
        self.scheduler = make_sampler(self.scheduler, args.scheduler, args.timestep_spacing)
        print(f"{args.scheduler}, {args.timestep_spacing} timesteps, {args.num_inference_steps} steps")

    def __call__(self, images: Sequence[np.ndarray], noise_of: Callable = image_noise) -> list[Translation]:
        """SAR images, float32 [H, W, 3] in 0-255, that have one size when padded => their translations.

        noise_of(vae, seed, images) => the noise [B, C, h, w] that they start from.
        Where the device's memory does not hold as many as are to be computed together, half as many are, from then on.
        """
        sar = self.stack(images)
        seeds = range(self.args.seed, self.args.seed + self.args.ensemble)
        noise = torch.stack([noise_of(self.vae, seed, images) for seed in seeds])  # [N,B,C,h,w]
        while True:
            together = self.images_together(*sar.shape[-2:])
            try:
                return self.translations(images, sar, noise, together)
            except torch.OutOfMemoryError as error:
                if together == 1:
                    size = f"{sar.shape[-1]} x {sar.shape[-2]} px"
                    raise UserError(f"not even one image of {size} fits into the memory of {self.device}") from error
            self.most = together // 2
            tqdm.write(f"{together} images together do not fit into the memory of {self.device}: from now on {self.most}")

    def translations(
        self, images: Sequence[np.ndarray], sar: torch.Tensor, noise: torch.Tensor, together: int
    ) -> list[Translation]:
        samples, sigma2, spread = ensemble(
            self.unet, self.vae, self.scheduler, sar, noise, self.prompt_embedding, self.args.num_inference_steps,
            VARIANCE_READOUTS[self.args.readout][0], together,
        )  # [N,B,3,H',W'], [B,1,h,w], [B,1,H',W']  # fmt: skip
        if not samples.isfinite().all():
            raise UserError("the translation is not finite: this precision does not suit the checkpoint, try --precision fp32")
        pictures = to_uint8(reduce_samples(samples, self.args.ensemble_output))
        maps = {"variance": None, "confidence": None, "spread": spread}
        if sigma2 is not None:
            maps["variance"] = variance_map(sigma2, tuple(sar.shape[-2:]))
            maps["confidence"] = (confidence_map(sigma2.cpu(), tuple(sar.shape[-2:])) * 255).round().to(torch.uint8)
        translations = []
        for index, (height, width) in enumerate(pixels.shape[:2] for pixels in images):
            cropped = {
                name: None if values is None else values[index, 0, :height, :width].cpu().numpy()
                for name, values in maps.items()
            }
            translations.append(Translation(eo=pictures[index, :height, :width], **cropped))
        return translations


def pad_to_multiple(pixels: np.ndarray, factor: int) -> np.ndarray:
    """[H, W, 3] => [H', W', 3] with sides that are multiples of `factor`, continued by reflection below and to the right."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="reflect")


def decoder_bytes(vae: AutoencoderKL, height: int, width: int) -> int:
    """A lower bound of what decoding one image takes: input and output of its widest layer at full size."""
    widest = vae.config.block_out_channels[min(1, len(vae.config.block_out_channels) - 1)]
    return 2 * widest * height * width * vae.dtype.itemsize


def fingerprint(tensors: dict[str, torch.Tensor], settings: str) -> str:
    """SHA-256 over names, shapes and values: the same for the same model wherever its files lie."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().float().contiguous().numpy()
        digest.update(f"{name} {values.shape}".encode())
        digest.update(values.tobytes() if values.ndim == 0 else memoryview(values).cast("B"))
    return digest.hexdigest()


def translate_files(
    translator: Translator,
    items: Sequence,
    failed: list,  # takes the items that cannot be read
    read: Callable,  # item => (float32 [H, W, 3] in 0-255,)
    noise_of: Callable = image_noise,  # (vae, seed, images) => the noise [B, C, h, w] that they start from
) -> Iterator[tuple[int, Translation]]:
    """Read and translate files => (index of the item, translation), in no fixed order; see `batches_of_one_size`."""
    threads = file_threads(translator.device)
    batches = batches_of_one_size(items, read, translator.factor, translator.images_together, failed, "translating", threads)
    for indices, (images,) in batches:
        yield from zip(indices, translator(images, noise_of), strict=True)
