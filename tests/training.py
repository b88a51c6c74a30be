"""What the tests ask of a training run: its command line, and what it left behind."""

import json
import math
import os
import re
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train

REPO = Path(__file__).resolve().parents[1]
WEIGHTS = "diffusion_pytorch_model.safetensors"
AUGMENTATIONS = {"hflip": True, "vflip": True, "rot": True}
BATCH = 4  # of the 12 training pairs: 3 iterations an epoch


def command_line(work_dir: Path, base: str, pair_folders: Path, **changes) -> list[str]:
    """main.py's options: a stage 1 run in `work_dir`, with `changes`."""
    settings = {
        "work_dir": str(work_dir), "pretrained_model_name_or_path": base, "confidence": False,
        "feeder": "feeders.feeder.PairedFolderFeeder", "num_worker": 0, "num_iter": 3, "batch_size": BATCH, "num_warmup": 0,
        "learning_rate": 1e-3, "num_inference_steps": 2, "test_batch_size": 3, "lpips": False, "log_iter": 1,
        "eval_epoch": 0, "eval_each_epoch_from": 1, "save_iter": 0, "report_to": "none",
    }  # fmt: skip
    for split in ("train", "test"):
        folders = {f"{kind}_dir": str(pair_folders / split / kind) for kind in ("sar", "eo")}
        settings[f"{split}_feeder_args"] = {**folders, "split": split, "crop_size": 32}
    settings["train_feeder_args"] |= AUGMENTATIONS
    settings |= {key: str(value) if isinstance(value, Path) else value for key, value in changes.items()}
    return [
        word for key, value in settings.items() for word in (f"--{key}", value if isinstance(value, str) else json.dumps(value))
    ]


def forget_accelerator():
    """Accelerate keeps one state for the life of a process, and refuses another precision."""
    AcceleratorState._reset_state(reset_partial_state=True)


def launch(argv: list[str], processes: int = 2, script: Path = REPO / "main.py") -> str:
    """Run a script in several processes => what it printed."""
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes), str(script), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(REPO)}
    done = subprocess.run([sys.executable, *words], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@contextmanager
def stopping_at(iteration: int):
    """Within it, a run is stopped by Ctrl-C in the first step after `iteration`."""
    step = train.Trainer.step

    def stopped(self, *args):
        if self.state.iteration == iteration:
            raise KeyboardInterrupt
        return step(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.Trainer, "step", stopped)
        yield


def spoil(monkeypatch, *iterations: int) -> None:
    """The latents of the steps after these iterations are infinite."""
    encode, step, now = train.encode, train.Trainer.step, []

    def watched(self, *args):
        now[:] = [self.state.iteration]
        return step(self, *args)

    monkeypatch.setattr(train.Trainer, "step", watched)
    monkeypatch.setattr(train, "encode", lambda vae, pixels: encode(vae, pixels) * (math.inf if now[0] in iterations else 1))


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / WEIGHTS)


def same(a, b) -> bool:
    """Equality of nested containers, tensors bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return isinstance(b, list | tuple) and len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def meta_of(folder: Path) -> dict:
    return json.loads((folder / "checkpoint.json").read_text())


def train_lines(work_dir: Path) -> list[dict[str, float]]:
    """train_log.txt => one dict of numbers for each logged iteration."""
    number = r"-?(?:[\d.]+(?:e[+-]?\d+)?|inf|nan)"
    rows = []
    for line in (work_dir / "train_log.txt").read_text().splitlines():
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  \S", line), line
        if match := re.search(r"  iteration (\d+)/(\d+)  (.+)", line):
            assert re.fullmatch(rf"(\S+ {number}(  |$))+", match[3]), line
            rows.append({"iteration": int(match[1])} | {k: float(v) for k, v in map(str.split, match[3].split("  "))})
    return rows


def val_lines(work_dir: Path) -> list[dict[str, float]]:
    """val_log.txt => one dict of numbers for each validation."""
    rows = []
    for line in (work_dir / "val_log.txt").read_text().splitlines():
        assert "  iteration " in line or "lpips is left out: " in line
        if "  iteration " not in line:
            continue
        rows.append({key: float(value) for key, value in (part.split() for part in line.split("  ")[1:])})
    return rows


def scalars(work_dir: Path) -> dict[str, dict[int, float]]:
    """TensorBoard's scalars: {tag: {iteration: float32 value}}, of all parts of a run."""
    found: dict = {}
    for file in sorted((work_dir / "tensorboard").iterdir()):
        events = EventAccumulator(str(file))
        events.Reload()
        for tag in events.Tags()["scalars"]:
            found.setdefault(tag, {}).update({event.step: event.value for event in events.Scalars(tag)})
    return found


def assert_same_run(mine: Path, whole: Path) -> None:
    """Bit for bit: weights, average, optimizer, schedule, best PSNR, and every value in the logs but the speed."""
    for name in ("latest", "best"):
        for kind in ("unet", "unet_ema"):
            if (whole / name / kind).is_dir():
                assert same(weights_of(mine / name / kind), weights_of(whole / name / kind)), f"{name}/{kind}"
        states = [torch.load(folder / name / "training_state.pt", weights_only=True) for folder in (mine, whole)]
        assert len(states[0]["optimizer"]["state"]) > 100 and same(*states)
        metas = [meta_of(folder / name) for folder in (mine, whole)]
        assert all(metas[0][key] == metas[1][key] for key in ("iteration", "epoch", "best"))
    for lines in (train_lines, val_lines):
        logged = [{row.pop("iteration"): row for row in lines(folder)} for folder in (mine, whole)]  # the last time counts
        for rows in logged:
            for row in rows.values():
                row.pop("images_per_s", None)
        assert logged[0] == logged[1]
