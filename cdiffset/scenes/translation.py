"""From SAR files to EO images and maps: images, scenes of one tile, and scenes of several."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from rasterio.windows import Window

from cdiffset.calibration.calibration import Calibration
from cdiffset.calibration.error_pictures import error_view, hatched, overlay
from cdiffset.errors import Skipped, UserError
from cdiffset.images import hidden_beside, read_sar_valid, write_png, write_tiff
from cdiffset.inference.batching import file_threads, skip_too_long, writing_behind
from cdiffset.inference.record import OutputRecord
from cdiffset.inference.translator import Translator, translate_files
from cdiffset.pipeline import Translation, image_noise, vae_factor
from cdiffset.scenes.fusion import (
    SceneInfo,
    inspect,
    maps_of,
    translate_scene,
    write_map,
    write_picture,
    write_views,
)
from cdiffset.scenes.geotiff import open_scene
from cdiffset.scenes.options import TILE, TileSettings
from cdiffset.scenes.radiometry import RadiometryOptions
from cdiffset.scenes.tasks import Task
from cdiffset.scenes.tiles import noise_field


@dataclass(frozen=True)
class Run:
    """What all tasks have in common."""

    translator: Translator
    tiles: TileSettings
    radiometry: RadiometryOptions
    calibration: Calibration | None  # where expected errors are wanted
    overlay_threshold: float | None  # expected error above which overlays are hatched, 8-bit units
    records: dict[str, OutputRecord]  # of the output folders, by what they hold

    def begin(self, task: Task) -> None:
        """To be called before a task's first output."""
        for kind in task.outputs:
            self.records[kind].write()

    def expected_error(self, translation: Translation) -> np.ndarray | None:
        return self.calibration and self.calibration.expected_error(translation.uncertainties)


def translate_tasks(run: Run, tasks: list[Task], skipped: Skipped) -> None:
    """Do the tasks; files that cannot be translated are skipped."""
    images = Images(run)
    translate_batched(images, [task for task in tasks if not task.is_scene], skipped)
    if images.incomplete:
        print(
            f"note: {len(images.incomplete)} images hold pixels that are no data (alpha, nodata, masks, NaN), which their PNGs "
            f"do not show; with a scene option, e.g. --tile {TILE}, they become GeoTIFFs with alpha: {min(images.incomplete)}"
        )
    translate_batched(WholeScenes(run), [task for task in tasks if task.is_scene and not task.is_fused], skipped)
    translate_fused(run, [task for task in tasks if task.is_fused], skipped)


def translate_batched(files: "Images | WholeScenes", tasks: list[Task], skipped: Skipped) -> None:
    """Tasks read, translated in batches of one size, and written meanwhile."""
    if not tasks:
        return
    translator = files.run.translator

    def skip(index: int, reason: object) -> None:
        skipped.add(tasks[index].sar, reason)

    def write(task: Task, translation: Translation) -> None:
        with skip_too_long(skipped, task.sar, task.sar):
            files.write(task, translation)

    with writing_behind(file_threads(translator.checkpoint.device)) as write_behind:
        for index, translation in translate_files(translator, tasks, skip, files.read, files.noise_of):
            files.run.begin(tasks[index])
            write_behind(write, tasks[index], translation)


@dataclass
class Images:
    """Images without a place on the ground, read and written as pictures."""

    run: Run
    incomplete: list[Path] = field(default_factory=list)  # with pixels that are no data
    noise_of = staticmethod(image_noise)

    def read(self, task: Task) -> tuple[np.ndarray]:
        """=> float32 [H, W, 3] in 0-255."""
        pixels, valid = read_sar_valid(task.sar, self.run.radiometry.max_pixels)
        if not valid.all():
            self.incomplete.append(task.sar)
        return (pixels,)

    def write(self, task: Task, translation: Translation) -> None:
        expected = self.run.expected_error(translation)
        for kind, path in task.outputs.items():
            match kind:
                case "error":
                    write_tiff(path, expected)
                case "error_view":
                    write_png(path, error_view(expected))
                case "overlay":
                    write_png(path, overlay(translation.eo, expected, self.run.overlay_threshold))
                case _:
                    (write_tiff if path.suffix == ".tif" else write_png)(path, getattr(translation, kind))


def place_noise(vae: AutoencoderKL, seed: int, images: Sequence[np.ndarray]) -> torch.Tensor:
    """The noise [B, C, h, w] of scenes that start at place 0, 0; `diffusion.image_noise` is its counterpart."""
    factor = vae_factor(vae)
    shapes = [[slice(0, -(-side // factor)) for side in pixels.shape[:2]] for pixels in images]
    return torch.from_numpy(np.stack([noise_field(seed, vae.config.latent_channels, *shape) for shape in shapes]))


@dataclass
class WholeScenes:
    """Scenes that fit into one tile: read and written as scenes, translated as images, from the noise of places."""

    run: Run
    infos: dict[Path, SceneInfo] = field(default_factory=dict)  # of scenes that have been read and not yet written
    noise_of = staticmethod(place_noise)

    def read(self, task: Task) -> tuple[np.ndarray]:
        """=> float32 [H, W, 3] in 0-255, on the grid that is translated."""
        with open_scene(task.files, self.run.radiometry.max_pixels) as scene:
            info = self.infos[task.sar] = inspect(scene, self.run.translator, self.run.tiles, self.run.radiometry)
            height, width = info.radiometry.size(scene)
            pixels, _ = info.radiometry.read(scene, Window(0, 0, width, height))
        return (np.ascontiguousarray(np.moveaxis(pixels, 0, -1)),)

    def write(self, task: Task, translation: Translation) -> None:
        info, maps, scratch = self.infos.pop(task.sar), translation.uncertainties, hidden_beside(task.outputs["eo"], "scene")
        scratch.mkdir(parents=True, exist_ok=True)
        pictures = {"eo": translation.eo}
        if "overlay" in task.outputs:
            expected = self.run.expected_error(translation)
            pictures["overlay"] = hatched(translation.eo, expected, self.run.overlay_threshold)
        with open_scene(task.files, self.run.radiometry.max_pixels) as scene:
            for kind, path in task.outputs.items():
                if kind in pictures:
                    write_picture(path, scratch, scene, info, [(0, np.moveaxis(pictures[kind], -1, 0))])
                else:
                    stacked = [(0, np.stack(list(maps.values())))]
                    write_map(path, scratch, scene, info, stacked, list(maps), maps_of(kind, self.run.calibration))
            write_views(task.outputs, scene, info)
        shutil.rmtree(scratch)


def translate_fused(run: Run, tasks: list[Task], skipped: Skipped) -> None:
    """Scenes of several tiles, one after the other."""
    batch_size = run.translator.batch_sizes(run.tiles.tile, run.tiles.tile) if tasks else 0
    for task in tasks:
        run.begin(task)
        try:
            with skip_too_long(skipped, task.sar, task.sar):
                translate_scene(
                    run.translator, task.files, task.outputs, run.tiles, batch_size, run.radiometry, run.calibration
                )
        except UserError as error:
            skipped.add(task.sar, error)
