"""From pairs of image files to discrepancy maps on disk: the model loaded once, then batch after batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cdiffset.audit import residual_map, upsampled
from cdiffset.audit_report import MAPS, map_path
from cdiffset.errors import UserError
from cdiffset.images import read_eo, read_sar, write_tiff
from cdiffset.options import recorded_settings
from cdiffset.pipeline import batches_of_one_size, skip_too_long
from cdiffset.record import Record
from cdiffset.translator import Model
from feeders.feeder import Pair


class Auditor(Model):
    """Called with a batch of pairs it returns their discrepancy maps."""

    def __call__(self, sar: Sequence[np.ndarray], eo: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Images [H, W, 3] in 0-255, of one padded size => a map [H, W] for each pair, float32, at least 0."""
        sar_batch, eo_batch = self.stack(sar), self.stack(eo)
        residual = residual_map(
            self.unet, self.vae, self.scheduler, sar_batch, eo_batch, self.prompt_embedding, seed=self.args.seed
        )  # [B,1,h,w]
        if not residual.isfinite().all():
            raise UserError("the residual is not finite: this precision does not suit the checkpoint, try --precision fp32")
        maps = upsampled(residual, tuple(sar_batch.shape[-2:]))[:, 0].cpu().numpy()  # [B,H',W']
        return [padded[: image.shape[0], : image.shape[1]] for padded, image in zip(maps, sar, strict=True)]


def write_maps(auditor: Auditor, pairs: list[Pair], output: Path, skip_existing: bool) -> list[Pair]:
    """Write the map of every pair => the pairs that were skipped."""
    record = Record(output / MAPS, recorded_settings(auditor.args))
    if skip_existing:
        record.require_same()
    todo = [pair for pair in pairs if not (skip_existing and record.has(map_path(output, pair)))]
    if len(todo) < len(pairs):
        print(f"{len(pairs) - len(todo)} of {len(pairs)} maps are there already")

    def read(pair: Pair) -> tuple[np.ndarray, np.ndarray]:
        return read_pair(pair, auditor.args.max_pixels)

    skipped: list[Pair] = []
    for indices, (sar, eo) in batches_of_one_size(todo, read, auditor.factor, auditor.images_together, skipped, "auditing"):
        for index, discrepancy in zip(indices, auditor(sar, eo), strict=True):
            record.write(skip_existing)
            with skip_too_long(todo[index], todo[index].eo, skipped):
                write_tiff(map_path(output, todo[index]), discrepancy)
    return skipped


def read_pair(pair: Pair, max_pixels: int) -> tuple[np.ndarray, np.ndarray]:
    """=> SAR and EO [H, W, 3] in 0-255. UserError where one is unreadable or their sizes differ."""
    sar, eo = read_sar(pair.sar, max_pixels), read_eo(pair.eo, max_pixels)
    if sar.shape != eo.shape:
        sizes = [f"{image.shape[1]} x {image.shape[0]} px" for image in (sar, eo)]
        raise UserError(f"the images of a pair differ in size: SAR {pair.sar} is {sizes[0]}, EO {pair.eo} is {sizes[1]}")
    return sar, eo
