"""The sizes of a Vision Transformer, and the table of the published ones."""

import dataclasses
import math
import types


@dataclasses.dataclass(frozen=True)
class ViTConfig:
    """The size of a Vision Transformer: everything its name stands for.

    Args:
        hidden_dim: Width D of the tokens; divisible by `num_heads` unless `head_dim` is set.
        depth: Number L of Transformer blocks.
        num_heads: Attention heads of a block.
        mlp_dim: Width of the hidden layer of a block's MLP.
        patch_size: Side P of the square patches, in pixels of the image, or of the
            stem's feature map for a hybrid.
        stem_units: For a hybrid, the bottleneck units of each ResNet stage, such as
            `(3, 4, 9)`; `()` is the root convolution alone. None: no stem.
        stem_width: Channels of the stem's root convolution, a multiple of 32.
        head_dim: Width of an attention head, or None for `hidden_dim // num_heads`.

    Raises:
        ValueError: A size is not a positive int, or `hidden_dim` is not divisible by
            `num_heads` and `head_dim` is None.
    """

    hidden_dim: int
    depth: int
    num_heads: int
    mlp_dim: int
    patch_size: int
    stem_units: tuple[int, ...] | None = None
    stem_width: int = 64
    head_dim: int | None = None

    def __post_init__(self):
        for field in ("hidden_dim", "depth", "num_heads", "mlp_dim", "patch_size", "stem_width"):
            check_positive_int(field, getattr(self, field))
        if self.head_dim is None:
            check_heads(self.hidden_dim, self.num_heads)
        else:
            check_positive_int("head_dim", self.head_dim)
        if self.stem_units is not None:
            if not isinstance(self.stem_units, (tuple, list)):
                raise ValueError(
                    "`stem_units` must be None or a tuple of positive ints. "
                    f"Received: stem_units={self.stem_units!r}."
                )
            if self.stem_width % 32:
                raise ValueError(
                    "`stem_width` must be a multiple of 32. "
                    f"Received: stem_width={self.stem_width}."
                )
            object.__setattr__(self, "stem_units", tuple(self.stem_units))
            for units in self.stem_units:
                check_positive_int("stem_units", units)


def check_positive_int(name, value):
    """Raises ValueError unless `value` is an int of at least 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"`{name}` must be a positive int. Received: {name}={value!r}.")


def check_count(name, value):
    """Raises ValueError unless `value` is an int of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"`{name}` must be an int of at least 0. Received: {name}={value!r}.")


def check_epsilon(value):
    """Raises ValueError unless `value` is a number that a LayerNorm can add to a variance."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < math.inf:
        raise ValueError(
            "`layer_norm_epsilon` must be a finite number from 0 on. "
            f"Received: layer_norm_epsilon={value!r}."
        )


def check_heads(hidden_dim, num_heads):
    """Raises ValueError unless the width divides into the heads."""
    if hidden_dim % num_heads:
        raise ValueError(
            "`hidden_dim` must be divisible by `num_heads`. "
            f"Received: hidden_dim={hidden_dim}, num_heads={num_heads}."
        )


# Ti, S: DeiT (arXiv 2012.12877, Table 1). B, L, H: the paper (arXiv 2010.11929, Table 1).
# g, G: Scaling Vision Transformers (arXiv 2106.04560, Table 2).
# Hybrids: How to train your ViT (arXiv 2106.10270, Section 3.3); a stem downsamples 4 times
# at its root and 2 times more at each stage but the first.
VARIANTS = types.MappingProxyType(
    {
        "Ti/16": ViTConfig(192, 12, 3, 768, 16),
        "S/8": ViTConfig(384, 12, 6, 1536, 8),
        "S/14": ViTConfig(384, 12, 6, 1536, 14),
        "S/16": ViTConfig(384, 12, 6, 1536, 16),
        "S/32": ViTConfig(384, 12, 6, 1536, 32),
        "B/8": ViTConfig(768, 12, 12, 3072, 8),
        "B/14": ViTConfig(768, 12, 12, 3072, 14),
        "B/16": ViTConfig(768, 12, 12, 3072, 16),
        "B/32": ViTConfig(768, 12, 12, 3072, 32),
        "L/14": ViTConfig(1024, 24, 16, 4096, 14),
        "L/16": ViTConfig(1024, 24, 16, 4096, 16),
        "L/32": ViTConfig(1024, 24, 16, 4096, 32),
        "H/14": ViTConfig(1280, 32, 16, 5120, 14),
        "H/16": ViTConfig(1280, 32, 16, 5120, 16),
        "g/14": ViTConfig(1408, 40, 16, 6144, 14),
        "G/14": ViTConfig(1664, 48, 16, 8192, 14),
        "R+Ti/16": ViTConfig(192, 12, 3, 768, 8, stem_units=()),
        "R26+S/32": ViTConfig(384, 12, 6, 1536, 1, stem_units=(2, 2, 2, 2)),
        "R50+B/16": ViTConfig(768, 12, 12, 3072, 1, stem_units=(3, 4, 9)),
        "R50+L/32": ViTConfig(1024, 24, 16, 4096, 1, stem_units=(3, 4, 6, 3)),
    }
)
