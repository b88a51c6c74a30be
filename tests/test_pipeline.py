"""Reading ahead, batches, writing behind, shares of processes, the saved prompt, and what fits into memory."""

import json
import os
import re
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import tiny_unet, tiny_vae
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file
from test_translate import KINDS, REPO, arguments, command, files, grey, save_checkpoint
from test_translate import save as save_image

from cdiffset import ranks
from cdiffset.errors import UserError
from cdiffset.inference import batching as pipeline
from cdiffset.inference import translator
from cdiffset.inference.batching import batches_of_one_size, read_ahead, writing_behind
from cdiffset.inference.options import ModelSettings
from cdiffset.inference.translator import BatchSizes, decoder_bytes, load_prompt


# ------------------------------------------------------------------------------------------------------- reading, writing
@pytest.mark.parametrize("threads", [1, 3])
def test_reading_ahead_keeps_the_order_and_its_bounds(threads):
    started = []

    def read(item):
        started.append(item)
        time.sleep(0.001 * (item % 3))  # the later ones are ready first
        return item * item

    futures = read_ahead(range(20), read, threads)
    for taken, future in enumerate(futures):
        assert future.result() == taken**2 and len(started) <= taken + 2 * threads + 1
    assert sorted(started) == list(range(20))


def test_reading_ahead_ends_with_its_reader():
    started = []
    futures = read_ahead(range(1000), started.append, 2)
    next(futures)
    futures.close()
    assert len(started) <= 5 and not [thread for thread in threading.enumerate() if thread.name.startswith("reading")]


def test_writing_behind_keeps_its_bounds_and_does_everything():
    gate, begun, written = threading.Event(), [], []

    def write(item):
        gate.wait(10)
        written.append(item)

    with writing_behind(1) as later, ThreadPoolExecutor(1) as pool:
        handed_over = pool.submit(lambda: [begun.append(item) or later(write, item) for item in range(5)])
        time.sleep(0.05)
        assert not handed_over.done() and len(begun) <= 3  # it waits for the disk
        gate.set()
        handed_over.result(10)
    assert written == list(range(5))


def test_the_first_error_of_writing_reaches_the_caller_and_the_rest_is_written():
    written = []

    def write(item):
        if item == 1:
            raise OSError(28, "No space left on device")
        written.append(item)

    with pytest.raises(OSError, match="No space left"), writing_behind(1) as later:
        for item in range(3):
            later(write, item)
    assert written in ([0], [0, 2])  # according to when the error was noticed
    with pytest.raises(KeyboardInterrupt), writing_behind(2) as later:
        later(written.append, "handed over")
        raise KeyboardInterrupt
    assert written[-1] == "handed over"


@settings(deadline=None, max_examples=30)
@given(st.lists(st.integers(1, 3), max_size=20), st.integers(1, 4), st.integers(1, 2))
def test_every_image_comes_once_in_a_batch_of_its_padded_size(sides, together, threads):
    """Sides 1 to 3 times the factor, less a pixel for every other image: items of side 2 are refused by the batch size."""

    def read(item):
        index, side = item
        if index % 7 == 6:
            raise UserError("damaged")
        return (np.full((4 * side - index % 2, 4, 3), index, np.float32),)

    def batch_size(height, width):
        assert height % 4 == 0 and width == 4
        if height == 8:
            raise UserError("too large")
        return together

    items, skipped, seen = list(enumerate(sides)), [], []
    for indices, (images,) in batches_of_one_size(
        items, read, 4, batch_size, lambda index, _: skipped.append(index), "x", threads
    ):
        assert 1 <= len(indices) <= together and len({sides[index] for index in indices}) == 1
        assert [int(image[0, 0, 0]) for image in images] == list(indices)
        seen += indices
    refused = [index for index, side in items if index % 7 == 6 or side == 2]
    assert skipped == refused and sorted(seen) == sorted(set(range(len(items))) - set(refused))


def test_images_of_many_sizes_do_not_pile_up(monkeypatch):
    monkeypatch.setattr(pipeline, "MOST_WAITING", 3 * 4 * 4 * 4 * 10)  # bytes: 160 px
    items = [(4 * (1 + index % 5), 4) for index in range(40)]  # 16 to 80 px, company of 8 each
    taken = 0

    def read(item):
        nonlocal taken
        taken += item[0] * item[1]
        return (np.zeros((*item, 3), np.float32),)

    given_back = 0
    for _, (images,) in batches_of_one_size(items, read, 4, lambda *_: 100, None, "x"):
        assert taken - given_back <= 160 + 80 + 2 * 80 + 80  # waiting, the one too many, and read ahead
        given_back += sum(image.shape[0] * image.shape[1] for image in images)
    assert given_back == taken == sum(height * width for height, width in items)


# ------------------------------------------------------------------------------------------------------------- processes
@settings(deadline=None)
@given(st.sets(st.text(min_size=1), max_size=30), st.integers(1, 7))
def test_shares_are_even_disjoint_and_all(names, count):
    names, shares = sorted(names), []
    for rank in range(count):
        with pytest.MonkeyPatch.context() as environment:
            environment.setenv("RANK", str(rank))
            environment.setenv("WORLD_SIZE", str(count))
            shares.append(ranks.share_by_rank(names))
    assert sorted(sum(shares, [])) == list(range(len(names))) and all(share == sorted(share) for share in shares)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_no_launcher_is_one_process_and_nonsense_is_refused(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    assert ranks.rank_and_world_size() == (0, 1) and ranks.local_rank() == 0 and ranks.total_over_ranks(3) == 3
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(UserError, match="RANK from 0 to 0, found 2"):
        ranks.rank_and_world_size()
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(UserError, match="WORLD_SIZE, .*found 'many'"):
        ranks.rank_and_world_size()


# ------------------------------------------------------------------------------------------------------- the prompt
WIDTH = 8


@pytest.fixture
def trained(tmp_path, monkeypatch) -> Path:
    """A checkpoint of base "base" and prompt "radar", whose saved embedding is 3 everywhere; a computed one is 7."""
    monkeypatch.setattr(translator, "embed_prompt", lambda base, prompt: torch.full((1, 5, WIDTH), 7.0))
    config = {"pretrained_model_name_or_path": "base", "prompt": "radar"}
    (tmp_path / "checkpoint.json").write_text(json.dumps({"config": config}))
    save_file({"embedding": torch.full((1, 5, WIDTH), 3.0)}, tmp_path / "prompt.safetensors")
    return tmp_path


def model(checkpoint: Path, base: str, prompt: str) -> ModelSettings:
    return ModelSettings(checkpoint, base, prompt, "epsilon")


@pytest.mark.parametrize(("base", "prompt", "value"), [("base", "radar", 3), ("other", "radar", 7), ("base", "", 7)])
def test_the_prompt_that_training_saved_is_that_of_its_own_base_and_prompt_alone(trained, base, prompt, value):
    before = sorted(trained.rglob("*"))
    for path in (trained, trained / "unet"):
        assert torch.equal(load_prompt(model(path, base, prompt), WIDTH), torch.full((1, 5, WIDTH), float(value)))
    (trained / "prompt.safetensors").unlink()
    assert load_prompt(model(trained, base, prompt), WIDTH).unique().tolist() == [7]
    assert sorted(trained.rglob("*")) == [path for path in before if path.suffix != ".safetensors"]  # nothing is written


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", "damaged"),
        (save({"embedding": torch.ones(1, 5, WIDTH)})[:-8], "damaged"),
        (save({"another": torch.ones(1, 5, WIDTH)}), "damaged"),
        (
            save({"embedding": torch.ones(1, 5, WIDTH + 1)}),
            r"expected .*\[1, tokens, 8\], found \[1, 5, 9\]",
        ),
        (save({"embedding": torch.ones(5, WIDTH)}), r"found \[5, 8\]"),
        (save({"embedding": torch.full((1, 5, WIDTH), torch.nan)}), "expected finite numbers"),
    ],
)
def test_a_saved_prompt_that_is_damaged_or_of_another_width_is_refused(trained, content, words):
    (trained / "prompt.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=f"--checkpoint: .*prompt.safetensors.*{words}"):
        load_prompt(model(trained, "base", "radar"), WIDTH)


# ------------------------------------------------------------------------------------------------------ batches in memory
def batch_sizes(batch_size, device="cpu", **changes):
    model = SimpleNamespace(vae=tiny_vae(), unet=tiny_unet(), device=torch.device(device))
    sizes = BatchSizes(model, batch_size)
    for name, value in changes.items():
        setattr(sizes, name, value)
    return sizes


@pytest.mark.parametrize(
    "size, together", [((256, 256), 4), ((512, 256), 2), ((512, 512), 1), ((2048, 2048), 1), ((64, 64), 64)]
)
def test_auto_on_a_cpu_goes_by_the_size(size, together, capsys):
    sizes = batch_sizes(None)
    assert sizes(*size) == sizes(*size) == together
    assert capsys.readouterr().out == f"--batch-size auto: {together} together of {size[1]} x {size[0]} px\n"
    assert batch_sizes(7)(*size) == 7 and capsys.readouterr().out == ""


@pytest.mark.parametrize("free, together", [(10.0, 8), (1.0, 1), (1000.0, 64)])
def test_auto_on_a_gpu_goes_by_the_memory_that_one_image_takes(monkeypatch, free, together):
    monkeypatch.setattr("cdiffset.inference.translator.free_memory", lambda device: int(free * 2**30))
    assert batch_sizes(None, "cuda", measured_bytes=lambda *_: 2**30)(64, 64) == together


def test_what_cannot_fit_is_refused_and_what_crowds_the_memory_goes_through_the_vae_one_by_one(monkeypatch):
    least = decoder_bytes(tiny_vae(), 64, 64)
    assert least == 2 * 8 * 64 * 64 * 4  # two of 8 channels, float32
    for free, expected in ((least - 1, None), (least, True), (8 * least + 8, False)):
        monkeypatch.setattr("cdiffset.inference.translator.free_memory", lambda device, free=free: free)
        sizes = batch_sizes(2)
        if expected is None:
            with pytest.raises(UserError, match="images of 64 x 64 px take more than .* as GeoTIFF"):
                sizes(64, 64)
        else:
            assert sizes(64, 64) == 2 and sizes.checkpoint.vae.use_slicing is expected


# ------------------------------------------------------------------------------------------------------- several processes
def test_two_processes_share_a_folder(tiny_base, tmp_path, monkeypatch, capsys):
    """torchrun: every file is written by one of them, a broken one fails both at the end only, and a second run finds all."""
    checkpoint = save_checkpoint(tmp_path / "trained", tiny_base, 5)
    for index in range(6):
        save_image(tmp_path / "sar" / f"{index}.png", grey(8, 8, seed=index))
    (tmp_path / "sar" / "broken.png").write_bytes(b"nothing")
    words = arguments(tmp_path / "sar", tmp_path / "out", True, checkpoint)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(REPO / "test.py")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 1, done.stderr
    assert files(tmp_path / "out") == {f"{kind}/{index}.{suffix}" for kind, suffix in KINDS for index in range(6)}
    counts = [int(count) for count in re.findall(r"process [12] of 2: (\d+) images translated", done.stdout)]
    assert len(counts) == 2 and sum(counts) == 6 and max(counts) <= 4 and done.stderr.count("\nskipped: ") == 1
    (tmp_path / "sar" / "broken.png").unlink()
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        assert command.main([*words, "--skip-existing"]) == 0
        assert capsys.readouterr().out == "3 of 3 images are there already\n"
