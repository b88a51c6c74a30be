"""Cross-attention to the one prompt that all samples share: its keys and values are computed once, not once per sample."""

import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention


def share_prompt(unet: UNet2DConditionModel, keep: bool = False) -> None:
    """Set `SharedPrompt` on every cross-attention of a U-Net, in place; results are the same up to rounding.

    `keep` is for inference with weights that do not change any more: keys and values also outlive the call. They are computed
    anew for another prompt tensor, and wherever gradients are recorded.
    """
    for module in unet.modules():
        if isinstance(module, BasicTransformerBlock) and module.attn2 is not None and module.attn2.is_cross_attention:
            module.attn2.set_processor(SharedPrompt(keep))


class SharedPrompt:
    """diffusers' AttnProcessor2_0 for the cross-attention of a transformer block.

    A prompt [B, L, D] that is an expanded view of one row, as `diffusion.predict` passes it, is seen to be the same for all
    samples; of any other the keys and values are computed row by row.
    """

    def __init__(self, keep: bool):
        self.keep = keep
        self.kept: tuple[torch.Tensor, ...] | None = None  # (prompt, keys, values); holding the prompt keeps its address taken

    def __call__(
        self,
        attn: Attention,
        hidden_states: torch.Tensor,  # [B,N,C]
        encoder_hidden_states: torch.Tensor,  # [B,L,D]
        attention_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if attention_mask is not None:
            raise ValueError("the shared prompt has no padding, expected no mask for it")
        is_shared = len(encoder_hidden_states) == 1 or encoder_hidden_states.stride(0) == 0
        key, value = self.keys_and_values(attn, encoder_hidden_states[:1] if is_shared else encoder_hidden_states)
        query = split_heads(attn.to_q(hidden_states), attn.heads)  # [B,heads,N,C/heads]
        every_sample = (len(query), -1, -1, -1)
        mixed = F.scaled_dot_product_attention(query, key.expand(every_sample), value.expand(every_sample))
        projection, dropout = attn.to_out
        return dropout(projection(mixed.transpose(1, 2).flatten(2))) / attn.rescale_output_factor

    def keys_and_values(self, attn: Attention, prompt: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Prompt [1 or B, L, D] => two times [1 or B, heads, L, C/heads]."""
        keep = self.keep and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        if keep and self.kept is not None and is_same_memory(prompt, self.kept[0]):
            return self.kept[1:]
        key, value = (split_heads(projection(prompt), attn.heads) for projection in (attn.to_k, attn.to_v))
        if keep:
            self.kept = (prompt, key, value)
        return key, value


def split_heads(values: torch.Tensor, heads: int) -> torch.Tensor:
    """[B, N, C] => [B, heads, N, C/heads]."""
    return values.unflatten(2, (heads, -1)).transpose(1, 2)


def is_same_memory(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
