"""U-Net weights in every form in which they are found, what is refused and with which words, and our own folders."""

import copy
import json
import math
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import tiny_unet
from safetensors.torch import load_file, save_file

from cdiffset import checkpoint
from cdiffset.checkpoint import (
    list_checkpoints,
    prune,
    read_meta,
    read_state,
    read_weights,
    recorded_base,
    require_state,
    write_checkpoint,
)
from cdiffset.device import Form
from cdiffset.errors import UserError
from cdiffset.model import build_unet, load_unet, patch_conv_in, patch_conv_out

DIFFUSERS = "diffusion_pytorch_model.safetensors"
PROMPT = torch.zeros(1, 3, 64)


def trained(stage: int = 2, seed: int = 0, **changes):
    """A patched U-Net whose every weight is drawn, so that no two nets share one."""
    unet = patch_conv_in(tiny_unet(**changes))
    if stage == 2:
        unet = patch_conv_out(unet)
    generator = torch.Generator().manual_seed(seed)
    for parameter in unet.parameters():
        parameter.data.normal_(std=0.1, generator=generator)
    return unet


def prefixed(prefix: str):
    def write(unet, folder: Path) -> Path:
        save_file({prefix + name: tensor for name, tensor in unet.state_dict().items()}, folder / "unet.safetensors")
        return folder / "unet.safetensors"

    return write


def blocks_compiled(unet, folder: Path) -> Path:
    """As torch.compile names the tensors of blocks that are compiled one by one."""
    tensors = {
        re.sub(r"^((?:down|up)_blocks\.\d+)\.", r"\1._orig_mod.", name): value for name, value in unet.state_dict().items()
    }
    assert any("._orig_mod." in name for name in tensors)
    save_file(tensors, folder / "unet.safetensors")
    return folder / "unet.safetensors"


def diffusers_folder(unet, folder: Path) -> Path:
    unet.save_pretrained(folder / "net")
    return folder / "net"


def old_run_folder(unet, folder: Path) -> Path:
    (folder / "checkpoint-500").mkdir()
    save_file(unet.state_dict(), folder / "checkpoint-500/model.safetensors")
    return folder / "checkpoint-500"


def our_folder(unet, folder: Path) -> Path:
    write_checkpoint(folder, ["checkpoint-5"], unet, None, PROMPT, {}, {"iteration": 5})
    return folder / "checkpoint-5"


def our_folder_with_average(unet, folder: Path) -> Path:
    write_checkpoint(folder, ["checkpoint-5"], trained(seed=99), unet, PROMPT, {}, {"iteration": 5})
    return folder / "checkpoint-5"


def its_unet_folder(unet, folder: Path) -> Path:
    return our_folder(unet, folder) / "unet"


def fp16_named(**options):
    """diffusers' own fp16 variant, whole or split, of values that float16 holds exactly."""

    def write(unet, folder: Path) -> Path:
        unet.load_state_dict({name: tensor.half().float() for name, tensor in unet.state_dict().items()})
        copy.deepcopy(unet).half().save_pretrained(folder / "net", variant="fp16", **options)
        return folder / "net"

    return write


FORMS = {
    "compiled": prefixed("_orig_mod."), "compiled, DDP": prefixed("_orig_mod.module."),
    "blocks compiled": blocks_compiled, "DDP, compiled": prefixed("unet.module._orig_mod."),
    "fp16": fp16_named(), "fp16, split": fp16_named(max_shard_size="200KB"),
    "bare": prefixed(""), "module.": prefixed("module."), "unet.": prefixed("unet."), "module.unet.": prefixed("module.unet."),
    "unet.module.": prefixed("unet.module."), "diffusers": diffusers_folder, "released run": old_run_folder, "ours": our_folder,
    "ours, EMA": our_folder_with_average, "ours, unet/": its_unet_folder,
}  # fmt: skip


def assert_same(unet, tensors: dict) -> None:
    found = unet.state_dict()
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == torch.float32 for name in found)


# ------------------------------------------------------------------------------------------------------------- every form
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_loads_bit_for_bit(tiny_base, tmp_path, form, stage):
    unet = trained(stage)
    path = FORMS[form](unet, tmp_path)
    loaded, weights = load_unet(str(path), tiny_base, 4, "checkpoint")
    assert_same(loaded, unet.state_dict())
    assert (loaded.config.in_channels, loaded.config.out_channels) == (8, 3 + stage)
    assert weights.is_file() and path in (weights, *weights.parents)
    assert weights.name.endswith(".index.fp16.json" if form == "fp16, split" else ".safetensors")
    assert not loaded.training and all(parameter.requires_grad for parameter in loaded.parameters())
    z, prompt = torch.ones(1, 8, 16, 16), torch.ones(1, 3, 64)
    with torch.no_grad():
        torch.testing.assert_close(loaded(z, 7, prompt).sample, unet(z, 7, prompt).sample, atol=1e-5, rtol=0)


def test_a_net_loads_straight_into_another_type(tiny_base, tmp_path):
    path, expected = prefixed("")(trained(), tmp_path), trained().to(torch.bfloat16).state_dict()
    form = Form(torch.device("cpu"), torch.bfloat16, torch.channels_last)
    found = build_unet(read_weights(str(path), "checkpoint", form), tiny_base, 4).state_dict()
    assert found.keys() == expected.keys()
    assert all(found[name].dtype == torch.bfloat16 and torch.equal(found[name], expected[name]) for name in found)


def test_a_folders_own_config_goes_before_the_bases(tiny_base, tmp_path):
    unet = trained(norm_num_groups=4)  # same tensors, another function
    path = diffusers_folder(unet, tmp_path)
    assert load_unet(str(path), tiny_base, 4, "checkpoint")[0].config.norm_num_groups == 4
    (path / "config.json").unlink()
    assert load_unet(str(path), tiny_base, 4, "checkpoint")[0].config.norm_num_groups == 8


def test_training_a_loaded_net_leaves_its_file_alone(tiny_base, tmp_path):
    """The file is mapped into memory, not read."""
    path = prefixed("")(trained(), tmp_path)
    before = path.read_bytes()
    loaded, _ = load_unet(str(path), tiny_base, 4, "checkpoint")
    with torch.no_grad():
        for parameter in loaded.parameters():
            parameter.zero_()
    assert path.read_bytes() == before


def test_a_path_in_the_home_directory_may_be_written_with_a_tilde(tiny_base, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    diffusers_folder(trained(), tmp_path)
    assert_same(load_unet("~/net", tiny_base, 4, "checkpoint")[0], trained().state_dict())


# -------------------------------------------------------------------------------------------------------------- refusals
def refusal(path, base: str, latent_channels: int = 4) -> str:
    with pytest.raises(UserError) as caught:
        load_unet(str(path), base, latent_channels, "accelerator_path")
    message = str(caught.value)
    assert message.startswith("accelerator_path: ") and str(path) in message and "\n" not in message
    return message


def mix_prefixes(tensors):
    for name in sorted(tensors)[-10:]:
        tensors[f"module.{name}"] = tensors.pop(name)


def outputs(count: int):
    def change(tensors):
        for name in ("conv_out.weight", "conv_out.bias"):
            tensors[name] = torch.cat([tensors[name]] * 2)[:count].clone()

    return change


def changed(name: str, function):
    return lambda tensors: tensors.update({name: function(tensors[name])})


def added(tensor: torch.Tensor):
    return lambda tensors: tensors.update({"surplus.weight": tensor})


KEY, NORM = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k.weight", "conv_norm_out.weight"
CHANNELS = "4 (stage 1) or 5 (stage 2) output channels"
REFUSED = {
    "missing": (lambda tensors: tensors.pop(NORM), ["expected 208 tensors, found 207", f"1 missing ({NORM}"]),
    "unexpected": (added(torch.zeros(3)), ["expected 208 tensors, found 209", "1 unexpected (surplus.weight"]),
    "unexpected and empty": (added(torch.zeros(0, 4)), ["expected 208 tensors, found 209", "1 unexpected (surplus.weight"]),
    "half of the names prefixed": (mix_prefixes, ["10 missing", "10 unexpected (module."]),
    "transposed": (changed(KEY, lambda w: w.T), ["attn2.to_k.weight of shape [32, 64], found [64, 32]"]),
    "NaN": (lambda tensors: tensors[NORM][3:4].fill_(math.nan), [NORM, "expected finite"]),
    "infinite": (lambda tensors: tensors[NORM][3:4].fill_(-math.inf), [NORM, "expected finite"]),
    "5 inputs": (changed("conv_in.weight", lambda w: w[:, :5]), ["expected 8 input channels", "found 5 and 5"]),
    "3 outputs": (outputs(3), [CHANNELS, "found 8 and 3"]),
    "6 outputs": (outputs(6), [CHANNELS, "found 8 and 6"]),
    "one bias too few": (changed("conv_out.bias", lambda b: b[:4]), ["expected conv_out.bias of shape [5], found [4]"]),
    "no U-Net": (lambda tensors: tensors.pop("conv_in.weight"), ["is no U-Net", "207 tensors"]),
    "no convolution": (changed("conv_out.weight", lambda w: w.flatten(1)), ["is no U-Net", "208 tensors"]),
    "nothing in it": (lambda tensors: tensors.clear(), ["is no U-Net", "0 tensors"]),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_what_does_not_fit_is_refused_with_expected_and_found(tiny_base, tmp_path, fault):
    change, words = REFUSED[fault]
    tensors = {name: tensor.clone() for name, tensor in trained().state_dict().items()}
    assert len(tensors) == 208
    change(tensors)
    save_file({name: tensor.clone().contiguous() for name, tensor in tensors.items()}, tmp_path / "unet.safetensors")
    message = refusal(tmp_path / "unet.safetensors", tiny_base)
    assert all(word in message for word in words), message


def test_an_unpatched_unet_is_called_so(tiny_base, tmp_path):
    tiny_unet().save_pretrained(tmp_path / "net")
    message = refusal(tmp_path / "net", tiny_base)
    assert "expected 8 input channels" in message and "found 4 and 4, an unpatched U-Net" in message


@pytest.mark.parametrize(
    "changes, words",
    [({"cross_attention_dim": 48}, "[32, 64], found [32, 48]"), ({"layers_per_block": 2}, "expected 208 tensors, found")],
)
def test_a_bare_file_of_another_architecture_is_refused(tiny_base, tmp_path, changes, words):
    message = refusal(prefixed("")(trained(**changes), tmp_path), tiny_base)
    assert words in message and "wrong base model?" in message


def test_a_config_that_contradicts_the_weights_beside_it_or_is_damaged_is_refused(tiny_base, tmp_path):
    path = diffusers_folder(trained(), tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "block_out_channels": [16, 64]}))
    assert "of shape" in refusal(path, tiny_base)
    (path / "config.json").write_text('{"in_channels": ')
    with pytest.raises(UserError, match="config.json"):
        load_unet(str(path), tiny_base, 4, "accelerator_path")


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_truncated_files_are_refused(tiny_base, tmp_path, keep):
    path = prefixed("")(trained(), tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    assert "damaged or no safetensors file" in refusal(path, tiny_base)


class Payload:
    """Unpickled, it creates a file."""

    def __init__(self, file: Path):
        self.file = file

    def __reduce__(self):
        return Path.touch, (self.file,)


@pytest.mark.parametrize("name", ["unet.safetensors", "unet.bin", "unet"])
@pytest.mark.parametrize("write", ["pickle", "torch"])
def test_pickles_are_never_opened_whatever_their_name(tiny_base, tmp_path, name, write):
    sign = tmp_path / "executed"
    content = {"conv_in.weight": Payload(sign)}
    (tmp_path / name).write_bytes(pickle.dumps(content)) if write == "pickle" else torch.save(content, tmp_path / name)
    assert ".safetensors" in refusal(tmp_path / name, tiny_base)
    assert not sign.exists()
    pickle.loads(pickle.dumps(content))
    assert sign.exists()  # the payload does work where it is unpickled


def test_a_folder_of_pickled_weights_is_refused(tiny_base, tmp_path):
    path = diffusers_folder(trained(), tmp_path)
    torch.save(load_file(path / DIFFUSERS), path / "diffusion_pytorch_model.bin")
    (path / DIFFUSERS).unlink()
    assert "holds none of" in refusal(path, tiny_base)


def test_missing_paths_and_empty_folders_are_refused_with_what_is_expected(tiny_base, tmp_path):
    for path, words in ((tmp_path / "nothing.safetensors", "there is no"), (tmp_path, "holds none of unet_ema/, unet/")):
        message = refusal(path, tiny_base)
        assert words in message and "expected a .safetensors file, a diffusers U-Net folder" in message


# ----------------------------------------------------------------------------------------------------------- our own folders
def state_of(iteration: int) -> dict:
    return {"optimizer": {"state": {0: {"exp_avg": torch.full((3,), float(iteration))}}}, "scaler": None}


def write(work_dir: Path, iteration: int, names: list[str], ema: bool = False) -> None:
    average = trained(seed=iteration + 1000) if ema else None
    meta = {"iteration": iteration, "epoch": iteration // 2, "best": {"psnr": None}}
    write_checkpoint(work_dir, names, trained(seed=iteration), average, PROMPT, state_of(iteration), meta)


def test_a_checkpoint_comes_back_as_it_was_written(tiny_base, tmp_path):
    write(tmp_path / "run", 6, ["checkpoint-6", "latest"], ema=True)
    for name in ("checkpoint-6", "latest"):
        folder = tmp_path / "run" / name
        assert sorted(file.name for file in folder.iterdir()) == [
            "checkpoint.json", "manifest.json", "prompt.safetensors", "training_state.pt", "unet", "unet_ema",
        ]  # fmt: skip
        require_state(folder)
        state, meta = read_state(folder)
        assert state["optimizer"]["state"][0]["exp_avg"].tolist() == [6, 6, 6] and state["scaler"] is None
        assert meta == {"iteration": 6, "epoch": 3, "best": {"psnr": None}}
        assert_same(load_unet(str(folder / "unet"), tiny_base, 4, "resume")[0], trained(seed=6).state_dict())
        assert_same(load_unet(str(folder), tiny_base, 4, "resume")[0], trained(seed=1006).state_dict())
    assert not list((tmp_path / "run").glob(".*"))  # nothing half-written stays


def test_the_second_name_shares_the_first_ones_files(tmp_path):
    write(tmp_path, 1, ["checkpoint-1", "best", "latest"])
    files = [file.relative_to(tmp_path / "latest") for file in (tmp_path / "latest").rglob("*") if file.is_file()]
    assert Path("unet", DIFFUSERS) in files and Path("training_state.pt") in files
    for file in files:
        assert len({(tmp_path / name / file).stat().st_ino for name in ("checkpoint-1", "best", "latest")}) == 1


def test_without_hard_links_the_second_name_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr("os.link", refuse)
    write(tmp_path, 1, ["checkpoint-1", "latest"])
    first, second = (tmp_path / name / "unet" / DIFFUSERS for name in ("checkpoint-1", "latest"))
    assert first.stat().st_ino != second.stat().st_ino and first.read_bytes() == second.read_bytes()


def test_a_name_that_moves_on_leaves_the_others_as_they_were(tiny_base, tmp_path):
    write(tmp_path, 1, ["checkpoint-1", "best", "latest"])
    write(tmp_path, 2, ["checkpoint-2", "latest"])
    for name, iteration in (("checkpoint-1", 1), ("best", 1), ("checkpoint-2", 2), ("latest", 2)):
        assert read_meta(tmp_path / name)["iteration"] == iteration
        assert_same(load_unet(str(tmp_path / name), tiny_base, 4, "resume")[0], trained(seed=iteration).state_dict())
    write(tmp_path, 3, ["latest"])
    assert not (tmp_path / "latest/unet_ema").exists() and read_state(tmp_path / "latest")[1]["iteration"] == 3
    assert_same(load_unet(str(tmp_path / "checkpoint-2"), tiny_base, 4, "resume")[0], trained(seed=2).state_dict())


def test_checkpoints_are_listed_by_iteration_and_half_written_ones_ignored(tmp_path):
    assert list_checkpoints(tmp_path / "not there yet") == []
    for iteration in (10, 9, 100):
        write(tmp_path, iteration, [f"checkpoint-{iteration}"])
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / ".checkpoint-200.building")
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / ".latest.old")
    shutil.copytree(tmp_path / "checkpoint-100", tmp_path / "no-meta")
    for name in ("checkpoint.json", "manifest.json"):
        (tmp_path / "no-meta" / name).unlink()
    (tmp_path / "results").mkdir()
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]


def test_what_an_interrupted_write_left_does_not_disturb_the_next(tmp_path):
    for name in (".checkpoint-1.building", ".latest.building", ".latest.old"):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "unet/rubbish").write_text("")
    write(tmp_path, 1, ["checkpoint-1", "latest"])
    write(tmp_path, 2, ["checkpoint-2", "latest"])
    assert not list(tmp_path.rglob("rubbish")) and not list(tmp_path.glob(".*"))
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["checkpoint-1", "checkpoint-2", "latest"]


def test_pruning_keeps_the_newest_numbered_ones_and_the_others_whole(tiny_base, tmp_path, monkeypatch):
    write(tmp_path, 1, ["checkpoint-1", "best"])
    write(tmp_path, 2, ["epoch-1"])
    write(tmp_path, 9, ["checkpoint-9"])
    write(tmp_path, 10, ["checkpoint-10", "latest"])
    prune(tmp_path, None)
    assert len(list_checkpoints(tmp_path)) == 6
    prune(tmp_path, 2)
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["best", "checkpoint-9", "checkpoint-10", "latest"]
    prune(tmp_path, 2)
    with monkeypatch.context() as patch:  # what was just written is not hashed again
        patch.setattr(checkpoint, "damage", lambda folder: pytest.fail(f"{folder} was hashed"))
        prune(tmp_path, 1, just_written=["checkpoint-10", "latest"])
    assert [folder.name for folder in list_checkpoints(tmp_path)] == ["best", "checkpoint-10", "latest"]
    shutil.rmtree(tmp_path / "checkpoint-10")
    for name, iteration in (("best", 1), ("latest", 10)):
        assert read_state(tmp_path / name)[0]["optimizer"]["state"][0]["exp_avg"][0] == iteration
        assert_same(load_unet(str(tmp_path / name), tiny_base, 4, "resume")[0], trained(seed=iteration).state_dict())


@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "pickle", "meta"])
def test_a_damaged_training_state_is_refused(tmp_path, damage):
    write(tmp_path, 1, ["latest"])
    name, sign = "checkpoint.json" if damage == "meta" else "training_state.pt", tmp_path / "executed"
    file = tmp_path / "latest" / name
    content = file.read_bytes()
    if damage == "pickle":
        torch.save({"optimizer": Payload(sign)}, file)
    else:
        file.write_bytes({"empty": b"", "foreign": b"hello" * 99}.get(damage, content[: len(content) // 2]))
    with pytest.raises(UserError, match=f"{name} is damaged"):
        read_state(tmp_path / "latest")
    assert not sign.exists()


def test_only_a_whole_checkpoint_folder_can_be_resumed(tmp_path):
    write(tmp_path, 1, ["latest"])
    (tmp_path / "latest/training_state.pt").unlink()
    with pytest.raises(UserError, match="resume: .*latest lacks training_state.pt, expected a checkpoint folder"):
        require_state(tmp_path / "latest")
    with pytest.raises(UserError, match="lacks checkpoint.json and training_state.pt and unet"):
        require_state(tmp_path)


def test_the_meta_is_found_from_the_unet_folder_and_absent_elsewhere(tmp_path):
    write(tmp_path, 4, ["latest"])
    for path in ("latest", "latest/unet", f"latest/unet/{DIFFUSERS}"):
        assert read_meta(tmp_path / path)["iteration"] == 4
    assert read_meta(diffusers_folder(trained(), tmp_path / "elsewhere")) == {}


# ------------------------------------------------------------------------------------------------------------ the base model
def test_the_base_is_found_from_anywhere(tmp_path, monkeypatch):
    def recorded(written: str, folder: Path | None) -> str | None:
        meta = {"config": {"pretrained_model_name_or_path": written}, "base_folder": folder and str(folder)}
        (tmp_path / "checkpoint.json").write_text(json.dumps(meta))
        return recorded_base(tmp_path)

    (tmp_path / "here" / "base").mkdir(parents=True)
    there = tmp_path / "here" / "base"
    assert recorded("base", there) == str(there)  # started elsewhere
    assert recorded("base", tmp_path / "gone") == str(tmp_path / "gone")  # named as it was then
    assert recorded("someone/base", None) == "someone/base"
    monkeypatch.chdir(tmp_path / "here")
    assert recorded("base", tmp_path / "gone") == "base"  # moved together with the working directory
    assert recorded("base", None) == "base"  # as earlier versions recorded it
    assert recorded_base(tmp_path / "no" / "checkpoint" / "of" / "ours") is None
