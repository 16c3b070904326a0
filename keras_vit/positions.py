"""Position tables, and their resizing to another grid of patches."""

import numpy as np

INTERPOLATIONS = ("linear", "antialiased_bicubic", "bicubic")


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


def resize_positions(table, grid_size, new_grid_size, interpolation):
    """Resizes the positions of a patch grid: `(rows * columns, D)` -> `(new rows * columns, D)`.

    Every way is separable, P' = R_y P R_x^T with a matrix of weights for each axis. They differ:

    - "linear": the corners of the old and the new grid coincide, and values between are linear.
      Google's vision_transformer and big_vision (`scipy.ndimage.zoom` with order=1).
    - "antialiased_bicubic": pixels are areas; cubic convolution with a = -0.5, widened when the
      grid shrinks. timm (PyTorch's bicubic interpolation with antialias).
    - "bicubic": pixels are areas; cubic convolution with a = -0.75 at all scales. DINOv2 without
      registers and Hugging Face (PyTorch's bicubic interpolation without antialias). The original
      DINOv2 code adds 0.1 to the new sides before it divides, which this does not.

    Args:
        table: `(rows * columns, D)`, rows of the grid one after the other.
        grid_size: `(rows, columns)` of `table`.
        new_grid_size: `(rows, columns)` wanted.
        interpolation: One of `INTERPOLATIONS`.

    Returns:
        `(new rows * new columns, D)` of the dtype of `table`; computed in float64.

    Raises:
        ValueError: `interpolation` is unknown, or the table has not `rows * columns` rows.
    """
    if interpolation not in INTERPOLATIONS:
        raise ValueError(
            f"`interpolation` must be one of {', '.join(map(repr, INTERPOLATIONS))}. "
            f"Received: interpolation={interpolation!r}."
        )
    if table.ndim != 2 or len(table) != grid_size[0] * grid_size[1]:
        raise ValueError(
            f"`table` must be of the shape ({grid_size[0]} * {grid_size[1]}, D). "
            f"Received: a table of the shape {table.shape}."
        )
    if tuple(grid_size) == tuple(new_grid_size):
        return table
    grid = table.reshape(*grid_size, -1).astype("float64")
    rows, columns = (
        _resize_matrix(old, new, interpolation)
        for old, new in zip(grid_size, new_grid_size, strict=True)
    )
    grid = np.einsum("yi,xj,ijd->yxd", rows, columns, grid, optimize=True)
    return grid.reshape(-1, table.shape[-1]).astype(table.dtype)


def _resize_matrix(old, new, interpolation):
    """Weights `(new, old)` of the old samples of an axis in each of its new ones."""
    if interpolation == "linear":
        position = np.arange(new)[:, None] * ((old - 1) / max(new - 1, 1))
        return np.maximum(0, 1 - abs(position - np.arange(old)))
    scale = old / new
    center = (np.arange(new)[:, None] + 0.5) * scale - 0.5
    if interpolation == "antialiased_bicubic":
        weights = _cubic((np.arange(old) - center) / max(scale, 1), a=-0.5)
        return weights / weights.sum(axis=1, keepdims=True)
    # Samples beyond the border are the border's: their weights are added to its.
    matrix = np.zeros((new, old))
    for tap in range(-1, 3):
        sample = np.floor(center).astype(int) + tap  # (new, 1)
        weight = _cubic(center - sample, a=-0.75)
        np.add.at(matrix, (np.arange(new)[:, None], np.clip(sample, 0, old - 1)), weight)
    return matrix


def _cubic(x, a):
    """The kernel of cubic convolution (Keys, 1981), which is 0 beyond 2."""
    x = abs(x)
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = a * (((x - 5) * x + 8) * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0.0))
