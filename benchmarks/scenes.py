"""Whole scenes, measured: seams, memory, and what tiles cost besides the networks.

    python benchmarks/scenes.py seams --checkpoint work_dir/demo/stage2/best --output work_dir/seams
    python benchmarks/scenes.py memory
    python benchmarks/scenes.py bookkeeping [--base BASE]

`seams` simulates a scene with known truth (data/simulate.py), or takes --sar and --eo, two GeoTIFFs on one grid, and
translates it in every mode; finished translations in --output are kept. `memory` translates large float32 scenes by networks
that cost next to nothing and watches the process. `bookkeeping` times all but the networks, and with --base a full-size U-Net.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import cdiffset  # noqa: F401  first: it mends torchvision

# isort: split
import rasterio
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from rasterio.windows import Window
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import test
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import to_signed, without_georeference, write_png
from cdiffset.model import load_scheduler
from cdiffset.scenes.fusion import gather_team, translate_scene
from cdiffset.scenes.options import radiometry_options
from cdiffset.scenes.tiles import make_grid
from data.simulate import Simulation, simulate_scene
from utils import panel

REPO = Path(__file__).resolve().parents[1]
DEMO_BASE = REPO / "assets" / "demo_base"
DEMO_SCENES = {"looks": 9.0, "parcel_px": 40.0, "texture": 0.4, "p_eo_only": 0.2}  # as in the Makefile
CROP_PX, ZOOM = 96, 3  # of the figure


# ---------------------------------------------------------------------------------------------------------------- seams
def seams(args: argparse.Namespace) -> str:
    """Translate one scene in all modes => the tables; writes the figure."""
    args.output.mkdir(parents=True, exist_ok=True)
    sar = args.sar or args.output / "sar.tif"
    truth = read(args.eo) if args.eo else simulate(args, sar)
    first, second = args.tiles
    arms = {f"independent {first}": ("pixels", first, 0, 0)}
    for blend, tile in product(("pixels", "latents"), args.tiles):
        arms[f"{blend} {tile}"] = (blend, tile, args.overlap, 0)
    for tile in args.tiles:
        arms[f"latents {tile}, seed 1"] = ("latents", tile, args.overlap, 1)
    lines = [
        "| tiles | tile, overlap [px] | seed | time [s] | Mpx/s | seams | … without borders there | PSNR [dB] |",
        "|---|---|---|---|---|---|---|---|",
    ]
    results = {name: translate(args, sar, *arm) for name, arm in arms.items()}
    pictures = {name: picture for name, (picture, _) in results.items()}
    grids = {name: make_grid(*truth.shape[1:], tile, overlap) for name, (_, tile, overlap, _) in arms.items()}
    for name, (blend, tile, overlap, seed) in arms.items():
        mode = {"pixels": "blended in pixels", "latents": "fused in latents"}[blend] if overlap else "independent"
        other = f"latents {second if tile == first else first}" + (", seed 1" if seed else "")
        seconds = results[name][1]
        lines.append(
            f"| {mode} | {tile}, {overlap} | {seed} | {seconds:.0f} | {truth[0].size / 1e6 / seconds:.4f} "
            f"| {seam_ratio(pictures[name], grids[name], grids[other]):.3f} "
            f"| {seam_ratio(pictures[other], grids[name], grids[other]):.3f} | {psnr(pictures[name], truth):.2f} |"
        )
    figure(args.figure, read(sar), truth, pictures, first)
    rows = [
        ("tile " + " and ".join(map(str, args.tiles)) + ", fused in latents", f"latents {first}", f"latents {second}"),
        ("tile " + " and ".join(map(str, args.tiles)) + ", blended in pixels", f"pixels {first}", f"pixels {second}"),
        ("seeds 0 and 1, fused in latents", f"latents {first}", f"latents {first}, seed 1"),
    ]
    lines += ["", "| difference between | RMS [8-bit units] |", "|---|---|"]
    return "\n".join(lines + [f"| {what} | {rms(pictures[a], pictures[b]):.2f} |" for what, a, b in rows])


def simulate(args: argparse.Namespace, sar: Path) -> np.ndarray:
    """The simulated scene: the SAR into a file => the true EO, uint8 [3, H, W]."""
    scene = simulate_scene(np.random.default_rng(args.seed), Simulation(size=args.size, **DEMO_SCENES))
    write(sar, scene["sar"][None])
    return np.moveaxis(scene["eo"], -1, 0)


def translate(args, sar: Path, blend: str, tile: int, overlap: int, seed: int) -> tuple[np.ndarray, float]:
    """=> (EO uint8 [3, H, W], seconds), from an earlier run where there is one."""
    name = f"{blend}_{tile}_{overlap}_{seed}_{args.num_inference_steps}_{args.size}"
    eo, timing = args.output / name / f"{sar.stem}.tif", args.output / f"{name}.json"
    if not timing.is_file():
        options = {
            "sar-dir": sar, "output-dir": eo.parent, "checkpoint": args.checkpoint, "blend": blend, "tile": tile,
            "overlap": overlap, "seed": seed, "num-inference-steps": args.num_inference_steps,
        }  # fmt: skip
        said = subprocess.run(command(options), check=True, stdout=subprocess.PIPE, text=True).stdout
        timing.write_text(json.dumps({"seconds": float(re.search(r"Mpx in ([\d.]+) s", said)[1])}))
    return read(eo)[:3], json.loads(timing.read_text())["seconds"]


def command(options: dict) -> list[str]:
    return [
        sys.executable,
        str(REPO / "test.py"),
        *(str(word) for name, value in options.items() for word in (f"--{name}", value)),
    ]


def seam_ratio(picture: np.ndarray, grid, other) -> float:
    """Mean squared difference of neighbouring pixels across the places where tiles of `grid` begin or end, over that elsewhere.

    Without the places where tiles of the grid `other` do so, too: a picture of that grid has no border where this one looks,
    and so tells what the ground itself has there.
    """
    at, elsewhere = [], []
    for axis in (1, 2):
        energy = (np.diff(picture.astype(np.float64), axis=axis) ** 2).mean(axis=(0, 3 - axis))  # one value for each line
        own, others = (borders(each, axis) for each in (grid, other))
        at.append(energy[sorted(own - others)])
        elsewhere.append(np.delete(energy, sorted(own | others)))
    return float(np.concatenate(at).mean() / np.concatenate(elsewhere).mean())


def borders(grid, axis: int) -> set[int]:
    """Lines before which a tile begins or ends inside the scene, by the line before; axis 1: rows, 2: columns."""
    starts, side, length = ((grid.tops, grid.tile[0], grid.height), (grid.lefts, grid.tile[1], grid.width))[axis - 1]
    return {line - 1 for start in starts for line in (start, start + side)} - {-1, length - 1}


def rms(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.sqrt(((a.astype(np.float64) - b) ** 2).mean()))


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    return float(20 * np.log10(255 / rms(a, b)))


def figure(path: Path, sar: np.ndarray, truth: np.ndarray, pictures: dict[str, np.ndarray], tile: int) -> None:
    """Around the corner of four independent tiles whose borders show most."""
    alone = pictures[f"independent {tile}"].astype(np.float64)
    half = CROP_PX // 2
    corners = list(product(*(range(tile, side - half, tile) for side in truth.shape[1:])))

    def steps(corner: tuple[int, int]) -> float:
        y, x = corner
        down, across = alone[:, y - 1 : y + 1, x - half : x + half], alone[:, y - half : y + half, x - 1 : x + 1]
        return (np.diff(down, axis=1) ** 2).mean() + (np.diff(across, axis=2) ** 2).mean()

    y, x = max(corners, key=steps)
    shown = {"SAR": np.repeat(sar[:1], 3, 0), "true EO": truth, "independent tiles": pictures[f"independent {tile}"]}
    shown |= {"blended in pixels": pictures[f"pixels {tile}"], "fused in latents": pictures[f"latents {tile}"]}
    crops = [picture[:, y - half : y + half, x - half : x + half] for picture in shown.values()]
    larger = [crop.repeat(ZOOM, 1).repeat(ZOOM, 2).astype(np.float32) for crop in crops]
    write_png(path, panel([torch.from_numpy(to_signed(crop)) for crop in larger], list(shown)))


# --------------------------------------------------------------------------------------------------------------- memory
def memory(args: argparse.Namespace) -> str:
    """Scenes of several sizes through test.py => a table of its memory."""
    lines = [
        f"| scene [px] | model loaded [MiB] | peak [MiB] | beyond the model [MiB] | {args.num_inference_steps} steps [s] |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        root = Path(folder)
        base, checkpoint = save_stand_in(root)
        for size in args.sizes:
            write_noise(root / "scene.tif", size)
            options = {
                "sar-dir": root / "scene.tif", "output-dir": root / "eo", "conf-dir": root / "conf", "checkpoint": checkpoint,
                "pretrained-model-name-or-path": base, "num-inference-steps": args.num_inference_steps, "tile": args.tile,
                "overlap": args.overlap, "device": "cpu",
            }  # fmt: skip
            loaded, peak, seconds = watch(command(options), root / "said.txt")
            lines.append(f"| {size} x {size} | {loaded:.0f} | {peak:.0f} | {peak - loaded:.0f} | {seconds:.0f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def save_stand_in(root: Path) -> tuple[Path, Path]:
    """A base and a stage 2 checkpoint of SD's factor 8 and channels whose networks do next to nothing."""
    base, checkpoint = root / "base", root / "checkpoint"
    for name in ("scheduler", "tokenizer", "text_encoder"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).symlink_to(DEMO_BASE / name)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[4] * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=1, mid_block_add_attention=False,
    ).save_pretrained(base / "vae")  # fmt: skip
    width = json.loads((DEMO_BASE / "text_encoder" / "config.json").read_text())["hidden_size"]
    for folder, inputs, outputs in ((base, 4, 4), (checkpoint, 8, 5)):
        UNet2DConditionModel(
            in_channels=inputs, out_channels=outputs, block_out_channels=[4, 4], layers_per_block=1, norm_num_groups=1,
            down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, mid_block_type=None,
            cross_attention_dim=width,
        ).save_pretrained(folder / "unet")  # fmt: skip
    return base, checkpoint


def write_noise(path: Path, size: int) -> None:
    """A float32 GeoTIFF of `size` px a side with a border of nodata, in tiles of 512 px."""
    profile = {"driver": "GTiff", "width": size, "height": size, "count": 1, "dtype": "float32", "nodata": 0, "tiled": True}
    with without_georeference(), rasterio.open(path, "w", **profile, blockxsize=512, blockysize=512) as target:
        rng, height = np.random.default_rng(0), 512
        for top in range(0, size, height):
            rows = rng.gamma(1, 100, (min(height, size - top), size)).astype(np.float32)
            rows[:, : size // 50] = 0
            target.write(rows, 1, window=Window(0, top, size, len(rows)))


def watch(argv: list[str], words: Path) -> tuple[float, float, float]:
    """Run test.py => (resident MiB once its networks are loaded, at the most, seconds)."""
    loaded, peak, started = 0.0, 0.0, time.monotonic()
    with words.open("w") as said:
        process = subprocess.Popen([argv[0], "-u", *argv[1:]], stdout=said, stderr=said)
    while process.poll() is None:
        status = dict(re.findall(r"(Vm\w+):\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text()))
        peak = max(peak, int(status.get("VmHWM", 0)) / 1024)
        if not loaded and " on cpu, fp32" in words.read_text():
            loaded = int(status["VmRSS"]) / 1024
        time.sleep(0.02)
    if process.returncode:
        raise UserError(f"test.py ended with {process.returncode}: {words.read_text()[-500:]}")
    return loaded, peak, time.monotonic() - started


# ---------------------------------------------------------------------------------------------------------- bookkeeping
class Stub:
    """Stands for the VAE (factor 8) and the U-Net at no cost to speak of."""

    dtype = torch.float32
    config = SimpleNamespace(latent_channels=4, scaling_factor=1.0, block_out_channels=[0] * 4)

    def encode(self, pixels: torch.Tensor):
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=pixel_unshuffle(pixels[:, :1], 8)[:, :4]))

    def decode(self, latents: torch.Tensor):
        return SimpleNamespace(sample=pixel_shuffle(latents[:, :1].repeat(1, 192, 1, 1), 8))

    def __call__(self, latents: torch.Tensor, *_, **__):
        return SimpleNamespace(sample=latents[:, 4:].new_zeros(len(latents), 5, *latents.shape[2:]))


def bookkeeping(args: argparse.Namespace) -> str:
    """=> a table of what a tile costs besides the networks."""
    lines = [
        "| tile, overlap [px] | each step [ms a tile] | once [ms a tile] | U-Net pass [ms a tile] | share at 50 steps |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        for tile in args.tiles:
            write_noise(Path(folder) / "scene.tif", 4 * tile)
            _, few, many = (time_scene(Path(folder), tile, args.overlap, steps) for steps in (1, 1, 51))  # the first warms up
            tiles = len(make_grid(4 * tile, 4 * tile, tile, args.overlap).windows())
            step, once = (many - few) / 50 / tiles * 1000, (few - (many - few) / 50) / tiles * 1000
            passed = time_unet(args, tile // 8) if args.base else None
            share = "– | –" if passed is None else f"{passed:.0f} | {(50 * step + once) / (50 * passed):.1%}"
            lines.append(f"| {tile}, {args.overlap} | {step:.2f} | {once:.1f} | {share} |")
    return "\n".join(lines)


def time_scene(folder: Path, tile: int, overlap: int, steps: int) -> float:
    written = {"checkpoint": DEMO_BASE, "sar-dir": folder / "scene.tif", "output-dir": folder / "eo", "tile": tile}
    written |= {"overlap": overlap, "scale": "dn", "num-inference-steps": steps}
    words = [str(word) for name, value in written.items() for word in (f"--{name}", value)]
    options = test.check(test.make_parser().parse_args(words))
    model = SimpleNamespace(
        vae=Stub(), unet=Stub(), scheduler=load_scheduler(str(DEMO_BASE), "epsilon"), prompt_embedding=torch.zeros(1, 2, 4),
        device=torch.device("cpu"), factor=8, args=options, fingerprint="none", trained={},
    )  # fmt: skip
    started = time.monotonic()
    files, outputs = [folder / "scene.tif"], {"eo": folder / "eo" / "scene.tif"}
    translate_scene(model, gather_team(model), files, outputs, options, radiometry_options(options))
    return time.monotonic() - started


@torch.no_grad()
def time_unet(args: argparse.Namespace, side: int) -> float:
    """Milliseconds of one pass of the base's U-Net, patched to 8 channels in and 5 out, random weights, on one tile."""
    config = UNet2DConditionModel.load_config(args.base, subfolder="unet") | {"in_channels": 8, "out_channels": 5}
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.precision]
    with torch.device(args.device):
        unet = UNet2DConditionModel.from_config(config).eval().to(dtype, memory_format=torch.channels_last)
        latents, prompt = (
            torch.zeros(1, 8, side, side, dtype=dtype),
            torch.zeros(1, 8, config["cross_attention_dim"], dtype=dtype),
        )
    times = []
    for _ in range(3):
        started = time.monotonic()
        unet(latents, 500, encoder_hidden_states=prompt).sample.cpu()
        times.append(time.monotonic() - started)
    return min(times) * 1000


# ---------------------------------------------------------------------------------------------------------------- files
def write(path: Path, bands: np.ndarray) -> None:
    count, height, width = bands.shape
    profile = {"driver": "GTiff", "count": count, "height": height, "width": width, "dtype": bands.dtype}
    with without_georeference(), rasterio.open(path, "w", **profile) as target:
        target.write(bands)


def read(path: Path) -> np.ndarray:
    """=> [C, H, W]"""
    with without_georeference(), rasterio.open(path) as source:
        return source.read()


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Measure whole scenes.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one = commands.add_parser("seams", help="seams, PSNR and time of every mode")
    one.set_defaults(measure=seams)
    one.add_argument("--checkpoint", default="work_dir/demo/stage2/best", help="of a stage 2 run [the demo's]")
    one.add_argument("--sar", type=Path, help="GeoTIFF to translate [a simulated scene]")
    one.add_argument("--eo", type=Path, help="the truth on the same grid, 8-bit RGB")
    one.add_argument("--size", type=int, default=2048, help="side of the simulated scene, px [2048]")
    one.add_argument("--seed", type=int, default=0, help="of the simulated scene [0]")
    one.add_argument("--tiles", type=int, nargs=2, default=[512, 768], help="px [512 768]")
    one.add_argument("--overlap", type=int, default=128, help="px [128]")
    one.add_argument("--num-inference-steps", type=int, default=20, help="[20]")
    one.add_argument("--output", type=Path, default=Path("work_dir/seams"), help="folder of the translations [work_dir/seams]")
    one.add_argument("--figure", type=Path, default=Path("work_dir/seams/seams.png"), help="[work_dir/seams/seams.png]")
    two = commands.add_parser("memory", help="memory by the size of the scene")
    two.set_defaults(measure=memory)
    two.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000], help="px [5000 10000 20000]")
    two.add_argument("--tile", type=int, default=1024, help="px [1024]")
    two.add_argument("--overlap", type=int, default=128, help="px [128]")
    two.add_argument("--num-inference-steps", type=int, default=2, help="[2]")
    three = commands.add_parser("bookkeeping", help="time of all but the networks")
    three.set_defaults(measure=bookkeeping)
    three.add_argument("--tiles", type=int, nargs="+", default=[512, 1024], help="px [512 1024]")
    three.add_argument("--overlap", type=int, default=128, help="px [128]")
    three.add_argument("--base", help="base whose U-Net is timed, built with random weights from its configuration")
    three.add_argument("--precision", choices=("fp32", "bf16"), default="bf16", help="of that U-Net [bf16]")
    three.add_argument("--device", default="cpu", help="of that U-Net [cpu]")
    for each in (two, three):
        each.add_argument("--scratch", type=Path, help="folder for temporary scenes, up to some GB [the system's]")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.measure is seams and (args.sar is None) != (args.eo is None):
        raise UserError("--sar and --eo: give both, or neither for a simulated scene")
    print(args.measure(args))
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
