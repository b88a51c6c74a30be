"""Checkpoints: writing our own, and loading U-Net weights in every form in which they are found. Save and load side by side.

A checkpoint folder holds unet/ (diffusers layout), unet_ema/ where an average is kept, prompt.safetensors,
training_state.pt (optimizer, schedule, scaler), checkpoint.json (iteration, epoch, best validation, the configuration) and
manifest.json, which lists every other file with its size and SHA-256, so that damage is noticed before it is trained on.
"""

import fcntl
import hashlib
import json
import os
import shutil
import socket
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, TextIO

import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cdiffset.device import AS_STORED, Form
from cdiffset.errors import UserError


def with_variant(name: str, variant: str | None) -> str:
    """Weights file or index => its name in a variant: model.safetensors => model.fp16.safetensors."""
    stem, _, suffix = name.rpartition(".")
    return f"{stem}.{variant}.{suffix}" if variant else name


META, STATE = "checkpoint.json", "training_state.pt"
PIPELINE = "model_index.json"  # makes a folder that export.py wrote a diffusers pipeline: its base lies in it
PROMPT_FILE, PROMPT_TENSOR = "prompt.safetensors", "embedding"  # [1, L, D] float32
MANIFEST, LOCK = "manifest.json", ".lock"
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")  # diffusers; Accelerate, hence the released code's runs
WRAPPERS = ("module.", "unet.", "_orig_mod.")  # what DDP, pipelines and torch.compile put before names
ADAPTER, ADAPTER_CONFIG, CONV_LAYERS = "adapter_model.safetensors", "adapter_config.json", "conv_layers.safetensors"
ADAPTER_PREFIX = "base_model.model."  # what peft puts before names
WHOLE = ("conv_in", "conv_out")  # layers that are trained whole beside adapters
FROZEN_DIGEST = "frozen_sha256"  # in the metadata of CONV_LAYERS, see frozen_digest
INDEX = ".index.json"  # what diffusers and Accelerate add to these names where the weights are split over several files
WEIGHT_FILES = tuple(  # what a folder may hold its weights in, the first found counts
    with_variant(name, variant) for variant in (None, "fp16") for name in (*WEIGHTS, *(f"{name}{INDEX}" for name in WEIGHTS))
)
WEIGHT_PLACES = tuple(f"{folder}{name}" for folder in ("unet_ema/", "unet/", "") for name in (*WEIGHT_FILES, ADAPTER))
COMPONENTS = ("scheduler", "tokenizer", "text_encoder", "vae", "unet")  # folders of a base model
FORMS = (
    "a .safetensors file, a diffusers U-Net folder, a checkpoint folder of this code (also of adapters), a pipeline folder of "
    "export.py, or a folder with model.safetensors"
)


# ---------------------------------------------------------------------------------------------------- U-Net weights in
def find_weights(path: Path, option: str) -> Path:
    """Checkpoint in any known form => its weights file; our own folders give the EMA where there is one."""
    if path.is_file() and path.suffix == ".safetensors":
        return path
    if path.is_file():
        raise UserError(f"{option}: {path} is a {path.suffix or 'nameless'} file, expected {FORMS}; nothing else is opened")
    if not path.is_dir():
        raise UserError(f"{option}: there is no {path}, expected {FORMS}")
    if found := next((file for place in WEIGHT_PLACES if (file := path / place).is_file()), None):
        return found
    wanted = (*WEIGHTS, with_variant(WEIGHTS[0], "fp16"))
    raise UserError(f"{option}: {path} holds none of unet_ema/, unet/, {', '.join(wanted)}; expected {FORMS}")


class Weights(NamedTuple):
    """A U-Net's tensors, with what errors about them name. Of adapters: theirs, and those of conv_in and conv_out."""

    tensors: dict[str, torch.Tensor]
    file: Path
    option: str

    @property
    def are_adapters(self) -> bool:
        return self.file.name == ADAPTER


def read_weights(path: str, option: str, form: Form = AS_STORED, is_verified: bool = False) -> Weights:
    """A U-Net's weights from a checkpoint in any of FORMS. UserError where they are damaged or not finite.

    `is_verified`: `damage` has compared the whole checkpoint with its manifest just before.
    """
    file = find_weights(Path(path).expanduser(), option)
    for part in () if is_verified else files_of(file):
        if (listed := listed_in_manifest(part, option)) and (not part.is_file() or size_and_hash(part) != listed):
            raise UserError(f"{option}: {part} is damaged: not as it was written by {MANIFEST}, take another checkpoint")
    tensors, finite = read_tensors(file, option), {}
    form = AS_STORED if file.name == ADAPTER else form  # they are merged in float32
    if any(name not in tensors or tensors[name].dim() != 4 for name in ("conv_in.weight", "conv_out.weight")):
        kernels = f"conv_in.weight and conv_out.weight among its {len(tensors)} tensors"
        raise UserError(f"{option}: {file} is no U-Net: expected {kernels}")
    for name, tensor in tensors.items():
        if tensor.numel():  # extremes are NaN where one value is; far quicker than to ask every value
            finite[name] = torch.stack(tensor.float().aminmax()).isfinite().all()
        memory_format = form.memory_format if tensor.dim() == 4 else torch.preserve_format
        tensors[name] = tensor.to(form.device).to(form.dtype, memory_format=memory_format)
    if nonfinite := next((name for name, is_finite in finite.items() if not is_finite), None):
        raise UserError(f"{option}: {file}: {nonfinite} holds NaN or Inf, expected finite weights")
    return Weights(tensors, file, option)


def read_tensors(file: Path, option: str) -> dict[str, torch.Tensor]:
    """Safetensors file or index => state dict as stored, mapped into memory, without what wrappers put before names."""
    tensors = {}
    for part in parts_of(file, option):
        try:
            tensors |= load_file(part)
        except (OSError, SafetensorError, ValueError) as error:
            raise UserError(f"{option}: {part} is damaged or no safetensors file ({str(error).splitlines()[0]})") from error
    while tensors and (prefix := next((p for p in WRAPPERS if all(name.startswith(p) for name in tensors)), None)):
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    tensors = {name.removeprefix(ADAPTER_PREFIX): tensor for name, tensor in tensors.items()}
    return {name.replace("._orig_mod.", "."): tensor for name, tensor in tensors.items()}  # of blocks compiled one by one


def parts_of(file: Path, option: str) -> list[Path]:
    """A weights file itself; of an index the files beside it that it names; with adapters the convolutions beside them."""
    if file.name == ADAPTER:
        return [file, file.with_name(CONV_LAYERS)]
    if file.suffix != ".json":
        return [file]
    try:
        names = sorted(set(json.loads(file.read_text())["weight_map"].values()))
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError("it names what is no .safetensors file beside it")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"{option}: {file} is no index of safetensors files ({error})") from error
    return [file.with_name(name) for name in names]


def files_of(weights: Path) -> list[Path]:
    """A weights file, and with adapters what belongs to them."""
    return [weights, *(weights.with_name(name) for name in (CONV_LAYERS, ADAPTER_CONFIG) if weights.name == ADAPTER)]


def check_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], where: str) -> None:
    """Every expected tensor is there in its shape, and nothing else."""
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        kinds = (("missing", missing), ("unexpected", unexpected))
        faults = ", ".join(f"{len(names)} {kind} ({names[0]} …)" for kind, names in kinds if names)
        raise UserError(f"{where}: expected {len(expected)} tensors, found {len(found)}: {faults}; wrong base model?")
    for name, tensor in expected.items():
        if (shape := found[name].shape) != tensor.shape:
            raise UserError(f"{where}: expected {name} of shape {list(tensor.shape)}, found {list(shape)}; wrong base model?")


def check_channels(tensors: dict[str, torch.Tensor], latent_channels: int, where: str) -> None:
    inputs, outputs, c = tensors["conv_in.weight"].shape[1], tensors["conv_out.weight"].shape[0], latent_channels
    if inputs != 2 * c or outputs not in (c, c + 1):
        raise UserError(
            f"{where}: expected {2 * c} input channels (SAR and noisy EO latent) and {c} (stage 1) or {c + 1} (stage 2) output "
            f"channels, found {inputs} and {outputs}" + (", an unpatched U-Net" if inputs == c else "")
        )


def read_meta(path: str | Path) -> dict:
    """checkpoint.json of one of our own checkpoint folders (or of its unet/ within); {} for weights of another origin."""
    if (file := meta_file(path)) is None:
        return {}
    try:
        meta = json.loads(file.read_text())
        if not isinstance(meta, dict) or not isinstance(meta.get("config", {}), dict):
            raise ValueError("expected a mapping, and in it a mapping `config`")
        return meta
    except ValueError as error:
        raise UserError(f"{file} is damaged: {error}") from error


def meta_file(path: str | Path) -> Path | None:
    path = Path(path).expanduser()
    return next((file for folder in (path, path.parent, path.parent.parent) if (file := folder / META).is_file()), None)


def recorded_base(path: str | Path) -> str | None:
    """The base model of a checkpoint of ours: the folder itself of an exported pipeline, else the one of the training: its
    folder then, else what the configuration had."""
    meta, file = read_meta(path), meta_file(path)
    if file and file.with_name(PIPELINE).is_file():
        return str(file.parent)
    written = meta.get("config", {}).get("pretrained_model_name_or_path")
    places = [place for place in (meta.get("base_folder"), written) if place]
    return next((place for place in places if Path(place).expanduser().is_dir()), next(iter(places), None))


# ------------------------------------------------------------------------------------------------------ our own folders
def write_checkpoint(
    work_dir: Path,
    names: list[str],
    unet: UNet2DConditionModel,
    ema_unet: UNet2DConditionModel | None,
    prompt_embedding: torch.Tensor,
    state: dict,
    meta: dict,
) -> None:
    """Write one checkpoint under each of `names` in work_dir. The later names share the first one's files by hard links.

    A checkpoint is built in a hidden folder, flushed to the disk and renamed, so that a name never stands for half of one.
    OSError where it cannot be written; what stood under the names before is then still there.
    """
    building = hidden(work_dir / names[0], "building")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        for name, module in (("unet", unet), ("unet_ema", ema_unet)):
            if module is not None:
                save_unet(module, building / name)
        save_file({PROMPT_TENSOR: prompt_embedding.cpu().contiguous()}, building / PROMPT_FILE)
        torch.save(state, building / STATE)
        (building / META).write_text(json.dumps(meta, indent=2) + "\n")
        seal(building)
        put_in_place(building, work_dir / names[0])
        for name in names[1:]:
            building = hidden(work_dir / name, "building")
            shutil.rmtree(building, ignore_errors=True)
            shutil.copytree(work_dir / names[0], building, copy_function=link_or_copy)
            put_in_place(building, work_dir / name)
    except (OSError, RuntimeError, SafetensorError) as error:  # a full disk is a RuntimeError to torch.save
        shutil.rmtree(building, ignore_errors=True)
        raise OSError(str(error).splitlines()[0]) from error


def has_adapters(unet: UNet2DConditionModel) -> bool:
    return bool(getattr(unet, "peft_config", None))


def save_unet(unet: UNet2DConditionModel, folder: Path) -> None:
    """In diffusers' layout; of a U-Net with adapters these, in peft's files, and the WHOLE layers alone."""
    if not has_adapters(unet):
        unet.save_pretrained(folder)
        return
    from peft import get_peft_model_state_dict

    folder.mkdir(parents=True)
    adapters, everything = get_peft_model_state_dict(unet, save_embedding_layers=False), unet.state_dict()
    tensors = {f"{ADAPTER_PREFIX}{name}": value for name, value in adapters.items()}
    whole = {name: value for name, value in everything.items() if name.startswith(WHOLE)}
    for file, values in ((ADAPTER, tensors), (CONV_LAYERS, whole)):
        contiguous = {name: value.cpu().contiguous() for name, value in values.items()}
        save_file(contiguous, folder / file, {"format": "pt", FROZEN_DIGEST: frozen_digest(everything)})
    unet.peft_config["default"].save_pretrained(str(folder))


def frozen_digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of names, shapes and first values of a U-Net's weights, without WHOLE and adapters: tells one from another."""
    digest, own = hashlib.sha256(), {name.replace(".base_layer.", "."): value for name, value in tensors.items()}
    for name in sorted(name for name in own if ".lora_" not in name and not name.startswith(WHOLE)):
        first = own[name].reshape(-1)[:16].float().cpu().numpy()
        digest.update(f"{name} {tuple(own[name].shape)}".encode() + first.astype("<f4").tobytes())
    return digest.hexdigest()


def hidden(folder: Path, purpose: str) -> Path:
    """Where a checkpoint stands while it is being written, replaced or removed; `tidy` knows these names."""
    return folder.with_name(f".{folder.name}.{purpose}")


def seal(folder: Path) -> None:
    """Write the manifest of a folder's files, and have the disk hold all of them."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    listed = {path.relative_to(folder).as_posix(): size_and_hash(path) for path in files}
    (folder / MANIFEST).write_text(json.dumps({"files": listed}, indent=2) + "\n")
    for path in (*folder.rglob("*"), folder):
        flush(path)


def size_and_hash(file: Path) -> dict:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return {"bytes": file.stat().st_size, "sha256": digest.hexdigest()}


@lru_cache
def hash_once(file: Path, size: int, mtime_ns: int) -> str:
    """The hash of a file of this size and date: the web page asks at every translation, and should not read gigabytes again."""
    return size_and_hash(file)["sha256"]


def flush(path: Path) -> None:
    """Wait until the disk holds a file's content or a folder's names."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target)


def put_in_place(building: Path, target: Path) -> None:
    old = hidden(target, "old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    building.rename(target)
    flush(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def tidy(work_dir: Path) -> list[str]:
    """Clear up what a killed run left behind => what was found. Only the owner of the folder's lock may do this."""
    found = []
    for old in work_dir.glob(".*.old"):
        target = old.with_name(old.name[1:].removesuffix(".old"))
        if not target.exists():  # killed between the two renames of put_in_place
            old.rename(target)
            found.append(f"{target.name} was being replaced when the run ended: the earlier one is back")
    for purpose in ("building", "old", "pruned"):
        for folder in work_dir.glob(f".*.{purpose}"):
            if purpose == "building":
                found.append(f"{folder.name} is an unfinished checkpoint: removed")
            shutil.rmtree(folder)
    return found


def damage(folder: Path) -> str | None:
    """What is wrong with a checkpoint folder of ours, in a few words; None where every listed file is as it was written."""
    try:
        listed = json.loads((folder / MANIFEST).read_text())["files"]
        for name in (META, STATE, *listed):
            if not (folder / name).is_file():
                return f"{name} is missing"
            if size_and_hash(folder / name) != listed[name]:
                return f"{name} is not as it was written"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"{MANIFEST} cannot be read ({type(error).__name__})"
    return None


def identity(weights: Path, option: str) -> str:
    """SHA-256 of a weights file or of all that an index names; that of a checkpoint of ours is taken from its manifest."""
    if weights.name != ADAPTER and (listed := listed_in_manifest(weights, option)):
        return listed["sha256"]
    parts = files_of(weights) if weights.name == ADAPTER else parts_of(weights, option)
    try:
        hashes = [hash_once(part, (found := part.stat()).st_size, found.st_mtime_ns) for part in parts]
    except OSError as error:
        raise UserError(f"{option}: {error.filename} is damaged or no safetensors file ({error.strerror})") from error
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def listed_in_manifest(weights: Path, option: str) -> dict | None:
    """Size and hash with which a checkpoint of ours wrote a weights file; None for weights of another origin."""
    manifest = weights.parent.parent / MANIFEST
    try:
        listed = json.loads(manifest.read_text())["files"].get(weights.relative_to(manifest.parent).as_posix())
        return listed and {name: listed[name] for name in ("bytes", "sha256")}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{option}: {manifest} is damaged ({type(error).__name__}), take another checkpoint") from error


def list_checkpoints(work_dir: Path) -> list[Path]:
    """Checkpoint folders of a run, whole or not, the earliest iteration first, those that hide theirs last."""

    def age(folder: Path) -> tuple[float, str]:
        try:
            return float(read_meta(folder)["iteration"]), folder.name
        except (UserError, OSError, KeyError, TypeError, ValueError):
            return float("inf"), folder.name

    folders = {file.parent for name in (META, MANIFEST) for file in work_dir.glob(f"*/{name}")}
    return sorted((folder for folder in folders if not folder.name.startswith(".")), key=age)


def newest_whole(work_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint to continue from, and what is wrong with those passed over for it."""
    passed_over = []
    for folder in reversed(list_checkpoints(work_dir)):
        if (fault := damage(folder)) is None:
            return folder, passed_over
        passed_over.append(f"{folder} is damaged ({fault})")
    return None, passed_over


def prune(work_dir: Path, limit: int | None, just_written: Sequence[str] = ()) -> None:
    """Keep the newest `limit` numbered checkpoints; latest and best stay. Nothing goes while none of those kept is whole.

    Those `just_written` are known to be whole: hashing gigabytes once more would take as long as writing them.
    """
    numbered = [folder for folder in list_checkpoints(work_dir) if folder.name.startswith(("checkpoint-", "epoch-"))]
    surplus = numbered[:-limit] if limit else []
    kept = reversed(numbered[len(surplus) :])
    if surplus and any(folder.name in just_written or damage(folder) is None for folder in kept):
        for folder in surplus:
            shutil.rmtree(folder.rename(hidden(folder, "pruned")))


def require_state(folder: Path) -> None:
    """Refuse to resume from what is no whole checkpoint folder of ours, before anything is loaded."""
    missing = [name for name in (META, STATE, "unet") if not (folder / name).exists()]
    if missing:
        raise UserError(f"resume: {folder} lacks {' and '.join(missing)}, expected a checkpoint folder of this code")
    if fault := damage(folder):
        raise UserError(f"resume: {folder} is damaged ({fault}), expected a whole checkpoint folder: take another")


def read_state(folder: Path) -> tuple[dict, dict]:
    """Our own checkpoint folder => (training state, meta)."""
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever the damage leads to
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"resume: {folder / STATE} is damaged ({reason})") from error
    return state, read_meta(folder)


def lock(folder: Path) -> TextIO:
    """Hold a folder for this process alone, until it ends or the returned file is closed; loaders do not inherit it."""
    file = (folder / LOCK).open("a+")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:
        file.seek(0)
        owner = file.read().strip() or "another process"
        raise UserError(f"work_dir: {folder} is in use by {owner}: wait for it, end it, or choose another work_dir") from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file
