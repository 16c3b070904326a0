"""Augmentation: colours against Pillow, geometry by what it does to ramps."""

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageEnhance, ImageFilter, ImageOps

from keras_vit.data import augmentation as module
from keras_vit.data.augmentation import OPERATIONS, Augmentation


def picture(height=19, width=23, seed=0):
    """Smooth noise with some texture, of a narrow range in the second channel."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype="uint8"))
    image = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    image = np.clip(image + rng.integers(-20, 20, image.shape), 0, 255)
    image[..., 1] = 60 + image[..., 1] // 3
    return image.astype("uint8")


def as_pillow(image):
    return Image.fromarray(np.asarray(image))


def apply(augmentation, image, count, seed=0, **options):
    """An image changed with the keys (seed, 0), (seed, 1), ..."""
    keys = np.stack([np.full(count, seed), np.arange(count)], axis=1)
    keys = tf.data.Dataset.from_tensor_slices(keys)
    changed = keys.map(lambda key: augmentation.apply(tf.constant(image), key, **options))
    return np.stack(list(changed.as_numpy_iterator()))


class TestColours:
    """Pillow's pixels, exactly."""

    @pytest.mark.parametrize("seed", range(5))
    @pytest.mark.parametrize(
        ("operation", "pillow"),
        [(module.auto_contrast, ImageOps.autocontrast), (module.equalize, ImageOps.equalize)],
    )
    def test_tables(self, operation, pillow, seed):
        image = picture(seed=seed)
        np.testing.assert_array_equal(operation(image, 0, 0), pillow(as_pillow(image)))

    @pytest.mark.parametrize(
        ("operation", "pillow"),
        [(module.auto_contrast, ImageOps.autocontrast), (module.equalize, ImageOps.equalize)],
    )
    @pytest.mark.parametrize("kind", ["constant", "two levels", "tiny", "full"])
    def test_tables_of_unusual_images(self, operation, pillow, kind):
        rng = np.random.default_rng(0)
        image = {
            "constant": np.full((7, 5, 3), (3, 0, 255)),
            "two levels": rng.integers(0, 2, (70, 50, 3)) * [1, 100, 255],
            "tiny": rng.integers(0, 256, (3, 2, 3)),
            "full": rng.integers(0, 256, (90, 80, 3)),
        }[kind].astype("uint8")
        np.testing.assert_array_equal(operation(image, 0, 0), pillow(as_pillow(image)))

    @pytest.mark.parametrize(
        ("magnitude", "threshold"), [(0, 255), (3, 178.5), (5, 127.5), (9, 25.5), (10, 0)]
    )
    def test_solarize(self, magnitude, threshold):
        image = picture()
        expected = ImageOps.solarize(as_pillow(image), threshold)
        np.testing.assert_array_equal(module.solarize(image, magnitude / 10, 1), expected)

    @pytest.mark.parametrize(("magnitude", "bits"), [(0, 8), (3, 7), (5, 6), (9, 4), (10, 4)])
    def test_posterize(self, magnitude, bits):
        image = picture()
        expected = ImageOps.posterize(as_pillow(image), bits)
        np.testing.assert_array_equal(module.posterize(image, magnitude / 10, -1), expected)

    @pytest.mark.parametrize(
        ("operation", "pillow"),
        [
            (module.color, ImageEnhance.Color),
            (module.contrast, ImageEnhance.Contrast),
            (module.brightness, ImageEnhance.Brightness),
            (module.sharpness, ImageEnhance.Sharpness),
        ],
    )
    @pytest.mark.parametrize("magnitude", [-10, -4, 0, 7, 10])
    def test_enhance(self, operation, pillow, magnitude):
        image = picture()
        expected = pillow(as_pillow(image)).enhance(1 + 0.09 * magnitude)
        found = operation(image, abs(magnitude) / 10, tf.constant(np.sign(magnitude), tf.float32))
        error = np.abs(np.asarray(found).astype(int) - np.asarray(expected))
        assert error.max() <= 1
        assert (error > 0).mean() < 0.002  # rounding of a value that is almost whole

    def test_sharpness_of_two_rows(self):
        image = picture(2, 9)
        np.testing.assert_array_equal(module.sharpness(image, 1.0, tf.constant(1.0)), image)

    @pytest.mark.parametrize("sigma", [0.5, 1.3, 2.0])
    def test_gaussian_blur(self, sigma):
        """SciPy's, away from the border, and Pillow's approximation."""
        from scipy.ndimage import gaussian_filter

        image = picture(39, 43)
        blurred = np.asarray(module.gaussian_blur(tf.constant(image), sigma))
        assert blurred.dtype == np.uint8
        expected = gaussian_filter(image.astype(float), (sigma, sigma, 0), truncate=6)
        inside = np.s_[12:-12, 12:-12]
        np.testing.assert_allclose(blurred[inside], expected[inside], atol=0.501)
        pillow = as_pillow(image).filter(ImageFilter.GaussianBlur(sigma))
        assert np.abs(blurred.astype(int) - pillow)[3:-3, 3:-3].mean() < 1.5

    def test_blur_keeps_a_constant(self):
        image = np.full((7, 5, 3), 200, "uint8")
        np.testing.assert_array_equal(module.gaussian_blur(tf.constant(image), 2.0), image)


class TestMoves:
    """Pillow's nearest-neighbour transforms: exact, but for a tie here and there."""

    def check(self, found, image, matrix):
        expected = as_pillow(image).transform(
            image.shape[1::-1], Image.Transform.AFFINE, matrix, fillcolor=(128, 128, 128)
        )
        differs = (np.asarray(found) != np.asarray(expected)).any(axis=-1)
        assert differs.mean() < 0.01
        assert not np.array_equal(found, image)

    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_shear(self, sign):
        image = picture()
        sign = tf.constant(sign)
        f = float(0.3 * 0.9 * sign)
        self.check(module.shear_x(tf.constant(image), 0.9, sign), image, (1, f, 0, 0, 1, 0))
        self.check(module.shear_y(tf.constant(image), 0.9, sign), image, (1, 0, 0, f, 1, 0))

    @pytest.mark.parametrize("sign", [-1.0, 1.0])
    def test_translate(self, sign):
        image = picture()  # 19 x 23
        sign = tf.constant(sign)
        x, y = int(0.8 * 150 / 331 * 23) * float(sign), int(0.8 * 150 / 331 * 19) * float(sign)
        self.check(module.translate_x(tf.constant(image), 0.8, sign), image, (1, 0, x, 0, 1, 0))
        self.check(module.translate_y(tf.constant(image), 0.8, sign), image, (1, 0, 0, 0, 1, y))

    @pytest.mark.parametrize("degrees", [-30, -12, 21])
    def test_rotate(self, degrees):
        image = picture()
        sign = tf.constant(float(np.sign(degrees)))
        found = module.rotate(tf.constant(image), abs(degrees) / 30, sign)
        expected = np.asarray(as_pillow(image).rotate(degrees, fillcolor=(128, 128, 128)))
        assert (np.asarray(found) != expected).any(axis=-1).mean() < 0.01


class TestRandAugment:
    def test_is_the_drawn_operations_one_after_the_other(self):
        """Some sequence of two operations, with some signs, explains every result."""
        image = tf.constant(picture())
        signs = [tf.constant(-1.0), tf.constant(1.0)]
        firsts = [op(image, 0.7, sign) for op in OPERATIONS for sign in signs]
        possible = {
            np.asarray(op(first, 0.7, sign)).tobytes()
            for first in firsts
            for op in OPERATIONS
            for sign in signs
        }
        found = apply(Augmentation(rand_augment=(2, 7)), image, 60)
        assert {image.tobytes() for image in found} <= possible
        assert len({image.tobytes() for image in found}) > 40

    def test_every_operation_and_sign_is_as_likely(self):
        image = tf.constant(picture())
        found = [image.tobytes() for image in apply(Augmentation(rand_augment=(1, 7)), image, 2000)]
        total = 0
        for operation in OPERATIONS:
            kinds = {np.asarray(operation(image, 0.7, sign)).tobytes() for sign in (-1.0, 1.0)}
            counts = [found.count(kind) for kind in kinds]
            assert 95 < sum(counts) < 195  # 143 expected
            assert len(counts) == 1 or min(counts) > 35
            total += sum(counts)
        assert total == 2000


class TestThreeAugment:
    def test_one_of_three_and_jitter(self, monkeypatch):
        monkeypatch.setattr(module, "_JITTER", 0.0)
        image = picture()
        gray = np.repeat(np.asarray(as_pillow(image).convert("L"))[..., None], 3, axis=-1)
        solarized = np.asarray(ImageOps.solarize(as_pillow(image), 128))
        found = apply(Augmentation(three_augment=True), image, 300)
        is_gray = (found == gray).all(axis=(1, 2, 3))
        is_solarized = (found == solarized).all(axis=(1, 2, 3))
        blurred = found[~is_gray & ~is_solarized].astype(int)
        assert 70 < is_gray.sum() < 130
        assert 70 < is_solarized.sum() < 130
        roughness = np.abs(np.diff(blurred, axis=1)).mean(axis=(1, 2, 3))
        assert roughness.max() <= np.abs(np.diff(image.astype(int), axis=0)).mean()
        assert roughness.min() < 0.5 * roughness.max()

    def test_jitter_of_brightness(self):
        """A gray image keeps its colour and contrast."""
        image = np.full((6, 7, 3), 100, "uint8")
        found = apply(Augmentation(three_augment=True), image, 300)
        values = found[:, 3, 3, 0]
        assert (np.ptp(found.reshape(300, -1), axis=1) <= 1).all()
        assert 69 <= values.min() < 75
        assert 125 < values.max() <= 130


class TestErasing:
    def test_rectangles_of_noise(self):
        image = np.full((40, 60, 3), 7, "uint8")
        found = apply(Augmentation(erasing=0.25), image, 800)
        erased = (found != 7).any(axis=-1)
        whether = erased.any(axis=(1, 2))
        assert 150 < whether.sum() < 250
        areas, aspects = [], []
        for mask, one in zip(erased[whether], found[whether], strict=True):
            rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
            box = one[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            assert (box != 7).any(axis=-1).mean() > 0.99  # all of it
            areas.append(box.shape[0] * box.shape[1] / 2400)
            aspects.append(box.shape[0] / box.shape[1])
        assert 0.015 < min(areas) < 0.05
        assert 0.27 < max(areas) < 0.36
        assert 0.2 < min(aspects) < 0.45
        assert 2.4 < max(aspects) < 4
        values = found[erased]
        assert values.min() == 0
        assert values.max() == 255
        assert abs(values.mean() - 127.5) < 1

    def test_never_and_always(self):
        image = np.full((9, 8, 3), 7, "uint8")
        assert (apply(Augmentation(erasing=1.0), image, 50) != image).any(axis=(1, 2, 3)).all()


def ramps(height=40, width=60):
    """An image whose first channel is 4 x, and second 4 y, in pixels."""
    y, x = np.mgrid[:height, :width]
    return np.stack([4 * x, 4 * y, 0 * x], axis=-1).astype("uint8")


class TestGeometry:
    def test_nothing_asked_changes_nothing(self):
        np.testing.assert_array_equal(apply(Augmentation(), picture(), 3), [picture()] * 3)

    @pytest.mark.parametrize("with_shift", [False, True])
    def test_flip_mirrors_half_of_the_images(self, with_shift):
        """Exactly, whether alone or in one resampling with what moves nothing."""
        image = picture()
        flipped = apply(Augmentation(flip=True, shift=1e-7 * with_shift), image, 400)
        same = (flipped == image).all(axis=(1, 2, 3))
        mirrored = (flipped == image[:, ::-1]).all(axis=(1, 2, 3))
        assert np.all(same ^ mirrored)
        assert 150 < mirrored.sum() < 250

    @pytest.mark.parametrize("min_crop_area", [0.25, 0.9])
    def test_crops_lie_inside_and_keep_the_share_asked_for(self, min_crop_area):
        """On ramps the corners' values say where each crop was taken from."""
        images = apply(Augmentation(min_crop_area=min_crop_area), ramps(), 500) / 4
        left, right = images[:, 0, 0, 0], images[:, 0, -1, 0]
        top, bottom = images[:, 0, 0, 1], images[:, -1, 0, 1]
        sides = np.stack([(right - left) / 59, (bottom - top) / 39])
        self.check_crops(min_crop_area, sides, left + right, 59, 0.01)

    @pytest.mark.parametrize("min_crop_area", [0.25, 0.9])
    def test_windows_are_the_same_crops_in_whole_pixels(self, min_crop_area):
        augmentation = Augmentation(min_crop_area=min_crop_area)
        keys = np.stack([np.full(500, 3), np.arange(500)], axis=1)
        windows = tf.data.Dataset.from_tensor_slices(keys).map(
            lambda key: tf.stack(augmentation.window(key)(400, 600))
        )
        y, x, height, width = np.stack(list(windows.as_numpy_iterator())).T
        assert y.min() >= 0
        assert x.min() >= 0
        assert (y + height).max() <= 400
        assert (x + width).max() <= 600
        sides = np.stack([width / 600, height / 400])
        self.check_crops(min_crop_area, sides, 2 * x + width, 600, 0.005)
        assert Augmentation().window(keys[0]) is None

    def check_crops(self, min_crop_area, sides, twice_centre, width, tolerance):
        assert sides.max() <= 1
        area, ratio = sides.prod(axis=0), sides[0] / sides[1]
        assert min_crop_area - tolerance < area.min() < min_crop_area + 0.05
        assert area.max() > 0.95
        assert np.abs(np.log(ratio)).max() < np.log(4 / 3) + 2 * tolerance
        assert np.log(ratio).std() > 0.02
        # The place is uniform: the mean of the centres is the image's.
        np.testing.assert_allclose(twice_centre.mean() / 2, width / 2, atol=0.025 * width)

    def test_small_windows_reach_every_place(self):
        augmentation = Augmentation(min_crop_area=0.2)
        keys = np.stack([np.full(500, 3), np.arange(500)], axis=1)
        windows = tf.data.Dataset.from_tensor_slices(keys).map(
            lambda key: tf.stack(augmentation.window(key)(3, 4))
        )
        y, x, height, width = np.stack(list(windows.as_numpy_iterator())).T
        assert set(zip(y, height, strict=True)) == {(0, 1), (1, 1), (2, 1), (0, 2), (1, 2), (0, 3)}
        assert set(x + width) == {1, 2, 3, 4} or set(x + width) == {2, 3, 4}
        assert set(x) == {0, 1, 2} or set(x) == {0, 1, 2, 3}

    def test_rotation_is_about_the_centre_and_bounded(self):
        images = apply(Augmentation(rotation=15.0), ramps(41, 61), 300) / 4
        np.testing.assert_allclose(images[:, 20, 30, :2], [[30, 20]] * 300, atol=0.26)
        slope_x = images[:, 20, 40, 0] - images[:, 20, 20, 0]  # cos
        slope_y = images[:, 20, 40, 1] - images[:, 20, 20, 1]  # sin
        angles = np.degrees(np.arctan2(slope_y, slope_x))
        assert np.abs(angles).max() < 15.8
        assert angles.min() < -13
        assert angles.max() > 13

    def test_shift_goes_beyond_the_border(self):
        images = apply(Augmentation(shift=0.1), ramps(), 300) / 4
        dx = images[:, 20, 30, 0] - 30
        dy = images[:, 20, 30, 1] - 20
        assert 5 < np.abs(dx).max() <= 6
        assert 3.4 < np.abs(dy).max() <= 4
        assert images[..., 1].max() == 39  # the border's pixels go on
        assert abs(np.corrcoef(dx, dy)[0, 1]) < 0.15

    def test_an_image_read_through_its_window_is_not_cropped_again(self):
        image = picture()
        found = apply(Augmentation(min_crop_area=0.3, flip=True), image, 20, crop=False)
        for one in found:
            assert np.array_equal(one, image) or np.array_equal(one, image[:, ::-1])


@pytest.mark.parametrize(
    ("argument", "value", "expected"),
    [
        ("min_crop_area", 0, r"in \(0, 1\]"),
        ("min_crop_area", 1.1, r"in \(0, 1\]"),
        ("rotation", 181, r"in \[0, 180\]"),
        ("shift", 1, r"in \[0, 1\)"),
        ("rand_augment", 2, r"\(num_ops, magnitude\), a positive int and a number in \[0, 10\]"),
        ("rand_augment", (0, 9), r"\(num_ops, magnitude\)"),
        ("rand_augment", (True, 9), r"\(num_ops, magnitude\)"),
        ("rand_augment", (2, None), r"\(num_ops, magnitude\)"),
        ("rand_augment", (2, 15), r"\(num_ops, magnitude\)"),
        ("erasing", -0.1, r"in \[0, 1\]"),
    ],
)
def test_out_of_range(argument, value, expected):
    with pytest.raises(
        ValueError, match=rf"`{argument}` must be {expected}.* Received: {argument}="
    ):
        Augmentation(**{argument: value})
