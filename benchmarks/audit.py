"""How well does an audit find what it is for? Markdown tables from simulated scenes with known discrepancies.

    python benchmarks/audit.py --checkpoint work_dir/demo/stage2/best --data data/demo

Pixels: the planted discrepancies of data/demo/test, by timestep, noise draws and standardisation. Pairs: new, wider scenes of
the same kind, their EO shifted, swapped with that of another scene, or free of discrepancies. Minutes on two CPU cores.
"""

import argparse
import json
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import torch
from PIL import Image
from tqdm import tqdm

from cdiffset.auditing.residual import DRAWS, LOCAL_QUANTILE, TIMESTEPS, residual_map, squared_residual
from cdiffset.checkpoint import find_weights, read_meta
from cdiffset.config import DEFAULT_PROMPT
from cdiffset.errors import UserError, run
from cdiffset.evaluation.uncertainty import auroc
from cdiffset.images import list_images, read_eo, read_sar, to_signed
from cdiffset.model import embed_prompt, encode, load_scheduler, load_unet, load_vae
from data.simulate import Simulation, simulate_scene

CANDIDATE_TIMESTEPS, CANDIDATE_DRAWS = (100, 250, 500, 600, 750, 900, 950), (1, 2, 4, 8)
SHIFTS_PX = (1, 2, 4, 8, 16)
CHANGED_PX = 40  # a pair counts as changed with at least so many discrepant pixels
CHUNK = 32  # images per pass


class Model(NamedTuple):
    unet: torch.nn.Module
    vae: torch.nn.Module
    scheduler: object
    prompt_embedding: torch.Tensor


def load(checkpoint: str, device: str) -> Model:
    find_weights(Path(checkpoint), "--checkpoint")
    trained = read_meta(checkpoint).get("config")
    if trained is None:
        raise UserError(f"--checkpoint: {checkpoint} has no checkpoint.json, expected a checkpoint folder of this code")
    base = trained["pretrained_model_name_or_path"]
    vae = load_vae(base).to(device)
    unet, _ = load_unet(checkpoint, base, vae.config.latent_channels, "--checkpoint")
    prompt_embedding = embed_prompt(base, trained.get("prompt", DEFAULT_PROMPT)).to(device)
    return Model(unet.to(device), vae, load_scheduler(base, trained["prediction_type"]), prompt_embedding)


def as_batch(pixels: list[np.ndarray], device) -> torch.Tensor:
    """Images [H, W, 3] in 0-255 => [N, 3, H, W] in [-1, 1]."""
    return to_signed(torch.from_numpy(np.stack(pixels)).float().permute(0, 3, 1, 2)).to(device)


def enlarged(maps: torch.Tensor, side: int, mode: str = "bilinear") -> np.ndarray:
    """[N, 1, h, w] => [N, side, side]."""
    options = {} if mode == "nearest" else {"align_corners": False}
    return torch.nn.functional.interpolate(maps, (side, side), mode=mode, **options)[:, 0].cpu().numpy()


# ---------------------------------------------------------------------------------------------------------------- pixels
def pixel_tables(model: Model, data: Path, device: str) -> list[str]:
    """AUROC of the pixels of each kind of discrepancy against the pixels without any."""
    names = list_images(data / "sar")
    masks = {
        kind: np.stack([np.array(Image.open(data / f"mask_{kind}" / name)) > 0 for name in names])
        for kind in ("sar_only", "eo_only")
    }
    either = masks["sar_only"] | masks["eo_only"]

    def cells(maps: torch.Tensor, mode: str = "bilinear") -> str:
        scores = enlarged(maps, either.shape[1], mode)
        return " | ".join(f"{auroc(scores, positive, ~either):.3f}" for positive in (either, *masks.values()))

    with torch.no_grad():
        z_sar, z_eo = (
            torch.cat(
                [encode(model.vae, chunk) for chunk in as_batch([read(data / kind / n) for n in names], device).split(CHUNK)]
            )
            for kind, read in (("sar", read_sar), ("eo", read_eo))
        )
    lines = ["| timestep | draws | residual | all | only in the SAR | only in the EO |", "|---|---|---|---|---|---|"]
    for timestep in tqdm(CANDIDATE_TIMESTEPS, desc="timesteps"):
        plain, standardised = residuals(model, z_sar, z_eo, timestep, max(CANDIDATE_DRAWS))  # [draws,N,1,h,w], or None
        for draws in CANDIDATE_DRAWS:
            lines.append(f"| {timestep} | {draws} | plain | {cells(plain[:draws].mean(0))} |")
            if standardised is not None:
                lines.append(f"| {timestep} | {draws} | over σ² | {cells(standardised[:draws].mean(0))} |")
        if timestep == TIMESTEPS[0]:
            chosen = plain[:DRAWS].mean(0)
    lines += ["", f"Upsampling of the map, timestep {TIMESTEPS[0]}, {DRAWS} draws:", ""]
    lines += ["| upsampling | all | only in the SAR | only in the EO |", "|---|---|---|---|"]
    return lines + [f"| {mode} | {cells(chosen, mode)} |" for mode in ("nearest", "bilinear", "bicubic")]


def residuals(model: Model, z_sar, z_eo, timestep: int, draws: int):
    """=> (squared residuals, the same over σ² or None from stage 1), each [draws, N, 1, h, w]; the noise of residual_map."""
    generator, plain, standardised = torch.Generator().manual_seed(0), [], []
    for _ in range(draws):
        noise = torch.randn(1, *z_eo.shape[1:], generator=generator).to(z_eo.device)
        chunks = [
            squared_residual(model.unet, model.scheduler, sar, eo, noise, timestep, model.prompt_embedding)
            for sar, eo in zip(z_sar.split(CHUNK), z_eo.split(CHUNK), strict=True)
        ]
        plain.append(torch.cat([squared for squared, _ in chunks]))
        standardised += [torch.cat([sq / sigma2 for sq, sigma2 in chunks])] if chunks[0][1] is not None else []
    return torch.stack(plain), torch.stack(standardised) if standardised else None


# ----------------------------------------------------------------------------------------------------------------- pairs
def pair_table(model: Model, record: dict, count: int, device: str) -> list[str]:
    """AUROC of spoilt pairs against the same pairs left alone, and the share of pairs that score higher than before."""
    size, margin = record["size"], max(SHIFTS_PX)
    own = {field.name: record.get(field.name, field.default) for field in fields(Simulation)}
    simulation = Simulation(**{**own, "size": size + 2 * margin})
    scenes, unchanged = (
        [simulate_scene(np.random.default_rng([record["seed"], 2, index]), settings) for index in range(count)]
        for settings in (simulation, replace(simulation, p_sar_only=0, p_eo_only=0))
    )
    directions = [((0, 1), (0, -1), (1, 0), (-1, 0))[k] for k in np.random.default_rng(0).integers(4, size=count)]

    def cut(image: np.ndarray, direction=(0, 0), shift_px: int = 0) -> np.ndarray:
        top, left = (margin + shift_px * step for step in direction)
        return image[top : top + size, left : left + size]

    def scores(sar_scenes: list[dict], eo: list[np.ndarray]) -> dict[str, np.ndarray]:
        sar = as_batch([np.repeat(cut(scene["sar"])[..., None], 3, -1) for scene in sar_scenes], device)
        chunks = zip(sar.split(CHUNK), as_batch(eo, device).split(CHUNK), strict=True)
        maps = enlarged(torch.cat([residual_map(*model[:3], *chunk, model.prompt_embedding) for chunk in chunks]), size)
        return {"score": maps.mean((1, 2)), "local": np.quantile(maps, LOCAL_QUANTILE, axis=(1, 2))}

    before = scores(scenes, [cut(scene["eo"]) for scene in scenes])
    spoilt = {
        f"shifted by {px} px": scores(scenes, [cut(s["eo"], d, px) for s, d in zip(scenes, directions, strict=True)])
        for px in tqdm(SHIFTS_PX, desc="shifts")
    }
    spoilt["EO of another scene"] = scores(scenes, [cut(scene["eo"]) for scene in scenes[1:] + scenes[:1]])
    rows = [(name, before, after) for name, after in spoilt.items()]
    changed = np.array([cut(s["mask_sar_only"] | s["mask_eo_only"]).astype(bool).sum() >= CHANGED_PX for s in scenes])
    clean = scores(unchanged, [cut(scene["eo"]) for scene in unchanged])
    rows.append(
        (f"objects came or went ({changed.sum()} pairs)", clean, {name: values[changed] for name, values in before.items()})
    )
    lines = ["| pairs | AUROC, score | rose, score | AUROC, local | rose, local |", "|---|---|---|---|---|"]
    for name, reference, after in rows:
        cells = []
        for which in ("score", "local"):
            twins = reference[which][changed] if len(after[which]) < count else reference[which]
            cells += [f"{auroc_of(after[which], reference[which]):.3f}", f"{(after[which] > twins).mean():.0%}"]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines


def auroc_of(positive: np.ndarray, negative: np.ndarray) -> float:
    is_positive = np.repeat([True, False], [len(positive), len(negative)])
    return auroc(np.concatenate([positive, negative]), is_positive, ~is_positive)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Measure the audit on simulated scenes.", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder of a run on such scenes")
    parser.add_argument("--data", type=Path, required=True, help="folder written by data/simulate.py")
    parser.add_argument("--pairs", type=int, default=96, help="scenes for the table of pairs [96]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not (args.data / "simulation.json").is_file():
        raise UserError(f"--data: {args.data} holds no simulation.json, expected a folder written by data/simulate.py")
    if args.pairs < 2:
        raise UserError(f"--pairs: expected at least 2, found {args.pairs}")
    model, record = load(args.checkpoint, args.device), json.loads((args.data / "simulation.json").read_text())
    pairs = pair_table(model, record, args.pairs, args.device)
    print(
        "\n".join(["", f"## Pairs: {args.pairs} scenes, timestep {TIMESTEPS[0]}, {DRAWS} draws, plain", "", *pairs]), flush=True
    )
    pixels = pixel_tables(model, args.data / "test", args.device)
    print("\n".join(["", "## Pixels of planted discrepancies against pixels without: AUROC", "", *pixels]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
