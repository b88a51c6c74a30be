"""Which pairs an iteration sees, a function of seed and iteration alone, and the loaders that read them."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Sampler

from cdiffset.config import Config
from cdiffset.errors import UserError, message_of
from feeders.feeder import PairedFeeder

ORDER, NOISE = 1, 2  # purposes of random draws, so that no two share a stream


def seeded(*key: int) -> torch.Generator:
    """A CPU generator that is a function of its key: (seed, purpose, iteration). Nothing random is stored or global."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(key).generate_state(1, np.uint64)[0]))


class ResumableBatchSampler(Sampler):
    """This process's micro-batches of (epoch, index) keys, from iteration `start` to `num_iter`.

    The pairs are shuffled anew in every epoch by (seed, epoch), and what does not fill a batch is left out. All processes
    see one order and each takes its part of every batch, so that a batch is the same whatever the number of processes.
    """

    def __init__(self, length: int, config: Config, start: int, rank: int, world_size: int):
        self.length, self.seed, self.num_iter, self.start = length, config.seed, config.num_iter, start
        self.batch_size = min(config.batch_size, length)  # a list shorter than the batch is one short batch an epoch
        self.micro_steps = config.gradient_accumulation_steps
        self.first_part, parts = rank * self.micro_steps, world_size * self.micro_steps
        self.micro_batch_size, rest = divmod(self.batch_size, parts)
        if rest:
            among = f"{world_size} processes x {self.micro_steps} accumulation steps"
            raise UserError(f"batch_size: {self.batch_size} pairs cannot be divided evenly by {among}")
        self.iterations_per_epoch = length // self.batch_size

    def __len__(self) -> int:
        return (self.num_iter - self.start) * self.micro_steps

    def __iter__(self):
        for iteration in range(self.start, self.num_iter):
            epoch, step = divmod(iteration, self.iterations_per_epoch)
            if step == 0 or iteration == self.start:
                order = np.random.default_rng([self.seed, ORDER, epoch]).permutation(self.length)
            batch = order[step * self.batch_size : (step + 1) * self.batch_size]
            for micro in range(self.micro_steps):
                yield [(epoch, int(index)) for index in batch[self.part(micro)]]

    def part(self, micro: int) -> slice:
        """Where this process's micro-batch lies in the batch."""
        size = self.micro_batch_size
        return slice((self.first_part + micro) * size, (self.first_part + micro + 1) * size)


class LoaderFault(UserError):
    """A batch that cannot be read: a file is gone or damaged, or a loader process died. The training itself is whole."""


def loader_options(config: Config, device: torch.device) -> dict:
    """What all loaders of a run have in common."""
    return {"num_workers": config.num_worker, "pin_memory": device.type == "cuda", "worker_init_fn": in_a_group_of_its_own}


def train_loader(pairs, sampler: ResumableBatchSampler, config: Config, device: torch.device, rank: int) -> DataLoader:
    # Items draw from (seed, epoch, index); the generator is for feeders of other origin that use the workers' own.
    generator = seeded(config.seed, ORDER, sampler.start, rank)
    options = loader_options(config, device) | {"persistent_workers": config.num_worker > 0}
    return DataLoader(pairs, batch_sampler=sampler, generator=generator, **options)


def batches_of(loader: DataLoader) -> Iterator[dict]:
    """The loader's batches; LoaderFault where one cannot be read, always between two steps of the training."""
    try:
        batches = iter(loader)
        # PyTorch would interrupt whatever is being computed when a loader process dies; `next` notices it as well.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        yield from batches
    except UserError as error:
        raise LoaderFault(message_of(error)) from error
    except (RuntimeError, OSError, EOFError) as error:  # a dying process may also reset a connection
        if loader.num_workers == 0 or (isinstance(error, RuntimeError) and "DataLoader worker" not in str(error)):
            raise
        raise LoaderFault(f"num_worker: a loader process died: {str(error).splitlines()[0]}") from error


def in_a_group_of_its_own(_: int) -> None:
    """For a loader process: Ctrl-C and signals to the group are for the trainer, whose last iteration still needs its batches.

    Its parent can still end it, which PyTorch does when the loader goes.
    """
    os.setpgrp()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_DFL)


def data_record(feeder, arguments: dict) -> dict:
    """The pairs of a feeder, for the checkpoint: how many, and a hash of their names and files in the order of the list.

    Files count relative to the folder among the feeder's `arguments` that holds them, so that a dataset may move. Of a feeder
    of another origin only the names count, and without names the number.
    """
    record, lines = {"pairs": len(feeder)}, getattr(feeder, "names", None)
    if isinstance(feeder, PairedFeeder):
        folders = [Path(value) for value in arguments.values() if isinstance(value, str)]
        folders.sort(key=lambda folder: len(folder.parts), reverse=True)
        lines = [[pair.name, *(relative_to_any(folders, path) for path in (pair.sar, pair.eo))] for pair in feeder.pairs]
    if lines is not None:
        record["sha256"] = hashlib.sha256(json.dumps(lines).encode()).hexdigest()
    return record


def relative_to_any(folders: list[Path], path: Path) -> str:
    return next((path.relative_to(folder) for folder in folders if path.is_relative_to(folder)), path).as_posix()
