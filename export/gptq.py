"""Weights rounded to few bits so that the outputs of their layer change least (GPTQ).

Source: Frantar et al., GPTQ (arXiv 2210.17323), Sections 3.1-3.3: one input channel after the
other is rounded, and the channels still to come take up the error. Differences: the channels go
from the largest diagonal entry of the Hessian to the smallest, as in the authors' code
("act-order"), with scales that are fixed before; and each scale is the best of several.
"""

import numpy as np

# Of the scale that just holds the largest weight. Below 1 the largest weights are clipped.
_SCALE_FACTORS = np.linspace(0.7, 1.0, 13)
_CHUNK = 64


def choose_scales(kernel, importance, bits, block_size, round_scale=np.float32):
    """The scale of each block of input channels, per output channel.

    Of several, the one with the least sum of `importance` times squared rounding error.

    Args:
        kernel: `(K, M)`, inputs by outputs.
        importance: `(K,)`, how much the input channels count.
        bits: of a weight.
        block_size: input channels that share a scale; divides K. K for one scale per output.
        round_scale: the type that scales are stored in.

    Returns:
        float64 `(K / block_size, M)`, positive values of that type.
    """
    k, m = kernel.shape
    blocks = kernel.reshape(k // block_size, block_size, m)
    importance = importance.reshape(k // block_size, block_size, 1)
    largest = np.abs(blocks).max(axis=1)
    least = np.full(largest.shape, np.inf)
    scales = np.empty_like(largest)
    for factor in _SCALE_FACTORS[::-1]:
        candidate = np.maximum(largest * factor / _top(bits), 1e-9)
        candidate = candidate.astype(round_scale).astype("float64")
        error = _rounded(blocks, candidate[:, None], bits) - blocks
        error = (importance * error**2).sum(axis=1)
        better = error < least
        least[better], scales[better] = error[better], candidate[better]
    return scales


def round_weights(kernel, hessian, scales, bits, damping=0.01):
    """Rounds the weights of a dense layer y = x W.

    Args:
        kernel: W `(K, M)`.
        hessian: mean of x^T x over the inputs x `(1, K)` of the layer, `(K, K)`.
        scales: `(K / block_size, M)`, of `choose_scales`.
        bits: of a weight: integers from -2^(bits-1) to 2^(bits-1) - 1; of 8 bits, from -127.
        damping: what is added to the diagonal of the Hessian, in units of its mean.

    Returns:
        float64 `(K, M)`: multiples of the scales.
    """
    k = len(kernel)
    order = np.argsort(-np.diag(hessian), kind="stable")
    weights = kernel[order].astype("float64")
    scales = np.repeat(scales, k // len(scales), axis=0)[order]
    damped = hessian + np.eye(k) * max(damping * np.mean(np.diag(hessian)), 1e-12)
    # Row i holds, over its diagonal, how channels i, i + 1, ... make up for an error in i.
    upper = np.linalg.cholesky(np.linalg.inv(damped[np.ix_(order, order)])).T
    rounded = np.empty_like(weights)
    for start in range(0, k, _CHUNK):  # errors are passed on to far channels a chunk at a time
        end = min(start + _CHUNK, k)
        errors = np.empty((end - start, weights.shape[1]))
        for i in range(start, end):
            rounded[i] = _rounded(weights[i], scales[i], bits)
            errors[i - start] = (weights[i] - rounded[i]) / upper[i, i]
            weights[i:end] -= np.outer(upper[i, i:end], errors[i - start])
        weights[end:] -= upper[start:end, end:].T @ errors
    result = np.empty_like(rounded)
    result[order] = rounded
    return result


def _top(bits):
    return 2 ** (bits - 1) - 1


def _rounded(weights, scales, bits):
    lowest = -_top(bits) - (bits < 8)
    return np.clip(np.rint(weights / scales), lowest, _top(bits)) * scales
