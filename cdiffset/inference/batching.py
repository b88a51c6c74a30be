"""Files in, files out, while the device computes: reading ahead, batches of one size, writing behind. All queues are short."""

import errno
import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdiffset.errors import Skipped, UserError
from cdiffset.images import without_georeference

MOST_WAITING = 2**30  # bytes of images read that wait for others of their size


def file_threads(device: torch.device) -> int:
    """How many threads read, and how many write. Where the CPU computes as well, one of each keeps up with it."""
    return 1 if device.type == "cpu" else min(4, os.cpu_count() or 1)


def read_ahead(items: Sequence, read: Callable, threads: int) -> Iterator[Future]:
    """Futures of read(item), in the order of the items; at most twice as many items as threads are ahead of the one given."""
    pool, pending = ThreadPoolExecutor(threads, "reading"), deque()
    try:
        with without_georeference():  # for all threads: what Python does about warnings belongs to none of them
            for item in items:
                pending.append(pool.submit(read, item))
                if len(pending) > 2 * threads:
                    yield pending.popleft()
            while pending:
                yield pending.popleft()
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def writing_behind(threads: int) -> Iterator[Callable]:
    """Within, the function given calls write(what, ...) in a thread; at most twice as many calls wait as there are threads.

    The first error is raised by a later call, or at the end, by which all is done, also where the block ends by an error.
    """
    pending: deque[Future] = deque()

    def write_behind(write: Callable, *arguments) -> None:
        pending.append(pool.submit(write, *arguments))
        while pending and (pending[0].done() or len(pending) > 2 * threads):
            pending.popleft().result()

    with without_georeference(), ThreadPoolExecutor(threads, "writing") as pool:
        yield write_behind
    for future in pending:
        future.result()


def batches_of_one_size(
    items: Sequence,
    read: Callable,  # item => images of one size, [H, W, 3] each
    factor: int,  # sizes are the same that are padded to the same multiple of it
    batch_size: Callable[[int, int], int],  # padded height and width => images together; UserError: it cannot be done at all
    skip: Callable[[int, object], None],  # takes the index of an item that cannot be used, and the reason
    what: str,
    threads: int = 1,
) -> Iterator[tuple[tuple[int, ...], tuple[tuple[np.ndarray, ...], ...]]]:
    """Read items into images, and batch those of one padded size => (indices of the items, images of each kind).

    Items that `read` or `batch_size` refuses are skipped. Where too many bytes wait for images of their size, the largest group
    goes as it is.
    """
    waiting: dict[tuple[int, int], list[tuple[int, tuple[np.ndarray, ...]]]] = {}
    held = 0

    def batch_of(key: tuple[int, int]) -> Iterator:
        nonlocal held
        entries = waiting.pop(key)
        held -= bytes_of(entries)
        yield tuple(index for index, _ in entries), tuple(zip(*(images for _, images in entries), strict=True))
        bar.update(len(entries))

    with tqdm(total=len(items), desc=what, unit="image", mininterval=1) as bar:
        for index, future in enumerate(read_ahead(items, read, threads)):
            try:
                images = future.result()
                key = tuple(-(-side // factor) * factor for side in images[0].shape[:2])
                together = batch_size(*key)
            except UserError as error:
                skip(index, error)
                bar.update()
                continue
            waiting.setdefault(key, []).append((index, images))
            held += bytes_of([(index, images)])
            if len(waiting[key]) >= together:
                yield from batch_of(key)
            elif held > MOST_WAITING:
                yield from batch_of(max(waiting, key=lambda key: bytes_of(waiting[key])))
        for key in list(waiting):
            yield from batch_of(key)


@contextmanager
def skip_too_long(skipped: Skipped, item, source: Path) -> Iterator[None]:
    """Within, an output of `source` with too long a name or path is no error: `item` is skipped."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        skipped.add(item, f"{source}: an output of it would have too long a name or path")


def bytes_of(entries: list[tuple[int, tuple[np.ndarray, ...]]]) -> int:
    return sum(image.nbytes for _, images in entries for image in images)
