"""What do fewer steps cost? Schedulers, timestep spacings and step counts on pairs whose discrepancies are known.

    python benchmarks/steps.py    # after `make demo-simulated`; minutes on two CPU cores

translates the same images by every sampling, each from the same noise, compares picture and σ² with the truth and with the
paper's sampling, prints the tables of STEPS.md and writes steps.png into --output. STEPS.md says what the columns mean; the
presets of cdiffset/inference/options.py are chosen by them.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.harness import Model, load_checkpoint

# isort: split
import torch
from tqdm import tqdm

from benchmarks.measures import TEST, Scenes, draw_scenes, read_simulation
from cdiffset.errors import Parser, UserError, run
from cdiffset.evaluation.uncertainty import auroc, spearman
from cdiffset.images import written_whole
from cdiffset.inference.options import PAPER, PRESETS, SCHEDULERS, TIMESTEP_SPACINGS, Sampling
from cdiffset.pipeline import image_noise, make_sampler, to_uint8, translate, variance_map
from utils import PairMetrics

STEPS = (1, 2, 4, 5, 8, 10, 20, 25, 50)


@dataclass(frozen=True)
class Result:
    """What a sampling makes of N images."""

    eo: torch.Tensor  # [N,3,H,W] in [-1,1]
    sigma2: torch.Tensor  # [N,1,h,w]
    seconds: float  # per image


def sampled(model: Model, sampling: Sampling, sar: torch.Tensor, batch_size: int, seed: int, bar: tqdm) -> Result:
    scheduler, made = make_sampler(model.scheduler, sampling.scheduler, sampling.timestep_spacing), []
    started = time.perf_counter()
    for batch in sar.split(batch_size):
        noise = image_noise(model.vae, seed, to_uint8(batch))
        eo, sigma2 = translate(
            model.unet, model.vae, scheduler, batch, noise, model.prompt_embedding, sampling.num_inference_steps
        )
        made.append((eo.cpu(), sigma2.cpu()))
        bar.update(sampling.num_inference_steps)
    seconds = (time.perf_counter() - started) / len(sar)
    return Result(*(torch.cat(parts) for parts in zip(*made, strict=True)), seconds)


# --------------------------------------------------------------------------------------------------------------- measures
def gradient_energy(images: torch.Tensor) -> float:
    """Mean squared difference of neighbouring pixels, down and across."""
    return float(images.diff(dim=-1).square().mean() + images.diff(dim=-2).square().mean())


def measures(result: Result, paper: Result, scenes: Scenes, metrics: PairMetrics) -> dict[str, float]:
    eo = scenes.eo
    of_image = {name: float(np.mean(values)) for name, values in metrics(result.eo, eo)["standard"].items()}
    error = (result.eo - eo).abs().mean(1).numpy()
    score = variance_map(result.sigma2, tuple(eo.shape[-2:]))[:, 0].numpy()
    level = result.sigma2.double().log().mean() - paper.sigma2.double().log().mean()
    return {
        **{name: of_image[name] for name in ("psnr", "ssim", "lpips") if name in of_image},
        "detail": gradient_energy(result.eo) / gradient_energy(eo),
        "to_paper": harness.psnr(result.eo, paper.eo, peak=2),
        "auroc": auroc(score, scenes.masks["sar_only"], ~scenes.discrepant),
        "spearman": spearman(score, error),
        "map_to_paper": spearman(result.sigma2.numpy(), paper.sigma2.numpy()),
        "level": float(level.exp()),
        "seconds": result.seconds,
    }


def measure_all(model: Model, scenes: Scenes, steps: tuple[int, ...], batch_size: int, metrics: PairMetrics) -> dict:
    """=> {Sampling: measures}, and under "other noise" the paper's sampling from other noise."""
    samplings = [Sampling(name, spacing, n) for name in SCHEDULERS for spacing in TIMESTEP_SPACINGS for n in steps]
    samplings = [each for each in samplings if each != PAPER]
    sar, rows = scenes.sar.to(model.prompt_embedding.device), {}
    passes = 1 + 2 * PAPER.num_inference_steps + sum(each.num_inference_steps for each in samplings)
    with tqdm(total=passes * -(-len(sar) // batch_size), unit="pass", mininterval=1) as bar:
        sampled(model, Sampling("ddim", "trailing", 1), sar, batch_size, 0, bar)  # warms up
        paper = sampled(model, PAPER, sar, batch_size, 0, bar)
        rows[PAPER] = measures(paper, paper, scenes, metrics)
        rows["other noise"] = measures(sampled(model, PAPER, sar, batch_size, 1, bar), paper, scenes, metrics)
        for sampling in samplings:
            rows[sampling] = measures(sampled(model, sampling, sar, batch_size, 0, bar), paper, scenes, metrics)
    return rows


# ----------------------------------------------------------------------------------------------------------------- report
COLUMNS = {  # column: measure, format
    "PSNR [dB]": ("psnr", ".2f"), "SSIM ↑": ("ssim", ".3f"), "LPIPS ↓": ("lpips", ".3f"), "detail → 1": ("detail", ".3f"),
    "PSNR to the paper's ↑": ("to_paper", ".1f"), "AUROC SAR-only ↑": ("auroc", ".3f"),
    "Spearman with the error ↑": ("spearman", ".3f"), "σ² map as the paper's ↑": ("map_to_paper", ".3f"),
    "σ² level → 1": ("level", ".2f"), "s/image": ("seconds", ".3f"),
}  # fmt: skip


def table(header: str, rows: dict[str, dict[str, float]]) -> str:
    columns = {name: column for name, column in COLUMNS.items() if column[0] in next(iter(rows.values()))}
    cells = [
        [label, *(f"{row[key]:{form}}".replace("inf", "–") for key, form in columns.values())] for label, row in rows.items()
    ]
    return harness.table([header, *columns], cells)


def tables(rows: dict, steps: tuple[int, ...]) -> str:
    named = {name: " ".join(map(str, sampling)) for name, (sampling, _) in PRESETS.items()}
    presets = {f"`{name}`: {named[name]}": rows[sampling] for name, (sampling, _) in PRESETS.items() if sampling in rows}
    parts = ["## Presets", table("sampling", presets | {"paper, other noise": rows["other noise"]}), "## All samplings"]
    for name in SCHEDULERS:
        for spacing in TIMESTEP_SPACINGS:
            chosen = {str(n): rows[Sampling(name, spacing, n)] for n in steps if Sampling(name, spacing, n) in rows}
            parts += [f"### {name}, {spacing}", table("steps", chosen)]
    return "\n\n".join(parts) + "\n"


def figure(rows: dict, steps: tuple[int, ...], path: Path) -> None:
    """Four measures over the steps, a line for each scheduler and spacing, the presets as circles."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullLocator

    panels = {
        "psnr": "PSNR [dB] (high where blurred)", "detail": "detail, of the true EO's",
        "to_paper": "PSNR to the paper's result [dB]", "level": "level of σ², of the paper's",
    }  # fmt: skip
    drawing = Figure(figsize=(16, 4), layout="constrained")
    axes = drawing.subplots(1, len(panels))
    for axis, (key, title) in zip(axes, panels.items(), strict=True):
        for colour, name in zip(("C0", "C1", "C2"), SCHEDULERS, strict=True):
            for spacing, style in (("trailing", "-"), ("leading", ":")):
                drawn = {n: rows[Sampling(name, spacing, n)][key] for n in steps}
                axis.plot(drawn.keys(), drawn.values(), style, color=colour, marker=".", label=f"{name}, {spacing}")
        if key != "to_paper":
            axis.axhline(rows[PAPER][key], color="grey", linewidth=0.8)
        for preset, (sampling, _) in PRESETS.items():
            if sampling in rows and np.isfinite(rows[sampling][key]):
                place = sampling.num_inference_steps, rows[sampling][key]
                axis.plot(*place, "o", color="black", fillstyle="none", markersize=9)
                axis.annotate(preset, place, xytext=(0, 9), textcoords="offset points", ha="center")
        axis.set(title=title, xlabel="steps", xscale="log", yscale="log" if key == "level" else "linear")
        axis.set_xticks(steps, steps)
        axis.margins(x=0.1, y=0.1)
        axis.xaxis.set_minor_locator(NullLocator())
    axes[1].legend(fontsize=8)
    with written_whole(path) as temporary:
        drawing.savefig(temporary, dpi=80, format="png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Measure what fewer steps cost.", allow_abbrev=False)
    parser.add_argument("--checkpoint", default="work_dir/simulated/stage2/best", help="of stage 2 [of make demo-simulated]")
    parser.add_argument("--data", type=Path, default=Path("data/simulated"), help="folder of data/simulate.py [data/simulated]")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=STEPS, help=f"step counts, 1 to 50 [{' '.join(map(str, STEPS))}]"
    )
    parser.add_argument("--images", type=int, help="of the held-out ones the first so many [all]")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--lpips", action="store_true", help="LPIPS as well; its VGG network is fetched once")
    parser.add_argument("--output", type=Path, default=Path("work_dir/benchmarks/steps"), help="folder [%(default)s]")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args(argv)
    if not all(1 <= n <= 50 for n in args.steps) or args.batch_size < 1 or (args.images is not None and args.images < 1):
        raise UserError("expected --steps of 1 to 50, --batch-size and --images of at least 1")
    simulation, seed, count = read_simulation(args.data)
    args.images = min(args.images or count, count)
    model, metrics = load_checkpoint(args.checkpoint, args.device), PairMetrics(args.device, args.lpips)
    if model.unet.config.out_channels == model.vae.config.latent_channels:
        raise UserError(f"--checkpoint: {args.checkpoint} is of stage 1, expected one of stage 2, with a variance")
    scenes = draw_scenes(simulation, TEST, range(args.images), seed)
    rows = measure_all(model, scenes, args.steps, args.batch_size, metrics)
    figure(rows, args.steps, args.output / "steps.png")
    where = f"On {harness.machine(args.device)} (torch {torch.__version__})"
    how = f"{where}: {args.checkpoint}, {args.images} images of {args.data}/test"
    missing = "".join(f"\n{name.upper()} is missing: {reason} (--lpips)." for name, reason in metrics.absent.items())
    print(f"{how}, batches of {args.batch_size}, fp32.{missing}\n\n{tables(rows, args.steps)}")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
