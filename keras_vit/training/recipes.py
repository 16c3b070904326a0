"""What a training run does, as rows of one table."""

import dataclasses
import types

from keras_vit.config import ViTConfig


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Args:
        variant: A name of `keras_vit.VARIANTS` or a `ViTConfig`; None for the model of a
            checkpoint, whose `image_size`, `pooling` and `normalization` may then be None,
            the checkpoint's, and whose `patch_size` and `position` must be.
        image_size: Side of the square images in pixels.
        patch_size: Side of the patches, or None for the variant's.
        pooling: As in `build_vit`; "gap" and "map" go without a class token, unless a
            checkpoint has one.
        position: As in `build_vit`.
        dropout: As in `build_vit`.
        drop_path: As in `build_vit`.
        normalization: As in `build_vit`; a model gets one in any case, since the data are in
            [0, 255].
        freeze_backbone: Whether the head alone is trained.
        epochs: Passes over the training images.
        batch_size: Images per step.
        optimizer: "adamw", or "sgd" with momentum 0.9.
        learning_rate: Peak of the learning rate.
        layer_decay: In (0, 1]; each layer before the head has a learning rate so many times
            that of the next (see `keras_vit.training.optimizers.layer_rates`); 1: all the same.
        warmup: Share of the steps, in [0, 1), in which the rate rises linearly from 0, before the
            cosine decay to 0.
        weight_decay: Decoupled: multiplied by the learning rate, on kernels only.
        label_smoothing: Share of the target given to all classes alike, in [0, 1).
        clip_norm: Largest global norm of the gradient, or None.
        min_crop_area: Smallest share of an image's area that a random crop keeps, in (0, 1].
        rotation: Largest random rotation in degrees, in [0, 180].
        shift: Largest random shift as a share of the image's side, in [0, 1).
        flip: Whether half of the images are mirrored.

    Raises:
        ValueError: A training argument is out of its range. `build_vit` checks the others.
    """

    variant: str | ViTConfig | None
    image_size: int | None
    patch_size: int | None = None
    pooling: str | None = "gap"
    position: str | None = "learned"
    dropout: float = 0.0
    drop_path: float = 0.0
    normalization: str | tuple | None = "minus_one_one"
    freeze_backbone: bool = False
    epochs: int = 100
    batch_size: int = 128
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
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
        self._check("optimizer", "'adamw' or 'sgd'", self.optimizer in ("adamw", "sgd"))
        self._check("learning_rate", "positive", self.learning_rate > 0)
        self._check("layer_decay", "in (0, 1]", 0 < self.layer_decay <= 1)
        self._check("warmup", "in [0, 1)", 0 <= self.warmup < 1)
        self._check("weight_decay", "at least 0", self.weight_decay >= 0)
        self._check("label_smoothing", "in [0, 1)", 0 <= self.label_smoothing < 1)
        self._check("clip_norm", "positive or None", self.clip_norm is None or self.clip_norm > 0)
        self._check("min_crop_area", "in (0, 1]", 0 < self.min_crop_area <= 1)
        self._check("rotation", "in [0, 180]", 0 <= self.rotation <= 180)
        self._check("shift", "in [0, 1)", 0 <= self.shift < 1)
        self._check_model()

    def _check_model(self):
        if self.variant is not None:
            for name in ("image_size", "pooling", "position", "normalization"):
                self._check(name, "set", getattr(self, name) is not None)
            self._check("freeze_backbone", "False without weights", not self.freeze_backbone)
            return
        for name in ("patch_size", "position"):
            expected = "None with weights: the model is the checkpoint's"
            self._check(name, expected, getattr(self, name) is None)

    def _check(self, name, expected, holds):
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")


# Everything about the model that a checkpoint says.
_OF_THE_CHECKPOINT = dict.fromkeys(
    ("variant", "image_size", "pooling", "position", "normalization")
)

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
        # A checkpoint on up to some tens of thousands of images. AdamW with rates that fall from
        # layer to layer, as BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377) are fine-tuned.
        # Nothing is mirrored, since what is in the images is not known: photographs gain by `flip`.
        # DINOv2's S/14 at 56 px, on digits: 0.9889 in validation and 0.9917 in test.
        "finetune_small": Recipe(
            **_OF_THE_CHECKPOINT,
            epochs=10,
            batch_size=32,
            drop_path=0.1,
            learning_rate=5e-4,
            layer_decay=0.7,
            min_crop_area=0.5,
        ),
        # A checkpoint as the paper fine-tunes it (arXiv 2010.11929, B.1.1 and Table 4), with the
        # augmentation and the warm-up of its code (vit_jax/configs/common.py, input_pipeline.py).
        # It counts steps of 512 images: 20,000 on ImageNet, which are 8 epochs; 10,000 on CIFAR,
        # 100 epochs; 500 on Pets and Flowers, 70 and 250. It tries rates from 0.001 to 0.06.
        "finetune": Recipe(
            **{**_OF_THE_CHECKPOINT, "image_size": 384},
            epochs=8,
            batch_size=512,
            optimizer="sgd",
            learning_rate=0.03,
            warmup=0.025,  # 500 of 20,000 steps
            weight_decay=0.0,
            label_smoothing=0.0,
            min_crop_area=0.05,
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


def resolve_recipe(recipe, image_size, overrides, weights=None):
    """The recipe of a run, with its overrides.

    Args:
        recipe: A `Recipe`, a name of `RECIPES`, or None: "finetune_small" with weights, else the
            one for the images' native size.
        image_size: That size, `(height, width)` in pixels.
        overrides: Dict of fields to change.
        weights: The checkpoint to start from, or None.

    Returns:
        A `Recipe`, whose variant is None if there are weights and not None if there are none.

    Raises:
        ValueError: A name is unknown, a value out of its range, or the recipe is not one for
            weights, or for none.
        TypeError: `recipe` is neither a `Recipe` nor a name, or an override is not a field.
    """
    if recipe is None:
        recipe = default_recipe(image_size) if weights is None else "finetune_small"
    name = recipe
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}. Received: {recipe!r}.")
        recipe = RECIPES[recipe]
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a Recipe, a name or None. Received: {recipe!r}.")
    unknown = set(overrides) - {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise TypeError(f"Not a field of Recipe: {', '.join(sorted(unknown))}.")
    if weights is None and recipe.variant is None:
        raise ValueError(
            f"This recipe trains a checkpoint further: pass it as `weights` (--weights). "
            f"Received: recipe={name!r}, weights=None."
        )
    if weights is not None:
        _check_for_weights(name, recipe, overrides)
    return dataclasses.replace(recipe, **overrides)


def _check_for_weights(name, recipe, overrides):
    if recipe.variant is not None:
        names = ", ".join(key for key, row in RECIPES.items() if row.variant is None)
        raise ValueError(
            f"With weights, `recipe` must be one of {names}, or a Recipe whose variant is None: "
            f"the model is the checkpoint's. Received: recipe={name!r}."
        )
    for field in ("variant", "patch_size", "position"):
        if overrides.get(field) is not None:
            raise ValueError(
                f"`{field}` cannot be chosen with weights: it is the checkpoint's. "
                f"Received: {field}={overrides[field]!r}."
            )
