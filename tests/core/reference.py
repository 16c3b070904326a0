"""An independent float64 reference of the Vision Transformer's forward pass.

Written from the papers and the original code, without keras_vit, and with loops and slices where
that makes a line obviously right: what it shares with the package is the weight names only.

Sources:
    Dosovitskiy et al. 2021, arXiv 2010.11929, Eq. 1-4.
    google-research/vision_transformer, `models_vit.py` and `models_resnet.py` (the hybrid's stem).
    google-research/big_vision, `models/vit.py` (sincos2d, MAP pooling).
"""

import numpy as np
from scipy.special import erf

GROUPS = 32  # flax.linen.GroupNorm defaults
GROUP_NORM_EPSILON = 1e-6
WEIGHT_STANDARDISATION_EPSILON = 1e-5


class Weights:
    """The weights in float64; notes which were read, so that no misnamed one goes unnoticed."""

    def __init__(self, weights):
        self._values = {name: np.asarray(w, dtype=np.float64) for name, w in weights.items()}
        self._read = set()

    def __contains__(self, name):
        return name in self._values

    def __getitem__(self, name):
        self._read.add(name)
        return self._values[name]

    def check_all_read(self):
        unread = sorted(set(self._values) - self._read)
        if unread:
            raise ValueError(f"The reference has no use for these weights: {unread}")


def vit_forward(
    weights,
    images,
    *,
    patch_size,
    num_heads,
    pooling="token",
    class_token=True,
    distillation_token=False,
    num_registers=0,
    position="learned",
    gelu="erf",
    layer_norm_epsilon=1e-6,
    stem_units=None,
    normalization=None,
    return_tokens=False,
    trace=None,
):
    """Computes a Vision Transformer's logits from its weights and images.

    Layer scale, query/key norm, patch norms, qkv bias, a norm after the pooling, pre-logits and
    head are applied where the weights have them; so is a head width other than D / num_heads.

    Args:
        weights: dict of name to array, Keras' layout: Dense kernels are (in, out), qkv columns are
            q|k|v, and in each of them heads are consecutive groups of head_dim columns.
        images: (B, H, W, C).
        patch_size: int, edge of a patch, in pixels of the image or of the stem's feature map.
        num_heads: int.
        pooling: "token", "mean" (all tokens), "gap" (patch tokens only), "token+gap" (both, one
            after the other) or "map" (a probe attends to all tokens).
        class_token: bool.
        distillation_token: bool, a token after the class token; the output is then the mean of
            what the two tokens give, each by its own head.
        num_registers: int, tokens between the class token and the patches, without a position.
        position: "learned" or "sincos2d" (patches only).
        gelu: "erf" or "tanh".
        layer_norm_epsilon: float.
        stem_units: None, or the units in each stage of a ResNet stem; () is the root alone.
        normalization: None, or (mean, std) per channel, for x = (images / 255 - mean) / std.
        return_tokens: bool.
        trace: a dict to fill: "tokens" is the list of those (B, T, D) that the blocks take, and
            at its end those that the last one puts out; "attention" is the list of the blocks'
            probabilities (B, heads, T, T).

    Returns:
        logits (B, K), or the pooled features (B, D) of a model without head; with `return_tokens`,
        also the tokens (B, T, D) after the final LayerNorm: class token, registers, patches.
    """
    w = Weights(weights)
    activation = {"erf": gelu_erf, "tanh": gelu_tanh}[gelu]
    epsilon = layer_norm_epsilon
    x = np.asarray(images, dtype=np.float64)
    if normalization is not None:
        mean, std = (np.asarray(value, dtype=np.float64) for value in normalization)
        x = (x / 255.0 - mean) / std
    if stem_units is not None:
        x = resnet_stem(w, x, stem_units)

    special = int(class_token) + int(distillation_token)
    x = embed(w, x, patch_size, class_token, distillation_token, num_registers, position, epsilon)
    depth = 0
    blocks, attention = [x], []
    while f"block_{depth}/norm1/gamma" in w:
        x, a = encoder_block(w, f"block_{depth}", x, num_heads, activation, layer_norm_epsilon)
        blocks.append(x)
        attention.append(a)
        depth += 1
    if trace is not None:
        trace.update(tokens=blocks, attention=attention)
    tokens = layer_norm(w, "encoder_norm", x, epsilon) if "encoder_norm/gamma" in w else x

    if pooling == "token":
        x = tokens[:, 0]
    elif pooling == "mean":
        x = tokens.mean(axis=1)
    elif pooling == "gap":
        x = tokens[:, special + num_registers :].mean(axis=1)
    elif pooling == "token+gap":
        patches = tokens[:, special + num_registers :].mean(axis=1)
        x = np.stack([np.append(*row) for row in zip(tokens[:, 0], patches, strict=True)])
    elif pooling == "map":
        x = map_pool(w, tokens, num_heads, activation, epsilon)
    else:
        raise ValueError(f"Unknown pooling. Received: pooling={pooling!r}.")
    second = tokens[:, 1]  # the distillation token, where there is one
    if "pooled_norm/gamma" in w:
        x = layer_norm(w, "pooled_norm", x, epsilon)
        second = layer_norm(w, "pooled_norm", second, epsilon)
    if "pre_logits/kernel" in w:
        x = np.tanh(dense(w, "pre_logits", x))
    if "head/kernel" in w:
        x = dense(w, "head", x)
    if "head_distillation/kernel" in w:
        second = dense(w, "head_distillation", second)
    if distillation_token:
        x = (x + second) / 2
    w.check_all_read()
    return (x, tokens) if return_tokens else x


# Tokens


def embed(w, x, patch_size, class_token, distillation_token, num_registers, position, epsilon):
    """Eq. 1: [class; distillation; registers; patches]; learned positions on all but registers."""
    grid_height, grid_width = x.shape[1] // patch_size, x.shape[2] // patch_size
    patches = cut_patches(x, patch_size)
    if "patch_encoder/patch_norm/gamma" in w:
        patches = layer_norm(w, "patch_encoder/patch_norm", patches, epsilon)
    patches = dense(w, "patch_encoder/projection", patches)  # B, N, D
    if "patch_encoder/projection_norm/gamma" in w:
        patches = layer_norm(w, "patch_encoder/projection_norm", patches, epsilon)
    batch, _, dim = patches.shape
    special = ["class_token"] * class_token + ["distillation_token"] * distillation_token
    places = np.zeros((len(special), dim))
    if position == "learned":
        table = w["patch_encoder/position_embedding"]
        length = grid_height * grid_width + len(special)
        check_shape("position_embedding", table, (1, length, dim))
        places, table = table[0, : len(special)], table[0, len(special) :]
    elif position == "sincos2d":
        table = sincos2d(grid_height, grid_width, dim)
    else:
        raise ValueError(f"Unknown position. Received: position={position!r}.")

    sequences = []
    for b in range(batch):
        rows = []
        for token, place in zip(special, places, strict=True):
            check_shape(token, w[f"patch_encoder/{token}"], (1, 1, dim))
            rows.append(w[f"patch_encoder/{token}"][0, 0] + place)
        if num_registers:
            check_shape("registers", w["patch_encoder/registers"], (1, num_registers, dim))
        for r in range(num_registers):
            rows.append(w["patch_encoder/registers"][0, r])
        for n in range(len(table)):
            rows.append(patches[b, n] + table[n])
        sequences.append(np.stack(rows))
    return np.stack(sequences)


def cut_patches(x, patch_size):
    """(B, H, W, C) to (B, N, P * P * C): patches row by row, each as (row, column, channel)."""
    _, height, width, _ = x.shape
    if height % patch_size or width % patch_size:
        raise ValueError(f"{height} x {width} cannot be cut into patches of {patch_size}.")
    patches = []
    for top in range(0, height, patch_size):
        for left in range(0, width, patch_size):
            patch = x[:, top : top + patch_size, left : left + patch_size, :]
            patches.append(patch.reshape(len(x), -1))
    return np.stack(patches, axis=1)


def sincos2d(grid_height, grid_width, dim):
    """[sin x, cos x, sin y, cos y] at dim / 4 frequencies; x is the column, y the row."""
    quarter = dim // 4
    table = np.zeros((grid_height * grid_width, dim))
    for row in range(grid_height):
        for column in range(grid_width):
            for i in range(quarter):
                omega = 1.0 / 10000.0 ** (i / (quarter - 1))
                entry = table[row * grid_width + column]
                entry[i] = np.sin(column * omega)
                entry[quarter + i] = np.cos(column * omega)
                entry[2 * quarter + i] = np.sin(row * omega)
                entry[3 * quarter + i] = np.cos(row * omega)
    return table


# Encoder


def encoder_block(w, name, x, num_heads, activation, epsilon):
    """Eq. 2 and 3, each branch multiplied by its layer scale where there is one; and A."""
    y = layer_norm(w, f"{name}/norm1", x, epsilon)
    y, attention = self_attention(w, f"{name}/attention", y, num_heads, epsilon)
    if f"{name}/layer_scale1/gamma" in w:
        y = y * w[f"{name}/layer_scale1/gamma"]
    x = x + y
    y = layer_norm(w, f"{name}/norm2", x, epsilon)
    y = feed_forward(w, f"{name}/feed_forward", y, activation)
    if f"{name}/layer_scale2/gamma" in w:
        y = y * w[f"{name}/layer_scale2/gamma"]
    return x + y, attention


def self_attention(w, name, x, num_heads, epsilon):
    qkv = dense(w, f"{name}/qkv", x)  # B, T, 3 * heads * head_dim
    dim = qkv.shape[-1] // 3
    query, key, value = qkv[..., :dim], qkv[..., dim : 2 * dim], qkv[..., 2 * dim :]
    return attend(w, name, query, key, value, num_heads, epsilon)


def attend(w, name, query, key, value, num_heads, epsilon):
    """A v, A = softmax(q k^T / sqrt(head_dim)), by image and by head, then projected; and A."""
    batch, _, dim = query.shape
    if dim % num_heads:
        raise ValueError(f"{dim} is not divisible by num_heads={num_heads}.")
    head_dim = dim // num_heads
    out = np.full(query.shape, np.nan)
    attention = np.full((batch, num_heads, query.shape[1], key.shape[1]), np.nan)
    for b in range(batch):
        for head in range(num_heads):
            columns = slice(head * head_dim, (head + 1) * head_dim)
            q, k, v = query[b, :, columns], key[b, :, columns], value[b, :, columns]  # T, head_dim
            if f"{name}/query_norm/gamma" in w:
                q = layer_norm(w, f"{name}/query_norm", q, epsilon)
            if f"{name}/key_norm/gamma" in w:
                k = layer_norm(w, f"{name}/key_norm", k, epsilon)
            scores = q @ k.T / np.sqrt(head_dim)
            exponentials = np.exp(scores - scores.max(axis=1, keepdims=True))
            attention[b, head] = exponentials / exponentials.sum(axis=1, keepdims=True)
            out[b, :, columns] = attention[b, head] @ v
    return dense(w, f"{name}/proj", out), attention


def map_pool(w, tokens, num_heads, activation, epsilon):
    """big_vision's MAPHead: a probe attends to all tokens, then a residual LayerNorm and MLP."""
    batch, _, dim = tokens.shape
    probe = np.stack([w["pooling/probe"][0]] * batch)  # B, 1, D
    query = dense(w, "pooling/query", probe)
    key_value = dense(w, "pooling/key_value", tokens)  # B, T, 2 * D
    key, value = key_value[..., :dim], key_value[..., dim:]
    y, _ = attend(w, "pooling", query, key, value, num_heads, epsilon)
    normed = layer_norm(w, "pooling/norm", y, epsilon)
    return (y + feed_forward(w, "pooling/feed_forward", normed, activation))[:, 0]


def feed_forward(w, name, x, activation):
    return dense(w, f"{name}/fc2", activation(dense(w, f"{name}/fc1", x)))


def dense(w, name, x):
    y = x @ w[f"{name}/kernel"]
    if name.endswith("qkv") and f"{name}/bias" not in w:
        return y
    return y + w[f"{name}/bias"]


def layer_norm(w, name, x, epsilon):
    mean = x.mean(axis=-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(axis=-1, keepdims=True)
    return (x - mean) / np.sqrt(variance + epsilon) * w[f"{name}/gamma"] + w[f"{name}/beta"]


def gelu_erf(x):
    return 0.5 * x * (1.0 + erf(x / np.sqrt(2.0)))


def gelu_tanh(x):
    return 0.5 * x * (1.0 + np.tanh(np.sqrt(2.0 / np.pi) * (x + 0.044715 * x**3)))


# ResNet stem of the hybrids


def resnet_stem(w, x, stem_units):
    """A hybrid's ResNet: root, max pool, stages; each stage but the first halves the grid."""
    x = conv_group_norm(w, "stem", "root", x, stride=2)
    x = max_pool(relu(x))
    features = x.shape[-1]
    for stage, units in enumerate(stem_units, start=1):
        for unit in range(1, units + 1):
            stride = 2 if stage > 1 and unit == 1 else 1
            x = residual_unit(w, f"stem/block{stage}_unit{unit}", x, features, stride)
        features = 2 * features
    return x


def residual_unit(w, name, x, features, stride):
    """1 x 1, 3 x 3 (strided), 1 x 1 convolutions; the last ReLU comes after the sum."""
    shortcut = x
    if stride != 1 or x.shape[-1] != 4 * features:
        shortcut = conv_group_norm(w, name, "proj", x, stride, joint="_")
    y = relu(conv_group_norm(w, name, "1", x, 1, joint=""))
    y = relu(conv_group_norm(w, name, "2", y, stride, joint=""))
    y = conv_group_norm(w, name, "3", y, 1, joint="")
    check_shape(f"{name} output", y, (*shortcut.shape[:3], 4 * features))
    return relu(shortcut + y)


def conv_group_norm(w, name, suffix, x, stride, joint="_"):
    kernel = w[f"{name}/conv{joint}{suffix}/kernel"]
    # np.std is biased, and the epsilon is added to the deviation, not to the variance.
    kernel = kernel - kernel.mean(axis=(0, 1, 2))
    kernel = kernel / (kernel.std(axis=(0, 1, 2)) + WEIGHT_STANDARDISATION_EPSILON)
    norm = f"{name}/gn{joint}{suffix}"
    return group_norm(convolve(x, kernel, stride), w[f"{norm}/gamma"], w[f"{norm}/beta"])


def group_norm(x, gamma, beta):
    """Normalises each image over the grid and one group of consecutive channels at a time."""
    batch, _, _, channels = x.shape
    if channels % GROUPS:
        raise ValueError(f"{channels} channels cannot be split into {GROUPS} groups.")
    size = channels // GROUPS
    out = np.full(x.shape, np.nan)
    for b in range(batch):
        for group in range(GROUPS):
            members = slice(group * size, (group + 1) * size)
            values = x[b, :, :, members]
            centred = values - values.mean()
            variance = (centred**2).mean()
            out[b, :, :, members] = centred / np.sqrt(variance + GROUP_NORM_EPSILON)
    return out * gamma + beta


def convolve(x, kernel, stride):
    """Convolution with TensorFlow's 'SAME' padding, one output position at a time."""
    size_y, size_x, _, filters = kernel.shape
    padded, out_height, out_width = pad_same(x, size_y, size_x, stride, 0.0)
    out = np.full((len(x), out_height, out_width, filters), np.nan)
    for row in range(out_height):
        for column in range(out_width):
            top, left = row * stride, column * stride
            window = padded[:, top : top + size_y, left : left + size_x, :]
            out[:, row, column, :] = np.tensordot(window, kernel, axes=3)
    return out


def max_pool(x, size=3, stride=2):
    padded, out_height, out_width = pad_same(x, size, size, stride, -np.inf)
    out = np.full((len(x), out_height, out_width, x.shape[-1]), np.nan)
    for row in range(out_height):
        for column in range(out_width):
            top, left = row * stride, column * stride
            window = padded[:, top : top + size, left : left + size, :]
            out[:, row, column, :] = window.max(axis=(1, 2))
    return out


def pad_same(x, size_y, size_x, stride, fill):
    """Pads for ceil(length / stride) outputs; of an odd padding the end gets one more."""
    outputs, pads = [], []
    for length, size in ((x.shape[1], size_y), (x.shape[2], size_x)):
        count = -(-length // stride)
        total = max((count - 1) * stride + size - length, 0)
        outputs.append(count)
        pads.append((total // 2, total - total // 2))
    return np.pad(x, ((0, 0), *pads, (0, 0)), constant_values=fill), *outputs


def relu(x):
    return np.maximum(x, 0.0)


def check_shape(what, array, shape):
    if array.shape != shape:
        raise ValueError(f"{what} should have the shape {shape}. Received: {array.shape}.")
