"""Where images come from: one short spec names any of the sources."""

from __future__ import annotations

import os
from pathlib import Path

from keras_vit.data.digits import load_digits
from keras_vit.data.folder import load_folder
from keras_vit.data.structures import ImageData
from keras_vit.data.tfds import load_tfds
from keras_vit.data.tfrecord import load_tfrecord

_FORMS = '"digits", "folder:PATH", "tfrecord:PATH" or "tfds:NAME[:CONFIG]"'


def load_data(spec: str, *, skip_unreadable: bool = False) -> ImageData:
    """Loads labelled images in three disjoint splits that are the same every time.

    Args:
        spec: "digits" (see `load_digits`), "folder:PATH" (see `load_folder`),
            "tfrecord:PATH" (see `load_tfrecord`) or "tfds:NAME[:CONFIG]" (see `load_tfds`).
        skip_unreadable: Whether to leave unreadable files of a folder out rather than to fail;
            False for other sources.

    Returns:
        An `ImageData`.

    Raises:
        TypeError: If `spec` is not a string.
        ValueError: If `spec` has none of the four forms, `skip_unreadable` does not go with it, or
            the data cannot be used.
    """
    if not isinstance(spec, str):
        raise TypeError(f"`spec` must be a string: {_FORMS}. Received: spec={spec!r}.")
    source, _, rest = spec.partition(":")
    if skip_unreadable and source in ("digits", "tfrecord", "tfds"):
        raise ValueError(
            "`skip_unreadable` is for folders of image files. "
            f"Received: skip_unreadable=True, spec={spec!r}."
        )
    if spec == "digits":
        return load_digits()
    if source == "folder" and rest:
        return load_folder(rest, skip_unreadable=skip_unreadable)
    if source == "tfrecord" and rest:
        return load_tfrecord(rest)
    if source == "tfds" and rest:
        return load_tfds(rest)
    hint = f' Did you mean "folder:{spec}"?' if Path(spec).is_dir() else ""
    raise ValueError(f"`spec` must be {_FORMS}. Received: spec={spec!r}.{hint}")


def check_outside(spec: str, out: str | os.PathLike) -> None:
    """Raises ValueError if a folder to write is in the folder of images, where it is a class."""
    source, _, rest = spec.partition(":")
    if source != "folder" or not rest:
        return
    images, target = (Path(path).expanduser().resolve() for path in (rest, out))
    if not target.is_relative_to(images):
        return
    if not any(name.startswith(".") for name in target.relative_to(images).parts):  # passed over
        raise ValueError(
            "The folder to write must be outside of the images' folder, whose folders are the "
            f"classes. Received: {str(out)!r}, in {str(images)!r}."
        )
