"""Latents of the training pairs, computed once and read from the disk while training, so that the VAE's encoder need not run.

    DIR/FINGERPRINT/index.json           what the latents were made from, the settings in words
    DIR/FINGERPRINT/shard-00000.npy      [pairs, views, 2, C, h, w] in the VAE's own precision, SAR before EO

The fingerprint is over the images' names, sizes and dates, the feeder and its settings, the VAE's weights and precision. So
whatever differs lies in a folder of its own, and a dataset may be moved with its dates (mv, cp -p, rsync -a). Shards appear
whole or not at all: a killed run's are continued. Processes divide the work among them, those of one run as well as of runs
that know nothing of each other: whoever holds the lock of a shard writes it.
"""

import fcntl
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from itertools import product
from pathlib import Path
from typing import NamedTuple, TextIO

import numpy as np
import torch
from diffusers import AutoencoderKL
from torch.utils.data import Dataset
from tqdm import tqdm

from cdiffset.checkpoint import flush
from cdiffset.errors import UserError
from cdiffset.images import write_text, written_whole
from cdiffset.pairing import Pair
from cdiffset.pipeline import vae_factor
from feeders.feeder import PairedFeeder, View

FORMAT = 2  # of the folder; another number is another cache
INDEX, LOCK = "index.json", ".lock"
STORED = {torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: np.int16}  # NumPy knows no bfloat16
MAX_SHARD_BYTES, MIN_SHARDS = 2**27, 16  # small enough to share, and to lose little when killed
UNCACHED = ("pairs", "seed", "max_pixels", "gsd_m", "radiometry")  # attributes of a feeder that no latent depends on
HASHED = ("images", "vae", "first pair as read")  # settings whose values say nothing
POLL_S = 0.5


class Views:
    """Which views of a pair are stored, and which of them an epoch shows.

    Without augmentation it is the centre crop; with it, all orientations that the feeder's flips and rotation can give images
    of the crop's own size. Larger images have random crops, too many to store.
    """

    def __init__(self, feeder: PairedFeeder):
        self.feeder = feeder
        # An augmentation that is off leaves one choice.
        self.orientations = list(product(*((False, True)[: 1 + on] for on in feeder.augmentations)))
        self.count = len(self.orientations)
        self.words = "orientations" if feeder.augment else "centre crop"

    def number(self, epoch: int, index: int) -> int:
        """Which of the stored views the item [epoch, index] of the feeder is."""
        view = self.feeder.view(epoch, index, self.feeder.crop_size, self.feeder.crop_size)
        return self.orientations.index((view.flip_horizontally, view.flip_vertically, view.rotate))

    def stored(self, index: int, height: int, width: int) -> list[View]:
        """The views that are stored of a pair whose images have that size in px."""
        if not self.feeder.augment:
            return [self.feeder.view(0, index, height, width)]
        size = self.feeder.crop_size
        if (height, width) != (size, size):
            found = f"{self.feeder.pairs[index].eo} is {width} x {height} px, larger than crop_size {size}"
            remedy = "cut chips of crop_size (data/make_chips.py) or train without it"
            raise UserError(f"latent_cache: {found}: its crops are random and cannot be cached; {remedy}")
        return [View(0, 0, *orientation) for orientation in self.orientations]


class StoredViews(Dataset):
    """Pixels of all stored views of some pairs, in order: item k is view k % count of pair first + k // count."""

    def __init__(self, views: Views, pairs: range):
        self.views, self.pairs = views, pairs
        self.latest = (None, None, None)  # index, images and views of the pair that was read last

    def __len__(self) -> int:
        return len(self.pairs) * self.views.count

    def __getitem__(self, key: int) -> dict:
        feeder, (place, number) = self.views.feeder, divmod(key, self.views.count)
        index = self.pairs[place]
        if self.latest[0] != index:
            images = feeder.read(feeder.pairs[index])
            self.latest = index, images, self.views.stored(index, *images[0].shape[:2])
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


class Encoder(NamedTuple):
    """How latents are computed."""

    encode: Callable[[torch.Tensor], torch.Tensor]  # pixels [B, 3, H, W] => latents [B, C, h, w]
    load: Callable[[Dataset, int], Iterable[dict]]  # dataset, batch size => its batches in order
    batch_size: int
    stop: Callable[[], bool]  # whether to leave off
    show_bar: bool


class LatentCache:
    """The part of DIR that belongs to a feeder and a VAE; `open` gives the dataset, written where it is not there yet.

    `report` takes lines for the log. UserError where the feeder's views cannot be cached or DIR cannot be used.
    """

    def __init__(self, root: Path, feeder: PairedFeeder, vae: AutoencoderKL, report: Callable[[str], None]):
        if not isinstance(feeder, PairedFeeder):
            raise UserError(f"latent_cache: {type(feeder).__name__} is no PairedFeeder, whose views alone can be cached")
        self.root, self.views, self.report = root, Views(feeder), report
        first = feeder.read(feeder.pairs[0])
        self.views.stored(0, *first[0].shape[:2])  # refuses random crops
        self.settings = {
            "format": FORMAT,
            "feeder": f"{type(feeder).__module__}.{type(feeder).__qualname__}",
            **{name: str(value) for name, value in vars(feeder).items() if name not in UNCACHED},
            "images": digest(stamps_of(feeder.pairs).encode()),
            "first pair as read": digest(*(image.tobytes() for image in first)),  # other code may read the same file otherwise
            "vae": hash_encoder(vae),
            "precision": str(vae.dtype).removeprefix("torch."),
            "views": self.views.words,
        }
        self.folder = root / digest(json.dumps(self.settings, sort_keys=True).encode())[:16]
        side = feeder.crop_size // vae_factor(vae)
        self.shape, self.dtype = (self.views.count, 2, vae.config.latent_channels, side, side), vae.dtype
        if not self.folder.is_dir() and (reason := self.stale()):
            report(reason)

    def open(self, encoder: Encoder) -> CachedPairs | None:
        """The dataset, once all of it is written, by this process or others; None where `encoder.stop()` came first."""
        shards = Shards(self.folder, len(self.views.feeder), self.shape, self.dtype)
        missing = shards.missing()
        size = f"{shards.pairs} pairs x {self.views.count} views ({self.views.words}), {gigabytes(shards.needed(len(shards)))}"
        todo = f", {len(missing)} of {len(shards)} shards to write" if missing else ""
        try:
            if missing:
                self.start_writing(shards, missing)
            self.report(f"latent cache: {self.folder}: {size}{todo}")
            if missing and not self.fill(shards, encoder):
                return None
        except OSError as error:
            lacks = f"{self.folder} lacks {len(missing)} of {len(shards)} shards"
            raise UserError(f"latent_cache: {lacks} and cannot be written into: {error.strerror or error}") from error
        shards.maps.clear()  # loader processes open their own
        return CachedPairs(self.views, shards)

    def start_writing(self, shards: Shards, missing: list[int]) -> None:
        """Make the folder, with the settings beside it, where there is room for what is missing."""
        shards.folder.mkdir(parents=True, exist_ok=True)
        with (self.root / LOCK).open("a+") as lock:
            fcntl.lockf(lock, fcntl.LOCK_EX)
            if not (self.folder / INDEX).is_file():
                write_text(self.folder / INDEX, json.dumps(self.settings, indent=2) + "\n")
        needed, free = shards.needed(len(missing)), shutil.disk_usage(shards.folder).free
        if needed > free:
            what = f"{gigabytes(needed)} more for {shards.pairs} pairs x {self.views.count} views"
            raise UserError(f"latent_cache: {shards.folder} needs {what}, but {gigabytes(free)} are free")

    def fill(self, shards: Shards, encoder: Encoder) -> bool:
        """Write whatever is missing and nobody else is writing, until nothing is missing => whether that was reached."""
        images = 2 * self.views.count  # of a pair
        bar = tqdm(total=shards.pairs * images, desc="encoding", unit="image", disable=not encoder.show_bar, leave=False)
        with bar, (self.folder / LOCK).open("a+") as lock:
            while missing := shards.missing():
                bar.n = (shards.pairs - sum(len(shards.rows(shard)) for shard in missing)) * images
                bar.refresh()
                idle = True
                for shard in missing:
                    if not claim(lock, shard):
                        continue
                    try:
                        if shards.array(shard) is None:  # nobody has finished it since
                            idle = False
                            if (latents := self.encoded(shards, shard, encoder, bar)) is None:
                                return False
                            shards.write(shard, latents)
                    finally:
                        fcntl.lockf(lock, fcntl.LOCK_UN, 1, shard)
                if encoder.stop():
                    return False
                if idle:
                    time.sleep(POLL_S)
        return True

    def encoded(self, shards: Shards, shard: int, encoder: Encoder, bar: tqdm) -> torch.Tensor | None:
        """The latents of a shard [pairs, views, 2, C, h, w], or None where encoder.stop() came first.

        They are encoded in batches of the size that training would have used, since results depend on it in the last bits.
        """
        pairs = shards.rows(shard)
        latents = torch.empty(len(pairs) * self.views.count, *self.shape[1:], dtype=self.dtype)
        place = 0
        for batch in encoder.load(StoredViews(self.views, pairs), encoder.batch_size):
            if encoder.stop():
                return None
            size = len(batch["name"])
            for half, kind in enumerate(("sar", "eo")):
                filled = batch[kind][torch.arange(encoder.batch_size) % size]  # the last batch may be short
                latents[place : place + size, half] = encoder.encode(filled)[:size].cpu()
            finite = latents[place : place + size].flatten(1).isfinite().all(1)
            if not finite.all():
                name = batch["name"][int((~finite).nonzero()[0])]
                raise UserError(f"latent_cache: the latents of {name} are not finite in {self.settings['precision']}")
            place += size
            bar.update(2 * size)
        return latents.unflatten(0, (len(pairs), self.views.count))

    def stale(self) -> str | None:
        """One line on what differs from the nearest of the caches in DIR, or None where there is none."""
        differences = {}
        for file in sorted(self.root.glob(f"*/{INDEX}")):
            with suppress(OSError, ValueError, TypeError):
                before = dict(json.loads(file.read_text()))
                differences[file.parent] = [
                    f"other {name}" if name in HASHED else f"{name} {before.get(name)} -> {self.settings.get(name)}"
                    for name in {**before, **self.settings}
                    if before.get(name) != self.settings.get(name)
                ]
        if not differences:
            return None
        nearest = min(differences, key=lambda folder: len(differences[folder]))
        return f"latent cache: {nearest} does not fit ({', '.join(differences[nearest])})"


def claim(lock: TextIO, shard: int) -> bool:
    """Whether this process may write a shard: byte k of the lock file stands for shard k."""
    try:
        fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, shard)
    except (BlockingIOError, PermissionError):
        return False
    return True


def stamps_of(pairs: list[Pair]) -> str:
    """Names, sizes and dates of all images, in the order of the pairs: what stands for their content."""
    try:
        stats = [(pair.name, [file.stat() for file in (pair.sar, pair.eo)]) for pair in pairs]
    except OSError as error:
        raise UserError(f"latent_cache: {error.filename}: {error.strerror}") from error
    return json.dumps([(name, *(value for stat in both for value in (stat.st_size, stat.st_mtime_ns))) for name, both in stats])


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
