"""Float32 weights behind a bfloat16 network against plain AdamW, and the moments' layout in memory."""

import copy
import math

import pytest
import torch
from torch import nn

from cdiffset.training import weights as weights_module
from cdiffset.training.weights import gradient_norm, load_moments, step_master_weights


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GroupNorm(2, 8), nn.Conv2d(8, 4, 3)).to(memory_format=torch.channels_last)


@pytest.mark.parametrize("factor", [None, 0.25])
def test_stepping_copies_is_adamw_on_float32_weights(monkeypatch, factor):
    """Against torch's plain AdamW on the same gradients, in several chunks; one parameter has no gradient."""
    monkeypatch.setattr(weights_module, "CHUNK", 250)
    plain, trained = network(), network()
    copies = copy.deepcopy(trained).bfloat16()
    settings = {"lr": 1e-3, "weight_decay": 0.1}
    expected = torch.optim.AdamW(plain.parameters(), foreach=False, **settings)
    weights, computing = list(trained.parameters()), list(copies.parameters())
    optimizer = torch.optim.AdamW(weights, fused=True, **settings)
    assert len(list(weights_module.chunks(list(zip(weights, computing, strict=True))))) > 1
    for _ in range(5):
        for index, (reference, computed) in enumerate(zip(plain.parameters(), computing, strict=True)):
            if index != 3:
                computed.grad = torch.randn_like(computed)
                reference.grad = computed.grad.float() * (factor or 1)
        expected.step()
        step_master_weights(optimizer, weights, computing, None if factor is None else torch.tensor(factor))
        for reference, weight, computed in zip(plain.parameters(), weights, computing, strict=True):
            torch.testing.assert_close(weight, reference, rtol=1e-5, atol=1e-7)
            assert torch.equal(computed, weight.bfloat16()) and weight.grad is None and computed.grad is None
    assert not torch.equal(weights[0], weights[0].bfloat16().float())


def test_the_gradient_norm_is_that_of_torch():
    net = network()
    net(torch.randn(1, 3, 8, 8)).pow(2).sum().backward()
    expected = torch.nn.utils.clip_grad_norm_(net.parameters(), math.inf)
    assert gradient_norm(list(net.parameters())) == pytest.approx(expected.item(), rel=1e-6)
    net[0].weight.grad[0, 0, 0, 0] = math.nan
    assert gradient_norm(list(net.parameters())).isnan()


def test_moments_saved_in_another_layout_lead_to_the_same_steps():
    """Fused kernels go through memory in order: moments in another order than the weights would be taken for each other's."""
    ends, inputs = [], torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    for memory_format in (torch.channels_last, torch.contiguous_format):
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
        for _ in range(2):
            net(inputs).pow(2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            state = copy.deepcopy(optimizer.state_dict())
            for entries in state["state"].values():
                for name, value in entries.items():
                    entries[name] = value.contiguous(memory_format=memory_format) if value.ndim == 4 else value
            optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, fused=True)
            load_moments("AdamW", optimizer, state)
        assert all(
            optimizer.state[parameter][name].stride() == parameter.stride()
            for parameter in net.parameters()
            for name in ("exp_avg", "exp_avg_sq")
        )
        ends.append(torch.cat([parameter.detach().flatten() for parameter in net.parameters()]))
    assert torch.equal(*ends)
