"""From the images of a split to batches a model takes, in an order that any step can begin."""

import math

import numpy as np
import tensorflow as tf

from keras_vit.data.augmentation import Augmentation
from keras_vit.data.progress import progress
from keras_vit.data.structures import array_split, typical_size

# Resized images are kept in memory up to this size; larger splits are decoded in every epoch.
CACHE_BYTES = 2**31
PREFETCHED = 4  # batches
_READ_AT_ONCE = 64  # images: a step of the iterator for each costs as much as to read it
_SHUFFLE_ROUNDS = 8  # of the cipher; `index_shuffle` has 4


def resize(image, image_size):
    """Resizes an image to the model's size, bilinear with antialiasing, changing its aspect.

    Args:
        image: uint8 tensor `(height, width, 3)`.
        image_size: `(height, width)` of the result.

    Returns:
        uint8 tensor `(*image_size, 3)`.
    """
    if image.shape[:2] == tuple(image_size):
        return tf.convert_to_tensor(image)
    image = tf.image.resize(image, image_size, method="bilinear", antialias=True)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def untuned(dataset):
    """A dataset without the thread that tunes it, whose iterators are deleted at once.

    That thread sleeps for 10, 20, 40, ... ms, a minute at last, and who deletes an iterator waits
    for it. It is told to wake up, but sleeps on if it looks before its iterator counts as
    cancelled, as happens in TensorFlow 2.21.

    Args:
        dataset: A `tf.data.Dataset`.

    Returns:
        The same; what it does in parallel with `AUTOTUNE` is done min(16, cores) times at once.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.with_options(options)


def evaluation_batches(split, image_size, batch_size, num_classes, *, shard=(0, 1), cached=False):
    """The images of a split once, in order.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        batch_size: Images per batch B; the last batch has what is left.
        num_classes: Length K of the one-hot labels.
        shard: `(i, n)`: the i-th of the n equal parts of every batch. Of the last batch a shard
            has what lies in its part, and a batch of no images where that is nothing: workers go
            through equally many.
        cached: Whether the images, if they are not too large, are kept for the next time.

    Returns:
        `tf.data.Dataset` of (uint8 images `(B / n, H, W, 3)`, float32 one-hot labels
        `(B / n, K)`).

    Raises:
        ValueError: `shard` is not a part of `n`, or n does not divide `batch_size`.
    """
    first, size = _part(batch_size, shard)
    places = np.arange(split.count)
    places = places[(places % batch_size >= first) & (places % batch_size < first + size)]
    images = resized_images(split, places, image_size)
    if cached and len(places) * _image_bytes(image_size) <= CACHE_BYTES:
        images = images.cache()
    batches = _one_hot(images.batch(size), num_classes)
    if math.ceil(len(places) / size) < math.ceil(split.count / batch_size):
        nothing = tf.zeros((0, *image_size, 3), tf.uint8), tf.zeros((0, num_classes))
        batches = batches.concatenate(tf.data.Dataset.from_tensors(nothing))
    return untuned(batches.prefetch(PREFETCHED))


def spread_places(total, count):
    """Places all over a split, always the same ones, in order.

    One is drawn from each of `count` equal parts: a split may be sorted by class, or its classes
    may take turns.

    Args:
        total: Images of the split.
        count: How many at most.

    Returns:
        int indices `(N,)`; all of them if `count` is not below `total`.
    """
    count = min(count, total)
    edges = np.arange(count + 1) * total // count
    return np.random.default_rng(0).integers(edges[:-1], edges[1:])


def resized_images(split, places, image_size):
    """The images of a split at these places, at the model's size.

    Args:
        split: A `Split`.
        places: int indices `(N,)`.
        image_size: `(height, width)` in pixels.

    Returns:
        `tf.data.Dataset` of (uint8 image `(H, W, 3)`, int label), in this order.
    """

    def read(index):
        image, label = split.load(index)
        return resize(image, image_size), label

    indices = tf.data.Dataset.from_tensor_slices(places)
    return indices.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)


def spread_images(split, image_size, count):
    """Images from all over a split as arrays, those of `spread_places`.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        count: How many at most.

    Returns:
        uint8 images `(N, H, W, 3)` and int labels `(N,)`.
    """
    return _read(split, image_size, spread_places(split.count, count))


def sample_ids(step, batch_size, count, seed):
    """The images of a global batch of training.

    Position p = step * batch_size, ... of the whole training is place p % count of the epoch
    p // count, and each epoch is a permutation of the images of its own, which is computed and
    never stored: the images of any step are known at once.

    Args:
        step: The step, from 0; an int or an int64 scalar tensor.
        batch_size: Images per global batch. It may be more than `count`.
        count: Images of the split.
        seed: Seed of the order, an int.

    Returns:
        int64 tensor `(batch_size,)` of indices of the split.

    Source: `tf.random.experimental.index_shuffle`, which enciphers the index (SIMON, IACR ePrint
    2013/404); the key is drawn from the seed and the epoch.
    """
    positions = tf.cast(step, tf.int64) * batch_size + tf.range(batch_size, dtype=tf.int64)
    return _shuffled(positions, count, seed)


def _shuffled(positions, count, seed):
    """The images at consecutive positions of training."""
    epochs = positions // count
    # Keys are drawn: those of neighbouring epochs that were counted would give similar orders.
    keys = tf.stack(
        [
            tf.random.stateless_uniform([3], [seed, epochs[0] + index], None, None, tf.int64)
            for index in range((len(positions) - 1) // count + 2)  # as many as there can be
        ]
    )
    # The raw op, because `index_shuffle` takes one key at a time.
    return tf.raw_ops.RandomIndexShuffle(
        index=positions % count,
        seed=tf.gather(keys, epochs - epochs[0]),
        max_index=np.int64(count - 1),
        rounds=_SHUFFLE_ROUNDS,
    )


def training_batches(
    split,
    image_size,
    batch_size,
    num_classes,
    *,
    seed=0,
    first_step=0,
    steps=None,
    shard=(0, 1),
    augmentation=None,
):
    """Shuffled, augmented batches of a split, the same whatever step they begin with.

    The images of a pass over the split are in a new order each time (see `sample_ids`); a batch
    may end one pass and begin the next. What happens to an image depends on the seed, the pass
    and the image alone. So the same arguments give the same batches, any step can be the first
    at no cost, and the shards of a batch, one after the other, are the batch.

    Images that are no larger than the model's are read once and kept in memory at the model's
    size, up to `CACHE_BYTES`. Larger ones are decoded in every pass, the crop alone where they
    are JPEG.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        batch_size: Images per global batch B.
        num_classes: Length K of the one-hot labels.
        seed: Seed of the order and the augmentation, an int.
        first_step: The global step of the first batch, from 0.
        steps: How many batches; None: without end.
        shard: `(i, n)`: this pipeline makes the i-th of the n equal parts of every batch.
        augmentation: An `Augmentation`, or None to change nothing.

    Returns:
        `tf.data.Dataset` of (uint8 images `(B / n, H, W, 3)`, float32 one-hot labels
        `(B / n, K)`).

    Raises:
        ValueError: `shard` is not a part of `n`, or n does not divide `batch_size`.
    """
    augmentation = augmentation or Augmentation()
    first, size = _part(batch_size, shard)
    in_memory = _fits_in_memory(split, image_size)
    if in_memory:
        split = array_split(*_read(split, image_size, np.arange(split.count)))

    def samples(step):
        positions = step * batch_size + first + tf.range(size, dtype=tf.int64)
        ids = _shuffled(positions, split.count, seed)
        return ids, positions // split.count * split.count + ids  # unique in all passes

    def read(index, number):
        key = tf.stack([np.int64(seed), number])
        window = None if in_memory else augmentation.window(key)
        image, label = split.load(index, window)
        image = resize(image, image_size)
        return augmentation.apply(image, key, crop=in_memory), label

    stop = np.iinfo(np.int64).max if steps is None else first_step + steps
    samples = tf.data.Dataset.range(first_step, stop).map(samples).unbatch()
    images = samples.map(read, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True)
    images = images.batch(size, drop_remainder=True)
    return untuned(_one_hot(images, num_classes).prefetch(PREFETCHED))


def _part(batch_size, shard):
    """The first position and the size of a shard of a batch."""
    index, count = shard
    if not 0 <= index < count:
        raise ValueError(f"`shard` must be (i, n) with 0 <= i < n. Received: shard={shard!r}.")
    if batch_size % count:
        raise ValueError(
            "The number of shards must divide `batch_size`. "
            f"Received: batch_size={batch_size}, shard={shard!r}."
        )
    return index * (batch_size // count), batch_size // count


def _fits_in_memory(split, image_size):
    small = all(own <= new for own, new in zip(typical_size(split), image_size, strict=True))
    return small and split.count * _image_bytes(image_size) <= CACHE_BYTES


def _read(split, image_size, places):
    """The images of a split at these places, at the model's size, and their labels, as arrays."""
    count = len(places)
    images, labels = np.empty((count, *image_size, 3), np.uint8), np.empty(count, np.int32)
    batches = untuned(resized_images(split, places, image_size).batch(_READ_AT_ONCE))
    read = (pair for batch in batches.as_numpy_iterator() for pair in zip(*batch, strict=True))
    for index, (image, label) in enumerate(progress(read, "Reading images", count)):
        images[index], labels[index] = image, label
    return images, labels


def _image_bytes(image_size):
    return image_size[0] * image_size[1] * 3


def _one_hot(batches, num_classes):
    return batches.map(lambda images, labels: (images, tf.one_hot(labels, num_classes)))
