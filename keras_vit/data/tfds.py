"""Image classification sets of TensorFlow Datasets."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import tensorflow as tf

from keras_vit.data.jpeg import decode_jpeg
from keras_vit.data.records import Records, scan_records
from keras_vit.data.structures import ImageData, Split, Window, cut, fingerprint, typical_size

_VALIDATION_NAMES = ("validation", "valid", "val", "dev")


def load_tfds(name: str) -> ImageData:
    """Loads an image classification set of TensorFlow Datasets, downloading it where needed.

    The set's own splits are used. Of those that are missing, and of test splits without labels:

    - without validation: the last 10 % of "train";
    - without test: validation is the test split, and the last 10 % of "train" are for
      validation, so that what is reported was not chosen by;
    - without both: 10 % of "train" for each.

    Images are decoded as TFDS does, so that an EXIF orientation is ignored, though with the
    accurate arithmetic for JPEG. Gray is repeated to RGB, transparency is composited over white
    and 16-bit values are scaled by 1/257. The order is the stored one, file after file; the set
    is never held in memory.

    Args:
        name: "NAME" or "NAME:CONFIG". The files lie where TFDS keeps them; the environment
            variable TFDS_DATA_DIR names another place.

    Returns:
        An `ImageData`; its image size is the median over the first images of the train split
        unless the set declares one size.

    Raises:
        ValueError: If tensorflow-datasets is not installed, the set cannot be found or
            downloaded, it is not one of images with class labels, or its files are no TFRecord
            files, damaged or cut off.
    """
    builder = _prepare_builder(name)
    labels = _check_features(name, builder.info.features)
    counts, slices = _split_slices(name, builder)
    splits = _read_splits(name, builder, slices)
    return ImageData(
        name=f"tfds:{name}",
        class_names=tuple(labels.names),
        **splits,
        image_size=typical_size(splits["train"]),
        fingerprint=fingerprint(
            name=builder.info.full_name,  # with the config and the version
            class_names=labels.names,
            splits={split: (slices[split], counts[split]) for split in slices},
        ),
    )


def _prepare_builder(name: str) -> Any:
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise ValueError(
            f'"tfds:{name}" needs tensorflow-datasets: pip install tensorflow-datasets '
            'importlib_resources, or ".[tfds]" in a clone of keras-vit.'
        ) from error
    try:
        # Read here as well, because TFDS reads the variable only when it is first imported.
        builder = tfds.builder(name.replace(":", "/", 1), data_dir=os.environ.get("TFDS_DATA_DIR"))
        builder.download_and_prepare()
    except Exception as error:  # anything from a wrong name to a lost connection
        reason = (str(error) or type(error).__name__)[:1000]  # an unknown name lists all others
        raise ValueError(
            "The TFDS data set cannot be found, or not be downloaded and prepared. "
            f"Received: tfds:{name}, with {type(error).__name__}: {reason}"
        ) from error
    return builder


def _check_features(name: str, features: Any) -> Any:
    """The label feature, if the set is one of images with class labels."""
    import tensorflow_datasets as tfds

    image, label = (dict(features).get(key) for key in ("image", "label"))
    if (
        not isinstance(image, tfds.features.Image)
        or not isinstance(label, tfds.features.ClassLabel)
        or image.np_dtype not in (np.uint8, np.uint16)
        or image.shape[-1] not in (1, 2, 3, 4)
    ):
        raise ValueError(
            "The TFDS data set must have the features `image`, an Image of uint8 or uint16 with 1 "
            f"to 4 channels, and `label`, a ClassLabel. Received: tfds:{name} with {features!r}."
        )
    return label


def _split_slices(name: str, builder: Any) -> tuple[dict[str, int], dict[str, str]]:
    """The numbers of images and the TFDS split instructions of train, validation and test."""
    sizes = {split: info.num_examples for split, info in builder.info.splits.items()}
    if "train" not in sizes:
        raise ValueError(
            "The TFDS data set must have a `train` split. "
            f"Received: tfds:{name} with the splits {sorted(sizes)}."
        )
    own = {"validation": next((s for s in _VALIDATION_NAMES if s in sizes), None), "test": "test"}
    own = {role: split for role, split in own.items() if _is_labelled(builder, sizes, split)}
    if "test" not in own and "validation" in own:
        own = {"test": own["validation"]}
    slices, counts = dict(own), {role: sizes[split] for role, split in own.items()}
    end, size = sizes["train"], max(1, sizes["train"] // 10)
    for role in ("test", "validation"):
        if role not in own:
            slices[role], counts[role] = f"train[{end - size}:{end}]", size
            end -= size
    if end < 1:
        raise ValueError(
            "The TFDS data set is too small to make its missing splits. "
            f"Received: tfds:{name} with {sizes['train']} images in `train`."
        )
    slices["train"], counts["train"] = f"train[:{end}]", end
    return counts, slices


def _is_labelled(builder: Any, sizes: dict[str, int], split: str | None) -> bool:
    """Whether a split exists and has labels: the tests of competitions have -1 instead."""
    import tensorflow_datasets as tfds

    if not sizes.get(split):
        return False
    first = builder.as_dataset(split=f"{split}[:1]", decoders={"image": tfds.decode.SkipDecoding()})
    return all(example["label"] >= 0 for example in first)


def _read_splits(name: str, builder: Any, slices: dict[str, str]) -> dict[str, Split]:
    """Random access to the images that each of some split instructions names."""
    file_format = builder.info.file_format.value
    if file_format != "tfrecord":
        raise ValueError(
            "The TFDS data set must be stored as TFRecord files. "
            f"Received: tfds:{name} in the format {file_format!r}."
        )
    parts = {role: builder.info.splits[slices[role]].file_instructions for role in slices}
    sizes = {part.filename: part.examples_in_shard for role in parts for part in parts[role]}
    records = scan_records(list(sizes))
    found = np.bincount(records.files, minlength=len(sizes))
    if (wrong := np.flatnonzero(found != list(sizes.values()))).size:
        path = list(sizes)[wrong[0]]
        raise ValueError(
            f"A file of tfds:{name} must have {sizes[path]} records. "
            f"Received: {path!r} with {found[wrong[0]]}."
        )
    starts = dict(zip(sizes, np.cumsum(found) - found, strict=True))
    return {
        role: _to_split(builder.info.features, records.take(_places(parts[role], starts)))
        for role in parts
    }


def _places(instructions: list[Any], starts: dict[str, int]) -> np.ndarray:
    return np.concatenate(
        [starts[part.filename] + part.skip + np.arange(part.take) for part in instructions]
    )


def _to_split(features: Any, records: Records) -> Split:
    import tensorflow_datasets as tfds

    def load(index: tf.Tensor, window: Window | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        example = features.deserialize_example(
            records.tensor(index), decoders={"image": tfds.decode.SkipDecoding()}
        )
        image = _decode(features["image"], example["image"], window)
        return image, tf.cast(example["label"], tf.int32)

    return Split(load, len(records.files))


def _decode(feature: Any, data: tf.Tensor, window: Window | None) -> tf.Tensor:
    def decode_any():
        return cut(_to_rgb(feature.decode_example(data)), window)

    def decode_plain_jpeg():
        image = decode_jpeg(data, window, channels)
        return tf.repeat(image, 3, axis=-1) if channels == 1 else image

    channels = feature.shape[-1]
    if feature.encoding_format == "png" or channels not in (1, 3):
        return decode_any()
    image = tf.cond(tf.io.is_jpeg(data), decode_plain_jpeg, decode_any)
    return tf.ensure_shape(image, (*((None, None) if window else feature.shape[:2]), 3))


def _to_rgb(image: tf.Tensor) -> tf.Tensor:
    """uint8 or uint16 `(height, width, 1 to 4)` to uint8 `(height, width, 3)`."""
    channels = image.shape[-1]
    image = tf.cast(image, tf.int32) if image.dtype == tf.uint8 else _narrow(image)
    if channels in (2, 4):
        alpha = image[..., -1:]
        image = (image[..., :-1] * alpha + 255 * (255 - alpha) + 127) // 255
    if channels in (1, 2):
        image = tf.repeat(image, 3, axis=-1)
    image = tf.ensure_shape(image, (*image.shape[:2], 3))
    return tf.cast(image, tf.uint8)


def _narrow(image: tf.Tensor) -> tf.Tensor:
    return (tf.cast(image, tf.int32) + 128) // 257  # 65535 / 255 = 257
