"""Translate a folder of SAR images: python test.py --sar-dir SAR --output-dir EO --checkpoint work_dir/run/best

Every image under --sar-dir becomes an EO image of the same size and relative path; maps and overlays on request. GeoTIFFs
with a side above --tile are scenes: read and written by windows, into GeoTIFFs on their own grid (cdiffset/scene.py).
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cdiffset import calibration, processes
from cdiffset.errors import Parser, UserError, run
from cdiffset.geotiff import is_larger_than
from cdiffset.images import list_images, require_inside, require_utf8, write_png, write_tiff
from cdiffset.options import (
    add_scene_options,
    add_translation_options,
    begin_reading,
    calibrated_settings,
    check_scene_options,
    check_translation_options,
    recorded_settings,
)
from cdiffset.record import Record

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
    "calibration", "skip_existing", "follow_links", "checkpoint", "pretrained_model_name_or_path", "preset", "batch_size",
    "compile", "max_pixels", "device",
}  # fmt: skip
SCENE_KINDS = ("confidence", "variance", "error", "eo")  # what there is of a scene, all of it .tif
SCENE_READOUTS = ("midpoint", "mean", "first", "early", "late")  # the others need the whole latent at once


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Translate SAR images to EO images, with confidence maps.", allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument(
        "--sar-dir", type=Path, required=True, help="folder of SAR images, PNG, JPEG or TIFF, recursive, or one file"
    )
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
    group.add_argument("--follow-links", action="store_true", help="let symbolic links lead out of these folders")
    add_translation_options(parser)
    add_scene_options(parser)
    return parser


@dataclass(frozen=True)
class Job:
    """One image: where it comes from and where its outputs go, by what they hold; in the order of writing."""

    sar: Path
    outputs: dict[str, Path]
    is_scene: bool = False

    def is_done(self, records: dict[str, Record]) -> bool:
        return all(records[kind].has(path) for kind, path in self.outputs.items())


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where single images were skipped."""
    args = check(make_parser().parse_args(argv))
    known = load_calibration(args)
    jobs = make_jobs(
        args, [Path(args.sar_dir.name)] if args.sar_dir.is_file() else list_images(args.sar_dir, args.follow_links)
    )
    check_scenes(args, jobs)
    mine = my_share(args, jobs)
    records = make_records(args)
    if args.skip_existing:
        for record in {record.folder: record for record in records.values()}.values():
            record.require_same()
    todo = [job for job in mine if not (args.skip_existing and job.is_done(records))]
    if len(todo) < len(mine):
        print(f"{len(mine) - len(todo)} of {len(mine)} images are there already")
    failures = translate(args, todo, known, records) if todo else []
    return 1 if processes.total(len(failures)) else 0


def translate(
    args: argparse.Namespace, todo: list[Job], known: calibration.Calibration | None, records: dict[str, Record]
) -> list[Path]:
    """Load the networks and do the jobs => those images that were skipped."""
    with_fingerprint = known is not None or any(job.is_scene for job in todo)
    weights = begin_reading(args, with_fingerprint)
    from cdiffset.translator import Translator

    needing_variance = [option for option in ("--conf-dir", "--variance-dir") if folder_of(args, option)]
    if known and "variance" in known.curves:
        needing_variance.append("--calibration")
    translator = Translator(args, weights, needing_variance, with_fingerprint)
    if known and known.model != translator.fingerprint:
        raise UserError(f"--calibration: {calibration_path(args)} was made for another checkpoint, base model or prompt")

    def begin(job: Job) -> None:
        for kind in job.outputs:
            records[kind].write(args.skip_existing)

    started = time.monotonic()
    try:
        failures = translate_all(translator, [job for job in todo if not job.is_scene], args, known, begin)
        failures += translate_scenes(translator, [job for job in todo if job.is_scene], args, known, begin)
    except OSError as error:
        raise UserError(f"cannot write the outputs: {error}") from error
    seconds, (rank, count) = time.monotonic() - started, processes.place()
    done = sum(rank == 0 or not job.is_scene for job in todo) - len(failures)  # the first process counts the scenes of all
    whose = f"process {rank + 1} of {count}: " if count > 1 else ""
    print(f"{whose}{done} images translated in {seconds:.1f} s, {done / seconds:.2f} images/s, into {args.output_dir}")
    if failures:
        print(f"{len(failures)} skipped: {', '.join(str(path) for path in failures[:3])}", file=sys.stderr)
    return failures


def make_records(args: argparse.Namespace) -> dict[str, Record]:
    """For each kind of output the record of its folder: the settings that change what is in its files."""
    settings = {name: value for name, value in vars(args).items() if name not in UNRECORDED} | recorded_settings(args)
    more: dict[str, dict] = {}
    if args.error_dir or args.overlay_dir:
        calibrated = {"calibration": hashlib.sha256(calibration_path(args).read_bytes()).hexdigest()}
        more = {"--error-dir": calibrated, "--overlay-dir": calibrated | {"overlay_threshold": args.overlay_threshold}}
    wanted = [(option, kind, folder) for option, kind, _ in OUTPUTS if (folder := folder_of(args, option))]
    return {kind: Record(folder, settings | more.get(option, {})) for option, kind, folder in wanted}


def my_share(args: argparse.Namespace, jobs: list[Job]) -> list[Job]:
    """The images that fall to this process of a launcher, and the scenes, each of which all processes share.

    Taken of all jobs, whether done or not, so that every process deals them out alike whenever it starts.
    """
    folder = source_folder(args)
    images, scenes = ([job for job in jobs if job.is_scene is kind] for kind in (False, True))
    dealt = [images[index] for index in processes.share([job.sar.relative_to(folder).as_posix() for job in images])]
    return dealt + (scenes if processes.place()[0] == 0 or processes.can_talk() else [])


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
    if args.calibration and not (args.error_dir or args.overlay_dir):
        raise UserError("--calibration: it serves --error-dir and --overlay-dir, found neither")
    check_scene_options(args)
    check_translation_options(args)
    return args


def source_folder(args: argparse.Namespace) -> Path:
    """--sar-dir, or where the one file lies that it names."""
    return args.sar_dir.parent if args.sar_dir.is_file() else args.sar_dir


def check_scenes(args: argparse.Namespace, jobs: list[Job]) -> None:
    """Refuse what scenes do not have, before the networks are loaded."""
    scenes = [job for job in jobs if job.is_scene]
    if not scenes:
        return
    refused = [option for option in ("--overlay-dir", "--spread-dir") if folder_of(args, option)]
    refused += ["--ensemble"] if args.ensemble > 1 else []
    refused += [f"--scheduler {args.scheduler}"] if args.scheduler != "ddim" else []  # the others remember earlier steps
    refused += [f"--readout {args.readout}"] if args.readout not in SCENE_READOUTS else []
    if refused:
        raise UserError(
            f"{', '.join(refused)}: not to be had of scenes, and {scenes[0].sar} has a side above --tile {args.tile}: "
            f"leave it out, or raise --tile"
        )


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


def make_jobs(args: argparse.Namespace, images: list[Path]) -> list[Job]:
    """Relative image paths => jobs; two images that differ in suffix alone would overwrite each other and are refused."""
    wanted = [(folder, kind, suffix) for option, kind, suffix in OUTPUTS if (folder := folder_of(args, option))]
    jobs, taken = [], {}
    for image in images:
        if (other := taken.setdefault(image.with_suffix(""), image)) != image:
            raise UserError(f"--sar-dir: {other} and {image} would both become {image.with_suffix('.png')}: rename one")
        sar = source_folder(args) / image
        outputs = {kind: folder / image.with_suffix(suffix) for folder, kind, suffix in wanted}
        is_scene = is_larger_than(sar, args.tile)
        if is_scene:
            outputs = {kind: path.with_suffix(".tif") for kind, path in outputs.items() if kind in SCENE_KINDS}
        jobs.append(Job(sar, outputs, is_scene))
    for folder, kind, _ in wanted:  # a file that is itself a link is replaced, not written through
        require_inside(folder, {job.outputs[kind].parent for job in jobs if kind in job.outputs}, args.follow_links)
    return jobs


def translate_all(
    translator, jobs: list[Job], args: argparse.Namespace, known: calibration.Calibration | None, begin: Callable[[Job], None]
) -> list[Path]:
    """Read, translate and write every job => the images that were skipped. `begin(job)` comes before its first output."""
    if not jobs:
        return []
    from cdiffset.pipeline import WriteBehind, file_threads, skip_too_long
    from cdiffset.translator import translate_files

    skipped = []

    def write_or_skip(job: Job, translation) -> None:
        with skip_too_long(job.sar, job.sar, skipped):
            write(job, translation, known, args.overlay_threshold)

    with WriteBehind(file_threads(translator.device)) as later:
        for index, translation in translate_files(translator, [job.sar for job in jobs], skipped):
            begin(jobs[index])
            later(write_or_skip, jobs[index], translation)
    return skipped


def translate_scenes(
    translator, jobs: list[Job], args: argparse.Namespace, known: calibration.Calibration | None, begin: Callable[[Job], None]
) -> list[Path]:
    """Translate every scene => those that could not be read. Processes of a launcher share each scene; the first one tells."""
    if not jobs:
        return []
    from cdiffset.scene import gather_team, translate_scene

    args.batch_size = translator.images_together(args.tile, args.tile)
    team, unreadable = gather_team(translator), []
    if team.rank > 0:
        team.help()
        return []
    for job in jobs:
        begin(job)
        try:
            translate_scene(translator, team, job.sar, job.outputs, args, known)
        except UserError as error:
            print(f"skipped: {error}", file=sys.stderr)
            unreadable.append(job.sar)
    team.dismiss()
    return unreadable


def write(job: Job, translation, known: calibration.Calibration | None, threshold: float | None) -> None:
    """Write every wanted output of one image, in the job's order."""
    from cdiffset.overlay import error_view, overlay

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
