"""The prompt's embedding in a small file beside the checkpoint, so that translating need not load the text encoder.

It says which prompt, and which files of which text encoder and tokenizer, it was made from; of any others it is made anew.
"""

import json
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from cdiffset.images import written_whole
from cdiffset.model import embed_prompt

FILE_NAME, TENSOR = "prompt_embedding.safetensors", "prompt_embedding"


def cached_prompt(checkpoint: str, base: str, prompt: str, width: int, may_write: bool = True) -> torch.Tensor:
    """`embed_prompt`, bit for bit, from the cache where that fits => [1, L, D] float32.

    The cache lies in the checkpoint's folder, or as NAME.prompt_embedding.safetensors beside NAME.safetensors. Where it cannot
    be written, it is not; nor is an embedding kept of another width than the U-Net attends to, which is a mistake.
    """
    path = Path(checkpoint).expanduser()
    path = path / FILE_NAME if path.is_dir() else path.with_name(f"{path.stem}.{FILE_NAME}")
    sources = files_of(base)
    if sources and (known := read_cache(path, origin(prompt, sources))) is not None:
        return known
    embedding = embed_prompt(base, prompt)
    sources = sources or files_of(base)  # a base from the Hub has files here only now
    if sources and may_write and embedding.shape[-1] == width:
        try:
            with written_whole(path) as temporary:
                temporary.write_bytes(save({TENSOR: embedding}, {"made_from": origin(prompt, sources)}))
        except OSError:
            pass  # a folder to read only, or a full disk: the results will tell
    return embedding


def files_of(base: str) -> list[Path]:
    """The files of a base's tokenizer and text encoder; [] of one from the Hub that is not here yet."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        try:
            folder = Path(snapshot_download(base, local_files_only=True))
        except Exception:  # names that the Hub does not allow, absent or damaged caches: loading will say it better
            return []
    return sorted(path for name in ("tokenizer", "text_encoder") for path in (folder / name).rglob("*") if path.is_file())


def origin(prompt: str, sources: list[Path]) -> str:
    """What an embedding is made from. A file counts as another one once its place, its size or any of its times changes.

    The time of the last change of status cannot be set by hand: a file put in another's place is noticed even where archives
    and images set all times of modification alike.
    """
    stats = [(path.resolve(), path.stat()) for path in sources]
    return json.dumps([prompt, [[str(path), stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for path, stat in stats]])


def read_cache(path: Path, made_from: str) -> torch.Tensor | None:
    """The embedding in a cache file; None if there is none, of that origin, that is whole."""
    try:
        with safe_open(path, "pt") as file:
            if (file.metadata() or {}).get("made_from") == made_from:
                return file.get_tensor(TENSOR)
    except (OSError, SafetensorError):
        pass
    return None
