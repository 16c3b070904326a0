"""What a checkpoint says of its model, in the words of `build_vit`."""

import dataclasses
import math

import numpy as np

from keras_vit.config import VARIANTS
from keras_vit.model import NORMALIZATIONS, check_image_size

# Heads by width: the variants', and those of timm's models between them (`vision_transformer.py`).
HEADS = {config.hidden_dim: config.num_heads for config in VARIANTS.values()}
HEADS |= {256: 4, 320: 5, 512: 8, 640: 10, 832: 13, 896: 14, 1152: 16}


@dataclasses.dataclass(frozen=True)
class Description:
    """The architecture of a checkpoint.

    Args:
        arguments: The arguments of `build_vit` that make it.
        interpolation: How the family's own code resizes its positions.
        assumed: What the file does not say and was taken by the family's habit, by name.
    """

    arguments: dict
    interpolation: str
    assumed: dict


def grid_of(arguments):
    """`(rows, columns)` of the patches of a model with these arguments of `build_vit`."""
    return _grid(arguments["variant"], arguments["image_size"])


def _grid(config, image_size):
    stride = _stride(config)
    sides = check_image_size(image_size)
    if config.stem_units is None:
        return tuple(side // stride for side in sides)
    return tuple(-(-side // stride) for side in sides)  # a stem pads


def _stride(config):
    """Pixels of the image from one patch to the next."""
    if config.stem_units is None:
        return config.patch_size
    return config.patch_size * 4 * 2 ** max(len(config.stem_units) - 1, 0)


def file_image_size(checkpoint, config, positions, slots, known, asked):
    """The image size that a table of learned positions belongs to.

    Args:
        checkpoint: The `Checkpoint`, for errors.
        config: The `ViTConfig`.
        positions: Rows of the table.
        slots: How many of them may belong to tokens other than patches, the likeliest first.
        known: The size that the file's configuration gives, or None.
        asked: The size the user asks for, or None; taken if its grid fits where no square one
            does, for a file cannot tell 3 x 6 patches from 2 x 9. Where both do, it may be the
            file's size, or one to resize to: that is an error.

    Returns:
        `(height, width)` in pixels.

    Raises:
        ValueError: No size fits the table, or two that the file cannot tell apart.
    """
    stride = _stride(config)
    patches = [positions - n for n in slots]

    def place(size):
        """Which of the slots are left beside this size's patches; None if none are."""
        count = math.prod(_grid(config, size))
        return patches.index(count) if count in patches else None

    squares = [(math.isqrt(n) * stride,) * 2 for n in patches if n > 0]
    fitting = [s for s in (known, *squares, asked) if s is not None and place(s) is not None]
    if not fitting:
        raise checkpoint.error(
            f"its {positions} positions are of no square grid of patches: pass the `image_size` "
            f"(height, width) that it was made for. Received: image_size={asked}."
        )
    size = fitting[0]
    is_other = asked in fitting and _grid(config, asked) != _grid(config, size)
    if size != known and is_other and place(asked) <= place(size):
        ours, theirs = ("{} x {} patches".format(*_grid(config, s)) for s in (size, asked))
        tokens = "" if place(asked) == place(size) else " and other tokens"
        raise checkpoint.error(
            f"its {positions} positions may be of {ours}, or of {theirs}{tokens}. If the "
            "first, load it without `image_size` and resize the model (`resize_model`); if the "
            f"other, a config.json beside it must say its size. Received: image_size={asked}."
        )
    if config.stem_units is not None:  # which pads: the size need not divide
        return check_image_size(size)
    rows, columns = _grid(config, size)
    return rows * stride, columns * stride


def head_count(checkpoint, hidden_dim, known, asked):
    """The number of heads: the one the file says, or the one asked for, or its width's."""
    if known is not None and asked is not None and known != asked:
        raise checkpoint.error(f"its model has {known} heads. Received: num_heads={asked}.")
    if known is not None or asked is not None:
        return known or asked
    if hidden_dim not in HEADS:
        raise checkpoint.error(
            f"the file does not say how many attention heads its width of {hidden_dim} has: pass "
            "`num_heads`."
        )
    return HEADS[hidden_dim]


def normalization_of(mean, std):
    """A mean and std per channel as an argument of `build_vit`, a name where there is one."""
    for name, known in NORMALIZATIONS.items():
        if all(
            len(expected) in (1, len(values))
            and np.array_equal(values, np.broadcast_to(expected, len(values)))
            for values, expected in zip((mean, std), known, strict=True)
        ):
            return name
    return tuple(mean), tuple(std)
