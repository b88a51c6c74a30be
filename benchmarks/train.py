"""Training speed and memory: main.py beside the plain loop of reference.py, by turns.

    python benchmarks/train.py                      # the full SD 2.1 architecture, random weights: the headline rows
    python benchmarks/train.py --rows all           # every option alone as well
    python benchmarks/train.py --curves             # what these rows do to the loss over 200 iterations
    python benchmarks/train.py --processes 2        # how much faster two processes are than one; --rows fsdp: model divided
    python benchmarks/train.py --quick              # a tiny model, seconds

An iteration is a whole optimizer step of stage 2 with the loss value on record. Time per part is that of the same iterations.
"""

import argparse
import os
import re
import shutil
import statistics
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.harness import REFERENCE, SIMULATED_BASE, Parts, between, now, shown
from cdiffset.errors import UserError, run

CACHE = "CACHE"
CACHED, COPY, CHECKPOINTED = {"latent_cache": CACHE}, {"mixed_precision": "bf16_copy"}, {"gradient_checkpointing": True}
COMPILED, EIGHT_BIT, LORA = {"torch_compile": True}, {"optimizer": "AdamW8bit"}, {"lora_rank": 16}
ROWS = {  # what each arm changes in the configuration; CACHE stands for the latent cache's folder
    REFERENCE: {},
    "defaults": {},
    "cached": CACHED,
    "bf16": {"mixed_precision": "bf16"},
    "bf16_copy": COPY,
    "fp16": {"mixed_precision": "fp16"},
    "tf32": {"tf32": True},
    "not deterministic": {"deterministic": False},
    "torch_compile": COMPILED,
    "gradient_checkpointing": CHECKPOINTED,
    "fsdp": {"fsdp": True},
    "two accumulation steps": {"gradient_accumulation_steps": 2},
    "AdamW8bit": EIGHT_BIT,
    "ema": {"ema_decay": 0.999},
    "LoRA": LORA,
    "LoRA, gradient_checkpointing": LORA | CHECKPOINTED,
    "bf16_copy, LoRA": COPY | LORA,
    "bf16_copy, LoRA, gradient_checkpointing": COPY | LORA | CHECKPOINTED,
    "bf16_copy, cached": COPY | CACHED,
    "bf16_copy, cached, torch_compile": COPY | CACHED | COMPILED,
    "bf16_copy, gradient_checkpointing": COPY | CHECKPOINTED,
    (LEAN := "bf16_copy, AdamW8bit, gradient_checkpointing"): COPY | EIGHT_BIT | CHECKPOINTED,
}
ON_GPUS = {"fp16", "tf32", "not deterministic"}  # rows that a CPU cannot run, or that are another one on it
OF_SEVERAL = {"fsdp"}  # rows, and settings of the same names, that take several processes; one process runs without them
HEADLINE = (REFERENCE, "bf16_copy", "bf16_copy, cached", LEAN)
CURVE_SEEDS = (2024, 2025, 2026)
CURVE_WINDOW = 50  # iterations whose mean loss is compared


# ------------------------------------------------------------------------------------------------------------------ one arm
class Enough(Exception):
    """All iterations have been timed: no validation and no checkpoint are to follow."""


def measure(job: dict) -> dict:
    """Warm up and time iterations of one arm => images/s, seconds of each part per iteration, peak memory."""
    from diffusers import AutoencoderKL
    from torch import Tensor
    from torch.optim.lr_scheduler import LRScheduler
    from torch.utils.data import dataloader

    parts, marks = Parts(job["device"]), []
    count = job["warmup"] + job["iterations"]

    def step_of_the_schedule_is_done(*_) -> None:  # once in an iteration, and once when it is made
        if not any(name == "backward" for name, *_ in parts.spans):
            return
        marks.append(now(job["device"]))
        if len(marks) == job["warmup"]:
            parts.reset()
        if len(marks) == count:
            raise Enough

    parts.watch(dataloader._BaseDataLoaderIter, "__next__", "load", on_cpu=True)
    parts.watch(AutoencoderKL, "encode", "VAE encode")
    parts.watch(Tensor, "backward", "backward")
    parts.watch_optimizers()
    parts.watch(LRScheduler, "step", "schedule", done=step_of_the_schedule_is_done)
    with suppress(Enough):
        (train_reference if job["name"] == REFERENCE else train_project)(job, parts, count)
    marks = marks[job["warmup"] - 1 :]
    total = between(marks[0], marks[-1])
    seconds = {name: value / job["iterations"] for name, value in parts.seconds().items() if name != "schedule"}
    seconds["other"] = total / job["iterations"] - sum(seconds.values())
    return {
        "images_per_s": job["batch_size"] * job["iterations"] / total,
        "parts": seconds,
        **harness.peak_memory(job["device"]),
    }


def train_reference(job: dict, parts: Parts, iterations: int) -> None:
    import torch
    from diffusers import UNet2DConditionModel

    from benchmarks import reference

    torch.manual_seed(job["seed"])
    parts.watch(UNet2DConditionModel, "forward", "U-Net forward")
    models, folder = reference.load_models(job["base"], job["device"]), Path(job["images"])
    loader = reference.make_loader(folder / "sar", folder / "eo", job["batch_size"], iterations, job["workers"])
    for _ in reference.train(models, loader):
        pass


def train_project(job: dict, parts: Parts, iterations: int) -> None:
    import main
    from cdiffset import losses

    parts.watch(losses, "predict", "U-Net forward")  # a compiled network's own `forward` is not called
    main.main(command_line(job, iterations))


def command_line(job: dict, iterations: int) -> list[str]:
    """main.py's, of a job."""
    folder = Path(job["images"])
    feeder = {"sar_dir": str(folder / "sar"), "eo_dir": str(folder / "eo"), "crop_size": job["size"]}
    augmentations = {"hflip": True, "vflip": True, "rot": True}
    settings = {
        "work_dir": job["work_dir"], "feeder": "feeders.feeder.PairedFolderFeeder", "seed": job["seed"],
        "train_feeder_args": {**feeder, **augmentations, "split": "train"}, "test_feeder_args": {**feeder, "split": "test"},
        "num_worker": job["workers"], "pretrained_model_name_or_path": job["base"], "batch_size": job["batch_size"],
        "num_iter": iterations, "num_warmup": 0, "report_to": "none", "eval_epoch": 0, "eval_each_epoch_from": 1,
        "save_iter": 0, "val_len": 1, "num_inference_steps": 1, "lpips": False, **job["settings"],
    }  # fmt: skip
    return harness.words(settings)


def with_cache(settings: dict, folder: Path) -> dict:
    return {key: str(folder) if value == CACHE else value for key, value in settings.items()}


# ------------------------------------------------------------------------------------------------------------------- speed
def compare_speed(args: argparse.Namespace) -> int:
    """The arms of --rows, and with --processes each of them with one process and with several.

    Each process has the batch size asked for and, on CPUs, its number of threads. Scaling efficiency is images/s of all
    processes over as many times that of one.
    """
    models = harness.make_models(args.models, args.architecture)
    images = harness.make_images(args.work_dir / "images", args.size, args.pairs * args.processes)
    ceiling, flops = harness.matmul_ceiling(args.device), harness.count_flops(args.architecture, args.size)
    several = args.processes > 1
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.processes))} if several and args.device == "cpu" else {}
    arms = {name: (name, 1) for name in args.rows}
    if several:
        arms = {f"{name}: {n} process{'es' * (n > 1)}": (name, n) for name in args.rows for n in (1, args.processes)}

    def one(arm: str, round_: int) -> dict:
        (name, processes), folder = arms[arm], harness.folder_of(args, arm, round_)
        settings = {key: value for key, value in ROWS[name].items() if processes > 1 or key not in OF_SEVERAL}
        job = {
            "name": name, "device": args.device, "base": models.base, "images": str(images), "size": args.size, "seed": 2024,
            "batch_size": args.batch_size * processes, "workers": args.workers, "warmup": args.warmup,
            "iterations": args.iterations, "settings": with_cache(settings, args.models / "latents"),
            "work_dir": str(folder / "run"),
        }  # fmt: skip
        return harness.run_worker(__file__, job, folder, processes, **threads)

    results = harness.alternate(args, list(arms), one, args.rounds)

    def ratio(row: dict, key: str, unit: str = "×", processes: int = 1) -> str:
        baseline = f"{arms[row['name']][0]}: 1 process" if several else REFERENCE
        return shown(harness.ratio(results[row["name"]], results[baseline], key, processes), unit)

    def utilisation(row: dict) -> str:
        settings = ROWS[row["name"]]
        flop = flops["unet_training"] + (0 if "latent_cache" in settings else 2 * flops["encode"])
        precision = "bf16" if settings.get("mixed_precision", "no") != "no" else "fp32"
        return harness.utilisation(row, flop, precision, ceiling)

    if several:
        columns = {
            "images/s": lambda row: shown(row["images_per_s"]),
            "scaling efficiency": lambda row: ratio(row, "images_per_s", "", arms[row["name"]][1]),
            "peak memory of each process [GiB]": lambda row: shown(row[args.memory]),
        }
    else:
        columns = {
            "images/s": lambda row: shown(row["images_per_s"]),
            "to the reference": lambda row: ratio(row, "images_per_s"),
            "peak memory [GiB]": lambda row: shown(row[args.memory]),
            "memory to the reference's": lambda row: ratio(row, args.memory),
            "FLOP utilisation": utilisation,
        }
    each = "".join(f", {key}={value} for each process" for key, value in threads.items())
    count = f"{args.iterations} iterations after {args.warmup} of warm-up"
    how = f"Batch {args.batch_size} of {args.size} px{each}, {count}, stage 2."
    return harness.report_arms(args, ceiling, results, how, columns, "iteration")


# ------------------------------------------------------------------------------------------------------------- loss curves
def compare_curves(args: argparse.Namespace) -> int:
    """Train a small trained base with each option, and the plain settings with several seeds.

    A seed fixes data, noise and timesteps, so that runs of one seed differ by their options alone.
    """
    images = harness.make_images(args.work_dir / "images", 64, 16 if args.quick else 256)
    iterations = 2 * CURVE_WINDOW if args.quick else 4 * CURVE_WINDOW
    plain = [f"defaults, seed {seed}" for seed in CURVE_SEEDS]
    arms = {name: (seed, {}) for name, seed in zip(plain, CURVE_SEEDS, strict=True)}
    arms |= {name: (CURVE_SEEDS[0], ROWS[name]) for name in args.rows if ROWS[name]}

    def one(name: str, round_: int) -> dict:
        (seed, settings), folder = arms[name], harness.folder_of(args, f"curve of {name}", round_)
        job = {
            "work_dir": str(folder / "run"), "base": str(SIMULATED_BASE), "images": str(images), "size": 64, "batch_size": 8,
            "workers": 0, "seed": seed, "settings": {**with_cache(settings, args.models / "curve_latents"), "log_iter": 1},
        }  # fmt: skip
        means = window_means(losses_of(job, folder, iterations, args.device))
        return {"last": means[-1], "means": means}

    results = harness.alternate(args, list(arms), one, 1)
    means = {name: result["means"] for name, (result,) in results.items() if "means" in result}
    if failed := [name for name in plain if name not in means]:
        raise UserError(f"{', '.join(failed)}: failed, and there is no spread of the seeds without it")
    spread = [max(window) - min(window) for window in zip(*(means[name] for name in plain), strict=True)]
    rows = []
    for name, windows in means.items():
        deviations = [abs(mine - theirs) for mine, theirs in zip(windows, means[plain[0]], strict=True)]
        within = all(mine <= most for mine, most in zip(deviations, spread, strict=True))
        rows.append([name, *(f"{mean:.4f}" for mean in windows), f"{max(deviations):.4f}", "yes" if within else "no"])
    ends = [f"to {CURVE_WINDOW * (k + 1)}" for k in range(len(spread))]
    columns = ["mean loss", *ends, f"largest deviation from seed {CURVE_SEEDS[0]}", "within the seeds' spread"]
    how = f"The demo's base, batch 8 of 64 px. Spread of the {len(plain)} seeds in each window: "
    text = how + ", ".join(f"{value:.4f}" for value in spread) + f".\n\n{harness.table(columns, rows)}"
    harness.report(args, harness.matmul_ceiling(args.device), text, results=results)
    return 0 if len(means) == len(arms) and all(row[-1] == "yes" for row in rows) else 1


def losses_of(job: dict, folder: Path, iterations: int, device: str) -> list[float]:
    """Train, in a process of its own => the loss of each iteration, from the run's log."""
    shutil.rmtree(folder, ignore_errors=True)
    for _ in harness.watched(["main.py", *command_line(job, iterations)], folder / "log.txt", device):
        pass
    log = (Path(job["work_dir"]) / "train_log.txt").read_text(encoding="utf-8")
    return [float(loss) for loss in re.findall(r"  iteration \d+/\d+ .*?  loss (\S+)", log)]


def window_means(losses: list[float]) -> list[float]:
    """Mean losses of consecutive windows."""
    return [statistics.fmean(losses[k : k + CURVE_WINDOW]) for k in range(0, len(losses), CURVE_WINDOW)]


def main(argv: list[str] | None = None) -> int:
    parser = harness.make_parser("Compare training with a plain reference loop.", ROWS, HEADLINE)
    parser.add_argument("--size", type=int, help="px [256; quick: 64]")
    parser.add_argument("--batch-size", type=int, help="pairs per iteration and process [cpu: 2; cuda: 64]")
    parser.add_argument("--pairs", type=int, help="pairs on the disk, per process [twice the batch]")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before the clock starts [1]")
    parser.add_argument("--iterations", type=int, help="timed iterations [cpu: 2; cuda: 10]")
    parser.add_argument("--workers", type=int, default=2, help="loader processes, the same for all [2]")
    parser.add_argument("--processes", type=int, default=1, help=f"compare so many processes with one, of --rows [{LEAN}]")
    parser.add_argument("--curves", action="store_true", help="compare losses over 200 iterations on the demo's base instead")
    args = harness.parse(parser, argv, __file__)
    if args.worker:
        return harness.work(args.worker, measure)
    if min(args.processes, args.warmup) < 1:
        raise UserError("expected --processes and --warmup of at least 1")
    left_out = (ON_GPUS if args.device == "cpu" else set()) | (set() if args.processes > 1 else OF_SEVERAL)
    rows = [name for name in ROWS if name not in left_out]
    args.rows = harness.chosen(args.rows, rows, (LEAN,) if args.processes > 1 else HEADLINE)
    if args.processes > 1:
        args.rows.remove(REFERENCE)  # a program for one process
    eight_bit = [name for name in args.rows if EIGHT_BIT.items() <= ROWS[name].items()]
    if eight_bit and find_spec("bitsandbytes") is None:
        names = "; ".join(eight_bit)
        raise UserError(f"{names}: needs pip install -r requirements-extra.txt (bitsandbytes), or choose other --rows")
    if args.curves:
        return compare_curves(args)
    args.size = args.size or (64 if args.quick else 256)
    args.batch_size = args.batch_size or (64 if args.on_gpu else 2)
    args.pairs = args.pairs or 2 * args.batch_size
    args.iterations = args.iterations or (10 if args.on_gpu else 2)
    return compare_speed(args)


if __name__ == "__main__":
    sys.exit(run(main))
