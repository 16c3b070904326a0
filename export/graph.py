"""The deploy graph: a second forward of a ViT, for one image, in the operations a phone runs well.

It is independent of the layers of `keras_vit`: their weights are folded (see `folding.py`), and
what is left is written in plain TensorFlow, so that the two forwards check each other. Shapes are
those of one image: x `(1, N, D)`, never of a rank above 4. With a class token as the output, the
last block computes no other row.
"""

import numpy as np
import tensorflow as tf

from .folding import Dense

# The largest number of weights of a layer of the MLP, 0.6 MB in float32; qkv is cut in three above
# it. A product reads its weights again for every few tokens, slowly from beyond a core's cache.
CACHE = 150_000
LANES = 64  # the outputs of a piece are a multiple


def _ignore(name, y):
    """What `forward` calls when nobody observes."""


def forward(vit, images, observe=_ignore):
    """The forward pass of one image.

    Args:
        vit: a `DeployModel`.
        images: float32 tensor (1, H, W, C).
        observe: function (name, y) that is called with the output y `(..., M)` of every dense
            layer, such as "block_3/fc1", and with the pooled "features"; of the pieces of a model
            with `float_weights`, with each.

    Returns:
        The output of the head, after its activation, `(1, classes)`; without a head, the features.
    """
    dense = _dense_by(observe)
    x = _tokens(vit, images, dense)
    for i, block in enumerate(vit.blocks):
        only_class = vit.pooling == "token" and i == len(vit.blocks) - 1
        with tf.name_scope(f"block_{i}"):
            x = _block(vit, block, x, vit.num_tokens if only_class else None, dense, f"block_{i}")
    x = _pool(vit, x, dense)  # (1, D)
    if vit.features is not None:
        x = _affine(x, vit.features)
    observe("features", x)
    if vit.pre_logits is not None:
        x = tf.tanh(dense("pre_logits", vit.pre_logits, x))
    if vit.head is not None:
        x = dense("head", vit.head, x)
    return x if vit.activation is None else vit.activation(x)


def _constant(array):
    return tf.constant(array, tf.float32)


def _dense_by(observe):
    def dense(name, layer, x):
        with tf.name_scope(name.rpartition("/")[2]):
            y = tf.matmul(x, _constant(layer.kernel))
            if layer.bias.any():
                y = y + _constant(layer.bias)
            observe(name, y)
            return y

    return dense


def _affine(x, affine):
    return x * _constant(affine.gamma) + _constant(affine.beta)


def _norm(x, epsilon):
    """(x - mean) / sqrt(var + epsilon) over the last axis."""
    d = x - tf.reduce_mean(x, -1, keepdims=True)
    return d * tf.math.rsqrt(tf.reduce_mean(d * d, -1, keepdims=True) + epsilon)


def _token_norm(vit, x, gamma=None):
    """The norm of tokens, which are divided by `vit.stream`, as the result is; times `gamma`."""
    d = x if vit.centered else x - tf.reduce_mean(x, -1, keepdims=True)
    inverse_deviation = tf.math.rsqrt(_mean_square(vit, d) + _constant(np.array([vit.epsilon])))
    # In this order: the converter would move a constant factor of the result into the weights of
    # the dense layer that reads it, and with it the sizes of the channels that it evens out.
    return (d if gamma is None else d * _constant(gamma)) * inverse_deviation


def _first_norm(vit, x):
    """The norm before the first block."""
    prefix = vit.prefix.shape[1]
    if vit.float_norms or not prefix:
        return _token_norm(vit, x)
    # The class token has not met the image yet: its norm is a constant. Often it is much smaller
    # than the patches, and an integer 1 / sqrt is far off in the lowest hundredth of its range.
    patches = tf.slice(x, (0, prefix, 0), (1, x.shape[1] - prefix, x.shape[2]))
    return tf.concat([_token_norm(vit, _constant(vit.prefix)), _token_norm(vit, patches)], axis=1)


def _mean_square(vit, d):
    if vit.stream is not None and vit.float_norms:
        # The quickest way; as 8-bit weights, the smaller squares of the stream would be 0.
        with tf.name_scope("mean_square"):
            return tf.matmul(d * d, _constant(vit.stream[:, None] ** 2 / vit.stream.size))
    if vit.stream is not None:
        d = d * _constant(vit.stream)
    return tf.reduce_mean(d * d, -1, keepdims=True)


def _last_norm(vit, x):
    """The norm of tokens or of what was pooled of them, as the head reads it."""
    return _token_norm(vit, x, vit.last_gamma)


def _tokens(vit, images, dense):
    """Eq. 1: images -> `(1, T + N, D)`."""
    x = images
    if vit.pixels is not None:
        x = _affine(x, vit.pixels)
    if vit.stem is not None:
        with tf.name_scope("stem"):
            x = _stem(x, *vit.stem)
    x = _patches(x, vit.patch_size)
    if vit.patch_norm:
        x = dense("patches", vit.patches, _norm(x, vit.epsilon))
        x = _norm(x, vit.epsilon) * _constant(vit.projection_gamma)
    else:
        x = dense("patches", vit.patches, x)
    x = x + _constant(vit.positions)
    if vit.prefix.shape[1]:
        x = tf.concat([_constant(vit.prefix), x], axis=1)
    return x


def _patches(x, patch_size):
    """`(1, H, W, C)` -> `(1, N, P * P * C)`."""
    _, height, width, channels = x.shape
    p = patch_size
    x = tf.reshape(x, (height // p, p, width // p, p * channels))
    x = tf.transpose(x, (0, 2, 1, 3))
    return tf.reshape(x, (1, (height // p) * (width // p), p * p * channels))


def _heads(x, count):
    """`(1, N, count * d)` -> `(1, count, N, d)`."""
    _, tokens, width = x.shape
    return tf.transpose(tf.reshape(x, (1, tokens, count, width // count)), (0, 2, 1, 3))


def _attend(q, k, v):
    """softmax(q k^T) v with scaled queries: `(1, h, M, d)`, `(1, h, N, d)` -> `(1, M, h * d)`."""
    with tf.name_scope("probabilities"):
        probabilities = tf.nn.softmax(tf.matmul(q, k, transpose_b=True))
    return _weigh(probabilities, v)


def _weigh(probabilities, v):
    """A v: `(1, h, M, N)`, `(1, h, N, d)` -> `(1, M, h * d)`."""
    _, heads, queries, _ = probabilities.shape
    head_dim = v.shape[3]
    with tf.name_scope("values"):
        x = tf.matmul(probabilities, v)
        return tf.reshape(tf.transpose(x, (0, 2, 1, 3)), (1, queries, heads * head_dim))


def _block(vit, block, x, rows, dense, name):
    """Eq. 2-3; of the first `rows` tokens alone, or of all."""
    y = _first_norm(vit, x) if name == "block_0" else _token_norm(vit, x)
    q, k, v = _qkv(vit, block, y, rows, dense, name)
    if block.query_norm is not None:
        q = _affine(_norm(q, vit.epsilon), block.query_norm)
        k = _affine(_norm(k, vit.epsilon), block.key_norm)
    if rows is not None:
        x = tf.slice(x, (0, 0, 0), (1, rows, x.shape[2]))
    x = x + dense(f"{name}/proj", block.proj, _attend(q, k, v))
    y, z = _token_norm(vit, x), None
    for fc1, fc2 in _pieces(block) if vit.float_weights else [(block.fc1, block.fc2)]:
        piece = tf.nn.gelu(dense(f"{name}/fc1", fc1, y), approximate=vit.gelu == "tanh")
        piece = dense(f"{name}/fc2", fc2, piece)
        z = piece if z is None else z + piece
    return x + z


def _pieces(block):
    """The MLP as a sum of narrower ones, each layer of which is in `CACHE`."""
    hidden_dim, mlp_dim = block.fc1.kernel.shape
    count = -(-mlp_dim // max(CACHE // hidden_dim // LANES * LANES, LANES))
    width = -(-mlp_dim // count // LANES) * LANES
    for first in range(0, mlp_dim, width):
        part = slice(first, first + width)
        bias = block.fc2.bias if first == 0 else np.zeros_like(block.fc2.bias)
        yield _columns(block.fc1, part), Dense(block.fc2.kernel[part], bias)


def _columns(layer, part):
    """The part of a dense layer that gives some of its outputs."""
    return Dense(layer.kernel[:, part], layer.bias[part])


def _qkv(vit, block, y, rows, dense, name):
    """q `(1, h, M, d)`, k and v `(1, h, N, d)`."""
    heads, inner_dim = vit.num_heads, block.qkv.bias.size // 3
    if vit.float_weights and block.qkv.kernel.size > CACHE:
        asking = y if rows is None else tf.slice(y, (0, 0, 0), (1, rows, y.shape[2]))
        return [
            _heads(dense(f"{name}/{part}", _columns(block.qkv, slice(i, i + inner_dim)), x), heads)
            for part, i, x in (("q", 0, asking), ("k", inner_dim, y), ("v", 2 * inner_dim, y))
        ]
    if rows is None:
        qkv = _heads(dense(f"{name}/qkv", block.qkv, y), 3 * heads)
        return tf.split(qkv, 3, axis=1)
    asking = tf.slice(y, (0, 0, 0), (1, rows, y.shape[2]))
    q = dense(f"{name}/q", _columns(block.qkv, slice(None, inner_dim)), asking)
    kv = dense(f"{name}/kv", _columns(block.qkv, slice(inner_dim, None)), y)
    k, v = tf.split(_heads(kv, 2 * heads), 2, axis=1)
    return _heads(q, heads), k, v


def _pool(vit, x, dense):
    """The pooled features `(1, D)`; of two tokens, `(1, 2 D)`."""
    if not vit.norm_after_pooling:
        x = _last_norm(vit, x)
    _, tokens, width = x.shape
    prefix = vit.prefix.shape[1]
    if vit.pooling == "token":
        x = _tokens_read(vit, x)
    elif vit.pooling == "mean":
        x = tf.reduce_mean(x, axis=1)
    elif vit.pooling == "map":
        x = _attention_pool(vit, x, dense)
    else:
        patches = tf.slice(x, (0, prefix, 0), (1, tokens - prefix, width)) if prefix else x
        mean = tf.reduce_mean(patches, axis=1)
        if vit.pooling == "token+gap":
            token = tf.reshape(tf.slice(x, (0, 0, 0), (1, 1, width)), (1, width))
            mean = tf.concat([token, mean], axis=1)
        x = mean
    return _last_norm(vit, x) if vit.norm_after_pooling and vit.pooling != "token" else x


def _tokens_read(vit, x):
    """The class token; with a distillation token both for two heads, or their mean as features."""
    if vit.norm_after_pooling:
        x = _last_norm(vit, x)
    if vit.features is not None:
        return tf.reduce_mean(x, axis=1)
    return tf.reshape(x, (1, x.shape[1] * x.shape[2]))


def _attention_pool(vit, x, dense):
    pool = vit.attention_pool
    tokens, heads = x.shape[1], pool.scores.bias.size
    with tf.name_scope("pooling"):
        scores = tf.reshape(dense("pooling/scores", pool.scores, x), (1, tokens, 1, heads))
        v = _heads(dense("pooling/values", pool.values, x), heads)
        with tf.name_scope("probabilities"):
            probabilities = tf.nn.softmax(tf.transpose(scores, (0, 3, 2, 1)))  # (1, h, 1, N)
        y = dense("pooling/proj", pool.proj, _weigh(probabilities, v))
        z = dense("pooling/fc1", pool.fc1, _norm(y, vit.epsilon))
        z = tf.nn.gelu(z, approximate=vit.gelu == "tanh")
        y = y + dense("pooling/fc2", pool.fc2, z)
        return tf.reshape(y, (1, y.shape[2]))


def _stem(x, root, units):
    """The ResNet stem of a hybrid: `(1, H, W, C)` -> `(1, H / s, W / s, C')`."""
    x = tf.nn.max_pool2d(tf.nn.relu(_conv(x, root)), 3, 2, "SAME")
    for unit in units:
        shortcut = x if unit.shortcut is None else _conv(x, unit.shortcut)
        x = tf.nn.relu(_conv(x, unit.convs[0]))
        x = tf.nn.relu(_conv(x, unit.convs[1]))
        x = tf.nn.relu(shortcut + _conv(x, unit.convs[2]))
    return x


def _conv(x, conv, groups=32, epsilon=1e-6):
    """The convolution and its GroupNorm."""
    x = tf.nn.conv2d(x, _constant(conv.kernel), conv.strides, "SAME")
    _, height, width, channels = x.shape
    x = tf.reshape(x, (1, height * width, groups, channels // groups))
    d = x - tf.reduce_mean(x, (1, 3), keepdims=True)
    x = d * tf.math.rsqrt(tf.reduce_mean(d * d, (1, 3), keepdims=True) + epsilon)
    return _affine(tf.reshape(x, (1, height, width, channels)), conv.norm)
