"""From the start of the process to the first image on the disk: test.py beside reference.py, by turns.

    python benchmarks/startup.py                    # the full SD 2.1 architecture, random weights
    python benchmarks/startup.py --quick            # a tiny model, seconds

One image, few steps, so that it is the start that counts. Every contestant runs once before the clock does: the files are in
the page cache then, and whatever a command keeps from its first run on a checkpoint is kept.
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from benchmarks import speed
from benchmarks.speed import REFERENCE, REPO, shown
from cdiffset.errors import run

ROWS = {  # the script, and test.py's options
    REFERENCE: ["benchmarks/reference.py"],
    "test.py, fp32": ["test.py", "--precision", "fp32"],
    "test.py, bf16": ["test.py", "--precision", "bf16"],
}
POLL_S = 0.005


def first_image(command: list[str], image: Path, device: str, log: Path) -> dict:
    """Run a command that writes an image => seconds until the image was there and until the process had ended."""
    image.unlink(missing_ok=True)
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "w") as words:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=words, stderr=words, cwd=REPO, env=speed.environment(device))
        there = None
        while process.poll() is None:
            if there is None and image.is_file():
                there = time.perf_counter() - started
            time.sleep(POLL_S)
        ended = time.perf_counter() - started
    if process.returncode or not image.is_file():
        return {"failed": f"exit code {process.returncode}: {speed.last_words(log)}; see {os.path.relpath(log)}"}
    return {"first_image_s": ended if there is None else there, "end_s": ended}


def compare_startup(args: argparse.Namespace) -> int:
    models = speed.make_models(args.models, "tiny" if args.quick else "full")
    images = speed.make_images(args.work_dir / "images", args.size, 1)

    def one(name: str, round_: int) -> dict:
        folder = args.models / "startup" / speed.file_name(name)
        script, *options = ROWS[name]
        base = "--base" if name == REFERENCE else "--pretrained-model-name-or-path"
        command = [
            sys.executable, str(REPO / script), base, str(models.base), "--checkpoint", str(models.checkpoint), "--sar-dir",
            str(images / "sar"), "--output-dir", str(folder / "eo"), "--num-inference-steps", str(args.steps), "--device",
            args.device, *options,
        ]  # fmt: skip
        return first_image(command, folder / "eo/00000.png", args.device, folder / f"log-{round_}.txt")

    shutil.rmtree(args.models / "startup", ignore_errors=True)
    ceiling = speed.matmul_ceiling(args.device)
    results = speed.alternate(args.rows, args.rounds + 1, one)
    results = {name: rounds[1:] for name, rounds in results.items()}  # the first one warmed up
    ratios, rows = speed.compare(results, "first_image_s"), []
    for name, rounds in results.items():
        seconds = {key: speed.in_one(rounds, key) for key in ("first_image_s", "end_s")}
        failed = [result["failed"] for result in rounds if "failed" in result]
        rows.append({"name": name, "settings": ROWS[name], "failed": failed, **seconds, "ratio": ratios.get(name)})
    cells = [
        [
            r["name"],
            shown(r["first_image_s"]) if not r["failed"] else r["failed"][-1],
            shown(r["ratio"], "×"),
            shown(r["end_s"]),
        ]
        for r in rows
    ]
    text = speed.table(["start-up", "to the first image [s]", "to the reference", "to the end [s]"], cells)
    how = f"One image of {args.size} px, {args.steps} DDIM steps, page cache warm."
    record = speed.header("startup", args, ceiling) | {"settings": {"size": args.size, "steps": args.steps}, "rows": rows}
    speed.report(record, f"{how}\n\n{text}", args)
    return 1 if any(row["failed"] for row in rows) else 0


def main(argv: list[str] | None = None) -> int:
    parser = speed.make_parser("Compare the time to the first image with a plain reference's.")
    parser.add_argument("--rows", nargs="+", help=f"contestants, or all [all]: {'; '.join(ROWS)}")
    parser.add_argument("--size", type=int, help="px [256; quick: 64]")
    parser.add_argument("--steps", type=int, default=2, help="DDIM steps [2]")
    args = speed.parse(parser, argv)
    args.size = args.size or (64 if args.quick else 256)
    args.rows = speed.chosen(parser, args.rows, ROWS, ROWS)
    return compare_startup(args)


if __name__ == "__main__":
    sys.exit(run(main))
