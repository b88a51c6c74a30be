"""The folder of a run, the checkpoint it continues from, and the one list of what a checkpoint holds."""

import json
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object

from cdiffset import checkpoint
from cdiffset.config import KNOBS, Config, flatten
from cdiffset.errors import UserError, reason_of
from cdiffset.training.logs import LogWindow, RunLogs
from cdiffset.training.weights import TrainedWeights


class RunFolder:
    """work_dir; of a run in training, locked for this process by `agree_on_resume` or, where it is new, by `open`."""

    def __init__(self, config: Config, accelerator: Accelerator, data: dict | None = None):
        """`data`: of `batches.data_record`, None in phase test."""
        self.config, self.accelerator, self.data = config, accelerator, data
        self.path, self.lock = Path(config.work_dir), None
        self.found_at_start: list[str] = []  # what an earlier run left behind, for the log

    def open(self) -> RunLogs:
        """Make the folder => its logs."""
        is_main = self.accelerator.is_main_process
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if is_main and self.config.phase == "train":
                self.lock = self.lock or checkpoint.lock(self.path)
                (self.path / "config.json").write_text(json.dumps(asdict(self.config), indent=2) + "\n")
            logs = RunLogs(self.path, is_main)
        except OSError as error:
            raise UserError(f"work_dir: cannot write into {self.path}: {reason_of(error)}") from error
        for line in self.found_at_start:
            logs.train.info(line)
        return logs

    def agree_on_resume(self) -> Path | None:
        """The checkpoint that all processes continue from, or None; the main one looks, once the folder is its own."""
        outcome = [None, None]
        if self.accelerator.is_main_process:
            try:
                if self.path.is_dir():
                    self.lock = checkpoint.lock(self.path)
                    self.found_at_start = checkpoint.tidy(self.path)
                outcome = [self.find_resume(), None]
            except (UserError, OSError) as error:
                outcome = [None, str(error)]
        folder, fault = broadcast_object_list(outcome)
        if fault:
            raise UserError(fault)
        return folder

    def find_resume(self) -> Path | None:
        """The checkpoint folder to continue from, or None; see `resume` in the configuration."""
        written, found = self.config.resume, checkpoint.list_checkpoints(self.path)
        if written is None:
            if found:
                raise UserError(f"resume: null starts afresh, but {self.path} holds {found[-1].name}: take another work_dir")
            return None
        if written not in ("auto", "latest"):
            checkpoint.require_state(Path(written))
            return Path(written)
        if not found:
            if written == "latest":
                raise UserError(f"resume: latest, but {self.path} holds no checkpoint")
            return None
        newest, passed_over = checkpoint.newest_whole(self.path)
        if newest is None:
            raise UserError(f"work_dir: no checkpoint to continue from: {'; '.join(passed_over)}; choose another work_dir")
        self.found_at_start += [f"passed over: {fault}" for fault in passed_over]
        if written == "auto" and (changed := self.changed_settings(newest)):
            other = f"{self.path} holds a run of other settings or data ({'; '.join(changed)})"
            raise UserError(f"work_dir: {other}: choose another work_dir, or continue it with these by --resume latest")
        return newest

    def changed_settings(self, folder: Path) -> list[str]:
        """What differs between the settings and data of a checkpoint and those of now, of what changes the training."""
        meta, now = checkpoint.read_meta(folder), dict(flatten(asdict(self.config)))
        before = dict(flatten(asdict(Config()) | meta["config"]))  # what an earlier version did not know was as by default
        kept = [name for name, each in KNOBS.items() if not each.metadata["may_change"]]
        names = [name for name in {**before, **now} if name.split(".")[0] in kept]
        changed = [f"{name}: {before.get(name)} -> {now.get(name)}" for name in names if before.get(name) != now.get(name)]
        return changed + self.changed_data(meta.get("data"))

    def changed_data(self, before: dict | None) -> list[str]:
        """What differs between the training pairs of a checkpoint and those of now; an earlier version kept no record."""
        if before is None or before == self.data:
            return []
        pairs, now = before["pairs"], self.data["pairs"]
        return [f"training data: {pairs} pairs" + (", but other files or order" if pairs == now else f" -> {now} pairs")]

    def newest_result(self) -> Path:
        """What phase test evaluates where accelerator_path is null: this run's best, else its latest."""
        for name in ("best", "latest"):
            if (self.path / name / checkpoint.META).is_file():
                return self.path / name
        raise UserError(f"accelerator_path: null, and {self.path} has neither best/ nor latest/: which checkpoint to test?")

    def last_good(self) -> str:
        kept = checkpoint.list_checkpoints(self.path)
        return f"last good checkpoint: {kept[-1] if kept else 'none yet'}"


@dataclass
class RunState:
    """What a resumed run continues from: the one list of what a checkpoint holds."""

    weights: TrainedWeights
    prompt_embedding: torch.Tensor  # [1,L,D]
    window: LogWindow  # sums since the last log line
    facts: dict  # for those who use the checkpoint: started_from, gsd_m, sar_statistics, radiometry
    iteration: int = 0  # steps done
    best: float | None = None  # value of config.best_metric
    skipped: int = 0  # steps left out, as their gradient was not finite
    unfinished: bool = False  # whether validation and saving of this iteration are still to be done

    def save(self, folder: RunFolder, names: list[str], iterations_per_epoch: int) -> None:
        """Write one checkpoint under each name. All processes come here together."""
        config, accelerator = folder.config, folder.accelerator
        windows, weights = gather_object([self.window.state()]), self.weights.state_dict()
        unet, average = self.weights.whole()
        if accelerator.is_main_process:
            base = Path(config.pretrained_model_name_or_path).expanduser()
            meta = {
                "iteration": self.iteration,
                "unfinished": self.unfinished,
                "epoch": self.iteration // iterations_per_epoch,
                "batch_parts": batch_parts(config, accelerator),
                "best": {config.best_metric: self.best} if self.best is not None and math.isfinite(self.best) else {},
                **self.facts,
                "data": folder.data,
                "base_folder": os.path.abspath(base) if base.is_dir() else None,  # which commands started elsewhere find
                "config": asdict(config),
            }
            state = {**weights, "windows": windows, "skipped": self.skipped}
            checkpoint.write_checkpoint(folder.path, names, unet, average, self.prompt_embedding, state, meta)
            checkpoint.prune(folder.path, config.checkpoints_total_limit, just_written=names)
        accelerator.wait_for_everyone()

    def restore(self, state: dict, meta: dict, accelerator: Accelerator, best_metric: str) -> None:
        """All but masters and average, which are loaded as any U-Net. KeyError or ValueError where it does not fit."""
        self.weights.restore(state)
        self.skipped = state["skipped"]
        if len(windows := state["windows"]) == accelerator.num_processes:
            self.window.restore(windows[accelerator.process_index])
        self.iteration, self.unfinished = meta["iteration"], meta["unfinished"]
        self.best = meta.get("best", {}).get(best_metric)  # by another metric, the best is sought anew


def batch_parts(config: Config, accelerator: Accelerator) -> str:
    return f"{accelerator.num_processes} processes x {config.gradient_accumulation_steps} accumulation steps"


def report_resume(folder: RunFolder, resume_from: Path, meta: dict, report: Callable[[str], None]) -> None:
    """Log lines: where the run continues, and what has changed since."""
    report(f"resumed from {resume_from} at iteration {meta['iteration']}")
    for change in folder.changed_settings(resume_from):
        report(f"changed since: {change}")
    before, now = meta["batch_parts"], batch_parts(folder.config, folder.accelerator)
    if before != now:
        report(f"batches are divided as {now}, before as {before}: equal up to rounding, not bit for bit")
