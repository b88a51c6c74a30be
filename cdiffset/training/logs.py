"""What a run reports: two text logs, a tracker of Accelerate's, and the means over the iterations between two log lines."""

import hashlib
import logging
import time
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

from cdiffset.config import Config
from cdiffset.errors import UserError


class RunLogs:
    """train_log.txt and val_log.txt, also on the console; the main process's."""

    def __init__(self, folder: Path, is_main: bool):
        self.train, self.val = (text_log(folder / f"{name}_log.txt", is_main) for name in ("train", "val"))


def start_tracking(accelerator: Accelerator, config: Config, iteration: int) -> None:
    """Start the tracker of `report_to`, from `iteration` on; a run that is resumed goes on in its own."""
    folder = Path(config.work_dir).resolve()
    if config.report_to == "tensorboard":  # what a killed run wrote after its checkpoint is written again
        accelerator.init_trackers("tensorboard", init_kwargs={"tensorboard": {"purge_step": iteration + 1}})
    elif config.report_to == "wandb":
        identity = hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        options = {"name": folder.name, "id": identity, "resume": "allow", "dir": str(folder), "config": asdict(config)}
        try:
            accelerator.init_trackers("c-diffset", init_kwargs={"wandb": options})
        except Exception as error:  # of its own kinds
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"report_to: wandb cannot start ({reason}): `wandb login` first, or set WANDB_MODE=offline"
            ) from error


class LogWindow:
    """Sums since the last log line, kept on the device, which is asked for them once a window."""

    def __init__(self, device: torch.device):
        self.device = device
        self.reset()

    def reset(self) -> None:
        self.steps, self.parts, self.learning_rate = 0, 0, 0.0
        self.steps_here, self.started = 0, time.monotonic()  # for the speed: a resumed run's window began in another process
        self.loss = torch.zeros((), device=self.device)
        self.grad_norm = torch.zeros((), device=self.device)
        self.sigma2 = torch.zeros(2, 4, device=self.device)  # (sum, count) by quarter of the timesteps

    def add(self, parts: list[tuple], grad_norm: torch.Tensor, learning_rate: float, num_train_timesteps: int) -> None:
        """One step: (loss, timesteps [B], mean σ² [B] or None) of each micro-batch, and what they led to."""
        self.steps += 1
        self.steps_here += 1
        self.parts += len(parts)
        self.learning_rate = learning_rate
        self.grad_norm += grad_norm
        for loss, timesteps, sigma2 in parts:
            self.loss += loss
            if sigma2 is not None:
                quarter = timesteps * 4 // num_train_timesteps  # [B]
                self.sigma2.index_add_(1, quarter, torch.stack([sigma2, torch.ones_like(sigma2)]))

    def pause(self, since: float) -> None:
        """Leave the time since then out of the speed."""
        self.started += time.monotonic() - since

    def read(self, accelerator: Accelerator, batch_size: int) -> dict[str, float]:
        """Means over the window and all processes, and the last step's lr; σ² only for the quarters that were drawn."""
        loss, grad_norm, sigma2 = (accelerator.reduce(value, "mean") for value in (self.loss, self.grad_norm, self.sigma2))
        values = {"loss": loss.item() / self.parts, "grad_norm": grad_norm.item() / self.steps, "lr": self.learning_rate}
        names = ("sigma2_t0-25%", "sigma2_t25-50%", "sigma2_t50-75%", "sigma2_t75-100%")
        values |= {name: total / count for name, total, count in zip(names, *sigma2.tolist(), strict=True) if count}
        return values | {"images_per_s": self.steps_here * batch_size / max(time.monotonic() - self.started, 1e-9)}

    def state(self) -> dict:
        """What a checkpoint keeps, so that the first log line after a resume is that of a run in one go."""
        sums = {name: getattr(self, name).cpu() for name in ("loss", "grad_norm", "sigma2")}
        return {"steps": self.steps, "parts": self.parts, "learning_rate": self.learning_rate, **sums}

    def restore(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, value.to(self.device) if isinstance(value, torch.Tensor) else value)


def text_log(file: Path, is_main: bool) -> logging.Logger:
    """A plain text log that also speaks on the console, on the main process alone."""
    logger = logging.getLogger(str(file.resolve()))
    logger.setLevel(logging.INFO if is_main else logging.CRITICAL)
    logger.propagate = False
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    if is_main:
        for handler in (LogFile(file, encoding="utf-8"), TqdmHandler()):
            handler.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%Y-%m-%d %H:%M:%S"))
            logger.addHandler(handler)
    return logger


class LogFile(logging.FileHandler):
    """Reports a full disk as any file does, where `logging` would print a traceback and go on."""

    def handleError(self, record: logging.LogRecord) -> None:
        raise


class TqdmHandler(logging.Handler):
    """Prints a line without tearing the progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record))
