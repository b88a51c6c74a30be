"""Runs that are stopped, killed, starved and damaged: nothing is lost, half-written or silently wrong."""

import os
import resource
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
import torch
from conftest import tiny_unet
from faults import TORCHRUN, are_gone, descendants, finish, kill, start, wait_for
from training import (
    AUGMENTATIONS,
    assert_same_run,
    forget_accelerator,
    meta_of,
    spoil,
    stopping_at,
    train_lines,
    val_lines,
    weights_of,
)

import main
from cdiffset import checkpoint, errors
from cdiffset.config import load_config
from cdiffset.errors import STOPPED, UserError
from cdiffset.model import load_unet
from cdiffset.training import validation
from feeders.feeder import PairedFolderFeeder
from train import Trainer

pytestmark = pytest.mark.skipif(not Path("/proc").is_dir(), reason="watches processes through /proc")

RUN = {
    "num_iter": 30, "save_iter": 5, "log_iter": 4, "eval_epoch": 3, "ema_decay": 0.9, "confidence": True,
    "checkpoints_total_limit": 2,
}  # fmt: skip
SMALL = {"num_iter": 6, "save_iter": 2, "log_iter": 4, "ema_decay": 0.9, "confidence": True}
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """As the processes that are started have, so that sums round alike."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def whole(run, tmp_path_factory) -> Path:
    """RUN in one go."""
    return run(tmp_path_factory.mktemp("whole") / "run", **RUN)


@pytest.fixture(scope="module")
def often_validated(run, tmp_path_factory) -> Path:
    """SMALL in one go, validated after both epochs."""
    return run(tmp_path_factory.mktemp("often") / "run", **SMALL, eval_epoch=1)


def logged(work_dir: Path, text: str) -> bool:
    log = work_dir / "train_log.txt"
    return log.is_file() and text in log.read_text()


def last_log_line(work_dir: Path) -> str:
    return (work_dir / "train_log.txt").read_text().splitlines()[-1]


# -------------------------------------------------------------------------------------------------------------- signals
@pytest.mark.parametrize("number, workers", [(signal.SIGTERM, 0), (signal.SIGINT, 2)])
def test_a_signal_saves_and_the_same_command_continues(argv, run, whole, tmp_path, number, workers):
    """Sent to the whole group and to every loader process, as terminals and schedulers do."""
    process = start("main.py", argv(tmp_path, **RUN, num_worker=workers))
    wait_for(lambda: logged(tmp_path, "iteration 8/30"), process)
    started = descendants(process.pid)
    kill(process, number)
    for pid in started:
        os.kill(pid, number)
    code, lines = finish(process)
    assert code == STOPPED and are_gone(started)
    kept = meta_of(tmp_path / "latest")["iteration"]
    assert lines[-1] == (
        f"stopped: by {signal.Signals(number).name}; last good checkpoint: {tmp_path / 'latest'}; the same command continues"
    )
    assert 8 <= kept < 30 and checkpoint.damage(tmp_path / "latest") is None
    run(tmp_path, **RUN, num_worker=workers)
    assert logged(tmp_path, f"at iteration {kept}")
    assert_same_run(tmp_path, whole)


def test_a_signal_during_validation_leaves_it_for_the_resume(argv, run, often_validated, tmp_path, monkeypatch):
    settings = {**SMALL, "eval_epoch": 1}
    translate = validation.translate

    def signalled(*args):
        os.kill(os.getpid(), signal.SIGTERM)  # during the first of the validation's two batches
        return translate(*args)

    with monkeypatch.context() as patch:
        patch.setattr(validation, "translate", signalled)
        assert errors.run(main.main, argv(tmp_path / "run", **settings)) == STOPPED
    meta = meta_of(tmp_path / "run" / "latest")
    assert meta["iteration"] == 3 and meta["unfinished"] and not val_lines(tmp_path / "run")
    run(tmp_path / "run", **settings)
    assert_same_run(tmp_path / "run", often_validated)


def test_a_second_signal_ends_at_once(argv, tmp_path):
    process = start("main.py", argv(tmp_path, **RUN | {"num_iter": 100_000, "eval_epoch": 0}))
    wait_for(lambda: logged(tmp_path, "iteration 4/"), process)
    os.kill(process.pid, signal.SIGSTOP)  # both arrive before the loop looks
    os.kill(process.pid, signal.SIGTERM)
    os.kill(process.pid, signal.SIGINT)
    os.kill(process.pid, signal.SIGCONT)
    code, _ = finish(process)
    assert code in (-signal.SIGTERM, -signal.SIGINT)
    assert checkpoint.newest_whole(tmp_path)[1] == []


# ------------------------------------------------------------------------------------------------- a kill within saving
class Killed(BaseException):
    """SIGKILL, to a process that goes on to look at what it left."""


def states(iteration: int) -> tuple[dict, dict]:
    return {"lr_scheduler": {"last_epoch": iteration}}, {"iteration": iteration, "best": {}, "config": {}}


def save_and_prune(work_dir: Path, iteration: int) -> None:
    unet = tiny_unet(block_out_channels=[8, 8])
    with torch.no_grad():
        unet.conv_out.bias.fill_(iteration)
    checkpoint.write_checkpoint(
        work_dir, [f"checkpoint-{iteration}", "best", "latest"], unet, None, torch.zeros(1, 3, 64), *states(iteration)
    )
    checkpoint.prune(work_dir, 1)


def test_a_kill_at_any_moment_of_saving_and_pruning_leaves_whole_checkpoints(tmp_path, monkeypatch):
    """Every change of the file system that a save makes, in turn, is the one that does not come about any more."""
    save_and_prune(tmp_path / "before", 1)
    dying, count = None, 0

    def watched(function):
        def call(*args, **kwargs):
            nonlocal count
            count += 1
            if count == dying:
                raise Killed
            return function(*args, **kwargs)

        return call

    for name in ("rename", "link", "unlink", "rmdir", "mkdir", "fsync"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))
    shutil.copytree(tmp_path / "before", tmp_path / "0")
    count = 0
    save_and_prune(tmp_path / "0", 2)
    events = count
    assert events > 30
    seen = set()
    for moment in range(1, events + 1):
        work_dir, dying = tmp_path / str(moment), None
        shutil.copytree(tmp_path / "before", work_dir)
        dying, count = moment, 0
        with pytest.raises(Killed):
            save_and_prune(work_dir, 2)
        dying = None
        checkpoint.tidy(work_dir)
        assert not [path for path in work_dir.iterdir() if path.name.startswith(".")]
        assert {"best", "latest"} <= {path.name for path in work_dir.iterdir()}
        for folder in work_dir.iterdir():
            assert checkpoint.damage(folder) is None
        newest, passed_over = checkpoint.newest_whole(work_dir)
        seen.add(iteration := meta_of(newest)["iteration"])
        assert weights_of(newest / "unet")["conv_out.bias"].eq(iteration).all() and passed_over == []
        shutil.rmtree(work_dir)
    assert seen == {1, 2}


# ---------------------------------------------------------------------------------------------------- damaged checkpoints
def truncate(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def flip_a_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) * 2 // 3] ^= 4
    file.write_bytes(content)


@pytest.fixture(scope="module")
def begun(argv, run, tmp_path_factory) -> tuple[Path, Path]:
    """SMALL in one go, and SMALL stopped after iteration 4, with checkpoint-2, checkpoint-4 and latest."""
    root = tmp_path_factory.mktemp("begun")
    run(root / "whole", **SMALL)
    forget_accelerator()
    with stopping_at(4):
        assert errors.run(main.main, argv(root / "run", **SMALL)) == 130
    return root / "whole", root / "run"


@pytest.mark.parametrize(
    "harm, name",
    [
        (flip_a_bit, "manifest.json"), (Path.unlink, "manifest.json"), (truncate, "checkpoint.json"),
        (truncate, "training_state.pt"), (Path.unlink, "training_state.pt"), (flip_a_bit, UNET), (truncate, UNET),
    ],
)  # fmt: skip
def test_a_damaged_checkpoint_is_named_and_passed_over(argv, begun, tmp_path, harm, name):
    whole, before = begun
    shutil.copytree(before, tmp_path / "run")
    for folder in ("checkpoint-4", "latest"):  # they share their files, so they are damaged together
        harm(tmp_path / "run" / folder / name)
    trainer = Trainer(load_config(argv(tmp_path / "run", **SMALL)))
    assert trainer.state.iteration == 2
    log = (tmp_path / "run" / "train_log.txt").read_text()
    assert log.count("passed over: ") == 2 and f"resumed from {tmp_path / 'run' / 'checkpoint-2'} at iteration 2" in log
    assert f"passed over: {tmp_path / 'run' / 'latest'} is damaged (" in log
    assert f"({name} " in log or name == "manifest.json"  # which may name the wrong file when it is damaged itself
    if (harm, name) == (flip_a_bit, UNET):
        trainer.run()
        assert_same_run(tmp_path / "run", whole)
        assert all(checkpoint.damage(folder) is None for folder in checkpoint.list_checkpoints(tmp_path / "run"))


def test_where_every_checkpoint_is_damaged_the_run_says_so(argv, begun, tmp_path):
    shutil.copytree(begun[1], tmp_path / "run")
    for folder in checkpoint.list_checkpoints(tmp_path / "run"):
        flip_a_bit(folder / "training_state.pt")
    with pytest.raises(
        UserError, match="work_dir: no checkpoint to continue from: .*latest is damaged .training_state.pt is not"
    ):
        main.main(argv(tmp_path / "run", **SMALL))
    with pytest.raises(UserError, match="resume: .*checkpoint-2 is damaged .training_state.pt is not as it was written"):
        main.main(argv(tmp_path / "other", **SMALL, resume=tmp_path / "run" / "checkpoint-2"))


def test_damaged_weights_are_not_trained_from_or_translated_with(argv, begun, tiny_base, tmp_path):
    shutil.copytree(begun[0] / "latest", tmp_path / "latest")
    weights = tmp_path / "latest" / "unet_ema" / "diffusion_pytorch_model.safetensors"
    load_unet(str(tmp_path / "latest"), tiny_base, 4, "--checkpoint")
    content = bytearray(weights.read_bytes())
    content[-10] ^= 1  # a small change of one weight, which no other check would see
    weights.write_bytes(content)
    with pytest.raises(UserError, match="--checkpoint: .*is damaged: not as it was written"):
        load_unet(str(tmp_path / "latest"), tiny_base, 4, "--checkpoint")


def test_pruning_keeps_the_only_whole_checkpoint(tmp_path):
    for iteration in (1, 2, 3):
        checkpoint.write_checkpoint(
            tmp_path, [f"checkpoint-{iteration}"], tiny_unet(), None, torch.zeros(1, 3, 64), *states(iteration)
        )
    for iteration in (2, 3):
        truncate(tmp_path / f"checkpoint-{iteration}" / "training_state.pt")
    checkpoint.prune(tmp_path, 2)
    assert (tmp_path / "checkpoint-1").is_dir()
    save_and_prune(tmp_path, 4)
    assert [folder.name for folder in checkpoint.list_checkpoints(tmp_path)] == ["best", "checkpoint-4", "latest"]


# ------------------------------------------------------------------------------------------------------- no space, a lock
def test_a_full_disk_ends_the_run_with_its_last_checkpoint_whole(argv, run, whole, tmp_path):
    """By a limit to the size of a file, put on the running process: every user may, and the writes fail alike."""
    process = start("main.py", argv(tmp_path, **RUN))
    wait_for((tmp_path / "checkpoint-5" / "manifest.json").is_file, process)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (200_000, 200_000))
    code, lines = finish(process)
    newest, passed_over = checkpoint.newest_whole(tmp_path)
    assert code == 2 and passed_over == [] and not list(tmp_path.glob(".*.building"))
    assert len(lines) == 1 and lines[0].startswith(f"error: cannot write into {tmp_path}: ") and str(newest) in lines[0]
    assert_same_run(run(tmp_path, **RUN), whole)


def test_one_run_at_a_time(argv, tmp_path):
    process = start("main.py", argv(tmp_path, **RUN | {"num_iter": 100_000, "eval_epoch": 0}))
    wait_for(lambda: logged(tmp_path, "iteration 4/"), process)
    before = sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".txt"))
    with pytest.raises(UserError) as refusal:
        main.main(argv(tmp_path, **RUN))
    assert f"{tmp_path} is in use by process {process.pid} on {socket.gethostname()}" in str(refusal.value)
    assert process.poll() is None and before == sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".txt"))
    kill(process)
    finish(process)
    checkpoint.lock(tmp_path).close()  # what a killed run leaves holds nothing


# ------------------------------------------------------------------------------------------- loaders, files, clocks, NaN
def test_a_killed_loader_process_ends_the_run_with_everything_saved(argv, run, whole, tmp_path):
    process = start("main.py", argv(tmp_path, **RUN, num_worker=2))
    wait_for(lambda: logged(tmp_path, "iteration 8/30"), process)
    workers = descendants(process.pid)
    os.kill(process.pid, signal.SIGSTOP)
    for worker in workers:
        os.kill(worker, signal.SIGKILL)
    os.kill(process.pid, signal.SIGCONT)
    code, lines = finish(process)
    kept = meta_of(tmp_path / "latest")["iteration"]
    assert code == 2 and len(workers) >= 2 and are_gone(workers) and len(lines) == 1
    assert lines[0].startswith("error: num_worker: a loader process died") and f"stopped after iteration {kept};" in lines[0]
    assert_same_run(run(tmp_path, **RUN), whole)


@pytest.mark.parametrize("split, workers", [("train", 1), ("test", 0)])
def test_a_file_that_vanishes_ends_the_run_with_everything_saved(
    argv, run, pair_folders, often_validated, tmp_path, monkeypatch, capsys, split, workers
):
    pairs = shutil.copytree(pair_folders, tmp_path / "pairs")
    folders = {"sar_dir": str(pairs / split / "sar"), "eo_dir": str(pairs / split / "eo"), "split": split, "crop_size": 32}
    augmentations = AUGMENTATIONS if split == "train" else {}
    settings = {**SMALL, f"{split}_feeder_args": {**folders, **augmentations}, "num_worker": workers, "eval_epoch": 1}
    victim, step = pairs / split / "eo" / "2.png", Trainer.step

    def step_then_vanish(self, *args):
        step(self, *args)
        if self.state.iteration == 1 and victim.exists():
            victim.rename(tmp_path / "2.png")

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", step_then_vanish)
        assert errors.run(main.main, argv(tmp_path / "run", **settings)) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    kept = meta_of(tmp_path / "run" / "latest")["iteration"]
    assert line.startswith(f"error: {victim}: no such file; stopped after iteration {kept}; last good checkpoint: ")
    (tmp_path / "2.png").rename(victim)
    assert_same_run(run(tmp_path / "run", **settings), often_validated)


def test_a_clock_set_back_changes_nothing(argv, run, begun, tmp_path, monkeypatch):
    now = time.time
    with monkeypatch.context() as patch, stopping_at(5):
        patch.setattr(time, "time", lambda: now() - 3600 * (len(list((tmp_path / "run").glob("checkpoint-4"))) > 0))
        assert errors.run(main.main, argv(tmp_path / "run", **SMALL)) == 130
    for path in (tmp_path / "run" / "checkpoint-4").rglob("*"):
        os.utime(path, (0, 0))  # the newest by iteration is the oldest by its clock
    assert run(tmp_path / "run", **SMALL) and logged(tmp_path / "run", "at iteration 4")
    assert_same_run(tmp_path / "run", begun[0])


def test_a_resume_decodes_no_pair_that_was_seen(argv, begun, tmp_path, monkeypatch):
    shutil.copytree(begun[1], tmp_path / "run")
    read, seen = PairedFolderFeeder.__getitem__, []
    monkeypatch.setattr(PairedFolderFeeder, "__getitem__", lambda self, key: seen.append(key) or read(self, key))
    trainer = Trainer(load_config(argv(tmp_path / "run", **SMALL)))
    seen.clear()
    monkeypatch.setattr(Trainer, "validate", lambda self: False)
    trainer.run()
    assert len(seen) == 2 * 4 and {epoch for epoch, _ in seen} == {1}  # iterations 5 and 6 of the second epoch


def test_steps_that_are_not_finite_may_be_left_out(argv, tmp_path, monkeypatch, capsys):
    settings = {"num_iter": 6, "save_iter": 2, "skip_nonfinite": 2, "ema_decay": 0.9, "log_iter": 1}
    with monkeypatch.context() as patch:
        spoil(patch, 1, 3)
        assert main.main(argv(tmp_path / "run", **settings)) == 0
    log = (tmp_path / "run" / "train_log.txt").read_text()
    assert "step left out (1 of 2): iteration 2: " in log and "step left out (2 of 2): iteration 4: " in log
    assert [row["iteration"] for row in train_lines(tmp_path / "run")] == [1, 3, 5, 6]
    state = torch.load(tmp_path / "run" / "latest" / "training_state.pt", weights_only=True)
    assert state["skipped"] == 2 and {float(entry["step"]) for entry in state["optimizer"]["state"].values()} == {4.0}
    assert all(tensor.isfinite().all() for tensor in weights_of(tmp_path / "run" / "latest" / "unet_ema").values())
    with monkeypatch.context() as patch:  # the count goes on over a resume
        spoil(patch, 6)
        forget_accelerator()
        assert errors.run(main.main, argv(tmp_path / "run", **settings | {"num_iter": 8}, resume="latest")) == 2
    assert "error: iteration 7: " in capsys.readouterr().err


# --------------------------------------------------------------------------------------------------------- two processes
PAIR = {**SMALL, "num_iter": 8, "gradient_accumulation_steps": 2, "num_worker": 1, "eval_epoch": 2}
ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1")


@pytest.fixture(scope="module")
def whole_pair(argv, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pair") / "run"
    code, lines = finish(start("main.py", argv(folder, **PAIR), TORCHRUN))
    assert code == 0, lines
    return folder


def test_two_processes_resume_bit_for_bit(argv, whole_pair, tmp_path):
    """Accumulating, with loader processes, from the middle of an epoch, stopped through the launcher."""
    command = argv(tmp_path, **PAIR)
    process = start("main.py", command, ACCELERATE)
    wait_for(lambda: logged(tmp_path, "iteration 4/8"), process)
    started = descendants(process.pid)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on
    code, lines = finish(process)
    kept = meta_of(tmp_path / "latest")["iteration"]
    assert code != 0 and are_gone(started) and 4 <= kept <= 8, lines
    assert any(line.startswith("stopped: by SIGTERM") for line in lines) or kept == 8
    code, lines = finish(start("main.py", command, TORCHRUN))
    assert code == 0, lines
    assert_same_run(tmp_path, whole_pair)
    assert "bit for bit" not in (tmp_path / "train_log.txt").read_text()


def test_another_number_of_processes_continues_and_says_that_it_is_not_exact(argv, whole_pair, tmp_path):
    (tmp_path / "run").mkdir()
    for name in ("checkpoint-4", "train_log.txt", "val_log.txt"):
        path = whole_pair / name
        (shutil.copytree if path.is_dir() else shutil.copy)(path, tmp_path / "run" / name)
    assert main.main(argv(tmp_path / "run", **PAIR)) == 0
    log = (tmp_path / "run" / "train_log.txt").read_text()
    assert "batches are divided as 1 processes x 2 accumulation steps, before as 2 processes x 2 accumulation steps" in log
    mine, theirs = ([row for row in train_lines(folder)][-1] for folder in (tmp_path / "run", whole_pair))
    assert mine["iteration"] == theirs["iteration"] == 8 and mine["loss"] == pytest.approx(theirs["loss"], rel=2e-3)
    assert mine["lr"] == theirs["lr"]


def test_where_one_process_is_killed_all_end_within_a_minute(argv, tmp_path):
    process = start("main.py", argv(tmp_path, **PAIR), TORCHRUN)
    wait_for(lambda: logged(tmp_path, "iteration 4/8"), process)
    started = descendants(process.pid)
    ranks = [pid for pid in started if "main.py" in Path(f"/proc/{pid}/cmdline").read_text()]
    os.kill(ranks[-1], signal.SIGKILL)
    ended = time.monotonic() + 60
    process.communicate(timeout=60)
    while not are_gone(started) and time.monotonic() < ended:
        time.sleep(0.2)
    assert process.returncode != 0 and are_gone(started)
    assert checkpoint.newest_whole(tmp_path)[1] == []
