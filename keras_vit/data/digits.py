"""Scikit-learn's handwritten digits: real images that need no download."""

from __future__ import annotations

import hashlib

import numpy as np

from keras_vit.data.structures import ImageData, array_split, fingerprint

_SPLIT_SEED = 0  # part of the data set's definition: the splits never change


def load_digits() -> ImageData:
    """Loads the 1,797 gray 8x8 digits of scikit-learn, in stratified splits of 70/10/20 %.

    Their values 0..16 become `round(value * 255 / 16)`, repeated to RGB.

    Returns:
        An `ImageData` with the classes "0" to "9".

    Raises:
        ValueError: If scikit-learn is not installed.

    Source: E. Alpaydin and C. Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine
    Learning Repository, 1998 (its test part, as scikit-learn ships it).
    """
    images, labels = _digit_arrays()
    splits = _split_indices(labels)
    return ImageData(
        name="digits",
        class_names=tuple(str(digit) for digit in range(10)),
        **{name: array_split(images[at], labels[at]) for name, at in splits.items()},
        image_size=(8, 8),
        fingerprint=fingerprint(
            images=hashlib.sha256(images.tobytes()).hexdigest(),
            labels=labels.tolist(),
            splits={name: at.tolist() for name, at in splits.items()},
        ),
    )


def _digit_arrays() -> tuple[np.ndarray, np.ndarray]:
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ValueError(
            "The digits come with scikit-learn: pip install scikit-learn, or "
            '".[train]" in a clone of keras-vit.'
        ) from error
    digits = datasets.load_digits()
    gray = np.round(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8)
    return np.repeat(gray[..., np.newaxis], 3, axis=-1), digits.target.astype(np.int32)


def _split_indices(labels: np.ndarray) -> dict[str, np.ndarray]:
    from sklearn.model_selection import train_test_split

    def part(indices: np.ndarray, size: float) -> list[np.ndarray]:
        return train_test_split(
            indices, test_size=size, stratify=labels[indices], random_state=_SPLIT_SEED
        )

    rest, test = part(np.arange(len(labels)), 0.2)
    train, validation = part(rest, 0.125)  # a tenth of all
    return {"train": train, "validation": validation, "test": test}
