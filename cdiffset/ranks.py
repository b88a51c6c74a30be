"""The processes of a launcher (accelerate launch, torchrun), among which files are dealt out without any communication."""

import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta

from cdiffset.errors import UserError

LONGEST_RUN = timedelta(days=365)  # a process that is done waits for the slowest one; torch's own limit is 30 minutes


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) without a launcher."""
    rank, world_size = (_from_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < world_size:
        raise UserError(f"RANK and WORLD_SIZE, which launchers set: expected RANK from 0 to {world_size - 1}, found {rank}")
    return rank, world_size


def local_rank() -> int:
    return _from_environment("LOCAL_RANK", 0)


def _from_environment(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError as error:
        raise UserError(f"{name}, which launchers set: expected a number, found {os.environ[name]!r}") from error


def share_by_rank(names: Sequence[str]) -> list[int]:
    """Indices of this process's names, ascending: equally many for every process, by the names and the rank alone.

    Dealt out in the order of the names' hashes, because in the order of a folder large images may alternate with small ones.
    """
    rank, world_size = rank_and_world_size()
    order = sorted(range(len(names)), key=lambda index: hashlib.sha256(names[index].encode(errors="surrogateescape")).digest())
    return sorted(order[rank::world_size])


def total_over_ranks(number: int) -> int:
    """The sum over all processes, once every one is done; without an address to meet at, the process's own number.

    A launcher ends all processes as soon as one exits with an error, so none may exit before the others are done.
    """
    if rank_and_world_size()[1] == 1 or "MASTER_ADDR" not in os.environ:
        return number
    import torch  # slow to import, and a single process does without
    from torch import distributed

    distributed.init_process_group("gloo", timeout=LONGEST_RUN)
    total = torch.tensor(number)
    distributed.all_reduce(total)
    distributed.destroy_process_group()  # its threads would abort the process at exit
    return int(total)
