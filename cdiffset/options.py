"""The options of translating SAR images, shared by the commands that do it. No heavy import, so that --help is quick."""

import argparse
from pathlib import Path

from cdiffset.config import DEFAULT_BASE, DEFAULT_PROMPT, PREDICTION_TYPES
from cdiffset.errors import UserError
from cdiffset.readouts import ENSEMBLE_OUTPUTS, READOUTS

MAX_SEED = 2**63 - 1


def add_translation_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--checkpoint", required=True, help="U-Net: .safetensors file, diffusers folder or checkpoint folder")
    group.add_argument("--pretrained-model-name-or-path", help=f"base model [the checkpoint's own, else {DEFAULT_BASE}]")
    group.add_argument("--prompt", help=f"text prompt [the checkpoint's own, else {DEFAULT_PROMPT!r}]")
    group.add_argument(
        "--prediction-type", choices=PREDICTION_TYPES, help="what the U-Net predicts [the checkpoint's own, else epsilon]"
    )
    group = parser.add_argument_group("sampling")
    group.add_argument("--num-inference-steps", type=int, default=50, help="DDIM steps, 1 to 999 [50]")
    group.add_argument("--seed", type=int, default=0, help="fixes the starting noise [0]")
    meanings = "; ".join(f"{name}: {meaning}" for name, meaning in READOUTS.items())
    group.add_argument(
        "--readout", choices=READOUTS, default="midpoint", help=f"where the variance is read [midpoint]. {meanings}"
    )
    group.add_argument(
        "--ensemble", type=int, default=1, metavar="N", help="samples per image, of seeds SEED ... SEED + N - 1 [1]"
    )
    group.add_argument(
        "--ensemble-output", choices=ENSEMBLE_OUTPUTS, default="first", help="which EO image N samples give [first]"
    )
    group = parser.add_argument_group("machine")
    group.add_argument("--batch-size", type=int, default=1, help="samples of one size computed together [1]")
    group.add_argument("--precision", choices=("fp32", "fp16", "bf16"), default="fp32", help="of the networks [fp32]")
    group.add_argument("--device", help="e.g. cuda, cuda:1, mps, cpu [cuda if there is one]")


def check_translation_options(args: argparse.Namespace) -> None:
    limits = {"num_inference_steps": (1, 999), "batch_size": (1, None), "seed": (0, MAX_SEED), "ensemble": (1, None)}
    for name, (low, high) in limits.items():
        value = getattr(args, name)
        if value < low or (high is not None and value > high):
            allowed = f"at least {low}" + (f" and at most {high}" if high is not None else "")
            raise UserError(f"--{name.replace('_', '-')}: expected {allowed}, found {value}")
    from cdiffset.checkpoint import find_weights

    find_weights(Path(args.checkpoint).expanduser(), "--checkpoint")  # before the base model, which may be far away


def calibrated_settings(args: argparse.Namespace) -> dict:
    """The settings that a calibration holds for: with others, the same σ² means another error."""
    return {
        "readout": args.readout,
        "num_inference_steps": args.num_inference_steps,
        "ensemble": args.ensemble,
        "ensemble_output": args.ensemble_output if args.ensemble > 1 else "first",
    }
