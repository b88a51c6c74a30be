"""From pairs of image files to discrepancy maps on disk: the model loaded once, then batch after batch."""

import sys
from argparse import Namespace
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdiffset.audit import residual_map, upsampled
from cdiffset.audit_report import map_path
from cdiffset.checkpoint import find_weights, load_unet, read_meta
from cdiffset.config import Config
from cdiffset.errors import UserError
from cdiffset.images import read_eo, read_sar, to_signed, write_tiff
from cdiffset.model import check_base, check_prompt_width, embed_prompt, load_scheduler, load_vae, vae_factor
from feeders.feeder import Pair


class Auditor:
    """Networks, scheduler and prompt embedding; called with images it returns their discrepancy maps."""

    def __init__(self, args: Namespace, config: Config, device: torch.device):
        """Base, prompt and prediction type are those of the options, else of the checkpoint's own record, else of `config`."""
        find_weights(Path(args.checkpoint).expanduser(), "--checkpoint")  # before the base model, which may be far away
        settings = {**asdict(config), **read_meta(args.checkpoint).get("config", {})}
        base, prompt, prediction_type = (
            settings[name] if (written := getattr(args, name)) is None else written
            for name in ("pretrained_model_name_or_path", "prompt", "prediction_type")
        )
        check_base(base)
        dtype = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[args.precision]
        self.vae = load_vae(base, dtype).to(device)
        unet, weights = load_unet(args.checkpoint, base, self.vae.config.latent_channels, "--checkpoint")
        prompt_embedding = embed_prompt(base, prompt)
        check_prompt_width(unet, prompt_embedding, base, "--checkpoint")
        self.unet, self.prompt_embedding = unet.to(device, dtype), prompt_embedding.to(device)
        self.scheduler = load_scheduler(base, prediction_type)
        self.device, self.factor, self.seed = device, vae_factor(self.vae), args.seed
        print(f"{weights} on {device}, {args.precision}, base {base}, prompt {prompt!r}")

    def __call__(self, sar: list[np.ndarray], eo: list[np.ndarray]) -> list[np.ndarray]:
        """Images [H, W, 3] in 0-255, of one padded size => a map [H, W] for each pair, float32, at least 0."""
        sar_batch, eo_batch = self.stack(sar), self.stack(eo)
        residual = residual_map(
            self.unet, self.vae, self.scheduler, sar_batch, eo_batch, self.prompt_embedding, seed=self.seed
        )  # [B,1,h,w]
        if not residual.isfinite().all():
            raise UserError("the residual is not finite: this precision does not suit the checkpoint, try --precision fp32")
        maps = upsampled(residual, tuple(sar_batch.shape[-2:]))[:, 0].cpu().numpy()  # [B,H',W']
        return [padded[: image.shape[0], : image.shape[1]] for padded, image in zip(maps, sar, strict=True)]

    def stack(self, images: list[np.ndarray]) -> torch.Tensor:
        """Images [H, W, 3] in 0-255 => [B, 3, H', W'] in [-1, 1], continued by reflection to multiples of the VAE's factor."""
        margins = [(-image.shape[0] % self.factor, -image.shape[1] % self.factor) for image in images]
        padded = [
            np.pad(image, ((0, below), (0, right), (0, 0)), mode="reflect")
            for image, (below, right) in zip(images, margins, strict=True)
        ]
        return to_signed(torch.from_numpy(np.stack(padded)).permute(0, 3, 1, 2)).to(self.device)


def write_maps(auditor: Auditor, pairs: list[Pair], output: Path, batch_size: int, skip_existing: bool) -> set[Pair]:
    """Write the map of every pair, batching pairs of one padded size => the pairs that could not be read."""
    todo = [pair for pair in pairs if not (skip_existing and map_path(output, pair).is_file())]
    if len(todo) < len(pairs):
        print(f"{len(pairs) - len(todo)} of {len(pairs)} maps are there already")
    failures, waiting = set(), {}
    with tqdm(total=len(todo), desc="auditing", unit="pair", mininterval=1) as bar:

        def work(batch: list[tuple[Pair, np.ndarray, np.ndarray]]) -> None:
            pairs, sar, eo = zip(*batch, strict=True)
            for pair, discrepancy in zip(pairs, auditor(list(sar), list(eo)), strict=True):
                write_tiff(map_path(output, pair), discrepancy)
            bar.update(len(batch))

        for pair in todo:
            try:
                sar, eo = read_pair(pair)
            except UserError as error:
                failures.add(pair)
                bar.write(f"skipped: {error}", file=sys.stderr)
                bar.update()
                continue
            key = tuple(-(-side // auditor.factor) for side in sar.shape[:2])
            waiting.setdefault(key, []).append((pair, sar, eo))
            if len(waiting[key]) == batch_size:
                work(waiting.pop(key))
        for batch in waiting.values():
            work(batch)
    return failures


def read_pair(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
    """=> SAR and EO [H, W, 3] in 0-255. UserError where one is unreadable or their sizes differ."""
    sar, eo = read_sar(pair.sar), read_eo(pair.eo)
    if sar.shape != eo.shape:
        sizes = [f"{image.shape[1]} x {image.shape[0]} px" for image in (sar, eo)]
        raise UserError(f"the images of a pair differ in size: SAR {pair.sar} is {sizes[0]}, EO {pair.eo} is {sizes[1]}")
    return sar, eo
