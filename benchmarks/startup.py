"""From the start of the process to the first image on the disk: test.py beside reference.py, by turns.

    python benchmarks/startup.py                    # the full SD 2.1 architecture, random weights
    python benchmarks/startup.py --quick            # a tiny model, seconds

One image, few steps, so that it is the start that counts. Every arm runs once before the clock does: the files are in the page
cache then.
"""

import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import harness
from benchmarks.harness import REFERENCE, shown
from cdiffset.errors import run

ROWS = {  # the script, and its options
    REFERENCE: ("benchmarks/reference.py", {}),
    "test.py, fp32": ("test.py", {"precision": "fp32"}),
    "test.py, bf16": ("test.py", {"precision": "bf16"}),
}
POLL_S = 0.005


def first_image(command: list[str], image: Path, device: str, log: Path) -> dict[str, float]:
    """Run a command that writes an image => seconds until the image was there and until the process had ended."""
    image.unlink(missing_ok=True)
    started, there = time.perf_counter(), None
    for _ in harness.watched(command, log, device, POLL_S):
        if there is None and image.is_file():
            there = time.perf_counter() - started
    ended = time.perf_counter() - started
    return {"first_image_s": ended if there is None else there, "end_s": ended}


def main(argv: list[str] | None = None) -> int:
    parser = harness.make_parser("Compare the time to the first image with a plain reference's.", ROWS, ROWS)
    parser.add_argument("--size", type=int, help="px [256; quick: 64]")
    parser.add_argument("--steps", type=int, default=2, help="DDIM steps [2]")
    args = harness.parse(parser, argv, __file__)
    args.size = args.size or (64 if args.quick else 256)
    arms = harness.chosen(args.rows, ROWS, ROWS)
    models = harness.make_models(args.models, args.architecture)
    images = harness.make_images(args.work_dir / "images", args.size, 1)

    def one(name: str, round_: int) -> dict:
        folder, (script, options) = harness.folder_of(args, name, round_), ROWS[name]
        base = "base" if name == REFERENCE else "pretrained_model_name_or_path"
        command = {
            base: models.base, "checkpoint": models.checkpoint, "sar_dir": images / "sar", "output_dir": folder / "eo",
            "num_inference_steps": args.steps, "device": args.device, **options,
        }  # fmt: skip
        shutil.rmtree(folder, ignore_errors=True)
        return first_image([script, *harness.words(command)], folder / "eo/00000.png", args.device, folder / "log.txt")

    ceiling = harness.matmul_ceiling(args.device)
    results = harness.alternate(args, arms, one, args.rounds + 1)
    results = {name: rounds[1:] for name, rounds in results.items()}  # the first one warmed up
    columns = {
        "to the first image [s]": lambda row: shown(row["first_image_s"]),
        "to the reference": lambda row: shown(harness.ratio(results[row["name"]], results[REFERENCE], "first_image_s"), "×"),
        "to the end [s]": lambda row: shown(row["end_s"]),
    }
    how = f"One image of {args.size} px, {args.steps} DDIM steps, page cache warm."
    return harness.report_arms(args, ceiling, results, how, columns)


if __name__ == "__main__":
    sys.exit(run(main))
