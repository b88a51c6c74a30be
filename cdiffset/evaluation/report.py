"""A report's content => Markdown, and one self-contained HTML page of the same blocks with charts and example pictures.

Numbers come from `cdiffset.evaluation.evaluate` and are only set here. A block is ("heading", text), ("text", text),
("items", texts), ("table", rows, the header first) or ("chart", a Chart), which Markdown leaves out.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np

from cdiffset.evaluation.baselines import BINS, ERRORS, GRADIENT_SIGMA_PX, WINDOW_PX
from cdiffset.evaluation.charts import line_chart
from cdiffset.evaluation.folders import FAULTS, MASKS
from cdiffset.pages import image_url, render_page

LABELS = {  # with the unit, and an arrow towards better
    "psnr": "PSNR [dB] ↑",
    "ssim": "SSIM ↑",
    "scc": "SCC ↑",
    "lpips": "LPIPS (VGG) ↓",
    "dists": "DISTS ↓",
    "squeezenet": "SqueezeNet distance ↓",
    "dino": "DINO ↑",
    "fid": "FID ↓",
    "kid": "KID ↓",
    "inception_score": "IS ↑",
    "squeezenet_frechet": "SqueezeNet Fréchet distance ↓",
    "identity_collapse": "identity-collapse ratio",
    "mae": "mean absolute error to EO ↓",
    "mae_sar": "mean absolute difference to SAR",
}
RANKING = {"spearman": "Spearman, {} ↑", "ause": "AUSE, {} ↓", "aurg": "AURG, {} ↑"}  # {}: of which error
for _error in ERRORS:
    LABELS |= {f"{name}_{_error}": label.format(_error) for name, label in (RANKING | {"ence": "ENCE, {} ↓"}).items()}
DETECTION = {"auroc": "AUROC", "average_precision": "AP"}
MASK_LABELS = {"sar_only": "SAR-only", "eo_only": "EO-only"}
CLIPPED_SHARE = 0.01  # of the pixels beyond a declared range, from which it is doubtful
UNBIASED_IMAGES = {"fid": 2049, "squeezenet_frechet": 513}  # fewer leave the covariances of 2048 or 512 features rank-deficient
DISCARDED = (0, 10, 20, 30, 50, 70, 90)  # percent, in the table of the discard curve
FAULTS_SHOWN = 20

Block = tuple[str, Any]


class Chart(NamedTuple):
    caption: str
    x_label: str
    y_label: str
    lines: dict[str, tuple[list[float], list[float]]]  # name: (x, y)


def render_markdown(report: dict) -> str:
    texts = [f"# {title_of(report)}", *(markdown(*block) for block in blocks(report) if block[0] != "chart")]
    return "\n\n".join(texts) + "\n"


def markdown(kind: str, content: Any) -> str:
    match kind:
        case "heading":
            return f"## {content}"
        case "items":
            return "\n".join(f"- {text}" for text in content)
        case "table":
            return markdown_table(content)
    return content


def markdown_table(rows: list[list[str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows]
    return "\n".join([lines[0], "|---" * len(rows[0]) + "|", *lines[1:]])


def render_html(report: dict, picture: Callable[[str], np.ndarray]) -> str:
    """picture: stem => uint8 [H, W, 3]."""
    chosen, shown = report["examples"], []
    examples = {f"{kind}: {stem}": image_url(picture(stem)) for kind, stems in chosen.items() for stem in stems}
    for kind, content in blocks(report):
        if kind == "chart":
            url = image_url(line_chart(content.lines, content.x_label, content.y_label))
            kind, content = "figure", (url, content.caption)
        shown.append((kind, content))
    return render_page("evaluation/report.html.jinja", title=title_of(report), blocks=shown, examples=examples)


def title_of(report: dict) -> str:
    return f"Evaluation of {report['images']} images"


# ---- what a report says


def blocks(report: dict) -> Iterator[Block]:
    yield "text", f"Image sizes [px]: {', '.join(f'{size} ({count})' for size, count in report['sizes'].items())}."
    yield "text", counted_pixels(report["counted"], report["images"])
    facts = report["run"] | report["inputs"] | {"images, SHA-256 of their names": report["images_sha256"]}
    yield "items", [f"{name}: {value}" for name, value in facts.items() if value is not None]
    yield from (("text", warning) for warning in warnings(report))
    yield "heading", "Images"
    yield from image_blocks(report)
    if report["comparison"]:
        yield "heading", "Against the baseline"
        yield from comparison_blocks(report["comparison"])
    if report["uncertainty"]:
        yield "heading", "Is the map right?"
        yield from uncertainty_blocks(report["uncertainty"], report["means"], report["images"])
    if report["faults"]:
        yield "heading", "Files that did not fit"
        for kind, texts in report["faults"].items():
            more = [f"and {len(texts) - FAULTS_SHOWN} more, in report.json"] if len(texts) > FAULTS_SHOWN else []
            yield "text", f"{FAULTS[kind][0].upper()}{FAULTS[kind][1:]}: {len(texts)}."
            yield "items", [*texts[:FAULTS_SHOWN], *more]
    if report["absent"]:
        yield "heading", "Not computed, at least not for every image"
        yield "items", [f"{plain_label(name)}: {reason}" for name, reason in report["absent"].items()]


def counted_pixels(counted: dict, images: int) -> str:
    excluded = counted["images_with_excluded_pixels"]
    text = f"Pixels that count: {100 * counted['fraction']:.4g} %."
    if not excluded:
        return text
    return (
        f"{text} In {excluded} of {images} images, alpha, nodata, a mask, NaN or infinity in the generated or the true EO "
        "exclude some. PSNR and mean differences are of the pixels that count, SSIM and SCC means over the windows without an "
        "excluded pixel, and what a network measures of the images without one."
    )


def warnings(report: dict) -> Iterator[str]:
    for kind in ("pred", "gt"):
        clipped = report["means"].get("fraction", {}).get(f"clipped_{kind}", {"mean": 0})["mean"]
        if clipped > CLIPPED_SHARE:
            yield (
                f"Warning: {100 * clipped:.3g} % of the pixels lie beyond --{kind}-range {report['inputs'][f'{kind}_range']} "
                "and are clipped. Check the range."
            )
    ratio = report["set"].get("identity_collapse")
    if ratio and ratio["value"] < 1:
        yield (
            f"Warning: the identity-collapse ratio is {ratio['value']:.4f}, below 1. The images are closer to the SAR than to "
            "the EO: the output copies its input."
        )
    for metric, least in UNBIASED_IMAGES.items():
        if metric in report["set"] and (images := report["set"][metric]["n"]) < least:
            label = plain_label(metric)
            yield f"{label} of {images} images is biased upwards: compare it with those of equally many images only."


def plain_label(metric: str) -> str:
    """The label without unit and arrow."""
    return LABELS.get(metric, metric).split(" [")[0].split(" (")[0].strip(" ↑↓")


def image_blocks(report: dict) -> Iterator[Block]:
    means, images = report["means"], report["images"]
    conventions = list(report["conventions"])
    metrics = dict.fromkeys(metric for convention in conventions for metric in means.get(convention, {}))
    rows = [[LABELS[metric], *(cell(means[name].get(metric), images) for name in conventions)] for metric in metrics]
    yield "table", [["mean over images", *conventions], *rows]
    yield "items", [f"{name}: {text}" for name, text in report["conventions"].items()]
    yield "text", "In brackets: 95 % interval, percentile bootstrap over images, 2000 resamples. Conventions do not compare."
    rows = [[LABELS[metric], cell(entry, images)] for metric, entry in means.get("8-bit", {}).items()]
    yield "table", [["in 8-bit units (0 to 255)", "mean over images"], *rows]
    if report["set"]:
        rows = [[LABELS[name], set_cell(name, entry, images)] for name, entry in report["set"].items()]
        yield "table", [["of the set", "value"], *rows]


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
    digits = 5 if metric == "kid" else 4
    text = number(entry["value"], digits) + bracket(entry)
    if "std" in entry:
        text += f" ± {number(entry['std'], digits)}"
    if "subsets" in entry:
        whole = "the whole set" if entry["subsets"] == 1 else f"{entry['subsets']} subsets"
        text += f" ({whole} of {entry['subset_size']} images)"
    return text + (f" (n = {entry['n']})" if entry.get("n", images) != images else "")


def number(value: float | None, digits: int = 4) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def bracket(entry: dict) -> str:
    return f" [{entry['low']:.4f}, {entry['high']:.4f}]" if entry.get("low") is not None else ""


def comparison_blocks(comparison: dict) -> Iterator[Block]:
    yield (
        "text",
        f"This minus {comparison['baseline']}, on the {comparison['images']} images that both evaluated (the baseline has "
        f"{comparison['images_of_baseline']}). In brackets: 95 % interval, paired bootstrap over images.",
    )
    if comparison["images_of_other_pixels"]:
        yield "text", f"Warning: {comparison['images_of_other_pixels']} of these images were evaluated on other pixels there."
    rows = [
        [group, LABELS.get(metric, metric), number(entry["difference"]) + bracket(entry), str(entry["n"])]
        for group, metrics in comparison["means"].items()
        for metric, entry in metrics.items()
    ]
    yield "table", [["convention or map", "metric", "difference", "n"], *rows]
    if comparison["set"]:
        yield "text", "Of the whole sets, without an interval, and of one meaning only where both sets are the same images:"
        rows = [[LABELS[k], number(entry["value"]), number(entry["baseline"])] for k, entry in comparison["set"].items()]
        yield "table", [["of the set", "this", "baseline"], *rows]


def uncertainty_blocks(part: dict, means: dict, images: int) -> Iterator[Block]:
    maps, mean_error, counted = part["maps"], part["mean_error"], means["fraction"]["counted_in_maps"]["mean"]
    yield (
        "text",
        f"Pooled over {part['pixels']} pixels of {part['images']} images, at most {part['pixels_per_image']} of each, drawn at "
        f"random with a fixed seed from those that count and are valid in every map (mean over images: {100 * counted:.4g} %). "
        f"Error: absolute or squared, mean over RGB, in 8-bit units; its mean is {mean_error['absolute']:.3f} and "
        f"{mean_error['squared']:.1f}. Trivial baselines: a random map, and the SAR's brightness, coefficient of variation in "
        f"{WINDOW_PX} x {WINDOW_PX} px and gradient (Gaussian, σ = {GRADIENT_SIGMA_PX:g} px).",
    )
    columns = [f"{measure}_{error}" for error in ERRORS for measure in RANKING]
    labels = [LABELS[column] for column in columns]
    yield "table", [["all pixels, ranked by", *labels], *([name, *ranking_cells(measures)] for name, measures in maps.items())]
    rows = [[name, *(cell(means.get(name, {}).get(column), images) for column in columns)] for name in maps]
    yield "table", [["pixels of an image, mean over images", *labels], *rows]
    yield "text", "AUSE: 0 for a perfect ranking. AURG: 0 for a random one. Both are relative to the mean error."
    yield from detection_blocks(part)
    yield "text", "Mean absolute error of what remains when the least certain pixels are left out:"
    discard = {name: measures["ranking"]["absolute"]["discard"] for name, measures in maps.items() if "ranking" in measures}
    rows = [[name, *(number(curve[percent], 3) for percent in DISCARDED)] for name, curve in discard.items()]
    yield "table", [["left out", *(f"{percent} %" for percent in DISCARDED)], *rows]
    for error in ERRORS:
        yield from curve_charts(part, error)
    yield from calibration_blocks(maps, means, images)
    if part["absent"]:
        yield "items", [f"{name}: {reason}" for name, reason in part["absent"].items()]


def ranking_cells(measures: dict) -> list[str]:
    ranking = measures.get("ranking")
    return [number(ranking and ranking[error][name], 3) for error in ERRORS for name in RANKING]


def detection_blocks(part: dict) -> Iterator[Block]:
    found = part["discrepant_pixels"]
    if not any(found.values()):
        return
    yield (
        "text",
        f"Known discrepancies against pixels without any: objects only in the SAR ({found['sar_only']} pixels) and only in the "
        f"EO ({found['eo_only']} pixels). The latter cannot be known from the SAR alone: an AUROC near 0.5 is the honest one. "
        "AP: average precision; a random map has the fraction of positives.",
    )
    kinds = [(mask, measure) for mask in MASKS for measure in DETECTION]
    header = ["detection by", *(f"{DETECTION[measure]} {MASK_LABELS[mask]}" for mask, measure in kinds)]
    rows = [
        [name, *(number(measures.get(mask, {}).get(measure), 3) for mask, measure in kinds)]
        for name, measures in part["maps"].items()
    ]
    yield "table", [header, *rows]


def curve_charts(part: dict, error: str) -> Iterator[Block]:
    curves = {name: measures["ranking"][error]["discard"] for name, measures in part["maps"].items() if "ranking" in measures}
    if not curves:
        return
    oracle, unit = part["oracle"][error], {"absolute": "8-bit units", "squared": "8-bit units squared"}[error]
    percent, x_label = list(range(len(oracle))), "least certain left out [%]"
    lines = {name: (percent, [value / curve[0] for value in curve]) for name, curve in (curves | {"oracle": oracle}).items()}
    yield "chart", Chart(f"Sparsification, {error} error", x_label, "error / mean error", lines)
    lines = {name: (percent, curve) for name, curve in curves.items()}
    yield "chart", Chart(f"Discard, {error} error", x_label, f"error of the rest [{unit}]", lines)


def calibration_blocks(maps: dict, means: dict, images: int) -> Iterator[Block]:
    calibrations = {(name, error): bins for name, entry in maps.items() for error, bins in entry.get("calibration", {}).items()}
    if not calibrations:
        return
    yield (
        "text",
        f"Calibration, in {BINS} bins of equally many pixels by prediction: expected against mean absolute error, root mean "
        "variance against root mean square error. ENCE: mean over bins of |observed - predicted| / predicted. The variance is "
        "in units of the latent, so its σ is evaluated by its shape alone, after one global scale to the mean (square) of the "
        "error; in single images, after a scale for each.",
    )
    label = {key: f"{key[0]}{' (scaled)' if key[0] == 'variance' else ''}, {key[1]}" for key in calibrations}
    rows = [
        [label[name, error], number(bins["ence"]), cell(means.get(name, {}).get(f"ence_{error}"), images)]
        for (name, error), bins in calibrations.items()
    ]
    yield "table", [["map, error", "ENCE of all pixels ↓", "ENCE of an image, mean over images ↓"], *rows]
    lines = {label[key]: (bins["predicted"], bins["observed"]) for key, bins in calibrations.items()}
    highest = max(max(x + y) for x, y in lines.values())
    lines["calibrated"] = ([0, highest], [0, highest])
    yield "chart", Chart("Reliability", "predicted error [8-bit units]", "observed error [8-bit units]", lines)
