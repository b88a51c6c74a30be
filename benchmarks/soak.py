"""Do long runs leak? Trains and translates for thousands of steps and watches memory and open files from outside.

    python benchmarks/soak.py [--iterations 2000] [--tiles 2000]

prints, per run, the resident memory and the number of open files of the process over its course, and exits with 1 where
either grows after the warm-up, the first quarter. The base is the demo's small one, so that what it needs does not hide what
leaks.
"""

import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks.harness import SIMULATED_BASE, memory_mib, table, watched, words
from cdiffset.errors import Parser, run

MEMORY_TOLERANCE = 0.02  # of the memory after the warm-up
FILES_TOLERANCE = 2  # the loader's come and go
SAMPLES = 12


def is_flat(command: list[str], log: Path, progress: Callable[[], int], total: int) -> bool:
    """Run a command and print its memory and files by step => whether both are flat after the warm-up."""
    samples, due = [], total // SAMPLES
    for pid in watched(command, log, pause_s=0.05):
        if (step := progress()) >= due and (memory := memory_mib("VmRSS", pid)):
            samples.append((step, memory, len(os.listdir(f"/proc/{pid}/fd"))))
            due += total // SAMPLES
    rows = [[step, f"{memory:.1f}", files] for step, memory, files in samples]
    print(f"\n{command[0]}\n{table(['step', 'resident memory [MiB]', 'open files'], rows)}")
    first, second = np.array_split(np.array(samples)[len(samples) // 4 :], 2)
    grown = second[:, 1].max() / first[:, 1].max() - 1
    # A sample may fall into a save or a validation, which opens some files for a moment: hence the fewest.
    opened = second[:, 2].min() - first[:, 2].min()
    print(f"\nafter the warm-up, second half against first: the most memory {grown:+.2%}, the fewest files {opened:+g}")
    return grown <= MEMORY_TOLERANCE and opened <= FILES_TOLERANCE


def make_images(root: Path, tiles: int) -> None:
    """Noise: `tiles` images in sar/, 16 of them in few/ with an EO for each in eo/."""
    rng = np.random.default_rng(0)
    for kind, count in (("sar", tiles), ("few", 16), ("eo", 16)):
        (root / kind).mkdir()
        for index in range(count):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / kind / f"{index}.png")


def main(argv: list[str] | None = None) -> int:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2000, help="training iterations, at least 160 [2000]")
    parser.add_argument("--tiles", type=int, default=2000, help="images to translate, at least 60 [2000]")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        make_images(root, args.tiles)
        feeder = {"sar_dir": f"{root}/few", "eo_dir": f"{root}/eo", "crop_size": 32}
        augmentations = {"hflip": True, "vflip": True, "rot": True}
        training = {
            "work_dir": root / "run", "pretrained_model_name_or_path": SIMULATED_BASE,
            "feeder": "feeders.feeder.PairedFolderFeeder", "test_feeder_args": {**feeder, "split": "test"},
            "train_feeder_args": {**feeder, **augmentations, "split": "train"}, "num_iter": args.iterations, "batch_size": 4,
            "log_iter": 10, "num_worker": 1, "save_iter": args.iterations // 20, "eval_epoch": args.iterations // 80,
            "val_len": 4, "num_inference_steps": 2, "lpips": False, "ema_decay": 0.99,
        }  # fmt: skip
        translation = {
            "sar_dir": root / "sar", "output_dir": root / "out", "conf_dir": root / "conf", "variance_dir": root / "variance",
            "checkpoint": root / "run/latest", "num_inference_steps": 2,
        }  # fmt: skip
        log, out = root / "run/train_log.txt", root / "out"

        def iteration() -> int:
            return int((re.findall(r"iteration (\d+)/", log.read_text()) or [0])[-1]) if log.is_file() else 0

        def translated() -> int:
            return len(os.listdir(out)) if out.is_dir() else 0

        flat = [
            is_flat(["main.py", *words(training)], root / "training.txt", iteration, args.iterations),
            is_flat(["test.py", *words(translation)], root / "translation.txt", translated, args.tiles),
        ]
    return 0 if all(flat) else 1


if __name__ == "__main__":
    sys.exit(run(main))
