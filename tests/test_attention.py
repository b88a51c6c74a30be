"""The shared prompt against diffusers' own attention: outputs, every gradient, and what is kept between calls."""

import copy

import pytest
import torch
from conftest import tiny_unet
from diffusers.models.attention_processor import AttnProcessor2_0

from cdiffset.attention import SharedPrompt, share_prompt

BATCH, TOKENS, WIDTH = 3, 5, 64


def unets(**changes):
    """A U-Net with diffusers' processors, and its copy with the prompt shared."""
    plain = tiny_unet(**changes)
    plain.set_attn_processor(AttnProcessor2_0())
    shared = copy.deepcopy(plain)
    share_prompt(shared)
    return plain, shared


def inputs(one_prompt: bool = True):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(BATCH, 4, 16, 16, generator=generator)
    prompt = torch.randn(1 if one_prompt else BATCH, TOKENS, WIDTH, generator=generator)
    return latents, torch.tensor([1, 500, 999]), prompt


def answer(unet, latents, timesteps, prompt):
    return unet(latents, timesteps, encoder_hidden_states=prompt.expand(len(latents), -1, -1)).sample


def cross_attentions(unet) -> list:
    return [module for name, module in unet.named_modules() if name.endswith("attn2")]


@pytest.mark.parametrize("one_prompt", [True, False])
@pytest.mark.parametrize("checkpointing", [True, False])
def test_outputs_and_all_gradients_are_those_of_diffusers(one_prompt, checkpointing):
    found = []
    for unet in unets():
        if checkpointing:
            unet.train().enable_gradient_checkpointing()
        latents, timesteps, prompt = inputs(one_prompt)
        leaves = {"latents": latents.requires_grad_(), "prompt": prompt.requires_grad_(), **dict(unet.named_parameters())}
        output = answer(unet, latents, timesteps, prompt)
        (output**2).mean().backward()
        found.append({"output": output.detach()} | {name: leaf.grad for name, leaf in leaves.items()})
    plain, shared = found
    assert plain.keys() == shared.keys() and len(plain) > 100
    for name, expected in plain.items():
        assert expected.abs().max() > 0, name
        torch.testing.assert_close(shared[name], expected, rtol=1e-4, atol=1e-6 * expected.abs().max().item() + 1e-9, msg=name)


def test_keys_and_values_come_from_one_row_and_only_cross_attention_is_touched():
    _, unet = unets()
    processors = {name: type(processor) for name, processor in unet.attn_processors.items()}
    assert {name for name, kind in processors.items() if kind is SharedPrompt} == {n for n in processors if "attn2" in n}
    assert len(cross_attentions(unet)) > 2
    rows = []
    for attention in cross_attentions(unet):
        for projection in (attention.to_k, attention.to_v):
            projection.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    answer(unet, *inputs())
    assert rows == [1] * 2 * len(cross_attentions(unet))


def test_kept_keys_and_values_give_the_same_until_the_prompt_changes():
    plain, kept = unets()
    share_prompt(kept, keep=True)
    calls = []
    for attention in cross_attentions(kept):
        attention.to_k.register_forward_hook(lambda *_: calls.append(1))
    latents, timesteps, prompt = inputs()
    other, each = inputs()[2].flip(1), len(cross_attentions(kept))
    with torch.no_grad():
        for steps, (size, tokens) in enumerate([(3, prompt), (1, prompt), (2, prompt), (2, other), (3, prompt)]):
            arguments = latents[:size], timesteps[:size], tokens
            torch.testing.assert_close(answer(kept, *arguments), answer(plain, *arguments), rtol=1e-4, atol=1e-5)
            assert len(calls) == each * (1, 1, 1, 2, 3)[steps]
    torch.testing.assert_close(answer(kept, latents, timesteps, prompt), answer(plain, latents, timesteps, prompt))
    assert len(calls) == 4 * each  # gradients are recorded: nothing kept is used


def test_a_mask_is_refused():
    _, unet = unets()
    latents, timesteps, prompt = inputs()
    mask = torch.ones(BATCH, TOKENS, dtype=torch.bool)
    with pytest.raises(ValueError, match="expected no mask"):
        unet(latents, timesteps, encoder_hidden_states=prompt.expand(BATCH, -1, -1), encoder_attention_mask=mask)
