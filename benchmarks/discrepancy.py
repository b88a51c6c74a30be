"""The discrepancy benchmark: which loss, prompt and read-out copes with objects that only one image of a pair shows?

    python benchmarks/discrepancy.py --size small    # 2 CPU cores
    python benchmarks/discrepancy.py --size large    # a GPU

simulates scenes whose every discrepancy is known (data/simulate.py), trains every variant over several seeds, evaluates them on
held-out scenes and writes DISCREPANCY.md, results.json and figure.png into --output. The same command again continues: trained
and evaluated variants are kept.

All variants of a seed see the same batches, noise and timesteps for as many iterations in all; those with a stage 1 share it.
The loss is the project's own (cdiffset/losses.py); the loop is a plain one over latents that are encoded once.
"""

import copy
import json
import os
import platform
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import REPO, SIMULATED_BASE, Model, machine

# isort: split
import torch
from diffusers.optimization import get_scheduler
from tqdm import tqdm

from benchmarks.discrepancy_report import Results, figure, report
from benchmarks.measures import TEST, TRAIN, draw_scenes, evaluate
from cdiffset.config import DEFAULT_PROMPT
from cdiffset.device import keep_freed_memory, quickest_autocast, quickest_precision
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import written_whole
from cdiffset.losses import target_of, training_loss
from cdiffset.model import (
    check_base,
    embed_prompt,
    load_base_unet,
    load_scheduler,
    load_unet,
    load_vae,
    patch_conv_in,
    patch_conv_out,
)
from cdiffset.pipeline import encode, predict, variance
from data.simulate import Simulation

SCENE_SEED = 0
FIGURE_FROM = 32  # the held-out scenes that the figure chooses from


# ------------------------------------------------------------------------------------------------------------- what is compared
@dataclass(frozen=True)
class Size:
    """How much is simulated, trained and evaluated."""

    train: int  # scenes
    test: int
    stage1: int  # iterations; a variant without stage 1 trains for stage1 + stage2
    stage2: int
    batch_size: int
    learning_rate: float
    seeds: tuple[int, ...]
    samples: int = 6  # translations per scene for the spread
    steps: int = 25  # of DDIM
    audit_timesteps: tuple[int, ...] = (950,)
    audit_draws: int = 4
    warmup: int = 50
    ema_decay: float = 0.995
    scene_px: int = 64
    train_levels: bool = False  # train at every level of difficulty; False: evaluate the models of the standard level at all


SIZES = {
    "tiny": Size(8, 4, 1, 1, 4, 8e-4, (0,), samples=2, steps=4, warmup=0),  # shows that the command works, nothing else
    "small": Size(4096, 160, 200, 800, 16, 1.6e-3, (0, 1, 2)),
    "large": Size(65536, 1000, 5000, 20000, 64, 3e-4, (0, 1, 2, 3, 4), samples=16, steps=50, warmup=500, ema_decay=0.9995,
                  train_levels=True),
}  # fmt: skip

# Ships and vehicles are as bright in the SAR as the permanent structures. The demo's looks, parcels and texture, which a
# small network learns in minutes.
STANDARD = Simulation(
    looks=9, parcel_px=40, texture=0.4, p_sar_only=0.4, p_eo_only=0.2, movables=3, statics=2, movable_db=-0.4
)  # fmt: skip
LEVELS = {
    "standard": STANDARD,
    "small objects": replace(STANDARD, object_scale=0.7),
    "low contrast": replace(STANDARD, contrast=0.4),
    "few looks": replace(STANDARD, looks=2),
    "few discrepancies": replace(STANDARD, p_sar_only=0.1, p_eo_only=0.1),
}


@dataclass(frozen=True)
class Variant:
    label: str
    confidence: bool = True  # C-Diff, or MSE
    beta: str | float = "timestep"
    prompt: str = DEFAULT_PROMPT
    start: str | None = "stage1"  # the variant whose weights it starts from; None: the base
    weighted_like: str | None = None  # MSE with the weights over timesteps that this C-Diff variant has come to

    @property
    def wave(self) -> int:
        """Variants of a wave need none but earlier waves."""
        return 2 if self.weighted_like else 0 if self.start is None else 1


VARIANTS = {
    "stage1": Variant("stage 1, as the others start from it", confidence=False, start=None),
    "stage1_null": Variant("the same with the null prompt", confidence=False, start=None, prompt=""),
    "mse": Variant("stage 1 alone (MSE)", confidence=False),
    "mse_weighted": Variant("MSE, timesteps weighted as by C-Diff", confidence=False, weighted_like="cdiff"),
    "cdiff": Variant("C-Diff, β = timestep"),
    "beta0": Variant("C-Diff, β = 0", beta=0.0),
    "beta05": Variant("C-Diff, β = 0.5", beta=0.5),
    "beta1": Variant("C-Diff, β = 1", beta=1.0),
    "null_prompt": Variant("C-Diff, β = timestep, null prompt", prompt="", start="stage1_null"),
    "no_stage1": Variant("C-Diff, β = timestep, without stage 1", start=None),
}
EVALUATED = [name for name in VARIANTS if not name.startswith("stage1")]
AT_EVERY_LEVEL = ("mse", "cdiff")


@dataclass(frozen=True)
class Job:
    """One variant of one seed on the scenes of one level."""

    level: str
    seed: int
    variant: str

    def folder(self, output: Path) -> Path:
        return output / self.level.replace(" ", "_") / f"seed{self.seed}" / self.variant


def all_jobs(size: Size, levels: list[str]) -> list[list[Job]]:
    """Waves of jobs, each of which may run at once; the standard level comes first, then these."""
    waves = []
    for level in ("standard", *levels):
        needed = VARIANTS if level == "standard" else ("stage1", *AT_EVERY_LEVEL) if size.train_levels else AT_EVERY_LEVEL
        for wave in range(3):
            chosen = [name for name in needed if VARIANTS[name].wave == wave]
            waves.append([Job(level, seed, name) for name in chosen for seed in size.seeds])
    return waves


def trained_at(level: str, size: Size) -> str:
    """The level whose scenes the models were trained on that are evaluated at this one."""
    return level if size.train_levels else "standard"


def scenes_of(level: str, size: Size) -> Simulation:
    return replace(LEVELS[level], size=size.scene_px)


# --------------------------------------------------------------------------------------------------------------------- training
@torch.no_grad()
def encode_scenes(base: str, simulation: Simulation, count: int, device: str) -> torch.Tensor:
    """Training scenes => latents [count, 2, C, h, w], SAR and EO, float32, by a VAE in bfloat16 as in mixed precision."""
    vae, chunks = load_vae(base, torch.bfloat16).to(device), []
    for start in tqdm(range(0, count, 64), desc="simulating and encoding", unit="batch", mininterval=5):
        scenes = draw_scenes(simulation, TRAIN, range(start, min(start + 64, count)), SCENE_SEED)
        pair = [encode(vae, pixels.to(device)).cpu() for pixels in (scenes.sar, scenes.eo)]
        chunks.append(torch.stack(pair, 1))
    return torch.cat(chunks)


def load_latents(output: Path, base: str, level: str, size: Size, device: str) -> torch.Tensor:
    file = output / level.replace(" ", "_") / "train_latents.pt"
    if not file.is_file():
        with written_whole(file) as temporary:
            torch.save(encode_scenes(base, scenes_of(level, size), size.train, device), temporary)
    return torch.load(file, weights_only=True)


def start_unet(base: str, variant: Variant, folder: Path | None):
    """The variant's U-Net before training: from the base, or from the variant that is in `folder`."""
    if folder is None:
        unet = patch_conv_in(load_base_unet(base))
    else:
        unet, _ = load_unet(str(folder), base, load_base_unet(base).config.out_channels, "start")
    return patch_conv_out(unet) if variant.confidence else unet


@torch.no_grad()
def expected_sigma2(unet, scheduler, latents: torch.Tensor, prompt_embedding: torch.Tensor, bins: int = 25) -> torch.Tensor:
    """E[σ² | t] of a trained U-Net over training scenes => [1000], constant within each of the bins of timesteps."""
    timesteps = scheduler.config.num_train_timesteps
    generator, means = torch.Generator().manual_seed(0), []
    for chunk in torch.arange(timesteps).chunk(bins):
        z_sar, z_eo = latents[torch.randint(len(latents), (32,), generator=generator)].to(prompt_embedding.device).unbind(1)
        t = chunk[torch.randint(len(chunk), (32,), generator=generator)].to(z_sar.device)
        noise = torch.randn(z_eo.shape, generator=generator).to(z_sar.device)
        _, raw = predict(unet, z_sar, scheduler.add_noise(z_eo, noise, t), t, prompt_embedding)
        means.append(variance(raw).mean().cpu().expand(len(chunk)))
    return torch.cat(means)


def cdiff_weights(scheduler, sigma2: torch.Tensor) -> torch.Tensor:
    """What C-Diff's gradient on the mean is weighted by at each timestep if σ² is E[σ² | t] everywhere, mean 1 => [1000].

    The gradient of sg[σ²]^β · (ε - ε̂)² / 2σ² with respect to ε̂ is that of the MSE times (σ²)^(β - 1).
    """
    weights = sigma2 ** (scheduler.alphas_cumprod.sqrt() - 1)
    return weights / weights.mean()


def project_loss(unet, z_sar, z_eo, noise, timesteps, *, scheduler, prompt_embedding, beta) -> torch.Tensor:
    return training_loss(unet, scheduler, z_sar, z_eo, noise, timesteps, prompt_embedding, beta)[0]


def weighted_mse(unet, z_sar, z_eo, noise, timesteps, *, scheduler, prompt_embedding, weights: torch.Tensor) -> torch.Tensor:
    """The control: MSE with a weight for each timestep [1000], shared by all cells of a latent."""
    prediction, _ = predict(unet, z_sar, scheduler.add_noise(z_eo, noise, timesteps), timesteps, prompt_embedding)
    squared = (target_of(scheduler, z_eo, noise, timesteps) - prediction.float()) ** 2
    return (weights.to(squared.device)[timesteps][:, None, None, None] * squared).mean()


def train(unet, loss_of, latents: torch.Tensor, size: Size, iterations: int, seed: int, device: str):
    """Train in place by AdamW => the average of the weights. Batches, noise and timesteps are functions of the seed alone."""
    average = copy.deepcopy(unet).requires_grad_(False)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=size.learning_rate, weight_decay=0.01)
    schedule = get_scheduler("cosine", optimizer, num_warmup_steps=min(size.warmup, iterations), num_training_steps=iterations)
    generator = torch.Generator().manual_seed(seed)
    batch = (size.batch_size, *latents.shape[2:])
    for iteration in range(iterations):
        picked = torch.randint(len(latents), (size.batch_size,), generator=generator)
        timesteps = torch.randint(1000, (size.batch_size,), generator=generator).to(device)
        noise = torch.randn(batch, generator=generator).to(device)
        z_sar, z_eo = latents[picked].to(device).unbind(1)
        with quickest_autocast(device):
            loss = loss_of(unet, z_sar, z_eo, noise, timesteps)
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        decay = min(size.ema_decay, (1 + iteration) / (10 + iteration))
        torch._foreach_lerp_(list(average.parameters()), [weight.detach() for weight in unet.parameters()], 1 - decay)
    return average.eval()


def train_job(job: Job, output: Path, base: str, size: Size, device: str) -> None:
    """Train one variant and write its averaged U-Net, whole or not at all, unless it is there."""
    folder, variant = job.folder(output), VARIANTS[job.variant]
    if (folder / "unet").is_dir() or job.level != trained_at(job.level, size):
        return
    scheduler, latents = load_scheduler(base, "epsilon"), load_latents(output, base, job.level, size, device)
    prompt = embed_prompt(base, variant.prompt).to(device)
    earlier = {name: replace(job, variant=name).folder(output) for name in (variant.start, variant.weighted_like) if name}
    unet = start_unet(base, variant, earlier.get(variant.start)).to(device).train()
    if variant.weighted_like:
        like = load_unet(str(earlier[variant.weighted_like]), base, latents.shape[2], "weighted_like")[0].to(device)
        sigma2 = expected_sigma2(like.eval(), scheduler, latents, prompt)
        loss_of = partial(weighted_mse, weights=cdiff_weights(scheduler, sigma2))
    else:
        loss_of = partial(project_loss, beta=variant.beta)
    loss_of = partial(loss_of, scheduler=scheduler, prompt_embedding=prompt)
    seed = 1000 * job.seed + (2 if variant.start else 1)  # a stage 2 sees other batches than the stage 1 before it
    average = train(unet, loss_of, latents, size, iterations_of(variant, size), seed, device)
    temporary = folder / "unet.part"
    average.save_pretrained(temporary)
    temporary.rename(folder / "unet")


def iterations_of(variant: Variant, size: Size) -> int:
    """Iterations in all are the same whatever the variant."""
    if variant.start:
        return size.stage2
    return size.stage1 + size.stage2 if variant.confidence else size.stage1


# ------------------------------------------------------------------------------------------------------- evaluation
def evaluate_job(job: Job, output: Path, base: str, size: Size, device: str) -> None:
    """Evaluate a trained variant on the held-out scenes => result.json and maps.npz in its folder, unless they are there."""
    folder, variant = job.folder(output), VARIANTS[job.variant]
    if (folder / "result.json").is_file() or job.variant not in EVALUATED:
        return
    scenes = draw_scenes(scenes_of(job.level, size), TEST, range(size.test), SCENE_SEED)
    vae, prompt = load_vae(base).to(device), embed_prompt(base, variant.prompt).to(device)
    trained = replace(job, level=trained_at(job.level, size)).folder(output)
    unet = load_unet(str(trained), base, vae.config.latent_channels, "evaluate")[0].to(device).eval()
    thorough = job.variant in AT_EVERY_LEVEL and job.level == "standard"
    with quickest_autocast(device):
        model = Model(unet, vae, load_scheduler(base, "epsilon"), prompt)
        numbers, maps = evaluate(model, scenes, size, size.samples if thorough else 1, thorough)
    if thorough:
        with written_whole(folder / "maps.npz") as temporary:
            np.savez_compressed(temporary, **{name: values[:FIGURE_FROM].astype(np.float32) for name, values in maps.items()})
    with written_whole(folder / "result.json") as temporary:
        temporary.write_text(json.dumps({**asdict(job), **numbers}, indent=2) + "\n")


def run_job(job: Job, output: Path, base: str, size: Size, device: str) -> Job:
    keep_freed_memory(torch.device(device))
    train_job(job, output, base, size, device)
    evaluate_job(job, output, base, size, device)
    return job


# ------------------------------------------------------------------------------------------------------------------ the command
def run_all(waves: list[list[Job]], workers: int, do_job) -> None:
    """Run the jobs of every wave, `workers` at a time, each in a process of its own."""
    os.environ["OMP_NUM_THREADS"] = "1"  # read when a process starts
    with (
        ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool,
        tqdm(total=sum(map(len, waves)), desc="variants", unit="job") as bar,
    ):
        for wave in waves:
            for job in pool.map(do_job, wave):
                bar.set_postfix_str(f"{job.level}, seed {job.seed}, {job.variant}")
                bar.update()


def check_settings(output: Path, settings: dict) -> None:
    """Refuse to mix results of different settings in one folder."""
    file = output / "settings.json"
    written = json.dumps(settings, indent=2) + "\n"
    if file.is_file() and file.read_text() != written:
        raise UserError(f"--output: {output} holds results of other settings (settings.json differs): take another folder")
    with written_whole(file) as temporary:
        temporary.write_text(written)


def read_results(output: Path) -> Results:
    results: Results = {}
    for file in sorted(output.glob("*/seed*/*/result.json")):
        numbers = json.loads(file.read_text())
        results.setdefault((numbers["level"], numbers["variant"]), {})[numbers["seed"]] = numbers
    return results


def heading(name: str, size: Size, device: str) -> str:
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "numpy", "scipy"))
    standard = asdict(STANDARD)
    changed = {level: {k: v for k, v in asdict(each).items() if v != standard[k]} for level, each in LEVELS.items()}
    described = {level: ", ".join(f"{k} {v:g}" for k, v in values.items()) for level, values in changed.items()}
    others = "; ".join(f"{level}: {text}" for level, text in described.items() if text)
    return f"""# The discrepancy benchmark

Written by `python benchmarks/discrepancy.py --size {name}`
on {machine(device)} (Python {platform.python_version()}, {versions}).

- Scenes: `data/simulate.py`, seed {SCENE_SEED}, {size.scene_px} px, {size.train} for training and {size.test} held out.
- Standard level: {", ".join(f"{k} {v:g}" for k, v in standard.items() if k != "size")}. Others: {others}.
- Training: {size.stage1} iterations of stage 1 and {size.stage2} of stage 2, their sum for every variant.
- Each stage: batch {size.batch_size}, AdamW, learning rate {size.learning_rate:g} with a cosine schedule,
  {quickest_precision(torch.device(device))}, average of the weights {size.ema_decay:g}.
- Seeds: {", ".join(map(str, size.seeds))}.
- Translation: DDIM-{size.steps}; spread of {size.samples} samples.
- Audit: timesteps {", ".join(map(str, size.audit_timesteps))}, {size.audit_draws} draws of noise."""


def write_report(output: Path, name: str, size: Size, device: str) -> None:
    """DISCREPANCY.md, results.json and, once both are evaluated, the figure of MSE and C-Diff, into the output folder."""
    results = read_results(output)
    if not results:
        raise UserError(f"--output: {output} holds no results yet: run without --report-only first")
    evaluated = {variant: VARIANTS[variant].label for variant in EVALUATED}
    how_trained = f"Trained on scenes of {'the same' if size.train_levels else 'the standard'} level."
    text = report(results, evaluated, list(LEVELS), AT_EVERY_LEVEL, heading(name, size, device), how_trained)
    record = [numbers for seeds in results.values() for _, numbers in sorted(seeds.items())]
    for file, content in (("DISCREPANCY.md", text), ("results.json", json.dumps(record, indent=2) + "\n")):
        with written_whole(output / file) as temporary:
            temporary.write_text(content, encoding="utf-8")
    maps = {variant: Job("standard", size.seeds[0], variant).folder(output) / "maps.npz" for variant in AT_EVERY_LEVEL}
    if all(file.is_file() for file in maps.values()):
        scenes = draw_scenes(scenes_of("standard", size), TEST, range(min(FIGURE_FROM, size.test)), SCENE_SEED)
        with written_whole(output / "figure.png") as temporary:
            figure(scenes, {variant: dict(np.load(file)) for variant, file in maps.items()}).save(
                temporary, "PNG", optimize=True
            )
    print(text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="The discrepancy benchmark.", allow_abbrev=False)
    parser.add_argument(
        "--size", choices=SIZES, required=True, help="small: 2 CPU cores; large: a GPU; tiny: a check of the command"
    )
    parser.add_argument("--output", type=Path, help="folder of the run [work_dir/benchmarks/discrepancy/SIZE]")
    parser.add_argument("--base", default=str(SIMULATED_BASE), help="base model, name or folder [of make demo-simulated]")
    others = [level for level in LEVELS if level != "standard"]
    listed = f"difficulties beside the standard one: any of {', '.join(map(repr, others))} [all]"
    parser.add_argument("--levels", nargs="*", choices=others, default=others, metavar="LEVEL", help=listed)
    parser.add_argument("--workers", type=int, help="variants trained at once [the CPU's cores; 1 on a GPU]")
    parser.add_argument("--report-only", action="store_true", help="write the report of what has been evaluated so far")
    args = parser.parse_args(argv)
    check_base(args.base)
    if args.workers is not None and args.workers < 1:
        raise UserError(f"--workers: expected at least 1, found {args.workers}")
    size, device = SIZES[args.size], "cuda" if torch.cuda.is_available() else "cpu"
    output = args.output or REPO / "work_dir/benchmarks/discrepancy" / args.size
    check_settings(output, {"size": asdict(size), "base": args.base, "levels": {name: asdict(e) for name, e in LEVELS.items()}})
    if not args.report_only:
        for level in dict.fromkeys(trained_at(level, size) for level in ("standard", *args.levels)):
            load_latents(output, args.base, level, size, device)
        workers = args.workers or (1 if device == "cuda" else os.cpu_count() or 1)
        do_job = partial(run_job, output=output, base=args.base, size=size, device=device)
        run_all(all_jobs(size, args.levels), workers, do_job)
    write_report(output, args.size, size, device)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
