"""How cost grows: one process measured over images, resolution and batch, a cost model fitted to it, and many GPUs on paper.

    python benchmarks/scaling.py                    # the full SD 2.1 architecture, random weights; writes SCALING.md
    python benchmarks/scaling.py --quick --output FILE.md

A pass of a network costs its FLOP at the device's rate, and a fixed time beside. Both are fitted on every other measured point
and checked on the rest. What was not measured is a published figure times a stated utilisation, and marked as an assumption.
"""

import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

from benchmarks import speed
from benchmarks.speed import REPO, between, now, table
from cdiffset.errors import run
from cdiffset.inference.options import PRESETS

SIDES = {"full": (128, 256, 512), "tiny": (32, 64, 128)}  # px
BATCHES = (1, 2, 4, 8)  # at the smallest side
IMAGES, STEPS = (1, 2, 4, 8), 2  # translated one after the other
KINDS = ("unet", "unet_training", "encode", "decode")
REPEATS = 3

# ------------------------------------------------------------------------------------------------------------- assumptions
# Peak bf16 FLOP/s without sparsity, memory and link bandwidth in B/s (one direction): NVIDIA's data sheets.
GPUS = {
    "H200 SXM": {"flops": 989e12, "memory": 4.8e12, "link": 450e9},
    "A100 SXM 80 GB": {"flops": 312e12, "memory": 2.04e12, "link": 300e9},
}
ASSUMED = {  # name: value, what it is
    "utilisation": (0.35, "share of the bf16 peak that the networks reach"),
    "launch_s": (0.03, "s that a forward and backward pass takes at least, however small: kernel launches"),
    "network": (400e9, "B/s between nodes of 8 GPUs, which have a network card of 400 Gbit/s each"),
    "storage": (5e9, "B/s of the shared storage"),
    "cores": (8, "CPU cores per GPU that read, decode and write image files"),
}
COUNTS = (1, 2, 4, 8, 16, 32, 64)
PARAMETERS = 865_925_125
STATE_BYTES = PARAMETERS * 3 * 4  # float32 weights and the two moments of AdamW
PAIRS, BATCH, ITERATIONS, SIZE = 16_001, 64, 50_000, 256  # QXS-SAROPT by the paper's recipe
VALIDATIONS, VAL_IMAGES, CHECKPOINTS = 56, 100, 10  # 16 in the first four fifths of 200 epochs, 40 in the last; each 5,000
AREA_PX, TILE, OVERLAP = 10**12, 512, 128  # 1 million km² at 1 m


# ----------------------------------------------------------------------------------------------------------------- measuring
def measure(job: dict) -> dict:
    """Seconds of one pass of every kind at every size and batch, of n translations, and of reading and writing a file."""
    import torch

    from cdiffset.diffusion import translate
    from cdiffset.images import read_eo, write_png
    from cdiffset.model import load_scheduler

    device, architecture = job["device"], job["architecture"]
    torch.manual_seed(0)
    unet, vae = (
        build(architecture).to(device, torch.bfloat16, memory_format=torch.channels_last).requires_grad_(False)
        for build in (speed.build_unet, speed.build_vae)
    )
    width = speed.ARCHITECTURES[architecture]["unet"]["cross_attention_dim"]
    prompt = torch.randn(1, 24, width, device=device, dtype=torch.bfloat16)

    def tensor(*shape: int):
        return torch.randn(*shape, device=device).to(torch.bfloat16, memory_format=torch.channels_last)

    def unet_pass(batch: int, side: int) -> Callable:
        z, timesteps = tensor(batch, 8, side // 8, side // 8), torch.full((batch,), 500, device=device)
        return lambda: unet(z, timesteps, prompt.expand(batch, -1, -1)).sample

    def training_pass(batch: int, side: int) -> Callable:
        forward = unet_pass(batch, side)

        def work() -> None:
            unet.zero_grad()
            forward().float().square().mean().backward()

        return work

    works = {
        "unet": unet_pass,
        "unet_training": training_pass,
        "encode": lambda batch, side: partial(vae.encode, tensor(batch, 3, side, side)),
        "decode": lambda batch, side: partial(vae.decode, tensor(batch, 4, side // 8, side // 8)),
    }
    sides, points = SIDES[architecture], []
    with torch.no_grad():
        scheduler = load_scheduler(job["base"], "epsilon")
        noise = torch.randn(1, 4, sides[0] // 8, sides[0] // 8)
        for count in IMAGES:
            sar = [torch.rand(1, 3, sides[0], sides[0], device=device) * 2 - 1 for _ in range(count)]
            work = lambda sar=sar: [translate(unet, vae, scheduler, each, noise, prompt, STEPS) for each in sar]  # noqa: E731
            points.append({"kind": "images", "size": sides[0], "batch": count, "seconds": timed(work, device)})
    for kind in ("unet", "encode", "decode", "unet_training"):
        training = kind == "unet_training"
        unet.requires_grad_(training)
        shapes = [(batch, sides[0]) for batch in BATCHES] + [(1, side) for side in sides[1:]] + [(2, sides[1])]
        for batch, side in shapes:
            with torch.set_grad_enabled(training):
                points.append({"kind": kind, "size": side, "batch": batch, "seconds": timed(works[kind](batch, side), device)})
    pixels, file = (np.random.default_rng(0).integers(0, 255, (TILE, TILE, 3))).astype(np.uint8), Path(job["file"])
    files = {"write": timed(lambda: write_png(file, pixels), "cpu"), "read": timed(lambda: read_eo(file), "cpu")}
    return {"points": points, "seconds_per_file_px": {name: seconds / TILE**2 for name, seconds in files.items()}}


def timed(work: Callable, device: str) -> float:
    """Median seconds of REPEATS calls, after one to warm up."""
    work()
    seconds = []
    for _ in range(REPEATS):
        before = now(device)
        work()
        seconds.append(between(before, now(device)))
    return statistics.median(seconds)


# --------------------------------------------------------------------------------------------------------------- the model
def fit(points: list[dict]) -> tuple[float, float]:
    """Points of one kind ("flop", "seconds") => (FLOP/s, fixed seconds) of least relative error, neither negative."""
    flop, seconds = (np.array([point[key] for point in points], float) for key in ("flop", "seconds"))
    weighed = np.stack([flop, np.ones_like(flop)], 1) / seconds[:, None]
    slope, fixed = np.linalg.lstsq(weighed * [1e-12, 1], np.ones_like(flop), rcond=None)[0] * [1e-12, 1]
    if fixed < 0:
        slope, fixed = (weighed[:, 0].sum() / (weighed[:, 0] ** 2).sum()), 0.0
    return 1 / slope, float(fixed)


def predict(points: list[dict]) -> tuple[dict[str, tuple[float, float]], list[dict]]:
    """Fit every kind on its even points => the fits, and every point with "predicted" seconds and whether it was "held_out".

    Translations of n images are predicted from the networks' passes alone.
    """
    fits, judged = {}, []
    for kind in KINDS:
        mine = [point for point in points if point["kind"] == kind]
        fits[kind] = fit(mine[::2])
        rate, fixed = fits[kind]
        judged += [
            {**point, "predicted": point["flop"] / rate + fixed, "held_out": index % 2 == 1} for index, point in enumerate(mine)
        ]
    for point in (point for point in points if point["kind"] == "images"):
        rates = ((fits[kind], point["parts"][kind]) for kind in ("encode", "unet", "decode"))
        each = sum(passes * (flop / rate + fixed) for (rate, fixed), (flop, passes) in rates)
        judged.append({**point, "predicted": point["batch"] * each, "held_out": True})
    return fits, judged


def training_cost(gpu: dict, count: int, flop: dict, cached: bool, read_s_per_px: float) -> dict[str, float]:
    """Seconds per iteration of each part on `count` GPUs, nothing overlapping: an upper bound."""
    assumed = {name: value for name, (value, _) in ASSUMED.items()}
    share = BATCH / count
    work = share * (flop["unet_training"] + (0 if cached else 2 * flop["encode"]))
    networks = work / (gpu["flops"] * assumed["utilisation"])
    link = gpu["link"] if count <= 8 else min(gpu["link"], assumed["network"])
    files = share * 2 * SIZE**2 * read_s_per_px / assumed["cores"]
    latents = BATCH * latent_bytes(1) / assumed["storage"]
    return {
        "networks": networks,
        "kernel launches": max(assumed["launch_s"] - networks, 0),  # what they take beyond that
        "optimizer": PARAMETERS * 28 / gpu["memory"],  # reads gradient, weight, two moments; writes the last three
        "gradient exchange": 2 * (count - 1) / count * PARAMETERS * 4 / link,
        "data": latents if cached else files,
    }


def latent_bytes(pairs: int, variants: int = 1) -> int:
    """Float32 latents of both images."""
    return pairs * variants * 2 * 4 * (SIZE // 8) ** 2 * 4


def area_cost(gpu: dict, count: int, flop: dict, steps: int, write_s_per_px: float) -> dict[str, float]:
    """Seconds to translate AREA_PX pixels on `count` GPUs, by resource; they overlap, so that the longest one decides."""
    assumed = {name: value for name, (value, _) in ASSUMED.items()}
    tiles = AREA_PX / (TILE - OVERLAP) ** 2
    work = tiles * (flop["encode"] + steps * flop["unet"] + flop["decode"])
    return {
        "networks": work / (gpu["flops"] * assumed["utilisation"] * count),
        "file encoding": AREA_PX * write_s_per_px / (assumed["cores"] * count),
        "storage": AREA_PX * (1 + 3) / assumed["storage"],  # 8-bit SAR in, RGB out
    }


# ------------------------------------------------------------------------------------------------------------------ the report
def measured_tables(judged: list[dict], fits: dict, ceiling: float) -> list[str]:
    rows = [
        [
            p["kind"], str(p["size"]), str(p["batch"]), f"{p['seconds']:.3g}", f"{p['predicted']:.3g}",
            f"{p['predicted'] / p['seconds'] - 1:+.0%}", "held out" if p["held_out"] else "fitted",
        ]
        for p in judged
    ]  # fmt: skip
    errors = [abs(p["predicted"] / p["seconds"] - 1) for p in judged if p["held_out"]]
    fitted = [[k, f"{rate / 1e12:.3g}", f"{rate / ceiling:.0%}", f"{fixed * 1e3:.3g}"] for k, (rate, fixed) in fits.items()]
    columns = ["pass", "px", "batch (images)", "measured [s]", "model [s]", "off by", "point"]
    return [
        "## Measured, one process", "", table(columns, rows), "",
        f"Held-out points are off by {statistics.median(errors):.0%} in the median, {max(errors):.0%} at most.", "",
        "## The model's two numbers per network", "",
        table(["pass", "TFLOP/s", "of the measured bf16 matrix multiplication", "fixed [ms]"], fitted), "",
    ]  # fmt: skip


def training_table(flop: dict, read_s_per_px: float) -> list[str]:
    rows = []
    for name, gpu in GPUS.items():
        for cached in (True, False):
            for count in COUNTS:
                cost = training_cost(gpu, count, flop, cached, read_s_per_px)
                total = sum(cost.values())
                rate = gpu["flops"] * ASSUMED["utilisation"][0]
                extra = VALIDATIONS * VAL_IMAGES * translation_flop(flop) / (rate * count)
                extra += CHECKPOINTS * STATE_BYTES / ASSUMED["storage"][0]
                hours = (ITERATIONS * total + extra) / 3600
                cells = [name, "cached" if cached else "images", str(count), f"{BATCH / total:.0f}", f"{hours:.1f}"]
                rows.append([*cells, *(f"{value * 1e3:.3g}" for value in cost.values()), max(cost, key=cost.get)])
    names = list(training_cost(GPUS["H200 SXM"], 1, flop, True, read_s_per_px))
    columns = ["GPU", "from", "GPUs", "images/s", "50,000 iterations [h]", *(f"{n} [ms]" for n in names), "bottleneck"]
    return ["## Training, QXS-SAROPT, batch 64 of 256 px, on paper", "", table(columns, rows), ""]


def area_table(flop: dict, write_s_per_px: float) -> list[str]:
    rows = []
    for name, gpu in GPUS.items():
        for preset, (sampling, _) in PRESETS.items():
            for count in COUNTS:
                cost = area_cost(gpu, count, flop, sampling.num_inference_steps, write_s_per_px)
                hours = {resource: seconds / 3600 for resource, seconds in cost.items()}
                cells = [name, preset, str(count), f"{max(hours.values()):.3g}"]
                rows.append([*cells, *(f"{value:.3g}" for value in hours.values()), max(hours, key=hours.get)])
    columns = ["GPU", "preset", "GPUs", "hours", "networks [h]", "file encoding [h]", "storage [h]", "bottleneck"]
    tiles = AREA_PX / (TILE - OVERLAP) ** 2
    work = tiles * translation_flop(flop)
    how = (
        f"{AREA_PX:.0e} px in {tiles / 1e6:.2f} million tiles of {TILE} px that overlap by {OVERLAP}: {work:.2e} FLOP at 50 "
        f"steps, {AREA_PX / 1e12:.0f} TB of 8-bit SAR in, {3 * AREA_PX / 1e12:.0f} TB of RGB out before compression."
    )
    return ["## 1 million km² at 1 m, on paper", "", how, "", table(columns, rows), ""]


def storage_table() -> list[str]:
    checkpoint = STATE_BYTES / 1e9
    rows = [
        ["latents of all 8 orientations, QXS-SAROPT, float32", f"{latent_bytes(PAIRS, 8) / 1e9:.1f}"],
        ["the same in 16 bits", f"{latent_bytes(PAIRS, 8) / 2e9:.1f}"],
        ["one checkpoint: weights and both moments, float32", f"{checkpoint:.1f}"],
        ["best, latest and 3 numbered checkpoints, no two the same", f"{5 * checkpoint:.1f}"],
        ["a bare U-Net, float32", f"{PARAMETERS * 4 / 1e9:.1f}"],
    ]
    return ["## Storage", "", table(["what", "GB"], rows), ""]


def write_report(record: dict, flops: dict, output: Path) -> None:
    """SCALING.md from the measured record; `flops`: count_flops by side."""
    fits, judged = predict(record["points"])
    read, write = (record["seconds_per_file_px"][name] for name in ("read", "write"))
    assumed = [[name, f"{value:g}", meaning] for name, (value, meaning) in ASSUMED.items()]
    published = [[name, *(f"{gpu[key] / 1e9:,.0f}" for key in ("flops", "memory", "link"))] for name, gpu in GPUS.items()]
    lines = [
        "# Scaling", "", f"Written by `{record['command']}` on {record['date']}: {record['machine']};",
        f"{', '.join(f'{name} {number}' for name, number in record['versions'].items())}. bf16 weights, channels_last.", "",
        *measured_tables(judged, fits, record["ceiling_flops_per_s"]["bf16"]),
        f"An image file costs {read * 1e9:.0f} ns per pixel to read and {write * 1e9:.0f} ns to write, on one core "
        f"(PNG of noise, the worst case).", "",
        "## Assumptions", "",
        "What follows was not measured: FLOP are counted, and their rate comes from data sheets and these assumptions.", "",
        table(["GPU (data sheet)", "bf16 peak [GFLOP/s]", "memory [GB/s]", "link [GB/s]"], published), "",
        table(["assumption", "value", "meaning"], assumed), "",
        "One point stands outside of it: the paper's 3.4 s for 512 px at DDIM-50 in fp32 on an RTX A6000 (38.7 TFLOP/s) is "
        f"{translation_flop(flops[512]) / 3.4 / 38.7e12:.0%} of that card's peak, near the utilisation assumed here.", "",
        *training_table(flops[SIZE], read), *area_table(flops[TILE], write), *storage_table(),
    ]  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text("\n".join(lines), encoding="utf-8")
    print("\n".join(lines))


def translation_flop(flop: dict) -> int:
    return flop["encode"] + 50 * flop["unet"] + flop["decode"]


def with_flop(points: list[dict], architecture: str) -> list[dict]:
    """Every point with the "flop" of its pass; translations with the (FLOP, passes) of their "parts"."""
    flops = {side: speed.count_flops(architecture, side) for side in SIDES[architecture]}  # in proportion to the batch
    counted = []
    for point in points:
        flop = flops[point["size"]]
        if point["kind"] == "images":
            passes = {"encode": 1, "unet": STEPS, "decode": 1}
            counted.append({**point, "parts": {kind: (flop[kind], times) for kind, times in passes.items()}})
        else:
            counted.append({**point, "flop": point["batch"] * flop[point["kind"]]})
    return counted


def main(argv: list[str] | None = None) -> int:
    parser = speed.make_parser("Measure one process over images, resolution and batch, and extrapolate by a cost model.")
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks/SCALING.md", help="the report")
    args = speed.parse(parser, argv)
    if args.worker:
        return speed.work(args.worker, measure)
    architecture = "tiny" if args.quick else "full"
    models = speed.make_models(args.models, architecture)
    folder, started = args.models / "scaling", time.monotonic()
    job = {"device": args.device, "architecture": architecture, "base": str(models.base), "file": str(folder / "file.png")}
    result = speed.run_worker(__file__, job, folder)
    if "failed" in result:
        print(f"failed: {result['failed']}", file=sys.stderr)
        return 1
    record = speed.header("scaling", args, speed.matmul_ceiling(args.device)) | result
    record["points"] = with_flop(result["points"], architecture)
    flops = {side: speed.count_flops("full", side) for side in (SIZE, TILE)}
    write_report(record, flops, args.output)
    if args.json:
        speed.write_json(args.json, record)
    print(f"measured in {time.monotonic() - started:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
