"""From the images of a split to batches a model takes, with light augmentation."""

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


def training_batches(
    split, image_size, batch_size, num_classes, *, min_crop_area=1.0, flip=False, seed=0
):
    """Shuffled, augmented batches of a split, without end.

    The images of a pass over the split are in a new order each time; a batch may end one pass
    and begin the next. The same arguments give the same batches.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        batch_size: Images per batch.
        num_classes: Length K of the one-hot labels.
        min_crop_area: Smallest share in (0, 1] of an image that the random crop keeps.
        flip: Whether half of the images are mirrored.
        seed: Seed of the order and the augmentation.

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
        return augment(images, step_seed, min_crop_area=min_crop_area, flip=flip), labels

    return batches.map(augment_batch, num_parallel_calls=tf.data.AUTOTUNE).prefetch(
        tf.data.AUTOTUNE
    )


def augment(images, seed, *, min_crop_area=1.0, flip=False):
    """Crops and mirrors each image of a batch at random.

    A crop keeps a share of the area drawn from [min_crop_area, 1], has an aspect ratio between
    3/4 and 4/3 of the image's, lies anywhere inside the image, and is scaled back to its size
    ("Going deeper with convolutions", arXiv 1409.4842, Section 6).

    Args:
        images: `(B, H, W, 3)`, values in [0, 255].
        seed: Two integers; the same give the same result.
        min_crop_area: Smallest share of the area in (0, 1]; 1 crops nothing.
        flip: Whether half of the images are mirrored.

    Returns:
        float32 `(B, H, W, 3)`, values in [0, 255].
    """
    batch, height, width, _ = images.shape
    seeds = tf.random.split(seed, 4)

    def uniform(index, low, high):
        return tf.random.stateless_uniform([batch], seeds[index], low, high)

    images = tf.cast(images, tf.float32)
    if min_crop_area < 1:
        area = uniform(0, min_crop_area, 1.0)
        ratio = tf.exp(uniform(1, tf.math.log(3 / 4), tf.math.log(4 / 3)) / 2)
        side = tf.stack([tf.sqrt(area) / ratio, tf.sqrt(area) * ratio], axis=1)
        side = tf.minimum(side, 1.0)  # (B, 2), shares of the height and width
        corner = tf.random.stateless_uniform([batch, 2], seeds[2]) * (1 - side)
        images = tf.image.crop_and_resize(
            images, tf.concat([corner, corner + side], axis=1), tf.range(batch), (height, width)
        )
    if flip:
        mirrored = uniform(3, 0.0, 1.0) < 0.5
        images = tf.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    return images


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
