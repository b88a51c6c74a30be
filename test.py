"""Translate a folder of SAR images: python test.py --sar-dir SAR --output-dir EO --checkpoint work_dir/run/best

Every image under --sar-dir becomes an EO image of the same size and relative path; confidence and variance maps on request.
"""

# PyTorch and what needs it are imported where they are used: --help and wrong options do not wait for them.
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tqdm import tqdm

from cdiffset.config import DEFAULT_BASE, DEFAULT_PROMPT, PREDICTION_TYPES
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import MAX_PIXELS, list_images, read_sar, require_inside, to_signed, to_uint8, write_png, write_tiff

if TYPE_CHECKING:
    import torch


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Translate SAR images to EO images, with confidence maps.", allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument("--sar-dir", type=Path, required=True, help="folder of SAR images, PNG, JPEG or TIFF, recursive")
    group.add_argument("--output-dir", type=Path, required=True, help="EO images, 8-bit PNG, same relative paths")
    group.add_argument("--conf-dir", type=Path, help="confidence maps, 8-bit PNG, each image on its own scale")
    group.add_argument("--variance-dir", type=Path, help="variance maps, float32 TIFF, on one scale for all images")
    group.add_argument("--skip-existing", action="store_true", help="leave images alone whose outputs are all there")
    group.add_argument("--follow-links", action="store_true", help="let symbolic links lead out of these folders")
    group.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help=f"skip images that claim more [{MAX_PIXELS}]")
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", required=True, help="U-Net: .safetensors file, diffusers folder or checkpoint folder")
    group.add_argument("--pretrained-model-name-or-path", help=f"base model [the checkpoint's own, else {DEFAULT_BASE}]")
    group.add_argument("--prompt", help=f"text prompt [the checkpoint's own, else {DEFAULT_PROMPT!r}]")
    group.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, help="what the U-Net predicts [the checkpoint's own, else epsilon]"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-inference-steps", type=int, default=50, help="DDIM steps, 1 to 999 [50]")
    group.add_argument("--seed", type=int, default=0, help="fixes the starting noise [0]")
    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, default=1, help="images of one size translated together [1]")
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the networks [fp32]")
    group.add_argument("--device", help="e.g. cuda, cuda:1, mps, cpu [cuda if there is one]")
    return parser


@dataclass(frozen=True)
class Job:
    """One image: where it comes from and where its outputs go (None: not wanted)."""

    sar: Path
    eo: Path
    confidence: Path | None
    variance: Path | None

    def is_done(self) -> bool:
        return all(path.is_file() for path in (self.eo, self.confidence, self.variance) if path is not None)


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where single images could not be read."""
    args = check(make_parser().parse_args(argv))
    jobs = make_jobs(args, list_images(args.sar_dir, args.follow_links))
    todo = [job for job in jobs if not (args.skip_existing and job.is_done())]
    if len(todo) < len(jobs):
        print(f"{len(jobs) - len(todo)} of {len(jobs)} images are there already")
    if not todo:
        return 0
    translator = Translator(args)
    started = time.monotonic()
    try:
        failures = translate_all(translator, todo, args.batch_size, args.max_pixels)
    except OSError as error:
        raise UserError(f"cannot write the outputs: {error}") from error
    seconds, done = time.monotonic() - started, len(todo) - len(failures)
    print(f"{done} images translated in {seconds:.1f} s, {done / seconds:.2f} images/s, into {args.output_dir}")
    if failures:
        print(f"{len(failures)} skipped as unreadable: {', '.join(str(job.sar) for job in failures[:3])}", file=sys.stderr)
    return 1 if failures else 0


def check(args: argparse.Namespace) -> argparse.Namespace:
    limits = (("num_inference_steps", 1, 999), ("batch_size", 1, None), ("seed", 0, 2**63 - 1), ("max_pixels", 1, None))
    for name, low, high in limits:
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" + (f" and at most {high}" if high is not None else "")
            raise UserError(f"--{name.replace('_', '-')}: expected {allowed}, found {value}")
    if not args.sar_dir.is_dir():
        raise UserError(f"--sar-dir: there is no folder {args.sar_dir}")
    seen: dict[Path, str] = {}
    for option in ("--sar-dir", "--output-dir", "--conf-dir", "--variance-dir"):
        folder = getattr(args, option[2:].replace("-", "_"))
        if folder is not None and (earlier := seen.setdefault(folder.resolve(), option)) != option:
            raise UserError(f"{option}: {folder} is {earlier} already, expected a folder of its own")
        if folder is not None and args.sar_dir.resolve() in folder.resolve().parents:
            raise UserError(f"{option}: {folder} lies in --sar-dir, whose images would then include the results")
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{option}: {folder} is a file, expected a folder")
    from cdiffset.checkpoint import find_weights

    find_weights(Path(args.checkpoint).expanduser(), "--checkpoint")  # before the base model, which may be far away
    return args


def make_jobs(args: argparse.Namespace, images: list[Path]) -> list[Job]:
    """Relative image paths => jobs; two images that differ in suffix alone would overwrite each other and are refused."""
    jobs, taken = [], {}
    for image in images:
        if (other := taken.setdefault(image.with_suffix(""), image)) != image:
            raise UserError(f"--sar-dir: {other} and {image} would both become {image.with_suffix('.png')}: rename one")
        jobs.append(
            Job(
                sar=args.sar_dir / image,
                eo=args.output_dir / image.with_suffix(".png"),
                confidence=args.conf_dir / image.with_suffix(".png") if args.conf_dir else None,
                variance=args.variance_dir / image.with_suffix(".tif") if args.variance_dir else None,
            )
        )
    for folder, kind in ((args.output_dir, "eo"), (args.conf_dir, "confidence"), (args.variance_dir, "variance")):
        if folder is not None:  # a file that is itself a link is replaced, not written through
            require_inside(folder, {getattr(job, kind).parent for job in jobs}, args.follow_links)
    return jobs


def pad_to_multiple(pixels: np.ndarray, factor: int) -> np.ndarray:
    """[H, W, 3] => [H', W', 3] with sides that are multiples of `factor`, continued by reflection below and to the right."""
    height, width = pixels.shape[:2]
    return np.pad(pixels, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="reflect")


class Translator:
    """Everything loaded once: networks, scheduler, prompt embedding; then batch after batch of images."""

    def __init__(self, args: argparse.Namespace):
        import torch

        from cdiffset.checkpoint import load_unet, read_meta
        from cdiffset.model import check_base, check_prompt_width, embed_prompt, load_scheduler, load_vae, vae_factor

        trained = read_meta(args.checkpoint).get("config", {})
        base = args.pretrained_model_name_or_path or trained.get("pretrained_model_name_or_path") or DEFAULT_BASE
        prompt = next(text for text in (args.prompt, trained.get("prompt"), DEFAULT_PROMPT) if text is not None)
        check_base(base)
        self.device = pick_device(args.device)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
        self.vae = load_vae(base, dtype)
        unet, weights = load_unet(args.checkpoint, base, self.vae.config.latent_channels, "--checkpoint")
        if (args.conf_dir or args.variance_dir) and unet.config.out_channels == self.vae.config.latent_channels:
            raise UserError(
                f"--conf-dir, --variance-dir: {weights} is a stage 1 checkpoint ({unet.config.out_channels} output channels), "
                f"a confidence takes one of stage 2 ({unet.config.out_channels + 1})"
            )
        self.prompt_embedding = embed_prompt(base, prompt)
        check_prompt_width(unet, self.prompt_embedding, base, "--checkpoint")
        self.scheduler = load_scheduler(base, args.prediction_type or trained.get("prediction_type") or "epsilon")
        self.unet, self.prompt_embedding = unet.to(self.device, dtype), self.prompt_embedding.to(self.device)
        self.vae = self.vae.to(self.device)
        self.factor, self.num_inference_steps, self.seed = vae_factor(self.vae), args.num_inference_steps, args.seed
        print(f"{weights} on {self.device}, {args.precision}, DDIM-{args.num_inference_steps}, base {base}, prompt {prompt!r}")

    def __call__(self, batch: list[tuple[Job, np.ndarray]]) -> None:
        """Translate images of one padded size and write every output of each, the EO image last."""
        import torch

        from cdiffset.diffusion import translate
        from cdiffset.uncertainty import confidence_map

        padded = np.stack([pad_to_multiple(pixels, self.factor) for _, pixels in batch])  # [B,H',W',3]
        sar = to_signed(torch.from_numpy(padded).permute(0, 3, 1, 2)).to(self.device)
        eo, sigma2 = translate(
            self.unet, self.vae, self.scheduler, sar, self.prompt_embedding, self.num_inference_steps, self.seed
        )  # [B,3,H',W'], [B,1,h,w]
        if not eo.isfinite().all():
            raise UserError("the translation is not finite: this precision does not suit the checkpoint, try --precision fp32")
        pictures, size = to_uint8(eo), tuple(eo.shape[-2:])
        for index, (job, pixels) in enumerate(batch):
            height, width = pixels.shape[:2]
            if job.variance:
                write_tiff(job.variance, upsample(sigma2[index], size)[:height, :width])
            if job.confidence:
                confidence = confidence_map(sigma2[index][None].cpu(), size)[0, 0, :height, :width]
                write_png(job.confidence, (confidence * 255).round().to(torch.uint8).numpy())
            write_png(job.eo, pictures[index, :height, :width])


def upsample(sigma2: torch.Tensor, size: tuple[int, int]) -> np.ndarray:
    """σ² of one image [1, h, w] => [H, W] float32: bicubic like the confidence map, kept within the range of σ²."""
    import torch

    upsampled = torch.nn.functional.interpolate(sigma2[None].float(), size, mode="bicubic", align_corners=False)[0, 0]
    return upsampled.clamp(sigma2.min().item(), sigma2.max().item()).cpu().numpy()


def pick_device(written: str | None) -> torch.device:
    import torch

    available = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(written or available)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device: {written!r} is not to be had here ({reason}), available: {available}") from error
    return device


def translate_all(translator: Translator, jobs: list[Job], batch_size: int, max_pixels: int) -> list[Job]:
    """Read, translate and write every job, batching images of one padded size => the jobs that failed."""
    failures, waiting = [], {}
    with tqdm(total=len(jobs), desc="translating", unit="image", mininterval=1) as bar:
        for job in jobs:
            try:
                pixels = read_sar(job.sar, max_pixels)
            except UserError as error:
                failures.append(job)
                bar.write(f"skipped: {error}", file=sys.stderr)
                bar.update()
                continue
            key = tuple(-(-side // translator.factor) for side in pixels.shape[:2])
            batch = waiting.setdefault(key, [])
            batch.append((job, pixels))
            if len(batch) == batch_size:
                translator(waiting.pop(key))
                bar.update(len(batch))
        for batch in waiting.values():
            translator(batch)
            bar.update(len(batch))
    return failures


if __name__ == "__main__":
    sys.exit(run(main))
