"""Decoding JPEG data in a TensorFlow graph, or a part of them."""

from __future__ import annotations

import tensorflow as tf

from keras_vit.data.structures import Window

_MARGIN = 2  # pixels


def decode_jpeg(data: tf.Tensor, window: Window | None, channels: int = 3) -> tf.Tensor:
    """Decodes JPEG data, reconstructing no more than the window asks for.

    The pixels are Pillow's: the arithmetic is the accurate one. An EXIF orientation is ignored.

    Args:
        data: Scalar string, the content of a JPEG file.
        window: A `Window`, or None for the whole image.
        channels: 3 for RGB, to which gray is repeated, or 1 for the luma alone.

    Returns:
        uint8 `(height, width, channels)`; the same pixels as the window of the whole image.
    """
    if window is None:
        return tf.io.decode_jpeg(data, channels=channels, dct_method="INTEGER_ACCURATE")
    height, width, _ = tf.unstack(tf.image.extract_jpeg_shape(data))
    y, x, h, w = window(height, width)
    # At its border a pixel's colour depends on its neighbours', which are therefore read as well.
    top, left = tf.maximum(y - _MARGIN, 0), tf.maximum(x - _MARGIN, 0)
    bottom, right = tf.minimum(y + h + _MARGIN, height), tf.minimum(x + w + _MARGIN, width)
    image = tf.image.decode_and_crop_jpeg(
        data,
        tf.stack([top, left, bottom - top, right - left]),
        channels=channels,
        dct_method="INTEGER_ACCURATE",
    )
    return image[y - top : y - top + h, x - left : x - left + w]
