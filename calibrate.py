"""Fit the expected error to the maps: python calibrate.py --checkpoint work_dir/run/best --sar-dir SAR --eo-dir EO

Translates pairs that training has not seen and fits a monotone map from the variance (and, with --ensemble, the spread) to the
absolute error in 8-bit EO units. The JSON file that it writes beside the checkpoint is what `test.py --error-dir` reads.

The pairs are split by image, at random but fixed by --split-seed: half of them fit the curves, a quarter sets the widths of the
intervals (split conformal prediction), and the last quarter tests both; the numbers are printed and kept in the file.
"""

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from cdiffset.calibration import calibration
from cdiffset.calibration.calibration import LEVELS, Calibration
from cdiffset.errors import Parser, Skipped, UserError, run
from cdiffset.images import require_declared_range, require_writable
from cdiffset.inference.options import (
    add_eo_range,
    add_translation_options,
    calibrated_settings,
    machine_settings,
    model_settings,
    sampling_settings,
)
from cdiffset.scenes.radiometry import RadiometryOptions, read_whole

PARTS = {"fit": 0.5, "intervals": 0.25, "held_out": 0.25}
MIN_PAIRS = 4
MAX_PIXELS = 4_000_000  # of all images together; more are drawn from at random, equally from each image

Pixels = tuple[dict[str, np.ndarray], np.ndarray]  # maps by name, each [n], and the error [n]


class Drawn(NamedTuple):
    """Of one pair."""

    maps: dict[str, np.ndarray]  # [n] each
    error: np.ndarray  # [n]
    counted: float  # fraction of its pixels that count


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Calibrate the maps of a checkpoint to an expected error.", allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument("--sar-dir", type=Path, required=True, help="folder of SAR images, recursive")
    group.add_argument("--eo-dir", type=Path, required=True, help="the true EO images, same relative paths but for the suffix")
    add_eo_range(group)
    group.add_argument("--list", type=Path, help="text file of the pairs to take, a relative path per line [all]")
    group.add_argument("--output", type=Path, help="the JSON file [beside the checkpoint, where test.py looks for it]")
    group.add_argument("--split-seed", type=int, default=0, help="splits the pairs into fitting, intervals and testing [0]")
    add_translation_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Returns 0, or 1 where single pairs could not be used."""
    args = make_parser().parse_args(argv)
    check(args)
    sampling, machine, model = sampling_settings(args), machine_settings(args), model_settings(args)
    if model.source and not args.output:
        raise UserError(f"--output: expected a file, found none: {model.source} is from the Hub, nothing is written beside it")
    from cdiffset.checkpoint import recorded_base

    if recorded_base(model.checkpoint) == str(model.checkpoint) and not args.output:
        own = f"{model.checkpoint} is an exported pipeline, whose calibration its code holds as well"
        raise UserError(f"--output: expected a file, found none: {own}; then export the checkpoint with --calibration")
    output = args.output or calibration.path_beside(model.checkpoint)
    require_writable("--output", output.parent)
    pairs = find_pairs(args)
    from cdiffset.inference.translator import Translator, load_checkpoint

    needing_variance = ["calibrate.py without --ensemble"] if sampling.ensemble == 1 else []
    checkpoint = load_checkpoint(model, machine, needing_variance, with_fingerprint=True)
    translator = Translator(checkpoint, sampling, machine.batch_size)
    pixels, skipped = collect(translator, pairs, args.split_seed, args.eo_range, args.max_pixels)
    parts = split(len(pairs), args.split_seed)
    drawn = {part: joined([pixels[index] for index in chosen if index in pixels], part) for part, chosen in parts.items()}
    fitted = fit_calibration(drawn, calibrated_settings(sampling), checkpoint.fingerprint)
    fitted.report["images"] = {part: sum(index in pixels for index in chosen) for part, chosen in parts.items()}
    fitted.report["counted"] = float(np.mean([pixels[index].counted for index in pixels]))
    try:
        calibration.save(output, fitted)
    except OSError as error:
        raise UserError(f"--output: cannot write {output}: {error}") from error
    print(table(fitted), f"\nCalibration: {output}")
    if skipped:
        names = ", ".join(str(pair.eo) for pair in list(skipped)[:3])
        print(f"{len(skipped)} of {len(pairs)} pairs skipped for the reasons above: {names}", file=sys.stderr)
    return 1 if skipped else 0


def check(args: argparse.Namespace) -> None:
    for option, folder in (("--sar-dir", args.sar_dir), ("--eo-dir", args.eo_dir)):
        if not folder.is_dir():
            raise UserError(f"{option}: there is no folder {folder}")
    if args.split_seed < 0:
        raise UserError(f"--split-seed: expected at least 0, found {args.split_seed}")
    if args.output and args.output.is_dir():
        raise UserError(f"--output: {args.output} is a folder, expected a JSON file")


def find_pairs(args: argparse.Namespace) -> list:
    """The pairs of both folders, or those that --list names, in the order of their names."""
    from cdiffset.pairing import match_folders, read_list

    pairs = match_folders(args.sar_dir, args.eo_dir)
    if args.list:
        wanted = {str(Path(text).with_suffix("")): where for where, text in read_list(args.list, (".txt",))}
        if missing := wanted.keys() - {pair.name for pair in pairs}:
            name = min(missing)
            raise UserError(f"--list: {wanted[name]}: there is no pair {name!r} in {args.sar_dir} and {args.eo_dir}")
        pairs = [pair for pair in pairs if pair.name in wanted]
    if len(pairs) < MIN_PAIRS:
        raise UserError(f"--sar-dir, --eo-dir: expected at least {MIN_PAIRS} pairs to fit and to test, found {len(pairs)}")
    require_declared_range(pairs[0].eo, args.eo_range, "--eo-range", args.max_pixels)
    return pairs


def split(count: int, seed: int) -> dict[str, np.ndarray]:
    """Indices of `count` images for each of PARTS: disjoint, none empty, every image used."""
    order = np.random.default_rng(seed).permutation(count)
    ends = np.cumsum([max(1, int(count * fraction)) for fraction in list(PARTS.values())[1:]])
    intervals, held_out, fitted = np.split(order, ends)
    return {"fit": np.sort(fitted), "intervals": np.sort(intervals), "held_out": np.sort(held_out)}


def collect(
    translator, pairs: list, seed: int, eo_range: tuple[float, float] | None, max_pixels: int
) -> tuple[dict[int, Drawn], Skipped]:
    """Translate every pair => (what is drawn from the pixels of each that count, by its index; pairs that cannot be used)."""
    from cdiffset.inference.batching import batches_of_one_size, file_threads
    from cdiffset.pairing import read_unstretched_pair

    checkpoint = translator.checkpoint
    options = RadiometryOptions(max_pixels=max_pixels).completed(checkpoint.meta.get("radiometry"))

    def read(pair) -> tuple[np.ndarray, ...]:
        return read_unstretched_pair(pair, read_whole(pair.sar, options, checkpoint.meta), eo_range, max_pixels)

    pixels, skipped = {}, Skipped()

    def skip(index: int, reason: object) -> None:
        skipped.add(pairs[index], reason)

    batches = batches_of_one_size(
        pairs, read, checkpoint.factor, translator.batch_sizes, skip, "translating", file_threads(checkpoint.device)
    )
    for indices, (sar, *truths) in batches:
        for index, translation, eo, valid in zip(indices, translator(sar), *truths, strict=True):
            error = np.abs(translation.eo - eo).mean(-1, dtype=np.float64)[valid]
            drawn = np.random.default_rng([seed, index]).permutation(error.size)[: max(1, MAX_PIXELS // len(pairs))]
            maps = {name: values[valid][drawn] for name, values in translation.uncertainties.items()}
            pixels[index] = Drawn(maps, error[drawn], float(valid.mean()))
    return pixels, skipped


def joined(pixels: list[Drawn], part: str) -> Pixels:
    if not pixels:
        raise UserError(f"no pair is left for the part {part!r}: too few of them can be used")
    maps = {name: np.concatenate([each.maps[name] for each in pixels]).astype(np.float64) for name in pixels[0].maps}
    return maps, np.concatenate([each.error for each in pixels])


def fit_calibration(drawn: dict[str, Pixels], settings: dict, model: str) -> Calibration:
    """Each part does its own work: curves, intervals, test."""
    maps, error = drawn["fit"]
    curves, spread_weight, joint = calibration.fit(maps, error)
    scales = {name: float(error.mean() / calibration.magnitude(name, values).mean()) for name, values in maps.items()}
    bare = Calibration(settings, model, curves, spread_weight, joint)
    maps, error = drawn["intervals"]
    expected = bare.expected_error(maps)
    quantiles = {f"{level:g}": calibration.conformal_quantile(expected, error, level) for level in LEVELS}
    calibrated = Calibration(settings, model, curves, spread_weight, joint, quantiles)
    calibrated.report.update(calibration.evaluate(calibrated, scales, *drawn["held_out"]))
    calibrated.report["pixels"] = {part: len(errors) for part, (_, errors) in drawn.items()}
    return calibrated


def table(calibrated: Calibration) -> str:
    """What the held-out images say, as Markdown."""
    report = calibrated.report
    lines = [f"Held out: {report['images']['held_out']} images, mean absolute error {report['mean_error']:.2f} of 255", ""]
    lines += [f"Pixels of the true EO that count: {100 * report['counted']:.4g} %", ""]
    lines += ["| expected error | ENCE ↓ |", "|---|---|"]
    names = {"variance": "σ", "spread": "spread"}
    lines += [f"| {names[name]}, one global scale | {value:.3f} |" for name, value in report["ence_before"].items()]
    by = " and ".join(calibrated.curves) + (
        f" (weight of the spread {calibrated.spread_weight:g})" if len(calibrated.curves) > 1 else ""
    )
    lines += [
        f"| calibrated, by {by} | {report['ence_after']:.3f} |",
        "",
        "| interval | error at most | coverage |",
        "|---|---|---|",
    ]
    for level, coverage in report["coverage"].items():
        lines.append(f"| {float(level):.0%} | {calibrated.quantiles[level]:.2f} x expected | {coverage:.1%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run(main))
