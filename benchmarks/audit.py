"""How well does an audit find what it is for? Markdown tables from simulated scenes with known discrepancies.

    python benchmarks/audit.py --checkpoint work_dir/simulated/stage2/best --data data/simulated

Pixels: the planted discrepancies of the held-out scenes of --data, by timestep, noise draws and standardisation. Pairs: new,
wider scenes of the same kind, their EO shifted, swapped with that of another scene, or free of discrepancies. Minutes on two
CPU cores.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import Model, load_checkpoint, table

# isort: split
import torch
from tqdm import tqdm

from benchmarks.measures import BATCH_SIZE, OTHER, TEST, Scenes, draw_scenes, read_simulation, residuals
from cdiffset.auditing.residual import DRAWS, TIMESTEPS, scores_of, squared_residual, upsampled
from cdiffset.errors import Parser, UserError, run
from cdiffset.evaluation.uncertainty import auroc
from cdiffset.pipeline import encode
from data.simulate import Simulation

CANDIDATE_TIMESTEPS, CANDIDATE_DRAWS = (100, 250, 500, 600, 750, 900, 950), (1, 2, 4, 8)
SHIFTS_PX = (1, 2, 4, 8, 16)
CHANGED_PX = 40  # a pair counts as changed with at least so many discrepant pixels


# ---------------------------------------------------------------------------------------------------------------- pixels
def pixel_tables(model: Model, scenes: Scenes) -> str:
    """AUROC of the pixels of each kind of discrepancy against the pixels without any."""
    discrepant, size = scenes.discrepant, scenes.sar.shape[-2:]
    kinds = {"all": discrepant, "only in the SAR": scenes.masks["sar_only"], "only in the EO": scenes.masks["eo_only"]}

    def cells(maps: torch.Tensor, mode: str = "bilinear") -> list[str]:
        options = {} if mode == "nearest" else {"align_corners": False}
        scores = torch.nn.functional.interpolate(maps, size, mode=mode, **options)[:, 0].cpu().numpy()
        return [f"{auroc(scores, positive, ~discrepant):.3f}" for positive in kinds.values()]

    rows, chosen = [], None
    for timestep in tqdm(CANDIDATE_TIMESTEPS, desc="timesteps"):
        for name, maps in by_draw(model, scenes, timestep, max(CANDIDATE_DRAWS)).items():
            rows += [[timestep, draws, name, *cells(maps[:draws].mean(0))] for draws in CANDIDATE_DRAWS]
            if (timestep, name) == (TIMESTEPS[0], "plain"):
                chosen = maps[:DRAWS].mean(0)
    by_mode = table(["upsampling", *kinds], [[mode, *cells(chosen, mode)] for mode in ("nearest", "bilinear", "bicubic")])
    how = f"Upsampling of the map, timestep {TIMESTEPS[0]}, {DRAWS} draws:"
    return f"{table(['timestep', 'draws', 'residual', *kinds], rows)}\n\n{how}\n\n{by_mode}"


@torch.no_grad()
def by_draw(model: Model, scenes: Scenes, timestep: int, draws: int) -> dict[str, torch.Tensor]:
    """Squared residuals, plain and, from stage 2, over σ², each [draws, N, 1, h, w]; the noise is that of residual_map."""
    device, generator = model.prompt_embedding.device, torch.Generator().manual_seed(0)
    pairs = zip(scenes.sar.to(device).split(BATCH_SIZE), scenes.eo.to(device).split(BATCH_SIZE), strict=True)
    latents, maps = [[encode(model.vae, pixels) for pixels in pair] for pair in pairs], {}
    for _ in range(draws):
        noise = torch.randn(1, *latents[0][0].shape[1:], generator=generator).to(device)
        parts = [
            squared_residual(model.unet, model.scheduler, *pair, noise, timestep, model.prompt_embedding) for pair in latents
        ]
        maps.setdefault("plain", []).append(torch.cat([squared for squared, _ in parts]))
        if parts[0][1] is not None:
            maps.setdefault("over σ²", []).append(torch.cat([squared / sigma2 for squared, sigma2 in parts]))
    return {name: torch.stack(each) for name, each in maps.items()}


# ----------------------------------------------------------------------------------------------------------------- pairs
def pair_table(model: Model, simulation: Simulation, seed: int, count: int) -> str:
    """AUROC of spoilt pairs against the same pairs left alone, and the share of pairs that score higher than before."""
    size, margin = simulation.size, max(SHIFTS_PX)
    wide = replace(simulation, size=size + 2 * margin)
    scenes, unchanged = (
        draw_scenes(each, OTHER, range(count), seed) for each in (wide, replace(wide, p_sar_only=0, p_eo_only=0))
    )
    directions = np.array([(0, 1), (0, -1), (1, 0), (-1, 0)])[np.random.default_rng(0).integers(4, size=count)]

    def cut(images, shift_px: int = 0):
        """The middle of wider images [..., H, W], each moved in its own direction."""
        corners = margin + shift_px * directions
        return [each[..., y : y + size, x : x + size] for each, (y, x) in zip(images, corners, strict=True)]

    def scores(sar: torch.Tensor, eo: torch.Tensor, shift_px: int = 0) -> np.ndarray:
        """=> [N, 2]: `score` and `local` of each pair."""
        maps = upsampled(residuals(model, torch.stack(cut(sar)), torch.stack(cut(eo, shift_px))), (size, size))
        return np.array([scores_of(each) for each in maps[:, 0].numpy()])

    before = scores(scenes.sar, scenes.eo)
    shifts = tqdm(SHIFTS_PX, desc="shifts")
    compared = {f"shifted by {px} px": (before, scores(scenes.sar, scenes.eo, px), slice(None)) for px in shifts}
    compared["EO of another scene"] = (before, scores(scenes.sar, scenes.eo.roll(-1, 0)), slice(None))
    changed = np.array([mask.sum() >= CHANGED_PX for mask in cut(scenes.discrepant)])
    clean = scores(unchanged.sar, unchanged.eo)
    compared[f"objects came or went ({changed.sum()} pairs)"] = (clean, before, changed)
    rows = []
    for name, (reference, after, which) in compared.items():
        rows.append([name])
        for kind in (0, 1):
            positive, twins = after[which, kind], reference[which, kind]
            rows[-1] += [f"{auroc_of(positive, reference[:, kind]):.3f}", f"{(positive > twins).mean():.0%}"]
    return table(["pairs", "AUROC, score", "rose, score", "AUROC, local", "rose, local"], rows)


def auroc_of(positive: np.ndarray, negative: np.ndarray) -> float:
    is_positive = np.repeat([True, False], [len(positive), len(negative)])
    return auroc(np.concatenate([positive, negative]), is_positive, ~is_positive)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Measure the audit on simulated scenes.", allow_abbrev=False)
    parser.add_argument("--checkpoint", required=True, help="checkpoint folder of a run on such scenes")
    parser.add_argument("--data", type=Path, required=True, help="folder written by data/simulate.py")
    parser.add_argument("--pairs", type=int, default=96, help="scenes for the table of pairs [96]")
    parser.add_argument("--images", type=int, help="held-out scenes for the tables of pixels, the first so many [all]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if args.pairs < 2 or (args.images is not None and args.images < 1):
        raise UserError("expected --pairs of at least 2 and --images of at least 1")
    simulation, seed, count = read_simulation(args.data)
    model = load_checkpoint(args.checkpoint, args.device)
    pairs = pair_table(model, simulation, seed, args.pairs)
    print(f"\n## Pairs: {args.pairs} scenes, timestep {TIMESTEPS[0]}, {DRAWS} draws, plain\n\n{pairs}", flush=True)
    pixels = pixel_tables(model, draw_scenes(simulation, TEST, range(args.images or count), seed))
    print(f"\n## Pixels of planted discrepancies against pixels without: AUROC\n\n{pixels}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
