"""The weights of a ViT for the deploy graph: folded once, in float64.

What is folded, exactly: the normalisation of the pixels into the patch projection; the bias of the
projection and the positions into one constant, the class token with its position (and the
distillation and register tokens) into another; the scale and offset of every LayerNorm into the
dense layer that follows; 1/sqrt(d) into the queries; the query of attention pooling into its keys;
LayerScale into the dense layer before it; the mean of two heads into one. Whatever is added to the
residual stream is centred, W (I - 1 1^T / D), so that the mean that a LayerNorm takes off is always
0 and need not be computed.
"""

import dataclasses

import keras
import numpy as np

from keras_vit.model import vit_arguments


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """y = x W + b: W `(K, M)`, b `(M,)`."""

    kernel: np.ndarray
    bias: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Affine:
    """y = x * gamma + beta, each `(D,)`."""

    gamma: np.ndarray
    beta: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Block:
    """A Transformer block, whose norms have no scale and offset."""

    qkv: Dense
    proj: Dense
    fc1: Dense
    fc2: Dense
    query_norm: Affine | None = None
    key_norm: Affine | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class AttentionPool:
    """MAP: softmax over the tokens of one score per head, the values of all, and an MLP."""

    scores: Dense  # (D, h)
    values: Dense
    proj: Dense
    fc1: Dense
    fc2: Dense


@dataclasses.dataclass(frozen=True, eq=False)
class Conv:
    """A convolution without bias, then GroupNorm: kernel `(P, P, C, C')`, stride, gamma, beta."""

    kernel: np.ndarray
    strides: int
    norm: Affine


@dataclasses.dataclass(frozen=True, eq=False)
class Bottleneck:
    """A unit of the stem: three convolutions and, where the shape changes, one for the shortcut."""

    convs: tuple
    shortcut: Conv | None


@dataclasses.dataclass(frozen=True, eq=False)
class DeployModel:
    """The folded weights of a ViT, NumPy arrays of float64.

    Attributes:
        image_shape: (H, W, C).
        pixels: the normalisation where it cannot be folded, or None.
        stem: root `Conv` and a tuple of `Bottleneck`, or None.
        patch_size: side P of a patch.
        patch_norm: whether patches are normalised before and after the projection.
        patches: the projection.
        projection_gamma: scale of the norm after the projection `(D,)`, or None.
        positions: bias and positions of the patches `(1, N, D)`.
        prefix: tokens before the patches with their positions `(1, T, D)`; T may be 0.
        blocks: tuple of `Block`.
        num_heads: heads h of a block.
        gelu: "erf" or "tanh".
        epsilon: of every norm.
        pooling: as in `build_vit`.
        centered: whether the mean of every token is 0.
        stream: what the tokens are divided by, channel by channel `(D,)`, or None; see `rescale`.
        float_norms: whether the norms compute in float.
        float_weights: whether the weights stay in float32, and are cut for the cache of a CPU.
        last_gamma: what the last norm is multiplied by, channel by channel `(D,)`, or None.
        num_tokens: class and distillation tokens that are read, with pooling "token".
        norm_after_pooling: as in `build_vit`.
        attention_pool: of pooling "map", or None.
        features: scale and offset of the last norm, where no dense layer takes them, or None.
        pre_logits: a tanh layer, or None.
        head: the last dense layer, or None.
        activation: of the head, a Keras activation, or None.
    """

    image_shape: tuple
    pixels: Affine | None
    stem: tuple | None
    patch_size: int
    patch_norm: bool
    patches: Dense
    projection_gamma: np.ndarray | None
    positions: np.ndarray
    prefix: np.ndarray
    blocks: tuple
    num_heads: int
    gelu: str
    epsilon: float
    pooling: str
    centered: bool
    stream: np.ndarray | None
    float_norms: bool
    float_weights: bool
    last_gamma: np.ndarray | None
    num_tokens: int
    norm_after_pooling: bool
    attention_pool: AttentionPool | None
    features: Affine | None
    pre_logits: Dense | None
    head: Dense | None
    activation: object


def fold(model, head=True):
    """Folds the weights of a model.

    Args:
        model: a model of `build_vit`.
        head: whether its `pre_logits` and head belong to the graph; without, the graph ends with
            the pooled features.

    Returns:
        A `DeployModel`.

    Raises:
        ValueError: if `model` is not a model of `build_vit`.
    """
    arguments = vit_arguments(model)
    layers = {layer.name: layer for layer in model.layers}
    config = arguments["variant"]
    encoder = layers["patch_encoder"]
    stem = _fold_stem(layers["stem"]) if "stem" in layers else None
    pixels = _pixels(layers.get("normalization"), arguments["channels"])
    patches = _dense(encoder.projection)
    if stem is None and not arguments["patch_norm"] and pixels is not None:
        area = config.patch_size**2
        patches = _after_affine(patches, np.tile(pixels.gamma, area), np.tile(pixels.beta, area))
        pixels = None
    if arguments["patch_norm"]:
        patches = _after_affine(patches, *_gamma_beta(encoder.patch_norm))
    gamma, offset, patches = _projected(encoder, patches, arguments["patch_norm"])
    prefix, positions = _positions(encoder, config.hidden_dim)
    rows = layers["patch_encoder"].output.shape[1] - prefix.shape[1]
    last_norm = layers["pooled_norm" if arguments["norm_after_pooling"] else "encoder_norm"]
    ending = _ending(layers, arguments, last_norm, head)
    vit = DeployModel(
        image_shape=tuple(model.input_shape[1:]),
        pixels=pixels,
        stem=stem,
        patch_size=config.patch_size,
        patch_norm=arguments["patch_norm"],
        patches=patches,
        projection_gamma=gamma,
        positions=np.broadcast_to(positions + offset, (1, rows, config.hidden_dim)),
        prefix=prefix,
        blocks=tuple(_fold_block(layers[f"block_{i}"]) for i in range(config.depth)),
        num_heads=config.num_heads,
        gelu=arguments["gelu"],
        epsilon=arguments["layer_norm_epsilon"],
        pooling=arguments["pooling"],
        num_tokens=1 + arguments["distillation_token"],
        centered=False,
        stream=None,
        float_norms=True,
        float_weights=False,
        last_gamma=None,
        norm_after_pooling=arguments["norm_after_pooling"],
        **ending,
    )
    # Where something else than a norm over D writes or reads the tokens, their mean counts.
    read_as_they_are = vit.norm_after_pooling and vit.pooling in ("map", "token+gap")
    return vit if vit.patch_norm or read_as_they_are else _center(vit)


def _center(vit):
    """The same model, of whose tokens each has the mean 0."""

    def center(x):
        return x - x.mean(axis=-1, keepdims=True)

    def center_dense(dense):
        return Dense(center(dense.kernel), center(dense.bias))

    blocks = [
        dataclasses.replace(block, proj=center_dense(block.proj), fc2=center_dense(block.fc2))
        for block in vit.blocks
    ]
    return dataclasses.replace(
        vit,
        patches=center_dense(vit.patches),
        positions=center(vit.positions),
        prefix=center(vit.prefix),
        blocks=tuple(blocks),
        centered=True,
    )


def _array(variable):
    return np.asarray(keras.ops.convert_to_numpy(variable), "float64")


def _dense(layer):
    kernel = _array(layer.kernel)
    bias = _array(layer.bias) if layer.use_bias else np.zeros(kernel.shape[1])
    return Dense(kernel, bias)


def _gamma_beta(norm):
    return _array(norm.gamma), _array(norm.beta)


def _after_affine(dense, gamma, beta):
    """The dense layer of x that equals `dense` of x * gamma + beta."""
    return Dense(gamma[:, None] * dense.kernel, dense.bias + beta @ dense.kernel)


def _times(dense, factor):
    """The dense layer whose outputs are `factor` times as large; `factor` `(M,)` or a number."""
    return Dense(dense.kernel * factor, dense.bias * factor)


def _pixels(normalization, channels):
    """The normalisation of the pixels as an `Affine` of C channels."""
    if normalization is None:
        return None
    scale, offset = (
        np.broadcast_to(np.ravel(values).astype("float64"), (channels,))
        for values in (normalization.scale, normalization.offset)
    )
    return Affine(scale, offset)


def _projected(encoder, patches, patch_norm):
    """What stands between the projection's product and the positions: gamma, the offset, E."""
    if patch_norm:  # the bias comes before the norm
        return *_gamma_beta(encoder.projection_norm), patches
    return None, patches.bias, Dense(patches.kernel, np.zeros_like(patches.bias))


def _positions(encoder, hidden_dim):
    """The tokens before the patches `(1, T, D)` and the positions of the patches `(1, N, D)`."""
    names = ["class_token"] * encoder.use_class_token
    names += ["distillation_token"] * encoder.use_distillation_token
    prefix = [_array(getattr(encoder, name)) for name in names]
    if encoder.position == "learned":
        table = _array(encoder.position_embedding)
        prefix = [token + table[:, i : i + 1] for i, token in enumerate(prefix)]
        positions = table[:, len(prefix) :]
    else:
        positions = np.asarray(encoder._sincos, "float64")
    if encoder.num_registers:
        prefix.append(_array(encoder.registers))
    return np.concatenate([np.zeros((1, 0, hidden_dim)), *prefix], axis=1), positions


def _fold_block(block):
    """Folds the norms, 1/sqrt(d) and LayerScale of a `TransformerBlock`."""
    attention, mlp = block.attention, block.feed_forward
    qkv = _after_affine(_dense(attention.qkv), *_gamma_beta(block.norm1))
    inner_dim = qkv.bias.size // 3
    root = (inner_dim // attention.num_heads) ** -0.5
    norms = {}
    if attention.qk_norm:
        gamma, beta = _gamma_beta(attention.query_norm)
        norms["query_norm"] = Affine(gamma * root, beta * root)
        norms["key_norm"] = Affine(*_gamma_beta(attention.key_norm))
    else:
        qkv = _times(qkv, np.repeat([root, 1.0, 1.0], inner_dim))
    scales = [
        1.0 if block.layer_scale is None else _array(layer.gamma)
        for layer in (block.layer_scale1, block.layer_scale2)
    ]
    return Block(
        qkv=qkv,
        proj=_times(_dense(attention.proj), scales[0]),
        fc1=_after_affine(_dense(mlp.fc1), *_gamma_beta(block.norm2)),
        fc2=_times(_dense(mlp.fc2), scales[1]),
        **norms,
    )


def _ending(layers, arguments, last_norm, head):
    """From the last norm on: the pooling by attention, the features and the head."""
    gamma, beta = _gamma_beta(last_norm)
    ending = dict.fromkeys(("attention_pool", "features", "pre_logits", "head", "activation"))
    if arguments["pooling"] == "map":
        norm_first = not arguments["norm_after_pooling"]
        affine = (gamma, beta) if norm_first else (np.ones_like(gamma), np.zeros_like(beta))
        ending["attention_pool"] = _fold_attention_pool(layers["pooling"], *affine)
        if norm_first:
            gamma, beta = None, None  # the features are the pool's
    elif arguments["pooling"] == "token+gap" and not arguments["norm_after_pooling"]:
        gamma, beta = np.tile(gamma, 2), np.tile(beta, 2)
    heads = [layers[name] for name in ("head", "head_distillation") if name in layers and head]
    first = "pre_logits" if head and "pre_logits" in layers else "head" if heads else None
    if first is None:
        ending["features"] = None if gamma is None else Affine(gamma, beta)
        return ending
    denses = [_dense(layers["pre_logits"])] if first == "pre_logits" else list(map(_dense, heads))
    if gamma is not None:
        denses = [_after_affine(dense, gamma, beta) for dense in denses]
    ending[first] = _mean(denses)
    if first == "pre_logits" and heads:
        ending["head"] = _dense(heads[0])
    if heads and heads[0].activation is not keras.activations.linear:
        ending["activation"] = heads[0].activation
    return ending


def _mean(denses):
    """The dense layer of [x_1; x_2] that is the mean of those of x_1 and of x_2."""
    count = len(denses)
    kernel = np.concatenate([dense.kernel for dense in denses]) / count
    return Dense(kernel, sum(dense.bias for dense in denses) / count)


def _fold_attention_pool(pool, gamma, beta):
    query, key_value = _dense(pool.query), _dense(pool.key_value)
    heads, width = pool.num_heads, query.bias.size
    head_dim = width // heads
    q = (_array(pool.probe)[0] @ query.kernel + query.bias) * head_dim**-0.5  # (1, h d)
    # (x W + b) q^T = x (W q^T) + b q^T, of which softmax drops what is the same for all tokens.
    keys = key_value.kernel[:, :width] * q
    scores = keys.reshape(width, heads, head_dim).sum(axis=-1)
    values = Dense(key_value.kernel[:, width:], key_value.bias[width:])
    return AttentionPool(
        scores=Dense(gamma[:, None] * scores, np.zeros(heads)),
        values=_after_affine(values, gamma, beta),
        proj=_dense(pool.proj),
        fc1=_after_affine(_dense(pool.feed_forward.fc1), *_gamma_beta(pool.norm)),
        fc2=_dense(pool.feed_forward.fc2),
    )


def _fold_stem(stem):
    units = tuple(
        Bottleneck(
            convs=tuple(
                _fold_conv(getattr(unit, f"conv{i}"), getattr(unit, f"gn{i}")) for i in (1, 2, 3)
            ),
            shortcut=_fold_conv(unit.conv_proj, unit.gn_proj) if unit.projects else None,
        )
        for unit in stem.stages
    )
    return _fold_conv(stem.conv_root, stem.gn_root), units


def _fold_conv(conv, norm):
    """A standardised kernel and the norm after it; see `keras_vit.hybrid.StandardizedConv2D`."""
    kernel = _array(conv.kernel)
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = kernel / (kernel.std(axis=(0, 1, 2)) + 1e-5)
    return Conv(kernel, conv.strides[0], Affine(*_gamma_beta(norm)))
