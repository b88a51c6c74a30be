"""What `accelerate launch` was told about the training, as settings of the configuration."""

import os
from pathlib import Path

import psutil

from cdiffset.errors import UserError

SETTINGS = {  # option of accelerate launch: (key of the configuration, value that asks for nothing)
    "mixed_precision": ("mixed_precision", "no"),
    "gradient_accumulation_steps": ("gradient_accumulation_steps", "1"),
    "gradient_clipping": ("max_grad_norm", "none"),
    "dynamo_backend": ("torch_compile", "no"),
}
DYNAMO = {"mode": "default", "use_fullgraph": "false", "use_dynamic": "false", "use_regional_compilation": "false"}


def launcher_settings() -> dict[str, str]:
    """{key of the configuration: value as text}; {} without a launcher or where it was told nothing.

    `no` and 1 count as nothing: the launcher sets them where it was told nothing. UserError names a compiler option that
    `torch_compile` cannot serve.
    """
    if "ACCELERATE_MIXED_PRECISION" not in os.environ:  # every `accelerate launch` sets it
        return {}
    options, settings = launcher_options(), {}
    for option, (key, nothing) in SETTINGS.items():
        value = os.environ.get(f"ACCELERATE_{option.upper()}", options.get(option))
        if value is not None and str(value).lower() != nothing:
            settings[key] = compiler_setting(value) if option == "dynamo_backend" else str(value)
    return settings


def compiler_setting(backend: str) -> str:
    """A value of --dynamo_backend => that of `torch_compile`."""
    asked = {name: os.environ.get(f"ACCELERATE_DYNAMO_{name.upper()}", default).lower() for name, default in DYNAMO.items()}
    unserved = [f"--dynamo_{name}" for name, default in DYNAMO.items() if asked[name] != default]
    if backend.lower() != "inductor":
        unserved.insert(0, f"--dynamo_backend {backend.lower()}")
    if unserved:
        expected = "--dynamo_backend inductor alone, which is torch_compile: true"
        raise UserError(f"accelerate launch: {', '.join(unserved)} is not supported, expected {expected}")
    return "true"


def launcher_options() -> dict:
    """The options of the `accelerate launch` that is this process's parent: it passes some on to DeepSpeed only."""
    try:
        words = psutil.Process().parent().cmdline()
    except (psutil.Error, AttributeError):  # it has ended, or belongs to another user
        return {}
    for place, word in enumerate(words):
        names_launch = word == "launch" and "accelerate" in words[place - 1]
        if names_launch or Path(word).name in ("accelerate-launch", "accelerate.commands.launch"):
            from accelerate.commands.launch import launch_command_parser  # slow to import

            return vars(launch_command_parser().parse_known_args(words[place + 1 :])[0])
    return {}
