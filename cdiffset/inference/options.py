"""What several commands have in common: the options of model, sampling and machine, and the settings that come of them.

Commands turn the parsed options into these settings, checked and with nothing left open, and pass them on; nothing beyond a
command's own file sees an `argparse.Namespace`. No heavy import, so that --help is quick.
"""

import argparse
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple

from cdiffset.config import DEFAULT_BASE, DEFAULT_PROMPT, PREDICTION_TYPES, RELEASED, Config
from cdiffset.errors import UserError
from cdiffset.images import MAX_PIXELS
from cdiffset.inference.variance_readout import VARIANCE_READOUTS

MAX_SEED = 2**63 - 1
SCHEDULERS = ("ddim", "dpmsolver++", "unipc")
TIMESTEP_SPACINGS = ("leading", "trailing")
ENSEMBLE_OUTPUTS = ("first", "mean", "median")
MAX_FEW_STEPS = 50  # but by DDIM with leading spacing: the others' timesteps may leave their range from 61 steps on


class Sampling(NamedTuple):
    """What a preset decides."""

    scheduler: str
    timestep_spacing: str
    num_inference_steps: int


PAPER = Sampling("ddim", "leading", 50)
PRESETS = {  # chosen by benchmarks/STEPS.md
    "paper": (PAPER, "as published"),
    "balanced": (Sampling("ddim", "trailing", 20), "2.5 times as fast, 1.6 % less fine detail"),
    "fast": (Sampling("ddim", "trailing", 8), "6 times as fast, 5.5 % less fine detail"),
}


# ------------------------------------------------------------------------------------------------------------- settings
@dataclass(frozen=True)
class ModelSettings:
    """Which networks, and how they were trained."""

    checkpoint: Path  # of the U-Net, in any form of checkpoint.FORMS
    base: str  # Stable Diffusion: Hub name or local folder
    prompt: str
    prediction_type: str  # of PREDICTION_TYPES
    source: str | None = None  # of weights from the Hub, see hub.Found


@dataclass(frozen=True)
class SamplingSettings:
    """All that an EO image and its maps depend on besides the SAR, the model and rounding."""

    seed: int  # of the noise, together with the image's content; of the first sample where there are several
    scheduler: str  # of SCHEDULERS
    timestep_spacing: str  # of TIMESTEP_SPACINGS
    num_inference_steps: int
    readout: str  # of VARIANCE_READOUTS
    ensemble: int  # samples per image
    ensemble_output: str  # of ENSEMBLE_OUTPUTS


@dataclass(frozen=True)
class MachineSettings:
    """Where it is computed, and in which portions."""

    device: str | None  # as PyTorch names it; None: chosen by `device.choose_device`
    precision: str  # fp32, fp16 or bf16, of the networks
    batch_size: int | None  # images of one size computed together; None (auto): by their size and the free memory
    compile: bool  # the U-Net
    max_pixels: int  # images that claim more are skipped


def model_settings(args: argparse.Namespace, config: Config | None = None) -> ModelSettings:
    """What the command line says, else the checkpoint itself, else the configuration, else the defaults.

    UserError where there are no weights: before the base model, which may be far away.
    """
    from cdiffset.checkpoint import find_weights, read_meta, recorded_base
    from cdiffset.hub import find_checkpoint

    checkpoint, source = find_checkpoint(args.checkpoint, "--checkpoint")
    find_weights(checkpoint, "--checkpoint")
    recorded = read_meta(checkpoint).get("config", asdict(config) if config else {})
    base = args.pretrained_model_name_or_path or recorded_base(checkpoint) or recorded.get("pretrained_model_name_or_path")
    prompt = next(text for text in (args.prompt, recorded.get("prompt"), DEFAULT_PROMPT) if text is not None)
    prediction_type = args.prediction_type or recorded.get("prediction_type") or "epsilon"
    return ModelSettings(checkpoint, base or DEFAULT_BASE, prompt, prediction_type, source)


def sampling_settings(args: argparse.Namespace) -> SamplingSettings:
    """The preset's, where the command line leaves them open. UserError for values and combinations that there are not."""
    if args.ensemble_output and args.ensemble == 1:
        raise UserError(f"--ensemble-output {args.ensemble_output}: it chooses among samples, give --ensemble of at least 2")
    given = args.scheduler, args.timestep_spacing, args.num_inference_steps
    preset = PRESETS[args.preset][0]
    scheduler, spacing, steps = (own if value is None else value for value, own in zip(given, preset, strict=True))
    readout, output = args.readout or "midpoint", args.ensemble_output or "first"
    settings = SamplingSettings(args.seed, scheduler, spacing, steps, readout, args.ensemble, output)
    check_limits(settings, {"num_inference_steps": (1, 999), "ensemble": (1, None), "seed": (0, MAX_SEED)})
    if (scheduler, spacing) != PAPER[:2] and steps > MAX_FEW_STEPS:
        most = f"expected at most {MAX_FEW_STEPS} with {scheduler} {spacing}"
        raise UserError(
            f"--num-inference-steps: {most}, found {steps}; more are for {PAPER.scheduler} {PAPER.timestep_spacing}"
        )
    return settings


def machine_settings(args: argparse.Namespace) -> MachineSettings:
    check_limits(args, {"max_pixels": (1, None), "batch_size": (1, None)})
    return MachineSettings(args.device, args.precision, args.batch_size, args.compile, args.max_pixels)


def check_limits(settings: object, limits: dict[str, tuple[float, float | None]]) -> None:
    """UserError where an attribute that is not None is outside of its (least, greatest) value; greatest None: no limit."""
    for name, (low, high) in limits.items():
        value = getattr(settings, name)
        if value is not None and not low <= value <= (math.inf if high is None else high):
            allowed = f"at least {low}" + (f" and at most {high}" if high is not None else "")
            raise UserError(f"--{name.replace('_', '-')}: expected {allowed}, found {value}")


def recorded_settings(model: ModelSettings, machine: MachineSettings) -> dict[str, str]:
    """Model and precision, for the record in an output folder."""
    from cdiffset.checkpoint import find_weights, identity

    weights = identity(find_weights(model.checkpoint, "--checkpoint"), "--checkpoint")
    folder = Path(model.base).expanduser()
    base = str(folder.resolve()) if folder.is_dir() else model.base  # however it is written
    recorded = {"weights": weights, "base": base, "prompt": model.prompt, "prediction_type": model.prediction_type}
    return recorded | {"precision": machine.precision}


def calibrated_settings(sampling: SamplingSettings) -> dict:
    """The settings that a calibration holds for: with others, the same σ² means another error."""
    settings = {name: value for name, value in asdict(sampling).items() if name != "seed"}
    return {"readout": sampling.readout} | settings  # first in messages


# -------------------------------------------------------------------------------------------------------------- options
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
    released = ", ".join(RELEASED)
    group.add_argument(
        "--checkpoint", required=True,
        help="U-Net: .safetensors file, diffusers folder or checkpoint folder; or on the Hugging Face Hub, "
        f"OWNER/NAME[@REVISION][/FOLDER], or released weights by a short name: {released}",
    )  # fmt: skip
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


def batch_size(text: str) -> int | None:
    """None: auto."""
    return None if text == "auto" else int(text)


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
