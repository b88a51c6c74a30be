"""Checkpoints by their names on the Hugging Face Hub: downloaded once into its cache, safetensors and JSON files alone.

A name is OWNER/NAME, OWNER/NAME/FOLDER, OWNER/NAME/FILE.safetensors, each also with @REVISION after NAME (a commit, tag or
branch without a slash), or a short name of RELEASED. What exists locally under that name goes before the Hub.
"""

import glob
import re
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from huggingface_hub import HfApi, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

from cdiffset.checkpoint import COMPONENTS, CONV_LAYERS, FORMS, PIPELINE, PROMPT_FILE, WEIGHT_PLACES
from cdiffset.config import RELEASED
from cdiffset.errors import UserError

NAME = re.compile(r"(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>[^/@]+))?(?:/(?P<inside>[^@]+?))?/?")


class Found(NamedTuple):
    path: Path  # where the checkpoint lies here
    source: str | None = None  # OWNER/NAME@COMMIT/INSIDE, None of a local one


def find_checkpoint(written: str, option: str) -> Found:
    """A path or a name => the checkpoint's local path, after a download where it takes one. UserError names the option.

    Whether a local path holds a checkpoint is not looked at here.
    """
    local = Path(written).expanduser()
    match = NAME.fullmatch(RELEASED.get(written, written))
    if local.exists() or match is None or local.is_absolute() or written.startswith("."):
        return Found(local)
    repo, revision, inside = match["repo"], match["revision"], match["inside"] or ""
    snapshot = fetch(repo, revision, inside, f"{option}: there is no local {written!r}, and")
    source = f"{repo}@{snapshot.name}" + (f"/{inside}" if inside else "")
    return Found(snapshot / inside, source)


def fetch(repo: str, revision: str | None, inside: str, what: str) -> Path:
    """Download a checkpoint's files => the snapshot's folder, which is called by its commit. `what`: beginning of errors."""
    at = f"{repo} on the Hugging Face Hub" + (f" at {revision}" if revision else "")
    try:
        files = [sibling.rfilename for sibling in HfApi().repo_info(repo, revision=revision).siblings or ()]
        if not (chosen := files_of(files, inside)):
            where = f"{inside}/ of {at}" if inside else at
            raise UserError(f"{what} {where} holds no checkpoint, expected {FORMS}")
        return Path(snapshot_download(repo, revision=revision, allow_patterns=[glob.escape(name) for name in chosen]))
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{what} {at} is gated: ask for access on its page, then `hf auth login`") from error
    except RepositoryNotFoundError as error:
        raise UserError(f"{what} there is no {at}, or it is private: then `hf auth login` first") from error
    except RevisionNotFoundError as error:
        raise UserError(f"{what} {repo} on the Hugging Face Hub has no revision {revision}") from error
    except Exception as error:  # offline mode, no network, a server's fault: the libraries raise almost anything
        if cached := in_cache(repo, revision, inside):
            return cached
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{what} {at} is not in its cache and cannot be fetched ({reason})") from error


def in_cache(repo: str, revision: str | None, inside: str) -> Path | None:
    """The snapshot's folder of an earlier download that holds the checkpoint."""
    for place in places(inside):
        if isinstance(cached := try_to_load_from_cache(repo, str(place), revision=revision), str):
            return Path(cached).parents[len(place.parts) - 1]
    return None


def places(inside: str) -> list[PurePosixPath]:
    """Where a repository may hold the weights of the checkpoint in `inside`, as `checkpoint.find_weights` looks for them."""
    top = PurePosixPath(inside)
    return [top] if top.suffix == ".safetensors" else [top / place for place in WEIGHT_PLACES]


def files_of(files: list[str], inside: str) -> list[str]:
    """Of a repository's files those of the checkpoint in `inside`; none where it has no weights.

    The weights, the JSON files beside them and at the checkpoint's top, and the prompt's embedding; of a pipeline all
    components.
    """
    known, top = set(files), PurePosixPath(inside)
    weights = next((place for place in places(inside) if str(place) in known), None)
    if weights is None:
        return []

    is_pipeline = str(top / PIPELINE) in known

    def belongs(file: PurePosixPath) -> bool:
        is_part = weights.suffix == ".json" and file.parent == weights.parent and file.match("*-of-*.safetensors")
        is_record = file.parent in (weights.parent, top) and (file.suffix == ".json" or file.name in (PROMPT_FILE, CONV_LAYERS))
        is_component = is_pipeline and file.parent.parent == top and file.parent.name in COMPONENTS
        return file == weights or is_part or is_record or (is_component and file.suffix in (".json", ".safetensors"))

    return [name for name in files if belongs(PurePosixPath(name))]
