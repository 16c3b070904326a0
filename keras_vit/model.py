"""`build_vit`: validate, wire, return a functional model."""

import dataclasses

import keras
import numpy as np

from keras_vit.config import VARIANTS, ViTConfig, check_positive_int
from keras_vit.hybrid import ResNetStem
from keras_vit.layers import (
    GELUS,
    POOLINGS,
    POSITIONS,
    AttentionPooling,
    PatchEncoder,
    Patches,
    TokenPooling,
    TransformerBlock,
    check_choice,
)

# Mean and standard deviation of each channel, for pixels in [0, 1].
NORMALIZATIONS = {
    "minus_one_one": ((0.5,), (0.5,)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def build_vit(
    variant="B/16",
    *,
    image_size=224,
    num_classes=1000,
    patch_size=None,
    channels=3,
    pooling="token",
    class_token=True,
    num_registers=0,
    position="learned",
    representation_size=None,
    dropout=0.0,
    attention_dropout=0.0,
    drop_path=0.0,
    layer_scale=None,
    qk_norm=False,
    gelu="erf",
    layer_norm_epsilon=1e-6,
    normalization=None,
    name=None,
):
    """Builds a Vision Transformer as a functional `keras.Model`.

    z_0 = [x_class; x_p^1 E; ...; x_p^N E] + E_pos; L blocks of z' = MSA(LN(z)) + z,
    z = MLP(LN(z')) + z'; y = pooling(LN(z_L)); logits = y W + b.

    Example:

        model = keras_vit.build_vit("S/16", num_classes=10, normalization="imagenet")
        model.compile("adamw", keras.losses.SparseCategoricalCrossentropy(from_logits=True))
        model.fit(images, labels)  # images (B, 224, 224, 3), values in [0, 255]

    Args:
        variant: A name of `keras_vit.VARIANTS` such as "Ti/16" or "R50+B/16", or a `ViTConfig`.
        image_size: Side of the images in pixels, or `(height, width)`.
        num_classes: Number of classes; 0 leaves the head out.
        patch_size: Side of the patches, instead of the variant's.
        channels: Channels of the images.
        pooling: "token" (class token), "mean" (all tokens, the class token included), "gap"
            (patch tokens) or "map" (attention over all tokens).
        class_token: Whether there is a class token; "token" needs it.
        num_registers: Number of register tokens.
        position: "learned" or "sincos2d".
        representation_size: Width of a tanh layer before the head, or None.
        dropout: Rate in [0, 1) after every dense layer but qkv and the head, and after the
            positions.
        attention_dropout: Rate in [0, 1) on the attention probabilities.
        drop_path: Rate in [0, 1) of stochastic depth of the last block; it grows linearly from
            0 at the first.
        layer_scale: Initial value of LayerScale, or None for none.
        qk_norm: Whether queries and keys are layer-normalised.
        gelu: "erf" or "tanh".
        layer_norm_epsilon: Epsilon of every LayerNorm.
        normalization: None: the images come normalised. "minus_one_one", "imagenet" or
            `(mean, std)`: the model takes images in [0, 255] and computes
            `(image / 255 - mean) / std`, mean and std a number or one per channel.
        name: Name of the model.

    Returns:
        A functional model, images `(B, height, width, channels)` -> logits `(B, num_classes)`,
        in float32 at least, whatever the dtype policy; without a head, the pooled features
        `(B, D)`, or `(B, representation_size)`.

    Raises:
        ValueError: An argument is out of its range or does not fit another.
        TypeError: `variant` is neither a name nor a `ViTConfig`.

    Source: the paper (arXiv 2010.11929, Eq. 1-4 and B.1), initialised as its code. The head
    starts at zero; GELU is exact by default where the paper's code has the tanh form.
    """
    config = _resolve_variant(variant, patch_size)
    height, width = _image_size(image_size)
    check_positive_int("channels", channels)
    _check_model(config, pooling, class_token, position, gelu, num_classes, representation_size)
    for key, rate in (
        ("dropout", dropout),
        ("attention_dropout", attention_dropout),
        ("drop_path", drop_path),
    ):
        if not 0 <= rate < 1:
            raise ValueError(f"`{key}` must be in [0, 1). Received: {key}={rate!r}.")

    images = keras.Input((height, width, channels), dtype=_full_precision(), name="images")
    x = images
    if normalization is not None:
        x = _pixel_normalization(normalization, channels)(x)
    if config.stem_units is not None:
        x = ResNetStem(config.stem_units, width=config.stem_width, name="stem")(x)
    grid_size = _grid_size(x.shape, config.patch_size, (height, width))
    x = Patches(config.patch_size, name="patches")(x)
    x = PatchEncoder(
        config.hidden_dim,
        class_token=class_token,
        num_registers=num_registers,
        position=position,
        grid_size=grid_size,
        dropout=dropout,
        name="patch_encoder",
    )(x)
    for i in range(config.depth):
        x = TransformerBlock(
            config.num_heads,
            config.mlp_dim,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path * i / max(config.depth - 1, 1),
            layer_scale=layer_scale,
            qk_norm=qk_norm,
            gelu=gelu,
            layer_norm_epsilon=layer_norm_epsilon,
            name=f"block_{i}",
        )(x)
    x = keras.layers.LayerNormalization(epsilon=layer_norm_epsilon, name="encoder_norm")(x)
    if pooling == "map":
        x = AttentionPooling(
            config.num_heads,
            config.mlp_dim,
            gelu=gelu,
            layer_norm_epsilon=layer_norm_epsilon,
            name="pooling",
        )(x)
    else:
        x = TokenPooling(pooling, num_prefix_tokens=class_token + num_registers, name="pooling")(x)
    if representation_size is not None:
        x = keras.layers.Dense(representation_size, activation="tanh", name="pre_logits")(x)
    if num_classes:
        x = keras.layers.Dense(
            num_classes, kernel_initializer="zeros", dtype=_full_precision(), name="head"
        )(x)
    return keras.Model(images, x, name=name or _model_name(variant, patch_size))


def _resolve_variant(variant, patch_size):
    if isinstance(variant, str):
        if variant not in VARIANTS:
            raise ValueError(
                f"`variant` must be one of {', '.join(VARIANTS)}, or a ViTConfig. "
                f"Received: variant={variant!r}."
            )
        config = VARIANTS[variant]
    elif isinstance(variant, ViTConfig):
        config = variant
    else:
        raise TypeError(
            f"`variant` must be a name or a ViTConfig. Received: variant={variant!r} "
            f"of type {type(variant).__name__}."
        )
    return config if patch_size is None else dataclasses.replace(config, patch_size=patch_size)


def _image_size(image_size):
    """`(height, width)` of an int or a pair."""
    pair = isinstance(image_size, (tuple, list))
    size = tuple(image_size) if pair else (image_size, image_size)
    if len(size) != 2:
        raise ValueError(
            f"`image_size` must be an int or (height, width). Received: image_size={image_size!r}."
        )
    for side in size:
        check_positive_int("image_size", side)
    return size


def _check_model(config, pooling, class_token, position, gelu, num_classes, representation_size):
    check_choice("pooling", pooling, POOLINGS)
    check_choice("position", position, POSITIONS)
    check_choice("gelu", gelu, GELUS)
    if pooling == "token" and not class_token:
        raise ValueError(
            'pooling="token" needs a class token: pass class_token=True, or pooling="gap". '
            f"Received: class_token={class_token!r}."
        )
    if num_classes != 0:
        check_positive_int("num_classes", num_classes)
    if representation_size is not None:
        check_positive_int("representation_size", representation_size)


def _grid_size(shape, patch_size, image_size):
    """(rows, columns) of patches in an image or a stem's feature map `(B, H, W, C)`."""
    if shape[1] % patch_size or shape[2] % patch_size:
        raise ValueError(
            f"The height and width of the {'images' if shape[1:3] == image_size else 'stem'} "
            f"must be divisible by `patch_size`. Received: image_size={image_size}, "
            f"patches of {patch_size} on {shape[1]} x {shape[2]}."
        )
    return shape[1] // patch_size, shape[2] // patch_size


def _pixel_normalization(normalization, channels):
    """The layer that computes (image / 255 - mean) / std, in full precision."""
    if isinstance(normalization, str):
        check_choice("normalization", normalization, tuple(NORMALIZATIONS))
        normalization = NORMALIZATIONS[normalization]
    if not isinstance(normalization, (tuple, list)) or len(normalization) != 2:
        raise ValueError(
            f"`normalization` must be None, {', '.join(map(repr, NORMALIZATIONS))} or "
            f"(mean, std). Received: normalization={normalization!r}."
        )
    mean, std = (np.atleast_1d(np.asarray(values, "float64")) for values in normalization)
    for values in (mean, std):
        in_range = bool(np.all((values >= 0) & (values <= 1)))  # False for NaN
        if values.shape not in ((1,), (channels,)) or not in_range:
            raise ValueError(
                "The mean and std of `normalization` must be numbers in [0, 1], for pixels in "
                f"[0, 1], one for all or one for each of {channels} channels. "
                f"Received: normalization={normalization!r}."
            )
    if std.min() == 0:
        raise ValueError(f"The std of `normalization` must not be 0. Received: {normalization!r}.")
    return keras.layers.Rescaling(
        scale=(1 / (255 * std)).tolist(),
        offset=(-mean / std).tolist(),
        dtype=_full_precision(),
        name="normalization",
    )


def _full_precision():
    """The dtype of pixels and logits: float32, or float64 under that policy."""
    return "float64" if keras.config.dtype_policy().variable_dtype == "float64" else "float32"


def _model_name(variant, patch_size):
    """A name that Keras and file systems take: "vit_B16" for "B/16"."""
    if isinstance(variant, ViTConfig):
        return "vit"
    width, size = variant.replace("+", "_").split("/")
    return f"vit_{width}{patch_size or size}"
