"""Scenes of any size: overlapping tiles fused at every denoising step, latents on disk, pixels by windows and strips.

Every tile of a step predicts from the same latents z_t of the whole scene, and the scene takes the weighted mean of the
predictions, after MultiDiffusion (Bar-Tal et al., ICML 2023). Encoding and decoding are fused in the same way. As DDIM is
linear in the prediction, no tile ever has a picture of its own, and there is nothing for seams to lie between.
"""

import argparse
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import diffusers
import numpy as np
import torch
from rasterio.io import DatasetReader
from rasterio.windows import Window
from tqdm import tqdm

from cdiffset.calibration import Calibration
from cdiffset.checkpoint import read_meta
from cdiffset.diffusion import predict
from cdiffset.errors import UserError
from cdiffset.geotiff import open_scene, write_cog, write_quicklook
from cdiffset.images import to_signed, to_uint8, written_whole
from cdiffset.losses import variance
from cdiffset.model import decode, encode
from cdiffset.radiometry import Radiometry, describe, measure, out_of_domain, read_valid
from cdiffset.readouts import steps_read
from cdiffset.resampling import resample_strips
from cdiffset.swipe import write_swipe
from cdiffset.translator import Model

NOISE_BLOCK = 64  # latent cells a side; part of what a seed means
STRIP = 256  # rows of pixels written together
MARGIN = 3  # latent rows that bicubic interpolation may look at beyond its own


# ------------------------------------------------------------------------------------------------------------ the tiles
class Grid(NamedTuple):
    """Tiles of one size that cover [height, width], row by row; they overlap by at least what was asked for."""

    height: int
    width: int
    tile: tuple[int, int]  # height, width
    tops: list[int]
    lefts: list[int]

    def windows(self) -> list[tuple[slice, slice]]:
        height, width = self.tile
        return [np.s_[top : top + height, left : left + width] for top in self.tops for left in self.lefts]

    def times(self, factor: int) -> "Grid":
        """The same tiles on a grid `factor` times as fine."""
        finer = ([factor * start for start in starts] for starts in (self.tops, self.lefts))
        return Grid(factor * self.height, factor * self.width, tuple(factor * side for side in self.tile), *finer)


def make_grid(height: int, width: int, tile: int, overlap: int) -> Grid:
    """Tiles of side `tile`, or of the scene's side where that is less, spread evenly."""
    sides = min(tile, height), min(tile, width)
    tops, lefts = (_starts(length, side, overlap) for length, side in zip((height, width), sides, strict=True))
    return Grid(height, width, sides, tops, lefts)


def _starts(length: int, side: int, overlap: int) -> list[int]:
    if length == side:
        return [0]
    steps = -(-(length - side) // (side - overlap))
    return [(length - side) * k // steps for k in range(steps + 1)]


def blending_weights(length: int, side: int, starts: list[int]) -> np.ndarray:
    """Weights [tiles, side] along one axis, float64: a raised cosine over each tile, and of all tiles at a place together 1."""
    window = np.sin(np.pi * (np.arange(side) + 0.5) / side) ** 2
    total = np.zeros(length)
    for start in starts:
        total[start : start + side] += window
    return np.stack([window / total[start : start + side] for start in starts])


def fuse(grid: Grid, tiles: Iterator[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
    """Tiles [C, th, tw] in the order of the grid => (first row, strip [C, n, W]) float32, when no further tile touches it.

    Summed in float64, so that tiles that agree give what they agree on to the last bit. At most one row of tiles is held.
    """
    (height, width), tiles = grid.tile, iter(tiles)
    down = blending_weights(grid.height, height, grid.tops)
    across = blending_weights(grid.width, width, grid.lefts)
    band = None
    for row, top in enumerate(grid.tops):
        for column, left in enumerate(grid.lefts):
            tile = next(tiles)
            if band is None:
                band = np.zeros((len(tile), height, grid.width))
            band[:, :, left : left + width] += tile * (down[row][:, None] * across[column])
        done = grid.tops[row + 1] - top if row + 1 < len(grid.tops) else height
        yield top, band[:, :done].astype(np.float32)
        band[:, : height - done] = band[:, done:]
        band[:, height - done :] = 0


def run_tiles(
    grid: Grid, read: Callable, compute: Callable[..., torch.Tensor], batch_size: int, device: torch.device, bar: tqdm
) -> Iterator[np.ndarray]:
    """For every tile: read(rows, columns) => arrays, batched for compute(*tensors) => [B, C, th, tw], given back one by one."""
    every = grid.windows()
    for first in range(0, len(every), batch_size):
        windows = every[first : first + batch_size]
        inputs = zip(*(read(*window) for window in windows), strict=True)
        outputs = compute(*(torch.from_numpy(np.stack(arrays)).to(device) for arrays in inputs))
        if not outputs.isfinite().all():
            raise UserError("the translation is not finite: this precision does not suit the checkpoint, try --precision fp32")
        yield from outputs.float().cpu().numpy()
        bar.update(len(windows))


def noise_field(seed: int, channels: int, rows: slice, width: int) -> np.ndarray:
    """Rows of the noise of a scene => float32 [C, n, width]; `rows` begins at a multiple of NOISE_BLOCK.

    Each block is drawn by the seed and its place alone (Philox, keyed by both): whatever the scene's size, a place gets the
    same noise.
    """
    side = NOISE_BLOCK
    noise = np.empty((channels, -(-(rows.stop - rows.start) // side) * side, -(-width // side) * side), np.float32)
    for top in range(0, noise.shape[1], side):
        for left in range(0, noise.shape[2], side):
            place = (rows.start + top) // side << 32 | left // side
            generator = np.random.Generator(np.random.Philox(key=np.array([seed, place], np.uint64)))
            noise[:, top : top + side, left : left + side] = generator.standard_normal((channels, side, side), np.float32)
    return noise[:, : rows.stop - rows.start, :width]


# ------------------------------------------------------------------------------------------------------ latents on disk
class Latents:
    """z_sar, and z_t with the summed σ² below it, in files that a killed run leaves whole: steps take turns with two files."""

    def __init__(self, folder: Path, channels: int, height: int, width: int, made_with: dict):
        key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
        self.state, self.key, self.done = folder / "state.json", key, None  # done: None, or the steps that are finished
        if self.state.is_file():
            state = json.loads(self.state.read_text())
            self.done = state["done"] if state["key"] == key else None
        if self.done is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            cells = 4 * height * width * (3 * channels + 2)
            if shutil.disk_usage(folder).free < cells:
                raise UserError(f"{folder}: the latents take {cells / 2**30:.1f} GiB of disk, less than that is free")
        sizes = {"z_sar": channels, "z_even": channels + 1, "z_odd": channels + 1}
        self.z_sar, *self.z_t = (
            np.lib.format.open_memmap(
                folder / f"{name}.npy", "w+" if self.done is None else "r+", np.float32, (count, height, width)
            )
            for name, count in sizes.items()
        )

    def finish(self, steps: int) -> None:
        """Everything up to `steps` steps is on disk."""
        for array in (self.z_sar, self.z_t[steps % 2]):
            array.flush()
        with written_whole(self.state) as temporary:
            temporary.write_text(json.dumps({"key": self.key, "done": steps}))
        self.done = steps


# ----------------------------------------------------------------------------------------------------- the three stages
def encode_scene(model: Model, source: DatasetReader, radiometry: Radiometry, grid: Grid, latents: Latents, bar: tqdm) -> None:
    """SAR pixels => z_sar; and the noise that z_t starts from."""

    def read(rows: slice, columns: slice) -> tuple[np.ndarray]:
        return (to_signed(read_padded(source, radiometry, rows, columns)),)

    def compute(pixels: torch.Tensor) -> torch.Tensor:
        return encode(model.vae, pixels)

    # The encoder's tiles are the latent ones in pixels; their results are latent again.
    pixels = run_tiles(grid.times(model.factor), read, compute, model.args.batch_size, model.device, bar)
    for top, strip in fuse(grid, pixels):
        latents.z_sar[:, top : top + strip.shape[1]] = strip
    channels, sigma = len(latents.z_sar), float(model.scheduler.init_noise_sigma)
    for top in range(0, grid.height, NOISE_BLOCK):
        rows = slice(top, min(top + NOISE_BLOCK, grid.height))
        latents.z_t[0][:channels, rows] = noise_field(model.args.seed, channels, rows, grid.width) * sigma
        latents.z_t[0][channels, rows] = 0
    latents.finish(0)


def read_padded(source: DatasetReader, radiometry: Radiometry, rows: slice, columns: slice) -> np.ndarray:
    """A window that may end beyond the scene => [3, h, w] in 0-255, continued there by reflection as ordinary images are."""
    height, width = radiometry.size(source)
    window = Window.from_slices((rows.start, min(rows.stop, height)), (columns.start, min(columns.stop, width)))
    pixels, _ = radiometry.read(source, window)
    beyond = [(0, 0), (0, max(0, rows.stop - height)), (0, max(0, columns.stop - width))]
    return np.pad(pixels, beyond, mode="reflect")


def denoise_scene(model: Model, grid: Grid, latents: Latents, bar: tqdm) -> None:
    """All DDIM steps that are still to do, each from one file into the other."""
    steps = model.args.num_inference_steps
    model.scheduler.set_timesteps(steps)
    read_at = steps_read(model.args.readout, steps)
    for index in range(latents.done, steps):
        denoise_step(model, grid, latents, index, index in read_at, bar)
        latents.finish(index + 1)


def denoise_step(model: Model, grid: Grid, latents: Latents, index: int, reads_variance: bool, bar: tqdm) -> None:
    old, new, channels = latents.z_t[index % 2], latents.z_t[(index + 1) % 2], len(latents.z_sar)
    timestep = model.scheduler.timesteps[index]
    prompt, dtype = model.prompt_embedding.to(model.unet.dtype), model.unet.dtype

    def read(rows: slice, columns: slice) -> tuple[np.ndarray, np.ndarray]:
        return latents.z_sar[:, rows, columns], old[:channels, rows, columns]

    def compute(z_sar: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
        prediction, raw = predict(model.unet, z_sar.to(dtype), z_t.to(dtype), timestep, prompt)
        return prediction.float() if raw is None else torch.cat([prediction.float(), variance(raw)], dim=1)

    for top, strip in fuse(grid, run_tiles(grid, read, compute, model.args.batch_size, model.device, bar)):
        rows = slice(top, top + strip.shape[1])
        prediction, z_t = torch.from_numpy(strip[None, :channels]), torch.from_numpy(np.array(old[None, :channels, rows]))
        new[:channels, rows] = model.scheduler.step(prediction, timestep, z_t).prev_sample[0].numpy()
        new[channels, rows] = old[channels, rows] + (strip[channels] if reads_variance and len(strip) > channels else 0)


def decode_scene(model: Model, grid: Grid, z_eo: np.ndarray, bar: tqdm) -> Iterator[tuple[int, np.ndarray]]:
    """EO latents [C, h, w] => strips (first row, float32 [3, n, W'] in [-1, 1])."""

    def read(rows: slice, columns: slice) -> tuple[np.ndarray]:
        return (z_eo[:, rows, columns],)

    def compute(latents: torch.Tensor) -> torch.Tensor:
        return decode(model.vae, latents)

    yield from fuse(grid.times(model.factor), run_tiles(grid, read, compute, model.args.batch_size, model.device, bar))


# ---------------------------------------------------------------------------------------------------------- the outputs
def onto_scene(
    source: DatasetReader, radiometry: Radiometry, strips: Iterator[tuple[int, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Strips of the grid that is translated, and what pads it => strips [C, n, W] of the scene's own, of at most STRIP rows."""
    size = radiometry.size(source)
    if radiometry.steps != (1, 1):
        back = tuple(1 / step for step in radiometry.steps)
        yield from resample_strips(strips, size, back, source.shape, STRIP)
        return
    for first, strip in strips:
        for top in range(0, min(strip.shape[1], size[0] - first), STRIP):
            yield first + top, strip[:, top : min(top + STRIP, size[0] - first), : size[1]]


def eo_strips(source: DatasetReader, radiometry: Radiometry, decoded: Iterator) -> Iterator[tuple[int, np.ndarray]]:
    """Decoded strips => (first row, uint8 RGBA [4, n, W]) of the scene's size, black and transparent where it is not valid."""
    for top, strip in onto_scene(source, radiometry, decoded):
        pixels = to_uint8(torch.from_numpy(strip))
        valid = valid_rows(source, radiometry.indexes, top, top + strip.shape[1])
        yield top, np.concatenate([np.moveaxis(pixels, -1, 0) * valid, 255 * valid[None].astype(np.uint8)])


def valid_rows(source: DatasetReader, indexes: tuple[int, ...], top: int, bottom: int) -> np.ndarray:
    return read_valid(source, indexes, Window(0, top, source.width, bottom - top))[1]


def map_strips(
    source: DatasetReader, radiometry: Radiometry, sigma2: np.ndarray, factor: int, known: list[Calibration | None]
) -> Iterator[tuple[int, np.ndarray]]:
    """σ² [h, w] => (first row, float32 [bands, n, W]): σ² where `known` is None, else the expected error by it; NaN: nodata."""
    for top, (values,) in onto_scene(source, radiometry, variance_strips(sigma2, factor)):
        bands = [values if each is None else each.expected_error({"variance": values}) for each in known]
        valid = valid_rows(source, radiometry.indexes, top, top + len(values))
        yield top, np.where(valid, np.stack(bands), np.nan).astype(np.float32)


def variance_strips(sigma2: np.ndarray, factor: int) -> Iterator[tuple[int, np.ndarray]]:
    """σ² [h, w] => (first row, [1, n, factor w]): bicubic within the scene's range of σ², as `uncertainty.variance_map`."""
    low, high = float(sigma2.min()), float(sigma2.max())
    rows = STRIP // factor
    for first in range(0, len(sigma2), rows):
        last = min(first + rows, len(sigma2))
        start, stop = max(0, first - MARGIN), min(len(sigma2), last + MARGIN)
        around = torch.from_numpy(np.array(sigma2[None, None, start:stop]))
        finer = torch.nn.functional.interpolate(around, scale_factor=factor, mode="bicubic", align_corners=False)
        yield first * factor, finer[0, :, (first - start) * factor : (last - start) * factor].clamp(low, high).numpy()


def maps_of(kind: str, known: Calibration | None) -> dict[str, Calibration | None]:
    """The bands of a map: name => None for σ², or what makes the expected error of it."""
    expected = {} if known is None else {"expected error, 8-bit units": known}
    return {"confidence": {"variance": None} | expected, "variance": {"variance": None}, "error": expected}[kind]


# -------------------------------------------------------------------------------------------------------- one whole scene
def translate_scene(model: Model, path: Path, outputs: dict[str, Path], options: argparse.Namespace, known=None) -> None:
    """Translate a GeoTIFF into GeoTIFFs on its own grid, the EO image last; continues where an earlier run was killed.

    outputs: "eo", and "confidence" (σ² and, given the Calibration `known`, the expected error), "variance" or "error".
    """
    started = time.monotonic()
    scratch = outputs["eo"].with_name(f".{outputs['eo'].stem}.scene")
    with open_scene(path, options.max_pixels) as source:
        trained = read_meta(model.args.checkpoint)
        radiometry = measure(source, options, trained)
        warnings = out_of_domain(source, radiometry, options.gsd, trained)
        print("\n".join([f"{path}: {describe(source, radiometry)}", *(f"{path}: WARNING: {each}" for each in warnings)]))
        settings = settings_of(model, options, radiometry)
        height, width = (-(-side // model.factor) for side in radiometry.size(source))
        grid = make_grid(height, width, options.tile // model.factor, options.overlap // model.factor)
        origin = [str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns, *grid]
        made_with = {"origin": origin, "settings": settings}
        latents = Latents(scratch, model.vae.config.latent_channels, height, width, made_with)
        steps = model.args.num_inference_steps
        with tqdm(total=len(grid.windows()) * (steps + 2), desc=path.name, unit="tile", mininterval=1) as bar, torch.no_grad():
            try:
                if latents.done is None:
                    encode_scene(model, source, radiometry, grid, latents, bar)
                else:
                    bar.update(len(grid.windows()) * (latents.done + 1))
                    bar.write(f"{path}: goes on after step {latents.done} of {steps}")
                denoise_scene(model, grid, latents, bar)
                write_outputs(model, source, radiometry, grid, latents, outputs, known, tags_of(settings, warnings), bar)
            except UserError:  # the same again would end the same way
                shutil.rmtree(scratch)
                raise
    shutil.rmtree(scratch)
    seconds, megapixels = time.monotonic() - started, source.height * source.width / 1e6
    print(f"{path}: {megapixels:.1f} Mpx in {seconds:.1f} s, {megapixels / seconds:.3f} Mpx/s, into {outputs['eo']}")


def write_outputs(model, source, radiometry, grid, latents, outputs, known, tags: dict[str, str], bar: tqdm) -> None:
    scratch = latents.state.parent
    z_eo, summed = latents.z_t[latents.done % 2][:-1], latents.z_t[latents.done % 2][-1]
    reads = len(steps_read(model.args.readout, model.args.num_inference_steps))
    for kind, path in outputs.items():
        if kind != "eo":
            bands = maps_of(kind, known)
            strips = map_strips(source, radiometry, summed / reads, model.factor, list(bands.values()))
            write_cog(path, scratch, source, list(bands), "float32", strips, tags)
    strips = eo_strips(source, radiometry, decode_scene(model, grid, z_eo, bar))
    write_cog(outputs["eo"], scratch, source, ("red", "green", "blue", "alpha"), "uint8", strips, tags)
    write_quicklook(outputs["eo"].with_suffix(".quicklook.png"), outputs["eo"])
    write_swipe(outputs, source, radiometry, tags)


def settings_of(model: Model, options: argparse.Namespace, radiometry: Radiometry) -> dict:
    """All that the pixels depend on, besides the scene itself."""
    names = ("seed", "num_inference_steps", "readout", "precision", "tile", "overlap")
    return {
        "checkpoint": model.fingerprint, **{name: getattr(options, name) for name in names},
        "prediction_type": model.scheduler.config.prediction_type, "radiometry": asdict(radiometry),
    }  # fmt: skip


def tags_of(settings: dict, warnings: list[str]) -> dict[str, str]:
    return {
        "TIFFTAG_SOFTWARE": f"C-DiffSET, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "CDIFFSET_CHECKPOINT": settings["checkpoint"],
        "CDIFFSET_STRETCH": json.dumps(settings["radiometry"]),
        "CDIFFSET_SETTINGS": json.dumps(
            {name: settings[name] for name in settings if name not in ("checkpoint", "radiometry")}
        ),
    } | ({"CDIFFSET_OUT_OF_DOMAIN": "; ".join(warnings)} if warnings else {})
