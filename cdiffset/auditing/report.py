"""What an audit leaves behind: table, overlays, contact sheet, and the list of the pairs that are worth training on."""

import csv
import io
import os
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

from cdiffset.auditing.residual import scores_of, strongest_boxes
from cdiffset.images import read_sar, read_tiff, read_unstretched_eo, to_tensor, write_png, write_text
from cdiffset.pages import render_page
from cdiffset.pairing import Pair
from feeders.feeder import ListFeeder, PairedFeeder
from utils import panel

MAPS = "maps"  # the folder of them
BOX_QUANTILE = 0.98  # of the discrepancies of all pixels of the set: what is above belongs to a box
HEAT, BOX, EXCLUDED = (255, 30, 0), (255, 235, 0), (128, 128, 128)  # RGB
MIN_SIDE_PX = 192  # smaller images are enlarged in overlays


@dataclass
class Finding:
    """What the audit says of one pair."""

    pair: Pair
    score: float  # mean of the discrepancy map: is it a pair at all, and aligned?
    local: float  # its 99th percentile: has a part of it changed?
    maximum: float
    counted: float  # fraction of the pixels that count
    boxes: list[tuple[int, int, int, int]]  # x0, y0, x1, y1 in px, the strongest first
    kept: bool = True


def map_path(output: Path, pair: Pair) -> Path:
    return output / MAPS / f"{pair.name}.tif"


def overlay_path(pair: Pair) -> Path:
    """Relative to the output folder, as the contact sheet refers to it."""
    return Path("overlays") / f"{pair.name}.png"


def write_findings(
    output: Path, pairs: list[Pair], most_boxes: int, max_pixels: int, eo_range: tuple[float, float] | None = None
) -> list[Finding]:
    """Score and box every pair from its map in `output`, and write its overlay => findings, the highest score first.

    One threshold and one colour scale serve the whole set, so that pairs compare.
    """
    findings, samples = [], []
    for pair in pairs:
        residual = read_tiff(map_path(output, pair))
        counted = residual[np.isfinite(residual)]
        fraction = counted.size / residual.size
        findings.append(Finding(pair, *scores_of(counted), float(counted.max()), fraction, []))
        step = max(1, min(residual.shape) // 64)  # a grid of some thousand pixels represents a pair
        grid = residual[::step, ::step]
        samples.append(grid[np.isfinite(grid)] if np.isfinite(grid).any() else counted)
    threshold = float(np.quantile(np.concatenate(samples), BOX_QUANTILE))
    for finding in tqdm(findings, desc="drawing", unit="pair", mininterval=1):
        residual = read_tiff(map_path(output, finding.pair))
        finding.boxes = strongest_boxes(residual, threshold, most_boxes)
        sar = read_sar(finding.pair.sar, max_pixels)
        eo, valid, _ = read_unstretched_eo(finding.pair.eo, eo_range, "--eo-range", max_pixels)
        eo[~valid] = EXCLUDED
        write_png(output / overlay_path(finding.pair), heat_panel(sar, eo, residual, finding.boxes, threshold))
    return sorted(findings, key=lambda finding: (-finding.score, finding.pair.name))


def heat_panel(sar: np.ndarray, eo: np.ndarray, residual: np.ndarray, boxes: list, threshold: float) -> np.ndarray:
    """SAR, EO [H, W, 3] in 0-255 and the map [H, W], NaN: no heat => SAR | EO | EO with heat and boxes, uint8 [H', W', 3].

    Heat is half opaque at the threshold and lets the image shine through everywhere.
    """
    opacity = (np.nan_to_num(residual) / max(2 * threshold, np.finfo(np.float32).tiny)).clip(0, 0.8)[..., None]  # [H,W,1]
    heated = eo * (1 - opacity) + np.array(HEAT) * opacity
    scale = max(1, -(-MIN_SIDE_PX // min(eo.shape[:2])))
    pictures = [picture.repeat(scale, 0).repeat(scale, 1).round().astype(np.uint8) for picture in (sar, eo, heated)]
    boxed = Image.fromarray(pictures[2])
    for x0, y0, x1, y1 in boxes:
        ImageDraw.Draw(boxed).rectangle([x0 * scale, y0 * scale, x1 * scale - 1, y1 * scale - 1], outline=BOX)
    pictures[2] = np.array(boxed)
    return panel([to_tensor(picture) for picture in pictures])


def choose_kept(findings: list[Finding], drop_fraction: float, max_score: float | None) -> None:
    """Mark the pairs that go: those above `max_score`, or else the given fraction of all, the worst ones.

    findings: the highest score first.
    """
    dropped = round(drop_fraction * len(findings)) if max_score is None else sum(f.score > max_score for f in findings)
    for place, finding in enumerate(findings):
        finding.kept = place >= dropped


def write_table(path: Path, findings: list[Finding]) -> None:
    """CSV, a line per pair in the order given. counted: fraction of the pixels. Boxes: x0 y0 x1 y1 in px, by semicolons."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["name", "score", "local", "max", "counted", "kept", "boxes", "sar", "eo"])
    for finding in findings:
        boxes = "; ".join(" ".join(map(str, box)) for box in finding.boxes)
        numbers = [f"{number:.6g}" for number in (finding.score, finding.local, finding.maximum, finding.counted)]
        writer.writerow(
            [finding.pair.name, *numbers, "yes" if finding.kept else "no", boxes, finding.pair.sar, finding.pair.eo]
        )
    write_text(path, table.getvalue())


def write_contact_sheet(path: Path, findings: list[Finding], top: int) -> None:
    """HTML page of the `top` first findings, whose overlays it shows from the folder it lies in."""
    shown = [(finding, quote(overlay_path(finding.pair).as_posix())) for finding in findings[:top]]
    title = f"The {len(shown)} most discrepant of {len(findings)} pairs"
    write_text(path, render_page("auditing/contact_sheet.html.jinja", title=title, findings=shown))


def write_kept_list(path: Path, feeder: PairedFeeder, root: Path, findings: list[Finding]) -> None:
    """The kept pairs in the feeder's order, as a list for training: EO paths for a ListFeeder, else `sar,eo` lines.

    Paths are relative to `root`, the feeder's dataroot. PairedFolderFeeder reads the `sar,eo` form.
    """
    kept = {finding.pair for finding in findings if finding.kept}
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    if not isinstance(feeder, ListFeeder):
        writer.writerow(["sar", "eo"])
    for pair in feeder.pairs:
        if pair not in kept:
            continue
        sar, eo = (Path(os.path.relpath(file, root)).as_posix() for file in (pair.sar, pair.eo))
        if isinstance(feeder, ListFeeder):
            table.write(f"{eo}\n")  # a path a line, never quoted
        else:
            writer.writerow([sar, eo])
    write_text(path, table.getvalue())
