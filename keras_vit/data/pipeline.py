"""From the images of a split to batches a model takes, with light augmentation."""

import math

import numpy as np
import tensorflow as tf

# Resized images are kept in memory up to this size; larger splits are decoded in every epoch.
CACHE_BYTES = 2**31


def resize(image, image_size):
    """Resizes an image to the model's size, bilinear with antialiasing, changing its aspect.

    Args:
        image: uint8 tensor `(height, width, 3)`.
        image_size: `(height, width)` of the result.

    Returns:
        uint8 tensor `(*image_size, 3)`.
    """
    image = tf.image.resize(image, image_size, method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def evaluation_batches(split, image_size, batch_size, num_classes):
    """The images of a split once, in order.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        batch_size: Images per batch; the last batch has what is left.
        num_classes: Length K of the one-hot labels.

    Returns:
        `tf.data.Dataset` of (uint8 images `(B, H, W, 3)`, float32 one-hot labels `(B, K)`).
    """
    resized = _resized(split, image_size)
    return _one_hot(resized.batch(batch_size), num_classes).prefetch(tf.data.AUTOTUNE)


def first_images(split, image_size, count):
    """The first images of a split as arrays.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        count: How many at most.

    Returns:
        uint8 images `(N, H, W, 3)` and int labels `(N,)`.
    """
    images, labels = zip(*_resized(split, image_size).take(count).as_numpy_iterator(), strict=True)
    return np.stack(images), np.array(labels)


def training_batches(split, image_size, batch_size, num_classes, *, seed=0, **augmentation):
    """Shuffled, augmented batches of a split, without end.

    The images of a pass over the split are in a new order each time; a batch may end one pass
    and begin the next. The same arguments give the same batches.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        batch_size: Images per batch.
        num_classes: Length K of the one-hot labels.
        seed: Seed of the order and the augmentation.
        **augmentation: Arguments of `augment`.

    Returns:
        `tf.data.Dataset` of (float32 images `(B, H, W, 3)` in [0, 255], float32 one-hot labels
        `(B, K)`).
    """
    batches = (
        _resized(split, image_size)
        .shuffle(_shuffle_buffer(split, image_size), seed=seed, reshuffle_each_iteration=True)
        .repeat()
        .batch(batch_size, drop_remainder=True)
    )
    batches = _one_hot(batches, num_classes).enumerate()

    def augment_batch(step, batch):
        images, labels = batch
        step_seed = tf.stack([tf.cast(seed, tf.int64), step])
        return augment(images, step_seed, **augmentation), labels

    return batches.map(augment_batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(
        tf.data.AUTOTUNE
    )


def augment(images, seed, *, min_crop_area=1.0, rotation=0.0, shift=0.0, flip=False):
    """Crops, rotates, shifts and mirrors each image of a batch at random, in one resampling.

    A crop keeps a share of the area drawn from [min_crop_area, 1], has an aspect ratio between
    3/4 and 4/3 of the image's and lies inside the image ("Going deeper with convolutions",
    arXiv 1409.4842, Section 6); then it may be turned and shifted, beyond the border too, where
    the border's pixels go on.

    Args:
        images: `(B, H, W, 3)`, values in [0, 255].
        seed: Two integers; the same give the same result.
        min_crop_area: Smallest share of the area in (0, 1]; 1 crops nothing.
        rotation: Largest angle in degrees, to either side.
        shift: Largest shift as a share of the side, in each direction.
        flip: Whether half of the images are mirrored.

    Returns:
        float32 `(B, H, W, 3)`, values in [0, 255].
    """
    batch, height, width, _ = images.shape
    seeds = tf.random.split(seed, 6)

    def uniform(index, low, high, *shape):
        return tf.random.stateless_uniform([batch, *shape], seeds[index], low, high)

    area = uniform(0, min_crop_area, 1.0)
    root = tf.sqrt(area)
    ratio = tf.exp(uniform(1, -1.0, 1.0) * math.log(4 / 3) / 2)
    ratio = tf.clip_by_value(ratio, root, 1 / root)  # neither side is longer than the image's
    # (B, 2) each, for x and y: the crop's sides, and its centre's offset in pixels.
    side = tf.stack([root * ratio, root / ratio], axis=1)
    offset = uniform(2, -0.5, 0.5, 2) * (1 - side) + uniform(3, -shift, shift, 2)
    offset = offset * (width, height)
    angle = uniform(4, -rotation, rotation) * (math.pi / 180)
    mirror = tf.where(uniform(5, 0.0, 1.0) < 0.5, -1.0, 1.0) if flip else tf.ones([batch])
    cos, sin = tf.cos(angle), tf.sin(angle)
    # Output pixel (x, y) is taken from (a x + b y + c, d x + e y + f), about the centre.
    a, b = side[:, 0] * cos * mirror, -side[:, 0] * sin
    d, e = side[:, 1] * sin * mirror, side[:, 1] * cos
    x0, y0 = (width - 1) / 2, (height - 1) / 2
    c = x0 + offset[:, 0] - a * x0 - b * y0
    f = y0 + offset[:, 1] - d * x0 - e * y0
    zero = tf.zeros([batch])
    return tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.stack([a, b, c, d, e, f, zero, zero], axis=1),
        output_shape=(height, width),
        interpolation="BILINEAR",
        fill_mode="NEAREST",
        fill_value=0.0,
    )


def _resized(split, image_size):
    """The (uint8 image, label) of a split at the model's size, in memory if they fit."""
    resized = split.dataset.map(
        lambda image, label: (resize(image, image_size), label),
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )
    return resized.cache() if split.count * _image_bytes(image_size) <= CACHE_BYTES else resized


def _shuffle_buffer(split, image_size):
    return max(1, min(split.count, CACHE_BYTES // _image_bytes(image_size)))


def _image_bytes(image_size):
    return image_size[0] * image_size[1] * 3


def _one_hot(batches, num_classes):
    return batches.map(lambda images, labels: (images, tf.one_hot(labels, num_classes)))
