"""What there is to do in a folder: images and scenes, where their outputs go, and whose task each is. Imports no networks."""

from dataclasses import dataclass
from pathlib import Path

from cdiffset import ranks
from cdiffset.errors import Skipped, UserError
from cdiffset.inference.record import OutputRecord
from cdiffset.scenes import geotiff
from cdiffset.scenes.geotiff import find_sources, open_scene
from cdiffset.scenes.radiometry import RadiometryOptions, chosen_pixel_ratio, wanted_polarisations
from cdiffset.scenes.resampling import resampled_size

SUFFIXES = {  # of an image's outputs, in the order of writing; the EO image last, as it stands for a finished task
    "confidence": ".png", "variance": ".tif", "spread": ".tif", "error": ".tif", "error_view": ".png", "overlay": ".png",
    "eo": ".png",
}  # fmt: skip
SCENE_SUFFIXES = {kind: ".tif" for kind in SUFFIXES if kind != "error_view"}


@dataclass(frozen=True)
class Task:
    """One image or scene: where it comes from and where its outputs go, by what they hold; in the order of writing."""

    files: tuple[Path, ...]  # of a scene one for each polarisation, where they are separate
    outputs: dict[str, Path]
    is_scene: bool
    is_fused: bool  # a scene of more than one tile

    @property
    def sar(self) -> Path:
        return self.files[0]

    def is_done(self, records: dict[str, OutputRecord]) -> bool:
        """Whether all outputs are there, made with the settings of now, and no older than the files they were made of."""
        changed_ns = max(file.stat().st_mtime_ns for file in self.files)
        return all(records[kind].has(path) and path.stat().st_mtime_ns >= changed_ns for kind, path in self.outputs.items())


def source_folder(sar_dir: Path) -> Path:
    """--sar-dir, or where the one file lies that it names."""
    return sar_dir.parent if sar_dir.is_file() else sar_dir


def find_tasks(
    sar_dir: Path,
    folders: dict[str, Path],  # by what is wanted, keys of SUFFIXES
    scene_options: list[str],  # those given, which make a scene of every file
    tile: int,  # px
    radiometry: RadiometryOptions,
    meta: dict,  # the model's checkpoint.json
    skipped: Skipped,  # takes the files that cannot be translated
) -> list[Task]:
    """UserError where none can be, and where two inputs would have one output."""
    source, taken, tasks, faults = source_folder(sar_dir), {}, [], {}
    for name, relative in find_sources(sar_dir, wanted_polarisations(radiometry.bands)).items():
        stem, files = (source / name).with_suffix(""), tuple(source / file for file in relative)
        if (other := taken.setdefault(stem, name)) != name:
            raise UserError(f"--sar-dir: {other} and {name} would both become {name.with_suffix('.png')}: rename one")
        try:
            is_scene, is_fused = kind_of(files, scene_options, tile, radiometry, meta)
        except UserError as error:
            faults[files[0]] = error
            continue
        suffixes = SCENE_SUFFIXES if is_scene else SUFFIXES
        outputs = {kind: folders[kind] / name.with_suffix(suffix) for kind, suffix in suffixes.items() if kind in folders}
        tasks.append(Task(files, outputs, is_scene, is_fused))
    if not tasks:
        raise next(iter(faults.values()))
    for file, error in faults.items():
        skipped.add(file, error)
    return tasks


def kind_of(
    files: tuple[Path, ...], scene_options: list[str], tile: int, radiometry: RadiometryOptions, meta: dict
) -> tuple[bool, bool]:
    """=> (is a scene, is one of several tiles). UserError where a scene cannot be opened, or lacks what is asked for."""
    if files[0].suffix.lower() == ".npy" and scene_options:
        given = ", ".join(scene_options)
        raise UserError(f"{given}: {files[0]} is an array, read as it is: leave it out, or make it a GeoTIFF")
    if not (scene_options or len(files) > 1 or geotiff.is_scene(files[0], tile)):
        return False, False
    with open_scene(files, radiometry.max_pixels) as scene:
        return True, max(resampled_size(scene.shape, chosen_pixel_ratio(scene, radiometry, meta.get("gsd_m")))) > tile


def tasks_of_this_process(tasks: list[Task], folder: Path) -> list[Task]:
    """This process's part of all tasks, whether done or not: every process deals them out alike whenever it starts."""
    return [tasks[index] for index in ranks.share_by_rank([task.sar.relative_to(folder).as_posix() for task in tasks])]
