"""Evaluate a folder of EO images, of any method: python evaluate.py --pred-dir EO --gt-dir EO_TRUE --output report

Writes report.html (to look at), report.md, report.json and metrics.csv (a line per image). With uncertainty maps it also
evaluates whether they predict the error.
"""

import argparse
import os
import sys
from pathlib import Path

from cdiffset.errors import Parser, UserError, run
from cdiffset.images import MAX_PIXELS, require_writable
from cdiffset.inference.options import check_limits, value_range

WORKERS = min(8, (os.cpu_count() or 1) // 2)


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Evaluate EO images and their uncertainty maps.", allow_abbrev=False)
    group = parser.add_argument_group("folders, matched by relative path without suffix")
    group.add_argument("--pred-dir", type=Path, required=True, help="EO images to evaluate")
    group.add_argument("--gt-dir", type=Path, required=True, help="true EO, centre-cropped where it is larger")
    group.add_argument("--sar-dir", type=Path, help="SAR, for the identity-collapse ratio and trivial baselines of the maps")
    group.add_argument("--variance-dir", type=Path, help="σ² in units of the latent, float32 TIFF, of test.py")
    group.add_argument("--error-dir", type=Path, help="expected absolute error in 8-bit units, float32 TIFF")
    group.add_argument("--ensemble-dir", type=Path, help="standard deviation over samples in 8-bit units, float32 TIFF")
    group.add_argument("--mask-dir", type=Path, help="known discrepancies: mask_sar_only/ and mask_eo_only/, 8-bit")
    group.add_argument("--split-list", type=Path, help="list of the images that count, as the feeders read them [all]")
    group = parser.add_argument_group("value ranges; nothing is stretched, alpha 0, nodata and NaN do not count")
    for name, what in (("pred", "--pred-dir"), ("gt", "--gt-dir")):
        group.add_argument(
            f"--{name}-range", type=value_range, metavar="LOW,HIGH",
            help=f"what black and white are in {what}, e.g. 0,1 or -1,1, where its files are deeper than 8 bits",
        )  # fmt: skip
    group = parser.add_argument_group("report")
    group.add_argument("--output", type=Path, required=True, help="folder of the report")
    group.add_argument("--baseline", type=Path, help="report.json of another method, to compare with image by image")
    group.add_argument("--strict", action="store_true", help="missing, extra, cropped or unreadable files are errors")
    group.add_argument(
        "--dino-weights", type=Path, help="also DINO similarity: folder of a DINOv3 ViT, e.g. dinov3-vitl16-pretrain-sat493m"
    )
    group.add_argument(
        "--no-networks", action="store_true", help="leave out LPIPS, DISTS, FID, KID, IS and SqueezeNet's distances"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, default=16, help="images of one size measured together [16]")
    group.add_argument("--num-workers", type=int, default=WORKERS, help=f"processes that read and rank [{WORKERS}]")
    group.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help=f"leave out images that claim more [{MAX_PIXELS}]")
    group.add_argument("--device", help="of the networks, e.g. cuda, cpu [cuda if there is one]")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where single pairs could not be evaluated."""
    args = make_parser().parse_args(argv)
    check_limits(args, {"batch_size": (1, None), "num_workers": (0, None), "max_pixels": (1, None)})
    for name in ("pred_dir", "gt_dir", "sar_dir", "variance_dir", "error_dir", "ensemble_dir", "mask_dir"):
        folder = getattr(args, name)
        if folder is not None and not folder.is_dir():
            raise UserError(f"--{name.replace('_', '-')}: there is no folder {folder}")
    if args.output.exists() and not args.output.is_dir():
        raise UserError(f"--output: {args.output} is a file, expected a folder")
    if args.mask_dir and not (args.variance_dir or args.error_dir or args.ensemble_dir):
        raise UserError("--mask-dir: it is for maps, expected --variance-dir, --error-dir or --ensemble-dir with it")
    if args.dino_weights and args.no_networks:
        raise UserError("--dino-weights: a network measures it, expected no --no-networks")
    require_writable("--output", args.output)
    from cdiffset.device import choose_device  # heavy imports, only once the arguments hold
    from cdiffset.evaluation.evaluate import evaluate_folders, fault_summary
    from cdiffset.evaluation.folders import EvaluationFolders

    device = choose_device(args.device, ("cuda", "cpu"))
    folders = EvaluationFolders(**{name: getattr(args, name) for name in EvaluationFolders.__dataclass_fields__})
    report = evaluate_folders(
        folders, args.output, device=device, batch_size=args.batch_size, num_workers=args.num_workers,
        networks=not args.no_networks, strict=args.strict, baseline=args.baseline, max_pixels=args.max_pixels,
        dino=args.dino_weights,
    )  # fmt: skip
    print((args.output / "report.md").read_text(encoding="utf-8"))
    print(f"To look at: {args.output / 'report.html'}")
    if report["faults"]:
        print(fault_summary(report["faults"]), file=sys.stderr)
    return 1 if report["faults"].keys() & {"size", "range", "empty", "unreadable"} else 0


if __name__ == "__main__":
    sys.exit(run(main))
