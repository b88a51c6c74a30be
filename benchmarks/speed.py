"""What the speed benchmarks share: models and images to run on, contestants in processes of their own, clocks, tables.

A contestant is measured in a process of its own (two full models in fp32 do not fit into one machine's memory), which warms up,
measures, and writes its numbers as JSON. Contestants alternate, and every ratio is one of neighbours in time.
"""

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import numpy as np
import torch

REPO = Path(__file__).parents[1]
RESULTS = REPO / "benchmarks/RESULTS.md"
REFERENCE = "reference"  # the contestant that all others are compared with
GIB = 2**30

# Stable Diffusion 2.1's public architecture, and one of the same kinds of blocks for a quick look.
ARCHITECTURES = {
    "full": {
        "unet": dict(
            sample_size=64, block_out_channels=(320, 640, 1280, 1280), layers_per_block=2, attention_head_dim=(5, 10, 20, 20),
            cross_attention_dim=1024, use_linear_projection=True,
        ),
        "vae": dict(block_out_channels=(128, 256, 512, 512), layers_per_block=2, norm_num_groups=32, sample_size=768),
        "text_encoder": dict(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16, vocab_size=49408,
            hidden_act="gelu", projection_dim=512,
        ),
    },
    "tiny": {
        "unet": dict(
            sample_size=8, block_out_channels=(16, 32, 32, 32), layers_per_block=1, attention_head_dim=(1, 2, 2, 2),
            cross_attention_dim=64, use_linear_projection=True, norm_num_groups=8,
        ),
        "vae": dict(block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4, sample_size=64),
        "text_encoder": dict(
            hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, vocab_size=49408
        ),
    },
}  # fmt: skip


# ------------------------------------------------------------------------------------------------------ models and images
def build_unet(architecture: str, patched: bool = True):
    """The U-Net with random weights on torch's default device: of stage 2 (8 channels in, 5 out), or the base's (4, 4)."""
    from diffusers import UNet2DConditionModel

    channels = dict(in_channels=8, out_channels=5) if patched else {}
    return UNet2DConditionModel(**ARCHITECTURES[architecture]["unet"], **channels)


def build_vae(architecture: str):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, latent_channels=4,
        scaling_factor=0.18215, **ARCHITECTURES[architecture]["vae"],
    )  # fmt: skip
    return vae.eval().requires_grad_(False)


def make_models(folder: Path, architecture: str) -> SimpleNamespace:
    """A base of random weights in diffusers layout and a stage 2 U-Net, made once => their folders, `base` and `checkpoint`."""
    from transformers import CLIPTextConfig, CLIPTextModel

    from benchmarks import reference
    from demo.pretrain_base import make_scheduler, make_text_encoder

    base, checkpoint, done = folder / "base", folder / "checkpoint", folder / "made.txt"
    if not done.is_file():
        print(f"making a base of random weights in {folder}")
        torch.manual_seed(0)
        make_scheduler(base)
        make_text_encoder(base)  # for its tokenizer
        CLIPTextModel(CLIPTextConfig(**ARCHITECTURES[architecture]["text_encoder"])).save_pretrained(base / "text_encoder")
        build_vae(architecture).save_pretrained(base / "vae")
        unet = build_unet(architecture, patched=False)
        unet.save_pretrained(base / "unet")
        reference.patch(unet).save_pretrained(checkpoint)
        done.write_text("random weights, complete\n")
    return SimpleNamespace(base=base, checkpoint=checkpoint)


def make_images(folder: Path, size: int, count: int) -> Path:
    """Simulated pairs as 8-bit PNG files, made once => a folder with sar/ and eo/ of `count` images of `size` px."""
    from PIL import Image

    from data.simulate import Simulation, simulate_scene

    target = folder / f"{count}x{size}px"
    for index in range(count):
        if (target / "eo" / f"{index:05d}.png").is_file():
            continue
        scene = simulate_scene(np.random.default_rng([0, 0, index]), Simulation(size=size))
        for kind in ("sar", "eo"):
            (target / kind).mkdir(parents=True, exist_ok=True)
            Image.fromarray(scene[kind]).save(target / kind / f"{index:05d}.png")
    return target


# ------------------------------------------------------------------------------------------------------- what work there is
def count_flops(architecture: str, size: int, batch: int = 1) -> dict[str, int]:
    """Floating-point operations (a multiply-add is two) of each part for `batch` images of `size` px, counted without weights.

    "unet": a forward pass; "unet_training": forward and backward; "encode", "decode": the VAE.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def counted(work: Callable) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    cross_attention_dim = ARCHITECTURES[architecture]["unet"]["cross_attention_dim"]
    with torch.device("meta"):
        unet, vae = build_unet(architecture), build_vae(architecture)
        pixels, latents = torch.randn(batch, 3, size, size), torch.randn(batch, 4, size // 8, size // 8)
        doubled, prompt = torch.cat([latents, latents], 1), torch.randn(batch, 24, cross_attention_dim)
        timesteps = torch.ones(batch, dtype=torch.long)
        forward = lambda: unet(doubled, timesteps, prompt).sample  # noqa: E731
        return {
            "unet": counted(forward),
            "unet_training": counted(lambda: forward().mean().backward()),
            "encode": counted(lambda: vae.encode(pixels)),
            "decode": counted(lambda: vae.decode(latents)),
        }


def matmul_ceiling(device: str) -> dict[str, float]:
    """The best of several large square matrix multiplications => FLOP/s for "fp32" and "bf16", with PyTorch's defaults."""
    size = 8192 if device == "cuda" else 2048
    ceiling = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(12):
            before = now(device)
            a @ b
            after = now(device)
            seconds.append(between(before, after))
        ceiling[name] = 2 * size**3 / min(seconds[2:])
    return ceiling


# -------------------------------------------------------------------------------------------------------------- clocks
def now(device: str):
    """A point in time, on the GPU's own clock where there is one: the program does not wait for it."""
    if device != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between(before, after) -> float:
    """Seconds between two points in time."""
    if isinstance(before, float):
        return after - before
    after.synchronize()
    return before.elapsed_time(after) / 1000


class Parts:
    """Seconds by part of the work. Parts may lie in several threads; what overlaps counts in each."""

    def __init__(self, device: str):
        self.device, self.spans = device, []

    @contextmanager
    def part(self, name: str, device: str | None = None) -> Iterator[None]:
        before = now(device or self.device)
        yield
        self.spans.append((name, before, now(device or self.device)))

    def reset(self) -> None:
        self.spans = []

    def seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, before, after in self.spans:
            totals[name] = totals.get(name, 0.0) + between(before, after)
        return totals

    def watch(self, module: torch.nn.Module, name: str) -> None:
        """Count every call of a module."""
        started = []
        module.register_forward_pre_hook(lambda *_: started.append(now(self.device)))
        module.register_forward_hook(lambda *_: self.spans.append((name, started.pop(), now(self.device))))

    def watch_optimizer(self) -> None:
        """Count every step of every optimizer."""
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        started = []
        register_optimizer_step_pre_hook(lambda *_: started.append(now(self.device)))
        register_optimizer_step_post_hook(lambda *_: self.spans.append(("optimizer", started.pop(), now(self.device))))

    def watch_backward(self) -> None:
        """Count every backward pass."""
        backward = torch.Tensor.backward

        def timed(*args, **options):
            with self.part("backward"):
                return backward(*args, **options)

        torch.Tensor.backward = timed

    def watch_function(self, function: Callable, name: str, device: str = "cpu", done: Callable = lambda *_: None) -> None:
        """Count every call of a function, under whatever name a module of this process has imported it.

        `device` is that whose time counts; `done` is told the arguments after each call.
        """

        def timed(*args, **options):
            with self.part(name, device):
                result = function(*args, **options)
            done(*args)
            return result

        for module in list(sys.modules.values()):
            for key, value in list(getattr(module, "__dict__", {}).items()):
                if value is function:
                    setattr(module, key, timed)

    def watch_batches(self, batches) -> Iterator:
        """The batches, counting how long each was waited for."""
        batches = iter(batches)
        while True:
            before = now("cpu")
            if (batch := next(batches, None)) is None:
                return
            self.spans.append(("load", before, now("cpu")))
            yield batch


def peak_memory(device: str) -> dict[str, float]:
    """GiB: the most resident memory of this process so far, and the most that PyTorch held on the GPU."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    high_water = next(int(line.split()[1]) for line in read_lines("/proc/self/status") if line.startswith("VmHWM"))
    peak = {"ram": high_water * 1024 / GIB}
    return peak | ({"gpu": torch.cuda.max_memory_allocated() / GIB} if device == "cuda" else {})


# --------------------------------------------------------------------------------------------------------- contestants
def environment(device: str) -> dict[str, str]:
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    return {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", **hidden}


def run_worker(script: str, job: dict, folder: Path, processes: int = 1, **environ: str) -> dict:
    """Measure one contestant on its own: `script --worker JOB` => what it wrote, or {"failed": reason}.

    With several `processes`, torchrun starts as many of it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "job.json").write_text(json.dumps(job, indent=2))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    command = [sys.executable, *launcher, script, "--worker", str(folder)]
    with open(folder / "log.txt", "w") as log:
        code = subprocess.run(command, stdout=log, stderr=log, env=environment(job["device"]) | environ).returncode
    if code == 0 and (folder / "result.json").is_file():
        return json.loads((folder / "result.json").read_text())
    return {"failed": f"exit code {code}: {last_words(folder / 'log.txt')}; see {os.path.relpath(folder / 'log.txt')}"}


def last_words(log: Path) -> str:
    """The last line that says something: torchrun ends its report by a rule, and what is killed by a progress bar."""
    said = (line.strip() for line in reversed(log.read_text().splitlines()) if "%|" not in line)
    return next((line for line in said if line.strip(" =-")), "nothing")


def work(folder: Path, measure: Callable[[dict], dict]) -> int:
    """The worker's side: read the job, measure, write the result, of several processes the first one's."""
    result = measure(json.loads((folder / "job.json").read_text()))
    if os.environ.get("RANK", "0") == "0":
        (folder / "result.json").write_text(json.dumps(result, indent=2))
    return 0


def alternate(names: list[str], rounds: int, measure: Callable[[str, int], dict]) -> dict[str, list[dict]]:
    """Measure every contestant in every round, one after the other => their results by name; failures leave no result."""
    results = {name: [] for name in names}
    for index in range(rounds):
        for name in names:
            started = time.monotonic()
            result = measure(name, index)
            said = f"failed: {result['failed']}" if "failed" in result else summary(result)
            print(f"round {index + 1}, {name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
            results[name].append(result)
    return results


def file_name(name: str) -> str:
    """A contestant's name for its folder."""
    return name.replace(", ", "-").replace(": ", "-").replace(" ", "-")


def summary(result: dict) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, int | float))


# -------------------------------------------------------------------------------------------------------------- judging
def median_and_range(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "low": min(values), "high": max(values)}


def compare(results: dict[str, list[dict]], key: str) -> dict[str, dict[str, float]]:
    """Each contestant's `key` over the reference's of the same round => {name: median, low, high} where both were measured."""
    ratios = {}
    for name, rounds in results.items():
        pairs = zip(rounds, results[REFERENCE], strict=True)
        values = [mine[key] / theirs[key] for mine, theirs in pairs if key in mine and key in theirs]
        if values:
            ratios[name] = median_and_range(values)
    return ratios


def in_one(results: list[dict], key: str) -> dict[str, float] | None:
    """Median and range of one number over the rounds; None where it was never measured."""
    values = [result[key] for result in results if key in result]
    return median_and_range(values) if values else None


def parts_of(results: list[dict]) -> dict[str, float]:
    """Medians of the parts over the rounds."""
    names = dict.fromkeys(name for result in results for name in result.get("parts", {}))
    return {name: statistics.median([r["parts"].get(name, 0.0) for r in results if "parts" in r]) for name in names}


# ------------------------------------------------------------------------------------------------------------ reporting
def machine(device: str) -> str:
    """The machine in words."""
    model = next(
        (line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")),
        platform.processor(),
    )
    memory = next((int(line.split()[1]) / 2**20 for line in read_lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    words = f"{os.cpu_count()} x {model}, {memory:.0f} GiB, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {words}" if device == "cuda" else words


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def versions() -> dict[str, str]:
    names = ("torch", "diffusers", "transformers", "accelerate")
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=REPO, capture_output=True, text=True)
    return {"python": platform.python_version(), **{n: version(n) for n in names}, "commit": said.stdout.strip() or "unknown"}


def header(benchmark: str, args: argparse.Namespace, ceiling: dict[str, float]) -> dict:
    """What a record says of the run itself."""
    return {
        "benchmark": benchmark,
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "machine": machine(args.device),
        "versions": versions(),
        "command": shlex.join(["python", f"benchmarks/{benchmark}.py", *args.argv]),
        "device": args.device,
        "architecture": "tiny" if args.quick else "full",
        "ceiling_flops_per_s": ceiling,
    }


def table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(spread: dict[str, float] | None, unit: str = "", digits: int = 3) -> str:
    """A median with its range."""
    if spread is None:
        return "–"
    median, low, high = (f"{spread[key]:.{digits}g}" for key in ("median", "low", "high"))
    return f"{median}{unit}" if low == high else f"{median}{unit} ({low} to {high})"


def report(record: dict, text: str, args: argparse.Namespace) -> None:
    """Print the tables, and keep the record where it was asked for."""
    ceiling = ", ".join(f"{name} {value / 1e12:.3g}" for name, value in record["ceiling_flops_per_s"].items())
    lines = [
        f"## {record['benchmark']}: {record['date']}", "", f"- machine: {record['machine']}",
        f"- versions: {', '.join(f'{name} {number}' for name, number in record['versions'].items())}",
        f"- command: `{record['command']}`", f"- measured matrix multiplication: {ceiling} TFLOP/s", "", text, "",
    ]  # fmt: skip
    print("\n" + "\n".join(lines))
    if args.json:
        write_json(args.json, record)
    if args.keep:
        with open(RESULTS, "a") as file:
            file.write("\n" + "\n".join(lines))


def write_json(path: Path, record: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=2) + "\n")


def make_parser(description: str) -> argparse.ArgumentParser:
    """The options that all the benchmarks have."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and small images: a look at the command")
    parser.add_argument("--rounds", type=int, default=3, help="how often each contestant is measured, by turns [3]")
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    parser.add_argument("--keep", action="store_true", help=f"append the tables to {RESULTS.relative_to(REPO)}")
    parser.add_argument("--work-dir", type=Path, default=REPO / "work_dir/benchmarks/speed", help="models, images, logs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # measure one contestant: a folder with job.json
    return parser


def parse(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.rounds < 1:
        parser.error(f"--rounds: expected at least 1, found {args.rounds}")
    args.argv = argv
    args.models = args.work_dir / ("tiny" if args.quick else "full")
    return args


def chosen(parser: argparse.ArgumentParser, written: list[str] | None, rows: Iterable[str], headline) -> list[str]:
    """The contestants asked for by --rows, the reference first."""
    names = list(rows) if written == ["all"] else written or list(headline)
    if unknown := [name for name in names if name not in rows]:
        parser.error(f"--rows: {'; '.join(unknown)}: expected all, or any of {'; '.join(rows)}")
    return list(dict.fromkeys([REFERENCE, *names]))
