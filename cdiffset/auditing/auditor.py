"""From pairs of image files to discrepancy maps on disk: the model loaded once, then batch after batch."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.ndimage import distance_transform_edt

from cdiffset.auditing.report import map_path
from cdiffset.auditing.residual import residual_map, upsampled
from cdiffset.errors import Skipped
from cdiffset.images import read_sar_valid, write_tiff
from cdiffset.inference.batching import batches_of_one_size, skip_too_long
from cdiffset.inference.record import OutputRecord
from cdiffset.inference.translator import BatchSizes, LoadedCheckpoint, require_finite
from cdiffset.pairing import Pair, read_unstretched_pair
from cdiffset.pipeline import stack_padded


class Auditor:
    """Called with a batch of pairs it returns their discrepancy maps."""

    def __init__(self, checkpoint: LoadedCheckpoint, seed: int, batch_size: int | None):
        self.checkpoint, self.seed = checkpoint, seed
        self.batch_sizes = BatchSizes(checkpoint, batch_size)

    def __call__(self, sar: Sequence[np.ndarray], eo: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Images [H, W, 3] in 0-255, of one padded size => a map [H, W] for each pair, float32, at least 0."""
        model = self.checkpoint
        sar_batch, eo_batch = (stack_padded(images, model.factor).to(model.device) for images in (sar, eo))
        residual = residual_map(
            model.unet, model.vae, model.scheduler, sar_batch, eo_batch, model.prompt_embedding, seed=self.seed
        )  # [B,1,h,w]
        require_finite(residual, "residual")
        maps = upsampled(residual, tuple(sar_batch.shape[-2:]))[:, 0].cpu().numpy()  # [B,H',W']
        return [padded[: image.shape[0], : image.shape[1]] for padded, image in zip(maps, sar, strict=True)]


def write_maps(
    auditor: Auditor,
    pairs: list[Pair],
    output: Path,
    record: OutputRecord,  # of the folder of the maps
    eo_range: tuple[float, float] | None,  # as for `images.read_unstretched_eo`
    max_pixels: int,
) -> Skipped:
    """Write the map of every pair, NaN where its EO does not count => the pairs that were skipped."""
    todo = [pair for pair in pairs if not (record.skip_existing and record.has(map_path(output, pair)))]
    if len(todo) < len(pairs):
        print(f"{len(pairs) - len(todo)} of {len(pairs)} maps are there already")

    def read(pair: Pair) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sar, eo, valid = read_unstretched_pair(pair, read_sar_valid(pair.sar, max_pixels), eo_range, max_pixels)
        return sar, continued(eo, valid), valid

    skipped = Skipped()

    def skip(index: int, reason: object) -> None:
        skipped.add(todo[index], reason)

    for indices, (sar, eo, valid) in batches_of_one_size(
        todo, read, auditor.checkpoint.factor, auditor.batch_sizes, skip, "auditing"
    ):
        for index, discrepancy, counted in zip(indices, auditor(sar, eo), valid, strict=True):
            record.write()
            with skip_too_long(skipped, todo[index], todo[index].eo):
                write_tiff(map_path(output, todo[index]), np.where(counted, discrepancy, np.float32(np.nan)))
    return skipped


def continued(pixels: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """Pixels [H, W, 3], each that is not valid [H, W] replaced by the nearest that is, so that no edge is seen there."""
    if valid.all():
        return pixels
    return pixels[tuple(distance_transform_edt(~valid, return_distances=False, return_indices=True))]
