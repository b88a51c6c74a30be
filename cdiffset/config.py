"""Every setting of a run, once: name, default, allowed values, unit. Command line over YAML over these defaults.

`load_config(argv)` reads them; `--help` is made from them. No heavy import here, so that mistakes show at once.
"""

import argparse
import difflib
import json
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from cdiffset.errors import Parser, UserError

DEFAULT_BASE = "Manojb/stable-diffusion-2-1-base"
_GEOSET = "JeonghyeokDo/GeoSET/baselines"
RELEASED = {  # short names of the weights that the authors released, see cdiffset/hub.py
    **{name: f"{_GEOSET}/{name}/c-diffset" for name in ("qxs-saropt", "sar2opt", "sar2eo", "spacenet6")},
    **{f"{name}-stage1": f"{_GEOSET}/{name}/sd21-ft" for name in ("qxs-saropt", "sar2opt", "sar2eo", "spacenet6")},
}
DEFAULT_PROMPT = "electro-optical image"
# The paper samples by DDIM, 50 steps of 1000, leading, offset 1, and reads σ² for its confidence map at the loop's midpoint.
PAPER_TIMESTEPS = tuple(1000 // 50 * step + 1 for step in reversed(range(50)))  # 981, 961 ... 1
MIDPOINT = PAPER_TIMESTEPS[50 // 2]
AUTOCAST_TYPE = {"bf16_copy": "bf16"}  # which is how Accelerate knows it
UNREAD = ("model", "loss_diff_weight", "loss_cond_weight", "loss_reg_weight")  # keys that the released parser knows, no more


# -------------------------------------------------- kinds of values: each returns the value or says what is allowed
def whole(low: int, high: int = 2**63 - 1) -> Callable:
    def check(value):
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            unlimited = high == 2**63 - 1 and (not isinstance(value, int) or value <= high)  # few need to know of that limit
            raise ValueError(f"a whole number of at least {low}" + ("" if unlimited else f" and at most {high}"))
        return value

    return check


def number(low: float, high: float = math.inf, above: bool = False) -> Callable:
    def check(value):
        try:  # YAML reads 1e-5, without a point, as a string
            parsed = float(value) if not isinstance(value, bool) else math.nan
        except (TypeError, ValueError, OverflowError):
            parsed = math.nan
        if not (low < parsed if above else low <= parsed) or not parsed <= high or math.isinf(parsed):
            limit = "" if high == math.inf else f" and at most {high}"
            raise ValueError(f"a number {'above' if above else 'of at least'} {low}{limit}")
        return parsed

    return check


def accepting(is_allowed: Callable, allowed: str) -> Callable:
    def check(value):
        if not is_allowed(value):
            raise ValueError(allowed)
        return value

    return check


boolean = accepting(lambda value: isinstance(value, bool), "true or false")
text = accepting(lambda value: isinstance(value, str), "text")
filled_text = accepting(lambda value: isinstance(value, str) and value.strip(), "text that is not empty")


def choice(*allowed: str) -> Callable:
    def check(value):
        written = "no" if value is False else value  # YAML reads a bare no as false
        for name in allowed:
            if isinstance(written, str) and written.lower() == name.lower():
                return name
        raise ValueError(f"one of {', '.join(allowed)}")

    return check


def mapping(value):
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ValueError("a mapping of names to values")
    try:
        json.dumps(value)  # as which the run keeps them
    except (TypeError, ValueError) as error:
        raise ValueError("a mapping of names to numbers, text, true, false, null or lists of them") from error
    return value


def optional(kind: Callable) -> Callable:
    def check(value):
        try:
            return None if value is None else kind(value)
        except ValueError as error:
            raise ValueError(f"{error}, or null") from None

    check.inner = kind  # type: ignore[attr-defined]
    return check


def gpu_ids(value):
    if isinstance(value, str):
        value = [int(i) if i.strip().isdecimal() else i for i in value.split(",")]
    ids = value if isinstance(value, list) else [value]
    if not ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 0 for i in ids):
        raise ValueError("a GPU number or a list of them")
    return ids


def iterations(value):
    found = value if isinstance(value, list) else [value]
    try:
        return sorted({whole(1)(each) for each in found})
    except ValueError as error:
        raise ValueError(f"{error}, or a list of them") from None


def names(value):
    found = value if isinstance(value, list) else [value]
    if not found or not all(isinstance(each, str) and each.strip() for each in found):
        raise ValueError("a name or a list of names")
    return sorted(set(found))


def beta_value(value):
    try:
        return value if value == "timestep" else number(0, 1)(value)
    except ValueError as error:
        raise ValueError(f"timestep, or {error}") from None


def shown(value) -> str:
    """A value as messages show it."""
    try:
        written = repr(value)
    except ValueError:
        return "a number of thousands of digits"
    return written if len(written) <= 120 else f"{written[:120]}…"


def knob(
    default: Any,
    kind: Callable,
    help: str,
    group: str | None = None,  # heading in --help that begins here
    may_change: bool = False,  # between two parts of a run, as it does not change what is learnt
    not_with_fsdp: tuple = (),  # values that `fsdp` refuses
) -> Any:
    metadata = {"kind": kind, "help": help, "group": group, "may_change": may_change, "not_with_fsdp": not_with_fsdp}
    return field(default_factory=dict, metadata=metadata) if default == {} else field(default=default, metadata=metadata)


BEST_METRICS = {"psnr": 1, "ssim": 1, "lpips": -1, "dists": -1}  # 1: more is better
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
LR_SCHEDULERS = ("cosine", "linear", "constant", "constant_with_warmup", "cosine_with_restarts", "polynomial")


@dataclass(frozen=True)
class Config:
    """One run. The defaults are the paper's where it states them; what is off by default changes nothing."""

    phase: str = knob(
        "train", choice("train", "test"), "train, or test: evaluate accelerator_path on the whole test list",
        group="run", may_change=True,
    )  # fmt: skip
    work_dir: str = knob(
        "work_dir/run", filled_text, "folder of the run: checkpoints, logs, pictures, reports", may_change=True
    )
    seed: int = knob(2024, whole(0), "fixes weights, data order, augmentation, noise and timesteps")

    feeder: str = knob("feeders.feeder.QXSFeeder", filled_text, "dotted name of the feeder class", group="data")
    train_feeder_args: dict = knob({}, mapping, "arguments of the training feeder, e.g. dataroot, listroot, crop_size (px)")
    test_feeder_args: dict = knob({}, mapping, "arguments of the test feeder", may_change=True)
    num_worker: int = knob(4, whole(0), "loader processes per training process", may_change=True)
    latent_cache: str | None = knob(
        None, optional(filled_text),
        "folder in which the VAE's latents of the training pairs are kept; null: encode every batch", may_change=True,
    )  # fmt: skip

    pretrained_model_name_or_path: str = knob(
        DEFAULT_BASE, filled_text, "Stable Diffusion: Hub name or local folder", group="model"
    )
    accelerator_path: str | None = knob(None, optional(filled_text), "U-Net to start from, path or Hub name; null: the base's")
    confidence: bool = knob(True, boolean, "true: stage 2, variance channel and C-Diff loss; false: stage 1, MSE")
    lora_rank: int | None = knob(
        None, optional(whole(1)), "train adapters of this rank beside the frozen U-Net; null: train the U-Net's own weights"
    )
    lora_alpha: int | None = knob(None, optional(whole(1)), "the adapters count lora_alpha / lora_rank times; null: once")
    lora_targets: list | None = knob(
        None, optional(names), "layers with adapters, ends of their names, e.g. [to_q, conv1]; null: those of the attention"
    )
    prompt: str = knob(DEFAULT_PROMPT, text, "the one text prompt; empty: the null prompt")

    prediction_type: str = knob("epsilon", choice(*PREDICTION_TYPES), "what the U-Net predicts", group="loss")
    beta: str | float = knob("timestep", beta_value, "C-Diff exponent: timestep (sqrt of alpha-bar) or 0 to 1")

    optimizer: str = knob(
        "AdamW", choice("AdamW", "Adam", "AdamW8bit"), "optimizer; AdamW8bit, of bitsandbytes: moments of 8 bits",
        group="optimisation", not_with_fsdp=("AdamW8bit",),
    )  # fmt: skip
    learning_rate: float = knob(3e-5, number(0, above=True), "peak learning rate")
    weight_decay: float = knob(0.01, number(0), "weight decay")
    lr_scheduler: str = knob("cosine", choice(*LR_SCHEDULERS), "learning rate after the warm-up")
    num_warmup: int = knob(100, whole(0), "iterations of linear warm-up")
    num_iter: int = knob(50_000, whole(1), "optimizer steps, however many processes or accumulation steps share one")
    batch_size: int = knob(64, whole(1), "pairs per optimizer step, over all processes and accumulation steps")
    gradient_accumulation_steps: int = knob(
        1, whole(1), "parts in which each process works through its share of a batch", may_change=True
    )
    max_grad_norm: float | None = knob(None, optional(number(0, above=True)), "clip the gradient norm to this; null: no")
    skip_nonfinite: int = knob(
        0, whole(0), "leave out up to so many steps of a non-finite loss or gradient; 0: stop at the first", may_change=True
    )
    ema_decay: float | None = knob(None, optional(number(0, 1)), "keep an exponential average of the weights; null: none")

    mixed_precision: str = knob(
        "no", choice("no", "fp16", "bf16", "bf16_copy"),
        "autocast type; trained weights stay float32. bf16_copy: the network is a bfloat16 copy of them, fastest",
        group="machine", not_with_fsdp=("fp16", "bf16_copy"),
    )  # fmt: skip
    tf32: bool = knob(False, boolean, "TF32 for what is float32 on Nvidia GPUs: faster, 10 bits of mantissa")
    deterministic: bool = knob(
        True, boolean, "the same bits in every run on GPUs; false: also kernels that add up in any order, which are faster",
        may_change=True,
    )  # fmt: skip
    torch_compile: bool = knob(
        False, boolean, "compile the U-Net: minutes at first, then faster; other rounding", not_with_fsdp=(True,)
    )
    fsdp: bool = knob(
        False, boolean, "divide weights, gradients and moments among the processes: less memory, more time", may_change=True
    )
    gradient_checkpointing: bool = knob(False, boolean, "recompute activations: less memory, more time", may_change=True)
    gpu: list | None = knob(None, optional(gpu_ids), "GPUs a single process may see; null: all", may_change=True)

    num_inference_steps: int = knob(50, whole(1, 999), "DDIM steps of validation", group="validation", may_change=True)
    val_len: int = knob(100, whole(1), "validate on the first val_len test pairs", may_change=True)
    test_batch_size: int = knob(1, whole(1), "pairs per validation batch and process", may_change=True)
    eval_epoch: int = knob(
        10, whole(0), "validate every so many epochs; 0: only in the last part and at the end", may_change=True
    )
    eval_each_epoch_from: float = knob(
        0.8, number(0, 1), "fraction of num_iter from which every epoch is validated; 1: never", may_change=True
    )
    best_metric: str = knob(
        "psnr", choice(*BEST_METRICS), "which mean over the validated pairs picks best; psnr prefers blur", may_change=True
    )
    lpips: bool = knob(True, boolean, "also the metrics by networks, LPIPS first, where weights are available", may_change=True)

    log_iter: int = knob(50, whole(1), "iterations between log lines", group="logs and checkpoints", may_change=True)
    save_iter: int = knob(5000, whole(0), "write checkpoint-N every so many iterations; 0: never", may_change=True)
    save_epoch: int = knob(0, whole(0), "write epoch-N every so many epochs; 0: never", may_change=True)
    keep_at: list | None = knob(
        None, optional(iterations), "iterations at which snapshot-N is written, which is never removed; null: none",
        may_change=True,
    )  # fmt: skip
    checkpoints_total_limit: int | None = knob(3, optional(whole(1)), "numbered ones to keep; null: all", may_change=True)
    resume: str | None = knob(
        "auto", optional(filled_text),
        "auto: continue work_dir's run if its settings are these; latest or a folder: continue it; null: start afresh",
        may_change=True,
    )  # fmt: skip
    report_to: str = knob(
        "tensorboard", choice("tensorboard", "wandb", "none"), "scalars beside the text logs", may_change=True
    )


KNOBS, DEFAULTS = {each.name: each for each in fields(Config)}, Config()


def load_config(argv: list[str] | None = None, launcher: dict[str, str] | None = None) -> Config:
    """Command line => checked Config. Raises UserError naming the key, its value and what is allowed.

    `launcher`: settings of `launch.launcher_settings`, for what neither command line nor YAML gives.
    """
    parser = make_parser()
    known, rest = parser.parse_known_args(argv)
    values = read_yaml(known.config) if known.config else {}
    overrides = {name: written for name, written in vars(known).items() if name != "config" and written is not None}
    if unread := [name for name in UNREAD if name in values or name in overrides]:
        print(f"note: {', '.join(unread)}: known to the released code, without effect", file=sys.stderr)
        values, overrides = ({k: v for k, v in each.items() if k not in UNREAD} for each in (values, overrides))
    for name in values:
        if name not in KNOBS:
            raise unknown_key(name, f" in {known.config}")
    for name, written in overrides.items():
        value, before = parse_written(name, written), values.get(name)
        values[name] = {**before, **value} if isinstance(before, dict) and isinstance(value, dict) else value
    for key, written in nested_overrides(rest):
        name, inner = key.split(".", 1)
        if not isinstance(values.setdefault(name, {}), dict):
            raise UserError(f"--{key}: {name} is {shown(values[name])}, expected a mapping of names to values")
        values[name] = {**values[name], inner.replace("-", "_"): parse_written(key, written)}
    return check(values, launcher or {})


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Train or test C-DiffSET. Every key of the YAML is an option too; dashes and underscores are the same.",
        epilog="Feeder arguments: --train-feeder-args.crop_size 256, or inline YAML: --train-feeder-args '{crop_size: 256}'.",
        allow_abbrev=False,
    )
    parser.add_argument("--config", metavar="YAML", help="settings that differ from the defaults below")

    def add(group, name: str, text: str) -> None:
        spellings = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))
        group.add_argument(*spellings, dest=name, metavar="VALUE", help=text)

    for name in UNREAD:
        add(parser, name, argparse.SUPPRESS)
    group: argparse._ActionsContainer = parser
    for name, each in KNOBS.items():
        if heading := each.metadata["group"]:
            group = parser.add_argument_group(heading)
        default = "null" if (value := getattr(DEFAULTS, name)) is None else value
        add(group, name, f"{each.metadata['help']} [{default}]".replace("%", "%%"))
    return parser


def nested_overrides(rest: list[str]) -> list[tuple[str, str]]:
    """`--train-feeder-args.crop_size 256`, or with `=`, => [("train_feeder_args.crop_size", "256")]."""
    pairs, words = [], iter(rest)
    for word in words:
        option, equals, written = word.partition("=")
        head, dot, inner = option.removeprefix("--").partition(".")
        head = head.replace("-", "_")
        if not option.startswith("--"):
            raise UserError(f"unexpected {word!r} on the command line: options are --key value")
        if dot and head in KNOBS and not head.endswith("_feeder_args"):
            raise UserError(f"{option}: {head} holds no names, expected --{head} VALUE")
        if not dot or not inner or head not in ("train_feeder_args", "test_feeder_args"):
            raise unknown_key(head, " on the command line")
        written = written if equals else next(words, None)  # type: ignore[assignment]
        if written is None:
            raise UserError(f"{option}: expected a value after it")
        pairs.append((f"{head}.{inner}", written))
    return pairs


def unknown_key(name: str, where: str) -> UserError:
    near = difflib.get_close_matches(name.replace("-", "_"), KNOBS, n=1, cutoff=0.5) if isinstance(name, str) else []
    return UserError(
        f"unknown key {shown(name)}{where}" + (f", did you mean {near[0]!r}?" if near else "; --help lists all keys")
    )


def parse_written(name: str, written: str) -> Any:
    """A value of the command line as YAML; what is no YAML, or for a setting that is text (`image #3`), stays as it is."""
    try:
        value = yaml.load(written, CarefulLoader)
    except Exception as error:  # see read_yaml
        if written.lstrip().startswith(("{", "[")) and name.partition(".")[0].endswith("_feeder_args"):
            raise UserError(f"--{name}: {shown(written)} is no valid inline YAML") from error
        return written
    kind = KNOBS[name].metadata["kind"] if name in KNOBS else None
    if not written.strip() or (value is not None and getattr(kind, "inner", kind) in (text, filled_text)):
        return written
    return value


class CarefulLoader(yaml.SafeLoader):
    """YAML without duplicate keys, of which one would silently win."""

    def compose_mapping_node(self, anchor):
        node = super().compose_mapping_node(anchor)  # here, because merge keys are later expanded in place
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} stands twice", node.start_mark)
                seen.add(key.value)
        return node


CarefulLoader.add_constructor(
    yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, lambda loader, node: loader.construct_mapping(node, deep=True)
)


class FileLoader(CarefulLoader):
    """The same with ${VAR} in a value taken from the environment, and then read as if it had been written there."""

    def compose_scalar_node(self, anchor):
        node = super().compose_scalar_node(anchor)
        written = re.sub(r"\$\{(\w+)\}", lambda match: self.variable(match[1], node), node.value)
        if written != node.value and node.style is None and node.tag == self.DEFAULT_SCALAR_TAG:  # quotes and tags stay text
            node.tag = self.resolve(yaml.ScalarNode, written, (True, False))
        node.value = written
        return node

    def variable(self, name: str, node) -> str:
        if name not in os.environ:
            raise yaml.constructor.ConstructorError(None, None, f"${{{name}}} is not set in the environment", node.start_mark)
        return os.environ[name]


def read_yaml(path: str) -> dict:
    try:
        written = Path(path).read_text(encoding="utf-8-sig")
        values = yaml.load(written, FileLoader)
    except OSError as error:
        raise UserError(f"--config: cannot read {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"--config: {path} is not UTF-8 text: {error}") from error
    except Exception as error:  # also of dates that do not exist, of tags on what they do not fit, of brackets nested too deep
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"--config: {path}{where}: {getattr(error, 'problem', None) or f'no valid YAML ({error})'}") from error
    if not isinstance(values, dict):
        raise UserError(f"--config: {path} holds {'nothing' if values is None else 'no mapping'}, expected lines of key: value")
    return values


def check(values: dict, launcher: dict[str, str]) -> Config:
    """Raw values => Config, each checked and converted by its kind, then against each other."""
    values = {name: converted(name, value) for name, value in values.items()}
    for name, written in launcher.items():
        told = converted(name, parse_written(name, written), "accelerate launch: ")
        given = values.setdefault(name, told)
        if AUTOCAST_TYPE.get(given, given) != told:
            raise UserError(f"{name}: the configuration gives {shown(given)}, accelerate launch {shown(told)}: leave one out")
    config = Config(**values)
    for name, value in flatten(asdict(config)):
        unread = config.phase == "test" and name.startswith("train_feeder_args")
        if isinstance(value, str) and "/path/to" in value and not unread:
            raise UserError(f"{name}: {value!r} is a placeholder, expected your own path there")
    if config.num_warmup > config.num_iter:
        raise UserError(f"num_warmup: expected at most num_iter ({config.num_iter}), found {config.num_warmup}")
    if config.batch_size % (steps := config.gradient_accumulation_steps):
        raise UserError(f"gradient_accumulation_steps: expected a divisor of batch_size ({config.batch_size}), found {steps}")
    if config.keep_at and config.keep_at[-1] > config.num_iter:
        raise UserError(f"keep_at: expected at most num_iter ({config.num_iter}), found {config.keep_at[-1]}")
    if config.best_metric == "lpips" and not config.lpips:
        raise UserError("best_metric: lpips is measured where lpips is true, found lpips: false")
    for name in ("lora_alpha", "lora_targets"):
        if getattr(config, name) is not None and config.lora_rank is None:
            raise UserError(f"{name}: it is of adapters, which take lora_rank, found lora_rank: null")
    if own := [name for name in config.lora_targets or () if name.rpartition(".")[2] in ("conv_in", "conv_out")]:
        raise UserError(f"lora_targets: conv_in and conv_out are trained whole, found {', '.join(own)}")
    if config.fsdp and config.lora_rank:
        raise UserError("fsdp: true is not available with lora_rank: leave one out")
    for name, each in KNOBS.items():
        if config.fsdp and (value := getattr(config, name)) in each.metadata["not_with_fsdp"]:
            raise UserError(f"fsdp: true is not available with {name}: {shown(value)}, expected another {name} or fsdp: false")
    return config


def converted(name: str, value: Any, where: str = "") -> Any:
    """A raw value as its kind has it; `where` is what the error begins with."""
    try:
        return KNOBS[name].metadata["kind"](value)
    except ValueError as error:
        raise UserError(f"{where}{name}: expected {error}, found {shown(value)}") from None


def flatten(values: dict, prefix: str = "") -> list[tuple[str, Any]]:
    """Nested mapping => [("train_feeder_args.crop_size", 256), ...]."""
    pairs = []
    for key, value in values.items():
        pairs += flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return pairs
