"""Random changes to one training image: uint8 in and out, each determined by a key alone.

A key is two integers, the seed of `tf.random.stateless_uniform`: the same key gives the same image,
wherever and whenever it is made.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import tensorflow as tf

from keras_vit.data.structures import Window

MAX_MAGNITUDE = 10  # of RandAugment
_GRAY = 128  # beyond the border of what RandAugment moves
_JITTER = 0.3  # ThreeAugment's, of brightness, contrast and colour
_BLUR = (0.1, 2.0)  # ThreeAugment's, standard deviation in pixels
_ERASED_AREA = (0.02, 1 / 3)  # shares of the image
_ERASED_ASPECT = (0.3, 1 / 0.3)


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image, in this order.

    Args:
        min_crop_area: A crop keeps a share of the area drawn from [min_crop_area, 1], in (0, 1],
            has an aspect ratio between 3/4 and 4/3 of the image's and lies inside the image; 1
            crops nothing.
        rotation: Largest angle in degrees to either side, in [0, 180].
        shift: Largest shift as a share of the side, in each direction, in [0, 1). Where a
            rotation or a shift reaches beyond the border, the border's pixels go on.
        flip: Whether half of the images are mirrored.
        rand_augment: `(num_ops, magnitude)` of RandAugment, or None: so many operations, each
            drawn from `OPERATIONS` and with a random sign, at a magnitude in [0, 10]; 10 is
            torchvision's 30.
        three_augment: Whether an image becomes gray, is solarized or is blurred, one of them,
            and has its brightness, contrast and colour changed by up to 30 %.
        erasing: Probability in [0, 1] that a rectangle becomes noise.

    Raises:
        ValueError: An argument is out of its range.

    Source: crops: "Going deeper with convolutions", arXiv 1409.4842, Section 6 (the aspect is
    relative to the image's, and clipped where the crop would not lie inside, rather than drawn
    again); RandAugment: arXiv 1909.13719, with the ranges of torchvision's `RandAugment` and gray
    128 beyond the border;
    ThreeAugment: DeiT III, arXiv 2204.07118, Section 3.3, and facebookresearch/deit `augment.py`
    (which draws the order of the three changes of colour; here brightness is first, then
    contrast, then colour); erasing: arXiv 1708.04896, with timm's shares of 2 % to 33 % of the
    area and aspect ratios of 0.3 to 1/0.3 (a side that would not fit is the image's).
    """

    min_crop_area: float = 1.0
    rotation: float = 0.0
    shift: float = 0.0
    flip: bool = False
    rand_augment: tuple[int, float] | None = None
    three_augment: bool = False
    erasing: float = 0.0

    def __post_init__(self):
        self._check("min_crop_area", "in (0, 1]", 0 < self.min_crop_area <= 1)
        self._check("rotation", "in [0, 180]", 0 <= self.rotation <= 180)
        self._check("shift", "in [0, 1)", 0 <= self.shift < 1)
        self._check("rand_augment", _RAND_AUGMENT, _is_rand_augment(self.rand_augment))
        self._check("erasing", "in [0, 1]", 0 <= self.erasing <= 1)

    def _check(self, name, expected, holds):
        if not holds:
            value = getattr(self, name)
            raise ValueError(f"`{name}` must be {expected}. Received: {name}={value!r}.")

    def window(self, key: tf.Tensor) -> Window | None:
        """The crop of the image with this key, in whole pixels; None where nothing is cropped."""
        if self.min_crop_area == 1:
            return None
        crop, place, *_ = self._draw(key)
        share_y, share_x = tf.unstack(_crop_sides(crop))
        draw_y, draw_x = tf.unstack(place + 0.5)

        def window(height, width):
            h, y = _place(height, share_y, draw_y)
            w, x = _place(width, share_x, draw_x)
            return y, x, h, w

        return window

    @tf.autograph.experimental.do_not_convert  # which takes seconds, and has nothing to convert
    def apply(self, image: tf.Tensor, key: tf.Tensor, *, crop: bool = True) -> tf.Tensor:
        """Changes an image of the model's size.

        Args:
            image: uint8 `(H, W, 3)`, of a static size.
            key: Two integers.
            crop: Whether the crop is made here, at fractions of a pixel and in one resampling
                with the rotation and the shift; False for an image read through `window(key)`.

        Returns:
            uint8 `(H, W, 3)`.
        """
        image = self._move(image, key, crop and self.min_crop_area < 1)
        if self.rand_augment:
            image = rand_augment(image, tf.random.fold_in(key, 1), *self.rand_augment)
        if self.three_augment:
            image = three_augment(image, tf.random.fold_in(key, 2))
        if self.erasing:
            image = erase(image, tf.random.fold_in(key, 3), self.erasing)
        return image

    def _draw(self, key):
        """The crop's (area, log aspect), its place (y, x), the shift (y, x), the angle, mirror."""
        limits = [
            (self.min_crop_area, 1),
            (-math.log(4 / 3) / 2, math.log(4 / 3) / 2),
            *((-0.5, 0.5), (-0.5, 0.5)),  # of the room that the crop leaves
            *((-self.shift, self.shift), (-self.shift, self.shift)),
            (math.radians(-self.rotation), math.radians(self.rotation)),
            (-0.5, 0.5),
        ]
        low, high = np.array(limits, np.float32).T
        draws = low + (high - low) * tf.random.stateless_uniform([8], key)
        crop, place, shift, others = tf.split(draws, 4)
        return crop, place, shift, *tf.unstack(others)

    def _move(self, image, key, crop):
        """Crops, rotates, shifts and mirrors, in one resampling; mirrors alone without one."""
        crop_draws, place, shift, angle, mirror = self._draw(key)
        mirrored = mirror < 0
        if not (crop or self.rotation or self.shift):
            if not self.flip:
                return image
            return tf.cond(mirrored, lambda: tf.reverse(image, [1]), lambda: image)
        sides = _crop_sides(crop_draws) if crop else tf.ones([2])
        centre = place * (1 - sides) + shift if crop else shift
        mirror = tf.where(mirrored, -1.0, 1.0) if self.flip else 1.0
        return _resample(image, sides, centre, angle if self.rotation else None, mirror)


_RAND_AUGMENT = (
    f"(num_ops, magnitude), a positive int and a number in [0, {MAX_MAGNITUDE}], or None"
)


def _is_rand_augment(value) -> bool:
    if value is None:
        return True
    if not isinstance(value, tuple | list) or len(value) != 2:
        return False
    num_ops, magnitude = value
    if isinstance(num_ops, bool) or not isinstance(num_ops, int):
        return False
    return num_ops > 0 and isinstance(magnitude, int | float) and 0 <= magnitude <= MAX_MAGNITUDE


def _crop_sides(draws):
    """The sides (y, x) of a crop as shares of the image's, from its (area, log aspect)."""
    area, log_ratio = tf.unstack(draws)
    root = tf.sqrt(area)
    ratio = tf.clip_by_value(tf.exp(log_ratio), root, 1 / root)  # no side longer than the image's
    return tf.stack([root / ratio, root * ratio])


def _place(whole, share, draw):
    """A part of a side in whole pixels: its length, and its start, each start as likely."""
    length = tf.clip_by_value(
        tf.cast(tf.round(share * tf.cast(whole, tf.float32)), tf.int32), 1, whole
    )
    places = tf.cast(whole - length + 1, tf.float32)
    return length, tf.minimum(tf.cast(draw * places, tf.int32), whole - length)


def _resample(image, sides, centre, angle, mirror):
    """Takes the part with these sides, at this place from the centre, turned by this angle."""
    height, width, _ = image.shape
    x0, y0 = (width - 1) / 2, (height - 1) / 2
    cos, sin = (1.0, 0.0) if angle is None else (tf.cos(angle), tf.sin(angle))
    side_y, side_x = tf.unstack(sides)
    move_y, move_x = tf.unstack(centre * (height, width))
    # Output pixel (x, y) is taken from (a x + b y + c, d x + e y + f).
    a, b = side_x * cos * mirror, -side_x * sin
    d, e = side_y * sin * mirror, side_y * cos
    c, f = x0 + move_x - a * x0 - b * y0, y0 + move_y - d * x0 - e * y0
    image = _transform(tf.cast(image, tf.float32), (a, b, c, d, e, f), "BILINEAR", "NEAREST")
    return tf.cast(tf.round(image), tf.uint8)


def _transform(image, matrix, interpolation, fill_mode):
    image = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.expand_dims(image, 0),
        transforms=tf.stack([[*matrix, 0.0, 0.0]]),
        output_shape=image.shape[:2],
        interpolation=interpolation,
        fill_mode=fill_mode,
        fill_value=float(_GRAY),
    )
    return tf.squeeze(image, 0)


# The operations of RandAugment: (image, strength in [0, 1], sign) -> image. Those of colour give
# Pillow's pixels.


def identity(image, strength, sign):
    """The image."""
    return image


def auto_contrast(image, strength, sign):
    """Stretches each channel to [0, 255] (`PIL.ImageOps.autocontrast`)."""
    low, high = (
        tf.cast(reduce(image, axis=(0, 1)), tf.float64) for reduce in (tf.reduce_min, tf.reduce_max)
    )  # (3,)
    scale = 255 / tf.maximum(high - low, 1)
    levels = tf.range(256, dtype=tf.float64)[:, tf.newaxis]
    stretched = tf.floor(tf.clip_by_value(levels * scale - low * scale, 0, 255))
    return _look_up(image, tf.where(high > low, stretched, levels))


def equalize(image, strength, sign):
    """Flattens each channel's histogram (`PIL.ImageOps.equalize`)."""
    counts = tf.math.bincount(tf.reshape(_places(image), [-1]), minlength=768, maxlength=768)
    counts = tf.reshape(counts, (256, 3))
    brightest = tf.cast(tf.reduce_max(image, axis=(0, 1)), tf.int32)  # (3,)
    last = tf.gather_nd(counts, tf.stack([brightest, [0, 1, 2]], axis=1))
    step = (tf.reduce_sum(counts, axis=0) - last) // 255  # (3,)
    table = (step // 2 + tf.cumsum(counts, axis=0, exclusive=True)) // tf.maximum(step, 1)
    levels = tf.range(256)[:, tf.newaxis]
    return _look_up(image, tf.where(step > 0, tf.minimum(table, 255), levels))


def _places(image):
    """Where each value of an image stands in a flat table of (256, 3)."""
    return tf.cast(image, tf.int32) * 3 + [0, 1, 2]


def _look_up(image, table):
    return tf.gather(tf.reshape(tf.cast(table, tf.uint8), [-1]), _places(image))


def rotate(image, strength, sign):
    """Turns by up to 30 degrees."""
    height, width, _ = image.shape
    angle = sign * (strength * math.pi / 6)
    cos, sin = tf.cos(angle), tf.sin(angle)
    x0, y0 = (width - 1) / 2, (height - 1) / 2
    return _moved(image, cos, -sin, x0 - cos * x0 + sin * y0, sin, cos, y0 - sin * x0 - cos * y0)


def shear_x(image, strength, sign):
    """Moves each row by up to 0.3 of its place, about the top left corner."""
    slope = sign * (0.3 * strength)
    return _moved(image, 1.0, slope, slope / 2, 0.0, 1.0, 0.0)


def shear_y(image, strength, sign):
    """Moves each column by up to 0.3 of its place, about the top left corner."""
    slope = sign * (0.3 * strength)
    return _moved(image, 1.0, 0.0, 0.0, slope, 1.0, slope / 2)


def translate_x(image, strength, sign):
    """Moves sideways by up to 150/331 of the width, in whole pixels."""
    return _moved(image, 1.0, 0.0, sign * int(strength * 150 / 331 * image.shape[1]), 0.0, 1.0, 0.0)


def translate_y(image, strength, sign):
    """Moves up or down by up to 150/331 of the height, in whole pixels."""
    return _moved(image, 1.0, 0.0, 0.0, 0.0, 1.0, sign * int(strength * 150 / 331 * image.shape[0]))


def _moved(image, *matrix):
    return _transform(image, matrix, "NEAREST", "CONSTANT")


def solarize(image, strength, sign):
    """Inverts the values from 255 (1 - strength) on (`PIL.ImageOps.solarize`)."""
    return tf.where(image < math.ceil(255 * (1 - strength)), image, 255 - image)


def posterize(image, strength, sign):
    """Keeps 8 to 4 bits (`PIL.ImageOps.posterize`)."""
    return tf.bitwise.bitwise_and(image, tf.constant(256 - 2 ** round(4 * strength), tf.uint8))


def color(image, strength, sign):
    """Blends with its gray image, by 1 -/+ 0.9 (`PIL.ImageEnhance.Color`)."""
    return _color(image, 1 + sign * (0.9 * strength))


def contrast(image, strength, sign):
    """Blends with its mean gray, by 1 -/+ 0.9 (`PIL.ImageEnhance.Contrast`)."""
    return _contrast(image, 1 + sign * (0.9 * strength))


def brightness(image, strength, sign):
    """Blends with black, by 1 -/+ 0.9 (`PIL.ImageEnhance.Brightness`)."""
    return _brightness(image, 1 + sign * (0.9 * strength))


def sharpness(image, strength, sign):
    """Blends with its smoothed image, by 1 -/+ 0.9 (`PIL.ImageEnhance.Sharpness`)."""
    return _blend(_smooth(image), image, 1 + sign * (0.9 * strength))


def _color(image, factor):
    return _blend(_luma(image)[..., tf.newaxis], image, factor)


def _contrast(image, factor):
    mean = tf.reduce_mean(tf.cast(_luma(image), tf.float64))
    return _blend(tf.floor(mean + 0.5), image, factor)


def _brightness(image, factor):
    return _blend(0.0, image, factor)


def _blend(other, image, factor):
    """`other + factor (image - other)` as Pillow rounds it: downwards."""
    other, image = tf.cast(other, tf.float32), tf.cast(image, tf.float32)
    return tf.cast(tf.clip_by_value(other + factor * (image - other), 0, 255), tf.uint8)


def _luma(image):
    """Rec. 601's luma `(H, W)` in int32, as Pillow computes it."""
    red, green, blue = tf.unstack(tf.cast(image, tf.int32), axis=-1)
    return (red * 19595 + green * 38470 + blue * 7471 + 32768) // 65536


def _smooth(image):
    """Each pixel five times and its eight neighbours once, over 13; the border stays."""
    image = tf.cast(image, tf.float32)
    height, width, _ = image.shape
    if min(height, width) < 3:
        return image
    rows = image[:-2] + image[1:-1] + image[2:]
    total = rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]
    inner = tf.floor((total + 4 * image[1:-1, 1:-1]) / 13 + 0.5)
    middle = tf.concat([image[1:-1, :1], inner, image[1:-1, -1:]], axis=1)
    return tf.concat([image[:1], middle, image[-1:]], axis=0)


OPERATIONS = (
    identity,
    auto_contrast,
    equalize,
    rotate,
    solarize,
    color,
    posterize,
    contrast,
    brightness,
    sharpness,
    shear_x,
    shear_y,
    translate_x,
    translate_y,
)


def rand_augment(image, key, num_ops, magnitude):
    """Applies operations drawn from `OPERATIONS`, with random signs.

    Args:
        image: uint8 `(H, W, 3)`, of a static size.
        key: Two integers.
        num_ops: How many, one after the other; one may come twice.
        magnitude: In [0, 10].

    Returns:
        uint8 `(H, W, 3)`.
    """
    choices = tf.random.stateless_uniform([num_ops, 2], key)
    for index in range(num_ops):
        sign = tf.where(choices[index, 1] < 0.5, -1.0, 1.0)
        which = tf.cast(choices[index, 0] * len(OPERATIONS), tf.int32)
        image = _operate(image, which, sign, magnitude / MAX_MAGNITUDE)
    return image


def _operate(image, which, sign, strength):
    def branch(operation):
        return lambda: tf.ensure_shape(operation(image, strength, sign), image.shape)

    return tf.switch_case(which, [branch(operation) for operation in OPERATIONS])


def three_augment(image, key):
    """Grayscale, solarization or blur, then jitter of brightness, contrast and colour.

    Args:
        image: uint8 `(H, W, 3)`, of a static size.
        key: Two integers.

    Returns:
        uint8 `(H, W, 3)`.
    """
    which, blur, *jitter = tf.unstack(tf.random.stateless_uniform([5], key))
    image = tf.switch_case(
        tf.cast(which * 3, tf.int32),
        [
            lambda: _color(image, 0.0),
            lambda: solarize(image, 0.5, 1),
            lambda: gaussian_blur(image, _BLUR[0] + blur * (_BLUR[1] - _BLUR[0])),
        ],
    )
    for change, draw in zip((_brightness, _contrast, _color), jitter, strict=True):
        image = change(image, 1 + _JITTER * (2 * draw - 1))
    return image


def gaussian_blur(image, sigma):
    """Weighs each pixel's surroundings by exp(-d^2 / (2 sigma^2)), d in pixels.

    Args:
        image: uint8 `(H, W, 3)`, of a static size.
        sigma: Positive, in pixels.

    Returns:
        uint8 `(H, W, 3)`. At the border the weights inside are scaled to a sum of 1; Pillow
        repeats the border's pixels, and approximates the bell by boxes.
    """

    def weights(size):  # (size, size), rows of sum 1
        place = tf.range(size, dtype=tf.float32)
        return tf.nn.softmax(-(((place[:, tf.newaxis] - place) / sigma) ** 2) / 2)

    height, width, _ = image.shape
    image = tf.einsum("yi,ixc->yxc", weights(height), tf.cast(image, tf.float32))
    image = tf.einsum("xj,yjc->yxc", weights(width), image)
    return tf.cast(tf.clip_by_value(tf.round(image), 0, 255), tf.uint8)


def erase(image, key, probability):
    """Fills a random rectangle with noise, uniform in [0, 255], with a probability.

    Args:
        image: uint8 `(H, W, 3)`, of a static size.
        key: Two integers.
        probability: In [0, 1].

    Returns:
        uint8 `(H, W, 3)`.
    """
    whether, *draws = tf.unstack(tf.random.stateless_uniform([5], key))
    return tf.cond(
        whether < probability,
        lambda: _erase(image, draws, tf.random.fold_in(key, 1)),
        lambda: image,
    )


def _erase(image, draws, key):
    height, width, _ = image.shape
    area = _ERASED_AREA[0] + draws[0] * (_ERASED_AREA[1] - _ERASED_AREA[0])
    low, high = (math.log(aspect) / 2 for aspect in _ERASED_ASPECT)
    ratio = tf.exp(low + draws[1] * (high - low))
    # In shares of the sides: for the aspect of a rectangle in pixels, the image's is taken out.
    ratio *= math.sqrt(width / height)
    h, y = _place(height, tf.sqrt(area) * ratio, draws[2])
    w, x = _place(width, tf.sqrt(area) / ratio, draws[3])
    rows, columns = tf.range(height)[:, tf.newaxis], tf.range(width)
    inside = (rows >= y) & (rows < y + h) & (columns >= x) & (columns < x + w)
    noise = tf.cast(tf.random.stateless_uniform(image.shape, key, 0, 256, tf.int32), tf.uint8)
    return tf.where(inside[..., tf.newaxis], noise, image)
