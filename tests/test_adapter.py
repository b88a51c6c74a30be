"""Adapters (LoRA): what is trained, peft's own reading of the files, merging, both stages, resuming, and what is refused."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import tiny_unet
from peft import PeftModel
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_calibrate import translation
from training import launch, same

import export
from cdiffset.checkpoint import ADAPTER, ADAPTER_CONFIG, CONV_LAYERS, has_adapters
from cdiffset.config import load_config
from cdiffset.errors import UserError
from cdiffset.hub import files_of
from cdiffset.model import load_base_unet, load_unet, patch_conv_in
from train import Trainer

LORA = {"lora_rank": 4, "lora_alpha": 8, "learning_rate": 1e-2}
FILES = {ADAPTER, ADAPTER_CONFIG, CONV_LAYERS}


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return {**load_file(folder / ADAPTER), **load_file(folder / CONV_LAYERS)}


def on_latents(unet) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    latents, prompt = torch.randn(2, 8, 8, 8, generator=generator), torch.randn(2, 3, 64, generator=generator)
    with torch.no_grad():
        return unet.eval()(latents, torch.tensor([10, 700]), prompt).sample


@pytest.fixture(scope="module")
def stages(run, tmp_path_factory) -> tuple[Path, Path]:
    """Stage 1, and stage 2 from its latest, with the same adapters."""
    root = tmp_path_factory.mktemp("lora")
    first = run(root / "one", **LORA, ema_decay=0.9)
    return first, run(root / "two", **LORA, ema_decay=0.9, confidence=True, accelerator_path=first / "latest")


# --------------------------------------------------------------------------------------------------------------- training
def test_adapters_and_the_two_convolutions_alone_are_trained(argv, tiny_base, tmp_path):
    trainer = Trainer(load_config(argv(tmp_path / "run", **LORA)))
    before = {name: value.clone() for name, value in trainer.weights.masters.state_dict().items()}
    start = patch_conv_in(load_base_unet(tiny_base))
    assert torch.equal(on_latents(trainer.weights.masters), on_latents(start.to(memory_format=torch.channels_last)))
    trainer.run()
    after = trainer.weights.masters.state_dict()
    changed = {name for name, value in before.items() if not torch.equal(value, after[name])}
    assert changed == {name for name in before if ".lora_" in name or name.startswith(("conv_in", "conv_out"))}
    assert {name.split(".lora_")[0].split("attn")[-1][2:] for name in changed if ".lora_" in name} == {
        "to_q", "to_k", "to_v", "to_out.0",
    }  # fmt: skip


@pytest.mark.parametrize("stage", [0, 1])
def test_a_checkpoint_holds_pefts_files_alone(stages, stage):
    for kind in ("unet", "unet_ema"):
        folder = stages[stage] / "latest" / kind
        assert {file.name for file in folder.iterdir()} == FILES
        assert load_file(folder / CONV_LAYERS)["conv_out.weight"].shape[0] == 4 + stage
    written = json.loads((stages[stage] / "latest/unet" / ADAPTER_CONFIG).read_text())
    assert (written["r"], written["lora_alpha"], written["base_model_name_or_path"]) == (4, 8, None)
    assert not same(*(tensors_of(stages[stage] / "latest" / kind) for kind in ("unet", "unet_ema")))


def test_stage_2_goes_on_from_the_adapters_of_stage_1(stages, argv, tmp_path):
    built = Trainer(load_config(argv(tmp_path / "run", **LORA, confidence=True, accelerator_path=stages[0] / "latest")))
    own = built.weights.masters.state_dict()
    for name, value in load_file(stages[0] / "latest/unet_ema" / ADAPTER).items():
        key = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(own[key], value)
    assert own["conv_out.weight"].shape[0] == 5 and built.weights.masters.conv_out.weight.requires_grad


def test_peft_reads_them_and_merging_changes_nothing(stages, tiny_base):
    folder = stages[0] / "latest/unet"
    unet = patch_conv_in(load_base_unet(tiny_base))
    unet.load_state_dict({**unet.state_dict(), **load_file(folder / CONV_LAYERS)})
    by_peft = on_latents(PeftModel.from_pretrained(unet, str(folder)).base_model.model)
    beside, _ = load_unet(str(folder), tiny_base, 4, "x", merge=False)
    merged, _ = load_unet(str(folder), tiny_base, 4, "x")
    assert has_adapters(beside) and not has_adapters(merged)
    assert torch.equal(on_latents(beside), by_peft)
    torch.testing.assert_close(on_latents(merged), by_peft, rtol=1e-4, atol=1e-5)
    assert merged.state_dict().keys() == unet.__class__.from_config(merged.config).state_dict().keys()
    tensors, base = load_file(folder / ADAPTER), load_base_unet(tiny_base).state_dict()
    for name in (name for name in tensors if name.endswith("lora_A.weight")):
        layer = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        delta = 8 / 4 * tensors[name.replace("lora_A", "lora_B")] @ tensors[name]
        torch.testing.assert_close(merged.state_dict()[f"{layer}.weight"], base[f"{layer}.weight"] + delta)


def test_convolutions_may_have_adapters(run, tiny_base, tmp_path):
    folder = run(tmp_path / "run", lora_rank=2, lora_targets=["conv1", "to_q"], learning_rate=1e-2) / "latest/unet"
    names = {name.split(".lora_")[0].rpartition(".")[2] for name in load_file(folder / ADAPTER)}
    assert names == {"conv1", "to_q"}
    pair = [on_latents(load_unet(str(folder), tiny_base, 4, "x", merge=merge)[0]) for merge in (False, True)]
    torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [{"ema_decay": 0.9}, {"mixed_precision": "bf16_copy"}, {"gradient_checkpointing": True, "gradient_accumulation_steps": 2}],
    ids=["ema", "bf16_copy", "checkpointing"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(run, tmp_path, changes):
    settings = {**LORA, "confidence": True, "num_iter": 6, "save_iter": 3, **changes}
    whole = run(tmp_path / "whole", **settings)
    parts = shutil.copytree(whole, tmp_path / "parts", ignore=shutil.ignore_patterns("latest", "best", "checkpoint-6"))
    run(parts, **settings)
    assert "at iteration 3" in (parts / "train_log.txt").read_text()
    for kind in ["unet", "unet_ema"] if "ema_decay" in changes else ["unet"]:
        assert same(tensors_of(whole / "latest" / kind), tensors_of(parts / "latest" / kind))


def test_the_latent_cache_and_checkpointing_change_nothing_and_two_processes_little(run, argv, tmp_path):
    settings = {**LORA, "num_iter": 3, "train-feeder-args.crop_size": 40}
    plain = tensors_of(run(tmp_path / "plain", **settings) / "latest/unet")
    assert not same(plain, tensors_of(run(tmp_path / "other", **settings, seed=5) / "latest/unet"))
    for name, changes in {"checkpointed": {"gradient_checkpointing": True}, "cached": {"latent_cache": tmp_path / "c"}}.items():
        assert same(plain, tensors_of(run(tmp_path / name, **settings, **changes) / "latest/unet"))
    launch(argv(tmp_path / "two", **settings))
    two = tensors_of(tmp_path / "two/latest/unet")
    moved = torch.cat([value.flatten() for name, value in plain.items() if "lora_B" in name]).norm()
    apart = torch.cat([(value - two[name]).flatten() for name, value in plain.items() if "lora_B" in name]).norm()
    assert moved > 0.01 and apart < 0.02 * moved


# ------------------------------------------------------------------------------------------------------------- the commands
def translated(checkpoint: Path, pair_folders: Path, out: Path, *options: str) -> np.ndarray:
    words = ["--sar-dir", pair_folders / "test/sar", "--output-dir", out, "--checkpoint", checkpoint, *options]
    assert translation.main([str(word) for word in [*words, "--num-inference-steps", "2"]]) == 0
    return np.stack([np.asarray(Image.open(file)) for file in sorted(out.glob("*.png"))]).astype(int)


def test_commands_take_adapters_and_merge_writes_a_plain_unet(stages, pair_folders, tmp_path):
    expected = translated(stages[1] / "latest", pair_folders, tmp_path / "adapters")
    words = ["--checkpoint", stages[1] / "latest", "--output", tmp_path / "merged", "--merge"]
    assert export.main([str(word) for word in words]) == 0
    found = {file.relative_to(tmp_path / "merged").as_posix() for file in (tmp_path / "merged").rglob("*.*")}
    assert found == {"checkpoint.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors"}
    plain = translated(tmp_path / "merged", pair_folders, tmp_path / "plain")
    assert np.abs(plain - expected).max() <= 1  # weights that lie elsewhere in memory may round otherwise
    assert export.main(["--checkpoint", str(stages[1] / "latest"), "--output", str(tmp_path / "pipeline")]) == 0
    piped = translated(tmp_path / "pipeline", pair_folders, tmp_path / "piped")
    assert np.abs(piped - expected).max() <= 1 and expected.std() > 0


def test_adapters_stand_on_weights_of_another_training(run, pair_folders, tiny_base, tmp_path, monkeypatch):
    full = run(tmp_path / "full", learning_rate=1e-2)
    monkeypatch.chdir(tmp_path)
    on_it = run(tmp_path / "lora", **LORA, accelerator_path="full/latest")
    written = json.loads((on_it / "latest/unet" / ADAPTER_CONFIG).read_text())
    assert written["base_model_name_or_path"] == str(full / "latest")
    monkeypatch.chdir("/")
    unet, _ = load_unet(str(on_it / "latest"), tiny_base, 4, "x")
    own = load_file(full / "latest/unet/diffusion_pytorch_model.safetensors")
    frozen = [name for name in own if "attn" not in name and not name.startswith(("conv_in", "conv_out"))]
    assert frozen and all(torch.equal(unet.state_dict()[name], own[name]) for name in frozen)
    other = run(tmp_path / "other", learning_rate=2e-2)
    shutil.rmtree(full)
    shutil.copytree(other, full)
    with pytest.raises(UserError, match="holds adapters of .*/full/latest, which is another than in their training"):
        load_unet(str(on_it / "latest"), tiny_base, 4, "--checkpoint")
    shutil.rmtree(full)
    with pytest.raises(UserError, match="holds adapters of .*/full/latest: there is no .*/full/latest"):
        load_unet(str(on_it / "latest"), tiny_base, 4, "--checkpoint")


def test_full_fine_tuning_may_start_from_adapters(stages, run, tmp_path):
    folder = run(tmp_path / "full", accelerator_path=stages[0] / "latest") / "latest/unet"
    assert (folder / "diffusion_pytorch_model.safetensors").is_file()


def test_the_hub_gives_all_files_of_adapters():
    files = [f"unet/{name}" for name in sorted(FILES)]
    assert sorted(files_of([*files, "unet/x.bin", "README.md", "checkpoint.json"], "")) == sorted([*files, "checkpoint.json"])


# ---------------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lora_alpha": 8}, "lora_alpha: it is of adapters, which take lora_rank, found lora_rank: null"),
        ({"lora_targets": ["to_q"]}, "lora_targets: it is of adapters"),
        ({"lora_rank": 0}, "lora_rank: expected a whole number of at least 1, or null, found 0"),
        ({"lora_rank": 4, "lora_targets": []}, "lora_targets: expected a name or a list of names"),
        ({"lora_rank": 4, "lora_targets": ["conv_in"]}, "conv_in and conv_out are trained whole, found conv_in"),
        (
            {"lora_rank": 4, "lora_targets": ["to_x"]},
            "lora_targets: expected names of .* layers, none is called 'to_x'",
        ),
        ({"lora_rank": 4, "fsdp": True}, "fsdp: true is not available with lora_rank"),
    ],
)
def test_settings_that_do_not_fit_are_refused(argv, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        Trainer(load_config(argv(tmp_path / "run", **changes)))


def test_other_adapters_than_those_loaded_are_refused(stages, argv, tmp_path):
    with pytest.raises(UserError, match=r"holds adapters of lora_rank 4, lora_alpha 8 .* take the same, or merge them"):
        Trainer(load_config(argv(tmp_path / "run", lora_rank=8, accelerator_path=stages[0] / "latest")))


def test_without_peft_it_is_one_line(stages, argv, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(UserError, match="lora_rank: adapters take peft .*pip install -r requirements-extra.txt"):
        Trainer(load_config(argv(tmp_path / "run", **LORA)))
    with pytest.raises(UserError, match="accelerator_path: adapters take peft"):
        Trainer(load_config(argv(tmp_path / "other", accelerator_path=stages[0] / "latest")))


DAMAGES = [
    ("no settings", lambda folder: (folder / ADAPTER_CONFIG).unlink(), "adapter_config.json does not describe adapters"),
    ("other settings", lambda folder: rewrite(folder, r="many"), "expected LoRA with whole numbers r"),
    ("another method", lambda folder: rewrite(folder, peft_type="IA3"), "expected LoRA"),
    ("DoRA", lambda folder: rewrite(folder, use_dora=True), "use_dora: not supported"),
    (
        "another rank",
        lambda folder: rewrite(folder, r=2),
        "expected adapters of rank 2, as adapter_config.json has it",
    ),
    ("adapters of themselves", lambda folder: rewrite(folder, base_model_name_or_path=str(folder)), "found adapters again"),
    ("targets of other layers", lambda folder: rewrite(folder, target_modules=["0"]), "other layers are called '0'"),
    ("no convolutions", lambda folder: (folder / CONV_LAYERS).unlink(), "conv_layers.safetensors is damaged or no safetensors"),
    ("a missing tensor", lambda folder: drop_one(folder), "1 missing"),
    ("an odd convolution", lambda folder: save_odd(folder), "expected conv_in.weight of shape"),
]


def rewrite(folder: Path, **changes) -> None:
    written = json.loads((folder / ADAPTER_CONFIG).read_text())
    (folder / ADAPTER_CONFIG).write_text(json.dumps(written | changes))


def drop_one(folder: Path) -> None:
    tensors = load_file(folder / ADAPTER)
    save_file(dict(list(tensors.items())[1:]), folder / ADAPTER)


def save_odd(folder: Path) -> None:
    tensors = load_file(folder / CONV_LAYERS)
    with safe_open(folder / CONV_LAYERS, "pt") as file:
        kept = file.metadata()
    save_file({**tensors, "conv_in.weight": tensors["conv_in.weight"][..., :2].contiguous()}, folder / CONV_LAYERS, kept)


@pytest.mark.parametrize(("damage", "message"), [case[1:] for case in DAMAGES], ids=[case[0] for case in DAMAGES])
def test_damaged_adapters_are_refused_in_one_line(stages, tiny_base, tmp_path, damage, message):
    folder = shutil.copytree(stages[0] / "latest/unet", tmp_path / "unet")
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        load_unet(str(folder), tiny_base, 4, "--checkpoint")
    assert str(caught.value).startswith("--checkpoint: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(FILES))
def test_damage_to_any_file_is_noticed(stages, tiny_base, tmp_path, name):
    folder = shutil.copytree(stages[0] / "latest", tmp_path / "latest")
    file = folder / "unet_ema" / name
    file.write_bytes(file.read_bytes()[:-1] + b" ")
    with pytest.raises(UserError, match=f"{name} is damaged: not as it was written by manifest.json"):
        load_unet(str(folder), tiny_base, 4, "--checkpoint")


def test_a_run_is_not_resumed_with_or_without_adapters(run, argv, tmp_path):
    settings = {"num_iter": 2, "ema_decay": 0.9}
    for name, first, then, words in (
        ("plain", {}, LORA, "holds no adapters"),
        ("adapters", LORA, {"learning_rate": 1e-2}, "holds adapters, of which this run, without lora_rank, has none"),
    ):
        run(tmp_path / name, **settings, **first)
        with pytest.raises(UserError, match=f"resume: .* {words}: a run that begins with its weights takes accelerator_path"):
            Trainer(load_config(argv(tmp_path / name, **{**settings, "num_iter": 4}, **then, resume="latest")))


def test_phase_test_takes_adapters(stages, run, tmp_path):
    folder = run(tmp_path / "test", phase="test", confidence=True, accelerator_path=stages[1] / "latest")
    assert json.loads((folder / "test/report.json").read_text())["images"] == 5


def test_adapters_of_another_base_are_refused(stages, tmp_path, tiny_base):
    base = shutil.copytree(tiny_base, tmp_path / "base")
    shutil.rmtree(base / "unet")
    tiny_unet(block_out_channels=[16, 48]).save_pretrained(base / "unet")
    with pytest.raises(UserError, match="holds adapters of the base model's own U-Net, which is another"):
        load_unet(str(stages[0] / "latest"), str(base), 4, "--checkpoint")
