"""A folder of TFRecord files with encoded images and their labels."""

from __future__ import annotations

import hashlib
import os
import re
import reprlib
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import tensorflow as tf
from google.protobuf.message import DecodeError

from keras_vit.data.images import check_image_data, decode_image
from keras_vit.data.jpeg import decode_jpeg
from keras_vit.data.progress import map_threads
from keras_vit.data.records import Records, scan_records
from keras_vit.data.structures import (
    SPLIT_NAMES,
    ImageData,
    Split,
    Window,
    cut,
    fingerprint,
    typical_size,
)

_FILE = re.compile(r"^[^.].*(\.tfrecords?\b|-\d{5}-of-\d{5}$)")
_SPLIT = re.compile(rf"(?:.*[-_.])?({'|'.join(SPLIT_NAMES)})(?![a-z])", re.IGNORECASE)
_IMAGE_KEYS = ("image/encoded", "image", "jpg")
_LABEL_KEYS = ("image/class/label", "label")
_TEXT_KEY = "image/class/text"


class Keys(NamedTuple):
    """The names of the features that are used."""

    image: str
    label: str


def load_tfrecord(path: str | os.PathLike) -> ImageData:
    """Loads a folder of TFRecord files of `tf.train.Example`s with images and labels.

    The files are those named `*.tfrecord*` or `*-00000-of-01024`. Their names begin with
    "train", "validation" (or "valid", "val") or "test", or have it behind "-", "_" or ".", as
    those of TFDS, "flowers-train", and of slim, "cifar10_train" (of several the
    last one counts); where none does, all are "train". Splits that are missing are carved out of
    "train", the last records of each class, at least one:

    - without both others: 10 % for validation and 10 % for test;
    - without validation: 10 % for validation;
    - without test: validation is the test split, and 10 % of "train" are for validation, so
      that what is reported was not chosen by.

    An image is an encoded file under `image/encoded`, `image` or `jpg` (JPEG without its EXIF
    orientation, or whatever `decode_image` reads), a label an integer under `image/class/label`
    or `label`. Labels that begin at 1 become 0 to K - 1: those of which none is 0 and, with
    `labels.txt`, the last is K. The class names are the lines of `labels.txt` beside the files,
    otherwise `image/class/text` where every class has one, otherwise the numbers.

    Every record is read once here, and its image decoded, a JPEG at an eighth of its size, so that
    a damaged one is found now and not in training.

    Args:
        path: The folder; `~` stands for the home directory.

    Returns:
        An `ImageData`.

    Raises:
        ValueError: If the folder has no such files, or one is damaged, or records lack an image
            that can be read or a label, or the labels contradict `labels.txt`; says which.

    Source: the keys of TFDS, of tensorflow/models `research/slim` and tensorflow/tpu
    `tools/datasets/imagenet_to_gcs.py` (both of whose labels begin at 1), and of img2dataset,
    which writes `jpg` and every further column under its own name.
    """
    root = Path(path).expanduser().absolute()
    files = _list_files(root)
    records = {split: scan_records(paths) for split, paths in files.items()}
    if empty := [split for split, found in records.items() if not len(found.files)]:
        raise ValueError(
            f"Every split must hold records. Received: path={str(root)!r} with none in {empty}."
        )
    keys = Keys(
        _find_key(records["train"], _IMAGE_KEYS, "bytes_list"),
        _find_key(records["train"], _LABEL_KEYS, "int64_list"),
    )
    facts = {split: _read_facts(records[split], keys) for split in records}
    labels, class_names = _number_classes(root, facts)
    parts = _complete_splits(root, labels, len(class_names))
    splits = {
        role: _to_split(records[split].take(at), labels[split][at], keys.image)
        for role, (split, at) in parts.items()
    }
    return ImageData(
        name=f"tfrecord:{root}",
        class_names=class_names,
        **splits,
        image_size=typical_size(splits["train"]),
        fingerprint=fingerprint(
            class_names=class_names,
            files={s: [(os.path.basename(p), os.path.getsize(p)) for p in files[s]] for s in files},
            counts={role: split.count for role, split in splits.items()},
            labels={s: hashlib.sha256(labels[s].tobytes()).hexdigest() for s in files},
        ),
    )


def _list_files(root: Path) -> dict[str, list[str]]:
    """The files by split."""
    if not root.is_dir():
        raise ValueError(f"The folder of TFRecord files must exist. Received: path={str(root)!r}.")
    names = sorted(f.name for f in root.iterdir() if f.is_file() and _FILE.search(f.name))
    roles = {name: _role(name) for name in names}
    if not any(roles.values()):
        roles = dict.fromkeys(names, "train")
    if other := [name for name, role in roles.items() if not role]:
        raise ValueError(
            "The names of all TFRecord files must begin with a split or have it behind '-', '_' "
            "or '.', or those of none. "
            f"Received: path={str(root)!r} with {other[:3]} beside others."
        )
    if "train" not in roles.values():
        raise ValueError(
            "The folder must hold TFRecord files for training, named train*.tfrecord*. "
            f"Received: path={str(root)!r} with {names[:3]}."
        )
    return {
        split: [str(root / name) for name, role in roles.items() if role == split]
        for split in ("train", "validation", "test")
        if split in roles.values()
    }


def _role(name: str) -> str:
    """The split that a file's name begins with or has behind a mark, or ""."""
    match = _SPLIT.match(name)
    return SPLIT_NAMES[match[1].lower()] if match else ""


def _find_key(records: Records, names: tuple[str, ...], kind: str) -> str:
    """The first of these names that the first record has a value for."""
    features = _parse(records, 0)
    for name in names:
        if name in features and getattr(features[name], kind).value:
            return name
    raise ValueError(
        f"A record must have one of the features {', '.join(names)}. "
        f"Received: {records.place(0)} with {sorted(features)}."
    )


def _parse(records: Records, index: int) -> Mapping:
    try:
        return tf.train.Example.FromString(records.read(index)).features.feature
    except DecodeError as error:
        raise ValueError(
            f"A record must be a `tf.train.Example`. Received: {records.place(index)}: {error}."
        ) from error


def _read_facts(records: Records, keys: Keys) -> list[tuple[int, str]]:
    """The label and the class text, "" where there is none, of every record."""

    def read(index: int) -> tuple[int, str]:
        features = _parse(records, index)
        names = sorted(features)  # before they are asked for, which adds them
        labels = features[keys.label].int64_list.value
        if len(labels) != 1 or len(features[keys.image].bytes_list.value) != 1:
            raise ValueError(
                f"Every record must have one image, `{keys.image}`, and one label, "
                f"`{keys.label}`. Received: {records.place(index)} with {names}."
            )
        check_image_data(features[keys.image].bytes_list.value[0], records.place(index))
        text = features[_TEXT_KEY].bytes_list.value
        return labels[0], text[0].decode() if text else ""

    return map_threads(read, range(len(records.files)), "Checking images")


def _number_classes(
    root: Path, facts: dict[str, list[tuple[int, str]]]
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
    """Labels from 0 on, by split, and the class names."""
    labels = {split: np.array([label for label, _ in facts[split]], np.int64) for split in facts}
    low = min(values.min() for values in labels.values() if len(values))
    high = max(values.max() for values in labels.values() if len(values))
    names = _names_of_file(root)
    first = int(low >= 1 and (names is None or high == len(names)))
    if low < 0 or (names is not None and high - first >= len(names)):
        raise ValueError(
            "Labels must be 0 to K - 1 or 1 to K, K being the lines of labels.txt where there is "
            f"one. Received: path={str(root)!r} with labels from {low} to {high}"
            + (f" and {len(names)} lines." if names is not None else ".")
        )
    if names is None:
        texts = {label: text for split in facts for label, text in facts[split] if text}
        numbers = range(first, high + 1)
        named = all(number in texts for number in numbers) and len(set(texts.values())) == len(
            texts
        )
        names = tuple(texts[number] if named else str(number) for number in numbers)
    return {split: values - first for split, values in labels.items()}, names


def _names_of_file(root: Path) -> tuple[str, ...] | None:
    path = root / "labels.txt"
    if not path.exists():
        return None
    names = path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    if "" in names or len(set(names)) < len(names):
        raise ValueError(
            f"{path} must have another name in each line. Received: {reprlib.repr(names)}."
        )
    return tuple(names)


def _complete_splits(
    root: Path, labels: dict[str, np.ndarray], num_classes: int
) -> dict[str, tuple[str, np.ndarray]]:
    """For each role, the split it is taken from and the places there."""
    parts = {split: (split, np.arange(len(labels[split]))) for split in labels}
    if "test" not in parts and "validation" in parts:
        parts["test"] = parts.pop("validation")
    missing = [role for role in ("test", "validation") if role not in parts]
    tails = {role: [] for role in missing}
    rest = []
    for label in range(num_classes):
        places = np.flatnonzero(labels["train"] == label)
        size = max(1, (len(places) + 5) // 10)  # a tenth, rounded
        if 0 < len(places) <= len(missing):
            raise ValueError(
                f"Every class must have at least {len(missing) + 1} images in 'train', one for "
                "each split made of them. "
                f"Received: path={str(root)!r} with {len(places)} of label {label}."
            )
        for role in missing:
            places, tail = places[:-size], places[-size:]
            tails[role].append(tail)
        rest.append(places)
    parts["train"] = ("train", np.sort(np.concatenate(rest)))
    for role in missing:
        parts[role] = ("train", np.sort(np.concatenate(tails[role])))
    return parts


def _to_split(records: Records, labels: np.ndarray, image_key: str) -> Split:
    with tf.device("/CPU:0"):  # input pipelines run there
        labels = tf.constant(labels, tf.int32)
    features = {image_key: tf.io.FixedLenFeature([], tf.string)}

    def decode_any(data: bytes, index: int) -> np.ndarray:
        return decode_image(data, records.place(index))

    def load(index: tf.Tensor, window: Window | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        data = tf.io.parse_single_example(records.tensor(index), features)[image_key]

        def load_any():
            image = tf.numpy_function(decode_any, [data, index], tf.uint8, stateful=False)
            return cut(tf.ensure_shape(image, (None, None, 3)), window)

        image = tf.cond(tf.io.is_jpeg(data), lambda: decode_jpeg(data, window), load_any)
        return tf.ensure_shape(image, (None, None, 3)), labels[index]

    return Split(load, len(records.files))
