"""How a weight of ours is stored in a family's file."""

import dataclasses
from collections.abc import Callable

import numpy as np


def _same(array):
    return array


@dataclasses.dataclass(frozen=True)
class Entry:
    """The tensors of a file that make one weight of ours, and the two ways between them.

    Args:
        names: The tensors' names; several stand side by side on the last axis of our weight.
        to_ours: Turns a tensor of the file into ours, or into its part of ours.
        to_theirs: The inverse.
    """

    names: tuple[str, ...]
    to_ours: Callable[[np.ndarray], np.ndarray] = _same
    to_theirs: Callable[[np.ndarray], np.ndarray] = _same

    def load(self, arrays):
        """Our weight from the tensors `names`."""
        parts = [self.to_ours(array) for array in arrays]
        return parts[0] if len(parts) == 1 else np.concatenate(parts, axis=-1)

    def save(self, array):
        """The tensors `names` from our weight."""
        return [self.to_theirs(part) for part in np.split(array, len(self.names), axis=-1)]

    def shapes(self, shape):
        """The shapes of the tensors `names` for our weight's shape; takes no memory."""
        return [part.shape for part in self.save(np.broadcast_to(np.float32(0), shape))]


def same(*names):
    """Stored as it is."""
    return Entry(names)


def reshaped(names, ours, theirs):
    """Stored in the same order in another shape: `ours` and `theirs` of each tensor."""
    return Entry(names, lambda a: a.reshape(ours), lambda a: a.reshape(theirs))


def transposed(*names):
    """A dense kernel `(in, out)` that PyTorch stores as `(out, in)`."""
    return Entry(names, np.transpose, np.transpose)


def convolution(name, patch_size):
    """A patch projection `(P * P * C, D)` that PyTorch stores as `(D, C, P, P)`."""
    p = patch_size
    return Entry(
        (name,),
        lambda a: a.transpose(2, 3, 1, 0).reshape(-1, a.shape[0]),
        lambda a: a.reshape(p, p, -1, a.shape[-1]).transpose(3, 2, 0, 1),
    )


def torch_entries(weights, depth, modules, tensors, patch_kernel=None):
    """The entries of a family of PyTorch modules.

    Args:
        weights: Paths of our weights, such as "block_3/norm1/gamma".
        depth: Number of blocks; rows with `{i}` stand for one of each.
        modules: Our layer, such as "block_{i}/norm1" -> their module, or a tuple of those that
            stand side by side in ours.
        tensors: Our weight -> their tensor, for those that are of no module.
        patch_kernel: The `Entry` of the patch projection, if it is no dense layer.

    Returns:
        Weight -> `Entry`, of those that the family has.
    """
    modules, tensors = _numbered(modules, depth), _numbered(tensors, depth)
    rows = {}
    for weight in weights:
        layer, _, leaf = weight.rpartition("/")
        if weight == "patch_encoder/projection/kernel" and patch_kernel is not None:
            rows[weight] = patch_kernel
        elif weight in tensors:
            rows[weight] = same(*tensors[weight])
        elif layer in modules and leaf == "kernel":
            rows[weight] = transposed(*(f"{name}.weight" for name in modules[layer]))
        elif layer in modules and leaf in ("gamma", "beta", "bias"):
            kind = "weight" if leaf == "gamma" else "bias"
            rows[weight] = same(*(f"{name}.{kind}" for name in modules[layer]))
    return rows


def _numbered(table, depth):
    """A table whose rows with `{i}` are repeated for the blocks 0 to depth - 1."""
    rows = {}
    for ours, theirs in table.items():
        names = (theirs,) if isinstance(theirs, str) else theirs
        for i in range(depth) if "{i}" in ours else (0,):
            rows[ours.format(i=i)] = tuple(name.format(i=i) for name in names)
    return rows
