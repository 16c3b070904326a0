"""Decoding the bytes of an image inside a TensorFlow graph, to the pixels of `keras_vit.data`."""

import tensorflow as tf

from keras_vit.data.jpeg import decode_jpeg

_JPEG, _PNG, _EXIF = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"Exif\0\0"
_ORIENTATION_TAG, _LONG = 0x0112, 4  # a tag and a type
_FLIPPED_LEFT_RIGHT, _FLIPPED_UPSIDE_DOWN = (2, 3, 6, 7), (3, 4, 7, 8)  # EXIF orientations
_QUARTER_TURN = 5  # and above: rows and columns change places


def decode_image(data):
    """Decodes JPEG or PNG data as RGB, in TensorFlow operations.

    The pixels are those of `keras_vit.data.decode_image`: the EXIF orientation is applied, gray
    is repeated, transparency is composited over white, gray of 16 bits is scaled by 1/257 and
    rounded. It differs from that function in what TensorFlow cannot do:

    - A JPEG in CMYK: values may differ by 1 where there is black, which TensorFlow rounds down.
      One without Adobe's marker is taken as it is, not as inverted.
    - An orientation that stands in XMP alone, or in a PNG's text ("Raw profile type exif", of
      older programs), is not seen. Pillow misses a transparent level of
      gray of 2 or 4 bits, which is white here.
    - Of a 16-bit colour PNG with one transparent colour, values may differ.
    - Other formats are refused: of GIF and BMP, TensorFlow reads transparency and palettes
      otherwise, and animated WebP files crash its process (2.21).

    Args:
        data: scalar string tensor, the content of a file.

    Returns:
        uint8 tensor (height, width, 3) with values in [0, 255].

    Raises:
        tf.errors.InvalidArgumentError: when it runs on data that are of another format, damaged
            or cut off.
    """
    is_jpeg, is_png = (_starts_with(data, magic) for magic in (_JPEG, _PNG))
    # Without the bytes themselves: a message that is not UTF-8 cannot be raised.
    message = "Cannot read an image: its data must be JPEG or PNG. Received other data, bytes:"
    known = tf.debugging.Assert(is_jpeg | is_png, [message, tf.strings.length(data)])
    with tf.control_dependencies([known]):
        # int64 holds the sums and lengths that a damaged file may claim.
        content = tf.io.decode_raw(data, tf.uint8)
        image, block = tf.cond(
            is_jpeg,
            lambda: (decode_jpeg(data, None), _exif_in_jpeg(content)),
            lambda: (_decode_png(data, content), _exif_in_png(content)),
        )
        return _upright(image, _orientation(content, block))


def _starts_with(data, prefix):
    return tf.strings.substr(data, 0, len(prefix)) == prefix


def _decode_png(data, content):
    """PNG data as RGB; the header says their bit depth and colour type."""
    depth, color_type = (_number(content, tf.constant(place, tf.int64), 1) for place in (24, 25))
    transparent = (color_type & 4 > 0) | (_png_chunk(content, b"tRNS") < tf.size(content, tf.int64))
    return tf.cond(
        (depth == 16) & (color_type == 0),
        lambda: _wide_gray(data),
        # Not with 4 channels for all: TensorFlow misreads 1, 2 and 4 bits without transparency.
        lambda: tf.cond(
            transparent, lambda: _over_white(data), lambda: tf.io.decode_png(data, channels=3)
        ),
    )


def _wide_gray(data):
    """PNG data, gray of 16 bits, as RGB; where they are declared transparent, white."""
    image = tf.cast(tf.io.decode_png(data, channels=4, dtype=tf.uint16), tf.int32)
    gray = (image[..., :3] + 128) // 257  # 65535 / 255 = 257
    return tf.cast(tf.where(image[..., 3:] == 0, 255, gray), tf.uint8)


def _over_white(data):
    """PNG data with transparency as RGB; of 16 bits the high byte."""
    image = tf.cast(tf.io.decode_png(data, channels=4), tf.uint16)  # 255 * 255 + 127 < 2**16
    color, alpha = image[..., :3], image[..., 3:]
    return tf.cast((color * alpha + 255 * (255 - alpha) + 127) // 255, tf.uint8)


def _upright(image, orientation):
    """The image as its EXIF orientation, 1 to 8, says that it is meant."""

    def change_if(condition, image, change):
        return tf.cond(condition, lambda: change(image), lambda: image)

    image = change_if(
        orientation >= _QUARTER_TURN, image, lambda image: tf.transpose(image, (1, 0, 2))
    )
    for orientations, axis in ((_FLIPPED_LEFT_RIGHT, 1), (_FLIPPED_UPSIDE_DOWN, 0)):
        flipped = tf.reduce_any(orientation == orientations)
        image = change_if(flipped, image, lambda image, axis=axis: tf.reverse(image, [axis]))
    return tf.ensure_shape(image, (None, None, 3))


def _orientation(content, block):
    """The EXIF orientation, 1 to 8; 1 where it is absent or unreadable.

    Args:
        content: uint8 tensor of the bytes of a file.
        block: where the EXIF block, a TIFF header with its directory, begins.

    Source: TIFF 6.0, section 2; Exif 2.32, section 4.6.4 A.
    """
    order = _number(content, block, 2)
    little_endian = order == 0x4949  # "II"; big-endian is "MM"
    valid = (little_endian | (order == 0x4D4D)) & (
        _number(content, block + 2, 2, little_endian) == 42
    )
    directory = block + _number(content, block + 4, 4, little_endian)
    count = _number(content, directory, 2, little_endian)
    entries = directory + 2 + 12 * tf.range(tf.where(valid, count, 0))
    tags = _number(content, entries, 2, little_endian)
    # After tag, type and count: 4 bytes, or 2 and what fills them.
    is_long = _number(content, entries + 2, 2, little_endian) == _LONG
    values = tf.where(
        is_long,
        _number(content, entries + 8, 4, little_endian),
        _number(content, entries + 8, 2, little_endian),
    )
    orientation = tf.reduce_sum(tf.where(tags == _ORIENTATION_TAG, values, 0))
    return tf.where((orientation >= 1) & (orientation <= 8), orientation, 1)


def _exif_in_jpeg(content):
    """Where the EXIF block of a JPEG begins, or a place past its end.

    Source: JPEG (ITU T.81), B.1.1.4: a marker, then the length of all but the marker; and B.1.1.2:
    any number of bytes 0xFF may stand before a marker.
    """

    def is_exif(place):
        marker, name = _number(content, place, 2), _number(content, place + 4, len(_EXIF))
        return (marker == 0xFFE1) & (name == int.from_bytes(_EXIF, "big"))

    def after(place):
        marker, length = _number(content, place, 2), _number(content, place + 2, 2)
        # The coded image, which begins with no marker, ends the metadata.
        end = tf.where(marker > 0xFF00, place + 2 + length, tf.size(content, tf.int64))
        return tf.where(marker == 0xFFFF, place + 1, end)

    return _find(content, 2, is_exif, after) + 4 + len(_EXIF)


def _exif_in_png(content):
    """Where the EXIF block of a PNG begins, or a place past its end.

    Some writers put the header of a JPEG's block before it, which Pillow passes over, too.
    """
    place = _png_chunk(content, b"eXIf") + 8
    has_header = _number(content, place, len(_EXIF)) == int.from_bytes(_EXIF, "big")
    return place + tf.where(has_header, tf.constant(len(_EXIF), tf.int64), 0)


def _png_chunk(content, name):
    """Where the first chunk of a type begins, or a place past the end.

    Source: PNG (third edition), 5.3: length, type, data, checksum.
    """

    def is_wanted(place):
        return _number(content, place + 4, 4) == int.from_bytes(name, "big")

    def after(place):
        return place + 12 + _number(content, place, 4)

    return _find(content, len(_PNG), is_wanted, after)


def _find(content, first, is_wanted, after):
    """Goes from part to part of a file, to the one that is wanted or past the end."""
    size = tf.size(content, tf.int64)
    [place] = tf.while_loop(
        lambda place: (place < size) & ~is_wanted(place),
        lambda place: [after(place)],
        [tf.constant(first, tf.int64)],
    )
    return place


def _number(content, place, size, little_endian=False):
    """The integer in `size` bytes at a place, or at each of several; int64.

    Past the end the last byte is read again and again, which is no header, tag or marker.
    """
    last = tf.size(content, tf.int64) - 1
    places = tf.minimum(tf.expand_dims(place, -1) + tf.range(size, dtype=tf.int64), last)
    weights = tf.constant([256**power for power in range(size)], tf.int64)
    weights = tf.where(little_endian, weights, weights[::-1])
    return tf.reduce_sum(tf.cast(tf.gather(content, places), tf.int64) * weights, axis=-1)
