"""The weights in training: float32 masters, the network that computes, their average, and what a step does to them."""

import copy
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from accelerate import Accelerator
from diffusers import UNet2DConditionModel
from diffusers.optimization import get_scheduler
from torch.optim import Optimizer

from cdiffset.config import Config
from cdiffset.errors import UserError
from cdiffset.training import fsdp

FUSED = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}
FIRST_MOMENT = {"AdamW": "exp_avg", "Adam": "exp_avg", "AdamW8bit": "state1"}
CHUNK = 32 * 2**20  # weights whose gradients are float32 at a time, behind a bfloat16 network


class TrainedWeights:
    """A U-Net in training.

    `masters` holds the float32 weights, which are trained, averaged and saved. `network` is what computes: the same module or,
    with bf16_copy, a bfloat16 copy of it; compiled, and wrapped for several processes. `average` is None without ema_decay.
    """

    def __init__(
        self,
        unet: UNet2DConditionModel,  # float32, on the device
        config: Config,
        accelerator: Accelerator,
        average: UNet2DConditionModel | None = None,  # of the run to continue, else that of the present weights alone
    ):
        self.config, self.accelerator = config, accelerator
        self.masters = unet.train()
        self.average = frozen_copy(unet) if config.ema_decay else None
        if self.average and average:
            self.average.load_state_dict(average.state_dict())
        if config.fsdp:
            for module in filter(None, (self.masters, self.average)):
                fsdp.divide(module, accelerator.device)
        self.parameters = trainable(self.masters)
        names = [name for name, parameter in self.masters.named_parameters() if parameter.requires_grad]
        averages = dict(self.average.named_parameters()) if self.average else {}
        self.averaged = [averages[name] for name in names] if averages else []
        optimizer = make_optimizer(config.optimizer, self.parameters, config.learning_rate, config.weight_decay)
        # Not prepared by Accelerate, which would step it once per process.
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler, optimizer, num_warmup_steps=config.num_warmup, num_training_steps=config.num_iter
        )
        network = bfloat16_copy(self.masters) if config.mixed_precision == "bf16_copy" else self.masters
        self.copies = None if network is self.masters else trainable(network)
        if config.torch_compile:
            check_compiler(accelerator.device)
            network.compile()
        self.optimizer = accelerator.prepare(optimizer)
        self.network = network if config.fsdp else accelerator.prepare(network)

    def state_dict(self) -> dict:
        """Everything but the weights, which `whole` gives. All processes come here together."""
        scaler = self.accelerator.scaler
        return {
            "optimizer": fsdp.whole(self.optimizer.state_dict(), self.accelerator.is_main_process),
            "lr_scheduler": self.lr_scheduler.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    def restore(self, state: dict) -> None:
        """Of `state_dict` the moments and the place in the schedule; all settings are this configuration's.

        KeyError or ValueError where they do not belong to these weights and this optimizer.
        """
        optimizer = self.optimizer.optimizer
        load_moments(self.config.optimizer, optimizer, state["optimizer"])
        schedule = self.lr_scheduler
        schedule.load_state_dict({**state["lr_scheduler"], "base_lrs": schedule.base_lrs})
        optimizer.param_groups[0]["lr"] = schedule.base_lrs[0] * schedule.lr_lambdas[0](schedule.last_epoch)
        if self.accelerator.scaler is not None and state["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(state["scaler"])

    def whole(self) -> list[UNet2DConditionModel | None]:
        """Masters and average, to be saved. All processes come here together."""
        return [module and fsdp.whole_unet(module, self.accelerator.is_main_process) for module in (self.masters, self.average)]

    @property
    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def accumulating(self, last: bool) -> AbstractContextManager:
        """Around a backward pass; before the `last` of a step, gradients are not exchanged among the processes."""
        return nullcontext() if last else self.accelerator.no_sync(self.network)

    def gradient_norm(self) -> torch.Tensor:
        """Over all gradients of the step, float32 on the device."""
        self.accelerator.unscale_gradients()
        norm = gradient_norm(self.copies or self.parameters)
        if self.config.fsdp:
            norm = torch.linalg.vector_norm(self.accelerator.gather(norm))  # each had that of its parts
        return norm

    def step(self, gradient_norm: torch.Tensor, iteration: int) -> None:
        """Clip, step the optimizer and update the average."""
        limit = self.config.max_grad_norm
        if self.copies:
            factor = None if limit is None else (limit / (gradient_norm + 1e-6)).clamp(max=1)
            step_master_weights(self.optimizer, self.parameters, self.copies, factor)
        else:
            if limit is not None:
                torch.nn.utils.clip_grads_with_norm_(self.parameters, limit, gradient_norm)
            self.optimizer.step()
        if self.average:
            decay = min(self.config.ema_decay, (1 + iteration) / (10 + iteration))  # a short memory at first
            for average, parameter in zip(self.averaged, self.parameters, strict=True):
                average.lerp_(parameter.detach(), 1 - decay)

    def leave_out_step(self) -> None:
        """In place of `step`: of an overflow under fp16 the scaler has to know, and leaves out the step by itself."""
        if self.accelerator.scaler is not None:
            self.optimizer.step()

    def end_step(self) -> None:
        """Whether the step was taken or left out."""
        self.lr_scheduler.step()
        self.network.zero_grad()

    @contextmanager
    def evaluated(self) -> Iterator[UNet2DConditionModel]:
        """The U-Net to evaluate, whole on every process: the average where one is kept, without the distributed wrapper."""
        unet = (self.average or self.accelerator.unwrap_model(self.network)).eval()
        with fsdp.gathered(unet):
            yield unet
        self.network.train()


def trainable(unet: UNet2DConditionModel) -> list[torch.nn.Parameter]:
    """All parameters, or with adapters those that are not frozen."""
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


def frozen_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """In evaluation mode; it shares what is not trained."""
    shared = {id(parameter): parameter for parameter in unet.parameters() if not parameter.requires_grad}
    return copy.deepcopy(unet, shared).requires_grad_(False).eval()


def bfloat16_copy(unet: UNet2DConditionModel) -> UNet2DConditionModel:
    """With channels last, to be trained; never a float32 copy on the way."""

    def copy_of(weight: torch.nn.Parameter) -> torch.nn.Parameter:
        memory_format = torch.channels_last if weight.dim() == 4 else torch.preserve_format
        return torch.nn.Parameter(weight.detach().to(torch.bfloat16, memory_format=memory_format), weight.requires_grad)

    return copy.deepcopy(unet, {id(weight): copy_of(weight) for weight in unet.parameters()})


def check_compiler(device: torch.device) -> None:
    """torch.compile writes C++ for CPUs."""
    if device.type == "cpu" and not any(map(shutil.which, (os.environ.get("CXX", "g++"), "g++", "clang++"))):
        raise UserError("torch_compile: found no C++ compiler, expected g++ or clang++ on the PATH, or torch_compile: false")


def make_optimizer(name: str, parameters: list, learning_rate: float, weight_decay: float) -> Optimizer:
    settings = {"lr": learning_rate, "weight_decay": weight_decay}
    if name in FUSED:
        return FUSED[name](parameters, fused=True, **settings)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it misses kernels that no optimizer calls
    try:
        from bitsandbytes.optim import AdamW8bit  # slow to import, and installed by those alone who ask for it
    except ImportError as error:
        remedy = "install it: pip install -r requirements-extra.txt"
        raise UserError(f"optimizer: {name} is that of bitsandbytes ({error}), {remedy}") from error
    return AdamW8bit(parameters, **settings)


def load_moments(name: str, optimizer: Optimizer, state: dict) -> None:
    """Take over an optimizer's state, not its settings, laid out as the weights are: fused kernels rely on it.

    ValueError where it does not belong to these weights and this optimizer, which would only fail in its next step.
    """
    laid_out = {}
    for index, parameter in enumerate(optimizer.param_groups[0]["params"]):
        entries = state["state"][index]
        moment = flat(entries).get(FIRST_MOMENT[name])
        if moment is None:
            raise ValueError(f"it is not of {name}")
        if moment.shape != parameter.shape:
            raise ValueError("it is of another stage; accelerator_path starts a stage from the weights of another")
        laid_out[index] = {
            key: fsdp.divided_as(parameter, value) if type(value) is torch.Tensor and value.shape == parameter.shape else value
            for key, value in entries.items()
        }
    optimizer.load_state_dict({"state": laid_out, "param_groups": optimizer.state_dict()["param_groups"]})


def flat(entries: dict) -> dict:
    """One weight's state; bitsandbytes saves its tensors in a dictionary of their own."""
    nested = (value for value in entries.values() if isinstance(value, dict))
    return {**entries, **{key: value for inner in nested for key, value in inner.items()}}


def gradient_norm(parameters: list) -> torch.Tensor:
    """Norm over all gradients, float32 on their device; over this process's parts where they are divided."""
    gradients = [fsdp.part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients[0].device.type != "cpu":
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    norms = torch.empty(len(gradients))  # first: among the float32 copies of bfloat16 gradients it would fragment the memory
    for norm, gradient in zip(norms.unbind(), gradients, strict=True):
        torch.linalg.vector_norm(gradient, dtype=torch.float32, out=norm)
    return torch.linalg.vector_norm(norms)


def step_master_weights(optimizer: Optimizer, weights: list, copies: list, gradient_factor: torch.Tensor | None) -> None:
    """Step float32 weights by the gradients of their bfloat16 copies, times a factor, and copy the outcome back.

    In chunks, so that float32 gradients of the whole network never exist. An optimizer leaves alone what has no gradient.
    """
    for chunk in chunks(list(zip(weights, copies, strict=True))):
        for weight, narrow in chunk:
            weight.grad = None if narrow.grad is None else narrow.grad.float()
            narrow.grad = None
        if gradient_factor is not None:
            torch._foreach_mul_([weight.grad for weight, _ in chunk if weight.grad is not None], gradient_factor)
        optimizer.step()
        for weight, _ in chunk:
            weight.grad = None
        torch._foreach_copy_([narrow.detach() for _, narrow in chunk], [weight.detach() for weight, _ in chunk])


def chunks(pairs: list) -> Iterator[list]:
    """Lists of pairs with about CHUNK values together."""
    chunk, size = [], 0
    for pair in pairs:
        chunk.append(pair)
        size += pair[0].numel()
        if size >= CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
