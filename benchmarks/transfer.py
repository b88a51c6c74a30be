"""From one kind of scenes to another: all weights against low-rank adapters, at equal updates.

    python benchmarks/transfer.py --output work_dir/transfer    # long on 2 CPU cores; the same command continues

A model is trained on simulated scenes as in `make demo-simulated`. From there it is fine-tuned on scenes with more speckle,
smaller parcels and stronger texture: whole, and by adapters, for three seeds, by main.py as users run it. Held-out scenes of
the new kind say what came of it, those of the old kind what was forgotten. Writes TRANSFER.md and results.json into --output.
"""

import json
import math
import platform
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import MIXED_PRECISION, PRECISION, machine, table, timed, words, write_json

# isort: split
from safetensors import safe_open

from benchmarks.discrepancy import check_settings
from benchmarks.discrepancy_report import cell
from cdiffset.checkpoint import files_of, find_weights
from cdiffset.errors import Parser, run
from cdiffset.images import write_text
from demo.report import map_rows, read_part

OLD = {"looks": 9, "parcel_px": 40, "texture": 0.4, "p_eo_only": 0.2}  # the demo's
NEW = {"looks": 3, "parcel_px": 24, "texture": 0.7, "p_eo_only": 0.2}
KINDS = {"old": OLD, "new": NEW}


@dataclass(frozen=True)
class Size:
    train: int  # scenes of each kind
    test: int
    stage1: int  # updates on the old kind
    stage2: int
    updates: int  # on the new kind
    warmup: int
    seeds: tuple[int, ...]


SIZES = {
    "tiny": Size(64, 8, 2, 2, 2, 1, (0, 1)),  # shows that the command works, nothing else
    "small": Size(4096, 160, 300, 1250, 400, 50, (0, 1, 2)),
}
SOURCE = "not fine-tuned"
ARMS = {  # title: options of main.py
    "all weights": {"learning_rate": 4e-4},
    "adapters, rank 16": {"learning_rate": 2e-3, "lora_rank": 16, "lora_alpha": 16},
    "adapters, rank 4": {"learning_rate": 2e-3, "lora_rank": 4, "lora_alpha": 4},
}
COLUMNS = {  # of a result: title, digits
    "psnr": ("PSNR [dB] ↑", 2), "auroc": ("AUROC SAR-only ↑", 3), "spearman": ("Spearman with the error ↑", 3),
    "old_psnr": ("PSNR on the old kind [dB]", 2), "trained": ("trained weights [%]", 1), "mb": ("checkpoint [MB]", 1),
    "training_s": ("training [s]", 0),
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------------- training
def simulate(output: Path, size: Size) -> None:
    for seed, (kind, options) in enumerate(KINDS.items()):
        if not (output / kind / "simulation.json").is_file():
            given = {"output": output / kind, "train": size.train, "test": size.test, "seed": seed, **options}
            timed(["data/simulate.py", *words(given)], output / f"{kind}.log")


def train(data: Path, folder: Path, size: Size, **options) -> float:
    """main.py on the scenes of a folder => its seconds."""
    where = {f"{part}_feeder_args.{image}_dir": data / part / image for part in ("train", "test") for image in ("sar", "eo")}
    common = {"work_dir": folder, "num_warmup": size.warmup, "mixed_precision": MIXED_PRECISION, "val_len": 8}
    return timed(["main.py", *words({**common, **where, **options})], folder / "main.log")["seconds"]


def source_model(output: Path, size: Size) -> Path:
    """The checkpoint of the old kind, of both stages, trained unless it is there."""
    folders = {name: output / "source" / name for name in ("stage1", "stage2")}
    if not (folders["stage2"] / "best").is_dir():
        train(output / "old", folders["stage1"], size, config="configs/simulated.yaml", num_iter=size.stage1)
        start = {"accelerator_path": folders["stage1"] / "best", "num_iter": size.stage2}
        train(output / "old", folders["stage2"], size, config="configs/simulated_conf.yaml", **start)
    return folders["stage2"] / "best"


# ------------------------------------------------------------------------------------------------------------- evaluation
def evaluated(checkpoint: Path, output: Path, folder: Path) -> dict[str, float]:
    """Translate the held-out scenes of both kinds => what COLUMNS say of pictures and maps."""
    numbers = {}
    for kind in KINDS:
        options = {
            "sar_dir": output / kind / "test/sar", "checkpoint": checkpoint, "output_dir": folder / kind / "sample/eo",
            "variance_dir": folder / kind / "sample/variance", "preset": "fast", "batch_size": 32, "precision": PRECISION,
        }  # fmt: skip
        timed(["test.py", *words(options)], folder / f"{kind}.log")
        part = read_part(output / kind / "test", folder / kind)
        rows = map_rows(part)["one sample: variance"]
        numbers[kind] = {"psnr": mean_psnr(part), "auroc": rows["auroc_sar_only"], "spearman": rows["spearman"]}
    return {**numbers["new"], "old_psnr": numbers["old"]["psnr"]}


def mean_psnr(part: dict) -> float:
    """PSNR of each 8-bit picture, averaged over the pictures."""
    squared = ((part["sample"]["eo"] - part["eo"]) ** 2).mean((1, 2, 3))
    return float(np.mean(10 * np.log10(255**2 / squared)))


def size_of(checkpoint: Path) -> tuple[int, float]:
    """=> (numbers in its files, MB)."""
    files, count = files_of(find_weights(checkpoint, "--checkpoint")), 0
    for file in files:
        if file.suffix == ".safetensors":
            with safe_open(file, "np") as stored:
                count += sum(math.prod(stored.get_slice(name).get_shape()) for name in stored.keys())
    return count, sum(file.stat().st_size for file in files) / 1e6


def run_arm(output: Path, size: Size, source: Path, title: str, seed: int) -> dict:
    """Fine-tune and evaluate, unless it is done => its result, which is also kept in result.json."""
    folder = output / title.replace(", ", "-").replace(" ", "_") / f"seed{seed}"
    file = folder / "result.json"
    if not file.is_file():
        result, checkpoint = {"arm": title, "seed": seed}, source
        if title != SOURCE:
            options = {"config": "configs/simulated_conf.yaml", "accelerator_path": source, "num_iter": size.updates}
            result["training_s"] = train(output / "new", folder / "run", size, seed=seed, **options, **ARMS[title])
            checkpoint = folder / "run/best"
            numbers, result["mb"] = size_of(checkpoint)
            result["trained"] = 100 * numbers / size_of(source)[0]
        write_json(file, result | evaluated(checkpoint, output, folder))
    return json.loads(file.read_text())


# ----------------------------------------------------------------------------------------------------------------- report
def write_report(results: list[dict], name: str, output: Path) -> None:
    size = SIZES[name]
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "diffusers", "peft"))
    changed = ", ".join(f"{key} {OLD[key]:g} → {NEW[key]:g}" for key in OLD if OLD[key] != NEW[key])
    lines = []
    for title in (SOURCE, *ARMS):
        runs = [result for result in results if result["arm"] == title]
        lines.append([title, *(cell([run.get(column) for run in runs], digits) for column, (_, digits) in COLUMNS.items())])
    rates = "; ".join(f"{title}: {options['learning_rate']:g}" for title, options in ARMS.items())
    text = f"""# From one kind of scenes to another

Written by `python benchmarks/transfer.py --size {name}`
on {machine("cpu")} (Python {platform.python_version()}, {packages}).

- A model of simulated scenes ({size.train:,} for training, {size.stage1} + {size.stage2} updates of 32) is fine-tuned on
  {size.train:,} others ({changed}): {size.updates} updates of 32 in stage 2, {len(size.seeds)} seeds; ± is the half-width
  of the 95 % interval over them.
- Adapters stand on the attention layers, conv_in and conv_out are trained whole. Learning rates: {rates}.
- {size.test} held-out scenes of each kind, `--preset fast`. AUROC and Spearman are of σ². A checkpoint is what the weights
  take in float32, without the optimizer.

{table(["fine-tuned", *(title for title, _ in COLUMNS.values())], lines)}
"""
    write_text(output / "TRANSFER.md", text)
    write_json(output / "results.json", results)
    print(text)


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description="Full fine-tuning and adapters, from one kind of scenes to another.", allow_abbrev=False)
    parser.add_argument("--size", choices=SIZES, default="small", help="tiny: a check of the command [small]")
    parser.add_argument("--output", type=Path, required=True, help="folder of the runs and of the report")
    args = parser.parse_args(argv)
    output, size = args.output.resolve(), SIZES[args.size]
    check_settings(output, {"size": asdict(size), "arms": ARMS, "kinds": KINDS})
    simulate(output, size)
    source = source_model(output, size)
    results = [run_arm(output, size, source, SOURCE, 0)]
    for seed in size.seeds:
        results += [run_arm(output, size, source, title, seed) for title in ARMS]
    write_report(results, args.size, output)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
