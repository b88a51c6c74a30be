"""Evaluate a demo: one figure and one table of its held-out images.

    python demo/report.py --scenes data/sentinel_demo --parts test unseen --translated work_dir/demo/translated \
      --base assets/sentinel_base --calibration work_dir/demo/stage2/best/calibration.json --output work_dir/demo
    python demo/report.py --scenes data/simulated --translated work_dir/simulated/translated --base assets/simulated_base \
      --output work_dir/simulated

Beside the translations stand the copied SAR, the mean training image and the VAE's own reconstruction of the true EO, which
no translation can beat; beside the maps stands the SAR's brightness. Writes figure.png, report.md and report.json.
"""

import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import torch
from PIL import Image

import utils
from cdiffset.calibration.calibration import load
from cdiffset.calibration.error_pictures import ERROR_VIEW_MAX, colours
from cdiffset.errors import Parser, UserError, run
from cdiffset.evaluation.uncertainty import auroc, ause, spearman
from cdiffset.images import list_images, read_eo, read_sar, read_tiff, to_tensor, write_png, write_text
from cdiffset.model import load_vae
from cdiffset.pipeline import decode, encode

# Folders of test.py's translations, and what they hold. One sample is the method's own output.
SAMPLINGS = {"sample": "one sample", "mean": "mean of 8 samples"}
MAPS = {"variance": "variance", "spread": "spread of 8 samples", "error": "expected error"}  # folders of test.py's maps
METRICS = {"psnr": "PSNR [dB] ↑", "ssim": "SSIM ↑", "squeezenet": "SqueezeNet distance ↓"}
DIGITS = {"psnr": 2, "ssim": 3, "squeezenet": 3}
MASKS = {"sar_only": "AUROC SAR-only ↑", "eo_only": "AUROC EO-only"}
BATCH = 16
FIGURE_ROWS = 6
SHOWN_PX = 128  # smaller images are enlarged to it


def stack(folder: Path, names: list[Path], read) -> np.ndarray:
    """The named images of a folder, read by `read` => [N, ...]."""
    return np.stack([read(folder / name) for name in names])


def read_mask(path: Path) -> np.ndarray:
    return np.array(Image.open(path)) > 0


def read_grey(path: Path) -> np.ndarray:
    """An 8-bit image of one channel, as three."""
    return np.array(Image.open(path), np.float32)[..., None].repeat(3, -1)


def read_part(scenes: Path, translated: Path) -> dict:
    """One part of the images: {"names", "sar", "eo", "masks": {name: [N,H,W]}, samplings: {"eo", maps}}."""
    names = list_images(scenes / "sar")
    pngs, tiffs = ([name.with_suffix(suffix) for name in names] for suffix in (".png", ".tif"))
    part = {
        "names": names,
        "sar": stack(scenes / "sar", names, read_sar),
        "eo": stack(scenes / "eo", names, read_eo),
        "masks": {
            name: stack(scenes / f"mask_{name}", pngs, read_mask) for name in MASKS if (scenes / f"mask_{name}").is_dir()
        },
    }
    for sampling in SAMPLINGS:
        folder = translated / sampling
        if not folder.is_dir():
            continue
        if missing := [name for name in pngs if not (folder / "eo" / name).is_file()]:
            lacking = f"{len(missing)} of {len(names)} images have no translation in {folder / 'eo'}"
            raise UserError(f"--translated: {lacking}, the first is {missing[0]}")
        maps = {name: stack(folder / name, tiffs, read_tiff) for name in MAPS if (folder / name).is_dir()}
        part[sampling] = {"eo": stack(folder / "eo", pngs, read_eo), **maps}
        if (folder / "confidence").is_dir():
            part[sampling]["confidence"] = stack(folder / "confidence", pngs, read_grey)
    if not any(sampling in part for sampling in SAMPLINGS):
        raise UserError(f"--translated: expected {' or '.join(SAMPLINGS)} in {translated}, found neither")
    return part


def picture_rows(part: dict, mean_train_eo: np.ndarray, base: str) -> dict[str, dict[str, float]]:
    """METRICS (standard convention) of the translations and of what they must beat or cannot beat."""
    eo = to_tensor(part["eo"])
    vae = load_vae(base)
    with torch.no_grad():
        ceiling = torch.cat([decode(vae, encode(vae, chunk)) for chunk in eo.split(BATCH)])
    candidates = {title: to_tensor(part[sampling]["eo"]) for sampling, title in SAMPLINGS.items() if sampling in part}
    candidates |= {
        "the SAR, copied": to_tensor(part["sar"]),
        "the mean training image": to_tensor(np.broadcast_to(mean_train_eo, part["eo"].shape)),
        "the VAE's reconstruction of the true EO (ceiling)": ceiling,
    }
    metrics = utils.PairMetrics(with_lpips=False, with_squeezenet=True, conventions=("standard",))
    rows = {}
    for name, candidate in candidates.items():
        chunks = [metrics(*chunk)["standard"] for chunk in zip(candidate.split(BATCH), eo.split(BATCH), strict=True)]
        rows[name] = {metric: float(np.mean([value for chunk in chunks for value in chunk[metric]])) for metric in METRICS}
    return rows


def map_rows(part: dict) -> dict[str, dict[str, float]]:
    """The maps and, as the trivial baseline, SAR brightness: do they rank the error and find the planted discrepancies?

    Pooled over all pixels of all images. Error: absolute, mean over RGB, of the translation that a map belongs to. AUROC: the
    pixels of one kind of discrepancy against all pixels without any.
    """
    clean = ~np.logical_or.reduce(list(part["masks"].values())) if part["masks"] else None
    rows = {}
    for sampling, title in SAMPLINGS.items():
        if sampling not in part:
            continue
        error = np.abs(part[sampling]["eo"] - part["eo"]).mean(-1)  # [N,H,W]
        scores = {shown: part[sampling][name] for name, shown in MAPS.items() if name in part[sampling]}
        for name, score in {**scores, "SAR brightness": part["sar"][..., 0]}.items():
            rows[f"{title}: {name}"] = {
                "spearman": spearman(score, error),
                "ause": ause(score, error),
                **{f"auroc_{mask}": auroc(score, pixels, clean) for mask, pixels in part["masks"].items()},
            }
    return rows


def coverage_of(part: dict, quantiles: dict[str, float]) -> dict[str, float]:
    """{level: share of the pixels whose error is within that interval of the calibrated expected error}."""
    error = np.abs(part["mean"]["eo"] - part["eo"]).mean(-1)
    return {level: float(np.mean(error <= quantile * part["mean"]["error"])) for level, quantile in quantiles.items()}


def table(record: dict) -> str:
    lines = []
    for part, rows in record["parts"].items():
        lines += [f"## {part}: {rows['images']} held-out images", "", f"| picture | {' | '.join(METRICS.values())} |"]
        lines += ["|---" * (len(METRICS) + 1) + "|"]
        for name, row in rows["pictures"].items():
            lines.append(f"| {name} | " + " | ".join(f"{row[metric]:.{DIGITS[metric]}f}" for metric in METRICS) + " |")
        masks = [title for mask, title in MASKS.items() if f"auroc_{mask}" in next(iter(rows["maps"].values()))]
        columns = ["ranking of the pixels by", "Spearman with the error ↑", "AUSE ↓", *masks]
        lines += ["", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
        for name, row in rows["maps"].items():
            lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
        if masks:
            lines += ["", "SAR-only, EO-only: objects that only one of the images shows. The SAR does not show the latter."]
        lines.append("")
    if coverage := record.get("coverage"):
        first = next(iter(record["parts"]))
        lines += [f"The expected error was calibrated on three quarters of the images of `{first}`.", ""]
        levels = list(next(iter(coverage.values())))
        lines += ["| intervals of the expected error cover | " + " | ".join(f"{float(level):.0%}" for level in levels) + " |"]
        lines += ["|---" * (len(levels) + 1) + "|"]
        for name, row in coverage.items():
            lines.append(f"| {name} | " + " | ".join(f"{share:.1%}" for share in row.values()) + " |")
    return "\n".join(lines).rstrip() + "\n"


def figure(part: dict) -> np.ndarray:
    """SAR, EO and translations, then the maps; with masks the images of most discrepant pixels, else evenly chosen ones."""
    count = len(part["names"])
    chosen = np.unique(np.linspace(0, count - 1, FIGURE_ROWS + 2).round().astype(int)[1:-1])
    columns = {"SAR": part["sar"], "EO": part["eo"]}
    columns |= {title: part[sampling]["eo"] for sampling, title in SAMPLINGS.items() if sampling in part}
    last = part[[sampling for sampling in SAMPLINGS if sampling in part][-1]]
    if "error" in last:
        columns[f"expected error, 0 to {ERROR_VIEW_MAX}"] = np.stack([colours(error) for error in last["error"]])
    elif "confidence" in last:
        columns["confidence"] = last["confidence"]
    if masks := part["masks"]:
        chosen = np.argsort(-sum(mask.sum((1, 2)) for mask in masks.values()), kind="stable")[:FIGURE_ROWS]
        columns["only SAR / only EO"] = discrepancies = np.zeros((*part["sar"].shape[:3], 3), np.float32)
        discrepancies[masks["sar_only"]] = (255, 90, 60)
        discrepancies[masks["eo_only"]] = (70, 140, 255)
    scale = -(-SHOWN_PX // part["sar"].shape[1])
    rows = []
    for index in chosen:
        enlarged = [to_tensor(pixels[index].repeat(scale, 0).repeat(scale, 1)) for pixels in columns.values()]
        rows.append(utils.panel(enlarged, list(columns) if not rows else None))
    spacer = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([piece for row in rows for piece in (row, spacer)][:-1])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Figure and table of a demo.", allow_abbrev=False)
    parser.add_argument("--scenes", type=Path, required=True, help="folder of train/ and the parts, sar/ and eo/ in each")
    parser.add_argument("--parts", nargs="+", default=["test"], help="held-out parts; the figure shows the first [test]")
    samplings = " and ".join(f"PART/{sampling}/" for sampling in SAMPLINGS)
    parser.add_argument("--translated", type=Path, required=True, help=f"folder of {samplings}, each with what test.py wrote")
    parser.add_argument("--base", required=True, help="base model, for the VAE's reconstruction")
    parser.add_argument("--calibration", type=Path, help="file of calibrate.py, fitted on the first part")
    parser.add_argument("--output", type=Path, required=True, help="where figure.png, report.md and report.json go")
    args = parser.parse_args(argv)
    parts = {name: read_part(args.scenes / name, args.translated / name) for name in args.parts}
    if args.calibration and not all("error" in part.get("mean", {}) for part in parts.values()):
        raise UserError("--calibration: it is of the mean's expected error, expected mean/error in every part of --translated")
    train_eo = args.scenes / "train" / "eo"
    mean_train_eo = stack(train_eo, list_images(train_eo), read_eo).mean(0)
    record = {
        "parts": {
            name: {
                "images": len(part["names"]),
                "pictures": picture_rows(part, mean_train_eo, args.base),
                "maps": map_rows(part),
            }
            for name, part in parts.items()
        }
    }
    if args.calibration:
        calibration, (first, *others) = load(args.calibration), args.parts
        held_out = f"{first}: {calibration.report['images']['held_out']} images that the calibration left out"
        record["coverage"] = {held_out: calibration.report["coverage"]}
        record["coverage"] |= {f"{name}: all": coverage_of(parts[name], calibration.quantiles) for name in others}
    text = table(record)
    write_png(args.output / "figure.png", figure(parts[args.parts[0]]))
    for name, written in (("report.md", text), ("report.json", json.dumps(record, indent=2) + "\n")):
        write_text(args.output / name, written)
    print(text)
    print(f"Pictures: {args.output / 'figure.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
