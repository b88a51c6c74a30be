"""Translate a folder of SAR images: python test.py --sar-dir SAR --output-dir EO --checkpoint work_dir/run/best

Every image under --sar-dir becomes an EO image of the same size and relative path; maps and overlays on request. Georeferenced
rasters of any size are scenes, and so are large TIFFs: they become GeoTIFFs on their own grid (cdiffset/scenes/fusion.py).
"""

import argparse
import hashlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cdiffset import ranks
from cdiffset.calibration.calibration import Calibration, path_beside
from cdiffset.calibration.calibration import load as load_calibration
from cdiffset.errors import Parser, Skipped, UserError, run
from cdiffset.images import require_utf8, require_writable
from cdiffset.inference.options import (
    MachineSettings,
    ModelSettings,
    SamplingSettings,
    add_translation_options,
    calibrated_settings,
    machine_settings,
    model_settings,
    recorded_settings,
    sampling_settings,
)
from cdiffset.inference.record import OutputRecord
from cdiffset.scenes.options import (
    TileSettings,
    add_scene_options,
    radiometry_options,
    scene_options_given,
    tile_settings,
)
from cdiffset.scenes.radiometry import RadiometryOptions, shared_stretch
from cdiffset.scenes.tasks import Task, find_tasks, source_folder, tasks_of_this_process

FOLDER_OPTIONS = {  # of what there is to write, see tasks.SUFFIXES
    "eo": "--output-dir", "confidence": "--conf-dir", "variance": "--variance-dir", "spread": "--spread-dir",
    "error": "--error-dir", "error_view": "--error-dir", "overlay": "--overlay-dir",
}  # fmt: skip


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Translate SAR images to EO images, with confidence maps.", allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument("--sar-dir", type=Path, required=True, help="folder of SAR images and scenes, recursive, or one file")
    group.add_argument("--output-dir", type=Path, required=True, help="EO images, 8-bit PNG, same relative paths; scenes .tif")
    group.add_argument(
        "--conf-dir", type=Path, help="confidence maps, 8-bit PNG, each on its own scale; of scenes variance, float32 TIFF"
    )
    group.add_argument("--variance-dir", type=Path, help="variance maps, float32 TIFF, on one scale for all images")
    group.add_argument(
        "--spread-dir", type=Path, help="standard deviation over the samples of --ensemble, float32 TIFF, 8-bit EO units"
    )
    group.add_argument(
        "--error-dir", type=Path, help="expected error, calibrated: float32 TIFF, 8-bit EO units, and PNG in colours of 0 to 64"
    )
    group.add_argument("--overlay-dir", type=Path, help="EO images, hatched where the expected error is above the threshold")
    group.add_argument("--overlay-threshold", type=float, metavar="X", help="for --overlay-dir, in 8-bit EO units (0-255)")
    group.add_argument("--calibration", type=Path, help="JSON file of calibrate.py [the one beside the checkpoint]")
    group.add_argument("--skip-existing", action="store_true", help="leave images alone whose outputs are all there")
    add_translation_options(parser)
    add_scene_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where single images were skipped."""
    skipped = translate(make_parser().parse_args(argv))
    if skipped:
        print(f"{len(skipped)} skipped: {', '.join(str(path) for path in list(skipped)[:3])}", file=sys.stderr)
    return 1 if ranks.total_over_ranks(len(skipped)) else 0


def translate(args: argparse.Namespace, load: Callable | None = None, on_progress: Callable | None = None) -> Skipped:
    """All that the command does => the files that were skipped.

    load: in place of `translator.load_checkpoint`, e.g. one that keeps what it has loaded; on_progress: see `Translator`.
    """
    check(args)
    settings = settings_of(args)
    if ranks.rank_and_world_size()[0] == 0:
        for option, folder in output_folders(args).items():
            require_writable(option, folder)
    from cdiffset.checkpoint import read_meta  # a heavy import, only once the options hold

    calibration, meta = find_calibration(args, settings), read_meta(settings.model.checkpoint)
    settings = replace(settings, radiometry=as_trained(settings.radiometry, meta.get("radiometry") or {}))
    folders = {kind: folder for kind, option in FOLDER_OPTIONS.items() if (folder := output_folders(args).get(option))}
    skipped = Skipped()
    tasks = find_tasks(
        args.sar_dir, folders, scene_options_given(args), settings.tiles.tile, settings.radiometry, meta, skipped
    )
    check_fused(args, settings, tasks)
    settings = replace(settings, radiometry=with_folder_stretch(settings.radiometry, tasks, meta))
    records = make_records(args, settings)
    own = tasks_of_this_process(tasks, source_folder(args.sar_dir))
    todo = [task for task in own if not (args.skip_existing and task.is_done(records))]
    if len(todo) < len(own):
        print(f"{len(own) - len(todo)} of {len(own)} images are there already")
    if todo:
        from cdiffset.inference.translator import Translator, load_checkpoint
        from cdiffset.scenes.translation import Run

        with_fingerprint = calibration is not None or any(task.is_scene for task in todo)
        checkpoint = load_networks(args, settings, calibration, with_fingerprint, load or load_checkpoint)
        translator = Translator(checkpoint, settings.sampling, settings.machine.batch_size, on_progress)
        run = Run(translator, settings.tiles, settings.radiometry, calibration, args.overlay_threshold, records)
        do_tasks(run, todo, skipped, args.output_dir)
    return skipped


# ------------------------------------------------------------------------------------------------------ what is asked for
def check(args: argparse.Namespace) -> None:
    """UserError where folders or options do not go together."""
    check_folders(args)
    maps = output_folders(args).keys() - {"--output-dir"}
    if args.spread_dir and args.ensemble < 2:
        raise UserError(f"--spread-dir: a spread takes --ensemble of at least 2, found {args.ensemble}")
    if (args.overlay_dir is None) != (args.overlay_threshold is None):
        raise UserError("--overlay-dir and --overlay-threshold, an expected error in 8-bit units, need each other: give both")
    if args.overlay_threshold is not None and not 0 <= args.overlay_threshold <= 255:
        raise UserError(f"--overlay-threshold: expected 0 to 255, in 8-bit units, found {args.overlay_threshold}")
    if args.readout and not maps - {"--spread-dir"}:
        raise UserError(f"--readout {args.readout}: it changes maps alone, give --conf-dir or another folder of them")
    if args.ensemble > 1 and args.ensemble_output in (None, "first") and not maps:
        raise UserError(
            f"--ensemble {args.ensemble}: nothing shows it; give --ensemble-output mean or median, --spread-dir or other maps"
        )
    if args.calibration and not (args.error_dir or args.overlay_dir):
        raise UserError("--calibration: it serves --error-dir and --overlay-dir, found neither")


def check_folders(args: argparse.Namespace) -> None:
    if not args.sar_dir.exists():
        raise UserError(f"--sar-dir: there is no folder or file {args.sar_dir}")
    require_utf8([args.sar_dir, args.output_dir])
    taken = {source_folder(args.sar_dir).resolve(): "--sar-dir"}
    for option, folder in output_folders(args).items():
        if (other := taken.setdefault(folder.resolve(), option)) != option:
            raise UserError(f"{option}: {folder} is {other} already, expected a folder of its own")
        if args.sar_dir.is_dir() and args.sar_dir.resolve() in folder.resolve().parents:
            raise UserError(f"{option}: {folder} lies in --sar-dir, whose images would then include the results")
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{option}: {folder} is a file, expected a folder")


def output_folders(args: argparse.Namespace) -> dict[str, Path]:
    """The folders that are wanted, by option."""
    options = FOLDER_OPTIONS.values()
    return {option: folder for option in options if (folder := getattr(args, option[2:].replace("-", "_")))}


@dataclass(frozen=True)
class Settings:
    """All that the outputs depend on besides the SAR files."""

    model: ModelSettings
    machine: MachineSettings
    sampling: SamplingSettings
    tiles: TileSettings
    radiometry: RadiometryOptions


def settings_of(args: argparse.Namespace) -> Settings:
    tiles, sampling, machine = tile_settings(args), sampling_settings(args), machine_settings(args)
    return Settings(model_settings(args), machine, sampling, tiles, radiometry_options(args))


def calibration_path(args: argparse.Namespace, settings: Settings) -> Path:
    return args.calibration or path_beside(settings.model.checkpoint)


def find_calibration(args: argparse.Namespace, settings: Settings) -> Calibration | None:
    """The calibration that --error-dir and --overlay-dir need, before the networks are loaded."""
    if not (args.error_dir or args.overlay_dir):
        return None
    try:
        return load_calibration(calibration_path(args, settings), calibrated_settings(settings.sampling))
    except UserError as error:
        option = "--calibration" if args.calibration else "--error-dir" if args.error_dir else "--overlay-dir"
        raise UserError(f"{option}: {error}") from error


def make_records(args: argparse.Namespace, settings: Settings) -> dict[str, OutputRecord]:
    """For each kind of output the record of its folder: the settings that change what is in its files."""
    recorded = recorded_settings(settings.model, settings.machine)
    recorded |= asdict(settings.sampling) | asdict(settings.tiles) | asdict(settings.radiometry)
    del recorded["max_pixels"]  # which files are read, not how
    by_option = {}
    for option, folder in output_folders(args).items():
        own = {}
        if option in ("--error-dir", "--overlay-dir"):
            own["calibration"] = hashlib.sha256(calibration_path(args, settings).read_bytes()).hexdigest()
        if option == "--overlay-dir":
            own["overlay_threshold"] = args.overlay_threshold
        by_option[option] = OutputRecord(folder, recorded | own, args.skip_existing)
    return {kind: by_option[option] for kind, option in FOLDER_OPTIONS.items() if option in by_option}


def as_trained(options: RadiometryOptions, recorded: dict[str, str]) -> RadiometryOptions:
    """What is not given on the command line as the checkpoint records it, which is reported."""
    completed = options.completed(recorded)
    if taken := [f"--{name} {value}" for name, value in completed.kept().items() if getattr(options, name) is None]:
        shown = " ".join(taken)
        print(f"scenes are read as those of the checkpoint's training images, unless options say otherwise: {shown}")
    return completed


def with_folder_stretch(options: RadiometryOptions, tasks: list[Task], meta: dict) -> RadiometryOptions:
    """--stretch folder, measured over all scenes of the folder, whether they are done or not."""
    scenes = [task.files for task in tasks if task.is_scene]
    if options.stretch != "folder" or not scenes:
        return options
    stretch = shared_stretch(scenes, options, meta)
    print(f"--stretch folder: {stretch} of {len(scenes)} scenes")
    return replace(options, stretch=stretch)


def check_fused(args: argparse.Namespace, settings: Settings, tasks: list[Task]) -> None:
    """Refuse what scenes of several tiles do not have."""
    fused, sampling = [task for task in tasks if task.is_fused], settings.sampling
    refused = [option for option in ("--overlay-dir", "--spread-dir") if option in output_folders(args)]
    refused += ["--ensemble"] if sampling.ensemble > 1 else []
    refused += [f"--scheduler {sampling.scheduler}"] if sampling.scheduler != "ddim" else []  # others remember earlier steps
    if fused and refused:
        raise UserError(
            f"{', '.join(refused)}: not available for scenes of more than one tile, and {fused[0].sar} has a side above --tile "
            f"{settings.tiles.tile}: leave it out"
        )


def load_networks(
    args: argparse.Namespace, settings: Settings, calibration: Calibration | None, with_fingerprint: bool, load: Callable
):
    """The checkpoint, loaded. UserError where it lacks what is asked for, or the calibration was made for another."""
    needing_variance = [option for option in ("--conf-dir", "--variance-dir") if option in output_folders(args)]
    if calibration and "variance" in calibration.curves:
        needing_variance.append("--calibration")
    checkpoint = load(settings.model, settings.machine, needing_variance, with_fingerprint)
    if calibration and calibration.model != checkpoint.fingerprint:
        path = calibration_path(args, settings)
        raise UserError(f"--calibration: {path} was made for another checkpoint, base model or prompt")
    return checkpoint


def do_tasks(run, todo: list[Task], skipped: Skipped, output_dir: Path) -> None:
    """run: a `scenes.translation.Run`."""
    from cdiffset.scenes.translation import translate_tasks

    started, before = time.monotonic(), len(skipped)
    try:
        translate_tasks(run, todo, skipped)
    except OSError as error:
        raise UserError(f"cannot write the outputs: {error}") from error
    seconds, done = time.monotonic() - started, len(todo) - (len(skipped) - before)
    rank, world_size = ranks.rank_and_world_size()
    whose = f"process {rank + 1} of {world_size}: " if world_size > 1 else ""
    print(f"{whose}{done} images translated in {seconds:.1f} s, {done / seconds:.2f} images/s, into {output_dir}")


if __name__ == "__main__":
    sys.exit(run(main))
