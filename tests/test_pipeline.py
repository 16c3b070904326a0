"""Resizing, batching and augmentation."""

import numpy as np
import pytest
import tensorflow as tf

from keras_vit.data import Split
from keras_vit.data.pipeline import augment, evaluation_batches, resize, training_batches


def numbered(count, height=4, width=6):
    """A split whose image i has the value i everywhere, and label i % 3."""
    images = np.broadcast_to(
        np.arange(count, dtype="uint8")[:, None, None, None], (count, height, width, 3)
    )
    labels = np.arange(count, dtype="int32") % 3
    return Split(tf.data.Dataset.from_tensor_slices((images, labels)), count)


def test_resize_keeps_an_image_of_the_right_size():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype("uint8")
    np.testing.assert_array_equal(resize(image, (5, 7)), image)


def test_resize_averages_when_it_shrinks():
    """Antialiased: a fine chequerboard becomes gray, and rounding is to the nearest."""
    image = np.indices((16, 16)).sum(axis=0)[..., None] % 2 * np.array([255, 255, 255])
    small = np.asarray(resize(image.astype("uint8"), (4, 4)))
    assert small.dtype == np.uint8
    assert np.abs(small[1:-1, 1:-1].astype(int) - 128).max() <= 1


def test_evaluation_batches_are_every_image_once_in_order():
    batches = list(evaluation_batches(numbered(7), (4, 6), 3, 5))
    assert [images.shape for images, _ in batches] == [(3, 4, 6, 3), (3, 4, 6, 3), (1, 4, 6, 3)]
    images = np.concatenate([images for images, _ in batches])
    labels = np.concatenate([labels for _, labels in batches])
    np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(7))
    np.testing.assert_array_equal(labels, np.eye(5)[np.arange(7) % 3])


def first(batches, count):
    return [(images.numpy(), labels.numpy()) for images, labels in batches.take(count)]


def test_training_batches_pass_over_all_images_in_new_orders():
    batches = first(training_batches(numbered(12), (4, 6), 4, 3, seed=1), 9)
    numbers = np.stack([images[:, 0, 0, 0] for images, _ in batches]).reshape(3, 12)
    for order in numbers:
        np.testing.assert_array_equal(np.sort(order), np.arange(12))
    assert len({tuple(order) for order in numbers}) == 3
    for images, labels in batches:
        np.testing.assert_array_equal(labels, np.eye(3)[images[:, 0, 0, 0].astype(int) % 3])


def test_training_batches_are_reproducible():
    arguments = (numbered(12), (4, 6), 4, 3)
    augmentation = {"min_crop_area": 0.5, "rotation": 20.0, "shift": 0.1, "flip": True}
    runs = [first(training_batches(*arguments, seed=s, **augmentation), 5) for s in (1, 1, 2)]
    for (images, labels), (images2, labels2) in zip(*runs[:2], strict=True):
        np.testing.assert_array_equal(images, images2)
        np.testing.assert_array_equal(labels, labels2)
    assert any(not np.array_equal(a[0], b[0]) for a, b in zip(runs[0], runs[2], strict=True))


def pictures(count, height=8, width=12):
    return np.random.default_rng(0).integers(0, 256, (count, height, width, 3)).astype("float32")


def test_augment_without_arguments_changes_nothing():
    images = pictures(5)
    np.testing.assert_allclose(augment(images, (0, 1)), images, atol=1e-3)


def test_flip_mirrors_half_of_the_images():
    images = pictures(400)
    flipped = np.asarray(augment(images, (0, 1), flip=True))
    same = np.abs(flipped - images).max(axis=(1, 2, 3)) < 1e-2
    mirrored = np.abs(flipped - images[:, :, ::-1]).max(axis=(1, 2, 3)) < 1e-2
    assert np.all(same ^ mirrored)
    assert 150 < mirrored.sum() < 250


def ramps(count, height=40, width=60):
    """Images whose first channel is x, and second y, in pixels."""
    y, x = np.mgrid[:height, :width]
    return np.broadcast_to(np.stack([x, y, 0 * x], axis=-1), (count, height, width, 3))


@pytest.mark.parametrize("min_crop_area", [0.25, 0.9])
def test_crops_lie_inside_and_keep_the_share_asked_for(min_crop_area):
    """On ramps the corners' values say where each crop was taken from."""
    images = np.asarray(augment(ramps(500), (3, 4), min_crop_area=min_crop_area))
    left, right = images[:, 0, 0, 0], images[:, 0, -1, 0]
    top, bottom = images[:, 0, 0, 1], images[:, -1, 0, 1]
    assert left.min() >= -1e-3
    assert right.max() <= 59 + 1e-3
    assert top.min() >= -1e-3
    assert bottom.max() <= 39 + 1e-3
    sides = np.stack([(right - left) / 59, (bottom - top) / 39])
    area, ratio = sides.prod(axis=0), sides[0] / sides[1]
    assert min_crop_area - 1e-3 < area.min() < min_crop_area + 0.05
    assert area.max() > 0.95
    assert np.abs(np.log(ratio)).max() < np.log(4 / 3) + 1e-3
    assert np.log(ratio).std() > 0.02
    # The place is uniform: the mean of the centres is the image's.
    np.testing.assert_allclose((left + right).mean() / 2, 29.5, atol=1.5)


def test_rotation_is_about_the_centre_and_bounded():
    images = np.asarray(augment(ramps(300, 41, 61), (3, 4), rotation=15.0))
    np.testing.assert_allclose(images[:, 20, 30, :2], [[30, 20]] * 300, atol=1e-2)
    slope_x = images[:, 20, 31, 0] - images[:, 20, 30, 0]  # cos
    slope_y = images[:, 20, 31, 1] - images[:, 20, 30, 1]  # sin
    angles = np.degrees(np.arctan2(slope_y, slope_x))
    assert np.abs(angles).max() < 15.01
    assert angles.min() < -13
    assert angles.max() > 13


def test_shift_goes_beyond_the_border():
    images = np.asarray(augment(ramps(300), (3, 4), shift=0.1))
    dx = images[:, 20, 30, 0] - 30
    dy = images[:, 20, 30, 1] - 20
    assert 5 < np.abs(dx).max() <= 6
    assert 3.4 < np.abs(dy).max() <= 4
    assert images.min() >= 0  # the border's pixels go on
    assert abs(np.corrcoef(dx, dy)[0, 1]) < 0.15


@pytest.mark.parametrize("size", [(4, 6), (7, 3)])
def test_batches_have_the_size_asked_for(size):
    images, _ = first(training_batches(numbered(4), size, 2, 3, min_crop_area=0.5), 1)[0]
    assert images.shape == (2, *size, 3)
    assert images.dtype == np.float32
