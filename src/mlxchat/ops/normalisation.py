"""RMS norm without weights, and what queries and keys go through: rotation, norm, scale."""

from __future__ import annotations

import mlx.core as mx

# float32's machine epsilon: what torch's F.rms_norm(eps=None) uses, so what nanochat's weights were trained with.
RMS_NORM_EPSILON = 1.1920929e-07


def rms_norm(x: mx.array) -> mx.array:
    """Return x divided by the root of its mean square over the last axis."""
    return mx.fast.rms_norm(x, None, RMS_NORM_EPSILON)


def rotate_and_normalise(x: mx.array, *, offset: int, theta: float, scale: float) -> mx.array:
    """Return heads (B, H, T, D) rotated by minus their position's angles, RMS-normalised and scaled.

    nanochat rotates by −θ (halves x1, x2 → x1 cos + x2 sin, −x1 sin + x2 cos), which a scale of −1 on the positions
    gives.

    Args:
        x: queries or keys.
        offset: position of the first token.
        theta: base of the wavelengths.
        scale: factor after the norm.
    """
    rotated = mx.fast.rope(x, x.shape[-1], traditional=False, base=theta, scale=-1.0, offset=offset)
    normalised = rms_norm(rotated)
    return normalised if scale == 1.0 else normalised * scale
