"""A U-Net in training divided among the processes: each holds its part of weights, gradients and moments.

PyTorch's fully_shard (FSDP2); a part is a DTensor. Source: Zhao et al., PyTorch FSDP, VLDB 2023 (arXiv 2304.11277).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.resnet import ResnetBlock2D
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map

BLOCKS = (ResnetBlock2D, BasicTransformerBlock)  # gathered one after the other, whatever is outside of them with the whole


def divide(unet: UNet2DConditionModel, device: torch.device) -> None:
    """Leave this process its part of each parameter, in place. All processes come here, with equal weights, contiguous."""
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in (*(module for module in unet.modules() if isinstance(module, BLOCKS)), unet):
        fully_shard(module, mesh=mesh, reshard_after_forward=True)


@contextmanager
def gathered(unet: UNet2DConditionModel) -> Iterator[None]:
    """Within, every process holds the whole network and computes by itself, however often. All processes come here.

    A network that is not divided stays as it is.
    """
    modules = [module for module in unet.modules() if isinstance(module, FSDPModule)]
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(True, recurse=False)
            module.reshard()


def part(tensor: torch.Tensor) -> torch.Tensor:
    """This process's part, a view; a tensor that is not divided is its own."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def divided_as(parameter: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """A whole tensor, equal on all processes => in type its own, else in memory and among the processes as the parameter."""
    if isinstance(parameter, DTensor):
        # Without a source rank every process takes its part of what it has.
        return distribute_tensor(whole.to(parameter.device), parameter.device_mesh, parameter.placements, src_data_rank=None)
    return torch.empty_like(parameter, dtype=whole.dtype).copy_(whole)


def whole(values: Any, keep: bool) -> Any:
    """Nested values with every DTensor whole on the CPU, or None on processes that do not `keep`. All come here together."""

    def gather(value):
        if not isinstance(value, DTensor):
            return value
        value = value.full_tensor()
        return value.cpu() if keep else None

    return tree_map(gather, values)


def whole_unet(unet: UNet2DConditionModel, keep: bool) -> UNet2DConditionModel:
    """The U-Net to be saved: itself, or of a divided one a copy on the CPU, whose weights only those have who `keep`."""
    if not isinstance(unet, FSDPModule):
        return unet
    with torch.device("meta"):
        copy = UNet2DConditionModel.from_config(unet.config)
    tensors = whole(unet.state_dict(), keep)
    if keep:
        copy.load_state_dict(tensors, assign=True)
    return copy
