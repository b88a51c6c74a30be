"""Training through main.py: both stages, resume, accumulation, several processes, validation, and what is refused."""

import csv
import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F
import yaml
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from safetensors.torch import load_file, save_file
from test_config import RELEASED as RELEASED_KEYS
from torch.utils._python_dispatch import TorchDispatchMode
from torchmetrics.functional.image import peak_signal_noise_ratio
from training import (
    BATCH,
    WEIGHTS,
    assert_same_run,
    launch,
    meta_of,
    same,
    scalars,
    spoil,
    stopping_at,
    train_lines,
    val_lines,
    weights_of,
)
from transformers import CLIPTextModel, CLIPTokenizer

import evaluate
import main
import test as test_py
import train
import utils
from cdiffset import errors
from cdiffset.checkpoint import PROMPT_FILE, PROMPT_TENSOR
from cdiffset.config import KNOBS, Config, load_config
from cdiffset.errors import UserError
from cdiffset.images import read_sar
from cdiffset.model import embed_prompt, load_base_unet, patch_conv_in, patch_conv_out
from cdiffset.pipeline import image_noise, translate
from cdiffset.training import batches as batches_module
from cdiffset.training import logs, validation
from cdiffset.training import weights as weights_module
from cdiffset.training.batches import ResumableBatchSampler
from cdiffset.training.processes import make_accelerator
from cdiffset.training.weights import TrainedWeights, flat
from train import Trainer

REPO = Path(__file__).parents[1]
PAIRS, TEST_PAIRS = 12, 5
PROMPT = "electro-optical image"


@pytest.fixture
def build(argv, tmp_path):
    """A Trainer that has not begun."""
    return lambda work_dir=tmp_path / "built", **changes: Trainer(load_config(argv(work_dir, **changes)))


@pytest.fixture(scope="session")
def few_pairs(pair_folders, tmp_path_factory) -> dict:
    """Feeder arguments for two pairs, always cropped alike."""
    root = tmp_path_factory.mktemp("few")
    for kind in ("sar", "eo"):
        (root / kind).mkdir()
        for name in ("0.png", "1.png"):
            shutil.copy(pair_folders / "train" / kind / name, root / kind)
    return {"sar_dir": str(root / "sar"), "eo_dir": str(root / "eo"), "split": "test", "crop_size": 32}


def deviation(a: dict, b: dict, base: str) -> float:
    """How far apart two trainings ended, relative to how far they went from `base`, over all weights.

    Not the largest difference: Adam's first steps divide rounding errors by gradients that are all but zero.
    """
    start = patch_conv_in(load_base_unet(base))
    start = (patch_conv_out(start) if len(a["conv_out.bias"]) == 5 else start).state_dict()
    assert a.keys() == b.keys() == start.keys()
    apart, moved = (torch.cat([(a[name] - other[name]).flatten() for name in a]).norm().item() for other in (b, start))
    assert moved > 0.01
    return apart / moved


# ------------------------------------------------------------------------------------------------------------ both stages
@pytest.fixture(scope="module")
def stages(run, tmp_path_factory) -> tuple[Path, Path]:
    """Stage 1 of two epochs, and stage 2 from its best."""
    root = tmp_path_factory.mktemp("stages")
    settings = {"num_iter": 6, "save_iter": 2, "save_epoch": 1, "eval_epoch": 1, "checkpoints_total_limit": None}
    settings |= {"ema_decay": 0.9, "report_to": "tensorboard"}
    first = run(root / "one", **settings)
    return first, run(root / "two", **settings, confidence=True, accelerator_path=root / "one" / "best")


@pytest.mark.parametrize("stage, outputs", [(0, 4), (1, 5)])
def test_a_stage_leaves_checkpoints_that_plain_diffusers_loads(stages, stage, outputs):
    folders = {path.parent for path in stages[stage].glob("*/checkpoint.json")}
    names = {"checkpoint-2", "checkpoint-4", "checkpoint-6", "epoch-1", "epoch-2", "best", "latest"}
    assert {folder.name for folder in folders} == names
    latent = torch.zeros(1, 8, 8, 8)
    for folder in folders:
        for kind in ("unet", "unet_ema"):
            unet = UNet2DConditionModel.from_pretrained(folder / kind)
            assert (unet.config.in_channels, unet.config.out_channels) == (8, outputs)
            assert unet(latent, 0, torch.zeros(1, 3, 64)).sample.shape == (1, outputs, 8, 8)
    expected = {"checkpoint-2": 2, "epoch-1": 3, "checkpoint-4": 4, "checkpoint-6": 6, "epoch-2": 6, "latest": 6}
    assert {name: meta_of(stages[stage] / name)["iteration"] for name in expected} == expected
    two, six = (weights_of(stages[stage] / name / "unet") for name in ("checkpoint-2", "checkpoint-6"))
    assert not same(two, six) and same(six, weights_of(stages[stage] / "latest" / "unet"))
    assert not same(six, weights_of(stages[stage] / "latest" / "unet_ema"))


def test_a_checkpoint_holds_the_embedding_of_its_prompt(stages, tiny_base):
    saved = load_file(stages[1] / "latest" / PROMPT_FILE)[PROMPT_TENSOR]
    assert torch.equal(saved, embed_prompt(tiny_base, PROMPT))


def test_a_checkpoint_records_what_its_training_images_were(stages, pair_folders):
    meta = meta_of(stages[1] / "latest")
    files = sorted((pair_folders / "train/sar").iterdir())
    pixels = np.stack([np.array(Image.open(file)) for file in files])
    assert meta["sar_statistics"] == {
        "images": 12, "dtype": "uint8", "limits": [np.percentile(pixels, (1, 99)).tolist()],
        "pixels": np.percentile(pixels, (5, 50, 95)).tolist(),
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1])
def test_logs_and_tensorboard_hold_the_same_numbers(stages, stage):
    rows, board = train_lines(stages[stage]), scalars(stages[stage])
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["epoch"] for row in rows] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2], abs=0.006)
    sigma2 = {f"sigma2_t{name}%" for name in ("0-25", "25-50", "50-75", "75-100")}
    assert {tag for tag in board if tag.startswith("train/")} == {
        f"train/{name}" for name in {"loss", "lr", "grad_norm", "images_per_s"} | (sigma2 if stage else set())
    }
    for row in rows:
        logged = {name: value for name, value in row.items() if name not in ("iteration", "epoch")}
        on_board = {tag[6:]: values[row["iteration"]] for tag, values in board.items() if row["iteration"] in values}
        assert logged == pytest.approx({name: on_board[name] for name in logged}, rel=1e-3)
        assert row["loss"] > 0 and row["grad_norm"] > 0 and row["images_per_s"] > 0
    validations = val_lines(stages[stage])
    assert [row["iteration"] for row in validations] == [3, 6] and {row["n"] for row in validations} == {TEST_PAIRS}
    for row in validations:
        for name in ("standard/psnr", "standard/ssim", "standard/scc", "paper/psnr"):
            assert row[name] == pytest.approx(board[f"val/{name}"][row["iteration"]], abs=1e-4)
    assert max(row["standard/psnr"] for row in validations) == pytest.approx(
        meta_of(stages[stage] / "latest")["best"]["psnr"], abs=1e-4
    )


def test_wandb_gets_the_scalars_and_a_resumed_run_goes_on_in_its_own(argv, tmp_path):
    pytest.importorskip("wandb")
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "OMP_NUM_THREADS": "1"}
    for iterations, more in ((1, {}), (2, {"resume": "latest"})):
        command = [sys.executable, "main.py", *argv(tmp_path / "run", num_iter=iterations, report_to="wandb", **more)]
        done = subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    records = list((tmp_path / "run/wandb").glob("offline-run-*/run-*.wandb"))
    assert len(records) == 2 and len({file.stem for file in records}) == 1  # two processes, one run
    for file in records:
        written = file.read_bytes()
        assert all(name in written for name in (b"train/loss", b"val/standard/psnr", b"learning_rate", b"c-diffset"))
    assert not (tmp_path / "run/tensorboard").exists()


def test_wandb_that_is_not_installed_is_one_line(argv, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.setattr("cdiffset.training.processes.find_spec", lambda name: None)
    with pytest.raises(
        UserError, match="^report_to: wandb is not installed: pip install wandb, or take report_to: tensorboard$"
    ):
        main.main(argv(tmp_path / "run", report_to="wandb"))
    assert not (tmp_path / "run").exists()


def test_wandb_that_cannot_start_is_one_line(argv, tmp_path, monkeypatch, capsys):
    def refuse(*arguments, **options):
        raise RuntimeError("No API key configured.\nmore")

    monkeypatch.setattr("accelerate.Accelerator.init_trackers", refuse)
    monkeypatch.setattr("cdiffset.training.processes.find_spec", lambda name: name)
    assert errors.run(main.main, argv(tmp_path / "run", report_to="wandb")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: report_to: wandb cannot start (No API key configured.): `wandb login` first")


@pytest.mark.parametrize("stage, pictures", [(0, 3), (1, 4)])
def test_every_validation_leaves_a_picture_of_each_pair(stages, pair_folders, stage, pictures):
    """SAR, EO and generated EO side by side, with the confidence in stage 2."""
    folder = stages[stage] / "results"
    assert {path.name for path in folder.iterdir()} == {"iteration-000003", "iteration-000006"}
    assert all(len(list(validation.iterdir())) == TEST_PAIRS for validation in folder.iterdir())
    for path in (folder / "iteration-000006").iterdir():
        panel = np.array(Image.open(path))
        header = panel.shape[0] - 32
        assert panel.shape[1:] == (pictures * 32 + (pictures - 1) * 4, 3) and 0 < header < 32
        for place, kind in enumerate(("sar", "eo")):
            pixels = np.array(Image.open(pair_folders / "test" / kind / path.name).convert("RGB"))[4:36, 4:36]
            assert np.array_equal(panel[header:, place * 36 : place * 36 + 32], pixels)
        if stage:
            confidence = panel[header:, 108:]
            assert np.ptp(confidence) > 100 and (confidence == confidence[..., :1]).all()


def test_overfitting_two_pairs_brings_the_loss_down(run, few_pairs, tmp_path):
    """A list shorter than the batch gives short batches, and the U-Net learns them."""
    work_dir = run(tmp_path, train_feeder_args=few_pairs, num_iter=60, learning_rate=4e-3, lr_scheduler="constant")
    losses = [row["loss"] for row in train_lines(work_dir)]
    assert len(losses) == 60 and np.mean(losses[-20:]) < 0.85 * np.mean(losses[:5])


def test_validation_and_saving_do_not_count_in_images_per_s(run, tmp_path, monkeypatch):
    """On a clock by which a step takes a second, a validation or a save a hundred."""
    now = [0.0]

    def takes(owner: type, name: str, seconds: float):
        method = getattr(owner, name)

        def timed(self, *args):
            now[0] += seconds
            return method(self, *args)

        monkeypatch.setattr(owner, name, timed)

    clock = SimpleNamespace(monotonic=lambda: now[0])
    monkeypatch.setattr(train, "time", clock), monkeypatch.setattr(logs, "time", clock)
    takes(Trainer, "step", 1), takes(Trainer, "save", 100), takes(validation.Validator, "rows", 100)
    run(tmp_path, num_iter=8, log_iter=4, eval_epoch=1, save_iter=5)
    assert [row["images_per_s"] for row in train_lines(tmp_path)] == [BATCH, BATCH] and now[0] > 500


# ---------------------------------------------------------------------------------------------- one step, by other means
def by_hand(trainer: Trainer, base: str, iterations: int):
    """The same training in plain torch => (weights, EMA weights, losses, σ² by timestep quarter of the last iteration).

    It shares the trainer's feeder, order and random draws, and nothing else.
    """
    config = trainer.config
    vae = AutoencoderKL.from_pretrained(base, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(base, subfolder="unet").train()
    old = unet.conv_in
    unet.conv_in = torch.nn.Conv2d(8, old.out_channels, 3, padding=1)
    unet.conv_in.weight.data = torch.cat([old.weight.data, old.weight.data], dim=1) / 2
    unet.conv_in.bias.data = old.bias.data
    if config.confidence:
        old = unet.conv_out
        unet.conv_out = torch.nn.Conv2d(old.in_channels, 5, 3, padding=1)
        unet.conv_out.weight.data = F.pad(old.weight.data, (0, 0, 0, 0, 0, 0, 0, 1))
        unet.conv_out.bias.data = F.pad(old.bias.data, (0, 1))
    tokens = CLIPTokenizer.from_pretrained(base, subfolder="tokenizer")(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        prompt = CLIPTextModel.from_pretrained(base, subfolder="text_encoder", dtype=torch.float32)(tokens).last_hidden_state
    alpha_bar = torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2, 0)
    optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=config.weight_decay)
    average, losses = [parameter.detach().clone() for parameter in unet.parameters()], []
    keys = iter(ResumableBatchSampler(len(trainer.train_feeder), config, 0, 0, 1))
    for iteration in range(iterations):
        items = [trainer.train_feeder[key] for key in next(keys)]
        with torch.no_grad():
            sar, eo = (
                vae.encode(torch.stack([item[kind] for item in items])).latent_dist.mean * vae.config.scaling_factor
                for kind in ("sar", "eo")
            )
        trainer.state.iteration = iteration
        noise, timesteps = trainer.draw_noise(eo.shape[1:])
        a = alpha_bar[timesteps][:, None, None, None]
        output = unet(torch.cat([sar, a.sqrt() * eo + (1 - a).sqrt() * noise], 1), timesteps, prompt.repeat(BATCH, 1, 1)).sample
        target = {"epsilon": noise, "sample": eo, "v_prediction": a.sqrt() * noise - (1 - a).sqrt() * eo}
        error2, quarters = (output[:, :4] - target[config.prediction_type]) ** 2, {}
        if config.confidence:
            sigma2 = (torch.log1p(torch.exp(output[:, 4:] + math.log(math.e - 1))) + 1e-6).clamp(1e-6, 10)
            beta = a.sqrt() if config.beta == "timestep" else config.beta
            loss = (sigma2.detach() ** beta * 0.5 * (error2 / sigma2 + sigma2.log() + math.log(2 * math.pi))).mean()
            for t, mean in zip(timesteps.tolist(), sigma2.mean((1, 2, 3)).tolist(), strict=True):
                quarters.setdefault(t // 250, []).append(mean)
        else:
            loss = error2.mean()
        optimizer.zero_grad()
        loss.backward()
        if config.max_grad_norm:
            total = math.sqrt(sum(parameter.grad.pow(2).sum().item() for parameter in unet.parameters()))
            assert total > config.max_grad_norm  # so that clipping shows
            for parameter in unet.parameters():
                parameter.grad *= config.max_grad_norm / total
        warm = iteration / config.num_warmup if iteration < config.num_warmup else 1
        progress = max(0, iteration - config.num_warmup) / (config.num_iter - config.num_warmup)
        optimizer.param_groups[0]["lr"] = config.learning_rate * warm * (1 + math.cos(math.pi * progress)) / 2
        optimizer.step()
        decay = min(config.ema_decay, (1 + iteration) / (10 + iteration))
        average = [decay * old + (1 - decay) * new.detach() for old, new in zip(average, unet.parameters(), strict=True)]
        losses.append(loss.item())
    names = [name for name, _ in unet.named_parameters()]
    return unet.state_dict(), dict(zip(names, average, strict=True)), losses, {q: np.mean(v) for q, v in quarters.items()}


@pytest.mark.parametrize(
    "changes",
    [
        {"max_grad_norm": 0.5},
        {"confidence": True, "num_warmup": 2},
        {"confidence": True, "beta": 0.5, "prediction_type": "sample"},
        {"confidence": True, "beta": 0, "prediction_type": "v_prediction", "weight_decay": 0.5},
    ],
    ids=lambda changes: " ".join(changes),
)
def test_training_equals_an_independent_computation(run, build, tiny_base, tmp_path, changes):
    settings = {"num_iter": 4, "ema_decay": 0.3, "report_to": "tensorboard", **changes}
    work_dir = run(tmp_path / "run", **settings)
    weights, average, losses, quarters = by_hand(build(**settings), tiny_base, 4)
    assert deviation(weights_of(work_dir / "latest" / "unet"), weights, tiny_base) < 1e-3
    assert deviation(weights_of(work_dir / "latest" / "unet_ema"), average, tiny_base) < 1e-3
    board = scalars(work_dir)
    assert list(board["train/loss"].values()) == pytest.approx(losses, rel=1e-4)
    names = ("0-25", "25-50", "50-75", "75-100")
    logged = {q: board[f"train/sigma2_t{n}%"][4] for q, n in enumerate(names) if 4 in board.get(f"train/sigma2_t{n}%", {})}
    assert logged == pytest.approx(quarters, rel=1e-4) and bool(quarters) == settings.get("confidence", False)


@pytest.mark.parametrize(
    "changes",
    [
        {"gradient_accumulation_steps": 2, "gradient_checkpointing": True},
        {"gradient_accumulation_steps": 4, "num_worker": 2},
    ],
    ids=str,
)
def test_how_a_batch_is_worked_through_does_not_change_what_is_learnt(run, whole_batches, tiny_base, tmp_path, changes):
    assert_alike(run(tmp_path, **PLAIN, **changes), whole_batches, tiny_base)


PLAIN = {"confidence": True, "ema_decay": 0.9, "max_grad_norm": 0.3}


@pytest.fixture(scope="module")
def whole_batches(run, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("whole"), **PLAIN)


def assert_alike(mine: Path, expected: Path, base: str) -> None:
    """But for rounding: weights, average, and what is logged, once, over the shares of all processes."""
    for kind in ("unet", "unet_ema"):
        assert deviation(weights_of(mine / "latest" / kind), weights_of(expected / "latest" / kind), base) < 1e-3
    for row, reference in zip(train_lines(mine), train_lines(expected), strict=True):
        for name in ("loss", "grad_norm", *(name for name in reference if "sigma2" in name)):
            assert row[name] == pytest.approx(reference[name], rel=2e-3)
        assert row.keys() == reference.keys() and row["grad_norm"] > 0.3  # so that clipping shows
    (row,), (reference,) = val_lines(mine), val_lines(expected)
    assert row["n"] == TEST_PAIRS and row["standard/psnr"] == pytest.approx(reference["standard/psnr"], abs=0.01)


@pytest.mark.parametrize("precision", ["bf16", "bf16_copy"])
def test_bf16_keeps_float32_weights(run, whole_batches, tmp_path, precision):
    other = run(tmp_path, **PLAIN, mixed_precision=precision)
    weights = weights_of(other / "latest" / "unet")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in weights.values())
    for row, expected in zip(train_lines(other), train_lines(whole_batches), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=0.02)
        assert row["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    assert not same(weights, weights_of(whole_batches / "latest" / "unet"))  # computed in another precision
    assert val_lines(other)[0]["standard/psnr"] == pytest.approx(val_lines(whole_batches)[0]["standard/psnr"], abs=0.3)


def test_a_bfloat16_copy_is_what_computes_and_float32_is_what_is_trained(build):
    trainer = build(mixed_precision="bf16_copy", num_iter=2)
    before = [parameter.detach().clone() for parameter in trainer.weights.parameters]
    trainer.run()
    copies = list(trainer.accelerator.unwrap_model(trainer.weights.network).parameters())
    for parameter, copy in zip(trainer.weights.parameters, copies, strict=True):
        assert (parameter.dtype, copy.dtype) == (torch.float32, torch.bfloat16) and parameter.grad is None and copy.grad is None
        assert torch.equal(copy, parameter.bfloat16())
    assert sum(not torch.equal(*pair) for pair in zip(trainer.weights.parameters, before, strict=True)) > 100


def test_a_compiled_unet_learns_the_same(run, whole_batches, tiny_base, tmp_path, monkeypatch):
    """Traced, but not translated into C++, which would take minutes."""
    compile_module, compiled = torch.nn.Module.compile, []

    def traced(self):
        compiled.append(type(self).__name__)
        compile_module(self, backend="eager")

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    assert_alike(run(tmp_path, **PLAIN, torch_compile=True), whole_batches, tiny_base)
    assert compiled == ["UNet2DConditionModel"]


def test_compiling_without_a_compiler_is_refused(argv, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="torch_compile: found no C"):
        main.main(argv(tmp_path, torch_compile=True))


@pytest.mark.parametrize("tf32, expected", [(False, "ieee"), (True, "tf32")])
def test_tf32_is_as_the_configuration_says(build, tf32, expected):
    build(tf32=tf32)
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == expected


# --------------------------------------------------------------------------------------- what a GPU is not made to wait for
class Reads(TorchDispatchMode):
    """Counts the values that are fetched from the device by operators; `tolist` is none."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return function(*args, **kwargs or {})


@pytest.mark.parametrize("precision", ["no", "bf16_copy"])
def test_a_step_fetches_one_flag_from_the_device(build, monkeypatch, precision):
    """Whether its gradient is finite: a GPU is waited for once a step."""
    trainer = build(confidence=True, ema_decay=0.9, max_grad_norm=0.5, mixed_precision=precision)
    batches = trainer.batches()
    first, tolist, lists = next(batches), torch.Tensor.tolist, []
    monkeypatch.setattr(torch.Tensor, "tolist", lambda self: lists.append(self) or tolist(self))
    with Reads() as reads:
        trainer.step(iter([first]))
        assert reads.count == 1 and not lists
        assert trainer.window.loss.item() > 0 and reads.count == 2  # so that the count can be trusted


@pytest.mark.parametrize("precision, optimizer", [("no", "AdamW"), ("bf16_copy", "AdamW"), ("bf16_copy", "AdamW8bit")])
def test_a_step_that_is_not_finite_changes_nothing(build, monkeypatch, precision, optimizer):
    """Of two such steps one is left out, and the other ends the run."""
    if optimizer == "AdamW8bit":
        pytest.importorskip("bitsandbytes")
    settings = {"num_iter": 6, "log_iter": 6, "ema_decay": 0.9, "mixed_precision": precision, "skip_nonfinite": 1}
    spoil(monkeypatch, 2, 4)
    trainer, step, states = build(**settings, optimizer=optimizer), Trainer.step, []

    def watched(self, batches):
        states.append([copy.detach().clone() for copy in (*self.weights.parameters, *self.weights.average.parameters())])
        step(self, batches)

    monkeypatch.setattr(Trainer, "step", watched)
    with pytest.raises(UserError, match="iteration 5: the gradient norm is nan and .*weights are as before"):
        trainer.run()
    final = [*trainer.weights.parameters, *trainer.weights.average.parameters()]
    assert len(states) == 5 and same(final, states[4]) and same(states[3], states[2])
    assert not same(states[2], states[1]) and not same(states[4], states[3])
    assert "step left out (1 of 1): iteration 3: " in (trainer.folder.path / "train_log.txt").read_text()


@pytest.mark.parametrize("spoilt", ["loss", "gradient"])
def test_a_scaler_leaves_out_what_overflows_and_adapts(build, monkeypatch, spoilt):
    """As under fp16: an infinite loss counts as a step left out, a gradient that overflows alone does not."""

    def with_scaler(config):
        accelerator = make_accelerator(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        unscale = accelerator.scaler.unscale_
        accelerator.unscale_gradients = lambda: [unscale(prepared.optimizer) for prepared in accelerator._optimizers]
        return accelerator

    monkeypatch.setattr(train, "make_accelerator", with_scaler)
    trainer, encode = build(num_iter=3, ema_decay=0.9, skip_nonfinite=1, save_iter=3), train.encode
    weights, norm, step, states = trainer.weights, TrainedWeights.gradient_norm, Trainer.step, []

    def overflowing(self):
        self.parameters[0].grad.fill_(math.inf)
        return norm(self)

    def watched(self, batches):
        now = self.state.iteration == 1
        factor = math.inf if now and spoilt == "loss" else 1
        monkeypatch.setattr(train, "encode", lambda vae, pixels: encode(vae, pixels) * factor)
        states.append([value.detach().clone() for value in (*weights.parameters, *weights.average.parameters())])
        if now and spoilt == "gradient":
            monkeypatch.setattr(TrainedWeights, "gradient_norm", overflowing)
        step(self, batches)
        monkeypatch.setattr(TrainedWeights, "gradient_norm", norm)

    monkeypatch.setattr(Trainer, "step", watched)
    trainer.run()
    count = len(weights.parameters)
    assert same(states[2][:count], states[1][:count]) and not same(states[1][:count], states[0][:count])
    assert same(states[2][count:], states[1][count:]) == (spoilt == "loss")  # the average moves on towards the same weights
    assert trainer.state.skipped == (spoilt == "loss") and not same(list(weights.parameters), states[2][:count])
    assert trainer.accelerator.scaler.get_scale() == 4.0
    resumed = build(num_iter=6, ema_decay=0.9, skip_nonfinite=1, resume="latest")
    assert resumed.state.iteration == 3 and resumed.accelerator.scaler.get_scale() == 4.0


# ---------------------------------------------------------------------------------------------------------------- resume
BEGUN = {"num_iter": 2, "save_iter": 1, "confidence": True}
RESUMED = {"num_iter": 7, "save_iter": 2, "eval_epoch": 1, "ema_decay": 0.9, "confidence": True, "report_to": "tensorboard"}


@pytest.fixture(scope="module")
def uninterrupted(run, tmp_path_factory):
    """{accumulation steps: the work_dir of a run in one go}."""
    root = tmp_path_factory.mktemp("uninterrupted")
    return {steps: run(root / str(steps), **RESUMED, gradient_accumulation_steps=steps) for steps in (1, 2)}


@pytest.mark.parametrize(
    "stop, kept, changes",
    [
        (3, 3, {"save_epoch": 1}),  # right after an epoch and its validation
        (5, 4, {"num_worker": 2}),  # in mid-epoch, with an iteration to repeat
        (5, 4, {"gradient_accumulation_steps": 2}),
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(argv, uninterrupted, tmp_path, stop, kept, changes):
    """Bit for bit: weights, average, optimizer, schedule, best PSNR, every logged loss and validation."""
    command = argv(tmp_path, **RESUMED, **changes)
    with stopping_at(stop):
        assert errors.run(main.main, command) == 130
    assert meta_of(tmp_path / "latest")["iteration"] == kept
    assert main.main(command) == 0  # the same command again
    whole = uninterrupted[changes.get("gradient_accumulation_steps", 1)]
    assert_same_run(tmp_path, whole)
    mine, theirs = scalars(tmp_path), scalars(whole)
    assert len(mine["train/loss"]) == 7 and mine.keys() == theirs.keys()
    assert all(mine[tag] == theirs[tag] for tag in theirs if tag != "train/images_per_s")
    log = (tmp_path / "train_log.txt").read_text()
    assert re.search(rf"resumed from {tmp_path}/(checkpoint-{kept}|latest at iteration {kept})", log)


@pytest.mark.parametrize("precision", ["bf16_copy", "bf16"])
def test_other_ways_of_computing_resume_bit_for_bit(run, tmp_path, precision):
    settings = {"num_iter": 4, "save_iter": 2, "ema_decay": 0.9, "confidence": True, "mixed_precision": precision}
    whole = run(tmp_path / "whole", **settings)
    stopped = shutil.copytree(whole, tmp_path / "stopped", ignore=shutil.ignore_patterns("latest", "best", "checkpoint-4"))
    assert_same_run(run(stopped, **settings), whole)
    assert "at iteration 2" in (stopped / "train_log.txt").read_text()


@pytest.fixture(scope="module")
def finished(run, tmp_path_factory) -> Path:
    """A finished run of two iterations, with checkpoint-1 and checkpoint-2."""
    return run(tmp_path_factory.mktemp("finished"), **BEGUN)


@pytest.fixture
def begun(finished, tmp_path) -> Path:
    return shutil.copytree(finished, tmp_path / "begun")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"learning_rate": 2e-3}, "learning_rate: 0.001 -> 0.002"),
        ({"num_iter": 3}, "num_iter: 2 -> 3"),
        ({"prompt": "radar"}, f"prompt: {PROMPT} -> radar"),
        ({"confidence": False}, "confidence: True -> False"),
        ({"train-feeder-args.crop_size": 24}, "train_feeder_args.crop_size: 32 -> 24"),
    ],
)
def test_a_changed_setting_is_refused(argv, begun, changes, message):
    before = {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.name != ".lock"}
    words = [word for name, value in changes.items() for word in (f"--{name}", str(value).lower())]
    with pytest.raises(UserError, match=re.escape(f"work_dir: {begun} holds a run of other settings or data ({message})")):
        main.main([*argv(begun, **BEGUN), *words])
    assert {path: path.stat().st_mtime_ns for path in begun.rglob("*") if path.name != ".lock"} == before


def test_what_does_not_change_learning_may_change(run, begun):
    assert {name for name, knob in KNOBS.items() if not knob.metadata["may_change"]} == {
        "seed", "feeder", "train_feeder_args", "pretrained_model_name_or_path", "accelerator_path", "confidence", "prompt",
        "prediction_type", "beta", "optimizer", "learning_rate", "weight_decay", "lr_scheduler", "num_warmup", "num_iter",
        "batch_size", "max_grad_norm", "ema_decay", "mixed_precision", "tf32", "torch_compile",
        "lora_rank", "lora_alpha", "lora_targets",
    }  # fmt: skip
    free = {"num_worker": 1, "log_iter": 2, "save_iter": 0, "val_len": 2, "test_batch_size": 1, "gradient_checkpointing": True}
    run(begun, num_iter=2, confidence=True, **free)
    assert meta_of(begun / "latest")["iteration"] == 2


def test_a_setting_that_an_earlier_version_did_not_know_is_unchanged(build, tmp_path):
    trainer = build()
    settings = dataclasses.asdict(trainer.config) | {"learning_rate": 0.5}
    del settings["tf32"], settings["batch_size"]
    (tmp_path / "checkpoint.json").write_text(json.dumps({"config": settings}))
    assert set(trainer.folder.changed_settings(tmp_path)) == {"learning_rate: 0.5 -> 0.001", f"batch_size: 64 -> {BATCH}"}


def add_pair(root: Path) -> None:
    for kind in ("sar", "eo"):
        shutil.copy(root / kind / "0.png", root / kind / "99.png")


def rewrite_sar(root: Path) -> None:
    Image.open(root / "sar" / "3.png").save(root / "sar" / "3.bmp")
    (root / "sar" / "3.png").unlink()


@pytest.fixture
def with_data(run, pair_folders, tmp_path) -> Path:
    """A folder of a copy of the training pairs, data/, and a run of it, run/."""
    shutil.copytree(pair_folders / "train", tmp_path / "data")
    run(tmp_path / "run", num_iter=1, train_feeder_args=arguments_of(tmp_path / "data"))
    return tmp_path


def arguments_of(root: Path) -> dict:
    return {"sar_dir": str(root / "sar"), "eo_dir": str(root / "eo"), "split": "train", "crop_size": 32}


@pytest.mark.parametrize(
    "change, message",
    [
        (add_pair, "training data: 12 pairs -> 13 pairs"),
        (rewrite_sar, "training data: 12 pairs, but other files or order"),
    ],
)
def test_changed_data_is_refused_as_a_changed_setting_is(build, with_data, change, message):
    settings = {"num_iter": 1, "train_feeder_args": arguments_of(with_data / "data")}
    change(with_data / "data")
    with pytest.raises(UserError, match=re.escape(f"other settings or data ({message})")):
        build(with_data / "run", **settings)
    build(with_data / "run", **settings, resume="latest")
    assert f"changed since: {message}" in (with_data / "run" / "train_log.txt").read_text()


def test_data_that_moved_and_checkpoints_without_a_record_count_as_unchanged(build, with_data, tmp_path):
    latest = with_data / "run" / "latest"
    moved = build(train_feeder_args=arguments_of(Path(shutil.copytree(with_data / "data", tmp_path / "elsewhere" / "moved"))))
    assert moved.folder.data == meta_of(latest)["data"] and len(moved.folder.data["sha256"]) == 64
    assert all(line.startswith(("train_feeder_args.", "num_iter")) for line in moved.folder.changed_settings(latest))
    assert moved.folder.changed_data(None) == []


def test_a_list_in_another_order_is_other_data(build, pair_folders, tmp_path):
    records = []
    for names in ((0, 1, 2, 3), (1, 0, 2, 3)):
        (tmp_path / "list_train.csv").write_text("".join(f"sar/{name}.png,eo/{name}.png\n" for name in names))
        arguments = {"dataroot": str(pair_folders / "train"), "listroot": str(tmp_path / "list_train.csv"), "crop_size": 32}
        records.append(build(tmp_path / str(names), train_feeder_args=arguments).folder.data)
    assert records[0]["pairs"] == records[1]["pairs"] == 4 and records[0] != records[1]


@pytest.mark.parametrize("names, keys", [(None, {"pairs"}), (["a", "b"], {"pairs", "sha256"})])
def test_a_feeder_of_another_origin_is_known_by_its_names_or_its_length(names, keys):
    feeder = type("Feeder", (list,), {} if names is None else {"names": names})([0, 0])
    assert batches_module.data_record(feeder, {}).keys() == keys


def test_resume_latest_continues_with_changed_settings(build, begun):
    """What the command says now counts, from the first step on: learning rate, weight decay and length of the schedule."""
    best = meta_of(begun / "latest")["best"]["psnr"]
    trainer = build(begun, num_iter=4, confidence=True, resume="latest", learning_rate=2e-3, weight_decay=0.5)
    assert trainer.state.iteration == 2 and trainer.state.best == best > 0
    trainer.run()
    log = (begun / "train_log.txt").read_text()
    for line in ("num_iter: 2 -> 4", "learning_rate: 0.001 -> 0.002", "weight_decay: 0.01 -> 0.5"):
        assert f"changed since: {line}" in log
    rows = train_lines(begun)
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4]
    assert rows[2]["lr"] == pytest.approx(2e-3 * (1 + math.cos(math.pi * 2 / 4)) / 2, rel=1e-3)
    group = torch.load(begun / "latest" / "training_state.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert group["weight_decay"] == 0.5


def test_validation_takes_the_first_pairs_and_gives_the_unet_back_in_training_mode(build, monkeypatch):
    """Else gradient checkpointing and dropout would be off from the first validation on."""
    trainer, seen = build(val_len=2), []
    monkeypatch.setattr(validation, "translate", lambda unet, *rest: seen.append(unet.training) or translate(unet, *rest))
    trainer.validate()
    assert seen and not any(seen) and trainer.weights.network.training
    pictures = trainer.folder.path / "results" / "iteration-000000"
    assert sorted(path.name for path in pictures.iterdir()) == ["0.png", "1.png"]


def test_resume_from_a_folder(run, begun, tmp_path):
    other = run(tmp_path / "other", num_iter=2, confidence=True, resume=begun / "checkpoint-1")
    assert "at iteration 1" in (other / "train_log.txt").read_text()
    assert [row["iteration"] for row in train_lines(other)] == [2]
    assert same(weights_of(other / "latest" / "unet"), weights_of(begun / "latest" / "unet"))


def test_resume_null_and_latest_look_at_the_folder(argv, begun, tmp_path):
    with pytest.raises(UserError, match=f"resume: null starts afresh, but {begun} holds"):
        main.main(argv(begun, num_iter=2, confidence=True, resume=None))
    with pytest.raises(UserError, match=f"resume: latest, but {tmp_path / 'empty'} holds no checkpoint"):
        main.main(argv(tmp_path / "empty", resume="latest"))
    with pytest.raises(UserError, match="resume: .*nowhere lacks checkpoint.json"):
        main.main(argv(tmp_path / "empty", resume=tmp_path / "nowhere"))
    assert not (tmp_path / "empty").exists()


def test_stage_2_cannot_resume_stage_1(argv, stages, tmp_path):
    """That is what accelerator_path is for: the optimizer's state is of another shape."""
    for stage, message in ((0, "resume"), (1, "stage 1 .*expects 4 output channels")):
        with pytest.raises(UserError, match=message):
            main.main(argv(tmp_path / str(stage), num_iter=8, confidence=stage == 0, resume=stages[stage] / "latest"))


def test_an_optimizer_cannot_resume_another(argv, run, begun, tmp_path, monkeypatch):
    monkeypatch.setitem(weights_module.FIRST_MOMENT, "Adam", "state1")
    with pytest.raises(UserError, match="resume: the optimizer state of .* does not fit .*: it is not of Adam"):
        main.main(argv(begun, num_iter=4, confidence=True, resume="latest", optimizer="Adam"))


def test_eight_bit_moments_need_their_library(argv, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(UserError, match="optimizer: AdamW8bit .*pip install -r requirements-extra.txt"):
        main.main(argv(tmp_path, num_iter=1, optimizer="AdamW8bit"))


@pytest.mark.parametrize("precision", ["no", "bf16_copy"])
def test_eight_bit_moments_train_alike_and_resume_exactly(run, tmp_path, precision):
    """Against moments of 32 bits; stopped and continued against in one go."""
    pytest.importorskip("bitsandbytes")
    settings = {"num_iter": 6, "confidence": True, "mixed_precision": precision}
    expected = train_lines(run(tmp_path / "plain", **settings))
    folders = [run(tmp_path / "eight", **settings, optimizer="AdamW8bit", save_iter=3), tmp_path / "resumed"]
    assert [row["loss"] for row in train_lines(folders[0])] == pytest.approx([row["loss"] for row in expected], rel=0.02)
    states = torch.load(folders[0] / "latest" / "training_state.pt", weights_only=True)["optimizer"]["state"]
    assert any(flat(entries)["state1"].dtype == torch.uint8 for entries in states.values())
    run(folders[1], **settings, optimizer="AdamW8bit", resume=folders[0] / "checkpoint-3")
    assert same(*(weights_of(folder / "latest" / "unet") for folder in folders))


def test_old_checkpoints_are_pruned(run, tmp_path):
    run(tmp_path, num_iter=7, save_iter=2, save_epoch=1, eval_epoch=1, checkpoints_total_limit=2)
    assert {path.parent.name for path in tmp_path.glob("*/checkpoint.json")} == {"checkpoint-6", "epoch-2", "latest", "best"}
    assert meta_of(tmp_path / "latest")["iteration"] == 7
    assert not list(tmp_path.glob(".*.*"))


# ----------------------------------------------------------------------------------------------------------- batch order
def order(length=12, start=0, rank=0, world_size=1, **changes) -> list:
    return list(ResumableBatchSampler(length, Config(**{"batch_size": 4, "num_iter": 9, **changes}), start, rank, world_size))


def test_an_epoch_is_a_permutation_without_its_incomplete_batch():
    batches = order(length=14, num_iter=12)
    epochs = [[key for batch in batches[start : start + 3] for key in batch] for start in range(0, 12, 3)]
    for epoch, keys in enumerate(epochs):
        assert {key[0] for key in keys} == {epoch} and len({index for _, index in keys}) == 12
        assert {index for _, index in keys} <= set(range(14))
    orders = {tuple(index for _, index in keys) for keys in epochs}
    assert len(orders) == 4  # shuffled anew
    assert len({frozenset(order) for order in orders}) > 1  # what is left out changes too
    assert order(length=14, num_iter=12) == batches != order(length=14, num_iter=12, seed=1)


def test_a_list_shorter_than_the_batch_is_one_short_batch_an_epoch():
    batches = order(length=3, num_iter=5)
    assert [[epoch for epoch, _ in batch] for batch in batches] == [[epoch] * 3 for epoch in range(5)]
    assert all(sorted(index for _, index in batch) == [0, 1, 2] for batch in batches)


@pytest.mark.parametrize("world_size, steps", [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_shares_joined_are_the_batch(world_size, steps):
    shares = [order(rank=rank, world_size=world_size, gradient_accumulation_steps=steps) for rank in range(world_size)]
    for iteration, batch in enumerate(order()):
        parts = [share[iteration * steps + micro] for share in shares for micro in range(steps)]
        assert {len(part) for part in parts} == {4 // world_size // steps} and sum(parts, []) == batch


def test_the_share_of_the_noise_matches_the_share_of_the_pairs():
    sampler = ResumableBatchSampler(12, Config(batch_size=8, num_iter=1, gradient_accumulation_steps=2), 0, 1, 2)
    assert [sampler.part(micro) for micro in range(2)] == [slice(4, 6), slice(6, 8)]


@pytest.mark.parametrize("start", [3, 4, 8, 9])
def test_the_order_continues_where_it_stopped(start):
    config = Config(batch_size=4, num_iter=9, gradient_accumulation_steps=2)
    assert list(ResumableBatchSampler(12, config, start, 0, 1)) == list(ResumableBatchSampler(12, config, 0, 0, 1))[start * 2 :]
    assert len(ResumableBatchSampler(12, config, start, 0, 1)) == (9 - start) * 2


def test_an_uneven_share_is_refused():
    with pytest.raises(UserError, match="batch_size: 3 pairs cannot be divided evenly by 2 processes x 1 accumulation steps"):
        order(length=3, world_size=2)


def test_noise_and_timesteps_are_a_function_of_seed_and_iteration(build):
    trainer, draws = build(), []
    for iteration in (0, 1, 0):
        trainer.state.iteration = iteration
        torch.rand(3)  # the global generator plays no part
        draws.append(trainer.draw_noise(torch.Size([4, 8, 8])))
    assert same(draws[0], draws[2]) and not same(draws[0], draws[1])
    trainer.sampler.batch_size = 4000
    noise, timesteps = trainer.draw_noise(torch.Size([4, 2, 2]))
    assert noise.mean().abs() < 0.02 and abs(noise.std() - 1) < 0.02
    assert (
        (timesteps.min(), timesteps.max()) <= (3, 999) and timesteps.max() > 995 and abs(timesteps.float().mean() - 499.5) < 20
    )


# ------------------------------------------------------------------------------------------------------------ not finite
def test_a_loss_that_is_not_finite_stops_the_run(argv, build, tmp_path, monkeypatch, capsys):
    command = argv(tmp_path / "run", num_iter=6, save_iter=1, gradient_accumulation_steps=2)
    with monkeypatch.context() as patch:
        spoil(patch, 2)
        assert errors.run(main.main, command) == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    trainer = build(tmp_path / "other", num_iter=6)
    trainer.state.iteration = 2
    _, timesteps = trainer.draw_noise(torch.Size([4, 8, 8]))
    batch = next(iter(ResumableBatchSampler(PAIRS, trainer.config, 2, 0, 1)))
    assert line.startswith("error: iteration 3: the gradient norm is nan") and str(timesteps.tolist()) in line  # as in the log
    assert f", for {', '.join(trainer.train_feeder.names[index] for _, index in batch)}; " in line
    kept = sorted((tmp_path / "run").glob("*/checkpoint.json"))
    assert {file.parent.name for file in kept} == {"checkpoint-1", "checkpoint-2", "latest"}
    assert line.endswith(f"last good checkpoint: {tmp_path / 'run' / 'latest'}")
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run" / "latest" / "unet").values())
    assert main.main(command) == 0 and meta_of(tmp_path / "run" / "latest")["iteration"] == 6


def test_weights_that_left_the_finite_numbers_do_not_pass_validation(argv, tmp_path, capsys):
    """The one step has a finite gradient, and is so long that the U-Net overflows: the validation must tell."""
    assert errors.run(main.main, argv(tmp_path, num_iter=1, learning_rate=1e30)) == 2
    assert re.search("error: iteration 1: .*last good checkpoint: none yet", capsys.readouterr().err)
    assert not list(tmp_path.glob("*/checkpoint.json"))


# ------------------------------------------------------------------------------------------------------------ validation
def rows_of(trainer: Trainer, count: int, folder: Path) -> list[dict]:
    """Metrics of the first test pairs, by the U-Net that is validated."""
    with trainer.weights.evaluated() as unet:
        return trainer.validator.rows(unet, range(count), folder)


def test_validation_is_repeatable_and_equals_torchmetrics(build, pair_folders, tmp_path):
    """Every image starts from its own noise whatever its batch: the last batch of 5 by 3 is short."""
    trainer = build(confidence=True)
    rows = [rows_of(trainer, TEST_PAIRS, tmp_path / name) for name in ("a", "b")]
    assert rows[0] == rows[1] and [row["name"] for row in rows[0]] == trainer.test_feeder.names
    for index, row in enumerate(rows[0]):
        pair = trainer.test_feeder[index]
        noise = image_noise(trainer.vae, 2024, [np.rint((pair["sar"].permute(1, 2, 0).numpy() + 1) * 127.5)])
        generated, _ = translate(
            trainer.weights.network, trainer.vae, trainer.scheduler, pair["sar"][None], noise, trainer.prompt_embedding, 2
        )
        expected = peak_signal_noise_ratio((generated[0] + 1) / 2, (pair["eo"] + 1) / 2, data_range=1.0)
        assert row["standard/psnr"] == pytest.approx(expected.item(), abs=1e-3)
        panel = np.array(Image.open(tmp_path / "a" / f"{row['name']}.png"))
        shown = panel[-32:, 72:104].astype(float)
        assert np.abs(shown - ((generated[0] + 1) * 127.5).permute(1, 2, 0).numpy()).max() < 0.6
    assert len({row["standard/psnr"] for row in rows[0]}) == TEST_PAIRS
    trainer.validate(), trainer.validate()
    logged = val_lines(trainer.folder.path)
    assert logged[0] == logged[1] and logged[0]["standard/psnr"] == pytest.approx(
        np.mean([row["standard/psnr"] for row in rows[0]]), abs=1e-3
    )


def test_validation_starts_from_the_noise_of_a_translation(build, tmp_path, monkeypatch):
    """Bit for bit, also where [-1, 1] does not give the stretched pixels back, and from another feeder's 8-bit images."""
    noises, original = [], validation.translate
    for index in range(2):
        deep = np.random.default_rng(index).gamma(1, 3000, (32, 32)).astype(np.float32)
        for kind in ("deep", "eo"):
            (tmp_path / kind).mkdir(exist_ok=True)
        np.save(tmp_path / f"deep/{index}.npy", deep)
        Image.fromarray(np.full((32, 32, 3), index, np.uint8)).save(tmp_path / f"eo/{index}.png")
    folders = {"sar_dir": str(tmp_path / "deep"), "eo_dir": str(tmp_path / "eo"), "split": "test", "crop_size": 32}
    trainer = build(test_feeder_args=folders, seed=5)
    expected = image_noise(trainer.vae, 5, [read_sar(tmp_path / f"deep/{index}.npy") for index in range(2)])
    monkeypatch.setattr(validation, "translate", lambda *args: noises.append(args[4]) or original(*args))
    trainer.validate()
    assert torch.equal(noises[0], expected) and not torch.equal(*expected)
    plain = {"sar": torch.tensor([3.0, 200.0]).view(2, 1, 1, 1).expand(2, 3, 8, 8) / 127.5 - 1}
    by_hand = image_noise(trainer.vae, 5, [np.full((8, 8, 3), level) for level in (3, 200)])
    assert torch.equal(trainer.validator.starting_noise(plain), by_hand)


def test_the_average_is_what_is_validated(build, tmp_path):
    """With ema_decay the EMA is evaluated, and the trained weights play no part."""
    trainer = build(ema_decay=0.9)
    before = rows_of(trainer, 1, tmp_path / "before")
    for parameter in trainer.weights.parameters:
        parameter.data.mul_(1.5)
    assert rows_of(trainer, 1, tmp_path / "after") == before
    trainer.weights.average = None
    assert rows_of(trainer, 1, tmp_path / "raw") != before


def test_best_is_the_highest_psnr(run, tmp_path, monkeypatch):
    psnrs = iter([10.0, 30.0, 20.0, 30.0])
    monkeypatch.setattr(validation.Validator, "rows", lambda *args: [{"name": "0", "standard/psnr": next(psnrs)}])
    run(tmp_path, num_iter=12, eval_epoch=1)
    assert meta_of(tmp_path / "best")["iteration"] == 6 and meta_of(tmp_path / "latest")["iteration"] == 12
    assert meta_of(tmp_path / "latest")["best"] == {"psnr": 30} and next(psnrs, None) is None
    assert not same(weights_of(tmp_path / "best" / "unet"), weights_of(tmp_path / "latest" / "unet"))


def test_best_by_a_metric_of_which_less_is_better_and_anew_by_another(run, tmp_path, monkeypatch):
    values = iter([0.5, 0.3, 0.4, 0.2])
    rows = [{"name": "0", "standard/psnr": 20.0}]
    monkeypatch.setattr(validation.Validator, "require", lambda *args: None)
    monkeypatch.setattr(validation.Validator, "rows", lambda *args: [rows[0] | {"standard/lpips": next(values)}])
    run(tmp_path, num_iter=9, eval_epoch=1, best_metric="lpips", lpips=True)
    assert meta_of(tmp_path / "best")["iteration"] == 6
    assert meta_of(tmp_path / "best")["best"] == {"lpips": 0.3}
    run(tmp_path, num_iter=12, eval_epoch=1, best_metric="psnr", resume="latest")
    assert meta_of(tmp_path / "best")["iteration"] == 12 and meta_of(tmp_path / "best")["best"] == {"psnr": 20}


@pytest.mark.parametrize("metric", ["lpips", "dists"])
def test_a_metric_without_its_network_is_refused_before_training(run, tmp_path, monkeypatch, metric):
    def load():
        raise utils.MetricUnavailable("its network cannot be loaded")

    monkeypatch.setattr(utils, f"_load_{metric}", load)
    monkeypatch.setattr(utils, "_load_lpips", load)
    with pytest.raises(UserError, match=f"best_metric: {metric} is not available here: its network cannot be loaded"):
        run(tmp_path, best_metric=metric, lpips=True)
    assert not list(tmp_path.glob("*/checkpoint.json"))


@pytest.mark.parametrize(
    ("metric", "side", "limit"),
    [
        ("dists", 8, "needs sides of at least 16 px"),
        ("lpips", 8, "needs sides of at least 16 px"),
        ("dists", 8192, "takes images of at most"),
    ],
)
def test_a_metric_that_the_test_pairs_are_too_small_or_large_for_is_refused(build, metric, side, limit):
    validator = build().validator
    validator.feeder.crop_size = side
    with pytest.raises(UserError, match=f"best_metric: {metric} {limit}.* {side} x {side} .test_feeder_args.crop_size.$"):
        validator.require(metric)


def test_a_best_that_is_infinite_leaves_valid_json(run, tmp_path, monkeypatch):
    monkeypatch.setattr(validation.Validator, "rows", lambda *args: [{"name": "0", "standard/psnr": math.inf}])
    run(tmp_path, num_iter=3)
    assert meta_of(tmp_path / "best")["best"] == {} and "Infinity" not in (tmp_path / "best/checkpoint.json").read_text()


def test_snapshots_are_written_and_never_pruned(run, tmp_path):
    run(tmp_path, num_iter=6, save_iter=1, keep_at=[2, 5], checkpoints_total_limit=1)
    assert {folder.name for folder in tmp_path.glob("*-*") if folder.is_dir()} == {"snapshot-2", "snapshot-5", "checkpoint-6"}
    assert [meta_of(tmp_path / f"snapshot-{iteration}")["iteration"] for iteration in (2, 5)] == [2, 5]


@pytest.mark.parametrize(
    "changes, due",
    [
        ({"eval_epoch": 2}, [6, 12, 15]),
        ({"eval_epoch": 0, "eval_each_epoch_from": 0.6}, [12, 15]),
        ({"eval_epoch": 0, "eval_each_epoch_from": 1, "num_iter": 14}, [14]),
        ({"eval_epoch": 4, "eval_each_epoch_from": 0.8, "num_iter": 16}, [12, 15, 16]),
    ],
)
def test_when_validation_is_due(build, changes, due):
    trainer, found = build(**{"num_iter": 15, **changes}), []
    for iteration in range(1, trainer.config.num_iter + 1):
        trainer.state.iteration = iteration
        found += [iteration] if trainer.validation_is_due() else []
    assert found == due


# ------------------------------------------------------------------------------------------------------ accelerator_path
def test_where_the_weights_come_from(stages, build, tiny_base):
    """null: the base, and the log says so; a stage 1 checkpoint gets its variance channel; a stage 2 one is continued."""
    one, two = (weights_of(stage / "best" / "unet_ema") for stage in stages)

    def start(**changes):
        trainer = build(confidence=True, **changes)
        line = (trainer.folder.path / "train_log.txt").read_text().splitlines()[-1]
        return {name: tensor.detach() for name, tensor in trainer.weights.network.state_dict().items()}, line

    weights, line = start()
    base = weights_of(Path(tiny_base) / "unet")
    assert "stage 2" in line and f"base model {tiny_base} (accelerator_path is null), with a variance channel added" in line
    assert torch.equal(weights["conv_in.weight"], torch.cat([base["conv_in.weight"]] * 2, 1) / 2)
    weights, line = start(accelerator_path=stages[0] / "best")
    assert str(stages[0] / "best" / "unet_ema" / WEIGHTS) in line
    assert all(torch.equal(weights[name], one[name]) for name in one if not name.startswith("conv_out"))
    assert torch.equal(weights["conv_out.weight"][:4], one["conv_out.weight"])
    assert not weights["conv_out.weight"][4].any() and weights["conv_out.bias"][4] == 0
    weights, line = start(accelerator_path=stages[1] / "best")
    assert line.endswith(WEIGHTS)  # nothing is added
    assert same(weights, two) and weights["conv_out.weight"][4].any()


def test_checkpoints_that_do_not_fit_are_refused_before_training(stages, argv, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "fit", lambda self: pytest.fail("training began"))
    with pytest.raises(UserError, match="stage 1 .*expects 4 output channels, .* has 5"):
        main.main(argv(tmp_path / "a", accelerator_path=stages[1] / "best"))
    with pytest.raises(UserError, match="accelerator_path: there is no .*nowhere"):
        main.main(argv(tmp_path / "b", accelerator_path=tmp_path / "nowhere"))


# ------------------------------------------------------------------------------------------------------------ phase test
@pytest.fixture(scope="module")
def tested(stages, run, tmp_path_factory) -> Path:
    """The folder test/ of a given checkpoint, where one of an earlier list was."""
    root = tmp_path_factory.mktemp("tested")
    stale = root / "test" / "generated" / "of_an_earlier_list.png"  # the report would name it
    stale.parent.mkdir(parents=True)
    stale.touch()
    return run(root, phase="test", accelerator_path=stages[1] / "best", confidence=True, val_len=2) / "test"


def test_phase_test_reports_on_the_whole_list(stages, tested, pair_folders):
    """Whatever val_len says."""
    names, report = [str(index) for index in range(TEST_PAIRS)], json.loads((tested / "report.json").read_text())
    rows = list(csv.DictReader((tested / "metrics.csv").open()))
    assert report["images"] == TEST_PAIRS and [row["name"] for row in rows] == names
    for convention in ("standard", "paper"):
        for metric in ("psnr", "ssim", "scc"):
            mean = np.mean([float(row[f"{convention}/{metric}"]) for row in rows])
            entry = report["means"][convention][metric]
            assert (entry["mean"], entry["n"], entry["infinite"]) == (pytest.approx(mean), TEST_PAIRS, 0)
            assert entry["low"] <= entry["mean"] <= entry["high"]
    assert set(report["set"]) == {"identity_collapse"} and report["faults"] == {}
    networks = {"lpips", "dists", "squeezenet", "fid", "kid", "inception_score", "squeezenet_frechet"}
    assert set(report["absent"]) == networks | {"discrepancies"}
    assert report["absent"]["lpips"] == report["absent"]["fid"] == "switched off"
    assert set(report["uncertainty"]["maps"]["variance"]) >= {"ranking", "calibration"}
    table = (tested / "report.md").read_text()
    assert f"{report['means']['standard']['psnr']['mean']:.4f}" in table and "LPIPS: switched off" in table
    for kind in ("eo", "generated", "sar", "variance", "results"):
        assert sorted(path.stem for path in (tested / kind).iterdir()) == names
    for name, row in zip(names, rows, strict=True):
        eo, generated = (np.array(Image.open(tested / kind / f"{name}.png")) for kind in ("eo", "generated"))
        assert np.array_equal(eo, np.array(Image.open(pair_folders / "test" / "eo" / f"{name}.png"))[4:36, 4:36])
        psnr = 10 * math.log10(255**2 / np.mean((eo.astype(float) - generated) ** 2))
        assert psnr == pytest.approx(float(row["standard/psnr"]), abs=1e-3)
        assert Image.open(tested / "results" / f"{name}.png").size[0] == 4 * 32 + 3 * 4
    best = max(row["standard/psnr"] for row in val_lines(stages[1]))
    assert report["means"]["standard"]["psnr"]["mean"] == pytest.approx(best, abs=0.02)  # of pictures in 8 bits


def test_phase_test_is_translation_and_evaluation(stages, tested, tmp_path):
    """By test.py with the same seed, and by evaluate.py of the same pictures."""
    command = ["--sar-dir", tested / "sar", "--output-dir", tmp_path / "eo", "--checkpoint", stages[1] / "best"]
    command += ["--seed", 2024, "--num-inference-steps", 2, "--batch-size", 3, "--device", "cpu"]
    assert test_py.main([str(word) for word in command]) == 0
    for file in (tested / "generated").iterdir():
        pair = [np.array(Image.open(place / file.name), int) for place in (tested / "generated", tmp_path / "eo")]
        assert np.abs(pair[0] - pair[1]).max() <= 1
    kinds = {"pred": "generated", "gt": "eo", "sar": "sar", "variance": "variance"}
    folders = [part for option, kind in kinds.items() for part in (f"--{option}-dir", str(tested / kind))]
    assert evaluate.main([*folders, "--no-networks", "--device", "cpu", "--output", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "metrics.csv").read_text() == (tested / "metrics.csv").read_text()
    again, report = (json.loads((folder / "report.json").read_text()) for folder in (tmp_path / "again", tested))
    names = "".join(f"{index}\n" for index in range(TEST_PAIRS))
    assert report["images_sha256"] == again["images_sha256"] == hashlib.sha256(names.encode()).hexdigest()
    assert report["run"] == {
        "feeder": "feeders.feeder.PairedFolderFeeder", "checkpoint": str(stages[1] / "best"), "seed": 2024,
        "iterations": meta_of(stages[1] / "best")["iteration"], "num_inference_steps": 2,
    }  # fmt: skip
    assert again["run"] == {} and f"iterations: {report['run']['iterations']}" in (tested / "report.md").read_text()


def test_phase_test_takes_the_runs_own_best(stages, run, tested, tmp_path):
    work_dir = run(shutil.copytree(stages[1], tmp_path / "copy"), phase="test", confidence=True)
    assert f"U-Net from {work_dir / 'best'}" in (work_dir / "train_log.txt").read_text()
    assert (work_dir / "test" / "metrics.csv").read_text() == (tested / "metrics.csv").read_text()


def test_two_processes_test_like_one(argv, stages, tested, tmp_path):
    said = launch(argv(tmp_path, phase="test", accelerator_path=stages[1] / "best", confidence=True))
    assert said.count(f"# Evaluation of {TEST_PAIRS} images") == 1
    one, two = (json.loads((folder / "report.json").read_text()) for folder in (tested, tmp_path / "test"))
    assert two["images"] == one["images"] == TEST_PAIRS
    for metric, entry in one["means"]["standard"].items():
        assert two["means"]["standard"][metric]["mean"] == pytest.approx(entry["mean"], abs=1e-2)


def test_phase_test_without_a_checkpoint_says_so(argv, tmp_path):
    with pytest.raises(UserError, match="accelerator_path: null, and .* has neither best/ nor latest/"):
        main.main(argv(tmp_path, phase="test"))


# ------------------------------------------------------------------------------------------------------ released configs
def lay_out_qxs(pairs: Path, root: Path) -> dict[str, list[str]]:
    for kind, folder in (("sar", "sar_256_oc_0.2"), ("eo", "opt_256_oc_0.2")):
        shutil.copytree(pairs / "train" / kind, root / folder)
    entries = [f"opt_256_oc_0.2/{index}.png" for index in range(PAIRS)]
    return {"train": entries[:8], "test": entries[8:]}


def lay_out_links(pairs: Path, root: Path) -> dict[str, list[str]]:
    """trainA, trainB, testA, testB, full of symbolic links that lead out of the root."""
    for split in ("train", "test"):
        for kind, letter in (("sar", "A"), ("eo", "B")):
            for file in (pairs / split / kind).iterdir():
                place = root / f"{split}{letter}" / f"scene_{file.name}"
                place.parent.mkdir(parents=True, exist_ok=True)
                place.symlink_to(file)
    return {split: sorted(f"{split}B/{file.name}" for file in (root / f"{split}B").iterdir()) for split in ("train", "test")}


def lay_out_spacenet(pairs: Path, root: Path) -> dict[str, list[str]]:
    """GeoTIFFs: four float bands of SAR, 8-bit RGB."""
    folder, rng = "train/AOI_11_Rotterdam", np.random.default_rng(0)
    for kind, count, dtype in (("SAR-Intensity", 4, "float32"), ("PS-RGB", 3, "uint8")):
        (root / folder / kind).mkdir(parents=True)
        for index in range(6):
            bands = (rng.random((count, 40, 40)) * 255).astype(dtype)
            profile = {"driver": "GTiff", "height": 40, "width": 40, "count": count, "dtype": dtype, "photometric": "RGB"}
            profile = profile if count == 3 else {**profile, "photometric": "MINISBLACK"}
            with rasterio.open(root / folder / kind / f"SN6_{kind}_tile_{index}.tif", "w", **profile) as target:
                target.write(bands)
    entries = [f"{folder}/PS-RGB/SN6_PS-RGB_tile_{index}.tif" for index in range(6)]
    return {"train": entries[:4], "test": entries[4:]}


LAYOUTS = {"QXSFeeder": lay_out_qxs, "SAROptFeeder": lay_out_links, "SpaceNetFeeder": lay_out_spacenet}
RELEASED = ("released_qxs", "released_saropt", "released_spacenet", "later_stage1_qxs", "later_sar2eo_linked")


@pytest.mark.parametrize("name", ["its keys alone", *RELEASED])
def test_a_released_configuration_runs(name, request, tiny_base, pair_folders, tmp_path, monkeypatch):
    """Nothing changed but paths, and numbers made small; from the weights that a run of the released code leaves."""
    text = RELEASED_KEYS
    if name in RELEASED:
        folder = request.getfixturevalue("samples") / "configs"
        assert {file.stem for file in folder.glob("*.yaml")} == set(RELEASED)  # every one is tried
        text = (folder / f"{name}.yaml").read_text()
    values = yaml.safe_load(text)
    lists = LAYOUTS[values["feeder"].rpartition(".")[2]](pair_folders, tmp_path / "data")
    unet = patch_conv_in(load_base_unet(tiny_base))
    (tmp_path / "lastest").mkdir()
    save_file(unet.state_dict(), tmp_path / "lastest/model.safetensors")
    for split, entries in lists.items():
        arguments = values[f"{split}_feeder_args"]
        list_file = tmp_path / Path(arguments["listroot"]).name
        list_file.write_text("\n".join(entries))
        arguments |= {"dataroot": "${DATA}", "listroot": str(list_file), "load_size": 40, "crop_size": 32}
    values |= {
        "work_dir": "${DATA}/run", "pretrained_model_name_or_path": tiny_base, "num_iter": 2, "num_warmup": 1, "num_worker": 0,
        "accelerator_path": str(tmp_path / "lastest/model.safetensors"), "batch_size": 2, "val_len": 2, "log_iter": 1,
        "num_inference_steps": 2,
    }  # fmt: skip
    (tmp_path / "released.yaml").write_text(yaml.safe_dump(values))
    monkeypatch.setenv("DATA", str(tmp_path / "data"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # set by `gpu`, restored afterwards
    monkeypatch.setattr(utils, "_load_lpips", no_network)
    assert main.main(["--config", str(tmp_path / "released.yaml")]) == 0
    assert os.environ["CUDA_VISIBLE_DEVICES"] == str(values["gpu"]).strip("[]")
    log = (tmp_path / "data/run/train_log.txt").read_text()
    assert (
        "train: stage 2 (C-Diff loss), U-Net from " in log
        and "a variance channel added (stage 1 takes confidence: false)" in log
    )
    assert val_lines(tmp_path / "data/run")[-1]["n"] == 2
    trained = UNet2DConditionModel.from_pretrained(tmp_path / "data/run/latest/unet")
    assert trained.config.out_channels == 5 and not torch.equal(trained.conv_in.weight, unet.conv_in.weight)


def no_network():
    raise utils.MetricUnavailable("not here")


# --------------------------------------------------------------------------------------------------------- two processes
def test_two_processes_train_like_one(argv, whole_batches, tiny_base, tmp_path):
    launch(argv(tmp_path, **PLAIN, gradient_accumulation_steps=2))
    assert_alike(tmp_path, whole_batches, tiny_base)
    assert len(list((tmp_path / "results" / "iteration-000003").iterdir())) == TEST_PAIRS


def test_a_divided_model_trains_like_a_whole_one_is_saved_whole_and_resumes_anywhere(argv, run, tiny_base, tmp_path):
    """Bit for bit where it is divided again, up to rounding in one process."""
    settings = {"num_iter": 3, "confidence": False, "ema_decay": 0.9, "save_iter": 2, "batch_size": 3, "max_grad_norm": 0.3}
    divided = {**settings, "fsdp": True, "gradient_checkpointing": True}
    whole, again = tmp_path / "whole", tmp_path / "again"
    launch(argv(whole, **divided), processes=3)  # 4 output channels: 2, 2, and none of them
    launch(argv(again, **divided, resume=whole / "checkpoint-2"), processes=3)
    alone = run(tmp_path / "alone", **settings, resume=whole / "checkpoint-2")
    assert_alike(whole, run(tmp_path / "one", **settings), tiny_base)
    for kind in ("unet", "unet_ema"):
        assert (again / "latest" / kind / WEIGHTS).read_bytes() == (whole / "latest" / kind / WEIGHTS).read_bytes()
        assert deviation(weights_of(alone / "latest" / kind), weights_of(whole / "latest" / kind), tiny_base) < 1e-3


SPOILT = """
import math, sys
import torch
import main, train

step, encode = train.Trainer.step, train.encode


def watched(self, batches):
    spoilt = self.state.iteration == 1 and self.accelerator.process_index == 1
    train.encode = lambda vae, pixels: encode(vae, pixels) * (math.inf if spoilt else 1)
    weights = [weight.to_local() for weight in (*self.weights.parameters, *self.weights.average.parameters())]
    before = [weight.clone() for weight in weights]
    step(self, batches)
    assert all(map(torch.equal, weights, before)) == (self.state.iteration == 1), self.state.iteration


train.Trainer.step = watched
sys.exit(main.main())
"""


def test_a_step_that_is_not_finite_for_one_process_changes_no_part_of_a_divided_model(argv, tmp_path):
    (tmp_path / "spoilt.py").write_text(SPOILT)
    settings = {"num_iter": 3, "ema_decay": 0.9, "skip_nonfinite": 1, "fsdp": True, "confidence": True}
    launch(argv(tmp_path / "run", **settings), script=tmp_path / "spoilt.py")
    assert "step left out (1 of 1): iteration 2: the gradient norm is nan" in (tmp_path / "run" / "train_log.txt").read_text()
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run" / "latest" / "unet").values())


# ------------------------------------------------------------------------------------------------------- what the base says
def test_a_checkpoint_records_where_its_base_lies(run, tiny_base, tmp_path, monkeypatch):
    monkeypatch.chdir(Path(tiny_base).parent)
    settings = {"num_iter": 1, "pretrained_model_name_or_path": Path(tiny_base).name}
    run(tmp_path / "run", **settings)
    meta = meta_of(tmp_path / "run" / "latest")
    assert meta["base_folder"] == tiny_base and meta["config"]["pretrained_model_name_or_path"] == Path(tiny_base).name
    run(tmp_path / "run", **settings)  # no changed setting


def test_a_prediction_type_that_contradicts_the_base_is_named(build, tiny_base, tmp_path):
    base = Path(shutil.copytree(tiny_base, tmp_path / "base"))
    scheduler = json.loads((base / "scheduler/scheduler_config.json").read_text())
    (base / "scheduler/scheduler_config.json").write_text(json.dumps({**scheduler, "prediction_type": "v_prediction"}))
    for name, changes in (
        ("given", {"prediction_type": "epsilon"}),
        ("default", {}),
        ("same", {"prediction_type": "v_prediction"}),
    ):
        build(tmp_path / name, pretrained_model_name_or_path=base, **changes)
        log = (tmp_path / name / "train_log.txt").read_text()
        contradiction = f"warning: prediction_type is epsilon, but the scheduler of the base model {base} says v_prediction"
        assert (contradiction in log) == (name != "same")


# ------------------------------------------------------------------------------------------------------------- mistakes
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"feeder": "feeders.feeder.NoFeeder"}, "feeder: cannot import 'feeders.feeder.NoFeeder'"),
        ({"feeder": "Feeder"}, "feeder: cannot import 'Feeder'"),
        (
            {"pretrained_model_name_or_path": "/nowhere/base"},
            "pretrained_model_name_or_path: there is no folder '/nowhere/base'",
        ),
    ],
)
def test_mistakes_are_one_line_and_leave_no_folder(argv, tmp_path, capsys, changes, message):
    assert errors.run(main.main, argv(tmp_path / "run", **changes)) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.match(f"error: {message}", line) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_models_divided_by_accelerate_are_refused(argv, tmp_path, capsys, monkeypatch, name):
    """On CPUs it would ignore the wish in silence, on GPUs the checkpoints would be parts."""
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    assert errors.run(main.main, argv(tmp_path / "run")) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: accelerate launch: expected plain data parallelism, found ") and "fsdp: true" in line
    assert not (tmp_path / "run").exists()


def test_a_launchers_options_are_those_of_the_run(argv, run, tmp_path):
    """By the real launcher; a resume with the same settings goes on."""
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"]
    launch += ["--mixed_precision", "bf16", "--gradient_accumulation_steps", "2", "main.py"]
    done = subprocess.run([*launch, *argv(tmp_path, num_iter=1)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    config = meta_of(tmp_path / "latest")["config"]
    assert (config["mixed_precision"], config["gradient_accumulation_steps"]) == ("bf16", 2)
    assert "mixed_precision bf16, gradient_accumulation_steps 2, " in (tmp_path / "train_log.txt").read_text()
    run(tmp_path, num_iter=1, mixed_precision="bf16", gradient_accumulation_steps=2)


def test_accelerate_does_not_compile_by_itself(build, monkeypatch):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR")
    assert type(build().weights.network) is UNet2DConditionModel  # torch_compile alone does


def test_one_process_has_nobody_to_divide_its_model_with(argv, tmp_path):
    with pytest.raises(UserError, match="fsdp: divides the model among processes, expected several, found 1"):
        main.main(argv(tmp_path / "run", fsdp=True))
    assert not (tmp_path / "run").exists()


def test_a_work_dir_that_is_a_file_is_refused(argv, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"^work_dir: cannot write into {tmp_path / 'file'}: Not a directory$"):
        main.main(argv(tmp_path / "file"))


def test_a_tensorboard_that_cannot_be_written_is_one_line(argv, tmp_path, capsys):
    (tmp_path / "tensorboard").write_text("")
    assert errors.run(main.main, argv(tmp_path, report_to="tensorboard")) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: cannot write into {tmp_path}: ") and line.endswith("last good checkpoint: none yet")


def test_a_damaged_image_stops_the_run_by_its_name(argv, few_pairs, tmp_path, capsys):
    shutil.copytree(Path(few_pairs["sar_dir"]).parent, tmp_path / "pairs")
    broken = tmp_path / "pairs" / "eo" / "1.png"
    broken.write_bytes(broken.read_bytes()[:100])
    pairs = {**few_pairs, "sar_dir": str(tmp_path / "pairs" / "sar"), "eo_dir": str(tmp_path / "pairs" / "eo")}
    for workers in (0, 1):
        assert errors.run(main.main, argv(tmp_path / str(workers), train_feeder_args=pairs, num_worker=workers)) == 2
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and lines[0].startswith(f"error: {broken}: ")
