"""Whole scenes, measured: seams, memory, and what tiles cost besides the networks.

    python benchmarks/scenes.py seams --checkpoint work_dir/simulated/stage2/best --output work_dir/seams
    python benchmarks/scenes.py memory
    python benchmarks/scenes.py bookkeeping

`seams` simulates a scene with known truth (data/simulate.py), or takes --sar and --eo, two GeoTIFFs on one grid, and translates
it in tiles of two sizes; finished translations in --output are kept. `memory` translates large float32 scenes by networks that
cost next to nothing and watches the process. `bookkeeping` times all but the networks: reading, fusing, stepping, writing.
"""

import argparse
import io
import json
import re
import sys
import tempfile
import time
from contextlib import redirect_stdout
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import SIMULATED_BASE, memory_mib, psnr, table, watched, words, write_json

# isort: split
import rasterio
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from rasterio.windows import Window
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

import test
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import to_signed, without_georeference, write_png
from cdiffset.scenes.tiles import make_grid
from data.simulate import Simulation, simulate_scene
from utils import panel

DEMO_SCENES = {"looks": 9.0, "parcel_px": 40.0, "texture": 0.4, "p_eo_only": 0.2}  # as in the Makefile
CROP_PX, ZOOM = 96, 3  # of the figure
TOOK = r"Mpx in ([\d.]+) s"  # as test.py reports a scene


# ---------------------------------------------------------------------------------------------------------------- seams
def seams(args: argparse.Namespace) -> str:
    """Translate one scene in all modes => the tables; writes the figure."""
    args.output.mkdir(parents=True, exist_ok=True)
    sar = args.sar or args.output / "sar.tif"
    truth = read(args.eo) if args.eo else simulate(args, sar)
    first, second = args.tiles
    arms = {f"independent {first}": (first, 0, 0)}
    arms |= {f"fused {tile}, seed {seed}": (tile, args.overlap, seed) for seed, tile in product((0, 1), args.tiles)}
    results = {name: translate(args, sar, *arm) for name, arm in arms.items()}
    pictures = {name: picture for name, (picture, _) in results.items()}
    grids = {name: make_grid(*truth.shape[1:], tile, overlap) for name, (tile, overlap, _) in arms.items()}
    rows = []
    for name, (tile, overlap, seed) in arms.items():
        other, seconds = f"fused {second if tile == first else first}, seed {seed}", results[name][1]
        rows.append([
            "fused in latents" if overlap else "independent", f"{tile}, {overlap}", seed, f"{seconds:.0f}",
            f"{truth[0].size / 1e6 / seconds:.4f}", f"{seam_ratio(pictures[name], grids[name], grids[other]):.3f}",
            f"{seam_ratio(pictures[other], grids[name], grids[other]):.3f}", f"{psnr(pictures[name], truth):.2f}",
        ])  # fmt: skip
    figure(args.figure, read(sar), truth, pictures[f"independent {first}"], pictures[f"fused {first}, seed 0"], first)
    pairs = {
        f"tile {first} and {second}": (f"fused {first}, seed 0", f"fused {second}, seed 0"),
        "seeds 0 and 1": (f"fused {first}, seed 0", f"fused {first}, seed 1"),
    }
    differences = [[what, f"{rms(pictures[a], pictures[b]):.2f}"] for what, (a, b) in pairs.items()]
    columns = ("tiles", "tile, overlap [px]", "seed", "time [s]", "Mpx/s", "seams", "… without borders there", "PSNR [dB]")
    return f"{table(columns, rows)}\n\n{table(['difference between', 'RMS [8-bit units]'], differences)}"


def simulate(args: argparse.Namespace, sar: Path) -> np.ndarray:
    """The simulated scene: the SAR into a file => the true EO, uint8 [3, H, W]."""
    scene = simulate_scene(np.random.default_rng(args.seed), Simulation(size=args.size, **DEMO_SCENES))
    Image.fromarray(scene["sar"]).save(sar)
    return np.moveaxis(scene["eo"], -1, 0)


def translate(args, sar: Path, tile: int, overlap: int, seed: int) -> tuple[np.ndarray, float]:
    """=> (EO uint8 [3, H, W], seconds), from an earlier run where there is one."""
    folder = args.output / f"{tile}_{overlap}_{seed}_{args.num_inference_steps}_{args.size}"
    if not (folder / "timing.json").is_file():
        files = {"sar_dir": sar, "output_dir": folder / "eo", "checkpoint": Path(args.checkpoint)}
        options = {name: path.resolve() for name, path in files.items()} | {"tile": tile, "overlap": overlap}
        options |= {"seed": seed, "num_inference_steps": args.num_inference_steps}
        write_json(folder / "timing.json", seconds_of(options, folder / "log.txt", args.device))
    return read(folder / "eo" / f"{sar.stem}.tif")[:3], json.loads((folder / "timing.json").read_text())


def seconds_of(options: dict, log: Path, device: str = "cpu") -> float:
    """Translate one scene in a process of its own => seconds, the loading of the model left out."""
    for _ in watched(["test.py", *words(options)], log, device):
        pass
    return float(re.search(TOOK, log.read_text())[1])


def read(path: Path) -> np.ndarray:
    """=> [C, H, W]"""
    with without_georeference(), rasterio.open(path) as source:
        return source.read()


def seam_ratio(picture: np.ndarray, grid, other) -> float:
    """Mean squared difference of neighbouring pixels across the places where tiles of `grid` begin or end, over that elsewhere.

    Without the places where tiles of the grid `other` do so, too: a picture of that grid has no border where this one looks,
    and so shows what the ground itself has there.
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


def figure(path: Path, sar: np.ndarray, truth: np.ndarray, alone: np.ndarray, fused: np.ndarray, tile: int) -> None:
    """Around the corner of four independent tiles whose borders show most."""
    half = CROP_PX // 2
    corners = product(*(range(tile, side - half, tile) for side in truth.shape[1:]))

    def steps(corner: tuple[int, int]) -> float:
        y, x = corner
        down, across = alone[:, y - 1 : y + 1, x - half : x + half], alone[:, y - half : y + half, x - 1 : x + 1]
        return rms(down[:, 0], down[:, 1]) ** 2 + rms(across[..., 0], across[..., 1]) ** 2

    y, x = max(corners, key=steps)
    pictures = {"SAR": np.repeat(sar[:1], 3, 0), "true EO": truth, "independent tiles": alone, "fused in latents": fused}
    crops = [picture[:, y - half : y + half, x - half : x + half] for picture in pictures.values()]
    larger = [torch.from_numpy(crop.repeat(ZOOM, 1).repeat(ZOOM, 2).astype(np.float32)) for crop in crops]
    write_png(path, panel([to_signed(crop) for crop in larger], list(pictures)))


# --------------------------------------------------------------------------------------------------------------- memory
def memory(args: argparse.Namespace) -> str:
    """Scenes of several sizes through test.py => a table of its memory."""
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        options = scene_options(Path(folder), args) | {"num_inference_steps": args.num_inference_steps}
        options |= {"conf_dir": Path(folder) / "conf", "output_dir": Path(folder) / "eo", "tile": args.tile}
        for size in args.sizes:
            write_noise(options["sar_dir"], size)
            loaded, peak, log, started = 0.0, 0.0, Path(folder) / "log.txt", time.monotonic()
            for pid in watched(["test.py", *words(options)], log):
                peak = max(peak, memory_mib("VmHWM", pid))
                if not loaded and " on cpu, fp32" in log.read_text():  # the networks are loaded
                    loaded = memory_mib("VmRSS", pid)
            rows.append([f"{size} x {size}", *(f"{value:.0f}" for value in (loaded, peak, peak - loaded))])
            rows[-1].append(f"{time.monotonic() - started:.0f}")
            print(rows[-1], flush=True)
    columns = "scene [px]", "model loaded [MiB]", "peak [MiB]", "beyond the model [MiB]"
    return table([*columns, f"{args.num_inference_steps} steps [s]"], rows)


def scene_options(root: Path, args: argparse.Namespace) -> dict:
    """test.py's, for a scene of noise that is yet to be written and a model of SD's factor 8 that does next to nothing."""
    base, checkpoint = root / "base", root / "checkpoint"
    for name in ("scheduler", "tokenizer", "text_encoder"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).symlink_to(SIMULATED_BASE / name)
    AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4, block_out_channels=[4] * 4,
        layers_per_block=1, latent_channels=4, norm_num_groups=1, mid_block_add_attention=False,
    ).save_pretrained(base / "vae")  # fmt: skip
    width = json.loads((SIMULATED_BASE / "text_encoder" / "config.json").read_text())["hidden_size"]
    for folder, inputs, outputs in ((base, 4, 4), (checkpoint, 8, 5)):
        UNet2DConditionModel(
            in_channels=inputs, out_channels=outputs, block_out_channels=[4, 4], layers_per_block=1, norm_num_groups=1,
            down_block_types=["DownBlock2D"] * 2, up_block_types=["UpBlock2D"] * 2, mid_block_type=None,
            cross_attention_dim=width,
        ).save_pretrained(folder / "unet")  # fmt: skip
    options = {"sar_dir": root / "scene.tif", "checkpoint": checkpoint, "pretrained_model_name_or_path": base}
    return options | {"overlap": args.overlap, "device": "cpu"}


def write_noise(path: Path, size: int) -> None:
    """A float32 GeoTIFF of `size` px a side with a border of nodata, in tiles of 512 px."""
    profile = {"driver": "GTiff", "width": size, "height": size, "count": 1, "dtype": "float32", "nodata": 0, "tiled": True}
    with without_georeference(), rasterio.open(path, "w", **profile, blockxsize=512, blockysize=512) as target:
        rng, height = np.random.default_rng(0), 512
        for top in range(0, size, height):
            rows = rng.gamma(1, 100, (min(height, size - top), size)).astype(np.float32)
            rows[:, : size // 50] = 0
            target.write(rows, 1, window=Window(0, top, size, len(rows)))


# ---------------------------------------------------------------------------------------------------------- bookkeeping
def bookkeeping(args: argparse.Namespace) -> str:
    """=> a table of what a tile costs besides the networks, which cost next to nothing in this process from here on."""
    UNet2DConditionModel.forward = lambda _, latents, *__, **___: SimpleNamespace(
        sample=latents.new_zeros(len(latents), 5, *latents.shape[2:])
    )
    AutoencoderKL.encode = lambda _, pixels: SimpleNamespace(
        latent_dist=SimpleNamespace(mean=pixel_unshuffle(pixels[:, :1], 8)[:, :4])
    )
    AutoencoderKL.decode = lambda _, latents: SimpleNamespace(sample=pixel_shuffle(latents[:, :1].expand(-1, 192, -1, -1), 8))
    rows = []
    with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
        options = scene_options(Path(folder), args) | {"scale": "dn"}
        for tile in args.tiles:
            write_noise(options["sar_dir"], 4 * tile)
            _, few, many = (time_tiles(options | {"tile": tile}, steps) for steps in (1, 1, 51))  # the first warms up
            tiles = len(make_grid(4 * tile, 4 * tile, tile, args.overlap).windows())
            step = (many - few) / 50
            rows.append([f"{tile}, {args.overlap}", f"{step / tiles * 1000:.2f}", f"{(few - step) / tiles * 1000:.1f}"])
    return table(["tile, overlap [px]", "each step [ms a tile]", "once [ms a tile]"], rows)


def time_tiles(options: dict, steps: int) -> float:
    """Run test.py in this process => seconds, the loading of the model left out."""
    output = options["sar_dir"].parent / f"eo_{options['tile']}_{steps}"
    with redirect_stdout(io.StringIO()) as said:
        test.main(words(options | {"output_dir": output, "num_inference_steps": steps}))
    return float(re.search(TOOK, said.getvalue())[1])


def make_parser() -> Parser:
    parser = Parser(description="Measure whole scenes.", allow_abbrev=False)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    one, two, three = (
        commands.add_parser(measure.__name__, help=text)
        for measure, text in (
            (seams, "seams, PSNR and time by the size of the tiles"), (memory, "memory by the size of the scene"),
            (bookkeeping, "time of all but the networks"),
        )
    )  # fmt: skip
    one.add_argument("--checkpoint", default="work_dir/simulated/stage2/best", help="of a stage 2 run [of make demo-simulated]")
    one.add_argument("--sar", type=Path, help="GeoTIFF to translate [a simulated scene]")
    one.add_argument("--eo", type=Path, help="the truth on the same grid, 8-bit RGB")
    one.add_argument("--size", type=int, default=2048, help="side of the simulated scene, px [2048]")
    one.add_argument("--seed", type=int, default=0, help="of the simulated scene [0]")
    one.add_argument("--tiles", type=int, nargs=2, default=[512, 768], help="px [512 768]")
    one.add_argument("--num-inference-steps", type=int, default=20, help="[20]")
    one.add_argument("--output", type=Path, default=Path("work_dir/seams"), help="folder of the translations [work_dir/seams]")
    one.add_argument("--figure", type=Path, default=Path("work_dir/seams/seams.png"), help="[work_dir/seams/seams.png]")
    two.add_argument("--sizes", type=int, nargs="+", default=[5000, 10000, 20000], help="px [5000 10000 20000]")
    two.add_argument("--tile", type=int, default=1024, help="px [1024]")
    two.add_argument("--num-inference-steps", type=int, default=2, help="[2]")
    three.add_argument("--tiles", type=int, nargs="+", default=[512, 1024], help="px [512 1024]")
    for each, measure in ((one, seams), (two, memory), (three, bookkeeping)):
        each.set_defaults(measure=measure)
        each.add_argument("--overlap", type=int, default=128, help="px [128]")
    one.add_argument("--device", default="cpu", help="cpu or cuda [cpu]")
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
