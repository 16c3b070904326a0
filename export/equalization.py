"""Exact changes of a ViT's weights that make it fit for few bits.

Each function returns a model that computes the same, of whose tensors the channels are of like
size, so that one scale for all of them costs little.
"""

import dataclasses
import math

import numpy as np
import tensorflow as tf

from .folding import Dense
from .graph import forward


@dataclasses.dataclass(frozen=True)
class Range:
    """Smallest, largest and mean value of each channel over all tokens and images, `(K,)` each."""

    low: np.ndarray
    high: np.ndarray
    mean: np.ndarray

    @property
    def size(self):
        """The largest absolute value of each channel, `(K,)`."""
        return np.maximum(np.maximum(-self.low, self.high), 1e-6)

    @property
    def middle(self):
        """Halfway between the smallest and the largest value, `(K,)`."""
        return (self.low + self.high) / 2


def output_ranges(vit, images):
    """The ranges of what comes out of every dense layer.

    Args:
        vit: a `DeployModel`.
        images: array (N, H, W, C), as `vit` takes them.

    Returns:
        Dictionary, name such as "block_3/fc1" -> `Range`, and that of "features". Of a last block
        that computes the class token alone, "q" and "kv" stand together as "qkv", like those of
        the others.
    """

    @tf.function(autograph=False)
    def statistics(image):
        seen = {}

        def observe(name, y):
            rows = tf.reshape(y, (-1, y.shape[-1]))
            seen[name] = [
                reduce(rows, 0) for reduce in (tf.reduce_min, tf.reduce_max, tf.reduce_mean)
            ]

        forward(vit, image, observe)
        return seen

    lows, highs, means = {}, {}, {}
    for image in images:
        for name, reduced in statistics(tf.constant(image[None], tf.float32)).items():
            low, high, mean = (np.float64(values) for values in reduced)
            lows[name] = np.minimum(lows.get(name, np.inf), low)
            highs[name] = np.maximum(highs.get(name, -np.inf), high)
            means[name] = means.get(name, 0) + mean / len(images)
    last = f"block_{len(vit.blocks) - 1}/"
    if last + "q" in lows:
        for of in (lows, highs, means):
            of[last + "qkv"] = np.concatenate([of.pop(last + "q"), of.pop(last + "kv")])
    return {name: Range(lows[name], highs[name], means[name]) for name in lows}


def equalize(vit, images, rounded_probabilities=False):
    """Centres and equalises the attention, and rescales the residual stream and the features.

    Args:
        vit: a `DeployModel`.
        images: array (N, H, W, C), as `vit` takes them.
        rounded_probabilities: as in `center_attention`.

    Returns:
        A `DeployModel` that computes the same.
    """
    vit = center_attention(vit, output_ranges(vit, images), rounded_probabilities)
    ranges = output_ranges(vit, images)
    vit = equalize_attention(vit, ranges)
    sizes = [ranges[name].size for name in _writers(vit)]
    # The root mean square over the layers: nearer to the sizes of most of them than the largest.
    c = np.sqrt(np.mean([(size / np.median(size)) ** 2 for size in sizes], axis=0))
    return smooth_features(rescale(vit, c), ranges["features"])


def fit_float16(vit, images, limit=64.0):
    """Makes the residual stream so small that its squares stay far below 65,504.

    Args:
        vit: a `DeployModel`.
        images: array (N, H, W, C), as `vit` takes them.
        limit: what no value of the stream is to exceed.

    Returns:
        A `DeployModel` that computes the same; `vit` itself if its stream is small enough.
    """
    ranges = output_ranges(vit, images)
    start = np.abs(np.concatenate([vit.prefix, vit.positions], axis=1)).max()
    largest = start + sum(ranges[name].size for name in ("patches", *_writers(vit))).max()
    if largest <= limit:
        return vit
    factor = 2.0 ** math.ceil(math.log2(largest / limit))
    return rescale(vit, np.full(vit.patches.bias.shape, factor))


def _writers(vit):
    """The names of the dense layers that write to the residual stream."""
    return [f"block_{i}/{name}" for i in range(len(vit.blocks)) for name in ("proj", "fc2")]


def center_attention(vit, ranges, rounded_probabilities=False):
    """Centres keys and values: softmax takes no notice of a constant that all keys have.

    softmax(q (k + a)^T) (v + b) = softmax(q k^T) v + b; b is taken off the projection's bias.

    They are centred to the middle of their range, which makes it smallest.

    Args:
        vit: a `DeployModel`.
        ranges: of `output_ranges`.
        rounded_probabilities: whether the probabilities get 8 bits, in which those that are shared
            by many tokens round to 0. What these would have added is near to a multiple of the
            mean value: to it, then, the values are centred.
    """
    blocks = []
    for i, block in enumerate(vit.blocks):
        qkv = ranges[f"block_{i}/qkv"]
        _, k, v = np.split(qkv.middle, 3)
        if rounded_probabilities:
            _, _, v = np.split(qkv.mean, 3)
        if block.key_norm is not None:  # keys that a norm is taken of count as they are
            k = np.zeros_like(k)
        center = np.concatenate([np.zeros_like(k), k, v])  # and so do queries
        blocks.append(
            dataclasses.replace(
                block,
                qkv=Dense(block.qkv.kernel, block.qkv.bias - center),
                proj=Dense(block.proj.kernel, block.proj.bias + v @ block.proj.kernel),
            )
        )
    return dataclasses.replace(vit, blocks=tuple(blocks))


def equalize_attention(vit, ranges):
    """Gives the channels of queries, keys and values one size.

    (q s) (k / s)^T = q k^T, and what the values are multiplied by the projection takes back.

    Args:
        vit: a `DeployModel`.
        ranges: of `output_ranges`.

    Source: the scales of cross-layer equalisation (arXiv 1906.04721, Section 4.1), which asks for
    equal ranges of both sides, for q and k; for v, those of the layer's largest channel.
    """
    blocks = []
    for i, block in enumerate(vit.blocks):
        q, k, v = np.split(ranges[f"block_{i}/qkv"].size, 3)
        s = np.sqrt(k / q) if block.query_norm is None else np.ones_like(q)
        t = np.max([q * s, k / s]) / v
        factor = np.concatenate([s, 1 / s, t])
        blocks.append(
            dataclasses.replace(
                block,
                qkv=Dense(block.qkv.kernel * factor, block.qkv.bias * factor),
                proj=Dense(block.proj.kernel / t[:, None], block.proj.bias),
            )
        )
    return dataclasses.replace(vit, blocks=tuple(blocks))


def rescale(vit, c):
    """Divides the residual stream by one number per channel: what writes it, and what reads it.

    A few channels of a trained ViT are tens of times as large as the others, in all blocks alike:
    with one scale for a whole tensor, the others would round to nothing.

    Args:
        vit: a `DeployModel`; it is returned as it is if its tokens are not centred.
        c: `(D,)`, positive.
    """
    if not vit.centered:
        return vit

    def write(dense):
        return Dense(dense.kernel / c, dense.bias / c)

    def read(dense):
        return Dense(c[:, None] * dense.kernel, dense.bias)

    blocks = [
        dataclasses.replace(
            block,
            qkv=read(block.qkv),
            proj=write(block.proj),
            fc1=read(block.fc1),
            fc2=write(block.fc2),
        )
        for block in vit.blocks
    ]
    return dataclasses.replace(
        vit,
        patches=write(vit.patches),
        positions=vit.positions / c,
        prefix=vit.prefix / c,
        blocks=tuple(blocks),
        stream=c,
        last_gamma=c,
    )


def smooth_features(vit, features):
    """Gives the channels of the features and of the weights that read them like sizes.

    (x / s) (s W) = x W: a few channels of a trained ViT's last norm are many times as large as
    the others.

    Args:
        vit: a `DeployModel`; it is returned as it is unless one norm and one dense layer follow
            each other behind the last block.
        features: their `Range`.

    Source: SmoothQuant (arXiv 2211.10438), Eq. 4 with alpha = 0.5.
    """
    name = "pre_logits" if vit.pre_logits is not None else "head"
    layer = getattr(vit, name)
    if layer is None or vit.pooling not in ("token", "mean", "gap") or vit.num_tokens > 1:
        return vit
    s = np.sqrt(features.size / np.maximum(np.abs(layer.kernel).max(axis=1), 1e-6))
    gamma = 1 if vit.last_gamma is None else vit.last_gamma
    layer = Dense(s[:, None] * layer.kernel, layer.bias)
    return dataclasses.replace(vit, last_gamma=gamma / s, **{name: layer})
