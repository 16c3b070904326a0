"""A folder of images, one folder per class, with or without folders for the splits."""

from __future__ import annotations

import collections
import hashlib
import os
import warnings
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_vit.data.images import ImageFacts, check_image, read_image
from keras_vit.data.jpeg import decode_jpeg
from keras_vit.data.progress import map_threads
from keras_vit.data.structures import SPLIT_NAMES, ImageData, Split, Window, cut, fingerprint
from keras_vit.files import shown

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff")

_NAMED_UNREADABLE = 3

# Class name -> paths of its images, relative to the root, with forward slashes.
Classes = dict[str, list[str]]


def load_folder(path: str | os.PathLike, *, skip_unreadable: bool = False) -> ImageData:
    """Loads a folder of images whose subfolders are the classes.

    The folder holds either `class/image.jpg` or `split/class/image.jpg`, the splits being
    "train", "val" (or "valid", "validation") and "test". Labels follow the sorted class names.
    Images are the files with one of `EXTENSIONS`, in any case and at any depth below their
    class; hidden files and folders are ignored, and so are links to folders inside a class. A
    warning counts the others.

    Splits that are missing are carved out of the images for training, class by class, at least
    one image each:

    - without any split, or with "train" alone: 10 % for validation and 10 % for test;
    - without "val": 10 % of "train" for validation;
    - without "test": "val" is the test split, and 10 % of "train" are for validation, so that
      what is reported was not chosen by.

    Which images these are depends on a hash of their paths, so that new files move few others.
    The same hash orders the images of each split, which mixes the classes.

    Every file is decoded once here, so that a damaged one is found now and not in training.

    Args:
        path: The folder; `~` stands for the home directory.
        skip_unreadable: Whether to leave unreadable files out, and to list them in `skipped`,
            rather than to fail.

    Returns:
        An `ImageData`.

    Raises:
        ValueError: If the folder or its classes are missing, empty, too small for the splits or
            different between splits, if splits have other names ("training_set"), or if files
            are unreadable; says which.

    Warns:
        UserWarning: Files in the folders of the classes have other extensions.
    """
    root = Path(path).expanduser().absolute()
    splits = _list_splits(root)
    class_names = _common_class_names(root, splits)
    facts, unreadable = _check_files(root, splits)
    if unreadable and not skip_unreadable:
        raise ValueError(describe_unreadable(unreadable, len(facts) + len(unreadable)))
    splits = _complete_splits(_without(splits, unreadable))
    files = {name: _labelled_files(classes, class_names) for name, classes in splits.items()}
    return ImageData(
        name=f"folder:{root}",
        class_names=class_names,
        **{name: _to_split(root, files[name], facts) for name in files},
        image_size=_median_size([facts[file] for file, _ in files["train"]]),
        fingerprint=_fingerprint(root, class_names, files),
        skipped={shown(root / file): unreadable[file] for file in sorted(unreadable)},
    )


def _list_splits(root: Path) -> dict[str, Classes]:
    """The images by split; all are under "train" where the folder has no splits."""
    if not root.exists():
        raise ValueError(f"The image folder does not exist. Received: path={str(root)!r}.")
    if not root.is_dir():
        raise ValueError(f"The image folder is a file. Received: path={str(root)!r}.")
    folders = _subfolders(root)
    split_folders = [folder for folder in folders if _is_split(folder)]
    names = [folder.name for folder in folders]
    if not split_folders and len(names) > 1 and all(name.lower() in SPLIT_NAMES for name in names):
        raise ValueError(
            "Split folders must hold one folder for each class. Received: "
            f"path={str(root)!r} with images right inside {names}."
        )
    if not split_folders:
        _refuse_misnamed_splits(root, folders)
        return {"train": _list_classes(root, root)}
    _require_plain_splits(root, split_folders, [f for f in folders if f not in split_folders])
    return {SPLIT_NAMES[f.name.lower()]: _list_classes(root, f) for f in split_folders}


def _refuse_misnamed_splits(root: Path, folders: list[Path]) -> None:
    """ValueError for training_set/cat, training_set/dog, test_set/cat...: these are no classes."""
    names = [folder.name for folder in folders]
    named = all(any(split in name.lower() for split in SPLIT_NAMES) for name in names)
    if len(names) < 2 or not named:
        return
    inside = {tuple(f.name for f in _subfolders(folder)) for folder in folders}
    has_images = any(_is_image(file.name) for folder in folders for file in folder.iterdir())
    if len(inside) == 1 and len(min(inside)) > 1 and not has_images:
        raise ValueError(
            "The folders look like splits, as they hold the same folders: name them 'train', 'val' "
            f"and 'test'. Received: path={str(root)!r} with {names}."
        )


def _subfolders(folder: Path) -> list[Path]:
    return sorted(f for f in folder.iterdir() if f.is_dir() and not f.name.startswith("."))


def _is_split(folder: Path) -> bool:
    """Whether a folder has a split's name and holds folders only: "train" may be a class."""
    if folder.name.lower() not in SPLIT_NAMES or not _subfolders(folder):
        return False
    return not any(_is_image(file.name) for file in folder.iterdir())


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _require_plain_splits(root: Path, splits: list[Path], others: list[Path]) -> None:
    others = [folder.name for folder in others if list_images(root, folder)]
    names = [folder.name for folder in splits]
    roles = [SPLIT_NAMES[name.lower()] for name in names]
    if others:
        raise ValueError(
            "An image folder must hold either split folders with class folders inside, or class "
            f"folders. Received: path={str(root)!r} with the split folders {names} and, beside "
            f"them, folders with images: {others}."
        )
    if len(set(roles)) < len(roles):
        raise ValueError(
            f"An image folder must hold each split once. Received: path={str(root)!r} with {names}."
        )
    if "train" not in roles:
        raise ValueError(
            "An image folder with split folders must hold 'train'. "
            f"Received: path={str(root)!r} with {names}."
        )


def _list_classes(root: Path, folder: Path) -> Classes:
    files = {f.name: _list_files(root, f) for f in _subfolders(folder)}
    classes = {name: [file for file in of if _is_image(file)] for name, of in files.items()}
    if not classes:
        raise ValueError(
            "An image folder must hold a folder of images for each class. "
            f"Received: path={str(folder)!r} without any folder inside."
        )
    if bad := [os.fsencode(name) for name in classes if not _is_text(name)]:
        raise ValueError(
            "The names of class folders must be UTF-8: rename them. "
            f"Received: path={str(folder)!r} with {bad}."
        )
    if empty := [name for name, files in classes.items() if not files]:
        raise ValueError(
            f"Every class folder must hold images ({', '.join(EXTENSIONS)}). "
            f"Received: path={str(folder)!r} with the empty classes {empty}."
        )
    others = [file for of in files.values() for file in of if not _is_image(file)]
    if others:
        counts = collections.Counter(Path(file).suffix.lower() or "no suffix" for file in others)
        kinds = ", ".join(f"{count:,} of {suffix}" for suffix, count in sorted(counts.items()))
        warnings.warn(
            f"Files in {folder} that are no images by their names are left out: {kinds}. Images "
            f"are {', '.join(EXTENSIONS)}.",
            stacklevel=2,
        )
    return classes


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def list_images(root: Path, folder: Path) -> list[str]:
    """The images in `folder` and below, hidden ones aside, as sorted paths relative to `root`."""
    return [file for file in _list_files(root, folder) if _is_image(file)]


def _list_files(root: Path, folder: Path) -> list[str]:
    """The files in `folder` and below, hidden ones aside, as sorted paths relative to `root`."""
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        relative = Path(parent).relative_to(root)
        files += [(relative / name).as_posix() for name in names if not name.startswith(".")]
    return sorted(files)


def _common_class_names(root: Path, splits: dict[str, Classes]) -> tuple[str, ...]:
    expected = set(splits["train"])
    for name, classes in splits.items():
        missing, extra = sorted(expected - set(classes)), sorted(set(classes) - expected)
        if missing or extra:
            raise ValueError(
                "Every split must hold the classes of 'train'. "
                f"Received: path={str(root)!r} with {name!r}, missing {missing}, extra {extra}."
            )
    if len(expected) < 2:
        raise ValueError(
            "An image folder must hold at least two classes. "
            f"Received: path={str(root)!r} with the classes {sorted(expected)}."
        )
    return tuple(sorted(expected))


def _check_files(
    root: Path, splits: dict[str, Classes]
) -> tuple[dict[str, ImageFacts], dict[str, str]]:
    """Decodes every file once: the facts of the readable ones, the errors of the others."""

    def check(file: str) -> ImageFacts | str:
        try:
            return check_image(root / file)
        except ValueError as error:
            return str(error)

    files = [file for classes in splits.values() for names in classes.values() for file in names]
    found = dict(zip(files, map_threads(check, files, "Checking images"), strict=True))
    facts = {file: result for file, result in found.items() if not isinstance(result, str)}
    return facts, {file: result for file, result in found.items() if isinstance(result, str)}


def find_images(
    paths: Iterable[str | os.PathLike], out: str | os.PathLike | None = None
) -> list[Path]:
    """The image files that paths of files and folders stand for.

    Args:
        paths: Image files and folders.
        out: A folder to write: what was drawn there before is no image.

    Raises:
        ValueError: There is no such file, or no image in a folder.
    """
    files = []
    for path in map(Path, paths):
        found = [path]
        if path.is_dir():
            found = [path / name for name in list_images(path, path)]
            if out is not None:
                found = [f for f in found if Path(out).resolve() not in f.resolve().parents]
        if not found or not path.exists():
            found = f"no {', no '.join(EXTENSIONS)} in it" if path.exists() else "nothing there"
            raise ValueError(
                f"The images must be image files, or folders of them. Received: {path}, {found}."
            )
        files += found
    return files


def check_images(files: list[Path], skip_unreadable: bool) -> tuple[list[Path], list[str]]:
    """The image files that can be read, and what is wrong with the others.

    Raises:
        ValueError: If some cannot be read, unless `skip_unreadable`, or none can.
    """
    errors = dict(zip(map(str, files), map_threads(_problem, files, "Checking"), strict=True))
    errors = {path: error for path, error in errors.items() if error}
    if errors and (not skip_unreadable or len(errors) == len(files)):
        raise ValueError(describe_unreadable(errors, len(files)))
    return [path for path in files if str(path) not in errors], list(errors.values())


def _problem(file: Path) -> str | None:
    """Why a file cannot be read as an image; None if it can."""
    try:
        check_image(file)
    except ValueError as error:
        return str(error)


def describe_unreadable(unreadable: dict[str, str], total: int) -> str:
    """The message that some of `total` files cannot be read: file -> its own message."""
    named = [unreadable[file] for file in sorted(unreadable)[:_NAMED_UNREADABLE]]
    more = len(unreadable) - len(named)
    return (
        f"{len(unreadable)} of {total} images cannot be read. Repair or remove them, or leave them "
        "out with skip_unreadable=True (`--skip-unreadable` on the command line). Received: "
        + " ".join(named)
        + (f" And {more} more." if more else "")
    )


def _without(splits: dict[str, Classes], unreadable: dict[str, str]) -> dict[str, Classes]:
    kept = {
        split: {name: [f for f in files if f not in unreadable] for name, files in classes.items()}
        for split, classes in splits.items()
    }
    for split, classes in kept.items():
        if empty := [name for name, files in classes.items() if not files]:
            raise ValueError(
                "Every class must hold a readable image. "
                f"Received: classes {empty} of {split!r} with unreadable files only."
            )
    return kept


def _complete_splits(splits: dict[str, Classes]) -> dict[str, Classes]:
    train, validation, test = (splits.get(name) for name in ("train", "validation", "test"))
    if validation is None and test is None:
        train, validation, test = _carve(train, 2)
    elif validation is None or test is None:
        test = test or validation
        train, validation = _carve(train, 1)
    return {"train": train, "validation": validation, "test": test}


def _carve(classes: Classes, count: int) -> list[Classes]:
    """Takes `count` parts of a tenth of each class: `[rest, part, ...]`."""
    parts = [{} for _ in range(count + 1)]
    for name, files in classes.items():
        if len(files) <= count:
            raise ValueError(
                f"Every class must hold at least {count + 1} images, one for each split made of "
                f"them. Received: class {name!r} with {len(files)}."
            )
        files = sorted(files, key=_hash)
        size = max(1, (len(files) + 5) // 10)  # a tenth, rounded
        for index in range(count):
            parts[index + 1][name] = files[index * size : (index + 1) * size]
        parts[0][name] = files[count * size :]
    return parts


def _hash(file: str) -> str:
    return hashlib.sha256(os.fsencode(file)).hexdigest()


def _labelled_files(classes: Classes, class_names: tuple[str, ...]) -> list[tuple[str, int]]:
    files = [(file, label) for label, name in enumerate(class_names) for file in classes[name]]
    return sorted(files, key=lambda item: _hash(item[0]))


def _to_split(root: Path, files: list[tuple[str, int]], facts: dict[str, ImageFacts]) -> Split:
    with tf.device("/CPU:0"):  # input pipelines run there
        paths = tf.constant([os.fsencode(root / file) for file, _ in files])
        labels = tf.constant([label for _, label in files], tf.int32)
        plain = tf.constant([facts[file].plain_jpeg for file, _ in files])

    def load(index: tf.Tensor, window: Window | None = None) -> tuple[tf.Tensor, tf.Tensor]:
        path = paths[index]
        image = tf.cond(
            plain[index],
            lambda: decode_jpeg(tf.io.read_file(path), window),
            lambda: cut(_load_any(path), window),
        )
        return tf.ensure_shape(image, (None, None, 3)), labels[index]

    return Split(load, len(files))


def _load_any(path: tf.Tensor) -> tf.Tensor:
    image = tf.numpy_function(
        lambda name: read_image(os.fsdecode(name)), [path], tf.uint8, stateful=False
    )
    return tf.ensure_shape(image, (None, None, 3))


def _median_size(facts: list[ImageFacts]) -> tuple[int, int]:
    height, width = np.median([(fact.height, fact.width) for fact in facts], axis=0)
    return int(height), int(width)


def _fingerprint(
    root: Path, class_names: tuple[str, ...], files: dict[str, list[tuple[str, int]]]
) -> str:
    sized = {
        split: sorted((file, (root / file).stat().st_size) for file, _ in labelled)
        for split, labelled in files.items()
    }
    return fingerprint(class_names=class_names, files=sized)
