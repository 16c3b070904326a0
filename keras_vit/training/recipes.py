"""What a training run does, as rows of one table."""

import ast
import dataclasses
import difflib
import math
import types
import typing

from keras_vit.config import VARIANTS, ViTConfig
from keras_vit.data.augmentation import Augmentation
from keras_vit.training.mixing import Mixing

OPTIMIZERS = ("adamw", "sgd", "lamb")
SCHEDULES = ("cosine", "linear")
LOSSES = ("softmax", "sigmoid")
TEXTS = ("purpose", "source", "expect")  # what a recipe says of itself


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A model and how it is trained.

    Args:
        variant: A name of `keras_vit.VARIANTS` or a `ViTConfig`; None for the model of a
            checkpoint, whose `image_size`, `pooling` and `normalization` may then be None,
            the checkpoint's, and whose `patch_size`, `position` and `layer_scale` must be.
        image_size: Side of the square images in pixels, or (height, width).
        patch_size: Side of the patches, or None for the variant's.
        pooling: As in `build_vit`; "gap" and "map" go without a class token, unless a
            checkpoint has one.
        position: As in `build_vit`.
        dropout: As in `build_vit`.
        drop_path: As in `build_vit`.
        layer_scale: As in `build_vit`.
        normalization: As in `build_vit`; a model gets one in any case, since the data are in
            [0, 255].
        freeze_backbone: Whether the head alone is trained, then without dropout and DropPath.
        epochs: Passes over the training images.
        batch_size: Images per step, on all devices together; even with `mixup` or `cutmix`.
        micro_batches: Parts, at least 1, in which each device goes through its part of a batch,
            one after the other: less memory for the same result.
        optimizer: "adamw", "sgd" with momentum 0.9, or "lamb", for large batches.
        learning_rate: Peak of the learning rate.
        layer_decay: In (0, 1]; each layer before the head has a learning rate so many times
            that of the next (see `keras_vit.training.optimizers.layer_rates`); 1: all the same.
        warmup: Share of the steps, in [0, 1), in which the rate rises linearly from 0, before the
            decay to 0.
        schedule: How it decays: "cosine" or "linear".
        weight_decay: Decoupled: multiplied by the learning rate, on kernels only.
        clip_norm: Largest global norm of the gradient, or None.
        ema: Momentum in (0, 1) of a moving average of the weights, which is then what is evaluated,
            kept and exported; or None.
        loss: "softmax" cross-entropy, or "sigmoid": the sum of binary ones over the classes.
        head_bias: Initial bias of a new head; -ln(classes) goes with the sigmoid.
        label_smoothing: Share of the target given to all classes alike, in [0, 1).
        mixup: alpha of MixUp, at least 0; 0: none. See `keras_vit.training.mixing.Mixing`.
        cutmix: alpha of CutMix, likewise.
        min_crop_area: As in `keras_vit.data.augmentation.Augmentation`, as all that follow.
        rotation: Largest random rotation in degrees.
        shift: Largest random shift as a share of the image's side.
        flip: Whether half of the images are mirrored.
        rand_augment: (num_ops, magnitude) of RandAugment, or None.
        three_augment: Whether DeiT III's three changes of an image are made.
        erasing: Probability of erasing a rectangle.
        purpose: What the recipe is for, in a line.
        source: Where it comes from: the paper, and the file of its code.
        expect: What the recipe, as it stands, gave there: accuracy and cost.

    Raises:
        ValueError: The variant is unknown, or a training argument is out of its range.
            `build_vit` checks the others.
        TypeError: An argument is of another type than it should be.
    """

    variant: str | ViTConfig | None
    image_size: int | tuple | list | None
    patch_size: int | None = None
    pooling: str | None = "gap"
    position: str | None = "learned"
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_scale: float | None = None
    normalization: str | tuple | list | None = "minus_one_one"
    freeze_backbone: bool = False
    epochs: int = 100
    batch_size: int = 128
    micro_batches: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    layer_decay: float = 1.0
    warmup: float = 0.1
    schedule: str = "cosine"
    weight_decay: float = 0.05
    clip_norm: float | None = 1.0
    ema: float | None = None
    loss: str = "softmax"
    head_bias: float = 0.0
    label_smoothing: float = 0.1
    mixup: float = 0.0
    cutmix: float = 0.0
    min_crop_area: float = 0.5
    rotation: float = 0.0
    shift: float = 0.0
    flip: bool = False
    rand_augment: tuple | list | None = None
    three_augment: bool = False
    erasing: float = 0.0
    purpose: str = ""
    source: str = ""
    expect: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            _check_type(field, getattr(self, field.name))
        self._check_model()
        self._check_steps()
        self._check_loss()
        _ = self.augmentation  # which checks its own

    def _check_model(self):
        self._check("dropout", "in [0, 1)", 0 <= self.dropout < 1)
        self._check("drop_path", "in [0, 1)", 0 <= self.drop_path < 1)
        if isinstance(self.variant, str):
            known = f"one of {', '.join(VARIANTS)}, or a ViTConfig"
            self._check("variant", known, self.variant in VARIANTS)
        if self.variant is not None:
            for name in ("image_size", "pooling", "position", "normalization"):
                self._check(name, "set", getattr(self, name) is not None)
            self._check("freeze_backbone", "False without weights", not self.freeze_backbone)
            return
        for name in ("patch_size", "position", "layer_scale"):
            expected = "None with weights: the model is the checkpoint's"
            self._check(name, expected, getattr(self, name) is None)

    def _check_steps(self):
        for name in ("epochs", "batch_size", "micro_batches"):
            self._check(name, "a positive int", getattr(self, name) > 0)
        self._check(
            "optimizer",
            "'adamw' or 'sgd', or 'lamb' for large batches",
            self.optimizer in OPTIMIZERS,
        )
        self._check("learning_rate", "positive", self.learning_rate > 0)
        self._check("layer_decay", "in (0, 1]", 0 < self.layer_decay <= 1)
        self._check("warmup", "in [0, 1)", 0 <= self.warmup < 1)
        self._check("schedule", f"one of {SCHEDULES}", self.schedule in SCHEDULES)
        self._check("weight_decay", "at least 0", self.weight_decay >= 0)
        self._check("clip_norm", "positive or None", self.clip_norm is None or self.clip_norm > 0)
        self._check("ema", "in (0, 1) or None", self.ema is None or 0 < self.ema < 1)

    def _check_loss(self):
        self._check("loss", f"one of {LOSSES}", self.loss in LOSSES)
        self._check("label_smoothing", "in [0, 1)", 0 <= self.label_smoothing < 1)
        if self.mixing is not None:
            expected = "even with `mixup` or `cutmix`, which blend pairs"
            self._check("batch_size", expected, self.batch_size % 2 == 0)

    def _check(self, name, expected, holds):
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")

    @property
    def augmentation(self):
        """The recipe's `keras_vit.data.augmentation.Augmentation`."""
        names = (field.name for field in dataclasses.fields(Augmentation))
        return Augmentation(**{name: getattr(self, name) for name in names})

    @property
    def mixing(self):
        """The recipe's `Mixing`, or None for none."""
        mixing = Mixing(self.mixup, self.cutmix)
        return mixing if mixing != Mixing() else None


_WORDS = {
    int: "an int",
    float: "a finite number",
    bool: "True or False",
    str: "a string",
    tuple: "a tuple",
    ViTConfig: "a ViTConfig",
    types.NoneType: "None",
}
_EXAMPLES = {"image_size": "224,320", "rand_augment": "2,10"}  # of those that may be tuples


def _check_type(field, value):
    """Raises TypeError unless a value is of its field's annotation; a float may be an int."""
    allowed = typing.get_args(field.type) or (field.type,)
    if isinstance(value, bool):
        fits = bool in allowed
    elif isinstance(value, (int, float)) and float in allowed:
        fits = math.isfinite(value)
    else:
        fits = isinstance(value, allowed)
    if not fits:
        expected = " or ".join(_WORDS[kind] for kind in allowed if kind in _WORDS)
        if field.name in _EXAMPLES:
            example = _EXAMPLES[field.name]
            expected += f", such as ({example}), which is --set {field.name}={example}"
        raise TypeError(f"`{field.name}` must be {expected}. Received: {field.name}={value!r}.")


# Everything about the model that a checkpoint says.
_OF_THE_CHECKPOINT = dict.fromkeys(
    ("variant", "image_size", "pooling", "position", "normalization")
)

# What the papers' ImageNet recipes share. Their crops are those of the Inception networks, which
# are drawn again where they would not lie inside; ours are clipped. Their images are evaluated at
# the central 224 of 256 pixels; ours are resized as a whole. Their shares of warm-up were counted
# in steps.
_IMAGENET = {
    "image_size": 224,
    "label_smoothing": 0.0,
    "min_crop_area": 0.05,  # 0.08 in DeiT
    "flip": True,
}

# AugReg (arXiv 2106.10270, Sections 3.3 and 3.4): Adam, 10,000 steps of warm-up, clipping, a class
# token and a linear head. The loss and the bias are big_vision's `configs/vit_i1k.py` and
# `vit_i21k.py`. Its RandAugment goes on to 15 where 10 is the end of each scale; ours stops there.
_AUGREG = {
    **_IMAGENET,
    "pooling": "token",
    "epochs": 300,
    "batch_size": 4096,
    "weight_decay": 0.1,
    "loss": "sigmoid",
    "rand_augment": (2, 10),
}

# DeiT III (arXiv 2204.07118; README_revenge.md, main.py, augment.py and models_v2.py of
# facebookresearch/deit). Its repeated augmentation, three versions of an image in one batch, is
# not done here; its stochastic depth has one rate for all blocks, where ours grows to it; its loss
# is described in `SigmoidCrossEntropy`; its rate ends at 1e-5 and stays there for 10 epochs; its
# class token has no position, and its crops are bicubic.
_DEIT3 = {
    **_IMAGENET,
    "pooling": "token",
    "layer_scale": 1e-4,
    "normalization": "imagenet",
    "epochs": 800,
    "batch_size": 2048,
    "optimizer": "lamb",
    "warmup": 0.00625,  # 5 of 800 epochs
    "clip_norm": 1000.0,  # FusedLAMB's 1, of a loss that is 1/1000 of ours
    "loss": "sigmoid",
    "mixup": 0.8,
    "cutmix": 1.0,
    "min_crop_area": 0.08,
    "three_augment": True,
    "source": "arXiv 2204.07118; facebookresearch/deit README_revenge.md",
}

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
            purpose="images of up to 16 px",
            source="this package",
            expect="0.994 on scikit-learn's digits, in 40 s on 2 CPU cores",
        ),
        # Images of about 32 pixels, such as CIFAR's: the sizes of ViT-Lite (arXiv 2104.05704).
        "small": Recipe(
            ViTConfig(hidden_dim=128, depth=6, num_heads=4, mlp_dim=256, patch_size=4),
            image_size=32,
            epochs=30,
            learning_rate=2e-3,
            min_crop_area=0.7,
            flip=True,
            purpose="images of up to 64 px, in minutes",
            source="this package",
            expect="0.911 on Fashion-MNIST, in 55 min on 2 CPU cores; 0.915 at 28 px in bfloat16, "
            "in 54 min on slower ones; 0.913 at 28 px in float32 with 25 epochs, in 53 min; 0.894 "
            "at 28 px with patches of 7, 15 epochs, min_crop_area=0.9 and no flip, in 11 min",
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
            purpose="photographs, a few thousand or more",
            source="this package",
            expect="not measured; public weights and finetune_small do better on few images",
        ),
        # A checkpoint on up to some tens of thousands of images. AdamW with rates that fall from
        # layer to layer, as BEiT (arXiv 2106.08254) and MAE (arXiv 2111.06377) are fine-tuned.
        # Nothing is mirrored, since what is in the images is not known: photographs gain by `flip`.
        "finetune_small": Recipe(
            **_OF_THE_CHECKPOINT,
            epochs=10,
            batch_size=32,
            drop_path=0.1,
            learning_rate=5e-4,
            layer_decay=0.7,
            min_crop_area=0.5,
            purpose="a checkpoint on up to some tens of thousands of images",
            source="after BEiT, arXiv 2106.08254, and MAE, arXiv 2111.06377",
            expect="0.992 to 0.994 on scikit-learn's digits with DINOv2's S/14 at 56 px, in 5 min "
            "on 2 CPU cores",
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
            purpose="a checkpoint on more images, as the paper does it",
            source="arXiv 2010.11929, Table 4",
            expect="ImageNet 83.97 % with its B/16 of ImageNet-21k (Table 5)",
        ),
        # Small images from scratch: ViT-Lite-7/4 with the settings of its authors' later models
        # (SHI-Labs/Compact-Transformers, configs/datasets/cifar10.yml and timm's defaults).
        # RandAugment has no noise in its magnitude here, attention no dropout of 0.1, the patches
        # are averaged where theirs have a class token (ViT-Lite) or learned weights (CVT), the
        # normalisation is not CIFAR's, and MixUp does not end at epoch 175. CIFAR-100 is given a
        # rate of 6e-4 there.
        "cifar": Recipe(
            ViTConfig(hidden_dim=256, depth=7, num_heads=4, mlp_dim=512, patch_size=4),
            image_size=32,
            epochs=300,
            drop_path=0.1,
            learning_rate=5.5e-4,
            warmup=0.033,  # 10 of 300 epochs
            weight_decay=0.06,
            clip_norm=None,
            mixup=0.8,
            cutmix=1.0,
            min_crop_area=0.8,
            flip=True,
            rand_augment=(2, 9),
            erasing=0.25,
            purpose="images of up to 64 px, from scratch, with all augmentation",
            source="arXiv 2104.05704; SHI-Labs/Compact-Transformers configs/datasets/cifar10.yml",
            expect="CIFAR-10 91.4 % and CIFAR-100 69.8 % for ViT-Lite-7/4 with 200 epochs of less "
            "augmentation (examples/README.md there); with these settings published for CCT-7/3x1 "
            "alone: 96.5 % and 80.9 %. Not measured here",
        ),
        # The paper from scratch (arXiv 2010.11929, Table 3). It names no augmentation and no loss,
        # and its code has no pre-training: the crops and the flip are those of its fine-tuning. Its
        # head has a hidden layer, which goes before fine-tuning; ours is linear.
        "paper_imagenet": Recipe(
            "B/16",
            **_IMAGENET,
            pooling="token",
            dropout=0.1,
            epochs=300,
            batch_size=4096,
            learning_rate=3e-3,
            warmup=0.107,  # 10,000 of 93,835 steps
            weight_decay=0.3,
            purpose="ImageNet-1k as the paper does it",
            source="arXiv 2010.11929, Table 3",
            expect="77.91 % after `finetune` at 384 px (Table 5)",
        ),
        # As above, but with a linear decay and without clipping.
        "paper_imagenet21k": Recipe(
            "B/16",
            **_IMAGENET,
            pooling="token",
            dropout=0.1,
            epochs=90,
            batch_size=4096,
            learning_rate=1e-3,
            warmup=0.032,  # 10,000 of 311,948 steps
            schedule="linear",
            weight_decay=0.03,
            clip_norm=None,
            purpose="pre-training on ImageNet-21k as the paper does it",
            source="arXiv 2010.11929, Table 3",
            expect="ImageNet-1k 83.97 % after `finetune` at 384 px (Table 5)",
        ),
        # "Better plain ViT baselines": the least that works. big_vision's decay of 1e-4 is not
        # multiplied by the rate: 0.1 here. Its RandAugment draws from other ranges for some
        # operations, and its head has a hidden layer (`rep_size`). 300 epochs give 80.0 %.
        "plain_imagenet": Recipe(
            "S/16",
            **_IMAGENET,
            position="sincos2d",
            epochs=90,
            batch_size=1024,
            learning_rate=1e-3,
            warmup=0.09,  # 10,000 of 111,477 steps
            weight_decay=0.1,
            mixup=0.2,
            rand_augment=(2, 10),
            purpose="ImageNet-1k, the simplest good recipe",
            source="arXiv 2205.01580; big_vision configs/vit_s16_i1k.py",
            expect="76.5 % in 6 to 7 h on a TPU-v3-8",
        ),
        # AugReg's "medium2" with regularization, the best for B/16 in Figure 4; smaller models want
        # less of both.
        "augreg_imagenet": Recipe(
            "B/16",
            **_AUGREG,
            dropout=0.1,
            drop_path=0.1,
            warmup=0.108,  # 10,000 of 92,897 steps
            head_bias=-6.9,
            mixup=0.5,
            purpose="ImageNet-1k with augmentation and regularization",
            source="arXiv 2106.10270; big_vision configs/vit_i1k.py",
            expect="83 % of 'minival', a part of the training set (Figure 4)",
        ),
        # AugReg's "medium1" without regularization, the authors' choice for B/16
        # (google-research/vision_transformer, README; vit_i21k.py averages the patches instead).
        # Ti/16 has neither MixUp nor RandAugment.
        "augreg_imagenet21k": Recipe(
            "B/16",
            **_AUGREG,
            warmup=0.0097,  # 10,000 of 1,036,078 steps
            head_bias=-10.0,
            mixup=0.2,
            purpose="pre-training on ImageNet-21k, what the public weights had",
            source="arXiv 2106.10270; big_vision configs/vit_i21k.py",
            expect="ImageNet-1k 85.49 % after `finetune` at 384 px",
        ),
        "deit3_small": Recipe(
            "S/16",
            **_DEIT3,
            drop_path=0.05,
            learning_rate=4e-3,
            purpose="ImageNet-1k with S/16, long",
            expect="81.4 %, on 8 GPUs of 256 images each",
        ),
        # Trained at 192 px; 20 more epochs at 224 px, AdamW at 1e-5, give the published result.
        "deit3_base": Recipe(
            "B/16",
            **{**_DEIT3, "image_size": 192},
            drop_path=0.2,
            learning_rate=3e-3,
            purpose="ImageNet-1k with B/16, long",
            expect="83.8 % after 20 more epochs at 224 px, on 8 GPUs of 256 images each",
        ),
    }
)


def default_recipe(image_size):
    """The name of the recipe for images of a native size `(height, width)` in pixels."""
    side = min(image_size)
    if side <= 16:
        return "tiny"
    return "small" if side <= 64 else "photos"


def named_recipe(name):
    """The recipe of that name; ValueError if there is none."""
    if name not in RECIPES:
        near = _nearest(name, RECIPES)
        meant = f" Did you mean {near!r}?" if near else ""
        raise ValueError(
            f"`recipe` must be one of {', '.join(RECIPES)}.{meant} Received: {name!r}."
        )
    return RECIPES[name]


def _nearest(name, names):
    """The one of `names` that is most like a name that is none of them; None if none is."""
    return next(iter(difflib.get_close_matches(name, names, n=1)), None)


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
        recipe = named_recipe(recipe)
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
    for field in ("variant", "patch_size", "position", "layer_scale"):
        if overrides.get(field) is not None:
            raise ValueError(
                f"`{field}` cannot be chosen with weights: it is the checkpoint's. "
                f"Received: {field}={overrides[field]!r}."
            )


def parse_override(text):
    """A field of `Recipe` and its value, of text such as "mixup=0.2" or "rand_augment=2,10".

    Args:
        text: "FIELD=VALUE"; a value is a Python literal, "none", "true" or "false" in any case, or
            else a string.

    Returns:
        `(name, value)`. `Recipe` checks whether the value is one of the field.

    Raises:
        ValueError: The text has no "=", or its field is not one of `Recipe`.
    """
    name, equals, value = (part.strip() for part in text.partition("="))
    names = [field.name for field in dataclasses.fields(Recipe) if field.name not in TEXTS]
    if not equals or name not in names:
        near = _nearest(name, names)
        meant = f" Did you mean {near}=...?" if near else ""
        raise ValueError(
            "An override must be FIELD=VALUE, with a field of a recipe, such as mixup=0.2; "
            f"`keras-vit recipes small` lists them.{meant} Received: {text!r}."
        )
    words = {"none": None, "true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value
