"""The losses of both stages. Pure tensor functions: everything here is computed in float32 whatever the autocast type."""

import math

import torch
import torch.nn.functional as F

VARIANCE_MIN, VARIANCE_MAX = 1e-6, 10.0
# softplus(RAW_OFFSET) + 1e-6 = 1: a raw variance of 0, where conv_out's new channel starts, means unit variance.
RAW_OFFSET = math.log(math.exp(1 - VARIANCE_MIN) - 1)


def variance(raw: torch.Tensor) -> torch.Tensor:
    """Raw variance channel v, any shape and range => σ² in [1e-6, 10], float32 (C-DiffSET, section on the C-Diff loss).

    σ² = clamp(softplus(v + c) + 1e-6, 1e-6, 10) with c = log(exp(1 - 1e-6) - 1), so that σ² = 1 at v = 0.
    """
    return (F.softplus(raw.float() + RAW_OFFSET) + VARIANCE_MIN).clamp(VARIANCE_MIN, VARIANCE_MAX)


def mse_loss(prediction: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Stage 1: mean squared error of two [B, C, h, w] tensors => scalar, float32."""
    return F.mse_loss(prediction.float(), target.float())


def cdiff_loss(prediction: torch.Tensor, target: torch.Tensor, sigma2: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Stage 2, the C-Diff loss: β-NLL (Seitzer et al., 2022) with one variance shared by the channels of a latent cell.

    L = mean over (B, C, h, w) of sg[σ²]^β · ½ · ((target - prediction)² / σ² + log σ² + log 2π), sg = stop-gradient.

    prediction, target [B, C, h, w]; sigma2 [B, 1, h, w], from `variance`; beta [B] in 0 ... 1 (0: the Gaussian NLL,
    1: the MSE's gradient for the mean) => scalar, float32.
    """
    squared_error = (target.float() - prediction.float()) ** 2  # [B,C,h,w]
    sigma2 = sigma2.float()  # [B,1,h,w]
    nll = 0.5 * (squared_error / sigma2 + sigma2.log() + math.log(2 * math.pi))  # [B,C,h,w]
    weight = sigma2.detach() ** beta.float()[:, None, None, None]  # [B,1,h,w]
    return (weight * nll).mean()
