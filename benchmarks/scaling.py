"""What many GPUs would take, on paper: computes the tables of SCALING.md, where the arithmetic is written out.

    python benchmarks/scaling.py

The time of a part is its FLOP or bytes over a rate. Nothing is timed: FLOP are counted on networks without weights.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import count_flops, table
from cdiffset.errors import Parser, run
from cdiffset.inference.options import PRESETS

# Data sheets (NVIDIA): bf16 FLOP/s without sparsity, memory and link bandwidth in B/s, the latter in one direction.
GPUS = {
    "H200 SXM": {"flops": 989e12, "memory": 4.8e12, "link": 450e9},
    "A100 SXM 80 GB": {"flops": 312e12, "memory": 2.04e12, "link": 300e9},
}
COUNTS = (1, 8, 64)
# Assumed: share of the peak that the networks reach; s that a forward and backward pass takes at least; B/s between nodes of
# 8 GPUs with a network card of 400 Gbit/s each; B/s of the shared storage; CPU cores per GPU that read and write image files.
UTILISATION, LAUNCH_S, NETWORK, STORAGE, CORES = 0.35, 0.03, 400e9, 5e9, 8
READ_S_PER_PX, WRITE_S_PER_PX = 17e-9, 112e-9  # measured 2026-11-24 on a core of an AMD EPYC: an RGB PNG of noise
PARAMETERS = 865_925_125  # of SD 2.1's U-Net with 8 channels in and 5 out
STATE_BYTES = PARAMETERS * 3 * 4  # float32 weights and the two moments of AdamW
PAIRS, BATCH, ITERATIONS, SIZE = 16_001, 64, 50_000, 256  # QXS-SAROPT by the paper's recipe
VALIDATIONS, VAL_IMAGES, CHECKPOINTS = 56, 100, 10  # 16 in the first four fifths of 200 epochs, 40 in the last; each 5,000
AREA_PX, TILE, OVERLAP = 10**12, 512, 128  # 1 million km² at 1 m


def step_seconds(gpu: dict, count: int, flop: dict[str, int], cached: bool) -> dict[str, float]:
    """Seconds of each part of a training iteration on `count` GPUs, nothing overlapping: an upper bound."""
    pairs = BATCH / count  # of each GPU
    networks = pairs * (flop["unet_training"] + (0 if cached else 2 * flop["encode"])) / (gpu["flops"] * UTILISATION)
    link = gpu["link"] if count <= 8 else min(gpu["link"], NETWORK)
    return {
        "networks": networks,
        "launches": max(LAUNCH_S - networks, 0),  # what they take beyond that
        "optimizer": PARAMETERS * 28 / gpu["memory"],  # reads gradient, weight, two moments; writes the last three
        "all-reduce": 2 * (count - 1) / count * PARAMETERS * 4 / link,  # a ring, of float32 gradients
        "data": BATCH * latent_bytes(1) / STORAGE if cached else pairs * 2 * SIZE**2 * READ_S_PER_PX / CORES,
    }


def training_hours(gpu: dict, count: int, flop: dict[str, int], step: float) -> float:
    """The whole run, with its validations and checkpoints."""
    validation = VALIDATIONS * VAL_IMAGES * translation_flop(flop, 50) / (gpu["flops"] * UTILISATION * count)
    return (ITERATIONS * step + validation + CHECKPOINTS * STATE_BYTES / STORAGE) / 3600


def latent_bytes(pairs: int) -> int:
    """Float32 latents of both images: 4 channels of an eighth of the side."""
    return pairs * 2 * 4 * (SIZE // 8) ** 2 * 4


def translation_flop(flop: dict[str, int], steps: int) -> int:
    return flop["encode"] + steps * flop["unet"] + flop["decode"]


def area_hours(gpu: dict, count: int, flop: dict[str, int], steps: int) -> dict[str, float]:
    """Hours to translate AREA_PX by resource; they overlap, so that the longest decides."""
    tiles = AREA_PX / (TILE - OVERLAP) ** 2
    return {
        "networks": tiles * translation_flop(flop, steps) / (gpu["flops"] * UTILISATION * count) / 3600,
        "writing": AREA_PX * WRITE_S_PER_PX / (CORES * count) / 3600,
        "storage": AREA_PX * (1 + 3) / STORAGE / 3600,  # 8-bit SAR in, RGB out
    }


def training_table(flop: dict[str, int]) -> str:
    rows = []
    for name, gpu in GPUS.items():
        for cached, count in ((cached, count) for cached in (True, False) for count in COUNTS):
            parts = step_seconds(gpu, count, flop, cached)
            step = sum(parts.values())
            hours = f"{training_hours(gpu, count, flop, step):.1f}"
            cells = [name, "cached" if cached else "images", count, f"{BATCH / step:.0f}", hours]
            rows.append([*cells, *(f"{seconds * 1e3:.3g}" for seconds in parts.values())])
    return table(["GPU", "from", "GPUs", "images/s", "50,000 iterations [h]", *(f"{part} [ms]" for part in parts)], rows)


def area_table(flop: dict[str, int]) -> str:
    rows = []
    for name, gpu in GPUS.items():
        for preset, (sampling, _) in PRESETS.items():
            hours = [max(area_hours(gpu, count, flop, sampling.num_inference_steps).values()) for count in COUNTS]
            rows.append([name, preset, *(f"{value:.3g}" for value in hours)])
    return table(["GPU", "preset", *(f"{count} GPUs [h]" for count in COUNTS)], rows)


def storage_table() -> str:
    sizes = {
        "latents of all 8 orientations, QXS-SAROPT, float32": latent_bytes(8 * PAIRS),
        "the same in 16 bits": latent_bytes(8 * PAIRS) / 2,
        "one checkpoint: weights and both moments, float32": STATE_BYTES,
        "best, latest and 3 numbered checkpoints, no two the same": 5 * STATE_BYTES,
        "a bare U-Net, float32": PARAMETERS * 4,
    }
    return table(["what", "GB"], [[what, f"{size / 1e9:.1f}"] for what, size in sizes.items()])


def main(argv: list[str] | None = None) -> int:
    Parser(description="Compute the tables of SCALING.md.", allow_abbrev=False).parse_args(argv)
    flops = {side: count_flops("full", side) for side in (SIZE, TILE)}
    counted = [[side, *(f"{value / 1e12:.4g}" for value in flop.values())] for side, flop in flops.items()]
    names = ("U-Net forward", "U-Net forward and backward", "VAE encode", "VAE decode")
    tables = table(["px, TFLOP for one image", *names], counted), training_table(flops[SIZE]), area_table(flops[TILE])
    print("\n\n".join([*tables, storage_table()]))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
