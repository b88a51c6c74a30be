"""The latent cache: training from it equals training from images; what is stale, partial, shared, too large or read-only."""

import multiprocessing
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_vae
from PIL import Image
from training import AUGMENTATIONS, BATCH, assert_same_run, launch, train_lines

import main
from cdiffset import errors
from cdiffset.errors import UserError
from cdiffset.pipeline import encode
from cdiffset.training import latent_cache
from cdiffset.training.latent_cache import Encoder, LatentCache, Shards
from feeders.feeder import PairedFolderFeeder
from train import Trainer

SIZE = 16
PAIRS = 5


def feeder(folder: Path, split="train", crop_size=SIZE, **options) -> PairedFolderFeeder:
    augmentations = AUGMENTATIONS if split == "train" else {}
    return PairedFolderFeeder(crop_size, split, folder / "sar", folder / "eo", **{**augmentations, **options})


def make_pairs(root: Path, size: int, count: int = PAIRS) -> Path:
    rng = np.random.default_rng(size)
    for kind in ("sar", "eo"):
        (root / kind).mkdir(parents=True)
        for number in range(count):
            Image.fromarray(rng.integers(0, 256, (size, size, 3), dtype=np.uint8)).save(root / kind / f"{number}.png")
    return root


@pytest.fixture
def full(tmp_path) -> Path:
    """Pairs of the crop's own size."""
    return make_pairs(tmp_path / "full", SIZE)


@pytest.fixture
def large(tmp_path) -> Path:
    """Pairs of which crops are random."""
    return make_pairs(tmp_path / "large", SIZE + 7)


@pytest.fixture(scope="session")
def vae():
    return tiny_vae()


def work(vae, batch_size=BATCH, stop=lambda: False, encoded: list | None = None) -> Encoder:
    """What a trainer lends; `encoded` collects the sizes of the batches."""

    def encode_batch(pixels: torch.Tensor) -> torch.Tensor:
        if encoded is not None:
            encoded.append(len(pixels))
        with torch.no_grad():
            return encode(vae, pixels)

    def load(dataset, size: int):
        return torch.utils.data.DataLoader(dataset, size)

    return Encoder(encode_batch, load, batch_size, stop, False)


def from_images(vae, source, epoch: int, index: int) -> torch.Tensor:
    """SAR and EO latent [2, C, h, w] of an item, encoded in a batch of the cache's size."""
    item = source[epoch, index]
    return torch.stack([work(vae).encode(item[kind].expand(BATCH, -1, -1, -1))[0] for kind in ("sar", "eo")])


def cached(pairs, epoch: int, index: int) -> torch.Tensor:
    item = pairs[epoch, index]
    assert item["name"] == pairs.views.feeder.names[index]
    return torch.stack([item["z_sar"], item["z_eo"]])


# ---------------------------------------------------------------------------------------------------- the same latents
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_full_size_pairs_give_the_latents_of_their_images_bit_for_bit(full, tmp_path, dtype):
    """Over epochs in which all 8 orientations come up, in every precision, stored in no more bytes than it has."""
    source, vae = feeder(full), tiny_vae().to(dtype)
    pairs = LatentCache(tmp_path / "cache", source, vae, print).open(work(vae))
    numbers = set()
    for epoch in range(12):
        for index in range(PAIRS):
            numbers.add(pairs.views.number(epoch, index))
            expected = from_images(vae, source, epoch, index)
            assert expected.dtype == torch.float32 and torch.equal(cached(pairs, epoch, index), expected)
    assert numbers == set(range(8))
    stored = sum(np.load(file).nbytes for file in pairs.shards.folder.glob("*.npy"))
    assert stored == PAIRS * 8 * 2 * 4 * (SIZE // 4) ** 2 * dtype.itemsize


@pytest.mark.parametrize("on", [(), ("vflip",), ("hflip", "rot")])
def test_only_orientations_that_can_occur_are_stored(full, tmp_path, vae, on):
    source = feeder(full, **{name: name in on for name in AUGMENTATIONS})
    pairs = LatentCache(tmp_path / "cache", source, vae, print).open(work(vae))
    stored = [np.load(file) for file in pairs.shards.folder.glob("*.npy")]
    assert sum(map(len, stored)) == PAIRS and all(shard.shape[1] == 2 ** len(on) for shard in stored)
    for epoch in range(8):
        assert torch.equal(cached(pairs, epoch, 3), from_images(vae, source, epoch, 3))


def test_without_augmentation_one_view_is_stored(large, tmp_path, vae):
    source = feeder(large, "test")
    pairs = LatentCache(tmp_path / "cache", source, vae, print).open(work(vae))
    assert pairs.shards.shape[0] == 1
    assert all(torch.equal(cached(pairs, 3, index), from_images(vae, source, 3, index)) for index in range(PAIRS))


# -------------------------------------------------------------------------------------------------------- the same training
@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict:
    """Changes of the common command line: pairs of 32 x 32 px, which is the crop's size."""
    root = make_pairs(tmp_path_factory.mktemp("pairs"), 32, 12)
    folders = {"sar_dir": str(root / "sar"), "eo_dir": str(root / "eo"), "split": "train", "crop_size": 32}
    return {"train_feeder_args": folders, "num_iter": 4, "ema_decay": 0.9, "confidence": True, "val_len": 2}


@pytest.fixture(scope="module")
def by_images(run, settings, tmp_path_factory) -> Path:
    return run(tmp_path_factory.mktemp("images"), **settings)


def test_training_from_the_cache_equals_training_from_images(run, settings, by_images, tmp_path, monkeypatch):
    """Bit for bit, and without the encoder: once the cache is there, only validation encodes, its SAR."""
    assert_same_run(run(tmp_path / "first", **settings, latent_cache=tmp_path / "cache"), by_images)
    monkeypatch.setattr(Trainer, "encode", lambda *_: pytest.fail("the encoder ran"))
    assert_same_run(run(tmp_path / "again", **settings, num_worker=2, latent_cache=tmp_path / "cache"), by_images)


def test_bf16_training_from_the_cache_equals_training_from_images(run, settings, tmp_path):
    few = {**settings, "num_iter": 2, "mixed_precision": "bf16"}
    plain, mine = (run(tmp_path / str(k), **few, latent_cache=folder) for k, folder in enumerate((None, tmp_path / "cache")))
    assert_same_run(mine, plain)


# ------------------------------------------------------------------------------------------------------ partial and stale
def test_a_killed_pre_pass_is_continued_where_it_stopped(full, tmp_path, vae):
    """Every pair is a shard here."""
    whole = LatentCache(tmp_path / "whole", feeder(full), vae, print).open(work(vae))
    calls, encoded = [], []
    # Asked before every batch of 4 and after every shard: 8 views are 2 batches.
    killed = work(vae, stop=lambda: calls.append(0) or len(calls) > 7)
    assert LatentCache(tmp_path / "cache", feeder(full), vae, print).open(killed) is None
    written = sorted(tmp_path.glob("cache/*/*.npy"))
    assert 0 < len(written) < PAIRS and not list(tmp_path.glob("cache/*/.*part*"))
    times = [file.stat().st_mtime_ns for file in written]
    with written[0].open("r+b") as damaged:  # as after a crash of the disk
        damaged.truncate(200)
    pairs = LatentCache(tmp_path / "cache", feeder(full), vae, print).open(work(vae, encoded=encoded))
    assert len(encoded) == 4 * (PAIRS - len(written) + 1) and set(encoded) == {BATCH}
    assert [file.stat().st_mtime_ns for file in written][1:] == times[1:]
    for index in range(PAIRS):
        assert all(torch.equal(pairs.shards.read(index, view), whole.shards.read(index, view)) for view in range(8))


def test_latents_of_any_batch_size_are_the_same_up_to_rounding(full, tmp_path, vae):
    one, other = (LatentCache(tmp_path / str(size), feeder(full), vae, print).open(work(vae, size)) for size in (3, 7))
    for index in range(PAIRS):
        for view in range(8):
            torch.testing.assert_close(one.shards.read(index, view), other.shards.read(index, view))


@pytest.mark.parametrize(
    "what",
    ["image", "vae", "precision", "seed", "gsd", "augmentation", "copied", "touched", "code"],
)
def test_what_makes_a_cache_stale(tmp_path, what, monkeypatch):
    """What changes the latents, and only that; the line in the log names it."""
    folder = make_pairs(tmp_path / "pairs", SIZE)
    vae, lines, encoded = tiny_vae(), [], []
    LatentCache(tmp_path / "cache", feeder(folder), vae, print).open(work(vae))
    source, expected = feeder(folder), None
    match what:
        case "image":
            file = folder / "eo" / "3.png"
            Image.fromarray(np.zeros((SIZE, SIZE, 3), np.uint8)).save(file)
            expected = "does not fit (other images)"
        case "vae":
            with torch.no_grad():
                vae.encoder.conv_in.bias += 1e-3
            expected = "does not fit (other vae)"
        case "precision":
            vae, expected = vae.bfloat16(), "precision float32 -> bfloat16)"
        case "seed":
            source = feeder(folder, seed=7)
        case "gsd":
            source = feeder(folder, gsd_m=3.0)
        case "augmentation":
            source, expected = feeder(folder, vflip=False), "augmentations (True, True, True) -> (True, False, True)"
        case "copied":
            shutil.copytree(folder, tmp_path / "elsewhere", copy_function=shutil.copy2)
            source = feeder(tmp_path / "elsewhere")
        case "touched":
            os.utime(folder / "eo" / "3.png", (0, 0))
            expected = "does not fit (other images)"
        case "code":
            read = PairedFolderFeeder.read
            monkeypatch.setattr(PairedFolderFeeder, "read", lambda *args: tuple(image / 2 for image in read(*args)))
            expected = "does not fit (other first pair as read)"

    pairs = LatentCache(tmp_path / "cache", source, vae, lines.append).open(work(vae, encoded=encoded))
    assert bool(encoded) == (expected is not None) == (len(list(tmp_path.glob("cache/*/index.json"))) == 2)
    assert len(lines) == (2 if expected else 1) and (expected is None or expected in lines[0])
    assert torch.equal(cached(pairs, 1, 3), from_images(vae, source, 1, 3))


# ----------------------------------------------------------------------------------------------- several processes, one cache
def in_another_process(root: Path, folder: Path):
    """Open a cache there => (the process, a queue of: images encoded, a latent)."""
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def use() -> None:
        torch.set_num_threads(1)  # as loader processes do: threads do not survive a fork
        vae, encoded = tiny_vae(), []
        pairs = LatentCache(root, feeder(folder), vae, print).open(work(vae, encoded=encoded))
        queue.put((sum(encoded), pairs.shards.read(0, 0).tolist()))

    process = context.Process(target=use)
    process.start()
    return process, queue


def test_two_runs_that_start_at_once_share_the_work(tmp_path, vae):
    """A shard of 3 pairs is 24 views, SAR and EO; nothing is encoded twice, however the work is dealt out."""
    folder = make_pairs(tmp_path / "many", SIZE, 48)
    runs = [in_another_process(tmp_path / "cache", folder) for _ in range(2)]
    results = [queue.get(timeout=200) for _, queue in runs]
    for process, _ in runs:
        process.join()
    assert sum(images for images, _ in results) == 48 * 8 * 2 and results[0][1] == results[1][1]


def test_processes_of_one_run_share_the_cache(argv, tmp_path, settings, by_images):
    launch(argv(tmp_path / "run", **settings, latent_cache=tmp_path / "cache"))
    for row, expected in zip(train_lines(tmp_path / "run"), train_lines(by_images), strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


# --------------------------------------------------------------------------------------------------------------- refused
def refused(monkeypatch, folder: Path) -> None:
    """A file system that cannot be written to: root may write wherever permissions forbid it."""
    opened = Path.open

    def read_only(self, mode="r", *args, **kwargs):
        if folder in (self, *self.parents) and set(mode) & set("aw+x"):
            raise OSError(30, "Read-only file system", str(self))
        return opened(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", read_only)


def test_a_whole_cache_is_read_from_a_read_only_folder(full, tmp_path, vae, monkeypatch):
    expected = LatentCache(tmp_path / "cache", feeder(full), vae, print).open(work(vae))
    refused(monkeypatch, tmp_path / "cache")
    pairs = LatentCache(tmp_path / "cache", feeder(full), vae, print).open(work(vae))
    assert torch.equal(cached(pairs, 1, 2), cached(expected, 1, 2))
    next(pairs.shards.folder.glob("*.npy")).unlink()
    with pytest.raises(UserError, match="lacks 1 of 5 shards and cannot be written into: Read-only file system"):
        LatentCache(tmp_path / "cache", feeder(full), vae, print).open(work(vae))


def test_a_cache_that_does_not_fit_on_the_disk_is_refused_before_it_is_written(full, tmp_path, vae, monkeypatch):
    usage = type(shutil.disk_usage("/"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6 - 20_000, 20_000))
    encoded = []
    with pytest.raises(UserError, match=r"needs 2\.05e-05 GB more for 5 pairs x 8 views, but 2e-05 GB are free"):
        LatentCache(tmp_path / "cache", feeder(full), vae, print).open(work(vae, encoded=encoded))
    assert not encoded and not list(tmp_path.glob("cache/*/*.npy"))


def test_a_disk_that_fills_up_leaves_no_half_shard(full, tmp_path, vae, monkeypatch):
    def fills_up(file, array):
        Path(file).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(latent_cache.np, "save", fills_up)
    with pytest.raises(UserError, match="cannot be written into: No space left on device"):
        LatentCache(tmp_path / "cache", feeder(full), vae, print).open(work(vae))
    assert not list(tmp_path.glob("cache/*/*shard*"))


def test_latents_that_are_not_finite_are_refused_by_name(full, tmp_path, vae):
    broken = work(vae)._replace(encode=lambda pixels: torch.full((len(pixels), 4, 4, 4), torch.nan))
    with pytest.raises(UserError, match="the latents of 0 are not finite in float32"):
        LatentCache(tmp_path / "cache", feeder(full), vae, print).open(broken)


def test_random_crops_are_refused_in_one_line(argv, tmp_path, capsys):
    assert errors.run(main.main, argv(tmp_path / "run", latent_cache=tmp_path / "cache")) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert re.fullmatch("error: .*40 x 40 px, larger than crop_size 32: its crops are random and cannot be cached.*", line)


def test_an_image_that_vanishes_in_the_pre_pass_is_named(argv, settings, tmp_path, monkeypatch, capsys):
    eo = Path(settings["train_feeder_args"]["eo_dir"])
    moved = tmp_path / "moved"
    opened = LatentCache.open

    def vanishing(self, *args):
        (eo / "7.png").rename(moved)
        return opened(self, *args)

    monkeypatch.setattr(LatentCache, "open", vanishing)
    try:
        assert errors.run(main.main, argv(tmp_path / "run", **settings, latent_cache=tmp_path / "cache")) == 2
    finally:
        moved.rename(eo / "7.png")
    assert "7.png: no such file; stopped after iteration 0; last good checkpoint: none yet" in capsys.readouterr().err


def test_shards_cover_every_pair_once():
    for pairs in (1, 15, 16, 17, 1000):
        shards = Shards(Path("nowhere"), pairs, (8, 2, 4, 32, 32), torch.float32)
        assert [row for shard in range(len(shards)) for row in shards.rows(shard)] == list(range(pairs))
        assert shards.size * shards.pair_bytes <= latent_cache.MAX_SHARD_BYTES and len(shards) <= max(16, pairs // 100)
        assert shards.needed(len(shards)) == pairs * 8 * 2 * 4 * 32 * 32 * 4
