"""The losses against an independent float64 computation with gradients derived by hand."""

import math

import numpy as np
import pytest
import torch

from cdiffset.losses import cdiff_loss, mse_loss
from cdiffset.pipeline import variance

B, C, H, W = 3, 4, 5, 6
OFFSET = math.log(math.expm1(1 - 1e-6))  # c of the method


def reference(prediction, target, raw, beta):
    """The formula in float64 numpy, one channel after the other => (loss, its gradient for prediction, for raw)."""
    prediction, target, raw, beta = (np.asarray(a, dtype=np.float64) for a in (prediction, target, raw, beta))
    softplus = np.logaddexp(0, raw + OFFSET) + 1e-6
    s = np.clip(softplus, 1e-6, 10)[:, 0]  # [B,h,w]
    ds_draw = (1 / (1 + np.exp(-(raw + OFFSET))) * (softplus < 10))[:, 0]
    weight = s ** beta[:, None, None]  # a constant: it carries no gradient
    count, loss, d_s, d_prediction = prediction.size, 0.0, np.zeros_like(s), np.zeros_like(prediction)
    for channel in range(prediction.shape[1]):
        r = target[:, channel] - prediction[:, channel]
        loss += (weight * 0.5 * (r**2 / s + np.log(s) + np.log(2 * np.pi))).sum() / count
        d_prediction[:, channel] = -weight * r / s / count
        d_s += weight * 0.5 * (1 / s - r**2 / s**2) / count
    return loss, d_prediction, (d_s * ds_draw)[:, None]


def inputs(seed: int = 0, spread: float = 2.0):
    generator = torch.Generator().manual_seed(seed)
    prediction, target = torch.randn(2, B, C, H, W, generator=generator)
    raw = spread * torch.randn(B, 1, H, W, generator=generator)
    return prediction.requires_grad_(), target, raw.requires_grad_()


def close(got: torch.Tensor, expected: np.ndarray, rtol: float = 2e-5) -> None:
    """Within float32's precision, measured on the scale of the whole array."""
    assert got.dtype == torch.float32 and got.shape == expected.shape
    np.testing.assert_allclose(got.double().numpy(), expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def test_no_raw_variance_means_unit_variance():
    assert variance(torch.zeros(2, 1, 3, 3)).sub(1).abs().max() <= 2e-7


def test_variance_follows_the_formula_in_value_and_gradient():
    raw = torch.linspace(-15, 9.4, 300, requires_grad=True)
    got = variance(raw)
    got.sum().backward()
    x = raw.detach().double().numpy() + OFFSET
    np.testing.assert_allclose(got.detach().double().numpy(), np.logaddexp(0, x) + 1e-6, rtol=3e-6, atol=1e-12)
    np.testing.assert_allclose(raw.grad.double().numpy(), 1 / (1 + np.exp(-x)), rtol=3e-6, atol=1e-12)


@pytest.mark.parametrize("raw, limit", [(-1e30, 1e-6), (-200.0, 1e-6), (9.6, 10.0), (1e30, 10.0)])
def test_variance_ends_at_its_limits_without_gradient(raw, limit):
    v = torch.tensor([raw], requires_grad=True)
    sigma2 = variance(v)
    sigma2.sum().backward()
    assert sigma2.item() == pytest.approx(limit, rel=1e-6) and v.grad.item() == 0


@pytest.mark.parametrize("beta", [(0.0, 0.0, 0.0), (1.0, 1.0, 1.0), (0.5, 0.5, 0.5), (0.05, 0.4, 0.999)], ids=str)
@pytest.mark.parametrize("at_limits", [False, True])
def test_cdiff_loss_is_the_formula_in_value_and_both_gradients(beta, at_limits):
    prediction, target, raw = inputs()
    if at_limits:
        with torch.no_grad():
            raw[0], raw[1] = -1e4, 1e4
    loss = cdiff_loss(prediction, target, variance(raw), torch.tensor(beta))
    loss.backward()
    value, d_prediction, d_raw = reference(prediction.detach(), target, raw.detach().clamp(-600, 600), beta)
    assert loss.item() == pytest.approx(value, rel=1e-5)
    close(prediction.grad, d_prediction)
    close(raw.grad, d_raw)
    assert raw.grad[2].all() and (not at_limits or not raw.grad[:2].any())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_losses_are_computed_in_float32_whatever_the_input(dtype, autocast):
    prediction, target, raw = (tensor.detach().to(dtype) for tensor in inputs())
    beta = torch.tensor([0.1, 0.5, 0.9])
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        sigma2 = variance(raw)
        confident, plain = cdiff_loss(prediction, target, sigma2, beta), mse_loss(prediction, target)
    assert confident.dtype == plain.dtype == sigma2.dtype == torch.float32
    # Half precision would be off by 1e-3.
    assert confident.item() == pytest.approx(reference(prediction.float(), target.float(), raw.float(), beta)[0], rel=1e-5)
    assert plain.item() == pytest.approx(((prediction.double() - target.double()) ** 2).mean().item(), rel=1e-5)


def test_gradients_reach_half_precision_predictions():
    prediction, target, raw = (tensor.detach().bfloat16() for tensor in inputs())
    prediction.requires_grad_()
    raw.requires_grad_()
    cdiff_loss(prediction, target, variance(raw), torch.full((B,), 0.5)).backward()
    _, d_prediction, d_raw = reference(prediction.detach().float(), target.float(), raw.detach().float(), (0.5,) * B)
    for got, expected in ((prediction.grad, d_prediction), (raw.grad, d_raw)):
        assert got.dtype == torch.bfloat16
        np.testing.assert_allclose(got.double().numpy(), expected, rtol=5e-3, atol=5e-3 * np.abs(expected).max())


def test_mse_loss_is_the_mean_square_with_its_gradient():
    prediction, target, _ = inputs()
    loss = mse_loss(prediction, target)
    loss.backward()
    difference = prediction.detach().double() - target.double()
    assert loss.item() == pytest.approx(difference.square().mean().item(), rel=1e-6)
    close(prediction.grad, (2 * difference / difference.numel()).numpy())
