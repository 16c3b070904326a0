"""MixUp and CutMix: pairs of images blended within the training step."""

import dataclasses
import math
import numbers

import keras
import tensorflow as tf

# Jöhnk's method rejects at most 21.5 % of its proposals here: all of 32 in 1 of 2e21 steps.
PROPOSALS = 32


@keras.saving.register_keras_serializable(package="keras_vit")
@dataclasses.dataclass(frozen=True)
class Mixing:
    """Blends each image with its neighbour in the batch, and their labels likewise.

    x' = w x + (1 - w) partner(x), y' = mean(w) y + (1 - mean(w)) partner(y). The weight w of a
    pixel is lambda everywhere (MixUp), or 0 in a box of the area 1 - lambda and 1 outside
    (CutMix); lambda ~ Beta(alpha, alpha). If both alphas are positive, each step does one of the
    two, chosen with equal chance.

    lambda and the box are drawn once for a step, from the seed alone, and the partner of image 2i
    is 2i + 1: the result is the same into however many parts of even size a batch is cut.

    Args:
        mixup: alpha of MixUp, at least 0; 0: none.
        cutmix: alpha of CutMix, at least 0; 0: none.

    Raises:
        ValueError: An alpha is not a number of at least 0.

    Source: MixUp, arXiv 1710.09412, Section 2; CutMix, arXiv 1905.04899, Section 3.1, with lambda
    corrected to the area of the box within the image as in the authors' code. One draw a batch
    and the choice between the two are those of DeiT (arXiv 2012.12877). They take the
    partner from the reversed or permuted batch instead of the pair.
    """

    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            alpha = getattr(self, name)
            if not isinstance(alpha, numbers.Real) or not 0 <= alpha < math.inf:
                raise ValueError(
                    f"`{name}` must be a number of at least 0. Received: {name}={alpha!r}."
                )

    def __call__(self, images, labels, seed):
        """Blends a batch, or an even part of it.

        Args:
            images: `(B, H, W, C)` of any dtype, H and W known. B is even; where the graph does not
                know it, as of a last batch of any size, an odd last image stays as it is.
            labels: One-hot or soft labels `(B, K)`.
            seed: int32, int64 or uint32 tensor `(2,)`, the same for all parts of a batch.

        Returns:
            float32 images `(B, H, W, C)` and labels `(B, K)`.

        Raises:
            ValueError: B is odd, or the labels are the numbers of classes.
        """
        if images.shape[0] is not None and images.shape[0] % 2:
            raise ValueError(
                "MixUp and CutMix blend pairs of neighbours: the batch, or each part of it, must "
                f"be of an even number of images. Received: images of shape {images.shape}."
            )
        labels = tf.convert_to_tensor(labels)
        numbers_of_classes = labels.dtype.is_integer and labels.shape[-1:] == [1]
        if labels.shape.rank not in (None, 2) or numbers_of_classes:
            # Their blend would be the number of a third class.
            raise ValueError(
                "MixUp and CutMix blend labels, which must be one-hot or soft, of shape (B, K), "
                "with a loss such as keras.losses.CategoricalCrossentropy: pass "
                "keras.utils.to_categorical(labels, K), or tf.one_hot(labels, K) in a dataset. "
                f"Received: labels of shape {labels.shape} and dtype {labels.dtype.name}."
            )
        images, labels = tf.cast(images, tf.float32), tf.cast(labels, tf.float32)
        if not (self.mixup or self.cutmix):
            return images, labels
        weights, share = self._weights(images.shape[1], images.shape[2], seed)
        return (
            weights * images + (1 - weights) * _partners(images),
            share * labels + (1 - share) * _partners(labels),
        )

    def _weights(self, height, width, seed):
        """The weights of an image's pixels, `(H, W, 1)` or a scalar, and their mean."""
        draws = _uniform(3 + 2 * PROPOSALS, seed)
        choice, center, draws = draws[0], draws[1:3], draws[3:]
        if not self.cutmix:
            share = _beta(self.mixup, draws)
            return share, share
        box = _box_weights(_beta(self.cutmix, draws), center, height, width)
        if not self.mixup:
            return box, tf.reduce_mean(box)
        share = _beta(self.mixup, draws)
        return (
            tf.where(choice < 0.5, share, box),
            tf.where(choice < 0.5, share, tf.reduce_mean(box)),
        )

    def get_config(self):
        """The arguments, as Keras saves them."""
        return dataclasses.asdict(self)

    @classmethod
    def from_config(cls, config):
        """The mixing of a `get_config`."""
        return cls(**config)


def _partners(values):
    """The rows `(B, ...)`, swapped within the pairs (0, 1), (2, 3), ...; not an odd last one."""
    rows = tf.shape(values)[0]
    even = values[: rows - rows % 2]
    pairs = tf.reverse(tf.reshape(even, (-1, 2, *values.shape[1:])), (1,))
    return tf.concat([tf.reshape(pairs, tf.shape(even)), values[rows - rows % 2 :]], axis=0)


def _uniform(count, seed):
    """Uniform numbers in (0, 1), `(count,)`.

    Of whole numbers, since XLA makes other floats of the same bits than TensorFlow without it.
    """
    if seed.dtype == tf.uint32:
        seed = tf.bitcast(seed, tf.int32)
    bits = tf.random.stateless_uniform(
        (count,), seed, minval=None, maxval=None, dtype=tf.uint32, alg="philox"
    )
    whole = tf.cast(tf.bitwise.right_shift(bits, tf.constant(9, tf.uint32)), tf.float32)
    return (whole + 0.5) * 2**-23


def _beta(alpha, draws):
    """A number from Beta(alpha, alpha), of uniform numbers in (0, 1), `(2 * PROPOSALS,)`.

    Exact without a loop, which would cost more than the rest of the step on a GPU.

    Source: alpha > 1/2: Ulrich, "Computer generation of distributions on the m-sphere", Applied
    Statistics 33 (1984), for m = 2 alpha + 1; else Jöhnk, Metrika 8 (1964), in logarithms: of
    U^(1 / alpha) and V^(1 / alpha) whose sum is at most 1, the share of the first.
    """
    u, v = draws[:PROPOSALS], draws[PROPOSALS:]
    if alpha > 0.5:
        radius = tf.sqrt(1 - u[0] ** (2 / (2 * alpha - 1)))
        return (1 + radius * tf.cos(2 * math.pi * v[0])) / 2
    log_x, log_y = tf.math.log(u) / alpha, tf.math.log(v) / alpha
    larger = tf.maximum(log_x, log_y)
    accepted = larger + tf.math.log1p(tf.exp(-tf.abs(log_x - log_y))) <= 0
    return tf.gather(tf.sigmoid(log_x - log_y), tf.argmax(tf.cast(accepted, tf.int32)))


def _box_weights(share, center, height, width):
    """0 in a box of sides sqrt(1 - share) those of the image, 1 outside: `(H, W, 1)`."""
    inside = []
    for i, side in enumerate((height, width)):
        half = tf.cast(side * tf.sqrt(1 - share), tf.int32) // 2
        middle = tf.cast(side * center[i], tf.int32)
        inside.append((tf.range(side) >= middle - half) & (tf.range(side) < middle + half))
    box = inside[0][:, None] & inside[1][None, :]
    return 1 - tf.cast(box, tf.float32)[..., None]
