"""The networks that a run begins with: the frozen VAE and prompt embedding, and the U-Net, patched for its stage."""

import logging
import os
from typing import NamedTuple

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel

from cdiffset import adapter
from cdiffset.checkpoint import ADAPTER, has_adapters
from cdiffset.config import Config
from cdiffset.device import without_instructions
from cdiffset.errors import UserError
from cdiffset.hub import Found
from cdiffset.model import (
    base_prediction_type,
    check_latent_channels,
    check_prompt_width,
    embed_prompt,
    load_base_unet,
    load_scheduler,
    load_unet,
    load_vae,
    patch_conv_in,
    patch_conv_out,
)
from cdiffset.pipeline import vae_factor
from cdiffset.training import launch
from cdiffset.training.weights import FUSED

ATTENTION = ("to_k", "to_out.0", "to_q", "to_v")  # lora_targets where none are given
AUTOCAST_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Networks(NamedTuple):
    vae: AutoencoderKL
    scheduler: DDIMScheduler
    prompt_embedding: torch.Tensor  # [1,L,D]
    unet: UNet2DConditionModel  # float32


def load_networks(
    config: Config,
    accelerator: Accelerator,
    start: Found | None,  # a U-Net checkpoint; None: the base's own
    option: str,  # what errors about it name
    log: logging.Logger,
) -> Networks:
    """Everything on the accelerator's device. A U-Net to be trained gets the channels that its stage lacks."""
    base, device = config.pretrained_model_name_or_path, accelerator.device
    vae = load_vae(base, AUTOCAST_DTYPES[accelerator.mixed_precision]).to(device, memory_format=torch.channels_last)
    scheduler = load_scheduler(base, config.prediction_type)
    prompt_embedding = embed_prompt(base, config.prompt).to(device)
    unet = starting_unet(config, vae, start, option, log)
    check_prompt_width(unet, prompt_embedding, base, option)
    if config.phase == "train" and (own := base_prediction_type(base)) != config.prediction_type:
        what = "warning: prediction_type is %s, but the scheduler of the base model %s says %s: its U-Net has to learn another"
        log.info(f"{what} target; set prediction_type: %s unless you mean that", config.prediction_type, base, own, own)
    if note := without_instructions(device, accelerator.mixed_precision):
        log.info(note)
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    # fully_shard and bitsandbytes want their weights contiguous.
    channels_last = config.optimizer in FUSED and not config.fsdp
    unet = unet.to(device, memory_format=torch.channels_last if channels_last else torch.contiguous_format)
    return Networks(vae, scheduler, prompt_embedding, unet)


def starting_unet(
    config: Config, vae: AutoencoderKL, start: Found | None, option: str, log: logging.Logger
) -> UNet2DConditionModel:
    """The U-Net that a run begins with, on the CPU, with the channels of its stage and, if asked for, adapters."""
    base, latent_channels = config.pretrained_model_name_or_path, vae.config.latent_channels
    trains_adapters = config.lora_rank is not None and config.phase == "train"
    if trains_adapters:
        adapter.require_peft("lora_rank")
    if start is None:
        unet, origin = load_base_unet(base), f"the base model {base} (accelerator_path is null)"
        check_latent_channels(unet, vae, base)
        unet = patch_conv_in(unet)
    else:
        unet, file = load_unet(
            str(start.path), base, latent_channels, option, is_verified=option == "resume", merge=not trains_adapters
        )
        origin = start.source or file
        if option == "resume" and (file.name == ADAPTER) != trains_adapters:
            kind = "holds no adapters" if trains_adapters else "holds adapters, of which this run, without lora_rank, has none"
            raise UserError(f"resume: {origin} {kind}: a run that begins with its weights takes accelerator_path")
    has_variance = unet.config.out_channels == latent_channels + 1
    adds_variance = config.confidence and not has_variance and config.phase == "train"
    if adds_variance:
        unet = patch_conv_out(unet)
    elif has_variance and not config.confidence and config.phase == "train":
        expected = f"stage 1 (confidence: false) expects {latent_channels} output channels"
        raise UserError(f"{option}: {expected}, {origin} has {latent_channels + 1}: it is a stage 2 checkpoint")
    if trains_adapters:
        unet = adapted(unet, config, start, option)
        log.info("adapters: %s of %s weights are trained", *adapter.counted(unet))
    stage = "stage 2 (C-Diff loss)" if config.confidence else "stage 1 (MSE)"
    log.info(", ".join(f"{name} {getattr(config, name)}" for name, _ in launch.SETTINGS.values()))
    added = ", with a variance channel added (stage 1 takes confidence: false)" if adds_variance else ""
    log.info("%s: %s, U-Net from %s%s", config.phase, stage, origin, added)
    return unet


def adapted(unet: UNet2DConditionModel, config: Config, start: Found | None, option: str) -> UNet2DConditionModel:
    """The U-Net with the adapters that the configuration asks for: those it was loaded with, or new ones."""
    wanted = config.lora_rank, config.lora_alpha or config.lora_rank, config.lora_targets or list(ATTENTION)
    if not has_adapters(unet):
        stands_on = start and (start.source or os.path.abspath(start.path))
        return adapter.add_adapters(unet, *wanted, stands_on, "lora_targets", config.seed)
    found = unet.peft_config["default"]
    if (found.r, found.lora_alpha, sorted(found.target_modules)) != (*wanted[:2], sorted(wanted[2])):
        raise UserError(
            f"{option}: {start.source or start.path} holds adapters of lora_rank {found.r}, lora_alpha {found.lora_alpha} and "
            f"lora_targets {sorted(found.target_modules)}: take the same, or merge them by export.py --merge"
        )
    return unet


def check_crops(vae: AutoencoderKL, feeders: dict) -> None:
    """Read a pair of each feeder {"train": ..., "test": ...}: crops must be multiples of the VAE's factor."""
    for which, feeder in feeders.items():
        size, factor = feeder[0]["sar"].shape[-1], vae_factor(vae)
        if size % factor:
            raise UserError(f"{which}_feeder_args: crop_size {size}, expected a multiple of {factor}, the VAE's factor")
