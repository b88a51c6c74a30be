"""What a step does to the weights: float32 weights behind a bfloat16 network, and the guard against NaN."""

from collections.abc import Iterator

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

CHUNK = 32 * 2**20  # weights whose gradients are float32 at a time, behind a bfloat16 network


def load_moments(optimizer: Optimizer, state: dict) -> None:
    """Take over an optimizer's state, not its settings, laid out in memory as the weights are: fused kernels rely on it."""
    optimizer.load_state_dict({**state, "param_groups": optimizer.state_dict()["param_groups"]})
    for parameter, entries in optimizer.state.items():
        for name, value in entries.items():
            if type(value) is torch.Tensor and value.shape == parameter.shape:
                entries[name] = torch.empty_like(parameter).copy_(value)


def gradient_norm(parameters: list) -> torch.Tensor:
    """Norm over all gradients, float32 on their device."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients, 2, dtype=torch.float32)))


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
