"""Low-rank adapters of a frozen U-Net (LoRA, Hu et al., ICLR 2022), by peft and in its files.

The two layers that the patch changes, conv_in and conv_out, are trained whole. A folder of adapters holds
adapter_model.safetensors and adapter_config.json as peft writes them, which also says upon which U-Net they stand, and
conv_layers.safetensors.
"""

import json

import torch
from diffusers import UNet2DConditionModel
from safetensors import safe_open
from torch import nn

from cdiffset.checkpoint import ADAPTER_CONFIG, CONV_LAYERS, FROZEN_DIGEST, WHOLE, Weights, check_tensors, frozen_digest
from cdiffset.errors import UserError


def require_peft(option: str) -> None:
    try:
        import peft  # noqa: F401  installed by those alone who ask for adapters
    except ImportError as error:
        raise UserError(f"{option}: adapters take peft ({error}), install it: pip install -r requirements-extra.txt") from error


def add_adapters(
    unet: UNet2DConditionModel,
    rank: int,
    alpha: int,
    targets: list[str],
    stands_on: str | None,  # checkpoint of the frozen weights; None: the base model's own U-Net
    option: str,  # what errors name
    seed: int = 0,  # of the random half of each adapter
) -> UNet2DConditionModel:
    """Freeze a patched U-Net but for WHOLE, and put adapters, without effect yet, on layers whose names end in `targets`.

    UserError where no layer is called so.
    """
    from peft import LoraConfig

    for target in targets:
        called = [layer for name, layer in unet.named_modules() if f".{name}".endswith(f".{target}")]
        if not called or not all(isinstance(layer, nn.Linear | nn.Conv2d) for layer in called):
            found = "other layers are" if called else "none is"
            raise UserError(f"{option}: expected names of linear and convolution layers, {found} called {target!r}")
    unet.requires_grad_(False)
    settings = LoraConfig(r=rank, lora_alpha=alpha, target_modules=sorted(targets))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        unet.add_adapter(settings)
    # peft removes the one and may shorten the other.
    settings.base_model_name_or_path, settings.target_modules = stands_on, list(targets)
    for name in WHOLE:
        getattr(unet, name).requires_grad_(True)
    return unet


def counted(unet: UNet2DConditionModel) -> tuple[str, str]:
    """How many weights are trained, and how many there are without the adapters, as text."""
    trained = sum(weight.numel() for weight in unet.parameters() if weight.requires_grad)
    own = sum(weight.numel() for name, weight in unet.named_parameters() if ".lora_" not in name)
    return f"{trained:,}", f"{own:,}"


def read_settings(weights: Weights) -> dict:
    """adapter_config.json beside adapters' weights, checked: "r", "lora_alpha", "target_modules", "base_model_name_or_path"."""
    file = weights.file.with_name(ADAPTER_CONFIG)
    try:
        written = json.loads(file.read_text(encoding="utf-8"))
        settings = {name: written[name] for name in ("r", "lora_alpha", "target_modules", "base_model_name_or_path")}
        targets, on = settings["target_modules"], settings["base_model_name_or_path"]
        fits = all(type(settings[name]) is int and settings[name] > 0 for name in ("r", "lora_alpha"))
        fits &= isinstance(targets, list) and bool(targets) and all(isinstance(name, str) for name in targets)
        if not (fits and isinstance(on, str | None) and written.get("peft_type") == "LORA"):
            raise ValueError("expected LoRA with whole numbers r and lora_alpha and a list of target_modules")
        if others := [name for name in ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern") if written.get(name)]:
            raise ValueError(f"{', '.join(others)}: not supported")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"lacks {error}" if isinstance(error, KeyError) else str(error).splitlines()[0]
        raise UserError(f"{weights.option}: {file} does not describe adapters of this code: {reason}") from error
    return settings


def with_adapters(unet: UNet2DConditionModel, weights: Weights, settings: dict) -> UNet2DConditionModel:
    """The U-Net that adapters stand on => the same with the WHOLE layers and the adapters that were saved, ready to train."""
    require_peft(weights.option)
    where = f"{weights.option}: {weights.file}"
    if frozen_digest(unet.state_dict()) != recorded_digest(weights):
        on = settings["base_model_name_or_path"] or "the base model's own U-Net"
        raise UserError(f"{where} holds adapters of {on}, which is another than in their training: give the one of then")
    whole = {name: value for name, value in weights.tensors.items() if name.startswith(WHOLE)}
    adapters = {name: value for name, value in weights.tensors.items() if name not in whole}
    if {value.shape[0] for name, value in adapters.items() if ".lora_A." in name} != {settings["r"]}:
        raise UserError(f"{where}: expected adapters of rank {settings['r']}, as {ADAPTER_CONFIG} has it, found others")
    channels = {"in_channels": whole["conv_in.weight"].shape[1], "out_channels": whole["conv_out.weight"].shape[0]}
    with torch.device("meta"):
        patched = UNet2DConditionModel.from_config({**unet.config, **channels})
    tensors = {**unet.state_dict(), **whole}
    check_tensors(tensors, patched.state_dict(), where)
    patched.load_state_dict(tensors, assign=True)
    add_adapters(
        patched, settings["r"], settings["lora_alpha"], settings["target_modules"], settings["base_model_name_or_path"],
        weights.option,
    )  # fmt: skip
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    check_tensors(adapters, get_peft_model_state_dict(patched, save_embedding_layers=False), where)
    set_peft_model_state_dict(patched, adapters)
    return patched.eval()


def recorded_digest(weights: Weights) -> str | None:
    """The digest of the weights that adapters were trained on."""
    with safe_open(weights.file.with_name(CONV_LAYERS), "pt") as file:
        return (file.metadata() or {}).get(FROZEN_DIGEST)


def merged(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """A plain U-Net of the same function: each frozen weight W becomes W + alpha / rank · B A."""
    unet.fuse_lora()
    unet.unload_lora()
    return unet.requires_grad_(True).eval()
