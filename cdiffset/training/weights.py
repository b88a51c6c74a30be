"""What a step does to the weights: the optimizers, float32 weights behind a bfloat16 network, and the guard against NaN."""

import logging
from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from cdiffset.errors import UserError
from cdiffset.training.fsdp import divided_as, part

FUSED = {"AdamW": torch.optim.AdamW, "Adam": torch.optim.Adam}  # told on the device to leave a step out
FIRST_MOMENT = {"AdamW": "exp_avg", "Adam": "exp_avg", "AdamW8bit": "state1"}
CHUNK = 32 * 2**20  # weights whose gradients are float32 at a time, behind a bfloat16 network


def make_optimizer(name: str, parameters: list, learning_rate: float, weight_decay: float) -> Optimizer:
    settings = {"lr": learning_rate, "weight_decay": weight_decay}
    if name in FUSED:
        return FUSED[name](parameters, fused=True, **settings)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on CPUs it misses kernels that no optimizer calls
    try:
        from bitsandbytes.optim import AdamW8bit  # slow to import, and installed by those alone who ask for it
    except ImportError as error:
        raise UserError(
            f"optimizer: {name} is that of bitsandbytes ({error}), install it: pip install -r requirements-extra.txt"
        ) from error
    return AdamW8bit(parameters, **settings)


def load_moments(name: str, optimizer: Optimizer, state: dict) -> None:
    """Take over an optimizer's state, not its settings, laid out as the weights are: fused kernels rely on it.

    ValueError where it is not one of these weights and this optimizer, of which the optimizer would learn in its next step.
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
            key: divided_as(parameter, value) if type(value) is torch.Tensor and value.shape == parameter.shape else value
            for key, value in entries.items()
        }
    optimizer.load_state_dict({"state": laid_out, "param_groups": optimizer.state_dict()["param_groups"]})


def flat(entries: dict) -> dict:
    """One weight's state; bitsandbytes saves its tensors in a dictionary of their own."""
    nested = (value for value in entries.values() if isinstance(value, dict))
    return {**entries, **{key: value for inner in nested for key, value in inner.items()}}


def gradient_norm(parameters: list) -> torch.Tensor:
    """Norm over all gradients, float32 on their device; over this process's parts where they are divided."""
    gradients = [part(parameter.grad) for parameter in parameters if parameter.grad is not None]
    if gradients[0].device.type != "cpu":
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))
    norms = torch.empty(len(gradients))  # ahead: results between float32 copies of bfloat16 gradients would strew the memory
    for norm, gradient in zip(norms.unbind(), gradients, strict=True):
        torch.linalg.vector_norm(gradient, dtype=torch.float32, out=norm)
    return torch.linalg.vector_norm(norms)


def step_copies(optimizer: Optimizer, weights: list, copies: list, gradient_factor: torch.Tensor | None) -> None:
    """Step float32 weights by the gradients of their bfloat16 copies, times a factor, and copy the outcome back.

    In chunks, so that float32 gradients of the whole network never exist. An optimizer leaves alone what has no gradient.
    """
    for chunk in chunks(list(zip(weights, copies, strict=True))):
        for weight, copy in chunk:
            weight.grad = None if copy.grad is None else copy.grad.float()
            copy.grad = None
        if gradient_factor is not None:
            torch._foreach_mul_([weight.grad for weight, _ in chunk if weight.grad is not None], gradient_factor)
        optimizer.step()
        for weight, _ in chunk:
            weight.grad = None
        torch._foreach_copy_([copy.detach() for _, copy in chunk], [weight.detach() for weight, _ in chunk])


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


class Guard:
    """Lets no step through whose gradient is not finite, and after too many of those no other either.

    The decision is made on the device, which training does not wait for; `read` fetches what was decided since the last time.
    Under fp16 the gradient overflows now and then: the scaler leaves those steps out, and only the loss counts here.
    """

    def __init__(self, accelerator: Accelerator, allowed: int):
        self.accelerator, self.loss_counts = accelerator, accelerator.scaler is not None
        self.recent: list[tuple] = []
        self.left = torch.tensor(float(allowed), device=accelerator.device)  # how many steps may still be left out

    def factor(self) -> torch.Tensor:
        """What the loss is multiplied by: 1, or NaN where the run has ended and is only not told yet."""
        return torch.where(self.left < 0, torch.nan, 1.0)

    def watch(self, iteration: int, loss: torch.Tensor, grad_norm: torch.Tensor, timesteps: torch.Tensor, names: list[str]):
        """Note a step; `loss` is this process's mean => whether it is to be left out, a flag on the device."""
        loss = self.accelerator.reduce(loss, "mean")  # so that all processes decide alike
        blocked = ~torch.isfinite(loss if self.loss_counts else grad_norm)
        self.left -= blocked.float()
        self.recent.append((iteration, blocked, loss, grad_norm, timesteps, names))
        return blocked

    def read(self) -> list[tuple]:
        """Steps left out since the last reading: (iteration, loss, gradient norm, timesteps, names). Waits for the device."""
        recent, self.recent = self.recent, []
        if not recent:
            return []
        values = torch.stack([torch.stack([blocked.float(), loss, norm]) for _, blocked, loss, norm, *_ in recent]).tolist()
        return [
            (iteration, loss, norm, timesteps.tolist(), names)
            for (iteration, *_, timesteps, names), (blocked, loss, norm) in zip(recent, values, strict=True)
            if blocked
        ]
