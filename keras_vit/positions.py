"""Position tables."""

import numpy as np


def sincos2d(grid_size, hidden_dim, temperature=10_000.0):
    """The fixed two-dimensional sine-cosine position table.

    Row (y, x) is `[sin(x w), cos(x w), sin(y w), cos(y w)]` with the `D/4` frequencies
    `w_i = temperature ** (-i / (D/4 - 1))`.

    Args:
        grid_size: `(rows, columns)` of the patch grid.
        hidden_dim: Width D; a multiple of 4 and at least 8.
        temperature: The longest wavelength over 2 pi, in patches.

    Returns:
        float64 array `(rows * columns, D)`, rows of the grid one after the other.

    Raises:
        ValueError: `hidden_dim` is not a multiple of 4, or below 8.

    Source: "Better plain ViT baselines for ImageNet-1k" (arXiv 2205.01580, Section 3).
    """
    if hidden_dim % 4 or hidden_dim < 8:
        raise ValueError(
            "sincos2d positions need a `hidden_dim` that is a multiple of 4 and at least 8. "
            f"Received: hidden_dim={hidden_dim}."
        )
    y, x = np.mgrid[: grid_size[0], : grid_size[1]]
    frequency = temperature ** -np.linspace(0.0, 1.0, hidden_dim // 4)
    x = x.reshape(-1, 1) * frequency
    y = y.reshape(-1, 1) * frequency
    return np.concatenate([np.sin(x), np.cos(x), np.sin(y), np.cos(y)], axis=1)
