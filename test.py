"""Translate a folder of SAR images: python test.py --sar-dir SAR --output-dir EO --checkpoint work_dir/run/best

Every image under --sar-dir becomes an EO image of the same size and relative path; maps and overlays on request. Georeferenced
rasters of any size are scenes, and so are large TIFFs: they become GeoTIFFs on their own grid (cdiffset/scenes/fusion.py).
"""

import argparse
import hashlib
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cdiffset import ranks
from cdiffset.calibration import calibration
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import read_sar_valid, require_utf8, require_writable, write_png, write_tiff
from cdiffset.inference.options import (
    add_translation_options,
    begin_reading,
    calibrated_settings,
    check_translation_options,
    recorded_settings,
)
from cdiffset.inference.record import Record
from cdiffset.scenes.geotiff import find_sources, is_scene, open_scene
from cdiffset.scenes.options import TILE, add_scene_options, check_scene_options, radiometry_options, scene_options_given
from cdiffset.scenes.radiometry import RadiometryOptions, fits_one_tile, shared_stretch, wanted_polarisations

if TYPE_CHECKING:
    from cdiffset.inference.translator import Translator  # its libraries take seconds to import

OUTPUTS = (  # option, what it holds, suffix; in the order of writing, the EO image last: it stands for a finished job
    ("--conf-dir", "confidence", ".png"),
    ("--variance-dir", "variance", ".tif"),
    ("--spread-dir", "spread", ".tif"),
    ("--error-dir", "error", ".tif"),
    ("--error-dir", "error_view", ".png"),
    ("--overlay-dir", "overlay", ".png"),
    ("--output-dir", "eo", ".png"),
)
UNRECORDED = {  # options that change nothing in the files but rounding, or what `recorded_settings` and `make_records` add
    "sar_dir", "output_dir", "conf_dir", "variance_dir", "spread_dir", "error_dir", "overlay_dir", "overlay_threshold",
    "calibration", "skip_existing", "checkpoint", "pretrained_model_name_or_path", "preset", "batch_size", "compile",
    "max_pixels", "device", "scene_options",
}  # fmt: skip
SCENE_KINDS = ("confidence", "variance", "spread", "error", "overlay", "eo")  # what there is of a scene, all of it .tif


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Translate SAR images to EO images, with confidence maps.", allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument("--sar-dir", type=Path, required=True, help="folder of SAR images and scenes, recursive, or one file")
    group.add_argument(
        "--output-dir", type=Path, required=True, help="EO images, 8-bit PNG, same relative paths; of scenes .tif"
    )
    group.add_argument(
        "--conf-dir",
        type=Path,
        help="confidence maps, 8-bit PNG, each image on its own scale; of scenes variance, float32 TIFF",
    )
    group.add_argument("--variance-dir", type=Path, help="variance maps, float32 TIFF, on one scale for all images")
    group.add_argument(
        "--spread-dir", type=Path, help="standard deviation over the samples of --ensemble, float32 TIFF, 8-bit EO units"
    )
    group.add_argument(
        "--error-dir",
        type=Path,
        help="expected error by the calibration: float32 TIFF, 8-bit EO units, and PNG in colours from 0 to 64",
    )
    group.add_argument("--overlay-dir", type=Path, help="EO images, hatched where the expected error is above the threshold")
    group.add_argument("--overlay-threshold", type=float, metavar="X", help="for --overlay-dir, in 8-bit EO units (0-255)")
    group.add_argument("--calibration", type=Path, help="JSON file of calibrate.py [the one beside the checkpoint]")
    group.add_argument("--skip-existing", action="store_true", help="leave images alone whose outputs are all there")
    add_translation_options(parser)
    add_scene_options(parser)
    return parser


@dataclass(frozen=True)
class Job:
    """One image or scene: where it comes from and where its outputs go, by what they hold; in the order of writing."""

    files: tuple[Path, ...]  # of a scene one for each polarisation, where they are separate
    outputs: dict[str, Path]
    is_scene: bool = False
    is_fused: bool = False  # a scene of more than one tile

    @property
    def sar(self) -> Path:
        return self.files[0]

    def is_done(self, records: dict[str, Record]) -> bool:
        """Whether all outputs are there, made with the settings of now, and no older than the files they were made of."""
        changed_ns = max(file.stat().st_mtime_ns for file in self.files)
        return all(records[kind].has(path) and path.stat().st_mtime_ns >= changed_ns for kind, path in self.outputs.items())


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where single images were skipped."""
    args = check(make_parser().parse_args(argv))
    from cdiffset.checkpoint import read_meta  # a heavy import, only once the options hold

    known = load_calibration(args)
    trained = read_meta(args.checkpoint)
    radiometry = as_trained(radiometry_options(args), trained.get("radiometry") or {})
    jobs, faulty = make_jobs(args, radiometry, trained)
    check_fused(args, jobs)
    radiometry = with_shared_stretch(radiometry, jobs, trained)
    mine = jobs_of_this_process(args, jobs)
    records = make_records(args, radiometry)
    if args.skip_existing:
        for record in {record.folder: record for record in records.values()}.values():
            record.require_same()
    todo = [job for job in mine if not (args.skip_existing and job.is_done(records))]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} images are there already")
    failures = faulty + (translate(args, radiometry, todo, known, records) if todo else [])
    if failures:
        print(f"{len(failures)} skipped: {', '.join(str(path) for path in failures[:3])}", file=sys.stderr)
    return 1 if ranks.total_over_ranks(len(failures)) else 0


def translate(
    args: argparse.Namespace,
    radiometry: RadiometryOptions,
    todo: list[Job],
    known: calibration.Calibration | None,
    records: dict[str, Record],
) -> list[Path]:
    """Load the networks and do the jobs => those images that were skipped."""
    with_fingerprint = known is not None or any(job.is_scene for job in todo)
    weights = begin_reading(args, with_fingerprint)
    from cdiffset.inference.translator import Translator

    needing_variance = [option for option in ("--conf-dir", "--variance-dir") if folder_of(args, option)]
    if known and "variance" in known.curves:
        needing_variance.append("--calibration")
    translator = Translator(args, weights, needing_variance, with_fingerprint)
    if known and known.model != translator.fingerprint:
        raise UserError(f"--calibration: {calibration_path(args)} was made for another checkpoint, base model or prompt")

    shared = Shared(translator, args, radiometry, known, records)
    images, scenes, fused = (
        [job for job in todo if (job.is_scene, job.is_fused) == kind] for kind in ((False, False), (True, False), (True, True))
    )
    started = time.monotonic()
    try:
        failures = translate_images(shared, images) + translate_whole_scenes(shared, scenes) + translate_fused(shared, fused)
    except OSError as error:
        raise UserError(f"cannot write the outputs: {error}") from error
    seconds, (rank, count) = time.monotonic() - started, ranks.rank_and_world_size()
    done = len(todo) - len(failures)
    whose = f"process {rank + 1} of {count}: " if count > 1 else ""
    print(f"{whose}{done} images translated in {seconds:.1f} s, {done / seconds:.2f} images/s, into {args.output_dir}")
    return failures


def make_records(args: argparse.Namespace, radiometry: RadiometryOptions) -> dict[str, Record]:
    """For each kind of output the record of its folder: the settings that change what is in its files."""
    settings = vars(args) | asdict(radiometry) | recorded_settings(args)
    settings = {name: value for name, value in settings.items() if name not in UNRECORDED}
    more: dict[str, dict] = {}
    if args.error_dir or args.overlay_dir:
        calibrated = {"calibration": hashlib.sha256(calibration_path(args).read_bytes()).hexdigest()}
        more = {"--error-dir": calibrated, "--overlay-dir": calibrated | {"overlay_threshold": args.overlay_threshold}}
    wanted = [(option, kind, folder) for option, kind, _ in OUTPUTS if (folder := folder_of(args, option))]
    return {kind: Record(folder, settings | more.get(option, {})) for option, kind, folder in wanted}


def jobs_of_this_process(args: argparse.Namespace, jobs: list[Job]) -> list[Job]:
    """Of a launcher's processes each does its part of the images, and the first one all fused scenes.

    Taken of all jobs, whether done or not, so that every process deals them out alike whenever it starts.
    """
    folder = source_folder(args)
    images, fused = ([job for job in jobs if job.is_fused is kind] for kind in (False, True))
    own = [images[index] for index in ranks.share_by_rank([job.sar.relative_to(folder).as_posix() for job in images])]
    return own + fused if ranks.rank_and_world_size()[0] == 0 else own


def folder_of(args: argparse.Namespace, option: str) -> Path | None:
    return getattr(args, option[2:].replace("-", "_"))


def check(args: argparse.Namespace) -> argparse.Namespace:
    if not args.sar_dir.exists():
        raise UserError(f"--sar-dir: there is no folder or file {args.sar_dir}")
    require_utf8([args.sar_dir, args.output_dir])
    seen: dict[Path, str] = {}
    for option in dict.fromkeys(["--sar-dir", "--output-dir", *(option for option, _, _ in OUTPUTS)]):
        folder = folder_of(args, option)
        if option == "--sar-dir":
            folder = source_folder(args)
        if folder is not None and (earlier := seen.setdefault(folder.resolve(), option)) != option:
            raise UserError(f"{option}: {folder} is {earlier} already, expected a folder of its own")
        if folder is not None and args.sar_dir.is_dir() and args.sar_dir.resolve() in folder.resolve().parents:
            raise UserError(f"{option}: {folder} lies in --sar-dir, whose images would then include the results")
        if folder is not None and folder.exists() and not folder.is_dir():
            raise UserError(f"{option}: {folder} is a file, expected a folder")
    if args.spread_dir and args.ensemble < 2:
        raise UserError(f"--spread-dir: a spread takes --ensemble of at least 2, found {args.ensemble}")
    if (args.overlay_dir is None) != (args.overlay_threshold is None):
        raise UserError("--overlay-dir and --overlay-threshold, an expected error in 8-bit units, need each other: give both")
    if args.overlay_threshold is not None and not 0 <= args.overlay_threshold <= 255:
        raise UserError(f"--overlay-threshold: expected 0 to 255, in 8-bit units, found {args.overlay_threshold}")
    maps = [option for option, kind, _ in OUTPUTS if kind != "eo" and folder_of(args, option)]
    if args.readout and not set(maps) - {"--spread-dir"}:
        raise UserError(f"--readout {args.readout}: it changes maps alone, give --conf-dir or another folder of them")
    if args.ensemble > 1 and args.ensemble_output in (None, "first") and not maps:
        raise UserError(
            f"--ensemble {args.ensemble}: nothing shows it; give --ensemble-output mean or median, --spread-dir or other maps"
        )
    if args.calibration and not (args.error_dir or args.overlay_dir):
        raise UserError("--calibration: it serves --error-dir and --overlay-dir, found neither")
    args.scene_options = scene_options_given(args)
    check_scene_options(args)
    check_translation_options(args)
    if ranks.rank_and_world_size()[0] == 0:
        for option, folder in {option: folder for option, *_ in OUTPUTS if (folder := folder_of(args, option))}.items():
            require_writable(option, folder)
    return args


def source_folder(args: argparse.Namespace) -> Path:
    """--sar-dir, or where the one file lies that it names."""
    return args.sar_dir.parent if args.sar_dir.is_file() else args.sar_dir


def calibration_path(args: argparse.Namespace) -> Path:
    return args.calibration or calibration.path_beside(args.checkpoint)


def load_calibration(args: argparse.Namespace) -> calibration.Calibration | None:
    """The calibration that --error-dir and --overlay-dir need, before the networks are loaded."""
    if not (args.error_dir or args.overlay_dir):
        return None
    try:
        return calibration.load(calibration_path(args), calibrated_settings(args))
    except UserError as error:
        option = "--calibration" if args.calibration else "--error-dir" if args.error_dir else "--overlay-dir"
        raise UserError(f"{option}: {error}") from error


def as_trained(options: RadiometryOptions, recorded: dict[str, str]) -> RadiometryOptions:
    """What is not given on the command line as the checkpoint records it, which is said."""
    completed = options.completed(recorded)
    if taken := [f"--{name} {value}" for name, value in completed.kept().items() if getattr(options, name) is None]:
        shown = " ".join(taken)
        print(f"scenes are read as those of the checkpoint's training images, unless options say otherwise: {shown}")
    return completed


def make_jobs(args: argparse.Namespace, radiometry: RadiometryOptions, trained: dict) -> tuple[list[Job], list[Path]]:
    """=> (the jobs, files that cannot be translated, which are told), before the networks are loaded.

    UserError where none can be, and where two inputs would have one output.
    """
    folder, taken = source_folder(args), {}
    jobs, faults = [], {}
    for name, files in find_sources(args.sar_dir, wanted_polarisations(radiometry.bands)).items():
        stem = (folder / name).with_suffix("")
        if (other := taken.setdefault(stem, name)) != name:
            raise UserError(f"--sar-dir: {other} and {name} would both become {name.with_suffix('.png')}: rename one")
        try:
            jobs.append(make_job(args, radiometry, trained, name, tuple(folder / file for file in files)))
        except UserError as error:
            faults[folder / files[0]] = error
    if not jobs:
        raise next(iter(faults.values()))
    for error in faults.values():
        print(f"skipped: {error}", file=sys.stderr)
    return jobs, list(faults)


def make_job(
    args: argparse.Namespace, radiometry: RadiometryOptions, trained: dict, name: Path, files: tuple[Path, ...]
) -> Job:
    """UserError where a scene cannot be opened, or lacks what is asked for."""
    wanted = {
        kind: folder / name.with_suffix(suffix) for option, kind, suffix in OUTPUTS if (folder := folder_of(args, option))
    }
    if files[0].suffix.lower() == ".npy" and args.scene_options:
        raise UserError(
            f"{', '.join(args.scene_options)}: {files[0]} is an array, read as it is: leave it out, or make it a GeoTIFF"
        )
    if not (args.scene_options or len(files) > 1 or is_scene(files[0], args.tile)):
        return Job(files, wanted)
    with open_scene(files, args.max_pixels) as scene:
        is_fused = not fits_one_tile(scene, radiometry, trained, args.tile)
    outputs = {kind: wanted[kind].with_suffix(".tif") for kind in SCENE_KINDS if kind in wanted}
    return Job(files, outputs, is_scene=True, is_fused=is_fused)


def check_fused(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Refuse what scenes of several tiles do not have."""
    fused = [job for job in jobs if job.is_fused]
    refused = [option for option in ("--overlay-dir", "--spread-dir") if folder_of(args, option)]
    refused += ["--ensemble"] if args.ensemble > 1 else []
    refused += [f"--scheduler {args.scheduler}"] if args.scheduler != "ddim" else []  # the others remember earlier steps
    if fused and refused:
        raise UserError(
            f"{', '.join(refused)}: not available for scenes of more than one tile, and {fused[0].sar} has a side above --tile "
            f"{args.tile}: leave it out"
        )


def with_shared_stretch(radiometry: RadiometryOptions, jobs: list[Job], trained: dict) -> RadiometryOptions:
    """--stretch folder, measured over all scenes of the folder, whether they are done or not."""
    scenes = [job.files for job in jobs if job.is_scene]
    if radiometry.stretch != "folder" or not scenes:
        return radiometry
    stretch = shared_stretch(scenes, radiometry, trained)
    print(f"--stretch folder: {stretch} of {len(scenes)} scenes")
    return replace(radiometry, stretch=stretch)


@dataclass(frozen=True)
class Shared:
    """What all jobs of a run have in common."""

    translator: "Translator"
    args: argparse.Namespace
    radiometry: RadiometryOptions
    known: calibration.Calibration | None
    records: dict[str, Record]

    def begin(self, job: Job) -> None:
        """To be called before a job's first output."""
        for kind in job.outputs:
            self.records[kind].write(self.args.skip_existing)


def translate_images(shared: Shared, jobs: list[Job]) -> list[Path]:
    """Read, translate and write images => those that were skipped."""
    if not jobs:
        return []
    from cdiffset.inference.batching import WriteBehind, file_threads, skip_too_long
    from cdiffset.inference.translator import translate_files

    translator, args, skipped, incomplete = shared.translator, shared.args, [], []

    def read(job: Job) -> tuple:
        pixels, valid = read_sar_valid(job.sar, args.max_pixels)
        if not valid.all():
            incomplete.append(job.sar)
        return (pixels,)

    def write_or_skip(job: Job, translation) -> None:
        with skip_too_long(job, job.sar, skipped):
            write(job, translation, shared.known, args.overlay_threshold)

    with WriteBehind(file_threads(translator.device)) as later:
        for index, translation in translate_files(translator, jobs, skipped, read):
            shared.begin(jobs[index])
            later(write_or_skip, jobs[index], translation)
    if incomplete:
        print(
            f"note: {len(incomplete)} images hold pixels that are no data (alpha, nodata, masks, NaN), which their PNGs do not "
            f"show; with a scene option, e.g. --tile {TILE}, they become GeoTIFFs with alpha: {min(incomplete)}"
        )
    return [job.sar for job in skipped]


def translate_whole_scenes(shared: Shared, jobs: list[Job]) -> list[Path]:
    """Scenes of one tile, batched as images are => those that were skipped."""
    if not jobs:
        return []
    from cdiffset.inference.batching import WriteBehind, file_threads
    from cdiffset.scenes.fusion import WholeScenes

    scenes = WholeScenes(shared.translator, shared.args, shared.radiometry, shared.known)
    with WriteBehind(file_threads(shared.translator.device)) as later:
        for index, translation in scenes.translate([job.files for job in jobs]):
            shared.begin(jobs[index])
            later(scenes.write, index, translation, jobs[index].outputs)
    return [job.sar for job in jobs if job.files in scenes.skipped]


def translate_fused(shared: Shared, jobs: list[Job]) -> list[Path]:
    """Scenes of several tiles => those that were skipped."""
    if not jobs:
        return []
    from cdiffset.inference.batching import skip_too_long
    from cdiffset.scenes.fusion import translate_scene

    translator, args, skipped = shared.translator, shared.args, []
    args.batch_size = translator.images_together(args.tile, args.tile)
    for job in jobs:
        shared.begin(job)
        try:
            with skip_too_long(job.sar, job.sar, skipped):
                translate_scene(translator, job.files, job.outputs, args, shared.radiometry, shared.known)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            skipped.append(job.sar)
    return skipped


def write(job: Job, translation, known: calibration.Calibration | None, threshold: float | None) -> None:
    """Write every wanted output of one image, in the job's order."""
    from cdiffset.calibration.error_pictures import error_view, overlay

    expected = None if known is None else known.expected_error(translation.uncertainties)
    for kind, path in job.outputs.items():
        match kind:
            case "error":
                write_tiff(path, expected)
            case "error_view":
                write_png(path, error_view(expected))
            case "overlay":
                write_png(path, overlay(translation.eo, expected, threshold))
            case "variance" | "spread":
                write_tiff(path, getattr(translation, kind))
            case "eo" | "confidence":
                write_png(path, getattr(translation, kind))


if __name__ == "__main__":
    sys.exit(run(main))
