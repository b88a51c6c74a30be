"""Fuzz the readers of what comes from elsewhere: python tests/fuzz/fuzz.py config|list|image [libFuzzer options]

A reader may return something sound or raise UserError, which commands print as one line; whatever else happens is a fault.
The corpus is made here, from small files in every format; atheris mutates it towards code not yet reached. It sees the code
that is imported while it watches, hence the imports within functions.
"""

import io
import pickle
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
MAX_PIXELS = 2**16
SUFFIXES = (".png", ".jpg", ".gif", ".webp", ".bmp", ".npy", ".tif")  # the first byte of an image's input picks one
LIST_SUFFIXES = (".txt", ".pkl", ".csv")  # likewise


def read_config(data: bytes, folder: Path) -> None:
    from cdiffset.config import KNOBS, load_config
    from cdiffset.errors import UserError

    (folder / "run.yaml").write_bytes(data)
    try:
        config = load_config(["--config", str(folder / "run.yaml")])
    except UserError as error:
        assert str(folder / "run.yaml") in str(error) or any(name in str(error) for name in KNOBS), error
    else:
        assert config.num_iter >= 1 and config.learning_rate > 0


def read_lists(data: bytes, folder: Path) -> None:
    from cdiffset.errors import UserError
    from cdiffset.pairing import read_list, read_pairs, relative_path

    path = folder / f"train{LIST_SUFFIXES[data[0] % len(LIST_SUFFIXES)] if data else '.txt'}"
    path.write_bytes(data[1:])
    try:
        if path.suffix == ".csv":
            paths = [path for pair in read_pairs(folder, path) for path in (pair.sar, pair.eo)]
        else:
            paths = [folder / relative_path(text, where) for where, text in read_list(path, (".txt", ".pkl"))]
    except UserError as error:
        assert str(path) in str(error), error
    else:
        assert paths and all(folder in path.parents and ".." not in path.parts for path in paths)


def read_images(data: bytes, folder: Path) -> None:
    from cdiffset.errors import UserError
    from cdiffset.images import read_eo, read_sar

    path = folder / f"image{SUFFIXES[data[0] % len(SUFFIXES)] if data else '.png'}"
    path.write_bytes(data[1:])
    for read in (read_sar, read_eo):
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                pixels = read(path, MAX_PIXELS)
        except UserError as error:
            assert str(path) in str(error), error
        else:
            assert pixels.dtype == "float32" and pixels.ndim == 3 and pixels.shape[2] == 3
            assert pixels.size <= 12 * MAX_PIXELS and pixels.min() >= 0 and pixels.max() <= 255  # False for NaN too


def config_corpus() -> Iterator[bytes]:
    yield from (path.read_bytes() for path in sorted((REPO / "configs").glob("*.yaml")))
    yield b"train_feeder_args: &a {crop_size: 8, dataroot: d}\ntest_feeder_args: {<<: *a, split: test}\nlearning_rate: 1e-5\n"
    yield b"seed: 0x1f\nprompt: !!str 5\ngpu: [0, 1]\nbeta: .inf\nlog_iter: 1:30\nwork_dir: 2024-01-01\nema_decay: ~\n"
    yield b"? [a]\n: 1\n--- |\n text\n...\n&b *b\n!!binary aGk=\n'\\x'\n"


def list_corpus() -> Iterator[bytes]:
    names = ["opt/1.png", "opt/2.png", "a b/\u00e9.tif"]
    yield b"\x00" + "\n".join(names).encode()
    yield b"\x00\xef\xbb\xbf" + "\r\n\r\n".join(names).encode()
    yield b"\x00/etc/passwd\n../x\nC:\\x\n"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        yield b"\x01" + pickle.dumps(names, protocol)
        yield b"\x01" + pickle.dumps([1, None, {"a": (2.0, b"b")}, Path], protocol)
    yield b'\x02sar,eo\nsar/1.png,eo/1.png\n"sar,2.png",eo/2.png\n'
    yield b"\x02sar/1.png\teo/1.png\n"


def image_corpus() -> Iterator[bytes]:
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    for place, suffix in enumerate(SUFFIXES):
        for mode in ("L", "RGB", "RGBA", "P", "1", "I;16", "F", "CMYK"):
            image = Image.fromarray(rng.integers(0, 256, (6, 9, 3), dtype=np.uint8))
            array = rng.integers(0, 60_000, (6, 9)).astype(np.uint16)
            image = Image.fromarray(array) if mode == "I;16" else image.convert(mode)
            written = io.BytesIO()
            try:
                np.save(written, np.asarray(image)) if suffix == ".npy" else image.save(
                    written, Image.registered_extensions()[suffix]
                )
            except (OSError, KeyError, ValueError):
                continue  # a mode that the format does not have
            yield bytes([place]) + written.getvalue()


TARGETS: dict[str, tuple[Callable[[bytes, Path], None], Callable[[], Iterator[bytes]]]] = {
    "config": (read_config, config_corpus),
    "list": (read_lists, list_corpus),
    "image": (read_images, image_corpus),
}


def main() -> None:
    import atheris

    with atheris.instrument_imports(include=["cdiffset", "feeders", "yaml", "PIL", "pickletools", "numpy.lib"]):
        import PIL.Image

        import cdiffset.config  # noqa: F401
        import feeders.feeder  # noqa: F401

        PIL.Image.init()  # imports its readers, one for each format
    read, corpus = TARGETS[sys.argv.pop(1)]
    with tempfile.TemporaryDirectory() as scratch:
        seeds, folder = Path(scratch, "corpus"), Path(scratch, "data")
        seeds.mkdir(), folder.mkdir()
        for index, content in enumerate(corpus()):
            (seeds / str(index)).write_bytes(content)
        atheris.Setup([*sys.argv, str(seeds)], lambda data: read(data, folder))
        atheris.Fuzz()


if __name__ == "__main__":
    sys.path.insert(0, str(REPO))
    main()
