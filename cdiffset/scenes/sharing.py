"""Several processes of a launcher (accelerate launch, torchrun) on one piece of work, which the first of them hands out."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import distributed

from cdiffset import ranks

HEADER = 2 + 4 * 2  # stage, index, and the shapes of at most two arrays of four dimensions; stage -1: there is no more work


class Team:
    """The processes of a launch, or this one alone. Only the first reads and writes files, so they need not share a disk."""

    def __init__(self, work: Callable[..., np.ndarray]):
        """work(stage, index, *arrays [B, C, h, w]) => array [B, C', h', w'], all float32; the same in every process."""
        self.work, (self.rank, self.size) = work, ranks.place() if ranks.can_talk() else (0, 1)
        if self.size > 1:
            ranks.join()

    def share(self, stage: int, index: int, inputs: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
        """In the first process: at most one set of arrays for each process => what each makes of its set, in their order."""
        for rank, arrays in enumerate(inputs[1:], start=1):
            send(rank, stage, index, arrays)
        own = self.work(stage, index, *inputs[0])
        return [own, *(receive(rank)[2][0] for rank in range(1, len(inputs)))]

    def help(self) -> None:
        """In the other processes: work until dismissed."""
        while True:
            stage, index, arrays = receive(0)
            if stage < 0:
                return
            send(0, stage, index, [self.work(stage, index, *arrays)])

    def dismiss(self) -> None:
        """In the first process: there is no more work."""
        for rank in range(1, self.size):
            send(rank, -1, 0, [])


def send(rank: int, stage: int, index: int, arrays: Sequence[np.ndarray]) -> None:
    shapes = [side for array in arrays for side in array.shape]
    distributed.send(torch.tensor([stage, index, *shapes, *[0] * (HEADER - 2 - len(shapes))]), rank)
    for array in arrays:
        distributed.send(torch.from_numpy(np.ascontiguousarray(array, np.float32)), rank)


def receive(rank: int) -> tuple[int, int, list[np.ndarray]]:
    """=> (stage, index, arrays), as sent."""
    header = torch.empty(HEADER, dtype=torch.int64)
    distributed.recv(header, rank)
    stage, index, *sides = header.tolist()
    arrays = []
    for shape in (sides[:4], sides[4:]):
        if any(shape):
            arrays.append(torch.empty(shape))
            distributed.recv(arrays[-1], rank)
    return stage, index, [array.numpy() for array in arrays]
