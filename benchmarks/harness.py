"""What the benchmarks share: throw-away models and images, arms timed by turns, medians and ratios, the machine, tables.

An arm is measured in a process of its own (two full models in float32 do not fit into one machine's memory), which warms up,
measures and writes its numbers as JSON. Arms alternate within a round, and every ratio is one of the same round.
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
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import numpy as np
import torch

from cdiffset.device import quickest_precision
from cdiffset.errors import Parser, UserError
from cdiffset.images import write_text

REPO = Path(__file__).resolve().parents[1]
SIMULATED_BASE = REPO / "assets/simulated_base"
RESULTS = REPO / "benchmarks/RESULTS.md"
REFERENCE = "reference"  # the arm that all others are compared with
PRECISION = quickest_precision(torch.device("cpu"))  # as test.py names it
MIXED_PRECISION = "bf16" if PRECISION == "bf16" else "no"  # as main.py does

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
    from demo.pretrain_base import RECIPES, make_scheduler, make_text_encoder

    base, checkpoint, done = folder / "base", folder / "checkpoint", folder / "made.txt"
    if not done.is_file():
        print(f"making a base of random weights in {folder}")
        torch.manual_seed(0)
        make_scheduler(base, RECIPES["simulated"])
        make_text_encoder(base)  # for its tokenizer
        CLIPTextModel(CLIPTextConfig(**ARCHITECTURES[architecture]["text_encoder"])).save_pretrained(base / "text_encoder")
        build_vae(architecture).save_pretrained(base / "vae")
        unet = build_unet(architecture, patched=False)
        unet.save_pretrained(base / "unet")
        reference.patch(unet).save_pretrained(checkpoint)
        done.write_text("random weights, complete\n")
    return SimpleNamespace(base=str(base), checkpoint=str(checkpoint))


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


class Model(NamedTuple):
    unet: torch.nn.Module
    vae: torch.nn.Module
    scheduler: object
    prompt_embedding: torch.Tensor  # [1,L,D]


def load_checkpoint(checkpoint: str, device: str) -> Model:
    """The model of a checkpoint folder of a training run, float32."""
    from cdiffset.checkpoint import find_weights, read_meta
    from cdiffset.model import embed_prompt, load_scheduler, load_unet, load_vae

    find_weights(Path(checkpoint), "--checkpoint")
    trained = read_meta(checkpoint).get("config")
    if trained is None:
        raise UserError(f"--checkpoint: {checkpoint} has no checkpoint.json, expected a checkpoint folder of this code")
    base = trained["pretrained_model_name_or_path"]
    vae = load_vae(base).to(device)
    unet, _ = load_unet(checkpoint, base, vae.config.latent_channels, "--checkpoint")
    prompt_embedding = embed_prompt(base, trained["prompt"]).to(device)
    return Model(unet.to(device), vae, load_scheduler(base, trained["prediction_type"]), prompt_embedding)


# ------------------------------------------------------------------------------------------------------- what work there is
def count_flops(architecture: str, size: int) -> dict[str, int]:
    """Floating-point operations (a multiply-add is two) of each part for one image of `size` px, counted without weights.

    "unet": a forward pass; "unet_training": forward and backward; "encode", "decode": the VAE.
    """
    from torch.utils.flop_counter import FlopCounterMode

    def counted(work: Callable) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    with torch.device("meta"):
        unet, vae = build_unet(architecture), build_vae(architecture)
        pixels, latents = torch.randn(1, 3, size, size), torch.randn(1, 4, size // 8, size // 8)
        prompt = torch.randn(1, 24, ARCHITECTURES[architecture]["unet"]["cross_attention_dim"])
        works = {
            "unet": lambda: unet(torch.cat([latents, latents], 1), 1, prompt),
            "unet_training": lambda: unet(torch.cat([latents, latents], 1), 1, prompt).sample.mean().backward(),
            "encode": lambda: vae.encode(pixels),
            "decode": lambda: vae.decode(latents),
        }
        return {name: counted(work) for name, work in works.items()}


def matmul_ceiling(device: str) -> dict[str, float]:
    """The best of several large square matrix multiplications => FLOP/s for "fp32" and "bf16", with PyTorch's defaults."""
    size, ceiling = 8192 if device == "cuda" else 2048, {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = []
        for _ in range(12):
            before = now(device)
            a @ b
            seconds.append(between(before, now(device)))
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
        self.device, self.spans = device, []  # (name, before, after)

    def reset(self) -> None:
        self.spans = []

    def seconds(self) -> dict[str, float]:
        totals: dict[str, float] = {}
        for name, before, after in self.spans:
            totals[name] = totals.get(name, 0.0) + between(before, after)
        return totals

    def watch(self, owner, function: str, name: str, on_cpu: bool = False, done: Callable = lambda *_: None) -> None:
        """Time every call of a function of a module or class, also where a module of this process has imported it.

        on_cpu: it is the CPU's time that counts. `done` gets the arguments after each call.
        """
        original, device = getattr(owner, function), "cpu" if on_cpu else self.device

        def timed(*args, **options):
            before = now(device)
            result = original(*args, **options)
            self.spans.append((name, before, now(device)))
            done(*args)
            return result

        setattr(owner, function, timed)
        for module in list(sys.modules.values()):
            for key, value in list(getattr(module, "__dict__", {}).items()):
                if value is original:
                    setattr(module, key, timed)

    def watch_optimizers(self) -> None:
        from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

        started = []
        register_optimizer_step_pre_hook(lambda *_: started.append(now(self.device)))
        register_optimizer_step_post_hook(lambda *_: self.spans.append(("optimizer", started.pop(), now(self.device))))


# ------------------------------------------------------------------------------------------------------------ processes
def words(options: dict) -> list[str]:
    """Options as on a command line: {"sar_dir": "x"} => ["--sar-dir", "x"]."""
    return [
        word
        for name, value in options.items()
        for word in (f"--{name.replace('_', '-')}", json.dumps(value) if isinstance(value, dict | bool | None) else str(value))
    ]


def watched(command: list[str], log: Path, device: str = "cpu", pause_s: float = 0.02, **environ: str) -> Iterator[int]:
    """Run Python with a command line, what it prints into `log` => its process id, time and again until it ends.

    UserError where it fails.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    hidden = {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", **hidden, **environ}
    with (
        open(log, "w") as said,
        subprocess.Popen([sys.executable, *command], stdout=said, stderr=said, cwd=REPO, env=environment) as process,
    ):
        try:
            while process.poll() is None:
                yield process.pid
                time.sleep(pause_s)
        finally:
            process.kill()  # where the caller has stopped; nothing else where it has ended by itself
    if process.returncode:
        raise UserError(f"exit code {process.returncode}: {last_words(log)}; see {os.path.relpath(log)}")


def timed(command: list[str], log: Path) -> dict[str, float]:
    """Run Python with a command line => its seconds, and the most memory that it held."""
    started, peak = time.monotonic(), 0.0
    for pid in watched(command, log, pause_s=0.2):
        peak = max(peak, memory_mib("VmHWM", pid))
    return {"seconds": time.monotonic() - started, "gib": peak / 1024}


def last_words(log: Path) -> str:
    """The last line that says something: torchrun ends its report by a rule, and what is killed by a progress bar."""
    said = (line.strip() for line in reversed(log.read_text().splitlines()) if "%|" not in line)
    return next((line for line in said if line.strip(" =-")), "nothing")


def memory_mib(kind: str, pid: int | str = "self") -> float:
    """Resident memory of a process: VmRSS now, VmHWM at the most so far; 0 once it has ended."""
    # Not ru_maxrss, which a process inherits from the one that started it.
    found = [line for line in read_lines(f"/proc/{pid}/status") if line.startswith(f"{kind}:")]
    return int(found[0].split()[1]) / 1024 if found else 0.0


def peak_memory(device: str) -> dict[str, float]:
    """GiB: the most resident memory of this process so far, and the most that PyTorch held on the GPU."""
    peak = {"peak_ram_gib": memory_mib("VmHWM") / 1024}
    return peak | ({"peak_gpu_gib": torch.cuda.max_memory_allocated() / 2**30} if device == "cuda" else {})


def run_worker(script: str, job: dict, folder: Path, processes: int = 1, **environ: str) -> dict:
    """Measure one arm on its own: `script --worker FOLDER` => what it wrote; UserError where it failed.

    With several `processes`, torchrun starts as many of it.
    """
    shutil.rmtree(folder, ignore_errors=True)
    write_json(folder / "job.json", job)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    for _ in watched([*launcher, script, "--worker", str(folder)], folder / "log.txt", job["device"], **environ):
        pass
    return json.loads((folder / "result.json").read_text())


def work(folder: Path, measure: Callable[[dict], dict]) -> int:
    """The worker's side: read the job, measure, write the result, of several processes the first one's."""
    result = measure(json.loads((folder / "job.json").read_text()))
    if os.environ.get("RANK", "0") == "0":
        write_json(folder / "result.json", result)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0


def alternate(args: argparse.Namespace, names: list[str], measure: Callable[[str, int], dict], rounds: int) -> dict:
    """Measure every arm in every round, by turns => {name: its result of each round}, a failure as {"failed": reason}.

    Whole rounds are kept until all are done: the same command on the same code and machine continues an interrupted run.
    """
    file = args.models / f"{args.benchmark}_unfinished.json"
    run = {"argv": args.argv, "machine": machine(args.device), "versions": versions()}
    kept = json.loads(file.read_text()) if file.is_file() else {}
    done = kept["rounds"] if kept.get("run") == run else []
    for index in range(len(done), rounds):
        done.append({})
        for name in names:
            started = time.monotonic()
            try:
                result = measure(name, index)
            except UserError as error:
                result = {"failed": str(error)}
            numbers = ", ".join(f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, int | float))
            said = f"failed: {result['failed']}" if "failed" in result else numbers
            print(f"round {index + 1}, {name}: {said} ({time.monotonic() - started:.0f} s)", flush=True)
            done[-1][name] = result
        write_json(file, {"run": run, "rounds": done})
    file.unlink()
    return {name: [each[name] for each in done] for name in names}


def folder_of(args: argparse.Namespace, name: str, round_: int) -> Path:
    """Where an arm of a round works."""
    return args.models / args.benchmark / name.replace(", ", "-").replace(": ", "-").replace(" ", "-") / str(round_)


# ------------------------------------------------------------------------------------------------------- evaluation
def spread(values: list[float]) -> dict[str, float] | None:
    """Median and range; None of nothing."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values)} if values else None


def ratio(mine: list[dict], theirs: list[dict], key: str, divisor: float = 1) -> dict[str, float] | None:
    """Of one number to another arm's of the same round, over `divisor`, where both were measured."""
    pairs = zip(mine, theirs, strict=True)
    return spread([a[key] / b[key] / divisor for a, b in pairs if key in a and key in b])


def summarise(results: dict[str, list[dict]]) -> list[dict]:
    """{arm: its result of each round} => a row for each arm: its name, what failed, and the spread of every number.

    Under "parts" medians over the rounds.
    """
    rows = []
    for name, rounds in results.items():
        numbers = dict.fromkeys(k for result in rounds for k, value in result.items() if isinstance(value, int | float))
        parts = dict.fromkeys(part for result in rounds for part in result.get("parts", {}))
        measured = [result["parts"] for result in rounds if "parts" in result]
        rows.append({
            "name": name,
            "failed": [result["failed"] for result in rounds if "failed" in result],
            **{key: spread([result[key] for result in rounds if key in result]) for key in numbers},
            "parts": {part: statistics.median([each.get(part, 0.0) for each in measured]) for part in parts},
        })  # fmt: skip
    return rows


def psnr(a: np.ndarray, b: np.ndarray, peak: float = 255) -> float:
    """Of all values together, dB; inf where they are equal."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b)) ** 2)
    return float(10 * np.log10(peak**2 / error)) if error else float("inf")


def utilisation(row: dict, flop_per_image: float, precision: str, ceiling: dict[str, float]) -> str:
    return f"{row['images_per_s']['median'] * flop_per_image / ceiling[precision]:.0%} of {precision}"


# ------------------------------------------------------------------------------------------------------------ reporting
def machine(device: str) -> str:
    """The machine in words."""
    names = [line.split(":")[1].strip() for line in read_lines("/proc/cpuinfo") if line.startswith("model name")]
    memory = next((int(line.split()[1]) / 2**20 for line in read_lines("/proc/meminfo") if line.startswith("MemTotal")), 0)
    cores = f"{os.cpu_count()} x {names[0] if names else platform.processor()}"
    cpu = f"{cores}, {memory:.0f} GiB, {torch.get_num_threads()} threads"
    return f"{torch.cuda.get_device_name()}, {cpu}" if device == "cuda" else cpu


def read_lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).is_file() else []


def versions() -> dict[str, str]:
    said = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=REPO, capture_output=True, text=True)
    packages = {name: version(name) for name in ("torch", "diffusers", "transformers", "accelerate")}
    return {"python": platform.python_version(), **packages, "commit": said.stdout.strip() or "unknown"}


def table(columns: Iterable[str], rows: Iterable[Iterable]) -> str:
    columns = list(columns)
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in (columns, ["---"] * len(columns), *rows))


def arms_table(title: str, rows: list[dict], columns: dict[str, Callable[[dict], str]]) -> str:
    """A row for each arm; what has no number failed."""
    cells = []
    for row in rows:
        has_failed = row.keys() <= {"name", "failed", "parts"}
        shown = (
            [f"failed: {row['failed'][-1]}", *["–"] * (len(columns) - 1)]
            if has_failed
            else [of(row) for of in columns.values()]
        )
        cells.append([row["name"], *shown])
    return table([title, *columns], cells)


def parts_table(title: str, rows: list[dict]) -> str:
    names = list(dict.fromkeys(part for row in rows for part in row["parts"]))
    cells = [[row["name"], *(f"{row['parts'].get(name, 0):.3g}" for name in names)] for row in rows if row["parts"]]
    return table([title, *names], cells)


def shown(numbers: dict[str, float] | None, unit: str = "") -> str:
    """A median with its range."""
    if numbers is None:
        return "–"
    median, low, high = (f"{numbers[key]:.3g}" for key in ("median", "low", "high"))
    return f"{median}{unit}" if low == high else f"{median}{unit} ({low} to {high})"


def report(args: argparse.Namespace, ceiling: dict[str, float], text: str, **record) -> None:
    """Print the tables under what was run where; keep them and the numbers where that was asked for."""
    run = {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "machine": machine(args.device),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
        "command": shlex.join(["python", f"benchmarks/{args.benchmark}.py", *args.argv]),
        "measured matrix multiplication": ", ".join(f"{name} {rate / 1e12:.3g}" for name, rate in ceiling.items()) + " TFLOP/s",
    }  # fmt: skip
    lines = "\n".join(f"- {name}: {f'`{said}`' if name == 'command' else said}" for name, said in run.items() if name != "date")
    text = f"\n## {args.benchmark}: {run['date']}\n\n{lines}\n\n{text}\n"
    print(text)
    if args.json:
        write_json(args.json, {"benchmark": args.benchmark, **run, "ceiling_flops_per_s": ceiling, **record})
    if args.keep:
        with open(RESULTS, "a", encoding="utf-8") as file:
            file.write(text)


def report_arms(
    args: argparse.Namespace,
    ceiling: dict[str, float],
    results: dict[str, list[dict]],  # of `alternate`
    how: str,  # what was measured, in words
    columns: dict[str, Callable[[dict], str]],  # of a row of `summarise`
    parts: str | None = None,  # what the seconds of the parts are per
) -> int:
    """Report what `alternate` measured => 1 where any arm failed."""
    rows = summarise(results)
    tables = [arms_table(args.benchmark, rows, columns), *([parts_table(f"seconds per {parts}", rows)] if parts else [])]
    report(args, ceiling, "\n\n".join([how, *tables]), results=results)
    return 1 if any(row["failed"] for row in rows) else 0


def write_json(path: Path, record) -> None:
    write_text(path, json.dumps(record, indent=2) + "\n")


# -------------------------------------------------------------------------------------------------------------- options
def make_parser(description: str, arms: Iterable[str], headline: Iterable[str]) -> Parser:
    """The options of the benchmarks that compare arms with the reference."""
    parser = Parser(description=description, allow_abbrev=False)
    parser.add_argument("--rows", nargs="+", help=f"arms, or all [{'; '.join(headline)}]: {'; '.join(arms)}")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="a tiny model and small images: a look at the command")
    parser.add_argument("--rounds", type=int, default=3, help="how often each arm is measured, by turns [3]")
    parser.add_argument("--json", type=Path, help="write the numbers into this file")
    parser.add_argument("--keep", action="store_true", help=f"append the tables to {RESULTS.relative_to(REPO)}")
    parser.add_argument("--work-dir", type=Path, default=REPO / "work_dir/benchmarks/speed", help="models, images, logs")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)  # measure one arm: a folder with job.json
    return parser


def parse(parser: Parser, argv: list[str] | None, script: str) -> argparse.Namespace:
    argv = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(argv)
    if args.rounds < 1:
        raise UserError(f"--rounds: expected at least 1, found {args.rounds}")
    args.argv, args.benchmark, args.architecture = argv, Path(script).stem, "tiny" if args.quick else "full"
    args.work_dir = args.work_dir.resolve()
    args.models = args.work_dir / args.architecture
    args.on_gpu = args.device == "cuda" and not args.quick
    args.memory = "peak_gpu_gib" if args.device == "cuda" else "peak_ram_gib"
    return args


def chosen(written: list[str] | None, arms: Iterable[str], headline: Iterable[str]) -> list[str]:
    """The arms asked for by --rows, the reference first."""
    names = list(arms) if written == ["all"] else written or list(headline)
    if unknown := [name for name in names if name not in arms]:
        raise UserError(f"--rows: {'; '.join(unknown)}: expected all, or any of {'; '.join(arms)}")
    return list(dict.fromkeys([REFERENCE, *names]))
