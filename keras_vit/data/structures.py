"""What every data source returns: three splits and the facts that describe them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable

import numpy as np
import tensorflow as tf

# What folders and files are called, and the split that they are.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}

# The part of an image to read: (height, width) of the whole -> (y, x, height, width) of the part,
# all int32 scalars.
Window = Callable[[tf.Tensor, tf.Tensor], tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]]

_SAMPLED_SIZES = 64  # images whose sizes stand for all


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a labelled image data set, any image of which can be read at any time.

    Attributes:
        load: `load(index, window=None)` reads an image in a TensorFlow graph. `index` is an int64
            scalar in [0, count), `window` a `Window` or None for the whole image. Returns
            `(image, label)`: image uint8 `(height, width, 3)` with values in [0, 255], label
            int32 scalar in [0, num_classes).
        count: Number of images.
    """

    load: Callable[..., tuple[tf.Tensor, tf.Tensor]]
    count: int

    @property
    def dataset(self) -> tf.data.Dataset:
        """Every `(image, label)`, in the order of the indices."""
        return tf.data.Dataset.range(self.count).map(
            self.load, num_parallel_calls=tf.data.AUTOTUNE, deterministic=True
        )


def array_split(images: np.ndarray, labels: np.ndarray) -> Split:
    """A split of images in memory.

    Args:
        images: uint8 `(N, H, W, 3)`.
        labels: int `(N,)`.

    Returns:
        A `Split` of N images.
    """
    with tf.device("/CPU:0"):  # input pipelines run there
        images, labels = tf.constant(images), tf.constant(labels, tf.int32)

    def load(index, window=None):
        return cut(images[index], window), labels[index]

    return Split(load, len(labels))


def cut(image: tf.Tensor, window: Window | None) -> tf.Tensor:
    """The part of an image `(height, width, 3)` that a window names; all of it without one."""
    if window is None:
        return image
    y, x, height, width = window(*tf.unstack(tf.shape(image)[:2]))
    return image[y : y + height, x : x + width]


def typical_size(split: Split) -> tuple[int, int]:
    """The `(height, width)` of a split's images, in pixels.

    Returns:
        The size itself where the split declares one, otherwise the median over its first images.
    """
    shape = split.dataset.element_spec[0].shape[:2]
    if shape.is_fully_defined():
        return tuple(shape.as_list())
    sizes = [image.shape[:2] for image, _ in split.dataset.take(_SAMPLED_SIZES)]
    height, width = np.median(sizes, axis=0)
    return int(height), int(width)


@dataclasses.dataclass(frozen=True)
class ImageData:
    """A labelled image data set in three disjoint splits.

    Attributes:
        name: The spec it was loaded by, such as "digits" or "folder:PATH".
        class_names: One name per label, in the order of the labels.
        train: The split to fit on.
        validation: The split to choose by.
        test: The split to report.
        image_size: Typical `(height, width)` of the images in pixels: exact where all have one
            size, otherwise the median over the training images or a sample of them.
        fingerprint: SHA-256 in hex over what identifies the data and their splits. The place
            of the data on the disk is no part of it.
        skipped: The unreadable files that were left out: path -> what is wrong with it.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    image_size: tuple[int, int]
    fingerprint: str
    skipped: dict[str, str] = dataclasses.field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def fingerprint(**facts) -> str:
    """SHA-256 in hex of facts that JSON can hold, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
