"""Scenes of any size: overlapping tiles fused at every denoising step, latents on disk, pixels by windows and strips.

Every tile of a step predicts from the same latents z_t of the whole scene, and the scene takes the weighted mean of the
predictions, after MultiDiffusion (Bar-Tal et al., ICML 2023). Encoding and decoding are fused in the same way. As DDIM is
linear in the prediction, no tile ever has a picture of its own, and there is nothing for seams to lie between.
"""

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path

import diffusers
import numpy as np
import torch
from rasterio.windows import Window
from tqdm import tqdm

from cdiffset.calibration.calibration import Calibration
from cdiffset.errors import UserError
from cdiffset.images import QUICKLOOK, hidden_beside, to_signed, write_png, write_text
from cdiffset.inference.translator import LoadedCheckpoint, OnProgress, Translator, require_finite
from cdiffset.pipeline import decode, encode, predict, to_uint8, variance, variance_weights
from cdiffset.scenes.geotiff import Scene, open_scene, quicklook, write_cog
from cdiffset.scenes.options import TileSettings
from cdiffset.scenes.qgis_style import write_style
from cdiffset.scenes.radiometry import Radiometry, RadiometryOptions, describe, measure, out_of_domain
from cdiffset.scenes.resampling import gsd_of, resample_strips
from cdiffset.scenes.slider_page import write_swipe
from cdiffset.scenes.tiles import Grid, fuse, make_grid, noise_field, strips

STRIP = 256  # rows of pixels written together
MARGIN = 3  # latent rows that bicubic interpolation may look at beyond its own


# ------------------------------------------------------------------------------------------------------ latents on disk
class DiskArray:
    """float32 [C, H, W] in a file, of which whole rows are read and written: by plain calls, so that memory and disk are
    reported as full as they are (pages of a memory map count as the process's, and a full disk ends it by a signal)."""

    def __init__(self, path: Path, shape: tuple[int, int, int]):
        self.path, self.shape = path, shape
        if not path.exists():
            with path.open("wb") as file:
                file.truncate(4 * math.prod(shape))

    def __len__(self) -> int:
        return self.shape[0]

    def read(self, rows: slice, channels: slice = np.s_[:]) -> np.ndarray:
        """=> [channels, rows, W]"""
        wanted = range(len(self))[channels]
        values = np.empty((len(wanted), rows.stop - rows.start, self.shape[2]), np.float32)
        with self.path.open("rb") as file:
            for channel, plane in zip(wanted, values, strict=True):
                file.seek(self._offset(channel, rows.start))
                if file.readinto(plane) < plane.nbytes:
                    raise OSError(f"{self.path} is shorter than it was written")
        return values

    def write(self, top: int, values: np.ndarray) -> None:
        with self.path.open("r+b") as file:
            for channel, plane in enumerate(values):
                file.seek(self._offset(channel, top))
                file.write(np.ascontiguousarray(plane, np.float32))

    def flush(self) -> None:
        with self.path.open("rb") as file:
            os.fsync(file.fileno())

    def _offset(self, channel: int, row: int) -> int:
        return 4 * self.shape[2] * (channel * self.shape[1] + row)


class Scratch:
    """Arrays in a folder, and how far they have come: a killed run goes on, unless it had other settings."""

    def __init__(self, folder: Path, made_with: dict, shapes: dict[str, tuple[int, int, int]]):
        self.folder, self.state = folder, folder / "state.json"
        self.key = hashlib.sha256(json.dumps(made_with, sort_keys=True).encode()).hexdigest()
        self.done = None  # or how many denoising steps are on disk
        paths = {name: folder / f"{name}.f32" for name in shapes}
        sizes = {path: 4 * math.prod(shapes[name]) for name, path in paths.items()}
        if self.state.is_file() and all(path.is_file() and path.stat().st_size == size for path, size in sizes.items()):
            state = json.loads(self.state.read_text())
            self.done = state["done"] if state["key"] == self.key else None
        if self.done is None:
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            size = sum(sizes.values())
            if shutil.disk_usage(folder).free < size:
                raise UserError(f"{folder}: the latents take {size / 2**30:.1f} GiB of disk, less than that is free")
        self.arrays = {name: DiskArray(paths[name], shape) for name, shape in shapes.items()}

    def finish(self, done: int, *names: str) -> None:
        """Up to `done` everything is on disk, the last of it in the arrays named."""
        for name in names:
            self.arrays[name].flush()
        write_text(self.state, json.dumps({"key": self.key, "done": done}))
        self.done = done


# ------------------------------------------------------------------------------------------------------- tiles, computed
@dataclass
class Tiles:
    """The tiles of a scene, which have numbers in the order of the grid, and how they are computed."""

    grid: Grid  # of latent cells
    batch_size: int
    device: torch.device
    bar: tqdm
    on_progress: OnProgress | None

    def run(self, compute: Callable, read: Callable) -> Iterator[np.ndarray]:
        """read(number) => arrays; then, tile by tile, what `compute` makes of them as batched tensors on the device."""
        count = len(self.grid.windows())
        for start in range(0, count, self.batch_size):
            numbers = range(start, min(start + self.batch_size, count))
            arrays = [np.stack(each) for each in zip(*map(read, numbers), strict=True)]
            with torch.no_grad():
                outputs = compute(*(torch.from_numpy(array).to(self.device) for array in arrays)).float().cpu()
            require_finite(outputs, "translation")
            yield from outputs.numpy()
            self.bar.update(len(numbers))
            if self.on_progress:
                self.on_progress(self.bar.n, self.bar.total)

    def window(self, number: int, factor: int = 1) -> tuple[slice, slice]:
        """Rows and columns of a tile, on a grid `factor` times as fine."""
        row, column = divmod(number, len(self.grid.lefts))
        starts = self.grid.tops[row], self.grid.lefts[column]
        return tuple(slice(factor * k, factor * (k + side)) for k, side in zip(starts, self.grid.tile, strict=True))


# ------------------------------------------------------------------------------------------------------ latents fused
TURNS = ("z_even", "z_odd")  # steps take turns with two files of z_t and, below it, the σ² read so far


def fuse_latents(translator: Translator, tiles: Tiles, read_pixels: Callable, scratch: Scratch) -> DiskArray:
    """All tiles of a step predict from the latents of the whole scene; the scene takes the mean of the predictions.

    => the scene's EO latent and, as the last channel, σ².
    """
    steps = translator.sampling.num_inference_steps
    translator.scheduler.set_timesteps(steps)
    if scratch.done is None:
        encode_scene(translator, tiles, read_pixels, scratch)
    for index in range(scratch.done, steps):
        denoise_step(translator, tiles, scratch, index)
        scratch.finish(index + 1, TURNS[(index + 1) % 2])
    return scratch.arrays[TURNS[steps % 2]]


def windows_of(tiles: Tiles, *parts: tuple[DiskArray, slice]) -> Callable[[int], tuple[np.ndarray, ...]]:
    """Arrays, each with the slice of its channels => reader of a tile of each; a row of tiles is read at once."""

    @lru_cache(maxsize=1)
    def read_rows(start: int, stop: int) -> list[np.ndarray]:
        return [array.read(slice(start, stop), channels) for array, channels in parts]

    def read(number: int) -> tuple[np.ndarray, ...]:
        rows, columns = tiles.window(number)
        return tuple(values[:, :, columns] for values in read_rows(rows.start, rows.stop))

    return read


def encode_scene(translator: Translator, tiles: Tiles, read_pixels: Callable, scratch: Scratch) -> None:
    """SAR pixels => z_sar; and the noise that z_t starts from."""
    z_sar, z_t, width = scratch.arrays["z_sar"], scratch.arrays[TURNS[0]], tiles.grid.width
    sigma = float(translator.scheduler.init_noise_sigma)
    for top, strip in strips(fuse(tiles.grid, tiles.run(partial(encode, translator.checkpoint.vae), read_pixels)), width):
        z_sar.write(top, strip)
        rows, columns = slice(top, top + strip.shape[1]), slice(0, width)
        noise = noise_field(translator.sampling.seed, len(strip), rows, columns) * sigma
        z_t.write(top, np.concatenate([noise, np.zeros_like(noise[:1])]))
    scratch.finish(0, "z_sar", TURNS[0])


def denoise_step(translator: Translator, tiles: Tiles, scratch: Scratch, index: int) -> None:
    """One step of the scheduler, from one file into the other."""
    z_sar, old, new = scratch.arrays["z_sar"], scratch.arrays[TURNS[index % 2]], scratch.arrays[TURNS[(index + 1) % 2]]
    channels, scheduler = len(z_sar), translator.scheduler
    timestep = scheduler.timesteps[index]
    weights = variance_weights(translator.variance_timesteps, scheduler.timesteps.tolist())
    weight = weights.get(index, 0.0) / max(sum(weights.values()), 1.0)
    predictions = tiles.run(
        partial(predict_tiles, translator.checkpoint, timestep), windows_of(tiles, (z_sar, slice(None)), (old, slice(channels)))
    )
    for top, strip in strips(fuse(tiles.grid, predictions), tiles.grid.width):
        before = old.read(slice(top, top + strip.shape[1]))
        prediction, z_t = (torch.from_numpy(values[None, :channels]) for values in (strip, before))
        before[:channels] = scheduler.step(prediction, timestep, z_t).prev_sample[0].numpy()
        if weight and len(strip) > channels:
            before[channels] += weight * strip[channels]
        new.write(top, before)


def predict_tiles(checkpoint: LoadedCheckpoint, timestep: torch.Tensor, z_sar: torch.Tensor, z_t: torch.Tensor) -> torch.Tensor:
    """Latents [B, C, h, w] twice => prediction [B, C, h, w], and from a stage 2 U-Net σ² as one more channel."""
    unet, dtype = checkpoint.unet, checkpoint.unet.dtype
    prediction, raw = predict(unet, z_sar.to(dtype), z_t.to(dtype), timestep, checkpoint.prompt_embedding.to(dtype))
    return prediction.float() if raw is None else torch.cat([prediction.float(), variance(raw)], dim=1)


# ------------------------------------------------------------------------------------------------------- reading, writing
def read_padded(scene: Scene, radiometry: Radiometry, rows: slice, columns: slice) -> np.ndarray:
    """A window that may end beyond the scene => [3, h, w] in 0-255, continued there by reflection as ordinary images are."""
    height, width = radiometry.size(scene)
    window = Window.from_slices((rows.start, min(rows.stop, height)), (columns.start, min(columns.stop, width)))
    pixels, _ = radiometry.read(scene, window)
    beyond = [(0, 0), (0, max(0, rows.stop - height)), (0, max(0, columns.stop - width))]
    return np.pad(pixels, beyond, mode="reflect")


def decoded_strips(checkpoint: LoadedCheckpoint, tiles: Tiles, latents: DiskArray) -> Iterator[tuple[int, np.ndarray]]:
    """EO latents, all but the last channel => (first row, uint8 [3, n, W']), the VAE's tiles fused."""
    grid, z_eo = tiles.grid.times(checkpoint.factor), windows_of(tiles, (latents, slice(0, -1)))
    pieces = fuse(grid, tiles.run(partial(decode, checkpoint.vae), z_eo))
    eight_bit = ((rows, columns, to_uint8(torch.from_numpy(piece)).transpose(2, 0, 1)) for rows, columns, piece in pieces)
    return strips(eight_bit, grid.width)


def onto_scene(
    scene: Scene, radiometry: Radiometry, translated: Iterator[tuple[int, np.ndarray]]
) -> Iterator[tuple[int, np.ndarray]]:
    """Strips of the grid that is translated, and what pads it => strips [C, n, W] of the scene's own, of at most STRIP rows."""
    size = radiometry.size(scene)
    if radiometry.pixel_ratio != (1, 1):
        back = tuple(1 / ratio for ratio in radiometry.pixel_ratio)
        yield from resample_strips(translated, size, back, scene.shape, STRIP)
        return
    for first, strip in translated:
        for top in range(0, min(strip.shape[1], size[0] - first), STRIP):
            yield first + top, strip[:, top : min(top + STRIP, size[0] - first), : size[1]]


def eo_strips(scene: Scene, radiometry: Radiometry, decoded: Iterator) -> Iterator[tuple[int, np.ndarray]]:
    """Decoded strips => (first row, uint8 RGBA [4, n, W]) of the scene's size, black and transparent where it is not valid."""
    for top, strip in onto_scene(scene, radiometry, decoded):
        valid = valid_rows(scene, radiometry, top, top + strip.shape[1])
        pixels = np.rint(strip).clip(0, 255).astype(np.uint8)  # resampling makes floats of them
        yield top, np.concatenate([pixels * valid, 255 * valid[None].astype(np.uint8)])


def valid_rows(scene: Scene, radiometry: Radiometry, top: int, bottom: int) -> np.ndarray:
    return scene.read(radiometry.indexes, Window(0, top, scene.width, bottom - top), radiometry.nodata)[1]


MapOf = Callable[[dict[str, np.ndarray]], np.ndarray]  # maps by name, each [n, W] => a map


def map_strips(
    scene: Scene, radiometry: Radiometry, translated: Iterator[tuple[int, np.ndarray]], names: Sequence[str], bands: list[MapOf]
) -> Iterator[tuple[int, np.ndarray]]:
    """Strips of maps [names, n, W'] => (first row, float32 [bands, n, W]): what `bands` make of the maps; NaN: nodata."""
    for top, values in onto_scene(scene, radiometry, translated):
        maps = dict(zip(names, values, strict=True))
        valid = valid_rows(scene, radiometry, top, top + values.shape[1])
        yield top, np.where(valid, np.stack([band(maps) for band in bands]), np.nan).astype(np.float32)


def variance_strips(sigma2: DiskArray, factor: int) -> Iterator[tuple[int, np.ndarray]]:
    """σ² [.., h, w], the last channel => (first row, [1, n, factor w]): bicubic within its range, as `variance_map`."""
    height, rows = sigma2.shape[1], STRIP // factor

    def read(start: int, stop: int) -> np.ndarray:
        return sigma2.read(slice(max(0, start), min(height, stop)), slice(-1, None))

    lows, highs = zip(*((part.min(), part.max()) for part in (read(k, k + rows) for k in range(0, height, rows))), strict=True)
    low, high = float(min(lows)), float(max(highs))
    for first in range(0, height, rows):
        coarse = torch.from_numpy(read(first - MARGIN, first + rows + MARGIN)[None])
        finer = torch.nn.functional.interpolate(coarse, scale_factor=factor, mode="bicubic", align_corners=False)
        offset = min(first, MARGIN) * factor
        strip = finer[0, :, offset : offset + min(rows, height - first) * factor]
        yield first * factor, strip.clamp(low, high).numpy()


def maps_of(kind: str, calibration: Calibration | None) -> dict[tuple[str, str], MapOf]:
    """The bands of a map: (name, unit) => what makes it of the maps of a translation."""
    variance = {("variance", "1"): lambda maps: maps["variance"]}
    expected = {} if calibration is None else {("expected error, 8-bit units", "DN"): calibration.expected_error}
    spread = {("spread, 8-bit units", "DN"): lambda maps: maps["spread"]}
    return {"confidence": variance | expected, "variance": variance, "spread": spread, "error": expected}[kind]


# ------------------------------------------------------------------------------------------------------ a scene's outputs
@dataclass(frozen=True)
class SceneInfo:
    """How a scene is read, and what its outputs say of it."""

    radiometry: Radiometry
    settings: dict  # all that the pixels depend on, besides the scene itself
    weights: str | None  # where they came from on the Hub
    gsd: tuple[float, float] | None  # metres down the rows, along the columns
    acquired: str | None  # ISO 8601
    warnings: list[str]  # what is far from the training images


def inspect(scene: Scene, translator: Translator, tiles: TileSettings, options: RadiometryOptions) -> SceneInfo:
    """Measure a scene, and print what was found."""
    checkpoint = translator.checkpoint
    radiometry, notes = measure(scene, options, checkpoint.meta)
    warnings = out_of_domain(scene, radiometry, options.gsd, checkpoint.meta)
    lines = [describe(scene, radiometry), *(f"note: {note}" for note in notes), *(f"WARNING: {each}" for each in warnings)]
    tqdm.write("\n".join(f"{scene.name}: {line}" for line in lines))
    settings = {
        "checkpoint": checkpoint.fingerprint, **asdict(translator.sampling), "precision": checkpoint.precision, **asdict(tiles),
        "prediction_type": translator.scheduler.config.prediction_type, "radiometry": asdict(radiometry),
    }  # fmt: skip
    gsd = (options.gsd, options.gsd) if options.gsd else gsd_of(scene)
    return SceneInfo(radiometry, settings, checkpoint.source, gsd, scene.acquired(), warnings)


def facts_of(scene: Scene, info: SceneInfo) -> dict[str, str]:
    """What a person wants to know of a scene's translation, for the page."""
    crs, gcps = scene.crs or scene.gcps[1], scene.gcps[0]
    georeference = "GCPs" if gcps else "RPCs" if scene.rpcs is not None and crs is None else "geotransform"
    named = crs.to_string() if crs else "none"
    radiometry, settings = info.radiometry, info.settings
    channels = [f"{k} ({name})" if (name := scene.descriptions[k - 1]) else str(k) for k in radiometry.indexes]
    stretch = ", ".join(f"{low:.4g} to {high:.4g}" for low, high in radiometry.limits)
    facts = {
        "scene": ", ".join(path.name for path in scene.paths),
        "size": f"{scene.width} x {scene.height} px",
        "CRS": f"{named if len(named) < 40 else crs.to_dict().get('proj', named)} ({georeference})" if crs else georeference,
        "GSD": " x ".join(dict.fromkeys(f"{each:.3g}" for each in info.gsd)) + " m" if info.gsd else None,
        "acquired": info.acquired,
        "bands": f"{', '.join(channels)}, as {radiometry.channels}",
        "scale and stretch": f"{radiometry.scale}, {stretch} => 0 to 255",
        "sampling": f"{settings['scheduler']} {settings['timestep_spacing']}, {settings['num_inference_steps']} steps, "
        f"seed {settings['seed']}, {settings['precision']}",
        "tiles": f"{settings['tile']} px, {settings['overlap']} px overlap",
        "checkpoint": settings["checkpoint"],
        "weights": info.weights,
        "far from the training images": "; ".join(info.warnings),
    }
    return {name: value for name, value in facts.items() if value}


def tags_of(scene: Scene, info: SceneInfo) -> dict[str, str]:
    units = [scene.units[k - 1] for k in info.radiometry.indexes]
    optional = {
        "CDIFFSET_WEIGHTS": info.weights,
        "CDIFFSET_ACQUIRED": info.acquired,
        "CDIFFSET_GSD_M": info.gsd and " ".join(f"{each:.6g}" for each in info.gsd),
        "CDIFFSET_SOURCE_UNITS": ", ".join(units) if all(units) else None,
        "CDIFFSET_OUT_OF_DOMAIN": "; ".join(info.warnings),
    }
    others = {name: value for name, value in info.settings.items() if name not in ("checkpoint", "radiometry")}
    return {
        "TIFFTAG_SOFTWARE": f"C-DiffSET, torch {torch.__version__}, diffusers {diffusers.__version__}",
        "CDIFFSET_SOURCE": ", ".join(path.name for path in scene.paths),
        "CDIFFSET_CHECKPOINT": info.settings["checkpoint"],
        "CDIFFSET_STRETCH": json.dumps(info.settings["radiometry"]),
        "CDIFFSET_SETTINGS": json.dumps(others),
    } | {name: value for name, value in optional.items() if value}


def write_map(
    path: Path, scratch: Path, scene: Scene, info: SceneInfo, translated: Iterable, names: Sequence[str], bands: dict
) -> None:
    """A float32 GeoTIFF of maps, and its style for QGIS; translated, names: as for `map_strips`; bands: `maps_of`."""
    maps = map_strips(scene, info.radiometry, translated, names, list(bands.values()))
    titles, units = zip(*bands, strict=True)
    write_cog(path, scratch, scene, titles, units, "float32", maps, tags_of(scene, info))
    write_style(path, units[0])


def write_picture(path: Path, scratch: Path, scene: Scene, info: SceneInfo, translated: Iterable) -> None:
    """An RGBA GeoTIFF of strips [3, n, W'] in 0-255."""
    pictures = eo_strips(scene, info.radiometry, translated)
    titles, units = ("red", "green", "blue", "alpha"), ("DN", "DN", "DN", "")
    write_cog(path, scratch, scene, titles, units, "uint8", pictures, tags_of(scene, info))


def write_views(outputs: dict[str, Path], scene: Scene, info: SceneInfo) -> None:
    """What is there to look at: a quicklook and the page with the slider."""
    write_png(outputs["eo"].with_suffix(QUICKLOOK), quicklook(outputs["eo"]))
    write_swipe(outputs, scene, info.radiometry, facts_of(scene, info), info.gsd and info.gsd[1])


# -------------------------------------------------------------------------------------------------------- one fused scene
def translate_scene(
    translator: Translator,
    files: Sequence[Path],
    outputs: dict[str, Path],
    settings: TileSettings,
    batch_size: int,  # tiles computed together
    options: RadiometryOptions,
    calibration: Calibration | None = None,
) -> None:
    """Translate a raster, or one for each polarisation, into GeoTIFFs on its own grid, the EO image last.

    outputs: "eo", and "confidence" (σ² and, given a calibration, the expected error), "variance" or "error".
    Continues where an earlier run was killed.
    """
    started, checkpoint = time.monotonic(), translator.checkpoint
    factor, channels = checkpoint.factor, checkpoint.vae.config.latent_channels
    with open_scene(files, options.max_pixels) as scene:
        info = inspect(scene, translator, settings, options)
        height, width = (-(-side // factor) for side in info.radiometry.size(scene))
        grid = make_grid(height, width, settings.tile // factor, settings.overlap // factor)
        origin = [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        made_with = {"origin": origin, "grid": grid, "settings": info.settings}
        shapes = {"z_sar": (channels, height, width)} | dict.fromkeys(TURNS, (channels + 1, height, width))
        scratch = Scratch(hidden_beside(outputs["eo"], "scene"), made_with, shapes)
        bar, megapixels = progress(scratch.done, translator.sampling.num_inference_steps, grid, scene, outputs["eo"].name)
        tiles = Tiles(grid, batch_size, checkpoint.device, bar, translator.on_progress)

        def read_pixels(number: int) -> tuple[np.ndarray]:
            return (to_signed(read_padded(scene, info.radiometry, *tiles.window(number, factor))),)

        with bar:
            try:
                latents = fuse_latents(translator, tiles, read_pixels, scratch)
                for kind, path in outputs.items():
                    if kind != "eo":
                        sigma2 = variance_strips(latents, factor)
                        write_map(path, scratch.folder, scene, info, sigma2, ["variance"], maps_of(kind, calibration))
                write_picture(outputs["eo"], scratch.folder, scene, info, decoded_strips(checkpoint, tiles, latents))
                write_views(outputs, scene, info)
            except UserError:  # the same again would end the same way
                shutil.rmtree(scratch.folder)
                raise
    shutil.rmtree(scratch.folder)
    seconds = time.monotonic() - started
    print(f"{files[0]}: {megapixels:.1f} Mpx in {seconds:.1f} s, {megapixels / seconds:.3f} Mpx/s, into {outputs['eo']}")


class Progress(tqdm):
    """A bar of tiles that says how many megapixels of the scene are finished per second, all steps counted."""

    per_tile = 0.0  # Mpx, of one of its steps

    @property
    def format_dict(self) -> dict:
        numbers = super().format_dict
        done = (numbers["n"] - (numbers["initial"] or 0)) * self.per_tile  # None where TQDM_DISABLE is set
        return numbers | {"postfix": f"{done / max(numbers['elapsed'], 1e-3):.3f} Mpx/s"}


def progress(done: int | None, steps: int, grid: Grid, scene: Scene, name: str) -> tuple[Progress, float]:
    """The bar over encoding, steps and decoding, set to what an earlier run has done (`done` steps, None: nothing); and the
    Mpx that are left to do, all steps counted.
    """
    count = len(grid.windows())
    initial, total = 0 if done is None else count * (done + 1), count * (steps + 2)
    bar = Progress(total=total, initial=initial, desc=name, unit="tile", mininterval=1)
    bar.per_tile = scene.height * scene.width / 1e6 / total
    if done is not None:
        bar.write(f"{name}: goes on after step {done} of {steps}")
    return bar, (total - initial) * bar.per_tile
