"""Do long runs leak? Trains and translates for thousands of steps and watches memory and open files from outside.

    python benchmarks/soak.py [--iterations 2000] [--tiles 2000]

prints, per run, the resident memory and the number of open files of the process over its course, and exits with 1 where
either grows after the warm-up, the first quarter. The base is the demo's small one, so that what it needs does not hide what
leaks.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

REPO = Path(__file__).resolve().parents[1]
BASE = str(REPO / "assets" / "demo_base")
MEMORY_TOLERANCE = 0.02  # of the memory after the warm-up
FILES_TOLERANCE = 2  # the loader's come and go
SAMPLES = 12


def watch(argv: list[str], progress, total: int) -> list[tuple[int, float, int]]:
    """Run a command => (step, resident MiB, open files), sampled whenever another SAMPLES-th of the steps is done."""
    words = tempfile.TemporaryFile("w+")  # noqa: SIM115  read after the end
    process = subprocess.Popen([sys.executable, *argv], stdout=words, stderr=words)
    samples, due = [], total // SAMPLES
    while process.poll() is None:
        if (step := progress()) >= due:
            status = Path(f"/proc/{process.pid}/status").read_text()
            samples.append(
                (step, int(re.search(r"VmRSS:\s+(\d+)", status)[1]) / 1024, len(os.listdir(f"/proc/{process.pid}/fd")))
            )
            due += total // SAMPLES
        time.sleep(0.05)
    if process.returncode:
        words.seek(0)
        sys.exit(f"{argv[0]} ended with {process.returncode}: {words.read()[-2000:]}")
    return samples


def judge(name: str, samples: list[tuple[int, float, int]]) -> bool:
    """Print the table of a run => whether it is flat after the warm-up."""
    print(f"\n{name}\n| step | resident memory [MiB] | open files |\n|---|---|---|")
    for step, memory, files in samples:
        print(f"| {step} | {memory:.1f} | {files} |")
    first, second = np.array_split(np.array(samples)[len(samples) // 4 :], 2)
    grown = second[:, 1].max() / first[:, 1].max() - 1
    # A sample may fall into a save or a validation, which opens some files for a moment: hence the fewest.
    opened = second[:, 2].min() - first[:, 2].min()
    print(f"\nafter the warm-up, second half against first: the most memory {grown:+.2%}, the fewest files {opened:+g}")
    return grown <= MEMORY_TOLERANCE and opened <= FILES_TOLERANCE


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--iterations", type=int, default=2000, help="training iterations [2000]")
    parser.add_argument("--tiles", type=int, default=2000, help="images to translate [2000]")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        rng = np.random.default_rng(0)
        for kind, count in (("sar", args.tiles), ("eo", 16)):
            (root / kind).mkdir()
            for index in range(count):
                Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(root / kind / f"{index}.png")
        (root / "few").mkdir()
        for index in range(16):
            (root / "few" / f"{index}.png").symlink_to(root / "sar" / f"{index}.png")
        feeder = f"{{sar_dir: {root}/few, eo_dir: {root}/eo, crop_size: 32, split: %s}}"
        train = "train, hflip: true, vflip: true, rot: true"
        log = root / "run" / "train_log.txt"
        training = watch(
            [
                str(REPO / "main.py"), "--work-dir", str(root / "run"), "--pretrained-model-name-or-path", BASE, "--feeder",
                "feeders.feeder.PairedFolderFeeder", "--train-feeder-args", feeder % train, "--test-feeder-args",
                feeder % "test", "--num-iter", str(args.iterations), "--batch-size", "4", "--log-iter", "10", "--num-worker",
                "1", "--save-iter", str(args.iterations // 20), "--eval-epoch", str(args.iterations // 80), "--val-len", "4",
                "--num-inference-steps", "2", "--lpips", "false", "--ema-decay", "0.99",
            ],
            lambda: int((re.findall(r"iteration (\d+)/", log.read_text()) or [0])[-1]) if log.is_file() else 0,
            args.iterations,
        )  # fmt: skip
        translation = watch(
            [
                str(REPO / "test.py"), "--sar-dir", str(root / "sar"), "--output-dir", str(root / "out"), "--conf-dir",
                str(root / "conf"), "--variance-dir", str(root / "variance"), "--checkpoint", str(root / "run" / "latest"),
                "--num-inference-steps", "2",
            ],
            lambda: len(os.listdir(root / "out")) if (root / "out").is_dir() else 0,
            args.tiles,
        )  # fmt: skip
        flat = [judge("main.py, training", training), judge("test.py, translation", translation)]
    return 0 if all(flat) else 1


if __name__ == "__main__":
    sys.exit(main())
