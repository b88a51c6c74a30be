"""The configuration: what wins, what is refused and with which words, and that no setting is dead."""

import ast
import re
import subprocess
import sys
from dataclasses import asdict
from types import SimpleNamespace

import psutil
import pytest
import yaml
from conftest import REPO
from hypothesis import given, settings
from hypothesis import strategies as st
from training import AUGMENTATIONS

from cdiffset.config import KNOBS, Config, load_config
from cdiffset.errors import UserError
from cdiffset.training.launch import launcher_settings
from feeders.feeder import build_feeder

CONFIGS = sorted((REPO / "configs").glob("*.yaml"))
RELEASED = """\
seed: 2024
num_worker: 8
work_dir: work_dir/qxs
phase: train
feeder: feeders.feeder.QXSFeeder
train_feeder_args: {dataroot: /data/qxs, listroot: data/QXS_split/train_eo_list_080.txt, load_size: 256, crop_size: 256}
test_feeder_args: {dataroot: /data/qxs, listroot: data/QXS_split/test_eo_list_080.txt, load_size: 256, crop_size: 256}
optimizer: AdamW
learning_rate: 3e-5
weight_decay: 0.01
lr_scheduler: cosine
num_iter: 50000
num_warmup: 100
prediction_type: epsilon
log_iter: 50
save_iter: 1000
save_epoch: 10
eval_epoch: 10
gpu: [0]
batch_size: 64
test_batch_size: 1
mixed_precision: no
pretrained_model_name_or_path: Manojb/stable-diffusion-2-1-base
accelerator_path: work_dir/stage1
num_inference_steps: 50
val_len: 100
"""


@pytest.fixture
def load(tmp_path):
    """load(YAML text or bytes, *command line) => Config."""

    def load(content: str | bytes, *argv: str, launcher: dict | None = None) -> Config:
        file = tmp_path / "run.yaml"
        file.write_bytes(content.encode() if isinstance(content, str) else content)
        return load_config(["--config", str(file), *argv], launcher)

    return load


def refusal(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    return str(caught.value)


# ---------------------------------------------------------------------------------------- released keys and the environment
def test_keys_that_the_released_parser_never_reads_are_accepted_with_a_note(load, capsys):
    config = load(
        "model: x.Y\nloss_diff_weight: 1.0\nloss_cond_weight: 0.5\nseed: 3\n", "--loss-reg-weight", "2", "--model", "z"
    )
    assert config == Config(seed=3)
    assert capsys.readouterr().err == (
        "note: model, loss_diff_weight, loss_cond_weight, loss_reg_weight: known to the released code, without effect\n"
    )
    assert load("seed: 3\n", "--loss_diff_weight=1") == config and "note: loss_diff_weight: " in capsys.readouterr().err
    assert load("seed: 3\n") == config and not capsys.readouterr().err
    assert "unknown key 'loss_weight'" in refusal(load, "loss_weight: 1\n")


def test_variables_of_the_environment_stand_for_what_they_hold(load, monkeypatch):
    for name, value in {"DATA": "/data/sets", "N": "200", "OFF": "false", "DEEP": "[1, 2]", "LR": "1e-5"}.items():
        monkeypatch.setenv(name, value)
    config = load(
        "work_dir: ${DATA}/runs/${N}\nnum_iter: ${N}\nconfidence: ${OFF}\nlearning_rate: ${LR}\nprompt: '${N}'\n"
        'feeder: a.$B\ntrain_feeder_args:\n  dataroot: "${DATA}"\n'
        "  limits:\n    - ${N}\n    - {a: '${DATA}/x'}\n  text: ${DEEP}\n"
    )
    assert (config.work_dir, config.num_iter, config.confidence) == ("/data/sets/runs/200", 200, False)
    assert (config.learning_rate, config.prompt, config.feeder) == (1e-5, "200", "a.$B")
    assert config.train_feeder_args == {"dataroot": "/data/sets", "limits": [200, {"a": "/data/sets/x"}], "text": "[1, 2]"}


def test_a_variable_that_is_not_set_is_named(load, monkeypatch):
    monkeypatch.delenv("NOWHERE", raising=False)
    message = refusal(load, "seed: 1\ntest_feeder_args:\n  dataroot: ${NOWHERE}/x\n")
    assert message.endswith(", line 3: ${NOWHERE} is not set in the environment")


# ------------------------------------------------------------------------------------------------------- files that ship
def test_all_configurations_are_there():
    data_sets = [f"{name}_eps" for name in ("qxs", "saropt", "sar2eo", "spacenet", "spacenet_chips", "senms")]
    data_sets += ["paired_folder", "demo", "simulated"]
    assert {path.stem for path in CONFIGS} >= {*data_sets, *(f"{name}_conf" for name in data_sets)}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_shipped_configuration_loads(path, load):
    written = path.read_text()
    if "/path/to" in written:
        message = refusal(load_config, ["--config", str(path)])
        assert message.startswith("train_feeder_args.") and "is a placeholder, expected your own path" in message
    # In comments the placeholder may stay.
    config = load(written.replace(": /path/to", ": /data"))
    assert config.confidence == path.stem.endswith("_conf")
    is_augmented = "demo" not in path.stem  # whose radar and sun shine from fixed sides
    assert all(config.train_feeder_args[name] is is_augmented for name in AUGMENTATIONS)  # off by default
    assert not AUGMENTATIONS.keys() & config.test_feeder_args.keys()
    # Stage 2 is stage 1 but for these.
    twin = load(path.with_stem(path.stem.removesuffix("_conf")).read_text().replace(": /path/to", ": /data"))
    different = {name for name, value in asdict(config).items() if value != asdict(twin)[name]}
    assert different <= {"work_dir", "confidence", "accelerator_path", "num_iter"}
    if config.confidence:
        assert config.accelerator_path == f"{twin.work_dir}/best"


def test_a_yaml_of_the_released_codes_keys_runs_unchanged(load):
    config = load(RELEASED)
    assert (config.learning_rate, config.mixed_precision, config.gpu) == (3e-5, "no", [0])
    assert config.train_feeder_args["dataroot"] == "/data/qxs" and config.test_feeder_args["crop_size"] == 256
    assert config.confidence and config.beta == "timestep"  # the released code is stage 2


def test_the_defaults_are_the_papers():
    config = load_config([])
    paper = dict(
        optimizer="AdamW", learning_rate=3e-5, weight_decay=0.01, lr_scheduler="cosine", num_warmup=100, num_iter=50_000,
        seed=2024, mixed_precision="no", batch_size=64, num_inference_steps=50, val_len=100, eval_epoch=10,
        eval_each_epoch_from=0.8, prompt="electro-optical image", prediction_type="epsilon", beta="timestep", confidence=True,
        pretrained_model_name_or_path="Manojb/stable-diffusion-2-1-base",
    )  # fmt: skip
    off = dict(
        gradient_accumulation_steps=1, max_grad_norm=None, ema_decay=None, gradient_checkpointing=False, gpu=None,
        accelerator_path=None,
    )  # fmt: skip
    assert {name: getattr(config, name) for name in {**paper, **off}} == {**paper, **off}


def test_every_default_passes_its_own_check():
    for name, value in asdict(Config()).items():
        assert KNOBS[name].metadata["kind"](value) == value


# ------------------------------------------------------------------------------------------------------------ no dead knob
def test_every_setting_is_read():
    """`config.NAME` in the code; the feeders' arguments are read by a name that is put together."""
    read = set()
    for path in (REPO / "train.py", REPO / "main.py", *(REPO / "cdiffset/training").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and ast.unparse(node.value).rpartition(".")[2] == "config":
                read.add(node.attr)
    assert set(KNOBS) - read == {"test_feeder_args"}


@pytest.mark.parametrize("which", ["train", "test"])
def test_the_feeder_gets_its_own_arguments(which):
    config = Config(feeder="builtins.dict", seed=3, train_feeder_args={"a": 1}, test_feeder_args={"b": 2, "seed": 4})
    assert build_feeder(config, which) == {"train": {"seed": 3, "a": 1}, "test": {"seed": 4, "b": 2}}[which]


# ------------------------------------------------------------------------------------------- what accelerate launch says
LAUNCHED = {  # as `accelerate launch` sets it without any option
    "ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO", "ACCELERATE_DYNAMO_MODE": "default",
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": "False", "ACCELERATE_DYNAMO_USE_DYNAMIC": "False",
    "ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION": "False", "ACCELERATE_USE_CPU": "False",
}  # fmt: skip


@pytest.fixture
def launched(monkeypatch, load):
    """launched(YAML, ACCELERATE_ variables) => Config."""

    def launched(content: str, **variables: str) -> Config:
        for name, value in {**LAUNCHED, **{f"ACCELERATE_{name}": value for name, value in variables.items()}}.items():
            monkeypatch.setenv(name, value)
        return load(content, launcher=launcher_settings())

    return launched


@pytest.mark.parametrize(
    "content, variables, expected",
    [
        ("seed: 1", {}, {"mixed_precision": "no", "gradient_accumulation_steps": 1, "torch_compile": False}),
        ("seed: 1", {"MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16"}),
        ("mixed_precision: bf16", {"MIXED_PRECISION": "no"}, {"mixed_precision": "bf16"}),
        ("mixed_precision: bf16_copy", {"MIXED_PRECISION": "bf16"}, {"mixed_precision": "bf16_copy"}),
        ("batch_size: 8", {"GRADIENT_ACCUMULATION_STEPS": "2"}, {"gradient_accumulation_steps": 2}),
        ("gradient_accumulation_steps: 4", {"GRADIENT_ACCUMULATION_STEPS": "1"}, {"gradient_accumulation_steps": 4}),
        ("max_grad_norm: 1", {"GRADIENT_CLIPPING": "1.0"}, {"max_grad_norm": 1.0}),
        ("seed: 1", {"DYNAMO_BACKEND": "INDUCTOR"}, {"torch_compile": True}),
        ("torch_compile: true", {"DYNAMO_BACKEND": "NO"}, {"torch_compile": True}),
    ],
)
def test_what_the_launcher_was_told_counts_where_the_configuration_gives_nothing(launched, content, variables, expected):
    config = launched(content, **variables)
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    "content, variables, message",
    [
        ("mixed_precision: no", {"MIXED_PRECISION": "bf16"}, "gives 'no', accelerate launch 'bf16'"),
        ("mixed_precision: bf16_copy", {"MIXED_PRECISION": "fp16"}, "gives 'bf16_copy', accelerate launch 'fp16'"),
        ("gradient_accumulation_steps: 4", {"GRADIENT_ACCUMULATION_STEPS": "2"}, "gives 4, accelerate launch 2: leave one"),

        ("torch_compile: false", {"DYNAMO_BACKEND": "INDUCTOR"}, "torch_compile: the configuration gives False"),
        ("seed: 1", {"DYNAMO_BACKEND": "EAGER"}, "--dynamo_backend eager is not supported"),
        ("seed: 1", {"DYNAMO_BACKEND": "INDUCTOR", "DYNAMO_MODE": "max-autotune"}, "--dynamo_mode is not supported"),
        ("seed: 1", {"MIXED_PRECISION": "fp8"}, "accelerate launch: mixed_precision: expected one of no, fp16,"),
        ("batch_size: 9", {"GRADIENT_ACCUMULATION_STEPS": "2"}, "expected a divisor of batch_size"),
    ],
)  # fmt: skip
def test_a_launcher_that_contradicts_the_configuration_is_refused(launched, content, variables, message):
    with pytest.raises(UserError, match=re.escape(message)):
        launched(content, **variables)


@pytest.mark.parametrize(
    "words",
    [
        ["python", "/venv/bin/accelerate", "launch", "--gradient_accumulation_steps", "2", "main.py"],
        ["python", "/venv/bin/accelerate-launch", "--gradient-accumulation-steps=2", "main.py", "--seed", "1"],
        ["python", "-m", "accelerate.commands.launch", "--gradient_accumulation_steps", "2", "main.py"],
    ],
)
def test_what_the_launcher_hands_on_to_deepspeed_alone_is_read_from_its_command_line(launched, monkeypatch, words):
    parent = SimpleNamespace(cmdline=lambda: words)
    monkeypatch.setattr(psutil, "Process", lambda: SimpleNamespace(parent=lambda: parent))
    assert launched("batch_size: 8").gradient_accumulation_steps == 2
    words[words.index("main.py") :] = ["main.py", "--gradient_accumulation_steps", "8"]  # main.py's own option
    assert launched("batch_size: 8").gradient_accumulation_steps == 2
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    assert launcher_settings() == {}


# ----------------------------------------------------------------------------------------------------------- what wins
@pytest.mark.parametrize("argv", [["--batch-size", "4"], ["--batch_size", "4"], ["--batch-size=4"], ["--batch_size=4"]])
def test_command_line_over_yaml_over_defaults(load, argv):
    config = load("batch_size: 8\nnum_iter: 700\n", *argv)
    assert (config.batch_size, config.num_iter, config.num_worker) == (4, 700, Config().num_worker)


@pytest.mark.parametrize("option", ["--train-feeder-args", "--train_feeder_args"])
@pytest.mark.parametrize("equals", [False, True])
@pytest.mark.parametrize("inner", ["crop_size", "crop-size"])
def test_one_feeder_argument_is_overridden_and_the_others_stay(load, option, equals, inner):
    argv = [f"{option}.{inner}=128"] if equals else [f"{option}.{inner}", "128"]
    config = load("train_feeder_args: {crop_size: 256, dataroot: /data}\n", *argv, "--seed", "5")
    assert config.train_feeder_args == {"crop_size": 128, "dataroot": "/data"} and config.seed == 5
    assert config.test_feeder_args == {}
    assert "expected a mapping" in refusal(load, "train_feeder_args: null\n", *argv)


def test_several_overrides_in_any_order(load):
    config = load(
        "train_feeder_args: {a: 1}\ntest_feeder_args: {a: 1}\n",
        "--train-feeder-args.a", "-2", "--seed", "5", "--test-feeder-args.b=x=y", "--train-feeder-args", "{c: [1, 2]}",
        "--train-feeder-args.d", "/data/with space", "--num-iter", "200",
    )  # fmt: skip
    assert config.train_feeder_args == {"a": -2, "c": [1, 2], "d": "/data/with space"}
    assert config.test_feeder_args == {"a": 1, "b": "x=y"} and (config.seed, config.num_iter) == (5, 200)


def test_an_override_of_one_mapping_leaves_its_alias_alone(load):
    config = load("train_feeder_args: &data {a: 1}\ntest_feeder_args: *data\n", "--train-feeder-args.a", "2")
    assert (config.train_feeder_args, config.test_feeder_args) == ({"a": 2}, {"a": 1})


@pytest.mark.parametrize("written", ["a: b", "image #3", "2024-02-30", "[sar]", "5", "no", "3: 'x", "tab\there", "{"])
def test_text_on_the_command_line_is_taken_as_written(written):
    """As YAML the first is a mapping, the second ends at the #, the third is an impossible date."""
    assert load_config(["--prompt", written]).prompt == written
    assert load_config(["--accelerator-path", written]).accelerator_path == written


def test_null_and_the_empty_prompt_on_the_command_line(load):
    written = "accelerator_path: x\nmax_grad_norm: 1\nema_decay: 0.5\ncheckpoints_total_limit: 2\nresume: x\n"
    names = [line.partition(":")[0] for line in written.splitlines()]
    config = load(written, *(word for name in names for word in (f"--{name}", "null")))
    assert all(getattr(config, name) is None for name in names)
    assert load_config(["--prompt", ""]).prompt == ""


# -------------------------------------------------------------------------------------------------------- kinds of values
@pytest.mark.parametrize(
    "name, written, value",
    [
        ("learning_rate", "1e-5", 1e-5), ("learning_rate", "'0.5'", 0.5), ("learning_rate", "2", 2.0),
        ("learning_rate", "3.e-5", 3e-5), ("mixed_precision", "no", "no"), ("mixed_precision", "'no'", "no"),
        ("mixed_precision", "false", "no"), ("mixed_precision", "BF16", "bf16"), ("gpu", "0", [0]), ("gpu", "[0, 2]", [0, 2]),
        ("gpu", "0,2", [0, 2]), ("gpu", "null", None), ("beta", "timestep", "timestep"), ("beta", "0", 0.0),
        ("beta", "5e-1", 0.5),
        ("prompt", "\u5149\u5b66\u56fe\u50cf", "\u5149\u5b66\u56fe\u50cf"),
    ],
)  # fmt: skip
def test_values_in_every_notation(load, name, written, value):
    """In YAML `no` is a boolean, and 3.e-5 is text."""
    for config in (load(f"{name}: {written}\n"), load_config([f"--{name.replace('_', '-')}", written.strip("'")])):
        found = getattr(config, name)
        assert found == value and type(found) is type(value)


HUGE = "1" + 30 * "0"
IMPOSSIBLE = [
    (name, value, allowed)
    for names, values, allowed in (
        ("num_iter", ("0", "-1", "1.5", "x", "true", "null", HUGE), "whole number of at least 1"),
        ("batch_size test_batch_size val_len log_iter gradient_accumulation_steps", ("0",), "whole number of at least 1"),
        ("seed", ("-1", "0.5", ".nan", ".inf", "[1]", HUGE), "whole number of at least 0"),
        ("num_worker num_warmup eval_epoch save_iter save_epoch", ("-1",), "whole number of at least 0"),
        ("num_inference_steps", ("0", "1000", "50.0", "-50"), "at least 1 and at most 999"),
        ("learning_rate", ("0", "-1.0", ".nan", "nan", ".inf", "1e999", "x", "true", "[]"), "a number above 0"),
        ("weight_decay", ("-0.1", ".nan", "-.inf", "null", "1" + 400 * "0"), "a number of at least 0"),
        ("max_grad_norm", ("0", ".nan", "off"), "a number above 0, or null"),
        ("ema_decay", ("1.1", "-0.5", ".nan", "true"), "at least 0 and at most 1, or null"),
        ("eval_each_epoch_from", ("1.01", "-0.01"), "at least 0 and at most 1"),
        ("beta", ("1.5", "-1", ".nan", "steps", "true"), "timestep, or a number of at least 0 and at most 1"),
        ("checkpoints_total_limit", ("0", "1.0"), "at least 1, or null"),
        ("keep_at", ("0", "[5, -1]", "x", "1.5", "[[1]]"), "a whole number of at least 1, or a list of them, or null"),
        ("best_metric", ("fid", "null"), "one of psnr, ssim, lpips, dists"),
        ("gpu", ("-1", "[]", "[0, -1]", "[true]", "cuda", "1.0", "'0,x'", "''"), "a GPU number or a list of them"),
        ("confidence", ("1", "'true'", "null", "maybe"), "true or false"),
        ("work_dir", ("''", "' '", "null", "5", "[a]"), "text that is not empty"),
        ("prompt", ("5", "null", "[a]", "{a: b}"), "expected text"),
        ("accelerator_path", ("''", "5"), "text that is not empty, or null"),
        ("phase", ("val", "true", "null"), "one of train, test"),
        ("prediction_type", ("eps",), "one of epsilon, sample, v_prediction"),
        ("mixed_precision", ("yes", "fp8", "16", "null"), "one of no, fp16, bf16"),
        ("optimizer", ("SGD",), "one of AdamW, Adam, AdamW8bit"),
        ("lr_scheduler", ("step",), "one of cosine, linear"),
        ("report_to", ("comet",), "one of tensorboard, wandb, none"),
        ("train_feeder_args", ("null", "5", "[a]", "{1: 2}"), "a mapping of names to values"),
    )
    for name in names.split()
    for value in values
]


@pytest.mark.parametrize("name, written, allowed", IMPOSSIBLE, ids=lambda value: str(value)[:20])
def test_impossible_values_are_refused_with_key_value_and_what_is_allowed(load, name, written, allowed):
    message = refusal(load, f"{name}: {written}\n")
    assert message.startswith(f"{name}: expected ") and allowed in message and "found " in message


@pytest.mark.parametrize("option, found", [("--batch-size=0", "0"), ("--learning_rate=-1e-5", "-1"), ("--seed=x", "x")])
def test_the_command_line_is_checked_as_the_yaml_is(option, found):
    message = refusal(load_config, [option])
    assert message.startswith(f"{option[2:].partition('=')[0].replace('-', '_')}: expected ") and found in message


def test_settings_are_checked_against_each_other(load):
    assert refusal(load, "num_iter: 50\n") == "num_warmup: expected at most num_iter (50), found 100"
    message = refusal(load, "batch_size: 8\ngradient_accumulation_steps: 3\n")
    assert message == "gradient_accumulation_steps: expected a divisor of batch_size (8), found 3"
    assert refusal(load, "keep_at: [60000, 5]\n") == "keep_at: expected at most num_iter (50000), found 60000"
    assert load("keep_at: [40000, 5]\n").keep_at == [5, 40000] and load_config(["--keep-at", "7"]).keep_at == [7]
    assert refusal(load, "best_metric: lpips\nlpips: false\n").startswith("best_metric: lpips is measured where lpips is true")
    for other in ("mixed_precision: bf16_copy", "mixed_precision: fp16", "optimizer: AdamW8bit", "torch_compile: true"):
        name = other.partition(":")[0]
        assert refusal(load, f"fsdp: true\n{other}\n").startswith(f"fsdp: true is not available with {name}: ")
    assert load("fsdp: true\nmixed_precision: bf16\n").fsdp


@pytest.mark.parametrize("key", ["accelerator_path", "pretrained_model_name_or_path", "work_dir"])
def test_placeholders_are_named(load, key):
    assert refusal(load, f"{key}: /path/to/it\n").startswith(f"{key}: '/path/to/it' is a placeholder")
    assert refusal(load_config, [f"--{key}", "/path/to/it"]).startswith(f"{key}: '/path/to/it' is a placeholder")


# -------------------------------------------------------------------------------------------------- keys that do not exist
@pytest.mark.parametrize("wrong, right", [("batchsize", "batch_size"), ("mixed-precision", "mixed_precision")])
def test_an_unknown_key_is_answered_with_the_nearest(load, wrong, right):
    assert "--help lists all keys" in refusal(load, "1: 2\n")
    message = refusal(load, f"{wrong}: 5\n")
    assert f"unknown key {wrong!r} in " in message and "run.yaml" in message and f"did you mean {right!r}?" in message
    if wrong.replace("-", "_") != right:  # which on the command line is right
        for argv in ([f"--{wrong}", "5"], [f"--{wrong}=5"]):
            message = refusal(load_config, argv)
            assert "unknown key" in message and "command line" in message and f"did you mean {right!r}?" in message


@pytest.mark.parametrize(
    "argv, words",
    [
        (["stray"], "unexpected 'stray'"), (["--seed", "1", "stray"], "unexpected 'stray'"), (["-x", "1"], "unexpected '-x'"),
        (["--train-feeder-args.crop_size"], "expected a value"), (["--train-feeder-args.", "1"], "train_feeder_args"),
        (["--optimizer.lr", "1"], "optimizer holds no names"), (["--optimiser.lr", "1"], "did you mean 'optimizer'"),
        (["--train-feeder-args", "{a: 1"], "no valid inline YAML"), (["--batch-size"], "--batch_size: expected one argument"),
        (["--seed_", "1"], "unknown key 'seed_'"), (["--feede", "x.Y"], "unknown key 'feede'"),
        (["--zzzzzz", "1"], "--help lists all keys"),
        (["--seed", "--num-iter", "200"], "--seed: expected one argument"),
        (["--config"], "--config: expected one argument"),
    ],
)  # fmt: skip
def test_a_malformed_command_line_is_one_line(argv, words):
    message = refusal(load_config, argv)
    assert words in message and "\n" not in message


# ------------------------------------------------------------------------------------------------------------- YAML itself
@pytest.mark.parametrize(
    "content, words",
    [
        ("seed: 1\nbatch_size: 4\nseed: 2\n", "line 1: key 'seed' stands twice"),
        ("train_feeder_args:\n  a: 1\n  a: 2\n", "line 2: key 'a' stands twice"),
        ("", "holds nothing"), ("# only a comment\n", "holds nothing"), ("- seed\n- 1\n", "holds no mapping"),
        ("just text\n", "holds no mapping"),
        ("seed: 1\n\tbatch_size: 4\n", "line 2"), ("train_feeder_args:\n\ta: 1\n", "line 2"),
        ("seed: [1\n", "line 2"),
        ("work_dir: caf\u00e9".encode("latin-1"), "is not UTF-8 text"), (b"\xff\xfes\x00", "is not UTF-8"),
        ("seed: 1\0\n", "special characters are not allowed"), ("seed: *nowhere\n", "undefined alias"),
        ("work_dir: 2024-02-30\n", "day is out of range"),
        ("seed: 1\n---\nseed: 2\n", "line 2"), ("? [a]\n: 1\n", "unhashable"),
        ("train_feeder_args: &a {b: *a}\n", "recursive"),
    ],
)  # fmt: skip
def test_a_yaml_that_cannot_be_read_is_refused(load, content, words):
    message = refusal(load, content)
    assert message.startswith("--config: ") and "run.yaml" in message and words in message


def test_a_config_that_is_not_there_is_refused(tmp_path):
    for path in (tmp_path / "nothing.yaml", tmp_path):
        assert f"--config: cannot read {path}" in refusal(load_config, ["--config", str(path)])


def test_merge_keys_in_a_chain_are_no_duplicates(load):
    """Keys of several letters: PyYAML 6.0.4 takes equal letters of two mappings for one key that was merged twice."""
    config = load("test_feeder_args: {x: &a {key: 1}, y: &b {<<: *a, key: 2, other: 3}, <<: *b}\n")
    assert config.test_feeder_args == {"key": 2, "other": 3, "x": {"key": 1}, "y": {"key": 2, "other": 3}}


@pytest.mark.parametrize("tag", ["!!python/object/apply:os.system", "!!python/name:os.system"])
def test_yaml_never_makes_objects(load, tmp_path, tag):
    written = f"{tag} ['touch {tmp_path / 'executed'}']"
    assert "could not determine a constructor" in refusal(load, f"work_dir: {written}\n")
    assert load_config(["--train-feeder-args.a", written]).train_feeder_args == {"a": written}  # plain text
    for option in ("--learning-rate", "--train-feeder-args"):
        refusal(load_config, [option, written])
    assert not (tmp_path / "executed").exists()


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(st.dictionaries(st.text(min_size=1, max_size=6), PLAIN, max_size=4), st.booleans())
def test_any_feeder_arguments_come_back_as_they_were_written(tmp_path_factory, arguments, flow):
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    written = yaml.safe_dump({"test_feeder_args": arguments}, default_flow_style=flow)
    file.write_bytes(written.encode())
    try:
        assert load_config(["--config", str(file)]).test_feeder_args == arguments
    except UserError as error:  # of all text, this alone is refused
        assert "/path/to" in str(arguments) and "placeholder" in str(error)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(KNOBS)), PLAIN)
def test_any_value_is_taken_or_refused_by_name(tmp_path_factory, name, value):
    file = tmp_path_factory.mktemp("yaml") / "run.yaml"
    file.write_text(yaml.safe_dump({name: value}))
    try:
        config = load_config(["--config", str(file)])
    except UserError as error:
        assert name in str(error) or "gradient_accumulation_steps" in str(error) or "num_warmup" in str(error)
        assert "\n" not in str(error)
    else:
        again = getattr(config, name)
        assert KNOBS[name].metadata["kind"](again) == again


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(load):
    assert load(b"\xef\xbb\xbfseed: 7\r\nbatch_size: 4\r\n").seed == 7


# --------------------------------------------------------------------------------------------------------------- the help
def test_help_is_grouped_names_every_key_with_its_default_and_ends_well(capsys):
    with pytest.raises(SystemExit) as ended:
        load_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert ended.value.code == 0
    groups = [knob.metadata["group"] for knob in KNOBS.values() if knob.metadata["group"]]
    assert len(groups) == 8 and all(f"{group}: --" in text for group in groups)
    for name, knob in KNOBS.items():
        names = dict.fromkeys((f"--{name.replace('_', '-')}", f"--{name}"))  # in the same order every time
        shown = ", ".join(f"{option} VALUE" for option in names), ", ".join(names) + " VALUE"  # the latter from Python 3.13 on
        assert any(form in text for form in shown) and " ".join(knob.metadata["help"].split()) in text, name
    assert "[3e-05]" in text and "[50000]" in text and "[null]" in text and "crop_size 256" in text


def test_main_prints_a_mistake_as_one_line_and_ends_with_2():
    command = [sys.executable, "main.py", "--batchsize", "4"]
    ended = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=120)
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr == "error: unknown key 'batchsize' on the command line, did you mean 'batch_size'?\n"


def test_placeholders_of_a_feeder_that_is_not_read_do_not_matter(tmp_path):
    written = tmp_path / "run.yaml"
    written.write_text("train_feeder_args: {dataroot: /path/to/data}\ntest_feeder_args: {dataroot: data}\n")
    assert load_config(["--config", str(written), "--phase", "test"]).phase == "test"
    with pytest.raises(UserError, match="train_feeder_args.dataroot"):
        load_config(["--config", str(written)])
