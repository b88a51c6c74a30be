"""Write a checkpoint as a diffusers pipeline: python export.py --checkpoint work_dir/run/best --output folder

The folder holds all components, the noise schedule, pipeline.py (this project's own code for translation, which needs nothing
else of it), the calibration and a model card. It loads anywhere, also from the Hugging Face Hub after --push OWNER/NAME:

    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
    out = pipe(sar_image)  # out.images, out.variance, out.confidence, out.expected_error

test.py --checkpoint folder takes it as well, without running its code.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cdiffset.calibration.calibration import Calibration, path_beside, save
from cdiffset.calibration.calibration import load as load_calibration
from cdiffset.errors import Parser, UserError, run
from cdiffset.images import hidden_beside, list_images, read_sar, require_writable, write_png, write_text
from cdiffset.inference.options import PRESETS, MachineSettings, ModelSettings, add_model_options, model_settings
from cdiffset.inference.variance_readout import VARIANCE_READOUTS
from cdiffset.pages import render_page
from results.table import read_reports, render

MOST_EXAMPLES, EXAMPLE_PIXELS = 4, 1024**2
LOCAL = ("work_dir", "train_feeder_args", "test_feeder_args", "latent_cache", "accelerator_path", "resume")


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(description="Write a checkpoint as a diffusers pipeline folder.", allow_abbrev=False)
    group = parser.add_argument_group("files")
    group.add_argument("--output", type=Path, required=True, help="the folder to write; it must not exist")
    group.add_argument("--calibration", type=Path, help="JSON file of calibrate.py [the one beside the checkpoint, if any]")
    group.add_argument("--report", type=Path, help="report.json of evaluate.py, for the model card")
    group.add_argument("--examples", type=Path, help=f"folder of SAR images, {MOST_EXAMPLES} of which the model card shows")
    group.add_argument("--push", metavar="OWNER/NAME", help="upload it to the Hugging Face Hub as well")
    group.add_argument(
        "--merge", action="store_true", help="write a checkpoint of the U-Net alone, with adapters merged into it"
    )
    group.add_argument("--private", action="store_true", help="for --push: create a private repository")
    add_model_options(parser)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    check(args)
    model = model_settings(args)
    if args.merge:
        write_whole(args.output, lambda building: write_merged(building, model))
        print(f"{args.output}: a checkpoint of a plain U-Net")
        return 0
    reports = read_report(args.report) if args.report else {}
    examples = chosen_examples(args.examples) if args.examples else []
    pipeline, checkpoint, calibration = load_pipeline(model, args.calibration)
    meta = published(exported_meta(model, checkpoint.meta))

    def write(building: Path) -> None:
        write_folder(building, pipeline, checkpoint.prompt_embedding, meta, calibration)
        write_examples(building, pipeline, examples)
        name = args.push or args.output.name
        card = model_card(name, model, meta, pipeline, calibration, reports, len(examples))
        write_text(building / "README.md", card)

    write_whole(args.output, write)
    print(f"{args.output}: a diffusers pipeline" + (", calibrated" if calibration else ", without a calibration"))
    if args.push:
        push(args.output, args.push, args.private)
    return 0


def check(args: argparse.Namespace) -> None:
    if args.output.exists():
        raise UserError(f"--output: {args.output} exists: remove it, or choose another folder")
    alone = {name: getattr(args, name) for name in ("calibration", "report", "examples", "push")}
    if args.merge and (given := [f"--{name}" for name, value in alone.items() if value]):
        raise UserError(f"--merge: it writes the U-Net alone, leave out {', '.join(given)}")
    if args.private and not args.push:
        raise UserError("--private: it goes with --push OWNER/NAME, found none")
    if args.push and args.push.count("/") != 1:
        raise UserError(f"--push: expected OWNER/NAME, found {args.push!r}")
    require_writable("--output", args.output.parent)


def read_report(file: Path) -> dict:
    try:
        return read_reports([f"this model={file}"])
    except UserError as error:
        raise UserError(f"--report: {error}") from error


def chosen_examples(folder: Path) -> list[np.ndarray]:
    """Evenly chosen SAR images, float32 [H, W, 3] in 0-255. UserError where there are none, or one is too large."""
    if not folder.is_dir():
        raise UserError(f"--examples: expected a folder of images, found {folder}")
    try:
        names = list_images(folder)
        return [read_sar(folder / name, EXAMPLE_PIXELS) for name in names[:: -(-len(names) // MOST_EXAMPLES)]]
    except UserError as error:
        raise UserError(f"--examples: {error}") from error


def write_whole(output: Path, write: Callable[[Path], None]) -> None:
    """Have `write` fill a hidden folder, which then takes the name `output`; nothing is left where it fails."""
    from safetensors import SafetensorError  # what a full disk is to it

    building = hidden_beside(output, "building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        write(building)
        building.rename(output)
    except (OSError, SafetensorError) as error:
        raise UserError(f"--output: cannot write {output}: {str(error).splitlines()[0]}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


# ------------------------------------------------------------------------------------------------------------ the folder
def load_pipeline(model: ModelSettings, given: Path | None) -> tuple:
    """=> (CDiffSETPipeline, the LoadedCheckpoint in it, calibration or None)."""
    from cdiffset.inference.translator import load_checkpoint
    from cdiffset.model import load_text_models
    from cdiffset.pipeline import CDiffSETPipeline

    path = given or path_beside(model.checkpoint)
    calibration = load_calibration(path) if given or path.is_file() else None
    machine = MachineSettings(device="cpu", precision="fp32", batch_size=1, compile=False, max_pixels=0)
    loaded = load_checkpoint(model, machine, with_fingerprint=calibration is not None)
    if calibration and calibration.model != loaded.fingerprint:
        other = f"{path} was made for another checkpoint, base model or prompt"
        raise UserError(f"--calibration: {other}: give one that calibrate.py makes with the same options")
    tokenizer, text_encoder = load_text_models(model.base)
    pipeline = CDiffSETPipeline(
        loaded.vae, text_encoder, tokenizer, loaded.unet, loaded.scheduler, model.prompt,
        presets={name: sampling._asdict() for name, (sampling, _) in PRESETS.items()},
        readouts={name: {"timesteps": list(timesteps)} for name, (timesteps, _) in VARIANCE_READOUTS.items()},
        calibration=calibration and {
            "settings": calibration.settings, "quantiles": calibration.quantiles, **calibration.applied()
        },
    )  # fmt: skip
    return pipeline, loaded, calibration


def exported_meta(model: ModelSettings, recorded: dict) -> dict:
    """checkpoint.json of what is written: as it was recorded, with the settings of now."""
    config = {**recorded.get("config", {}), "prompt": model.prompt, "prediction_type": model.prediction_type}
    return {**recorded, "config": {**config, "pretrained_model_name_or_path": model.base}}


def published(meta: dict) -> dict:
    """The same without folders of this machine; a local base is called by its folder's name."""
    config = {name: value for name, value in meta["config"].items() if name not in LOCAL}
    base = config["pretrained_model_name_or_path"]
    config["pretrained_model_name_or_path"] = Path(base).name if Path(base).expanduser().is_dir() else base
    return {**meta, "base_folder": None, "config": config}


def write_merged(folder: Path, model: ModelSettings) -> None:
    """unet/ in diffusers' layout and checkpoint.json: a checkpoint, of which training could start, without adapters."""
    from cdiffset.checkpoint import META, read_meta
    from cdiffset.model import load_unet, load_vae

    unet, _ = load_unet(str(model.checkpoint), model.base, load_vae(model.base).config.latent_channels, "--checkpoint")
    unet.save_pretrained(folder / "unet")
    write_text(folder / META, json.dumps(exported_meta(model, read_meta(model.checkpoint)), indent=2) + "\n")


def write_folder(folder: Path, pipeline, prompt_embedding, meta: dict, calibration: Calibration | None) -> None:
    from safetensors.torch import save_file

    from cdiffset import pipeline as code
    from cdiffset.checkpoint import META, PROMPT_FILE, PROMPT_TENSOR

    for component in (pipeline.vae, pipeline.unet, pipeline.scheduler):
        component.register_to_config(_name_or_path="")  # a folder of this machine, as a rule
    pipeline.save_pretrained(folder)
    shutil.copyfile(code.__file__, folder / "pipeline.py")
    save_file({PROMPT_TENSOR: prompt_embedding.contiguous()}, folder / PROMPT_FILE)  # for test.py: a part of the fingerprint
    write_text(folder / META, json.dumps(meta, indent=2) + "\n")
    if calibration:
        save(folder / "calibration.json", calibration)


def write_examples(folder: Path, pipeline, images: list[np.ndarray]) -> None:
    """A picture for each image: SAR, EO, confidence and expected error; with the calibrated settings, else by preset fast."""
    from cdiffset.calibration.error_pictures import ERROR_VIEW_MAX, colours
    from cdiffset.images import to_tensor
    from utils import panel

    settings = pipeline.config.calibration.get("settings", {"preset": "fast"})
    for number, sar in enumerate(images):
        out = pipeline(sar / 255, **settings)
        pictures = {"SAR": sar, "EO, translated": np.asarray(out.images[0])}
        if out.confidence:
            pictures["confidence"] = np.asarray(out.confidence[0].convert("RGB"))
        if out.expected_error:
            pictures[f"error, 0 to {ERROR_VIEW_MAX}"] = colours(out.expected_error[0])
        write_png(folder / example_name(number), panel([to_tensor(each) for each in pictures.values()], list(pictures)))


def example_name(number: int) -> str:
    return f"examples/{number + 1}.png"


# -------------------------------------------------------------------------------------------------------------- the card
def model_card(
    name: str, model: ModelSettings, meta: dict, pipeline, calibration: Calibration | None, reports: dict, examples: int
) -> str:
    """README.md of the folder, Markdown with the header that the Hub reads."""
    from calibrate import table

    unet = pipeline.unet.config
    return render_page(
        "model_card.md.jinja", name=name, base=meta["config"]["pretrained_model_name_or_path"], facts=facts_of(model, meta),
        has_variance=2 * unet.out_channels > unet.in_channels, calibration=calibration,
        calibration_table=calibration and table(calibration), examples=[example_name(number) for number in range(examples)],
        measured=render(reports).partition("\n\n")[2].replace("\n## ", "\n### ").strip() if reports else None,
    )  # fmt: skip


def facts_of(model: ModelSettings, meta: dict) -> dict[str, object]:
    """What the checkpoint records of its training; of weights of another origin little."""
    config, data, best = meta["config"], meta.get("data") or {}, meta.get("best") or {}
    facts = {
        "weights": model.source or model.checkpoint.name, "base": config["pretrained_model_name_or_path"],
        "prompt": repr(model.prompt),
        "prediction type": model.prediction_type, "trained from": meta.get("started_from"), "dataset": config.get("feeder"),
        "training pairs": data.get("pairs"), "SHA-256 of their list": data.get("sha256"), "GSD [m]": meta.get("gsd_m"),
        "iterations": meta.get("iteration"), "batch size": config.get("batch_size"),
        "learning rate": config.get("learning_rate"),
        "β of the loss": config.get("beta") if config.get("confidence") else None, "EMA": config.get("ema_decay"),
        "mixed precision": config.get("mixed_precision"), "seed": config.get("seed"),
        "rank of the adapters": config.get("lora_rank"), "layers with adapters": config.get("lora_targets"),
        **{f"{metric} in validation": f"{value:.4g}" for metric, value in best.items()},
    }  # fmt: skip
    return {name: value for name, value in facts.items() if value is not None}


# ------------------------------------------------------------------------------------------------------------------- push
def push(folder: Path, name: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api, written = HfApi(), f"--push: {folder} is written, but"
    try:
        api.create_repo(name, private=private, exist_ok=True)
        there = api.repo_info(name)
        if private and not there.private:
            raise UserError(f"{written} {name} is public already: choose another name, or make it private on its page")
        own = {file.relative_to(folder).as_posix() for file in folder.rglob("*")} | {".gitattributes"}
        if others := sorted({sibling.rfilename for sibling in there.siblings or ()} - own):
            raise UserError(f"{written} {name} holds other files ({others[0]}): remove them, or choose another name")
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Add a C-DiffSET pipeline")
    except UserError:
        raise
    except Exception as error:  # no network, no login, no rights: the libraries raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{written} could not be uploaded as {name} ({reason})") from error
    print(f"https://huggingface.co/{name}")


if __name__ == "__main__":
    sys.exit(run(main))
