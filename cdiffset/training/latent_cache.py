"""Latents of the training pairs, computed once and read from the disk while training, so that the VAE's encoder need not run.

    DIR/FINGERPRINT/index.json           what the latents were made from, the settings in words
    DIR/FINGERPRINT/shard-00000.npy      [pairs, views, 2, C, h, w] in the VAE's own precision, SAR before EO
    DIR/FINGERPRINT/block-00000/*.npy    the same, of random crops
    DIR/hashes-KEY.json                  hashes of the images' content, valid while size and date of the files stay

The fingerprint is over the images' content, the feeder and its settings, the VAE's weights and precision. So whatever differs
lies in a folder of its own, nothing stale is ever read, and a dataset may be moved. Shards appear whole or not at all: what a
killed run left is continued. Processes share the work, those of one run as well as runs that know nothing of each other:
whoever holds the lock of a shard writes it.
"""

import fcntl
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext, suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import Dataset
from tqdm import tqdm

from cdiffset.checkpoint import flush, hash_file
from cdiffset.errors import UserError
from cdiffset.images import written_whole
from cdiffset.model import vae_factor
from cdiffset.pairing import Pair
from feeders.feeder import PairedFeeder, View

FORMAT = 1  # of the folder; another number is another cache
INDEX, LOCK = "index.json", ".lock"
STORED = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}  # NumPy knows no bfloat16
MAX_SHARD_BYTES, MIN_SHARDS = 2**27, 16  # small enough to share, and to lose little when killed
IN_USE = 2**30  # the byte of a lock file that stands for the whole folder; shard k's is byte k
UNCACHED = ("pairs", "seed", "max_pixels", "radiometry")  # attributes of a feeder that no latent depends on
HASH_THREADS = 8
POLL_S = 0.5


class Views:
    """Which views of a pair are stored, and which of them an epoch shows.

    Without augmentation it is the centre crop. `crops` None stands for images of the crop's own size: all orientations that
    the feeder's flips and rotation can give them are stored. Else the images are larger and their crops random: of every block
    of `epochs` epochs the views of the first `crops` ones are stored, and repeated in turn until the block ends.
    """

    def __init__(self, feeder: PairedFeeder, crops: int | None, epochs: int):
        self.feeder, self.crops = feeder, crops if feeder.augment else None
        self.epochs = epochs if self.crops else None
        # An augmentation that is off leaves one choice.
        self.orientations = list(product(*((False, True)[: 1 + on] for on in feeder.augmentations)))
        self.count = self.crops or len(self.orientations)
        self.words = "random crops" if self.crops else "orientations" if feeder.augment else "centre crop"

    def block(self, epoch: int) -> int:
        return epoch // self.epochs if self.epochs else 0

    def number(self, epoch: int, index: int) -> int:
        """Which of the stored views the item [epoch, index] of the feeder is."""
        if self.crops:
            return epoch % self.epochs % self.crops
        view = self.feeder.view(epoch, index, self.feeder.crop_size, self.feeder.crop_size)
        return self.orientations.index((view.flip_horizontally, view.flip_vertically, view.rotate))

    def stored(self, block: int, index: int, height: int, width: int) -> list[View]:
        """The views that are stored of a pair whose images have that size in px."""
        if self.crops:
            return [self.feeder.view(block * self.epochs + n, index, height, width) for n in range(self.crops)]
        if not self.feeder.augment:
            return [self.feeder.view(0, index, height, width)]
        size = self.feeder.crop_size
        if (height, width) != (size, size):
            raise UserError(
                f"latent_cache: {self.feeder.pairs[index].eo} is {width} x {height} px, larger than crop_size {size}: "
                f"its crops are random; say by latent_cache_crops how many are kept, or train without the cache"
            )
        return [View(0, 0, *orientation) for orientation in self.orientations]


class StoredViews(Dataset):
    """Pixels of all stored views of some pairs, in order: item k is view k % count of pair first + k // count."""

    def __init__(self, views: Views, block: int, pairs: range):
        self.views, self.block, self.pairs = views, block, pairs
        self.latest = (None, None, None)  # index, images and views of the pair that was read last

    def __len__(self) -> int:
        return len(self.pairs) * self.views.count

    def __getitem__(self, key: int) -> dict:
        feeder, (place, number) = self.views.feeder, divmod(key, self.views.count)
        index = self.pairs[place]
        if self.latest[0] != index:
            images = feeder.read(feeder.pairs[index])
            self.latest = index, images, self.views.stored(self.block, index, *images[0].shape[:2])
        _, images, views = self.latest
        return feeder.item(index, images, views[number])


class CachedPairs(Dataset):
    """The feeder's items with latents for images: [epoch, index] => {"z_sar", "z_eo": float32 [C, h, w], "name": str}."""

    def __init__(self, views: Views, shards: "Shards"):
        self.views, self.shards = views, shards

    def __len__(self) -> int:
        return len(self.views.feeder)

    def __getitem__(self, key: tuple[int, int]) -> dict:
        epoch, index = key
        z_sar, z_eo = self.shards.read(index, self.views.number(epoch, index))
        return {"z_sar": z_sar, "z_eo": z_eo, "name": self.views.feeder.pairs[index].name}


class Shards:
    """The .npy files of one folder, memory-mapped: latents [pairs, *shape], shape = (views, 2, C, h, w)."""

    def __init__(self, folder: Path, pairs: int, shape: tuple[int, ...], dtype: torch.dtype):
        self.folder, self.pairs, self.shape, self.dtype = folder, pairs, shape, dtype
        self.pair_bytes = math.prod(shape) * dtype.itemsize
        self.size = max(1, min(MAX_SHARD_BYTES // self.pair_bytes, math.ceil(pairs / MIN_SHARDS)))  # pairs
        self.maps: dict[int, np.ndarray] = {}

    def __len__(self) -> int:
        return math.ceil(self.pairs / self.size)

    def file(self, shard: int) -> Path:
        return self.folder / f"shard-{shard:05d}.npy"

    def rows(self, shard: int) -> range:
        return range(shard * self.size, min((shard + 1) * self.size, self.pairs))

    def array(self, shard: int) -> np.ndarray | None:
        """A shard's memory map, or None where the file is not there or not whole."""
        if shard not in self.maps:
            try:
                array = np.load(self.file(shard), mmap_mode="r", allow_pickle=False)
            except (OSError, ValueError, EOFError):  # gone; not as long as it says; no header
                return None
            if array.shape != (len(self.rows(shard)), *self.shape) or array.dtype != STORED[self.dtype]:
                return None
            self.maps[shard] = array
        return self.maps[shard]

    def needed(self, shards: int) -> int:
        """Bytes of so many shards."""
        return min(shards * self.size, self.pairs) * self.pair_bytes

    def missing(self) -> list[int]:
        return [shard for shard in range(len(self)) if self.array(shard) is None]

    def read(self, index: int, view: int) -> torch.Tensor:
        """SAR and EO latent [2, C, h, w] of a pair, float32."""
        shard, place = divmod(index, self.size)
        if (array := self.array(shard)) is None:
            raise UserError(f"latent_cache: {self.file(shard)} is gone or damaged; the same command writes it anew")
        return torch.from_numpy(np.array(array[place, view])).view(self.dtype).float()

    def write(self, shard: int, latents: torch.Tensor) -> None:
        """Latents [pairs of the shard, *shape] in the cache's precision."""
        with written_whole(self.file(shard)) as temporary:
            np.save(temporary, (latents.view(torch.int16) if self.dtype == torch.bfloat16 else latents).numpy())
            flush(temporary)


class Work(NamedTuple):
    """How latents are computed: what the trainer lends to the cache."""

    encode: Callable[[torch.Tensor], torch.Tensor]  # pixels [B, 3, H, W] => latents [B, C, h, w]
    load: Callable[[Dataset, int], Iterable[dict]]  # dataset, batch size => its batches in order
    batch_size: int
    stop: Callable[[], bool]  # whether to leave off
    show: bool  # a progress bar


class LatentCache:
    """The part of DIR that belongs to a feeder and a VAE; `open` gives the dataset of a block of epochs, written if need be.

    `report` takes lines for the log. UserError where the feeder's views cannot be cached or DIR cannot be used.
    """

    def __init__(
        self,
        root: Path,
        feeder: PairedFeeder,
        vae: AutoencoderKL,
        crops: int | None,
        epochs: int,
        report: Callable[[str], None],
    ):
        if not isinstance(feeder, PairedFeeder):
            raise UserError(f"latent_cache: {type(feeder).__name__} is no PairedFeeder, whose views alone can be cached")
        if crops and (not feeder.augment or feeder.load_size == feeder.crop_size):
            raise UserError("latent_cache_crops: no crop is random here, so the cache is exact without it: leave it null")
        self.root, self.views, self.report = root, Views(feeder, crops, epochs), report
        self.held: TextIO | None = None  # the lock file of the folder in use
        first = feeder.read(feeder.pairs[0])
        self.views.stored(0, 0, *first[0].shape[:2])  # refuses random crops without a number of them
        self.settings = {
            "format": FORMAT,
            "feeder": f"{type(feeder).__module__}.{type(feeder).__qualname__}",
            **{name: str(value) for name, value in vars(feeder).items() if name not in UNCACHED},
            "images": digest(*(found.encode() for found in hashes_of(root, feeder.pairs))),
            "first pair as read": digest(*(image.tobytes() for image in first)),  # other code may read the same file otherwise
            "vae": hash_encoder(vae),
            "precision": str(vae.dtype).removeprefix("torch."),
            "views": self.views.words,
        }
        if crops:
            self.settings |= {"seed": feeder.seed, "crops": crops, "epochs": epochs}
        self.folder = root / digest(json.dumps(self.settings, sort_keys=True).encode())[:16]
        side = feeder.crop_size // vae_factor(vae)
        self.shape, self.dtype = (self.views.count, 2, vae.config.latent_channels, side, side), vae.dtype
        if not self.folder.is_dir() and (reason := self.stale()):
            report(reason)

    def open(self, block: int, work: Work) -> CachedPairs | None:
        """The dataset of a block, once all of it is written, by this process or others; None where `work.stop()` came first."""
        self.close()
        folder = self.folder / f"block-{block:05d}" if self.views.crops else self.folder
        shards = Shards(folder, len(self.views.feeder), self.shape, self.dtype)
        missing = shards.missing()
        try:
            if self.views.crops:
                self.remove_blocks_before(folder)
            if missing:
                self.start_writing(shards, missing)
            self.held = (folder / LOCK).open("a+") if missing else open_lock(folder)
            if self.held:
                fcntl.lockf(self.held, fcntl.LOCK_SH, 1, IN_USE)  # whoever removes old blocks leaves this one
            size = (
                f"{shards.pairs} pairs x {self.views.count} views ({self.views.words}), {gigabytes(shards.needed(len(shards)))}"
            )
            todo = f", {len(missing)} of {len(shards)} shards to write" if missing else ""
            self.report(f"latent cache: {folder}: {size}{todo}")
            if missing and not self.fill(shards, block, work):
                return None
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"latent_cache: {folder} lacks {len(missing)} of {len(shards)} shards and cannot be written into: {reason}"
            ) from error
        shards.maps.clear()  # loader processes open their own
        return CachedPairs(self.views, shards)

    def start_writing(self, shards: Shards, missing: list[int]) -> None:
        """Make the folder, with the settings beside it, where there is room for what is missing."""
        shards.folder.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("a+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not (self.folder / INDEX).is_file():
                with written_whole(self.folder / INDEX) as temporary:
                    temporary.write_text(json.dumps(self.settings, indent=2) + "\n")
        needed, free = shards.needed(len(missing)), shutil.disk_usage(shards.folder).free
        if needed > free:
            raise UserError(
                f"latent_cache: {shards.folder} needs {gigabytes(needed)} more for {shards.pairs} pairs x {self.views.count} "
                f"views, but {gigabytes(free)} are free"
            )

    def fill(self, shards: Shards, block: int, work: Work) -> bool:
        """Write whatever is missing and nobody else is at, until nothing is missing => whether it came to that."""
        images = 2 * self.views.count  # of a pair
        with tqdm(total=shards.pairs * images, desc="encoding", unit="image", disable=not work.show, leave=False) as bar:
            while missing := shards.missing():
                bar.n = (shards.pairs - sum(len(shards.rows(shard)) for shard in missing)) * images
                bar.refresh()
                idle = True
                for shard in missing:
                    if not self.claim(shard):
                        continue
                    try:
                        if shards.array(shard) is None:  # nobody has finished it since
                            idle = False
                            if (latents := self.encoded(shards, shard, block, work, bar)) is None:
                                return False
                            shards.write(shard, latents)
                    finally:
                        fcntl.lockf(self.held, fcntl.LOCK_UN, 1, shard)
                if work.stop():
                    return False
                if idle:
                    time.sleep(POLL_S)
        return True

    def claim(self, shard: int) -> bool:
        try:
            fcntl.lockf(self.held, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
        except (BlockingIOError, PermissionError):
            return False
        return True

    def encoded(self, shards: Shards, shard: int, block: int, work: Work, bar: tqdm) -> torch.Tensor | None:
        """The latents of a shard [pairs, views, 2, C, h, w], or None where work.stop() came first.

        They are encoded in batches of the size that training would have used, since results depend on it in the last bits.
        """
        pairs = shards.rows(shard)
        latents = torch.empty(len(pairs) * self.views.count, *self.shape[1:], dtype=self.dtype)
        place = 0
        for batch in work.load(StoredViews(self.views, block, pairs), work.batch_size):
            if work.stop():
                return None
            size = len(batch["name"])
            for half, kind in enumerate(("sar", "eo")):
                filled = batch[kind][torch.arange(work.batch_size) % size]  # the last batch may be short
                latents[place : place + size, half] = work.encode(filled)[:size].cpu()
            finite = latents[place : place + size].flatten(1).isfinite().all(1)
            if not finite.all():
                name = batch["name"][int((~finite).nonzero()[0])]
                raise UserError(f"latent_cache: the latents of {name} are not finite in {self.settings['precision']}")
            place += size
            bar.update(2 * size)
        return latents.unflatten(0, (len(pairs), self.views.count))

    def remove_blocks_before(self, folder: Path) -> None:
        """Blocks of earlier epochs go, unless a run is still at them or they cannot be removed."""
        for old in sorted(self.folder.glob("block-*")):
            if old.name >= folder.name or (lock := open_lock(old)) is None:
                continue
            with closing(lock), suppress(OSError):
                fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, IN_USE)
                shutil.rmtree(old)

    def stale(self) -> str | None:
        """One line on what differs from the nearest of the caches in DIR, or None where there is none."""
        nearest = None
        for file in sorted(self.root.glob(f"*/{INDEX}")):
            try:
                before = dict(json.loads(file.read_text()))
            except (OSError, ValueError, TypeError):
                continue
            changed = [name for name in {**before, **self.settings} if before.get(name) != self.settings.get(name)]
            if nearest is None or len(changed) < len(nearest[1]):
                nearest = file.parent, changed, before
        if nearest is None:
            return None
        folder, changed, before = nearest
        words = [
            f"other {name}" if name in ("images", "vae", "first pair as read")
            else f"{name} {before.get(name)} -> {self.settings.get(name)}" for name in changed
        ]  # fmt: skip
        return f"latent cache: {folder} does not fit ({', '.join(words)})"

    def close(self) -> None:
        if self.held:
            self.held.close()
            self.held = None


def open_lock(folder: Path) -> TextIO | None:
    """The lock file of a folder, for reading alone in a read-only one; None where there is none. Closing it lets go of all."""
    for mode in ("a+", "r"):
        with suppress(OSError):
            return (folder / LOCK).open(mode)
    return None


def hashes_of(root: Path, pairs: list[Pair]) -> list[str]:
    """Hashes of the content of all images, the SAR and the EO of one pair after the other.

    A list in `root` spares reading the files whose size and date are as before. One process at a time looks for what is
    new, and the others find it in the list.
    """
    with suppress(OSError):
        root.mkdir(parents=True, exist_ok=True)
    try:
        files = [file for pair in pairs for file in (pair.sar, pair.eo)]
        stats = [file.stat() for file in files]
        key = digest(json.dumps([[pair.name for pair in pairs], [stat.st_size for stat in stats]]).encode())
        return up_to_date(root / f"hashes-{key[:16]}.json", files, [stat.st_mtime_ns for stat in stats])
    except OSError as error:
        raise UserError(f"latent_cache: {error.filename or root}: {error.strerror or error}") from error


def up_to_date(list_file: Path, files: list[Path], dates: list[int]) -> list[str]:
    """The hashes of files of these dates, from the list and for it."""
    lock = open_lock(list_file.parent)
    with closing(lock) if lock else nullcontext():
        if writable := lock is not None and lock.writable():
            fcntl.lockf(lock, fcntl.LOCK_EX)
        known = read_hashes(list_file, len(files))
        new = [place for place, date in enumerate(dates) if known[place][0] != date]
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            hashed = pool.map(hash_file, [files[place] for place in new])
            hashed = list(tqdm(hashed, desc="hashing images", unit="file", total=len(new), disable=not new, leave=False))
        for place, found in zip(new, hashed, strict=True):
            known[place] = [dates[place], found]
        if new and writable:
            with written_whole(list_file) as temporary:
                temporary.write_text(json.dumps(known))
    return [found for _, found in known]


def read_hashes(file: Path, count: int) -> list[list]:
    """[date in ns, hash] of each of `count` files; [None, ""] where nothing is known."""
    try:
        known = json.loads(file.read_text())
        if len(known) == count and all(len(entry) == 2 for entry in known):
            return known
    except (OSError, ValueError, TypeError):
        pass
    return [[None, ""] for _ in range(count)]


def hash_encoder(vae: AutoencoderKL) -> str:
    """Of everything that latents depend on: the encoder's weights, and the VAE's config."""
    config = {name: value for name, value in vae.config.items() if not name.startswith("_")}
    parts = [json.dumps(config, sort_keys=True, default=str).encode()]
    for name, tensor in sorted(vae.state_dict().items()):
        if name.startswith(("encoder.", "quant_conv.")):
            parts += [name.encode(), tensor.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def digest(*parts: bytes) -> str:
    sha = hashlib.sha256()
    for part in parts:
        sha.update(len(part).to_bytes(8, "little"))
        sha.update(part)
    return sha.hexdigest()


def gigabytes(size: int) -> str:
    return f"{size / 1e9:.3g} GB"
