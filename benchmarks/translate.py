"""Translation speed: test.py beside the plain loop of reference.py, by turns.

    python benchmarks/translate.py                  # the full SD 2.1 architecture, random weights: the headline rows
    python benchmarks/translate.py --rows all
    python benchmarks/translate.py --quick          # a tiny model, seconds

Speed is that from the first file read to the last file written; where there is more than one batch, from the first batch
written to the last, so that what is done once (compiling, say) does not count. PSNR is against the reference's files, at equal
steps.
"""

import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import numpy as np
from PIL import Image

from benchmarks import harness
from benchmarks.harness import REFERENCE, Parts, now, shown
from cdiffset.errors import run

ROWS = {  # test.py's options
    REFERENCE: {},
    "paper, fp32": {"precision": "fp32"},
    "fast, fp32": {"preset": "fast", "precision": "fp32"},
    "paper, bf16": {"precision": "bf16"},
    "balanced, bf16": {"preset": "balanced", "precision": "bf16"},
    "fast, bf16": {"preset": "fast", "precision": "bf16"},
}
HEADLINE = (REFERENCE, "paper, bf16", "fast, bf16")


# ------------------------------------------------------------------------------------------------------------------ one arm
def measure(job: dict) -> dict:
    """Translate a folder => images/s, seconds of each part per image, U-Net passes per image, peak memory."""
    from diffusers import AutoencoderKL

    parts, passes, written = Parts(job["device"]), [], []
    parts.watch(AutoencoderKL, "encode", "VAE encode")
    parts.watch(AutoencoderKL, "decode", "VAE decode")
    translate = translate_reference if job["name"] == REFERENCE else translate_project
    translate(job, parts, lambda *_: written.append(now("cpu")), lambda _, latents, *__: passes.append(len(latents)))
    started = min(before for name, before, _ in parts.spans if name == "load")
    if len(written) != job["images"]:
        raise RuntimeError(f"{len(written)} images were written, expected {job['images']}")
    return {
        "images_per_s": images_per_second(started, written, job["batch_size"]),
        "unet_passes_per_image": sum(passes) / job["images"],
        "parts": {name: seconds / job["images"] for name, seconds in parts.seconds().items()},
        **harness.peak_memory(job["device"]),
    }


def images_per_second(started: float, written: list[float], batch: int) -> float:
    """Points in time of the start and of each file written, batch by batch => the speed once it runs."""
    if len(written) > batch:
        return (len(written) - batch) / (written[-1] - written[batch - 1])
    return len(written) / (written[-1] - started)


def translate_reference(job: dict, parts: Parts, image_is_written, unet_has_run) -> None:
    from diffusers import UNet2DConditionModel

    from benchmarks import reference

    parts.watch(reference, "read_image", "load", on_cpu=True)
    parts.watch(reference, "write_image", "write", on_cpu=True, done=image_is_written)
    parts.watch(UNet2DConditionModel, "forward", "U-Net forward", done=unet_has_run)
    models = reference.load_models(job["base"], job["device"], job["checkpoint"])
    reference.translate_folder(models, Path(job["sar_dir"]), Path(job["output_dir"]), 50)


def translate_project(job: dict, parts: Parts, image_is_written, unet_has_run) -> None:
    import test
    from cdiffset import images, pipeline

    parts.watch(images, "read_sar_valid", "load", on_cpu=True)
    parts.watch(images, "write_png", "write", on_cpu=True, done=image_is_written)
    parts.watch(pipeline, "predict", "U-Net forward", done=unet_has_run)  # a compiled network's own `forward` is not called
    files = {key: job[key] for key in ("sar_dir", "output_dir", "checkpoint", "device", "batch_size")}
    if code := test.main(harness.words({**files, "pretrained_model_name_or_path": job["base"], **ROWS[job["name"]]})):
        raise RuntimeError(f"test.py ended with {code}")


# -------------------------------------------------------------------------------------------------------------- all of them
def psnr_of_files(folder: Path, truth: Path) -> float:
    """Of the 8-bit files that both folders have, over all their pixels together, dB."""
    names = sorted({path.name for path in folder.glob("*.png")} & {path.name for path in truth.glob("*.png")})
    return harness.psnr(*(np.stack([np.asarray(Image.open(each / name)) for name in names]) for each in (folder, truth)))


def main(argv: list[str] | None = None) -> int:
    parser = harness.make_parser("Compare translation with a plain reference loop.", ROWS, HEADLINE)
    parser.add_argument("--size", type=int, help="px [cpu: 256; cuda: 512; quick: 64]")
    parser.add_argument("--batch-size", type=int, help="images that test.py computes together [cpu: 2; cuda: 32]")
    parser.add_argument("--images", type=int, help="images for test.py [cpu: 2; cuda: 128]")
    parser.add_argument("--reference-images", type=int, help="images for the reference [cpu: 1; cuda: 6]")
    args = harness.parse(parser, argv, __file__)
    if args.worker:
        return harness.work(args.worker, measure)
    args.size = args.size or (64 if args.quick else 512 if args.on_gpu else 256)
    args.batch_size = args.batch_size or (32 if args.on_gpu else 2)
    args.images = args.images or (128 if args.on_gpu else 2)
    args.reference_images = args.reference_images or (6 if args.on_gpu else 1)
    arms = harness.chosen(args.rows, ROWS, HEADLINE)
    models = harness.make_models(args.models, args.architecture)
    ceiling, flops = harness.matmul_ceiling(args.device), harness.count_flops(args.architecture, args.size)

    def one(name: str, round_: int) -> dict:
        folder = harness.folder_of(args, name, round_)
        count, batch_size = (args.reference_images, 1) if name == REFERENCE else (args.images, args.batch_size)
        images = harness.make_images(args.work_dir / "images", args.size, count)
        job = {"name": name, "device": args.device, "images": count, "batch_size": batch_size, **vars(models)}
        result = harness.run_worker(__file__, {**job, "sar_dir": str(images / "sar"), "output_dir": str(folder / "eo")}, folder)
        if name.startswith("paper"):
            truth = harness.folder_of(args, REFERENCE, round_) / "eo"
            result["psnr_db"] = psnr_of_files(folder / "eo", truth) if truth.is_dir() else math.nan
        return result

    results = harness.alternate(args, arms, one, args.rounds)

    def utilisation(row: dict) -> str:
        flop = flops["encode"] + row["unet_passes_per_image"]["median"] * flops["unet"] + flops["decode"]
        return harness.utilisation(row, flop, ROWS[row["name"]].get("precision", "fp32"), ceiling)

    columns = {
        "images/s": lambda row: shown(row["images_per_s"]),
        "to the reference": lambda row: shown(harness.ratio(results[row["name"]], results[REFERENCE], "images_per_s"), "×"),
        "U-Net passes": lambda row: shown(row["unet_passes_per_image"]),
        "PSNR to the reference's": lambda row: shown(row.get("psnr_db"), " dB"),
        "peak memory [GiB]": lambda row: shown(row[args.memory]),
        "FLOP utilisation": utilisation,
    }
    how = (
        f"{args.size} px. The reference translates {args.reference_images} images one by one, DDIM-50; "
        f"the others {args.images} in batches of {args.batch_size}."
    )
    return harness.report_arms(args, ceiling, results, how, columns, "image")


if __name__ == "__main__":
    sys.exit(run(main))
