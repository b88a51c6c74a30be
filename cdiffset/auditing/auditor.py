"""From pairs of image files to discrepancy maps on disk: the model loaded once, then batch after batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt

from cdiffset.auditing.report import MAPS, map_path
from cdiffset.auditing.residual import residual_map, upsampled
from cdiffset.errors import UserError
from cdiffset.images import read_sar_valid, write_tiff
from cdiffset.inference.batching import batches_of_one_size, skip_too_long
from cdiffset.inference.options import recorded_settings
from cdiffset.inference.record import Record
from cdiffset.inference.translator import Model
from cdiffset.pairing import Pair, read_unstretched_pair


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
    """Write the map of every pair, NaN where its EO does not count => the pairs that were skipped."""
    record = Record(output / MAPS, recorded_settings(auditor.args) | {"eo_range": auditor.args.eo_range})
    if skip_existing:
        record.require_same()
    todo = [pair for pair in pairs if not (skip_existing and record.has(map_path(output, pair)))]
    if len(todo) < len(pairs):
        print(f"{len(pairs) - len(todo)} of {len(pairs)} maps are there already")

    def read(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        most = auditor.args.max_pixels
        sar, eo, valid = read_unstretched_pair(pair, read_sar_valid(pair.sar, most), auditor.args.eo_range, most)
        return sar, continued(eo, valid), valid

    skipped: list[Pair] = []
    for indices, (sar, eo, valid) in batches_of_one_size(
        todo, read, auditor.factor, auditor.images_together, skipped, "auditing"
    ):
        for index, discrepancy, counted in zip(indices, auditor(sar, eo), valid, strict=True):
            record.write(skip_existing)
            with skip_too_long(todo[index], todo[index].eo, skipped):
                write_tiff(map_path(output, todo[index]), np.where(counted, discrepancy, np.float32(np.nan)))
    return skipped


def continued(pixels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3], each that is not valid [H, W] replaced by the nearest that is, so that no edge is seen there."""
    if valid.all():
        return pixels
    return pixels[tuple(distance_transform_edt(~valid, return_distances=False, return_indices=True))]
