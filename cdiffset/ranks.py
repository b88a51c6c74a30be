"""The processes of a launcher (accelerate launch, torchrun) and their shares of a list of files, which nobody talks over."""

import hashlib
import os
from collections.abc import Sequence
from datetime import timedelta

from cdiffset.errors import UserError

PATIENCE = timedelta(days=30)  # whoever is done first waits for the last one, and a helper for its first work


def place() -> tuple[int, int]:
    """(rank, number of processes); (0, 1) without a launcher."""
    rank, count = (_from_environment(name, default) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    if not 0 <= rank < count:
        raise UserError(f"RANK and WORLD_SIZE, which launchers set: expected RANK from 0 to {count - 1}, found {rank}")
    return rank, count


def local_rank() -> int:
    return _from_environment("LOCAL_RANK", 0)


def _from_environment(name: str, default: int) -> int:
    try:
        return int(os.environ.get(name, default))
    except ValueError as error:
        raise UserError(f"{name}, which launchers set: expected a number, found {os.environ[name]!r}") from error


def share(names: Sequence[str]) -> list[int]:
    """Indices of this process's names, ascending: a function of the names and its place alone, equally many for everyone.

    The names are dealt out in the order of their hashes, because in the order of a folder large images may take turns with
    small ones.
    """
    rank, count = place()
    order = sorted(range(len(names)), key=lambda index: hashlib.sha256(names[index].encode(errors="surrogateescape")).digest())
    return sorted(order[rank::count])


def can_talk() -> bool:
    """Whether there are others, and a launcher's address to meet them at."""
    return place()[1] > 1 and "MASTER_ADDR" in os.environ


def join() -> None:
    """Meet the others, once; blocks until all have come."""
    from torch import distributed  # slow to import, and a process alone needs it for nothing

    if not distributed.is_initialized():
        distributed.init_process_group("gloo", timeout=PATIENCE)


def total(number: int) -> int:
    """The sum over all processes, once every one has come here for the last talk; those that cannot talk return their own.

    A launcher ends all processes where one of them ends with an error, so none may, before the others are done.
    """
    if not can_talk():
        return number
    import torch

    join()
    summed = torch.tensor(number)
    torch.distributed.all_reduce(summed)
    torch.distributed.destroy_process_group()  # its threads abort a process at whose exit they still run
    return int(summed)
