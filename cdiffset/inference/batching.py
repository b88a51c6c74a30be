"""Files in, files out, while the device computes: reading ahead, batches of one size, writing behind. All queues are short."""

import errno
import os
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from cdiffset.errors import UserError
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


class WriteBehind:
    """`with WriteBehind(threads) as write_behind: write_behind(write, what, ...)` calls write(what, ...) in a thread.

    At most twice as many calls wait as there are threads. The first error is raised by a later call, or at the end of the
    block. What was handed over is done at the end of the block, also where that ends by an error.
    """

    def __init__(self, threads: int):
        self.pool, self.threads, self.pending = ThreadPoolExecutor(threads, "writing"), threads, deque()
        self.quiet = without_georeference()

    def __enter__(self):
        self.quiet.__enter__()
        return self

    def __call__(self, write: Callable, *arguments) -> None:
        self.pending.append(self.pool.submit(write, *arguments))
        while self.pending and (self.pending[0].done() or len(self.pending) > 2 * self.threads):
            self.pending.popleft().result()

    def __exit__(self, kind, *_) -> None:
        self.pool.shutdown()
        self.quiet.__exit__(None, None, None)
        if kind is None:
            for future in self.pending:
                future.result()


def batches_of_one_size(
    items: Sequence,
    read: Callable,  # item => images of one size, [H, W, 3] each
    factor: int,  # sizes are the same that are padded to the same multiple of it
    batch_size: Callable[[int, int], int],  # padded height and width => images together; UserError: it cannot be done at all
    unreadable: list,
    what: str,
    threads: int = 1,
) -> Iterator[tuple[tuple[int, ...], tuple[tuple[np.ndarray, ...], ...]]]:
    """Read items into images, and batch those of one padded size => (indices of the items, images of each kind).

    Items that `read` or `batch_size` refuses are reported on stderr and go to `unreadable`. Where too many bytes wait for
    images of their size, the largest group goes as it is.
    """
    waiting: dict[tuple[int, int], list[tuple[int, tuple[np.ndarray, ...]]]] = {}
    held = 0
    with tqdm(total=len(items), desc=what, unit="image", mininterval=1) as bar:

        def batch_of(key: tuple[int, int]) -> Iterator:
            nonlocal held
            entries = waiting.pop(key)
            held -= bytes_of(entries)
            yield tuple(index for index, _ in entries), tuple(zip(*(images for _, images in entries), strict=True))
            bar.update(len(entries))

        for index, future in enumerate(read_ahead(items, read, threads)):
            try:
                images = future.result()
                key = tuple(-(-side // factor) * factor for side in images[0].shape[:2])
                together = batch_size(*key)
            except UserError as error:
                unreadable.append(items[index])
                bar.write(f"skipped: {error}", file=sys.stderr)
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
def skip_too_long(item, source: Path, skipped: list) -> Iterator[None]:
    """Within, an output of `source` with too long a name or path is no error: it is reported, and `item` goes to `skipped`."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        skipped.append(item)
        tqdm.write(f"skipped: {source}: an output of it would have too long a name or path", file=sys.stderr)


def bytes_of(entries: list[tuple[int, tuple[np.ndarray, ...]]]) -> int:
    return sum(image.nbytes for _, images in entries for image in images)
