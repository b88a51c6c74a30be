"""Translation speed: test.py beside the plain loop of reference.py, by turns.

    python benchmarks/translate.py                  # the full SD 2.1 architecture, random weights: the headline rows
    python benchmarks/translate.py --rows all
    python benchmarks/translate.py --quick          # a tiny model, seconds

Speed is that from the loaded model to the last file written; where there is more than one batch, from the first batch written
to the last, so that what is done once (compiling, say) does not count. PSNR is against the reference's files, at equal steps.
"""

import argparse
import math
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np

from benchmarks import speed
from benchmarks.speed import REFERENCE, Parts, shown
from cdiffset.errors import run

ROWS = {  # test.py's options
    REFERENCE: [],
    "paper, fp32": ["--precision", "fp32"],
    "fast, fp32": ["--preset", "fast", "--precision", "fp32"],
    "paper, bf16": ["--precision", "bf16"],
    "balanced, bf16": ["--preset", "balanced", "--precision", "bf16"],
    "fast, bf16": ["--preset", "fast", "--precision", "bf16"],
}
AT_OTHER_STEPS = ("fast, fp32", "balanced, bf16", "fast, bf16")  # whose files are not to be compared with the reference's
HEADLINE = (REFERENCE, "paper, bf16", "fast, bf16")


# ----------------------------------------------------------------------------------------------------------- one contestant
def measure(job: dict) -> dict:
    """Translate a folder => images/s, parts per image, U-Net passes per image, peak memory, seconds to the first image."""
    parts, passes, loaded, written = Parts(job["device"]), [], [], []

    def model_is_loaded(vae) -> None:
        parts.watch(vae.encoder, "VAE encode")
        parts.watch(vae.decoder, "VAE decode")
        loaded.append(time.perf_counter())

    run = run_reference if job["name"] == REFERENCE else run_project
    run(job, parts, model_is_loaded, lambda *_: written.append(time.perf_counter()), passes.append)
    images, batch = len(written), 1 if job["name"] == REFERENCE else job["batch_size"]
    if images != job["images"]:
        raise RuntimeError(f"{images} images were written, expected {job['images']}")
    return {
        "images_per_s": images_per_second(loaded[0], written, batch),
        "unet_passes_per_image": sum(passes) / images,
        "parts": {name: seconds / images for name, seconds in parts.seconds().items()},
        **{f"peak_{where}_gib": value for where, value in speed.peak_memory(job["device"]).items()},
    }


def images_per_second(loaded: float, written: list[float], batch: int) -> float:
    """Points in time when the model was loaded and each file written, batch by batch => the speed once it runs."""
    if len(written) > batch:
        return (len(written) - batch) / (written[-1] - written[batch - 1])
    return len(written) / (written[-1] - loaded)


def run_reference(job: dict, parts: Parts, model_is_loaded, image_is_written, unet_has_run) -> None:
    from benchmarks import reference

    models = reference.load_models(job["base"], job["device"], job["checkpoint"])
    parts.watch_function(reference.read_image, "load")
    parts.watch_function(reference.write_image, "write", done=image_is_written)
    parts.watch(models.unet, "U-Net forward")
    models.unet.register_forward_hook(lambda _, inputs, __: unet_has_run(len(inputs[0])))
    model_is_loaded(models.vae)
    reference.translate_folder(models, Path(job["sar_dir"]), Path(job["output_dir"]), 50)


def run_project(job: dict, parts: Parts, model_is_loaded, image_is_written, unet_has_run) -> None:
    import test
    from cdiffset.diffusion import predict
    from cdiffset.images import read_sar_valid, write_png
    from cdiffset.inference.translator import Translator

    parts.watch_function(read_sar_valid, "load")
    parts.watch_function(write_png, "write", done=image_is_written)
    # Not by a hook, which a compiled network would not have.
    parts.watch_function(predict, "U-Net forward", job["device"], lambda unet, z_sar, *_: unet_has_run(len(z_sar)))
    load = Translator.__init__

    def timed(translator, *args, **options) -> None:
        load(translator, *args, **options)
        model_is_loaded(translator.vae)

    Translator.__init__ = timed
    code = test.main(
        [
            "--sar-dir", job["sar_dir"], "--output-dir", job["output_dir"], "--checkpoint", job["checkpoint"],
            "--pretrained-model-name-or-path", job["base"], "--device", job["device"], "--batch-size", str(job["batch_size"]),
            *job["settings"],
        ]
    )  # fmt: skip
    if code:
        raise RuntimeError(f"test.py ended with {code}")


# ----------------------------------------------------------------------------------------------------------------- all of them
def psnr(folder: Path, truth: Path) -> float:
    """Of the 8-bit files that both folders have, over all their pixels together, dB; 130 where they are the same."""
    from PIL import Image

    pairs = [(folder / path.name, path) for path in sorted(truth.glob("*.png")) if (folder / path.name).is_file()]
    if not pairs:
        return math.nan
    images = [[np.asarray(Image.open(path), np.float64) for path in pair] for pair in pairs]
    error = np.mean([np.mean((mine - theirs) ** 2) for mine, theirs in images])
    return 10 * math.log10(255**2 / max(error, 255**2 / 1e13))


def judge(results: dict[str, list[dict]], flops: dict[str, int], ceiling: dict[str, float]) -> list[dict]:
    """One record per contestant: speed, ratio to the reference's of the same round, PSNR, utilisation, parts."""
    ratios, rows = speed.compare(results, "images_per_s"), []
    for name, rounds in results.items():
        measured = [result for result in rounds if "failed" not in result]
        row = {"name": name, "settings": ROWS[name], "failed": [r["failed"] for r in rounds if "failed" in r]}
        if measured:
            passes, images_per_s = measured[0]["unet_passes_per_image"], speed.in_one(measured, "images_per_s")
            per_image = flops["encode"] + passes * flops["unet"] + flops["decode"]
            precision = "bf16" if "bf16" in ROWS[name] else "fp32"
            row |= {
                "images_per_s": images_per_s,
                "ratio": ratios.get(name),
                "psnr_db": speed.in_one(measured, "psnr_db"),
                "unet_passes_per_image": passes,
                "flop_per_image": per_image,
                "utilisation": images_per_s["median"] * per_image / ceiling[precision],
                "utilisation_of": precision,
                "parts_s": speed.parts_of(measured),
            }
            for key in ("peak_ram_gib", "peak_gpu_gib"):
                row |= {key: speed.in_one(measured, key), f"{key}_ratio": speed.compare(results, key).get(name)}
        rows.append(row)
    return rows


def tables(rows: list[dict], device: str) -> str:
    """The main table, and the time per part."""
    memory = "peak_gpu_gib" if device == "cuda" else "peak_ram_gib"
    names = list(dict.fromkeys(part for row in rows for part in row.get("parts_s", {})))
    main, parts = [], []
    for row in rows:
        if "images_per_s" not in row:
            main.append([row["name"], f"failed: {row['failed'][-1]}", *["–"] * 5])
            continue
        main.append(
            [
                row["name"], shown(row["images_per_s"]), shown(row["ratio"], "×"), f"{row['unet_passes_per_image']:g}",
                shown(row["psnr_db"], " dB"), shown(row[memory]), f"{row['utilisation']:.0%} of {row['utilisation_of']}",
            ]
        )  # fmt: skip
        parts.append([row["name"], *(f"{row['parts_s'].get(part, 0):.3g}" for part in names)])
    columns = [
        "translation", "images/s", "to the reference", "U-Net passes", "PSNR to the reference's", "peak memory [GiB]",
        "FLOP utilisation",
    ]  # fmt: skip
    return f"{speed.table(columns, main)}\n\n{speed.table(['seconds per image', *names], parts)}"


def compare_speed(args: argparse.Namespace) -> int:
    models = speed.make_models(args.models, "tiny" if args.quick else "full")
    ceiling = speed.matmul_ceiling(args.device)

    def one(name: str, round_: int) -> dict:
        count = args.reference_images if name == REFERENCE else args.images
        folder = args.models / "translate" / speed.file_name(name) / str(round_)
        job = {
            "device": args.device, "name": name, "settings": ROWS[name], "images": count, "batch_size": args.batch_size,
            "sar_dir": str(speed.make_images(args.work_dir / "images", args.size, count) / "sar"),
            "output_dir": str(folder / "eo"), "base": str(models.base), "checkpoint": str(models.checkpoint),
        }  # fmt: skip
        result = speed.run_worker(__file__, job, folder)
        if "failed" not in result and name not in (REFERENCE, *AT_OTHER_STEPS):
            result["psnr_db"] = psnr(folder / "eo", args.models / "translate" / REFERENCE / str(round_) / "eo")
        return result

    results = speed.alternate(args.rows, args.rounds, one)
    flops = speed.count_flops("tiny" if args.quick else "full", args.size)
    record = speed.header("translate", args, ceiling)
    settings = {"size": args.size, "images": args.images, "batch_size": args.batch_size}
    record |= {"settings": settings, "flop": flops, "rows": judge(results, flops, ceiling)}
    how = (
        f"{args.size} px. The reference translates {args.reference_images} images one by one, DDIM-50; "
        f"the others {args.images} in batches of {args.batch_size}."
    )
    speed.report(record, f"{how}\n\n{tables(record['rows'], args.device)}", args)
    return 1 if any(row["failed"] for row in record["rows"]) else 0


def main(argv: list[str] | None = None) -> int:
    parser = speed.make_parser("Compare translation with a plain reference loop.")
    parser.add_argument("--rows", nargs="+", help=f"contestants, or all [{'; '.join(HEADLINE)}]: {'; '.join(ROWS)}")
    parser.add_argument("--size", type=int, help="px [cpu: 256; cuda: 512; quick: 64]")
    parser.add_argument("--batch-size", type=int, help="images that test.py computes together [cpu: 2; cuda: 32]")
    parser.add_argument("--images", type=int, help="images for test.py [cpu: 2; cuda: 128]")
    parser.add_argument("--reference-images", type=int, help="images for the reference [cpu: 1; cuda: 6]")
    args = speed.parse(parser, argv)
    if args.worker:
        return speed.work(args.worker, measure)
    on_gpu = args.device == "cuda" and not args.quick
    args.size = args.size or (64 if args.quick else 512 if on_gpu else 256)
    args.batch_size = args.batch_size or (32 if on_gpu else 2)
    args.images = args.images or (128 if on_gpu else 2)
    args.reference_images = args.reference_images or (6 if on_gpu else 1)
    args.rows = speed.chosen(parser, args.rows, ROWS, HEADLINE)
    return compare_speed(args)


if __name__ == "__main__":
    sys.exit(run(main))
