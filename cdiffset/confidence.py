"""σ² of the latent, at the size of the image: the confidence map that people look at, and the variance itself."""

import torch


def confidence_map(variance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """σ² [B, 1, h, w], above 0, of the latent => confidence [B, 1, H, W] in [0, 1] at the image's size (H, W), float32.

    1/σ², min-max normalised per image, then upsampled bicubically and clamped (bicubic interpolation overshoots). The scale
    is each image's own, so confidences of different images do not compare. A constant σ² is 1 everywhere: nothing in the image
    is less certain than the rest. C-DiffSET, "confidence map".
    """
    if variance.ndim != 4 or variance.shape[1] != 1 or not bool(((variance > 0) & variance.isfinite()).all()):
        raise ValueError(f"variance must be finite, above 0 and of shape [B, 1, h, w], got shape {list(variance.shape)}")
    confidence = 1 / variance.float()  # [B, 1, h, w]
    low, high = confidence.aminmax(dim=3, keepdim=True)
    low, high = low.amin(2, keepdim=True), high.amax(2, keepdim=True)  # [B, 1, 1, 1]
    span = high - low
    confidence = torch.where(span > 0, (confidence - low) / span.clamp(min=torch.finfo(span.dtype).tiny), 1.0)
    return torch.nn.functional.interpolate(confidence, size, mode="bicubic", align_corners=False).clamp(0, 1)


def variance_map(variance: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """σ² [B, 1, h, w] of the latent => [B, 1, H, W] at the image's size (H, W), float32, on the latent's own scale.

    Bicubic like the confidence map, kept within each image's range of σ² (bicubic interpolation overshoots).
    """
    low, high = variance.float().flatten(1).aminmax(dim=1)  # [B] each
    upsampled = torch.nn.functional.interpolate(variance.float(), size, mode="bicubic", align_corners=False)
    return torch.clamp(upsampled, low[:, None, None, None], high[:, None, None, None])
