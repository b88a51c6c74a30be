"""Training speed and memory: this project's Trainer beside the plain loop of reference.py, by turns.

    python benchmarks/train.py                      # the full SD 2.1 architecture, random weights: the headline rows
    python benchmarks/train.py --rows all           # every option alone as well
    python benchmarks/train.py --curves             # what these rows do to the loss over 200 iterations
    python benchmarks/train.py --processes 2        # how much faster two processes are than one; --rows fsdp: model divided
    python benchmarks/train.py --quick              # a tiny model, seconds

An iteration is a whole optimizer step of stage 2 with the loss value on record. Time per part is that of the same iterations.
"""

import argparse
import os
import statistics
import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import speed
from benchmarks.speed import REFERENCE, REPO, Parts, between, now, shown
from cdiffset.errors import run

CACHE = "CACHE"
CACHED, COPY, CHECKPOINTED = {"latent_cache": CACHE}, {"mixed_precision": "bf16_copy"}, {"gradient_checkpointing": True}
COMPILED, EIGHT_BIT, AVERAGED = {"torch_compile": True}, {"optimizer": "AdamW8bit"}, {"ema_decay": 0.999}
ROWS = {  # what each contestant changes in the configuration; CACHE stands for the latent cache's folder
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
    "ema": AVERAGED,
    "ema_on_cpu": AVERAGED | {"ema_on_cpu": True},
    "bf16_copy, cached": COPY | CACHED,
    "bf16_copy, cached, torch_compile": COPY | CACHED | COMPILED,
    "bf16_copy, gradient_checkpointing": COPY | CHECKPOINTED,
    (LEAN := "bf16_copy, AdamW8bit, gradient_checkpointing"): COPY | EIGHT_BIT | CHECKPOINTED,
}
ON_GPUS = {"fp16", "tf32", "not deterministic", "ema_on_cpu"}  # rows that a CPU cannot run, or that are another one on it
OF_SEVERAL = {"fsdp"}  # rows, and settings of the same names, that take several processes; one process runs without them
HEADLINE = (REFERENCE, "bf16_copy", "bf16_copy, cached", LEAN)
CURVE_SEEDS = (2024, 2025, 2026)
CURVE_WINDOW = 50  # iterations whose mean loss is compared


# ----------------------------------------------------------------------------------------------------------- one contestant
def measure(job: dict) -> dict:
    """Warm up and time iterations of one contestant => seconds of each, parts per iteration, peak memory, losses."""
    parts, marks, losses = Parts(job["device"]), [], []

    def iteration_is_done() -> None:
        marks.append(now(job["device"]))
        if len(marks) == job["warmup"]:
            parts.reset()

    parts.watch_backward()
    parts.watch_optimizer()
    run = run_reference if job["name"] == REFERENCE else run_project
    run(job, parts, iteration_is_done, losses)
    timed = marks[job["warmup"] - 1 :]
    seconds = [between(before, after) for before, after in zip(timed, timed[1:], strict=False)]
    total = between(timed[0], timed[-1])
    per_iteration = {name: value / len(seconds) for name, value in parts.seconds().items()}
    per_iteration["other"] = total / len(seconds) - sum(per_iteration.values())
    return {
        "images_per_s": job["batch_size"] * len(seconds) / total,
        "seconds": seconds,
        "parts": per_iteration,
        **{f"peak_{where}_gib": value for where, value in speed.peak_memory(job["device"]).items()},
        "losses": losses,
    }


def run_reference(job: dict, parts: Parts, iteration_is_done, losses: list[float]) -> None:
    import torch

    from benchmarks import reference

    torch.manual_seed(job["seed"])
    models = reference.load_models(job["base"], job["device"])
    parts.watch(models.vae.encoder, "VAE encode")
    parts.watch(models.unet, "U-Net forward")
    folder = Path(job["images"])
    iterations = job["warmup"] + job["iterations"]
    loader = reference.make_loader(folder / "sar", folder / "eo", job["batch_size"], iterations, job["workers"])
    for loss in reference.train(models, parts.watch_batches(loader)):
        losses.append(loss)
        iteration_is_done()


def run_project(job: dict, parts: Parts, iteration_is_done, losses: list[float]) -> None:
    """Trainer.run, without the validation and the checkpoint at its end."""
    import train
    from cdiffset.config import Config
    from cdiffset.diffusion import predict

    parts.watch_function(predict, "U-Net forward", job["device"])  # not by a hook, which a compiled network would not have
    folder = Path(job["images"])
    feeder = {"sar_dir": str(folder / "sar"), "eo_dir": str(folder / "eo"), "crop_size": job["size"]}
    augmentations = {"hflip": True, "vflip": True, "rot": True}
    settings = {
        "work_dir": job["work_dir"], "feeder": "feeders.feeder.PairedFolderFeeder", "seed": job["seed"],
        "train_feeder_args": {**feeder, **augmentations, "split": "train"}, "test_feeder_args": {**feeder, "split": "test"},
        "num_worker": job["workers"], "pretrained_model_name_or_path": job["base"], "batch_size": job["batch_size"],
        "num_iter": job["warmup"] + job["iterations"], "num_warmup": 0, "resume": None, "report_to": "none",
        **job["settings"],
    }  # fmt: skip
    trainer = train.Trainer(Config(**settings))
    trainer.validate_and_save = lambda: None
    parts.watch(trainer.vae.encoder, "VAE encode")
    step = trainer.step

    def timed(batches) -> None:
        step(parts.watch_batches(batches))
        iteration_is_done()

    trainer.step = timed
    trainer.add_scalars = lambda _, values: losses.append(values["loss"])  # what is logged, every log_iter
    trainer.run()


# ------------------------------------------------------------------------------------------------------------------- speed
def jobs_for(args: argparse.Namespace, models, images: Path) -> dict[str, dict]:
    """What each contestant is to do."""
    common = {
        "device": args.device, "base": str(models.base), "images": str(images), "size": args.size, "seed": 2024,
        "batch_size": args.batch_size, "workers": args.workers, "warmup": args.warmup, "iterations": args.iterations,
    }  # fmt: skip
    jobs = {}
    for name in args.rows:
        settings = {key: str(args.models / "latents") if value == CACHE else value for key, value in ROWS[name].items()}
        jobs[name] = {**common, "name": name, "settings": settings}
    return jobs


def judge(results: dict[str, list[dict]], flops: dict[str, int], ceiling: dict[str, float]) -> list[dict]:
    """One record per contestant: speed, ratios to the reference's of the same round, memory, utilisation, parts."""
    ratios = speed.compare(results, "images_per_s")
    rows = []
    for name, rounds in results.items():
        measured = [result for result in rounds if "failed" not in result]
        row = {"name": name, "settings": ROWS[name], "failed": [r["failed"] for r in rounds if "failed" in r]}
        if measured:
            encoded = 0 if "latent_cache" in ROWS[name] else 2 * flops["encode"]
            per_image = flops["unet_training"] + encoded
            precision = "bf16" if ROWS[name].get("mixed_precision", "no") != "no" else "fp32"
            images_per_s = speed.in_one(measured, "images_per_s")
            row |= {
                "images_per_s": images_per_s,
                "ratio": ratios.get(name),
                "flop_per_image": per_image,
                "utilisation": images_per_s["median"] * per_image / ceiling[precision],
                "utilisation_of": precision,
                "parts_s": speed.parts_of(measured),
            }
            for key in ("peak_ram_gib", "peak_gpu_gib"):
                row |= {key: speed.in_one(measured, key), f"{key}_ratio": speed.compare(results, key).get(name)}
        rows.append(row)
    return rows


def tables(rows: list[dict], device: str) -> str:
    """The main table, and the time per part."""
    memory = "peak_gpu_gib" if device == "cuda" else "peak_ram_gib"
    names = list(dict.fromkeys(part for row in rows for part in row.get("parts_s", {})))
    main, parts = [], []
    for row in rows:
        if "images_per_s" not in row:
            main.append([row["name"], f"failed: {row['failed'][-1]}", *["–"] * 4])
            continue
        main.append(
            [
                row["name"], shown(row["images_per_s"]), shown(row["ratio"], "×"), shown(row[memory]),
                shown(row[f"{memory}_ratio"], "×"), f"{row['utilisation']:.0%} of {row['utilisation_of']}",
            ]
        )  # fmt: skip
        parts.append([row["name"], *(f"{row['parts_s'].get(part, 0):.3g}" for part in names)])
    columns = ["training", "images/s", "to the reference", "peak memory [GiB]", "to the reference", "FLOP utilisation"]
    per_part = speed.table(["seconds per iteration", *names], parts)
    return f"{speed.table(columns, main)}\n\n{per_part}"


def compare_speed(args: argparse.Namespace) -> int:
    models = speed.make_models(args.models, "tiny" if args.quick else "full")
    images = speed.make_images(args.work_dir / "images", args.size, args.pairs)
    ceiling, jobs = speed.matmul_ceiling(args.device), jobs_for(args, models, images)

    def one(name: str, round_: int) -> dict:
        folder = args.models / "train" / speed.file_name(name) / str(round_)
        return speed.run_worker(__file__, {**jobs[name], "work_dir": str(folder / "run")}, folder)

    results = speed.alternate(list(jobs), args.rounds, one)
    flops = speed.count_flops("tiny" if args.quick else "full", args.size)
    record = speed.header("train", args, ceiling)
    record |= {"settings": jobs[REFERENCE], "flop": flops, "rows": judge(results, flops, ceiling)}
    how = f"Batch {args.batch_size} of {args.size} px, {args.iterations} iterations after {args.warmup} of warm-up, stage 2."
    speed.report(record, f"{how}\n\n{tables(record['rows'], args.device)}", args)
    return 1 if any(row["failed"] for row in record["rows"]) else 0


# --------------------------------------------------------------------------------------------------------------- processes
def judge_processes(results: dict[str, list[dict]], processes: int) -> list[dict]:
    """One record per row: images/s of one process and of several with as many times the batch, and the scaling efficiency.

    Efficiency is images/s of all processes over `processes` times that of one alone, of the same round.
    """
    rows, kept = [], ("images_per_s", "peak_ram_gib", "peak_gpu_gib")
    for name in dict.fromkeys(name.split(": ")[0] for name in results):
        alone, together = results[f"{name}: 1 process"], results[f"{name}: {processes} processes"]
        efficiency = [
            many["images_per_s"] / (processes * one["images_per_s"])
            for one, many in zip(alone, together, strict=True)
            if "failed" not in one and "failed" not in many
        ]
        rows.append(
            {
                "name": name,
                **{key: [speed.in_one(alone, key), speed.in_one(together, key)] for key in kept},
                "efficiency": speed.median_and_range(efficiency) if efficiency else None,
                "parts_s": [speed.parts_of(alone), speed.parts_of(together)],
                "failed": [result["failed"] for result in alone + together if "failed" in result],
            }
        )
    return rows


def processes_tables(rows: list[dict], processes: int, device: str) -> str:
    memory = "peak_gpu_gib" if device == "cuda" else "peak_ram_gib"
    main = [[row["name"], *map(shown, row["images_per_s"]), shown(row["efficiency"]), *map(shown, row[memory])] for row in rows]
    columns = ["training", "images/s, 1 process", f"images/s, {processes} processes", "scaling efficiency"]
    columns += ["peak memory, 1 process [GiB]", f"of each of {processes}"]
    names = list(dict.fromkeys(part for row in rows for parts in row["parts_s"] for part in parts))
    per_part = [
        [f"{row['name']}: {count}", *(f"{parts.get(part, 0):.3g}" for part in names)]
        for row in rows
        for count, parts in zip((1, processes), row["parts_s"], strict=True)
    ]
    return f"{speed.table(columns, main)}\n\n{speed.table(['seconds per iteration, processes', *names], per_part)}"


def compare_processes(args: argparse.Namespace) -> int:
    """Train with one process and with several that each have its batch and, on CPUs, its number of threads."""
    models = speed.make_models(args.models, "tiny" if args.quick else "full")
    images = speed.make_images(args.work_dir / "images", args.size, args.pairs * args.processes)
    threads = {"OMP_NUM_THREADS": str(max(1, os.cpu_count() // args.processes))} if args.device == "cpu" else {}
    jobs, counts = jobs_for(args, models, images), (1, args.processes)
    contestants = {f"{name}: {n} process{'es' * (n > 1)}": (jobs[name], n) for name in jobs for n in counts}

    def one(name: str, round_: int) -> dict:
        job, count = contestants[name]
        folder = args.models / "processes" / speed.file_name(name) / str(round_)
        settings = {key: value for key, value in job["settings"].items() if count > 1 or key not in OF_SEVERAL}
        job = {**job, "settings": settings, "batch_size": count * args.batch_size, "work_dir": str(folder / "run")}
        return speed.run_worker(__file__, job, folder, count, **threads)

    rows = judge_processes(speed.alternate(list(contestants), args.rounds, one), args.processes)
    record = speed.header("train", args, speed.matmul_ceiling(args.device))
    record |= {"processes": args.processes, "threads": threads, "settings": jobs, "rows": rows}
    each = f"batch {args.batch_size} of {args.size} px" + "".join(f", {key}={value}" for key, value in threads.items())
    how = f"Each process: {each}; {args.iterations} iterations after {args.warmup} of warm-up, stage 2."
    speed.report(record, f"{how}\n\n{processes_tables(rows, args.processes, args.device)}", args)
    return 1 if any(row["failed"] for row in rows) else 0


# ------------------------------------------------------------------------------------------------------------- loss curves
def window_means(losses: list[float]) -> list[float]:
    """Mean losses of consecutive windows."""
    return [statistics.fmean(losses[k : k + CURVE_WINDOW]) for k in range(0, len(losses), CURVE_WINDOW)]


def judge_curves(curves: dict[str, list[float]], plain: list[str]) -> list[dict]:
    """Each run's window means against the first plain run's, beside how far the plain runs of other seeds lie apart.

    A seed fixes data, noise and timesteps, so that runs of one seed differ by their options alone.
    """
    means = {name: window_means(losses) for name, losses in curves.items()}
    spread = [max(window) - min(window) for window in zip(*(means[name] for name in plain), strict=True)]
    rows = []
    for name, windows in means.items():
        deviations = [abs(mine - theirs) for mine, theirs in zip(windows, means[plain[0]], strict=True)]
        within = all(mine <= most for mine, most in zip(deviations, spread, strict=True))
        rows.append({"name": name, "means": windows, "deviations": deviations, "spread": spread, "within": within})
    return rows


def compare_curves(args: argparse.Namespace) -> int:
    """Train a small trained base with each option, and the plain settings with several seeds."""
    images = speed.make_images(args.work_dir / "images", 64, 16 if args.quick else 256)
    iterations = 2 * CURVE_WINDOW if args.quick else 4 * CURVE_WINDOW
    common = {
        "device": args.device, "base": str(REPO / "assets/demo_base"), "images": str(images), "size": 64, "batch_size": 8,
        "workers": 0, "warmup": 1, "iterations": iterations - 1,
    }  # fmt: skip
    plain = [f"defaults, seed {seed}" for seed in CURVE_SEEDS]
    jobs = {name: (seed, {}) for name, seed in zip(plain, CURVE_SEEDS, strict=True)}
    jobs |= {name: (CURVE_SEEDS[0], ROWS[name]) for name in args.rows if ROWS[name]}
    curves = {}
    for name, (seed, settings) in jobs.items():
        folder = args.work_dir / "curves" / speed.file_name(name)
        settings = {key: str(args.work_dir / "curves/latents") if v == CACHE else v for key, v in settings.items()}
        job = {**common, "name": name, "seed": seed, "settings": {**settings, "log_iter": 1}, "work_dir": str(folder / "run")}
        result = speed.run_worker(__file__, job, folder)
        said = result.get("failed") or f"mean loss of the last {CURVE_WINDOW}: {window_means(result['losses'])[-1]:.4f}"
        print(f"{name}: {said}", flush=True)
        if "failed" not in result:
            curves[name] = result["losses"]
    if not all(name in curves for name in plain):
        return 1
    rows = judge_curves(curves, plain)
    cells = [
        [r["name"], *(f"{mean:.4f}" for mean in r["means"]), f"{max(r['deviations']):.4f}", "yes" if r["within"] else "no"]
        for r in rows
    ]
    ends = [f"to {CURVE_WINDOW * (k + 1)}" for k in range(len(rows[0]["means"]))]
    text = speed.table(["mean loss", *ends, "largest deviation from seed 2024", "within the seeds' spread"], cells)
    spread = ", ".join(f"{value:.4f}" for value in rows[0]["spread"])
    how = f"The demo's base, batch 8 of 64 px. Spread of the {len(plain)} seeds in each window: {spread}."
    record = speed.header("train", args, speed.matmul_ceiling(args.device)) | {"curves": rows}
    speed.report(record, f"{how}\n\n{text}", args)
    return 0 if all(row["within"] for row in rows) and len(curves) == len(jobs) else 1


def main(argv: list[str] | None = None) -> int:
    parser = speed.make_parser("Compare training with a plain reference loop.")
    parser.add_argument("--rows", nargs="+", help=f"contestants, or all [{'; '.join(HEADLINE)}]: {'; '.join(ROWS)}")
    parser.add_argument("--size", type=int, help="px [256; quick: 64]")
    parser.add_argument("--batch-size", type=int, help="pairs per iteration [cpu: 2; cuda: 64]")
    parser.add_argument("--pairs", type=int, help="pairs on the disk [twice the batch]")
    parser.add_argument("--warmup", type=int, default=1, help="iterations before the clock starts [1]")
    parser.add_argument("--iterations", type=int, help="timed iterations [cpu: 2; cuda: 10]")
    parser.add_argument("--workers", type=int, default=2, help="loader processes, the same for all [2]")
    parser.add_argument("--processes", type=int, help=f"compare so many processes with one, of --rows [{LEAN}]")
    parser.add_argument("--curves", action="store_true", help="compare losses over 200 iterations on the demo's base instead")
    args = speed.parse(parser, argv)
    if args.worker:
        return speed.work(args.worker, measure)
    if args.processes is not None and args.processes < 2:
        parser.error(f"--processes: expected at least 2, found {args.processes}")
    left_out = (ON_GPUS if args.device == "cpu" else set()) | (set() if args.processes else OF_SEVERAL)
    rows = [name for name in ROWS if name not in left_out]
    args.rows = speed.chosen(parser, args.rows, rows, (LEAN,) if args.processes else HEADLINE)
    eight_bit = [name for name in args.rows if EIGHT_BIT.items() <= ROWS[name].items()]
    if eight_bit and find_spec("bitsandbytes") is None:
        parser.error(
            f"{'; '.join(eight_bit)}: needs pip install -r requirements-extra.txt (bitsandbytes), or choose other --rows"
        )
    if args.curves:
        return compare_curves(args)
    on_gpu = args.device == "cuda" and not args.quick
    args.size = args.size or (64 if args.quick else 256)
    args.batch_size = args.batch_size or (64 if on_gpu else 2)
    args.pairs = args.pairs or 2 * args.batch_size
    args.iterations = args.iterations or (10 if on_gpu else 2)
    if args.processes:
        args.rows.remove(REFERENCE)  # a program for one process
        return compare_processes(args)
    return compare_speed(args)


if __name__ == "__main__":
    sys.exit(run(main))
