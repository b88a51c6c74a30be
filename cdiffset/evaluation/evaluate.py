"""Folder against folder: pairs -> a row of metrics per image -> the report; what evaluate.py and phase test both call."""

import csv
import hashlib
import io
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

import utils
from cdiffset.errors import UserError
from cdiffset.evaluation.baselines import pooled_measures
from cdiffset.evaluation.folders import FAULTS, MAPS, EvaluationFolders, EvaluationPairs
from cdiffset.evaluation.report import render_html, render_markdown
from cdiffset.images import MAX_PIXELS, write_text

RESAMPLES = 2000  # of the bootstrap
INTERVAL = (2.5, 97.5)  # percentiles
EXAMPLES = 3  # best, median and worst images shown, each
COLLAPSE = ("8-bit/mae_sar", "8-bit/mae")
PICTURE_PX = 512  # longer sides of example pictures are reduced
BATCH_PX = 2**24  # of all images of a batch
SHOWN = 3  # how many of many faulty files a message names


def evaluate_folders(
    folders: EvaluationFolders,
    output: Path,
    *,
    device: torch.device | str = "cpu",
    batch_size: int = 16,
    num_workers: int = 0,
    networks: bool = True,  # False: leave out what a network measures
    strict: bool = False,  # any fault is an error
    baseline: Path | None = None,  # report.json of another method on the same images
    max_pixels: int = MAX_PIXELS,  # larger images are unreadable
    dino: Path | None = None,  # folder of DINOv3's weights
    run: dict | None = None,  # what made the pictures: dataset, checkpoint, iterations
) -> dict:
    """Evaluate the folders and write report.json, report.md, report.html and metrics.csv to `output` => report.json's content.

    Batch size, workers and the order of files do not change the numbers beyond rounding. UserError where nothing is left to
    evaluate, or for any fault when `strict`.
    """
    other = None if baseline is None else read_report(baseline)
    pairs = EvaluationPairs(folders, max_pixels)
    refuse_faults(pairs.faults, strict)
    if other is not None:
        require_common_images(pairs.stems, other)
    metrics = utils.PairMetrics(device, with_lpips=networks, with_dists=networks, with_squeezenet=networks, dino=dino)
    set_metrics = utils.SetMetrics(device, wanted=networks)
    measured = measure_pairs(pairs, metrics, set_metrics, batch_size, num_workers)
    refuse_faults(pairs.faults, strict)
    if not measured.rows:
        raise UserError(f"none of {len(pairs)} pairs can be evaluated: {fault_summary(pairs.faults, 1)}")
    report = make_report(pairs, measured, metrics, set_metrics, other, run or {})
    write_report(output, report, measured.rows, pairs)
    return report


@dataclass
class Measurements:
    """What comes of going through the pairs."""

    rows: list[dict] = field(default_factory=list)  # of metrics, one per image
    pixels: list[dict] = field(default_factory=list)  # drawn from each image that has maps
    sizes: Counter = field(default_factory=Counter)  # (width, height) => images
    counted: int = 0  # pixels
    with_excluded: int = 0  # images of which some pixels do not count


def measure_pairs(
    pairs: EvaluationPairs, metrics: utils.PairMetrics, set_metrics: utils.SetMetrics, batch_size: int, num_workers: int
) -> Measurements:
    """Measure every pair; the faults of those that cannot be go to `pairs.faults`, the sets' features to `set_metrics`."""
    measured = Measurements()
    loader = DataLoader(pairs, batch_size=None, num_workers=num_workers)
    with tqdm(total=len(pairs), desc="evaluating", unit="image", mininterval=1) as bar:
        for batch in batches(usable(loader, pairs.faults, bar), batch_size):
            generated, eo, valid = (torch.stack([item[kind] for item in batch]) for kind in ("generated", "eo", "valid"))
            if whole := bool(valid.all()):
                set_metrics.update(generated, eo)
            values = utils.image_rows([item["stem"] for item in batch], metrics(generated, eo, None if whole else valid))
            measured.rows += [row | item["values"] for row, item in zip(values, batch, strict=True)]
            measured.pixels += [item["pixels"] for item in batch if item["pixels"] is not None]
            measured.sizes[eo.shape[3], eo.shape[2]] += len(batch)
            measured.counted += int(valid.sum())
            measured.with_excluded += len(batch) * (not whole)
    return measured


def usable(items: Iterable[dict], faults: dict[str, list[str]], bar: tqdm) -> Iterator[dict]:
    """The items that hold a pair; the faults of all are collected by kind."""
    for item in items:
        bar.update()
        for kind, text in item["faults"]:
            faults.setdefault(kind, []).append(text)
        if "eo" in item:
            yield item


def batches(items: Iterable[dict], batch_size: int) -> Iterator[list[dict]]:
    """Neighbours of one size together, all with excluded pixels or all without, up to batch_size of them or BATCH_PX."""
    for (height, width, _), alike in groupby(items, lambda item: (*item["valid"].shape, bool(item["valid"].all()))):
        together = min(batch_size, max(1, BATCH_PX // (height * width)))
        while batch := list(islice(alike, together)):
            yield batch


def make_report(
    pairs: EvaluationPairs,
    measured: Measurements,
    metrics: utils.PairMetrics,
    set_metrics: utils.SetMetrics,
    other: tuple[dict, list[dict], Path] | None,  # of read_report
    run: dict,
) -> dict:
    """What was measured => report.json's content."""
    set_values = {name: entry | {"n": set_metrics.images} for name, entry in set_metrics.compute().items()}
    not_whole = dict.fromkeys(set_values, utils.NEEDS_WHOLE) if measured.with_excluded else {}
    return {
        "images": len(measured.rows),
        "images_sha256": hash_of([row["name"] for row in measured.rows]),
        "run": run,
        "sizes": {f"{width} x {height}": count for (width, height), count in measured.sizes.items()},
        "counted": {
            "fraction": measured.counted / sum(width * height * count for (width, height), count in measured.sizes.items()),
            "images_with_excluded_pixels": measured.with_excluded,
        },
        "inputs": {name: None if value is None else as_option(value) for name, value in vars(pairs.folders).items()},
        "conventions": {name: convention.description for name, convention in utils.CONVENTIONS.items()},
        "means": means_with_intervals(measured.rows),
        "set": set_values | identity_collapse(measured.rows),
        "absent": metrics.absent | not_whole | set_metrics.absent | missing_folders(pairs.folders, bool(measured.pixels)),
        "faults": {kind: faults for kind, faults in pairs.faults.items() if faults},
        "uncertainty": pooled_measures(measured.pixels, pairs.pixels_per_image) if measured.pixels else None,
        "comparison": None if other is None else compare(measured.rows, set_values, *other),
        "examples": examples(measured.rows),
    }


def hash_of(names: list[str]) -> str:
    """Of the names in counting order, one a line: reports of one hash are of the same images."""
    return hashlib.sha256("".join(f"{name}\n" for name in names).encode()).hexdigest()


def fault_summary(faults: dict[str, list[str]], most: int = SHOWN) -> str:
    """All faults on one line: how many of each kind, and the first of them."""
    return "; ".join(
        f"{FAULTS[kind]}: {len(texts)} ({', '.join(texts[:most])}{', ...' * (len(texts) > most)})"
        for kind, texts in faults.items()
        if texts
    )


def as_option(value: Path | tuple[float, float]) -> str:
    """A folder or a range as on the command line."""
    return ",".join(f"{number:g}" for number in value) if isinstance(value, tuple) else str(value)


def refuse_faults(faults: dict[str, list[str]], strict: bool) -> None:
    if strict and any(faults.values()):
        raise UserError(f"--strict: {fault_summary(faults)}")


def missing_folders(folders: EvaluationFolders, has_maps: bool) -> dict[str, str]:
    """What cannot be computed for lack of a folder => the reason."""
    absent = {} if folders.sar_dir else {"identity_collapse": "needs --sar-dir"}
    if not has_maps:
        given = folders.variance_dir or folders.error_dir or folders.ensemble_dir
        absent["uncertainty"] = "no pair has all the files" if given else "needs --variance-dir, --error-dir or --ensemble-dir"
    elif not folders.sar_dir:
        absent["SAR baselines"] = "brightness, local variation and gradient need --sar-dir"
    if has_maps and not folders.mask_dir:
        absent["discrepancies"] = "needs --mask-dir"
    return absent


# ---- numbers of all images


def resampled_means(values: np.ndarray, seed: int = 0) -> np.ndarray:
    """Bootstrap over images: [n, k], NaN where an image has no value => means [RESAMPLES, k].

    All columns share the draws, so their ratios may be taken row by row. NaN for a column with fewer than two values.
    """
    rng, images = np.random.default_rng(seed), len(values)
    valid = np.isfinite(values)
    filled, varies = np.where(valid, values, 0.0), valid.sum(0) > 1
    means = []
    for draws in np.array_split(np.arange(RESAMPLES), max(1, RESAMPLES * images // 4_000_000)):
        counts = rng.multinomial(images, np.full(images, 1 / images), size=len(draws)).astype(np.float64)
        with np.errstate(invalid="ignore"):  # no valid image drawn: NaN
            means.append(np.where(varies, (counts @ filled) / (counts @ valid), np.nan))
    return np.concatenate(means)


def interval(means: np.ndarray) -> dict[str, float | None]:
    """Resampled means [RESAMPLES] => the ends of the 95 % interval; None where there is none."""
    means = means[np.isfinite(means)]
    low, high = np.percentile(means, INTERVAL).tolist() if means.size else (None, None)
    return {"low": low, "high": high}


def column_values(rows: list[dict], columns: list[str]) -> np.ndarray:
    """Rows => [n, k] float64, NaN where a row lacks a column or its value is infinite."""
    values = np.array([row.get(column, math.nan) for row in rows for column in columns], np.float64)
    return np.where(np.isfinite(values), values, math.nan).reshape(len(rows), len(columns))


def means_with_intervals(rows: list[dict]) -> dict[str, dict[str, dict]]:
    """utils.summarise, each mean with "low" and "high", its 95 % bootstrap interval over images."""
    columns = utils.columns_of(rows)
    means, summary = resampled_means(column_values(rows, columns)), utils.summarise(rows)
    for column, resampled in zip(columns, means.T, strict=True):
        group, metric = column.split("/")
        summary[group][metric] |= interval(resampled)
    return summary


def identity_collapse(rows: list[dict]) -> dict[str, dict]:
    """mean |generated - SAR| / mean |generated - EO| over the images that have a SAR; below 1 the output copies its input."""
    values = column_values(rows, list(COLLAPSE))
    values = values[np.isfinite(values).all(1)]
    if not len(values) or not values[:, 1].any():
        return {}
    to_sar, to_eo = values.mean(0)
    with np.errstate(divide="ignore"):
        means = resampled_means(values)
        ratio = interval(means[:, 0] / means[:, 1])
    return {"identity_collapse": {"value": float(to_sar / to_eo), "n": len(values), **ratio}}


def examples(rows: list[dict]) -> dict[str, list[str]]:
    """Stems of the best, median and worst images by PSNR."""
    ranked = [row["name"] for row in sorted(rows, key=lambda row: (-row["standard/psnr"], row["name"]))]
    middle = max(0, len(ranked) - EXAMPLES) // 2
    return {"best": ranked[:EXAMPLES], "median": ranked[middle : middle + EXAMPLES], "worst": ranked[-EXAMPLES:]}


# ---- two reports


def read_report(path: Path) -> tuple[dict, list[dict], Path]:
    """report.json and the metrics.csv beside it => (report, rows, path)."""
    table = path.parent / "metrics.csv"
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
        written = csv.DictReader(io.StringIO(table.read_text(encoding="utf-8"), newline=""))
        rows = [{key: value if key == "name" else float(value) for key, value in row.items() if value != ""} for row in written]
        _ = report["images"], [row["name"] for row in rows], [entry["value"] for entry in report["set"].values()]
    except OSError as error:
        raise UserError(f"{error.filename}: {error.strerror}; expected report.json with metrics.csv beside it") from error
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, csv.Error) as error:
        raise UserError(f"{path}: neither it nor {table.name} beside it may be changed by hand ({error})") from error
    return report, rows, path


def require_common_images(names: list[str], baseline: tuple[dict, list[dict], Path]) -> None:
    _, rows, path = baseline
    if not {row["name"] for row in rows}.intersection(names):
        raise UserError(f"--baseline: {path} has none of these images")


def compare(rows: list[dict], set_values: dict, report: dict, other_rows: list[dict], path: Path) -> dict:
    """This method minus the baseline on the images that both evaluated, with 95 % intervals of a paired bootstrap."""
    require_common_images([row["name"] for row in rows], (report, other_rows, path))
    theirs = {row["name"]: row for row in other_rows}
    mine = [row for row in rows if row["name"] in theirs]
    theirs = [theirs[row["name"]] for row in mine]
    groups_compared = {*utils.CONVENTIONS, "8-bit", *MAPS}  # not the trivial baselines
    shared = set(utils.columns_of(theirs))
    columns = [name for name in utils.columns_of(mine) if name in shared and name.split("/")[0] in groups_compared]
    differences = column_values(mine, columns) - column_values(theirs, columns)  # [n, k]
    groups: dict[str, dict[str, dict]] = {}
    for column, values, resampled in zip(columns, differences.T, resampled_means(differences).T, strict=True):
        group, metric = column.split("/")
        finite = values[np.isfinite(values)]
        entry = {"difference": float(finite.mean()) if finite.size else None, "n": int(finite.size), **interval(resampled)}
        groups.setdefault(group, {})[metric] = entry
    both = [name for name in set_values if name in report["set"]]
    counted = "fraction/counted"
    return {
        "baseline": str(path), "images": len(mine), "images_of_baseline": report["images"],
        "images_of_other_pixels": sum(a.get(counted, 1.0) != b.get(counted, 1.0) for a, b in zip(mine, theirs, strict=True)),
        "means": groups,
        "set": {name: {"value": set_values[name]["value"], "baseline": report["set"][name]["value"]} for name in both},
    }  # fmt: skip


# ---- files


def write_report(output: Path, report: dict, rows: list[dict], pairs: EvaluationPairs) -> None:
    """Each file whole or not at all; metrics.csv has a line per image. UserError where they cannot be written."""
    table = io.StringIO()
    writer = csv.DictWriter(table, ["name", *utils.columns_of(rows)], restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    texts = {
        "metrics.csv": table.getvalue(),
        "report.json": json.dumps(report, indent=2, allow_nan=False) + "\n",
        "report.md": render_markdown(report),
        "report.html": render_html(report, lambda stem: picture(pairs[pairs.stems.index(stem)])),
    }
    try:
        for name, text in texts.items():
            write_text(output / name, text)
    except OSError as error:
        raise UserError(f"cannot write the report to {output}: {error.strerror}") from error


def picture(item: dict) -> np.ndarray:
    """SAR, EO, generated EO, their absolute difference (white: half of the range or more), maps on each one's own scale.

    What does not count is grey, but for the SAR. Large images are shown reduced, small ones enlarged.
    """
    images = {name: item[kind] for name, kind in (("SAR", "sar"), ("EO", "eo"), ("generated EO", "generated")) if kind in item}
    images["error"] = (item["generated"] - item["eo"]).abs().mean(0, keepdim=True).clamp(0, 1)
    for name, values in item["maps"].items():
        low, high = np.nanmin(values), np.nanmax(values)
        images[name] = torch.from_numpy((values - low) / ((high - low) or 1))[None]
    for name in images.keys() - {"SAR"}:
        excluded = ~item["valid"] | images[name].isnan().any(0)
        images[name] = torch.where(excluded, 0.0 if len(images[name]) == 3 else 0.5, images[name])
    height, width = item["valid"].shape
    enlarge = max(1, min(128 // min(height, width), PICTURE_PX // max(height, width)))
    reduce = -(-max(height, width) // PICTURE_PX)
    sized = [image.repeat_interleave(enlarge, 1).repeat_interleave(enlarge, 2) for image in images.values()]
    return utils.panel([torch.nn.functional.avg_pool2d(image, reduce, ceil_mode=True) for image in sized], list(images))
