"""Pictures of uncertainty that a person can read: maps in colours with their scale, and the EO hatched where errors are likely.

Small images are enlarged by a whole factor until their longer side has at least SHOWN_PX.
"""

import numpy as np
from PIL import Image, ImageDraw, ImageFont

ERROR_VIEW_MAX = 64  # 8-bit units; the same for all images, larger errors look like this one
SHOWN_PX = 256
VARIANCE_PERCENTILES = (1, 99)
TEXT_PX = 12
BAR_PX, GAP_PX, TICKS = 12, 6, (0, 16, 32, 48, 64)
# From dark blue through red to pale yellow, ever lighter, so that the order survives printing in grey.
ANCHORS = np.array(
    [
        (8, 6, 38), (38, 14, 84), (78, 18, 108), (119, 26, 109), (160, 38, 96),
        (199, 56, 72), (228, 86, 45), (244, 130, 22), (247, 180, 48), (249, 226, 126), (252, 250, 212),
    ],
    np.float64,
)  # fmt: skip
HATCH_COLOUR = np.array((255, 0, 200), np.float64)  # seldom found on the ground
HATCH_PX, TINT, LINE = 10, 0.18, 0.8  # period of the lines, shares of the colour between and on them


def error_view(expected: np.ndarray) -> np.ndarray:
    """Expected error [H, W] in 8-bit units => uint8 [H', W', 3]: in colours from 0 to ERROR_VIEW_MAX, with a colour bar."""
    labels = [f"{tick}" if tick < ERROR_VIEW_MAX else f"{tick}+" for tick in TICKS]  # larger errors look like the last
    return with_colour_bar(expected, labels)


def variance_view(variance: np.ndarray) -> np.ndarray:
    """σ² [H, W], NaN: none => uint8 [H', W', 3]: in colours between two percentiles of its own, with a colour bar."""
    known = variance[np.isfinite(variance)]
    low, high = np.percentile(known, VARIANCE_PERCENTILES) if known.size else (0.0, 1.0)
    labels = [f"{low + (high - low) * tick / ERROR_VIEW_MAX:.3g}" for tick in TICKS]
    return with_colour_bar((variance - low) / max(high - low, 1e-12) * ERROR_VIEW_MAX, labels)


def with_colour_bar(values: np.ndarray, labels: list[str]) -> np.ndarray:
    """Values [H, W] on the scale of `colours`, and what stands at its TICKS => uint8 [H', W', 3]."""
    picture = enlarged(colours(values))
    height, width = picture.shape[:2]
    font = ImageFont.load_default(TEXT_PX)
    bar_height = max(height - TEXT_PX, len(TICKS) * TEXT_PX)
    left, top = width + GAP_PX, TEXT_PX // 2  # half a line of text above and below the bar, for its outer labels
    right = left + BAR_PX + GAP_PX + max(round(font.getlength(label)) for label in labels) + GAP_PX
    canvas = Image.new("RGB", (right, max(height, bar_height + TEXT_PX)), "white")
    canvas.paste(Image.fromarray(picture), (0, 0))
    column = np.linspace(ERROR_VIEW_MAX, 0, bar_height)[:, None].repeat(BAR_PX, 1)
    canvas.paste(Image.fromarray(colours(column)), (left, top))
    draw = ImageDraw.Draw(canvas)
    for tick, label in zip(TICKS, labels, strict=True):
        y = top + round((bar_height - 1) * (1 - tick / ERROR_VIEW_MAX))
        draw.line((left + BAR_PX, y, left + BAR_PX + 2, y), "black")
        draw.text((left + BAR_PX + GAP_PX, y), label, "black", font, anchor="lm")
    return np.array(canvas)


def overlay(eo: np.ndarray, expected: np.ndarray, threshold: float) -> np.ndarray:
    """As `hatched`, small images enlarged => uint8 [H', W', 3]."""
    return hatched(enlarged(eo), enlarged(expected), threshold)


def hatched(eo: np.ndarray, expected: np.ndarray, threshold: float) -> np.ndarray:
    """EO uint8 [H, W, 3], outlined and hatched where its expected error [H, W] is above `threshold` => uint8 [H, W, 3]."""
    from scipy.ndimage import binary_erosion  # slow to import

    high = expected > threshold
    thickness = max(1, max(high.shape) // 512)
    outline = high & ~binary_erosion(high, iterations=thickness, border_value=1)
    rows, columns = np.indices(high.shape)
    lines = (rows + columns) % HATCH_PX < 2
    share = np.where(outline, 1.0, np.where(lines, LINE, TINT)) * high
    return (eo + share[..., None] * (HATCH_COLOUR - eo)).round().astype(np.uint8)


def colours(expected: np.ndarray) -> np.ndarray:
    """[H, W] in 8-bit units => uint8 [H, W, 3], straight between the anchors; NaN is white."""
    place = np.clip(expected / ERROR_VIEW_MAX, 0, 1) * (len(ANCHORS) - 1)
    shades = np.stack([np.interp(place, np.arange(len(ANCHORS)), channel) for channel in ANCHORS.T], -1)
    return np.where(np.isnan(place)[..., None], 255, shades.round()).astype(np.uint8)


def enlarged(pixels: np.ndarray) -> np.ndarray:
    """[H, W, ...] => [n H, n W, ...] with the least whole n that brings the longer side to SHOWN_PX."""
    factor = -(-SHOWN_PX // max(pixels.shape[:2]))
    return pixels.repeat(factor, 0).repeat(factor, 1)
