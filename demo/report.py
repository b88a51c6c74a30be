"""Evaluate the demo: one figure and one table over the held-out simulated scenes.

    python demo/report.py --scenes data/demo --translated work_dir/demo/translated --base assets/demo_base --output out

Beside the translation stand the copied SAR, the mean training image and the VAE's own reconstruction of the true EO, which
no translation can beat; beside the variance stands the SAR's brightness. Writes figure.png, report.md and report.json.
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
from cdiffset.errors import Parser, UserError, run
from cdiffset.evaluation.uncertainty import auroc, ause, spearman
from cdiffset.images import list_images, read_eo, read_sar, read_tiff, to_tensor, write_png, write_text
from cdiffset.model import decode, encode, load_vae

FIGURE_SCENES = 6
SCALE = 2  # a 64 px scene is shown at 128 px


def stack(folder: Path, names: list[Path], read) -> np.ndarray:
    """The named images of a folder, read by `read` => [N, ...]."""
    return np.stack([read(folder / name) for name in names])


def read_mask(path: Path) -> np.ndarray:
    return np.array(Image.open(path)) > 0


def read_variance(path: Path) -> np.ndarray:
    return read_tiff(path.with_suffix(".tif"))


def picture_rows(images: dict[str, np.ndarray], mean_train_eo: np.ndarray, base: str) -> dict[str, dict[str, float]]:
    """PSNR and SSIM (standard convention) of the translation and of what it must beat or cannot beat."""
    eo = to_tensor(images["eo"])
    vae = load_vae(base)
    with torch.no_grad():
        ceiling = torch.cat([decode(vae, encode(vae, chunk)) for chunk in eo.split(32)])
    candidates = {
        "translation": to_tensor(images["translated"]),
        "the SAR, copied": to_tensor(images["sar"]),
        "the mean training image": to_tensor(np.broadcast_to(mean_train_eo, images["eo"].shape)),
        "the VAE's reconstruction of the true EO (ceiling)": ceiling,
    }
    metrics = utils.PairMetrics(with_lpips=False)
    rows = {}
    for name, candidate in candidates.items():
        values = metrics(candidate, eo)["standard"]
        rows[name] = {"psnr": float(np.mean(values["psnr"])), "ssim": float(np.mean(values["ssim"]))}
    return rows


def confidence_rows(images: dict[str, np.ndarray]) -> dict[str, dict[str, float]]:
    """Variance and, as the trivial baseline, SAR brightness: do they rank the error and find the planted discrepancies?

    Pooled over all pixels of all scenes. Error: absolute, mean over RGB. AUROC: the pixels of one kind of discrepancy against
    all pixels without any.
    """
    error = np.abs(images["translated"] - images["eo"]).mean(-1)  # [N,H,W]
    sar_only, eo_only = images["sar_only"], images["eo_only"]
    clean = ~(sar_only | eo_only)
    rows = {}
    for name, score in (("variance", images["variance"]), ("SAR brightness", images["sar"][..., 0])):
        rows[name] = {
            "spearman": spearman(score, error),
            "ause": ause(score, error),
            "auroc_sar_only": auroc(score, sar_only, clean),
            "auroc_eo_only": auroc(score, eo_only, clean),
        }
    return rows


def table(pictures: dict, confidence: dict, scenes: int) -> str:
    lines = [f"# The demo on {scenes} held-out scenes", "", "| picture | PSNR [dB] ↑ | SSIM ↑ |", "|---|---|---|"]
    lines += [f"| {name} | {row['psnr']:.2f} | {row['ssim']:.3f} |" for name, row in pictures.items()]
    lines += ["", "| ranking of the pixels by | Spearman with the error ↑ | AUSE ↓ | AUROC SAR-only ↑ | AUROC EO-only |"]
    lines += ["|---|---|---|---|---|"]
    for name, row in confidence.items():
        lines.append(f"| {name} | " + " | ".join(f"{value:.3f}" for value in row.values()) + " |")
    lines += ["", "SAR-only, EO-only: objects that only one of the two images shows. The latter cannot be known from the SAR."]
    return "\n".join(lines) + "\n"


def figure(images: dict[str, np.ndarray], confidence_maps: np.ndarray) -> np.ndarray:
    """The scenes with the most discrepant pixels, a row each: SAR, EO, translation, confidence, true discrepancies."""
    discrepant = images["sar_only"].sum((1, 2)) + images["eo_only"].sum((1, 2))
    chosen = np.argsort(-discrepant, kind="stable")[:FIGURE_SCENES]
    discrepancies = np.zeros((*images["sar_only"].shape, 3), np.float32)
    discrepancies[images["sar_only"]] = (255, 90, 60)
    discrepancies[images["eo_only"]] = (70, 140, 255)
    columns = {
        "SAR": images["sar"], "EO": images["eo"], "translation": images["translated"],
        "confidence": np.repeat(confidence_maps[..., None], 3, -1), "only SAR / only EO": discrepancies,
    }  # fmt: skip
    rows = []
    for place, scene in enumerate(chosen):
        enlarged = [pixels[scene].repeat(SCALE, 0).repeat(SCALE, 1) for pixels in columns.values()]
        tensors = [to_tensor(pixels) for pixels in enlarged]
        rows.append(utils.panel(tensors, list(columns) if place == 0 else None))
    spacer = np.full((4, rows[0].shape[1], 3), 255, np.uint8)
    return np.concatenate([piece for row in rows for piece in (row, spacer)][:-1])


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Figure and table of the demo.", allow_abbrev=False)
    parser.add_argument("--scenes", type=Path, required=True, help="folder written by data/simulate.py")
    parser.add_argument(
        "--translated", type=Path, required=True, help="folder with eo/, confidence/ and variance/ from test.py"
    )
    parser.add_argument("--base", required=True, help="base model, for the VAE's reconstruction")
    parser.add_argument("--output", type=Path, required=True, help="where figure.png, report.md and report.json go")
    args = parser.parse_args(argv)
    test, names = args.scenes / "test", list_images(args.scenes / "test" / "sar")
    if missing := [name for name in names if not (args.translated / "eo" / name).is_file()]:
        raise UserError(f"--translated: {len(missing)} of {len(names)} scenes have no translation, the first is {missing[0]}")
    images = {
        "sar": stack(test / "sar", names, read_sar),
        "eo": stack(test / "eo", names, read_eo),
        "sar_only": stack(test / "mask_sar_only", names, read_mask),
        "eo_only": stack(test / "mask_eo_only", names, read_mask),
        "translated": stack(args.translated / "eo", names, read_eo),
        "variance": stack(args.translated / "variance", names, read_variance),
    }
    train_eo = args.scenes / "train" / "eo"
    mean_train_eo = stack(train_eo, list_images(train_eo), read_eo).mean(0)
    pictures, confidence = picture_rows(images, mean_train_eo, args.base), confidence_rows(images)
    text = table(pictures, confidence, len(names))
    record = {"scenes": len(names), "pictures": pictures, "confidence": confidence}
    maps = stack(args.translated / "confidence", names, lambda path: np.array(Image.open(path), np.float32))
    write_png(args.output / "figure.png", figure(images, maps))
    for name, written in (("report.md", text), ("report.json", json.dumps(record, indent=2) + "\n")):
        write_text(args.output / name, written)
    print(text)
    print(f"Pictures: {args.output / 'figure.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
