"""Reading one image file as RGB, whatever its colour mode, bit depth or orientation."""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, UnidentifiedImageError

# A closed list: a file named .jpg must not reach Pillow's rarer readers (EPS runs Ghostscript).
FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM")

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageFacts(NamedTuple):
    """What a check of an image file found.

    Attributes:
        height: Pixels from top to bottom, after the EXIF orientation.
        width: Pixels from left to right, after the EXIF orientation.
        plain_jpeg: Whether the file is an upright gray or YCbCr/RGB JPEG, which
            `tf.io.decode_jpeg` decodes to the same pixels as `decode_image`.
    """

    height: int
    width: int
    plain_jpeg: bool


def read_image(path: str | os.PathLike) -> np.ndarray:
    """Reads an image file as RGB.

    Args:
        path: The file, in one of `FORMATS`. Its content counts, not its extension.

    Returns:
        uint8 array `(height, width, 3)` with values in [0, 255]; see `decode_image`.

    Raises:
        ValueError: If the file cannot be read as an image; names the file and the reason.
    """
    return decode_image(_read_bytes(path), os.fspath(path))


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes the bytes of an image file as RGB.

    The EXIF orientation is applied, gray is repeated, transparency is composited over white,
    CMYK is converted without a colour profile, and of an animation the first frame is taken.
    Gray images of 16 bits are scaled by 1/257 and rounded, not clipped; of 16-bit colour
    images Pillow keeps the high byte, which differs from that by at most 1.

    Args:
        data: The content of the file.
        name: What error messages call it.

    Returns:
        uint8 array `(height, width, 3)` with values in [0, 255].

    Raises:
        ValueError: If the bytes are not a readable image; names the file and the reason.
    """
    with _naming(name):
        image = _open(data)
        return _to_rgb(_upright(image, _orientation(image)))


def check_image(path: str | os.PathLike) -> ImageFacts:
    """Decodes an image file to see that it can be read, more cheaply than `read_image`.

    JPEG data are read to the end but reconstructed at an eighth of the size.

    Args:
        path: The file.

    Returns:
        An `ImageFacts`.

    Raises:
        ValueError: If the file cannot be read as an image; names the file and the reason.
    """
    return check_image_data(_read_bytes(path), os.fspath(path))


def check_image_data(data: bytes, name: str) -> ImageFacts:
    """`check_image` of the content of a file, which errors call `name`."""
    with _naming(name):
        image = _open(data)
        (width, height), orientation = image.size, _orientation(image)
        plain_jpeg = (
            image.format == "JPEG" and image.mode in ("L", "RGB") and orientation not in _UPRIGHT
        )
        image.draft(None, (1, 1))
        _to_rgb(image)
        if orientation >= 5:  # a quarter turn
            height, width = width, height
        return ImageFacts(height, width, plain_jpeg)


def _read_bytes(path: str | os.PathLike) -> bytes:
    with _naming(os.fspath(path)):
        return Path(path).read_bytes()


@contextlib.contextmanager
def _naming(name: str) -> Iterator[None]:
    """Turns whatever fails inside into a ValueError with the file's name and the reason."""
    try:
        yield
    except Exception as error:  # damaged files make Pillow raise almost anything
        raise ValueError(f"Cannot read image {str(name)!r}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its own text names a BytesIO object
        return f"not an image in one of the formats {', '.join(FORMATS)}."
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}."
    return str(error) or type(error).__name__


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ValueError("the file is empty.")
    return Image.open(io.BytesIO(data), formats=FORMATS)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1 where it is absent, unknown, unreadable or applied."""
    if image.format == "TIFF":
        return 1  # Pillow turns these itself
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
        return orientation if orientation in _UPRIGHT else 1
    except Exception:  # damaged metadata do not make the pixels unusable
        return 1


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    # Not ImageOps.exif_transpose: it writes the EXIF block anew, which fails on odd tags.
    return image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image


def _to_rgb(image: Image.Image) -> np.ndarray:
    if image.mode == "F":
        raise ValueError("floating-point images are not supported.")
    if image.mode == "I" or image.mode.startswith("I;16"):
        return _wide_gray_to_rgb(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return np.array(image.convert("RGB"))


def _wide_gray_to_rgb(image: Image.Image) -> np.ndarray:
    wide = np.asarray(image).astype(np.int64)  # (height, width)
    if wide.min() < 0 or wide.max() > 65535:
        raise ValueError(
            "gray values must be in [0, 65535]. "
            f"Received: values from {wide.min()} to {wide.max()}."
        )
    gray = (wide + 128) // 257  # 65535 / 255 = 257
    if isinstance(transparent := image.info.get("transparency"), int):
        gray[wide == transparent] = 255
    return np.repeat(gray.astype(np.uint8)[..., np.newaxis], 3, axis=-1)
