"""The backbone: loading a Stable Diffusion base, patching its U-Net, the prompt embedding. Shapes as in `pipeline.py`."""

import gc
import json
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    UNet2DConditionModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub.utils import logging as hub_logging
from torch import nn

from cdiffset import adapter
from cdiffset.checkpoint import COMPONENTS, INDEX, Weights, check_channels, check_tensors, read_weights, with_variant
from cdiffset.errors import UserError
from cdiffset.hub import find_checkpoint
from cdiffset.pipeline import encode_prompt

# The libraries' retries and bars say less than our own one-line error.
hub_logging.set_verbosity_error()
diffusers_logging.set_verbosity_error()

CONFIGS = {"scheduler": ("scheduler_config.json",), "tokenizer": ("tokenizer.json", "vocab.json")}  # either file
HOW_TO_GET_A_BASE = (
    f"expected the name of a model on the Hugging Face Hub (reachable or already in its cache) or a local folder in diffusers "
    f"layout ({', '.join(f'{name}/' for name in COMPONENTS)})"
)


def check_base(base: str) -> None:
    """Refuse a local base folder that lacks a component, before anything is loaded. Hub names pass."""
    folder = Path(base).expanduser()
    if not folder.is_dir():
        if base.startswith((".", "/", "~")) or base.count("/") > 1:
            raise UserError(f"pretrained_model_name_or_path: there is no folder {base!r}; {HOW_TO_GET_A_BASE}")
        return
    missing = [name for name in COMPONENTS if not (folder / name).is_dir()]
    if missing:
        raise UserError(
            f"pretrained_model_name_or_path: {base!r} is no complete Stable Diffusion folder, "
            f"it lacks {', '.join(f'{name}/' for name in missing)}; {HOW_TO_GET_A_BASE}"
        )


def load_component(from_pretrained, base: str, name: str, **options):
    """Load one component of a base by its class's from_pretrained, every tensor of it or not at all."""
    try:
        loaded = load_files(from_pretrained, base, name, **options)
    except UserError:
        raise
    except Exception as error:  # on damaged and strange folders the libraries raise almost anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"cannot load {name}/ of the base model {base!r} ({reason}); {HOW_TO_GET_A_BASE}") from error
    if not options.get("output_loading_info"):
        return loaded
    model, info = loaded
    faults = {kind: sorted(map(str, info.get(kind) or ())) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    if any(faults.values()):
        found = "; ".join(f"{len(keys)} {kind.split('_')[0]} ({keys[0]} …)" for kind, keys in faults.items() if keys)
        raise UserError(f"{name}/ of the base model {base!r} does not fit its own config.json: tensors {found}")
    return model


def load_files(from_pretrained, base: str, name: str, **options):
    """A component, with weights from their fp16 variant where there are no others."""
    load = partial(from_pretrained, str(Path(base).expanduser()), subfolder=name)
    has_weights = "output_loading_info" in options
    if (folder := Path(base).expanduser() / name).is_dir():
        variant = check_files(folder, base, has_weights)
        return load(**options, **({"variant": variant} if variant else {}))
    try:
        return load(**options)
    except OSError as error:  # both libraries speak of "a file named" where one is missing
        if not has_weights or "file named" not in str(error):
            raise
        with suppress(OSError):
            return load(**options, variant="fp16")
        raise


def check_files(folder: Path, base: str, has_weights: bool) -> str | None:
    """Refuse a component's local folder that lacks a file => the variant of its weights."""
    variant, lacking, configs = None, [], CONFIGS.get(folder.name, ("config.json",))
    if not any((folder / name).is_file() for name in configs):
        lacking.append(" or ".join(configs))
    if has_weights:
        stems = ("model", "pytorch_model") if folder.name == "text_encoder" else ("diffusion_pytorch_model",) * 2
        names = f"{stems[0]}.safetensors", f"{stems[1]}.bin"
        whole_or_split = [*names, *(f"{name}{INDEX}" for name in names)]
        has = {kind: any((folder / with_variant(name, kind)).is_file() for name in whole_or_split) for kind in (None, "fp16")}
        variant = "fp16" if has["fp16"] and not has[None] else None
        if not any(has.values()):
            lacking.append(f"{names[0]} (or {names[1]}, or {with_variant(names[0], 'fp16')})")
    if lacking:
        raise UserError(f"{folder.name}/ of the base model {base!r} lacks {' and '.join(lacking)}; {HOW_TO_GET_A_BASE}")
    return variant


def load_vae(base: str, dtype: torch.dtype = torch.float32) -> AutoencoderKL:
    """The frozen VAE, in evaluation mode."""
    vae = load_component(AutoencoderKL.from_pretrained, base, "vae", torch_dtype=dtype, output_loading_info=True)
    return vae.requires_grad_(False).eval()


def load_base_unet(base: str) -> UNet2DConditionModel:
    """The base's own U-Net, unpatched (C in, C out), float32."""
    load = UNet2DConditionModel.from_pretrained
    return load_component(load, base, "unet", torch_dtype=torch.float32, output_loading_info=True)


def load_unet(
    path: str, base: str, latent_channels: int, option: str, is_verified: bool = False, merge: bool = True
) -> tuple[UNet2DConditionModel, Path]:
    """A stage 1 (2C in, C out) or stage 2 (2C in, C + 1 out) U-Net, float32, in evaluation mode => (it, its weights file)."""
    weights = read_weights(path, option, is_verified=is_verified)
    return build_unet(weights, base, latent_channels, merge), weights.file


def build_unet(weights: Weights, base: str, latent_channels: int, merge: bool = True) -> UNet2DConditionModel:
    """The U-Net of these weights; the base gives the architecture to those that come without a config.json.

    Adapters are merged into the weights that they stand on, or with `merge` False left beside them, to be trained further.
    """
    tensors, where = weights.tensors, f"{weights.option}: {weights.file}"
    check_channels(tensors, latent_channels, where)
    if weights.are_adapters:
        return build_adapted(weights, base, latent_channels, merge)
    outputs = tensors["conv_out.weight"].shape[0]
    config = {**config_beside(weights.file, base), "in_channels": 2 * latent_channels, "out_channels": outputs}
    try:
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(config)
    except Exception as error:  # values that make no sense break the constructor wherever they reach
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{weights.option}: config.json of {weights.file} describes no U-Net ({reason})") from error
    check_tensors(tensors, unet.state_dict(), where)
    unet.load_state_dict(tensors, assign=True)
    return unet.requires_grad_(True).eval()


def build_adapted(weights: Weights, base: str, latent_channels: int, merge: bool) -> UNet2DConditionModel:
    """`build_unet` of adapters."""
    settings = adapter.read_settings(weights)
    stands_on = settings["base_model_name_or_path"]
    if stands_on is None:
        unet = load_base_unet(base)
    else:
        option = f"{weights.option}: {weights.file} holds adapters of {stands_on}"
        below = read_weights(str(find_checkpoint(stands_on, option).path), option)
        if below.are_adapters:
            raise UserError(f"{option}, expected a U-Net's own weights there, found adapters again")
        unet = build_unet(below, base, latent_channels)
    unet = adapter.with_adapters(unet, weights, settings)
    return adapter.merged(unet) if merge else unet


def config_beside(weights: Path, base: str) -> dict:
    """The U-Net config that belongs to a weights file: the config.json beside it, else the base's own."""
    beside = weights.with_name("config.json")
    try:
        config = json.loads(beside.read_text())
        if isinstance(config, dict) and config.get("_class_name") == "UNet2DConditionModel":
            return config
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {beside}: {str(error).splitlines()[0]}") from error
    return load_component(UNet2DConditionModel.load_config, base, "unet")


def base_prediction_type(base: str) -> str:
    """What the base's own U-Net was trained to predict, by its scheduler's configuration."""
    return load_component(DDIMScheduler.from_pretrained, base, "scheduler").config.prediction_type


def load_scheduler(base: str, prediction_type: str) -> DDIMScheduler:
    """DDIM with the method's settings on the base's noise schedule; training takes its alphas from the same object.

    The settings are stated here because a base's own scheduler, often PNDM, may leave them to other defaults.
    """
    ddim = {"clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1, "timestep_spacing": "leading"}
    return load_component(DDIMScheduler.from_pretrained, base, "scheduler", prediction_type=prediction_type, **ddim)


def load_text_models(base: str) -> tuple:
    """=> (CLIP tokenizer, CLIP text encoder), float32, in evaluation mode."""
    from transformers import CLIPTextModel, CLIPTokenizer  # slow to import, and an embedding that is kept does without
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    tokenizer = load_component(CLIPTokenizer.from_pretrained, base, "tokenizer")
    if len(tokenizer) <= len(set(tokenizer.all_special_ids)):  # what transformers makes of a folder without a vocabulary
        raise UserError(f"tokenizer/ of the base model {base!r} holds no vocabulary; {HOW_TO_GET_A_BASE}")
    load = CLIPTextModel.from_pretrained
    text_encoder = load_component(load, base, "text_encoder", dtype=torch.float32, output_loading_info=True)
    return tokenizer, text_encoder.eval()


def embed_prompt(base: str, prompt: str) -> torch.Tensor:
    """Text => [1, L, D] float32, tokenised without padding. The text encoder leaves memory again: one prompt serves all."""
    tokenizer, text_encoder = load_text_models(base)
    embedding = encode_prompt(tokenizer, text_encoder, prompt)
    del text_encoder
    gc.collect()
    return embedding.clone()


def check_prompt_width(unet: UNet2DConditionModel, prompt_embedding: torch.Tensor, base: str, option: str) -> None:
    """Refuse a U-Net that belongs to another text encoder; `option` is what the error names."""
    expected, found = unet.config.cross_attention_dim, prompt_embedding.shape[-1]
    if expected != found:
        raise UserError(f"{option}: expected prompts of width {expected}, but the text encoder of {base} gives {found}")


def check_latent_channels(unet: UNet2DConditionModel, vae: AutoencoderKL, base: str) -> None:
    """Refuse a base whose U-Net, still unpatched, is not one for the latents of its VAE: of inpainting, for example."""
    expected, found = vae.config.latent_channels, (unet.config.in_channels, unet.config.out_channels)
    if found != (expected, expected):
        raise UserError(
            f"pretrained_model_name_or_path: unet/ of {base!r}: expected {expected} input and output channels, as its vae/ "
            f"has, found {found[0]} and {found[1]}"
        )


def patch_conv_in(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """C => 2C input channels, SAR latent first: the kernel repeated for both halves and halved, the bias kept.

    Fed with the same latent twice, the patched layer returns what the pretrained one returned for it.
    """
    layer = unet.conv_in
    layer.weight = nn.Parameter(layer.weight.detach().repeat(1, 2, 1, 1) * 0.5)
    layer.in_channels *= 2
    unet.register_to_config(in_channels=layer.in_channels)
    return unet


def patch_conv_out(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """C => C + 1 output channels: the raw variance comes last and starts as 0 everywhere, which means σ² = 1."""
    layer = unet.conv_out
    for name, old in list(layer.named_parameters()):
        setattr(layer, name, nn.Parameter(torch.cat([old.detach(), torch.zeros_like(old[:1])])))
    layer.out_channels += 1
    unet.register_to_config(out_channels=layer.out_channels)
    return unet
