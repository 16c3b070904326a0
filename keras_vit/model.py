"""`build_vit`: validate, wire, return a functional model."""

import dataclasses

import keras
import numpy as np

from keras_vit.config import VARIANTS, ViTConfig, check_epsilon, check_positive_int
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

# The layers of a model beside its blocks, and those that read the tokens of the last block.
TOKEN_READERS = ("encoder_norm", "pooling", "distillation_pooling")
LAYERS = (
    "normalization",
    "stem",
    "patches",
    "patch_encoder",
    *TOKEN_READERS,
    "pooled_norm",
    "pre_logits",
    "head",
    "head_distillation",
    "average",
)


def build_vit(
    variant="B/16",
    *,
    image_size=224,
    num_classes=1000,
    patch_size=None,
    channels=3,
    pooling="token",
    class_token=True,
    distillation_token=False,
    num_registers=0,
    position="learned",
    patch_norm=False,
    norm_after_pooling=False,
    representation_size=None,
    dropout=0.0,
    attention_dropout=0.0,
    drop_path=0.0,
    layer_scale=None,
    qkv_bias=True,
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
            (patch tokens), "token+gap" (both, as `2 D` features) or "map" (attention over all
            tokens).
        class_token: Whether there is a class token; "token" and "token+gap" need it.
        distillation_token: Whether there is a distillation token with a head of its own, as in
            DeiT; the logits are the mean of both heads'. Needs pooling="token".
        num_registers: Number of register tokens.
        position: "learned" or "sincos2d".
        patch_norm: Whether patches are layer-normalised before and after their projection.
        norm_after_pooling: Whether the last LayerNorm is that of the pooled features,
            LN(pooling(z_L)), rather than that of the tokens.
        representation_size: Width of a tanh layer before the head, or None.
        dropout: Rate in [0, 1) after every dense layer but qkv and the head, and after the
            positions.
        attention_dropout: Rate in [0, 1) on the attention probabilities.
        drop_path: Rate in [0, 1) of stochastic depth of the last block; it grows linearly from
            0 at the first.
        layer_scale: Initial value of LayerScale, or None for none.
        qkv_bias: Whether queries, keys and values have a bias.
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
        `(B, D)`, or `(B, representation_size)`, the mean of both tokens' if there is a
        distillation token.

    Raises:
        ValueError: An argument is out of its range or does not fit another.
        TypeError: `variant` is neither a name nor a `ViTConfig`.

    Source: the paper (arXiv 2010.11929, Eq. 1-4 and B.1), initialised as its code. The head
    starts at zero; GELU is exact by default where the paper's code has the tanh form.
    """
    config = _resolve_variant(variant, patch_size)
    height, width = check_image_size(image_size)
    check_positive_int("channels", channels)
    _check_choices(pooling, position, gelu)
    _check_tokens(pooling, class_token, distillation_token, representation_size)
    if num_classes != 0:
        check_positive_int("num_classes", num_classes)
    if representation_size is not None:
        check_positive_int("representation_size", representation_size)
    check_epsilon(layer_norm_epsilon)
    _check_rates(dropout=dropout, attention_dropout=attention_dropout, drop_path=drop_path)

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
        distillation_token=distillation_token,
        num_registers=num_registers,
        position=position,
        grid_size=grid_size,
        patch_norm=patch_norm,
        dropout=dropout,
        layer_norm_epsilon=layer_norm_epsilon,
        name="patch_encoder",
    )(x)
    for i in range(config.depth):
        x = TransformerBlock(
            config.num_heads,
            config.mlp_dim,
            head_dim=config.head_dim,
            dropout=dropout,
            attention_dropout=attention_dropout,
            drop_path=drop_path * i / max(config.depth - 1, 1),
            layer_scale=layer_scale,
            qkv_bias=qkv_bias,
            qk_norm=qk_norm,
            gelu=gelu,
            layer_norm_epsilon=layer_norm_epsilon,
            name=f"block_{i}",
        )(x)
    prefix = class_token + distillation_token + num_registers
    if pooling == "map":
        pools = [
            AttentionPooling(
                config.num_heads,
                config.mlp_dim,
                gelu=gelu,
                layer_norm_epsilon=layer_norm_epsilon,
                name="pooling",
            )
        ]
    else:
        pools = [TokenPooling(pooling, num_prefix_tokens=prefix, name="pooling")]
    if distillation_token:
        pools.append(TokenPooling("distillation", name="distillation_pooling"))
    features = _normed_features(x, pools, layer_norm_epsilon, norm_after_pooling)
    return keras.Model(
        images,
        _head(features, num_classes, representation_size),
        name=name or _model_name(variant, patch_size),
    )


def _normed_features(tokens, pools, epsilon, norm_after_pooling):
    """LN, then each pooling, or the other way round: `(B, N, D)` -> a list of `(B, D)`."""
    if norm_after_pooling:
        norm = keras.layers.LayerNormalization(epsilon=epsilon, name="pooled_norm")
        return [norm(pool(tokens)) for pool in pools]
    norm = keras.layers.LayerNormalization(epsilon=epsilon, name="encoder_norm")
    tokens = norm(tokens)
    return [pool(tokens) for pool in pools]


def _head(features, num_classes, representation_size):
    """From the pooled features `(B, D)`, two of them with a distillation token, to the output."""
    if representation_size is not None:
        pre_logits = keras.layers.Dense(representation_size, activation="tanh", name="pre_logits")
        features = [pre_logits(x) for x in features]
    if num_classes:
        names = ("head", "head_distillation")
        features = [
            keras.layers.Dense(
                num_classes, kernel_initializer="zeros", dtype=_full_precision(), name=name
            )(x)
            for name, x in zip(names, features, strict=False)
        ]
    if len(features) == 1:
        return features[0]
    return keras.layers.Average(dtype=_full_precision(), name="average")(features)


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


def check_image_size(image_size):
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


def _check_choices(pooling, position, gelu):
    check_choice("pooling", pooling, POOLINGS)
    check_choice("position", position, POSITIONS)
    check_choice("gelu", gelu, GELUS)


def _check_tokens(pooling, class_token, distillation_token, representation_size):
    if pooling in ("token", "token+gap") and not class_token:
        raise ValueError(
            f'pooling="{pooling}" needs a class token: pass class_token=True, or pooling="gap". '
            f"Received: class_token={class_token!r}."
        )
    if distillation_token and (pooling != "token" or representation_size is not None):
        raise ValueError(
            'A distillation token needs pooling="token" and no `representation_size`. '
            f"Received: pooling={pooling!r}, representation_size={representation_size!r}."
        )


def _check_rates(**rates):
    for name, rate in rates.items():
        if not 0 <= rate < 1:
            raise ValueError(f"`{name}` must be in [0, 1). Received: {name}={rate!r}.")


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
        # Along the channels, whatever `keras.config.image_data_format` is; arrays, as Keras takes
        # the numbers of lists through float32.
        scale=(1 / (255 * std)).reshape(1, 1, -1),
        offset=(-mean / std).reshape(1, 1, -1),
        dtype=_full_precision(),
        name="normalization",
    )


def _full_precision():
    """The dtype of pixels and logits: float32, or float64 under that policy."""
    return "float64" if keras.config.dtype_policy().variable_dtype == "float64" else "float32"


def _model_name(variant, patch_size):
    """A name that Keras and file systems take: "vit_B16" for "B/16" and its `ViTConfig`."""
    if isinstance(variant, ViTConfig):
        variant = next((name for name, config in VARIANTS.items() if config == variant), None)
        if variant is None:
            return "vit"
    width, size = variant.replace("+", "_").split("/")
    return f"vit_{width}{patch_size or size}"


def skip_unread_tokens(model):
    """The same model on the same weights, without what its output does not depend on.

    With pooling="token", only the class token (and the distillation token) of the last block are
    read: of the others it takes the keys and values alone, about 7 % less work with 12 blocks.
    Output and gradients are the same; so is the whole model with any other pooling. Layers of
    one's own may follow the model's.

    Args:
        model: A model of `build_vit`.

    Returns:
        A `keras.Model` that shares the layers of `model`.

    Raises:
        ValueError: `model` is not a model of `build_vit`, or something else in it reads the tokens
            of the last block.
    """
    arguments = vit_arguments(model)
    if arguments["pooling"] != "token":
        return model
    last_block = f"block_{arguments['variant'].depth - 1}"
    few = {}  # the tensors of fewer tokens, by id

    def call(layer, *args, **kwargs):
        if layer.name == last_block:
            kwargs["queries"] = 1 + arguments["distillation_token"]
        reads_few = any(id(x) in few for x in keras.tree.flatten((args, kwargs)))
        if reads_few and layer.name not in TOKEN_READERS:
            _refuse_reader(layer.name)
        outputs = layer(*args, **kwargs)
        if layer.name == last_block or (reads_few and layer.name == "encoder_norm"):
            few[id(outputs)] = outputs
        return outputs

    fast = keras.models.clone_model(model, clone_function=lambda layer: layer, call_function=call)
    if any(id(x) in few for x in fast.outputs):
        _refuse_reader("output")
    return fast


def _refuse_reader(name):
    raise ValueError(
        "Tokens of the last block must be read by the model's own pooling alone. "
        f"Received: a model whose {name!r} reads them too."
    )


def check_whole(model):
    """ValueError unless a model is as `build_vit` makes it, with no part and no output beside."""
    depth = vit_arguments(model)["variant"].depth
    known = {*LAYERS, *(f"block_{i}" for i in range(depth))}
    added = [
        layer.name
        for layer in model.layers
        if not isinstance(layer, keras.layers.InputLayer)
        and (layer.name not in known or _is_other_head(layer))
    ]
    if added:
        raise ValueError(
            "`model` must be as `build_vit` makes it: take that, and put the rest on it again. "
            f"Received: a model with layers of its own, {added}."
        )
    if len(model.outputs) != 1:
        raise ValueError(
            "`model` must be as `build_vit` makes it. "
            f"Received: a model with {len(model.outputs)} outputs."
        )


def _is_other_head(layer):
    """Whether a layer has the name of a dense one of the head, and computes something else."""
    activations = dict.fromkeys(("head", "head_distillation"), keras.activations.linear)
    activations["pre_logits"] = keras.activations.tanh
    if layer.name not in activations:
        return False
    is_dense = isinstance(layer, keras.layers.Dense) and layer.use_bias
    return not (is_dense and layer.activation is activations[layer.name])


def vit_arguments(model):
    """The arguments of `build_vit` that built `model`, read back from its layers.

    `build_vit(**vit_arguments(model))` is the same model with new weights; `variant` comes back as
    a `ViTConfig`, and `normalization` as `(mean, std)`.

    Args:
        model: A model of `build_vit`, also one that was saved and loaded.

    Returns:
        dict of every argument of `build_vit`.

    Raises:
        ValueError: `model` is not a model of `build_vit`.
    """
    layers = {layer.name: layer for layer in model.layers}
    dense = (layer for layer in model.layers if isinstance(layer, keras.layers.Dense))
    units = {layer.name: layer.units for layer in dense}
    if not {"patches", "patch_encoder", "block_0", "pooling"} <= set(layers):
        raise ValueError(
            "The model must be one that `keras_vit.build_vit` made. "
            f"Received: {model.name!r} with the layers {', '.join(layers)}."
        )
    patch_size = layers["patches"].patch_size
    patches = layers["patch_encoder"].get_config()
    depth = 0  # a TransformerBlock of another name is none of the model's
    while isinstance(layers.get(f"block_{depth}"), TransformerBlock):
        depth += 1
    block = layers["block_0"].get_config()
    pooling = layers["pooling"]
    stem = layers.get("stem")
    sizes = {
        "hidden_dim": patches["hidden_dim"],
        "depth": depth,
        "num_heads": block["num_heads"],
        "mlp_dim": block["mlp_dim"],
        "patch_size": patch_size,
        "head_dim": block["head_dim"],
    }
    if stem is not None:
        sizes |= {"stem_units": stem.units, "stem_width": stem.width}
    _, height, width, channels = model.input_shape
    return {
        "variant": ViTConfig(**sizes),
        "image_size": (height, width),
        "num_classes": units.get("head", 0),
        "patch_size": None,
        "channels": channels,
        "pooling": "map" if isinstance(pooling, AttentionPooling) else pooling.pooling,
        "norm_after_pooling": "pooled_norm" in layers,
        "representation_size": units.get("pre_logits"),
        "drop_path": layers[f"block_{depth - 1}"].drop_path.rate,
        "normalization": _normalization_of(layers.get("normalization")),
        "name": model.name,
        **_pick(
            patches,
            ("class_token", "distillation_token", "num_registers", "position", "patch_norm"),
        ),
        **_pick(
            block,
            ("dropout", "attention_dropout", "layer_scale", "qkv_bias", "qk_norm", "gelu")
            + ("layer_norm_epsilon",),
        ),
    }


def _pick(config, names):
    return {name: config[name] for name in names}


def _normalization_of(layer):
    """The `(mean, std)` of a normalization layer, which computes image * scale + offset."""
    if layer is None:
        return None
    scale, offset = np.ravel(layer.scale), np.ravel(layer.offset)
    std = np.round(1 / (255 * scale), 12)  # 0.229, not 0.22899999999999998
    return np.round(-offset * std, 12).tolist(), std.tolist()
