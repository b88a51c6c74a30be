"""SAR pixels in, EO pixels and maps out: everything between the reading and the writing of files."""

import argparse
import hashlib
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from cdiffset.checkpoint import load_unet, read_meta
from cdiffset.config import DEFAULT_BASE, DEFAULT_PROMPT
from cdiffset.diffusion import ensemble, reduce_samples
from cdiffset.errors import UserError
from cdiffset.images import read_sar, to_signed, to_uint8
from cdiffset.model import check_base, check_prompt_width, embed_prompt, load_scheduler, load_vae, make_sampler, vae_factor
from cdiffset.uncertainty import confidence_map, variance_map


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
        needing_variance: Sequence[str] = (),  # options that a stage 1 checkpoint cannot serve
        with_fingerprint: bool = False,  # `fingerprint`, else None: it takes seconds for a large model
    ):
        trained = read_meta(args.checkpoint).get("config", {})
        base = args.pretrained_model_name_or_path or trained.get("pretrained_model_name_or_path") or DEFAULT_BASE
        prompt = next(text for text in (args.prompt, trained.get("prompt"), DEFAULT_PROMPT) if text is not None)
        check_base(base)
        self.device = pick_device(args.device)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
        self.vae = load_vae(base)
        self.unet, weights = load_unet(args.checkpoint, base, self.vae.config.latent_channels, "--checkpoint")
        if needing_variance and self.unet.config.out_channels == self.vae.config.latent_channels:
            raise UserError(
                f"{', '.join(needing_variance)}: {weights} is a stage 1 checkpoint ({self.unet.config.out_channels} output "
                f"channels), a confidence takes one of stage 2 ({self.unet.config.out_channels + 1})"
            )
        self.prompt_embedding = embed_prompt(base, prompt)
        check_prompt_width(self.unet, self.prompt_embedding, base, "--checkpoint")
        prediction_type = args.prediction_type or trained.get("prediction_type") or "epsilon"
        self.scheduler = load_scheduler(base, prediction_type)
        self.args, self.factor, self.fingerprint = args, vae_factor(self.vae), None
        if with_fingerprint:
            tensors = {"prompt": self.prompt_embedding, **self.vae.state_dict(prefix="vae."), **self.unet.state_dict()}
            self.fingerprint = fingerprint(tensors, prediction_type)
        self.unet, self.vae = self.unet.to(self.device, dtype), self.vae.to(self.device, dtype)
        self.prompt_embedding = self.prompt_embedding.to(self.device)
        print(f"{weights} on {self.device}, {args.precision}, base {base}, prompt {prompt!r}")

    def stack(self, images: Sequence[np.ndarray]) -> torch.Tensor:
        """Images [H, W, 3] in 0-255 => [B, 3, H', W'] in [-1, 1] on the device, padded to multiples of the VAE's factor."""
        padded = np.stack([pad_to_multiple(pixels, self.factor) for pixels in images])  # [B,H',W',3]
        return to_signed(torch.from_numpy(padded).permute(0, 3, 1, 2)).to(self.device)


class Translator(Model):
    """Called with a batch of SAR images it returns their EO images and maps."""

    def __init__(self, args: argparse.Namespace, *options, **more):
        super().__init__(args, *options, **more)
        self.scheduler = make_sampler(self.scheduler, args.scheduler, args.timestep_spacing)
        print(f"{args.scheduler}, {args.timestep_spacing} timesteps, {args.num_inference_steps} steps")

    def __call__(self, images: Sequence[np.ndarray]) -> list[Translation]:
        """SAR images, float32 [H, W, 3] in 0-255, that have one size when padded => their translations."""
        sar = self.stack(images)
        samples, sigma2, spread = ensemble(
            self.unet, self.vae, self.scheduler, sar, self.prompt_embedding, self.args.num_inference_steps,
            range(self.args.seed, self.args.seed + self.args.ensemble), self.args.readout, self.args.batch_size,
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


def pick_device(written: str | None) -> torch.device:
    available = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(written or available)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {written!r} is not to be had here ({reason}), available: {available}") from error
    return device


def fingerprint(tensors: dict[str, torch.Tensor], settings: str) -> str:
    """SHA-256 over names, shapes and values: the same for the same model wherever its files lie."""
    digest = hashlib.sha256(settings.encode())
    for name in sorted(tensors):
        values = tensors[name].detach().float().contiguous().numpy()
        digest.update(f"{name} {values.shape}".encode())
        digest.update(values.tobytes() if values.ndim == 0 else memoryview(values).cast("B"))
    return digest.hexdigest()


def translate_files(
    translator: Translator, paths: Sequence[Path], batch_size: int, unreadable: list[Path]
) -> Iterator[tuple[int, Translation]]:
    """Read and translate files => (index of the path, translation), in no fixed order; see `batches_of_one_size`."""

    def read(path: Path) -> tuple[np.ndarray]:
        return (read_sar(path, translator.args.max_pixels),)

    for indices, (images,) in batches_of_one_size(paths, read, translator.factor, batch_size, unreadable, "translating"):
        yield from zip(indices, translator(images), strict=True)


def batches_of_one_size(
    items: Sequence, read: Callable, factor: int, batch_size: int, unreadable: list, what: str
) -> Iterator[tuple[tuple[int, ...], tuple[tuple[np.ndarray, ...], ...]]]:
    """Read items into images, and batch those of one padded size => (indices of the items, images of each kind).

    `read` returns the images of an item, all of one size. Items that it refuses are told on stderr and go to `unreadable`.
    """
    waiting: dict[tuple[int, int], list[tuple[int, tuple[np.ndarray, ...]]]] = {}
    with tqdm(total=len(items), desc=what, unit="image", mininterval=1) as bar:

        def batch_of(entries: list) -> Iterator:
            yield tuple(index for index, _ in entries), tuple(zip(*(images for _, images in entries), strict=True))
            bar.update(len(entries))

        for index, item in enumerate(items):
            try:
                images = read(item)
            except UserError as error:
                unreadable.append(item)
                bar.write(f"skipped: {error}", file=sys.stderr)
                bar.update()
                continue
            key = tuple(-(-side // factor) for side in images[0].shape[:2])
            waiting.setdefault(key, []).append((index, images))
            if len(waiting[key]) == batch_size:
                yield from batch_of(waiting.pop(key))
        for entries in waiting.values():
            yield from batch_of(entries)
