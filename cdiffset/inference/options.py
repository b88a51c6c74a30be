"""The options that several commands share: model, sampling, machine. No heavy import, so that --help is quick."""

import argparse
import math
from pathlib import Path
from typing import NamedTuple

from cdiffset.config import DEFAULT_BASE, DEFAULT_PROMPT, PREDICTION_TYPES
from cdiffset.errors import UserError
from cdiffset.images import MAX_PIXELS
from cdiffset.inference.variance_readout import VARIANCE_READOUTS

MAX_SEED = 2**63 - 1
SCHEDULERS = ("ddim", "dpmsolver++", "unipc")
TIMESTEP_SPACINGS = ("leading", "trailing")
ENSEMBLE_OUTPUTS = ("first", "mean", "median")
MAX_FEW_STEPS = 50  # but by DDIM with leading spacing: the others' timesteps may leave their range from 61 steps on


class Sampling(NamedTuple):
    """What the result of sampling depends on, besides the noise."""

    scheduler: str
    timestep_spacing: str
    num_inference_steps: int


PAPER = Sampling("ddim", "leading", 50)
PRESETS = {  # chosen by benchmarks/STEPS.md
    "paper": (PAPER, "as published"),
    "balanced": (Sampling("ddim", "trailing", 20), "2.5 times as fast, 1.6 % less fine detail"),
    "fast": (Sampling("ddim", "trailing", 8), "6 times as fast, 5.5 % less fine detail"),
}


def add_translation_options(parser: argparse.ArgumentParser) -> None:
    add_model_options(parser)
    group = parser.add_argument_group("sampling")
    settings = "; ".join(f"{name}: {' '.join(map(str, each))}, {cost}" for name, (each, cost) in PRESETS.items())
    group.add_argument(
        "--preset", choices=PRESETS, default="paper", help=f"of the next three options [paper]. {settings}".replace("%", "%%")
    )
    group.add_argument("--scheduler", choices=SCHEDULERS, help="what steps from noise to image; of scenes ddim [the preset's]")
    group.add_argument("--timestep-spacing", choices=TIMESTEP_SPACINGS, help="trailing starts from pure noise [the preset's]")
    group.add_argument("--num-inference-steps", type=int, help=f"1 to {MAX_FEW_STEPS}, ddim leading up to 999 [the preset's]")
    meanings = "; ".join(f"{name}: {meaning}" for name, (_, meaning) in VARIANCE_READOUTS.items())
    group.add_argument("--readout", choices=VARIANCE_READOUTS, help=f"where the variance is read [midpoint]. {meanings}")
    group.add_argument(
        "--ensemble", type=int, default=1, metavar="N", help="samples per image, of seeds SEED ... SEED + N - 1 [1]"
    )
    group.add_argument("--ensemble-output", choices=ENSEMBLE_OUTPUTS, help="which EO image N samples give [first]")
    add_machine_options(parser)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", required=True, help="U-Net: .safetensors file, diffusers folder or checkpoint folder")
    group.add_argument("--pretrained-model-name-or-path", help=f"base model [the checkpoint's own, else {DEFAULT_BASE}]")
    group.add_argument("--prompt", help=f"text prompt [the checkpoint's own, else {DEFAULT_PROMPT!r}]")
    group.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, help="what the U-Net predicts [the checkpoint's own, else epsilon]"
    )


def add_machine_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("machine")
    group.add_argument("--seed", type=int, default=0, help="fixes the noise, together with the image's content [0]")
    group.add_argument(
        "--batch-size", type=batch_size, default=1, metavar="N", help="images of one size computed together, or auto: by their "
        "size and, on GPUs, the free memory [1]"
    )  # fmt: skip
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the networks [fp32]")
    group.add_argument("--compile", action="store_true", help="compile the U-Net: minutes for each image size, then faster")
    group.add_argument("--max-pixels", type=int, default=MAX_PIXELS, help=f"skip images that claim more [{MAX_PIXELS}]")
    group.add_argument("--device", help="e.g. cuda, cuda:1, mps, cpu [cuda if there is one, of several processes each its own]")


def batch_size(text: str) -> int | str:
    return text if text == "auto" else int(text)


def add_eo_range(group) -> None:
    group.add_argument(
        "--eo-range", type=value_range, metavar="LOW,HIGH", help="what black and white are in the true EO, e.g. 0,1 or -1,1, "
        "where its files are deeper than 8 bits; it is not stretched, and alpha 0, nodata and NaN do not count"
    )  # fmt: skip


def value_range(text: str) -> tuple[float, float]:
    """LOW,HIGH, two finite numbers that rise."""
    try:
        low, high = map(float, text.split(","))
    except ValueError:
        low = high = 0.0
    if not 0 < high - low < math.inf:
        raise argparse.ArgumentTypeError(f"expected LOW,HIGH with LOW below HIGH, e.g. 0,1 or -1,1, found {text!r}")
    return low, high


def check_translation_options(args: argparse.Namespace) -> None:
    resolve_sampling(args)
    if args.ensemble_output is not None and args.ensemble == 1:
        raise UserError(
            f"--ensemble-output {args.ensemble_output}: it chooses among samples, expected --ensemble of at least 2"
        )
    args.readout, args.ensemble_output = args.readout or "midpoint", args.ensemble_output or "first"
    check_limits(args, {"num_inference_steps": (1, 999), "ensemble": (1, None)})
    sampling = sampling_of(args)
    if sampling[:2] != PAPER[:2] and sampling.num_inference_steps > MAX_FEW_STEPS:
        raise UserError(
            f"--num-inference-steps: expected at most {MAX_FEW_STEPS} with {sampling.scheduler} {sampling.timestep_spacing}, "
            f"found {sampling.num_inference_steps}; more are for {PAPER.scheduler} {PAPER.timestep_spacing}"
        )
    check_model_options(args)


def resolve_sampling(args: argparse.Namespace) -> None:
    """Fill in from the preset what the command line leaves open."""
    for name, value in PRESETS[args.preset][0]._asdict().items():
        if getattr(args, name) is None:
            setattr(args, name, value)


def sampling_of(args: argparse.Namespace) -> Sampling:
    return Sampling(*(getattr(args, name) for name in Sampling._fields))


def check_model_options(args: argparse.Namespace) -> None:
    batch_size = {} if args.batch_size == "auto" else {"batch_size": (1, None)}
    check_limits(args, {**batch_size, "seed": (0, MAX_SEED), "max_pixels": (1, None)})
    from cdiffset.checkpoint import find_weights

    find_weights(Path(args.checkpoint).expanduser(), "--checkpoint")  # before the base model, which may be far away


class ModelSettings(NamedTuple):
    """What the model options come to: the command line's, else the checkpoint's own, else the defaults."""

    base: str
    prompt: str
    prediction_type: str


def model_settings(args: argparse.Namespace) -> ModelSettings:
    from cdiffset.checkpoint import read_meta, recorded_base

    trained = read_meta(args.checkpoint).get("config", {})
    base = args.pretrained_model_name_or_path or recorded_base(args.checkpoint) or DEFAULT_BASE
    prompt = next(text for text in (args.prompt, trained.get("prompt"), DEFAULT_PROMPT) if text is not None)
    return ModelSettings(base, prompt, args.prediction_type or trained.get("prediction_type") or "epsilon")


def recorded_settings(args: argparse.Namespace) -> dict:
    """The model and machine options that change what is computed, for the record in an output folder."""
    from cdiffset.checkpoint import find_weights, identity

    weights = identity(find_weights(Path(args.checkpoint).expanduser(), "--checkpoint"), "--checkpoint")
    settings = model_settings(args)
    if (folder := Path(settings.base).expanduser()).is_dir():  # however it is written
        settings = settings._replace(base=str(folder.resolve()))
    return {"weights": weights, **settings._asdict(), "seed": args.seed, "precision": args.precision}


def begin_reading(args: argparse.Namespace, with_fingerprint: bool = False):
    """Have threads read the checkpoint's weights as translator.Model wants them => checkpoint.Weights.

    To be called before that module is imported: its libraries take as long.
    """
    from cdiffset.checkpoint import Weights
    from cdiffset.device import AS_STORED, form_of, keep_freed_memory

    form = form_of(args)
    keep_freed_memory(form.device)
    return Weights(args.checkpoint, "--checkpoint", AS_STORED if with_fingerprint else form)


def check_limits(args: argparse.Namespace, limits: dict[str, tuple]) -> None:
    """UserError where an option is outside of its (least, greatest) value; None: no limit."""
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if not value >= low or (high is not None and value > high):
            allowed = f"at least {low}" + (f" and at most {high}" if high is not None else "")
            raise UserError(f"--{name.replace('_', '-')}: expected {allowed}, found {value}")


def calibrated_settings(args: argparse.Namespace) -> dict:
    """The settings that a calibration holds for: with others, the same σ² means another error."""
    return {
        "readout": args.readout,
        **sampling_of(args)._asdict(),
        "ensemble": args.ensemble,
        "ensemble_output": args.ensemble_output,
    }
