"""What every data source returns: three splits and the facts that describe them."""

from __future__ import annotations

import dataclasses
import hashlib
import json

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Split:
    """One split of a labelled image data set.

    Attributes:
        dataset: Unbatched and finite, in the same order each time. Elements `(image, label)`:
            image uint8 `(height, width, 3)` with values in [0, 255], label int32 scalar in
            [0, num_classes).
        count: Number of elements.
    """

    dataset: tf.data.Dataset
    count: int


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
        skipped: Paths of the unreadable files that were left out.
    """

    name: str
    class_names: tuple[str, ...]
    train: Split
    validation: Split
    test: Split
    image_size: tuple[int, int]
    fingerprint: str
    skipped: tuple[str, ...] = ()

    @property
    def num_classes(self) -> int:
        """The number of classes."""
        return len(self.class_names)


def fingerprint(**facts) -> str:
    """SHA-256 in hex of facts that JSON can hold, whatever their order."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
