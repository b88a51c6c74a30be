"""A report's content => Markdown, and one self-contained HTML file.

Numbers come from `cdiffset.evaluation.evaluate` and are only set here. Both texts are made
of the same blocks; Markdown leaves the pictures out.
"""

import base64
import io
from collections.abc import Iterator
from html import escape
from typing import NamedTuple

import numpy as np
from PIL import Image

from cdiffset.evaluation.baselines import ERRORS, GRADIENT_SIGMA_PX, WINDOW_PX
from cdiffset.evaluation.folders import FAULTS, MASKS

LABELS = {  # with the unit, and an arrow towards better
    "psnr": "PSNR [dB] ↑",
    "ssim": "SSIM ↑",
    "scc": "SCC ↑",
    "lpips": "LPIPS (VGG) ↓",
    "dists": "DISTS ↓",
    "fid": "FID ↓",
    "kid": "KID ↓",
    "inception_score": "IS ↑",
    "identity_collapse": "identity-collapse ratio",
    "mae": "mean absolute error to EO ↓",
    "mae_sar": "mean absolute difference to SAR",
}
RANKING = {"spearman": "Spearman, {} ↑", "ause": "AUSE, {} ↓", "aurg": "AURG, {} ↑"}  # {}: of which error
LABELS |= {
    f"{measure}_{error}": label.format(error)
    for error in ERRORS
    for measure, label in (RANKING | {"ence": "ENCE, {} ↓"}).items()
}
CLIPPED_SHARE = 0.01  # of the pixels beyond a declared range, from which it is doubtful
FID_UNBIASED_IMAGES = 2049  # fewer leave the covariances of 2048 features rank-deficient
DISCARDED = (0, 10, 20, 30, 50, 70, 90)  # percent, in the table of the discard curve
FAULTS_SHOWN = 20
COLOURS = ("#c0392b", "#2c6fbb", "#27864a", "#8e44ad", "#d68910", "#16a0a0", "#7f8c8d", "#5d4037")
STYLE = (
    "body{font:15px/1.5 sans-serif;max-width:70em;margin:2em auto;padding:0 1em;color:#222}table{border-collapse:collapse}"
    "td,th{border:1px solid #ccc;padding:.25em .6em;text-align:right}td:first-child,th:first-child{text-align:left}"
    "figure{display:inline-block;margin:.5em 1em .5em 0}figcaption{font-size:.85em;color:#555}img{max-width:100%}"
)


class Heading(NamedTuple):
    text: str


class Text(NamedTuple):
    text: str


class Items(NamedTuple):
    texts: list[str]


class Table(NamedTuple):
    rows: list[list[str]]  # the header first


class Figure(NamedTuple):
    html: str
    caption: str


def render_markdown(report: dict) -> str:
    parts = [f"# Evaluation of {report['images']} images"]
    for block in blocks(report):
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Text(text):
                parts.append(text)
            case Items(texts):
                parts.append("\n".join(f"- {text}" for text in texts))
            case Table(rows):
                parts.append(markdown_table(rows))
    return "\n\n".join(parts) + "\n"


def markdown_table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def render_html(report: dict, pictures: dict[str, dict[str, np.ndarray]]) -> str:
    """pictures: {"best", "median", "worst": {stem: uint8 [H, W, 3]}}."""
    title = f"Evaluation of {report['images']} images"
    parts = [
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{STYLE}</style></head>'
    ]
    parts.append(f"<body><h1>{title}</h1>")
    for block in [*blocks(report), *picture_blocks(pictures)]:
        match block:
            case Heading(text):
                parts.append(f"<h2>{escape(text)}</h2>")
            case Text(text):
                parts.append(f"<p>{escape(text)}</p>")
            case Items(texts):
                parts.append("<ul>" + "".join(f"<li>{escape(text)}</li>" for text in texts) + "</ul>")
            case Table([header, *rows]):
                lines = [("th", header), *(("td", row) for row in rows)]
                cells = ["".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in row) for tag, row in lines]
                parts.append("<table>" + "".join(f"<tr>{line}</tr>" for line in cells) + "</table>")
            case Figure(html, caption):
                parts.append(f"<figure>{html}<figcaption>{escape(caption)}</figcaption></figure>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


# ---- what a report says


def blocks(report: dict) -> Iterator[NamedTuple]:
    yield Text(f"Image sizes [px]: {', '.join(f'{size} ({count})' for size, count in report['sizes'].items())}.")
    yield Text(counted_pixels(report["counted"], report["images"]))
    yield Items([f"{name}: {value}" for name, value in report["inputs"].items() if value is not None])
    yield from warnings(report)
    yield Heading("Images")
    yield from image_blocks(report)
    if report["comparison"]:
        yield Heading("Against the baseline")
        yield from comparison_blocks(report["comparison"])
    if report["uncertainty"]:
        yield Heading("Is the map right?")
        yield from uncertainty_blocks(report["uncertainty"], report["means"], report["images"])
    if report["faults"]:
        yield Heading("Files that did not fit")
        for kind, texts in report["faults"].items():
            more = [f"and {len(texts) - FAULTS_SHOWN} more, in report.json"] if len(texts) > FAULTS_SHOWN else []
            yield Text(f"{FAULTS[kind][0].upper()}{FAULTS[kind][1:]}: {len(texts)}.")
            yield Items([*texts[:FAULTS_SHOWN], *more])
    if report["absent"]:
        yield Heading("Not computed, at least not for every image")
        yield Items([f"{plain_label(name)}: {reason}" for name, reason in report["absent"].items()])


def counted_pixels(counted: dict, images: int) -> str:
    excluded = counted["images_with_excluded_pixels"]
    text = f"Pixels that count: {100 * counted['share']:.4g} %."
    if not excluded:
        return text
    return (
        f"{text} In {excluded} of {images} images, alpha, nodata, a mask, NaN or infinity in the generated or the true EO "
        "exclude some. PSNR and mean differences are of the pixels that count, SSIM and SCC means over the windows without an "
        "excluded pixel, and LPIPS, DISTS, FID, KID and IS of the images without one."
    )


def warnings(report: dict) -> Iterator[Text]:
    for kind in ("pred", "gt"):
        clipped = report["means"].get("share", {}).get(f"clipped_{kind}", {"mean": 0})["mean"]
        if clipped > CLIPPED_SHARE:
            yield Text(
                f"Warning: {100 * clipped:.3g} % of the pixels lie beyond --{kind}-range {report['inputs'][f'{kind}_range']} "
                "and are clipped. Check the range."
            )
    ratio = report["set"].get("identity_collapse")
    if ratio and ratio["value"] < 1:
        yield Text(
            f"Warning: the identity-collapse ratio is {ratio['value']:.4f}, below 1. The images are closer to the SAR than to "
            "the EO: the output copies its input."
        )
    if "fid" in report["set"] and (images := report["set"]["fid"]["n"]) < FID_UNBIASED_IMAGES:
        yield Text(f"FID of {images} images is biased upwards: compare it with FIDs of equally many images only.")


def plain_label(metric: str) -> str:
    """The label without unit and arrow."""
    return LABELS.get(metric, metric).split(" [")[0].split(" (")[0].strip(" ↑↓")


def image_blocks(report: dict) -> Iterator[NamedTuple]:
    means, images = report["means"], report["images"]
    conventions = list(report["conventions"])
    metrics = dict.fromkeys(metric for convention in conventions for metric in means.get(convention, {}))
    rows = [[LABELS[metric], *(cell(means[name].get(metric), images) for name in conventions)] for metric in metrics]
    yield Table([["mean over images", *conventions], *rows])
    yield Items([f"{name}: {text}" for name, text in report["conventions"].items()])
    yield Text("In brackets: 95 % interval, percentile bootstrap over images, 2000 resamples. Conventions do not compare.")
    rows = [[LABELS[metric], cell(entry, images)] for metric, entry in means.get("8-bit", {}).items()]
    yield Table([["in 8-bit units (0 to 255)", "mean over images"], *rows])
    if report["set"]:
        yield Table(
            [["of the set", "value"], *([LABELS[name], set_cell(name, entry, images)] for name, entry in report["set"].items())]
        )


def cell(entry: dict | None, images: int) -> str:
    """A mean and its interval, with the number of images wherever it is not all of them."""
    if entry is None:
        return "–"
    text = "∞" if entry["mean"] is None else number(entry["mean"]) + bracket(entry)
    if entry["n"] == images:
        return text
    return f"{text} (n = {entry['n']}" + (f", {entry['infinite']} infinite)" if entry["infinite"] else ")")


def set_cell(metric: str, entry: dict, images: int) -> str:
    """A value of the set, with the number of images wherever it is not all of them."""
    text = number(entry["value"], 5 if metric == "kid" else 4) + bracket(entry)
    if "std" in entry:
        text += f" ± {number(entry['std'], 5 if metric == 'kid' else 4)}"
    if "subsets" in entry:
        whole = "the whole set" if entry["subsets"] == 1 else f"{entry['subsets']} subsets"
        text += f" ({whole} of {entry['subset_size']} images)"
    return text + (f" (n = {entry['n']})" if entry.get("n", images) != images else "")


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def bracket(entry: dict) -> str:
    return f" [{entry['low']:.4f}, {entry['high']:.4f}]" if entry.get("low") is not None else ""


def comparison_blocks(comparison: dict) -> Iterator[NamedTuple]:
    yield Text(
        f"This minus {comparison['baseline']}, on the {comparison['images']} images that both judged (the baseline has "
        f"{comparison['images_of_baseline']}). In brackets: 95 % interval, paired bootstrap over images."
    )
    if comparison["images_of_other_pixels"]:
        yield Text(f"Warning: {comparison['images_of_other_pixels']} of these images were judged by other pixels there.")
    rows = [
        [group, LABELS.get(metric, metric), number(entry["difference"]) + bracket(entry), str(entry["n"])]
        for group, metrics in comparison["means"].items()
        for metric, entry in metrics.items()
    ]
    yield Table([["convention or map", "metric", "difference", "n"], *rows])
    if comparison["set"]:
        yield Text("Of the whole sets, without an interval, and of one meaning only where both sets are the same images:")
        rows = [[LABELS[k], number(entry["value"]), number(entry["baseline"])] for k, entry in comparison["set"].items()]
        yield Table([["of the set", "this", "baseline"], *rows])


def uncertainty_blocks(part: dict, means: dict, images: int) -> Iterator[NamedTuple]:
    maps, mean_error, share = part["maps"], part["mean_error"], means["share"]["counted_in_maps"]["mean"]
    yield Text(
        f"Pooled over {part['pixels']} pixels of {part['images']} images, at most {part['pixels_per_image']} of each, drawn at "
        f"random with a fixed seed from those that count and are valid in every map (mean over images: {100 * share:.4g} %). "
        f"Error: absolute or squared, mean over RGB, in 8-bit units; its mean is "
        f"{mean_error['absolute']:.3f} and {mean_error['squared']:.1f}. Rivals: a random map, and the SAR's brightness, "
        f"coefficient of variation in {WINDOW_PX} x {WINDOW_PX} px and gradient (Gaussian, σ = {GRADIENT_SIGMA_PX:g} px)."
    )
    measures = [f"{measure}_{error}" for error in ERRORS for measure in RANKING]
    labels = [LABELS[measure] for measure in measures]
    yield Table([["all pixels, ranked by", *labels], *([name, *ranking_cells(judged)] for name, judged in maps.items())])
    rows = [[name, *(cell(means.get(name, {}).get(measure), images) for measure in measures)] for name in maps]
    yield Table([["pixels of an image, mean over images", *labels], *rows])
    yield Text("AUSE: 0 for a perfect ranking. AURG: 0 for a random one. Both are relative to the mean error.")
    yield from detection_blocks(part)
    yield Text("Mean absolute error of what remains when the least certain share is left out:")
    rows = [
        [name, *(number(judged["ranking"]["absolute"]["discard"][percent], 3) for percent in DISCARDED)]
        for name, judged in maps.items()
        if "ranking" in judged
    ]
    yield Table([["left out", *(f"{percent} %" for percent in DISCARDED)], *rows])
    for error in ERRORS:
        yield from curve_figures(part, error)
    yield from calibration_blocks(maps, means, images)
    if part["absent"]:
        yield Items([f"{name}: {reason}" for name, reason in part["absent"].items()])


def ranking_cells(judged: dict) -> list[str]:
    ranking = judged.get("ranking")
    return [number(ranking and ranking[error][name], 3) for error in ERRORS for name in RANKING]


def detection_blocks(part: dict) -> Iterator[NamedTuple]:
    if not any(part["discrepant_pixels"].values()):
        return
    found = part["discrepant_pixels"]
    yield Text(
        f"Known discrepancies against pixels without any: objects only in the SAR ({found['sar_only']} pixels) and only in the "
        f"EO ({found['eo_only']} pixels). The latter cannot be known from the SAR alone: an AUROC near 0.5 is the honest one. "
        "AP: average precision; a random map has the share of positives."
    )
    kinds = [(mask, measure) for mask in MASKS for measure in ("auroc", "average_precision")]
    header = [f"{'AUROC' if measure == 'auroc' else 'AP'} {mask.replace('_o', '-o').replace('sar', 'SAR').replace('eo', 'EO')}"
              for mask, measure in kinds]  # fmt: skip
    rows = [
        [name, *(number(judged.get(mask, {}).get(measure), 3) for mask, measure in kinds)]
        for name, judged in part["maps"].items()
    ]
    yield Table([["detection by", *header], *rows])


def curve_figures(part: dict, error: str) -> Iterator[Figure]:
    curves = {name: judged["ranking"][error]["discard"] for name, judged in part["maps"].items() if "ranking" in judged}
    if not curves:
        return
    curves["oracle"] = part["oracle"][error]
    percent = list(range(len(curves["oracle"])))
    relative = {name: (percent, [value / curve[0] for value in curve]) for name, curve in curves.items()}
    unit = {"absolute": "8-bit units", "squared": "8-bit units squared"}[error]
    yield Figure(line_chart(relative, "least certain left out [%]", "error / mean error"), f"Sparsification, {error} error")
    discard = {name: (percent, curve) for name, curve in curves.items() if name != "oracle"}
    yield Figure(line_chart(discard, "least certain left out [%]", f"error of the rest [{unit}]"), f"Discard, {error} error")


def calibration_blocks(maps: dict, means: dict, images: int) -> Iterator[NamedTuple]:
    judged = {
        (name, error): found for name, entry in maps.items() for error, found in entry.get("calibration", {}).items()
    }  # fmt: skip
    if not judged:
        return
    bins = next(iter(judged.values()))["bins"]
    yield Text(
        f"Calibration, in {bins} bins of equally many pixels by prediction: expected against mean absolute error, root mean "
        "variance against root mean square error. ENCE: mean over bins of |observed - predicted| / predicted. The variance is "
        "in units of the latent, so its σ is judged by its shape alone, after one global scale to the mean (square) of the "
        "error; in single images, after a scale for each."
    )
    label = {key: f"{key[0]}{' (scaled)' if key[0] == 'variance' else ''}, {key[1]}" for key in judged}
    rows = [
        [label[name, error], number(found["ence"]), cell(means.get(name, {}).get(f"ence_{error}"), images)]
        for (name, error), found in judged.items()
    ]
    yield Table([["map, error", "ENCE of all pixels ↓", "ENCE of an image, mean over images ↓"], *rows])
    lines = {label[key]: (found["predicted"], found["observed"]) for key, found in judged.items()}
    highest = max(max(xs + ys) for xs, ys in lines.values())
    lines["calibrated"] = ([0, highest], [0, highest])
    yield Figure(line_chart(lines, "predicted error [8-bit units]", "observed error [8-bit units]"), "Reliability")


def picture_blocks(pictures: dict[str, dict[str, np.ndarray]]) -> Iterator[NamedTuple]:
    yield Heading("Best, median and worst images by PSNR")
    yield Text(
        "Error: white is half of the range or more. Maps: white is the least certain, each image on its own scale. Plain grey: "
        "pixels that do not count."
    )
    for kind, some in pictures.items():
        for stem, pixels in some.items():
            yield Figure(png_image(pixels, f"{kind}: {stem}"), f"{kind}: {stem}")


# ---- pictures in HTML


def png_image(pixels: np.ndarray, alternative: str) -> str:
    with io.BytesIO() as file:
        Image.fromarray(pixels).save(file, format="PNG")
        data = base64.b64encode(file.getvalue()).decode()
    return f'<img alt="{escape(alternative)}" src="data:image/png;base64,{data}">'


def line_chart(lines: dict[str, tuple[list[float], list[float]]], x_label: str, y_label: str) -> str:
    """{name: (x, y)} => an inline SVG with axes from 0 and a legend."""
    width, height, left, top, right, bottom = 640, 340, 60, 10, 190, 45  # px, the last four margins
    x_high = max(max(xs) for xs, _ in lines.values()) or 1
    y_high = 1.05 * max(max(ys) for _, ys in lines.values()) or 1

    def place(x: float, y: float) -> tuple[float, float]:
        return left + x / x_high * (width - left - right), height - bottom - y / y_high * (height - top - bottom)

    def text(x: float, y: float, words: str, extra: str = "") -> str:
        return f'<text x="{x:.1f}" y="{y:.1f}" font-size="11" {extra}>{escape(words)}</text>'

    (x0, y0), (x1, y1) = place(0, 0), place(x_high, y_high)
    parts = [f'<path d="M{x0} {y1}V{y0}H{x1}" fill="none" stroke="#444"/>']
    for tick in ticks(x_high):
        parts += [text(place(tick, 0)[0], y0 + 15, f"{tick:g}", 'text-anchor="middle"')]
    for tick in ticks(y_high):
        y = place(0, tick)[1]
        parts += [text(x0 - 5, y + 4, f"{tick:g}", 'text-anchor="end"'), f'<path d="M{x0} {y:.1f}H{x1}" stroke="#eee"/>']
    parts += [text((x0 + x1) / 2, height - 8, x_label, 'text-anchor="middle"')]
    parts += [text(14, (y0 + y1) / 2, y_label, f'text-anchor="middle" transform="rotate(-90 14 {(y0 + y1) / 2:.1f})"')]
    for k, (name, (xs, ys)) in enumerate(lines.items()):
        colour = "#000" if name in ("oracle", "calibrated") else COLOURS[k % len(COLOURS)]
        points = " ".join(f"{px:.1f},{py:.1f}" for px, py in map(place, xs, ys))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        y = top + 12 + 17 * k
        parts.append(f'<path d="M{x1 + 10} {y - 4}h16" stroke="{colour}" stroke-width="2"/>' + text(x1 + 30, y, name))
    size = f'width="{width}" height="{height}" viewBox="0 0 {width} {height}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size} font-family="sans-serif">{"".join(parts)}</svg>'


def ticks(high: float) -> np.ndarray:
    """Multiples of 1, 2 or 5 times a power of ten from 0 to `high`, three to seven of them."""
    power = 10.0 ** np.floor(np.log10(high / 3))
    step = next(step for step in (1 * power, 2 * power, 5 * power, 10 * power) if high / step < 6)
    return np.arange(int(high / step) + 1) * step
