"""What a training run does, as rows of one table."""

import dataclasses
import types

from keras_vit.config import ViTConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Args:
        variant: A name of `keras_vit.VARIANTS` or a `ViTConfig`.
        image_size: Side of the square images in pixels.
        patch_size: Side of the patches, or None for the variant's.
        pooling: As in `build_vit`; "gap" and "map" go without a class token.
        position: As in `build_vit`.
        dropout: As in `build_vit`.
        drop_path: As in `build_vit`.
        normalization: As in `build_vit`; never None, since the data are in [0, 255].
        epochs: Passes over the training images.
        batch_size: Images per step.
        learning_rate: Peak of AdamW's learning rate.
        warmup: Share of the steps, in [0, 1), in which the rate rises linearly from 0, before the
            cosine decay to 0.
        weight_decay: AdamW's; multiplied by the learning rate, on kernels only.
        label_smoothing: Share of the target given to all classes alike, in [0, 1).
        clip_norm: Largest global norm of the gradient, or None.
        min_crop_area: Smallest share of an image's area that a random crop keeps, in (0, 1].
        rotation: Largest random rotation in degrees, in [0, 180].
        shift: Largest random shift as a share of the image's side, in [0, 1).
        flip: Whether half of the images are mirrored.

    Raises:
        ValueError: A training argument is out of its range. `build_vit` checks the others.
    """

    variant: str | ViTConfig
    image_size: int
    patch_size: int | None = None
    pooling: str = "gap"
    position: str = "learned"
    dropout: float = 0.0
    drop_path: float = 0.0
    normalization: str = "minus_one_one"
    epochs: int = 100
    batch_size: int = 128
    learning_rate: float = 1e-3
    warmup: float = 0.1
    weight_decay: float = 0.05
    label_smoothing: float = 0.1
    clip_norm: float | None = 1.0
    min_crop_area: float = 0.5
    rotation: float = 0.0
    shift: float = 0.0
    flip: bool = False

    def __post_init__(self):
        self._check("epochs", "a positive int", isinstance(self.epochs, int) and self.epochs > 0)
        self._check(
            "batch_size", "a positive int", isinstance(self.batch_size, int) and self.batch_size > 0
        )
        self._check("learning_rate", "positive", self.learning_rate > 0)
        self._check("warmup", "in [0, 1)", 0 <= self.warmup < 1)
        self._check("weight_decay", "at least 0", self.weight_decay >= 0)
        self._check("label_smoothing", "in [0, 1)", 0 <= self.label_smoothing < 1)
        self._check("clip_norm", "positive or None", self.clip_norm is None or self.clip_norm > 0)
        self._check("min_crop_area", "in (0, 1]", 0 < self.min_crop_area <= 1)
        self._check("rotation", "in [0, 180]", 0 <= self.rotation <= 180)
        self._check("shift", "in [0, 1)", 0 <= self.shift < 1)
        self._check("normalization", "set", self.normalization is not None)

    def _check(self, name, expected, holds):
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")


RECIPES = types.MappingProxyType(
    {
        # Images of about 8 pixels, such as scikit-learn's digits.
        "tiny": Recipe(
            ViTConfig(hidden_dim=96, depth=4, num_heads=6, mlp_dim=192, patch_size=4),
            image_size=16,
            epochs=70,
            batch_size=64,
            learning_rate=3e-3,
            min_crop_area=0.8,
            rotation=10.0,
            shift=0.05,
        ),
        # Images of about 32 pixels, such as CIFAR's: the sizes of ViT-Lite (arXiv 2104.05704).
        "small": Recipe(
            ViTConfig(hidden_dim=128, depth=6, num_heads=4, mlp_dim=256, patch_size=4),
            image_size=32,
            epochs=30,
            learning_rate=2e-3,
            min_crop_area=0.7,
            flip=True,
        ),
        # Photographs.
        "photos": Recipe(
            "Ti/16",
            image_size=128,
            epochs=50,
            batch_size=64,
            drop_path=0.1,
            min_crop_area=0.3,
            flip=True,
        ),
    }
)


def default_recipe(image_size):
    """The name of the recipe for images of a native size `(height, width)` in pixels."""
    side = min(image_size)
    if side <= 16:
        return "tiny"
    return "small" if side <= 64 else "photos"
