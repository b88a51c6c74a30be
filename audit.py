"""Which pairs of a dataset are misregistered, changed or mismatched, and where in them?

python audit.py --config configs/X.yaml --checkpoint work_dir/X/best --output audit/    (or --sar-dir SAR --eo-dir EO)
"""

import argparse
import os
import sys
from pathlib import Path

from cdiffset.config import Config, load_config
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import require_declared_range, require_writable
from cdiffset.inference.options import (
    MAX_SEED,
    add_eo_range,
    add_machine_options,
    add_model_options,
    check_limits,
    machine_settings,
    model_settings,
    recorded_settings,
)
from cdiffset.inference.record import OutputRecord


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Score every SAR-EO pair by how much its EO contradicts its SAR, and show where.",
        epilog="Further options go to --config, e.g. --train-feeder-args.dataroot DATA.",
        allow_abbrev=False,
    )
    group = parser.add_argument_group("files")
    group.add_argument("--config", metavar="YAML", help="audit the pairs of its feeder, whole images without augmentation")
    group.add_argument("--which", choices=("train", "test"), default="train", help="the feeder of --config [train]")
    group.add_argument("--sar-dir", type=Path, help="instead of --config: folder of SAR images, and")
    group.add_argument("--eo-dir", type=Path, help="folder of EO images of the same names; for changes, of another date")
    add_eo_range(group)
    group.add_argument("--output", type=Path, required=True, help="folder for maps, overlays, table, contact sheet and list")
    group.add_argument("--skip-existing", action="store_true", help="keep the maps that are there already, of equal settings")
    group = parser.add_argument_group("what to show and keep")
    group.add_argument("--top", type=int, default=100, help="pairs on the contact sheet [100]")
    group.add_argument("--boxes", type=int, default=5, help="regions to box, at most, in each pair [5]")
    group.add_argument(
        "--drop-fraction", type=float, default=0.05, help="fraction of the pairs to leave out of the kept list [0.05]"
    )
    group.add_argument("--max-score", type=float, help="instead of --drop-fraction: leave out the pairs that score above this")
    add_model_options(parser)
    add_machine_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where single pairs were skipped."""
    args, further = make_parser().parse_known_args(argv)
    config = check(args, further)
    machine, model = machine_settings(args), model_settings(args, config)
    from cdiffset.auditing import report as audit_report  # heavy imports, only once the options hold
    from cdiffset.auditing.auditor import Auditor, write_maps
    from cdiffset.inference.translator import load_checkpoint

    feeder, arguments, root = find_pairs(args, config)
    require_declared_range(feeder.pairs[0].eo, args.eo_range, "--eo-range", args.max_pixels)
    auditor = Auditor(load_checkpoint(model, machine), args.seed, machine.batch_size)
    settings = recorded_settings(model, machine) | {"seed": args.seed, "eo_range": args.eo_range}
    record = OutputRecord(args.output / audit_report.MAPS, settings, args.skip_existing)
    try:
        failures = write_maps(auditor, feeder.pairs, args.output, record, args.eo_range, args.max_pixels)
        pairs = [pair for pair in feeder.pairs if pair not in failures]
        if not pairs:
            raise UserError(f"none of the {len(failures)} pairs can be used, for the reasons above; one is {min(failures).eo}")
        findings = audit_report.write_findings(args.output, pairs, args.boxes, args.max_pixels, args.eo_range)
        audit_report.choose_kept(findings, args.drop_fraction, args.max_score)
        audit_report.write_table(args.output / "audit.csv", findings)
        audit_report.write_contact_sheet(args.output / "contact_sheet.html", findings, args.top)
        kept_list = args.output / f"kept_{args.which}.txt"  # feeders take the split from the list's name
        audit_report.write_kept_list(kept_list, feeder, root, findings)
    except OSError as error:
        raise UserError(f"cannot write the outputs: {error}") from error
    print(f"{len(findings)} pairs, {sum(finding.kept for finding in findings)} kept: see {args.output / 'contact_sheet.html'}")
    print(f"To train on the kept ones: {training_options(args.which, arguments, root, kept_list)}")
    if failures:
        names = ", ".join(str(pair.eo) for pair in sorted(failures)[:3])
        print(f"{len(failures)} of {len(feeder.pairs)} pairs skipped for the reasons above: {names}", file=sys.stderr)
    return 1 if failures else 0


def check(args: argparse.Namespace, further: list[str]) -> Config | None:
    """Options that make sense together => the configuration of --config, or None for two folders."""
    check_limits(args, {"top": (1, None), "boxes": (0, None), "drop_fraction": (0, 1), "seed": (0, MAX_SEED)})
    if args.config is None and further:
        raise UserError(f"{further[0]}: no such option; --help lists all")
    if (args.config is None) == (args.sar_dir is None) or (args.sar_dir is None) != (args.eo_dir is None):
        raise UserError("expected either --config, or --sar-dir and --eo-dir")
    for option, folder in (("--sar-dir", args.sar_dir), ("--eo-dir", args.eo_dir)):
        if folder is not None and not folder.is_dir():
            raise UserError(f"{option}: there is no folder {folder}")
        if folder is not None and folder.resolve() in (args.output.resolve(), *args.output.resolve().parents):
            raise UserError(f"--output: {args.output} lies in {option}, whose images would then include the overlays")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output: {args.output} is a file, expected a folder")
    require_writable("--output", args.output)
    if not args.config:
        return None
    return load_config(["--config", args.config, "--phase", "test" if args.which == "test" else "train", *further])


def find_pairs(args: argparse.Namespace, config: Config | None):
    """=> (the feeder of the pairs to audit, its arguments, the folder that the kept list is relative to)."""
    from feeders.feeder import PairedFolderFeeder, build_feeder

    if config is None:
        arguments = {"sar_dir": args.sar_dir, "eo_dir": args.eo_dir}
        feeder = PairedFolderFeeder(crop_size=1, split=args.which, **arguments)
    else:
        arguments = getattr(config, f"{args.which}_feeder_args")
        feeder = build_feeder(config, args.which)
    folders = {os.path.abspath(file.parent) for pair in feeder.pairs for file in (pair.sar, pair.eo)}
    root = arguments.get("dataroot") or os.path.commonpath(folders)
    return feeder, arguments, Path(root)


def training_options(which: str, arguments: dict, root: Path, kept_list: Path) -> str:
    """What main.py takes to use the kept list: a list in place of the list, or of the two folders."""
    options = {"listroot": kept_list}
    if "listroot" not in arguments:
        options = {**dict.fromkeys(arguments.keys() & {"sar_dir", "eo_dir"}, "null"), "dataroot": root, **options}
    words = [f"--{which}-feeder-args.{name} {value}" for name, value in sorted(options.items())]
    return " ".join(words if "listroot" in arguments else ["--feeder feeders.feeder.PairedFolderFeeder", *words])


if __name__ == "__main__":
    sys.exit(run(main))
