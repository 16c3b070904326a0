"""Resizing, the order of training, and that it can be cut and shared anywhere."""

import numpy as np
import pytest
import tensorflow as tf

from keras_vit.data import Split
from keras_vit.data import pipeline as pipeline_module
from keras_vit.data import progress as progress_module
from keras_vit.data.augmentation import Augmentation
from keras_vit.data.pipeline import (
    evaluation_batches,
    resize,
    sample_ids,
    spread_images,
    training_batches,
)
from keras_vit.data.structures import array_split, cut, typical_size

EVERYTHING = Augmentation(
    min_crop_area=0.5,
    rotation=20.0,
    shift=0.1,
    flip=True,
    rand_augment=(2, 7),
    three_augment=True,
    erasing=0.5,
)


def numbered(count, height=4, width=6):
    """A split whose image i has the value i everywhere, and label i % 3."""
    images = np.broadcast_to(
        np.arange(count, dtype="uint8")[:, None, None, None], (count, height, width, 3)
    )
    return array_split(images, np.arange(count) % 3)


def pictures(count, height=8, width=12):
    images = np.random.default_rng(0).integers(0, 256, (count, height, width, 3), dtype="uint8")
    return array_split(images, np.arange(count) % 3)


def as_arrays(batches):
    images, labels = zip(*batches.as_numpy_iterator(), strict=True)
    return np.stack(images), np.stack(labels)


def test_split_of_arrays():
    images = np.random.default_rng(0).integers(0, 256, (3, 5, 7, 3), dtype="uint8")
    split = array_split(images, [4, 0, 2])
    assert split.count == 3
    image, label = split.load(tf.constant(2, tf.int64), lambda h, w: (1, 2, h - 3, w - 4))
    np.testing.assert_array_equal(image, images[2, 1:3, 2:5])
    assert label == 2
    read = list(split.dataset.as_numpy_iterator())
    np.testing.assert_array_equal([image for image, _ in read], images)
    assert [label for _, label in read] == [4, 0, 2]


def test_typical_size_is_the_median_where_none_is_declared():
    def load(index, window=None):
        image = tf.zeros((tf.cast(index, tf.int32) + 3, 2 * tf.cast(index, tf.int32) + 1, 3))
        return cut(tf.cast(image, tf.uint8), window), tf.cast(index, tf.int32)

    assert typical_size(Split(load, 5)) == (5, 5)
    assert typical_size(numbered(2)) == (4, 6)


def test_resize_keeps_an_image_of_the_right_size():
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3)).astype("uint8")
    np.testing.assert_array_equal(resize(image, (5, 7)), image)


def test_resize_averages_when_it_shrinks():
    """Antialiased: a fine chequerboard becomes gray, and rounding is to the nearest."""
    image = np.indices((16, 16)).sum(axis=0)[..., None] % 2 * np.array([255, 255, 255])
    small = np.asarray(resize(image.astype("uint8"), (4, 4)))
    assert small.dtype == np.uint8
    assert np.abs(small[1:-1, 1:-1].astype(int) - 128).max() <= 1


class TestEvaluation:
    def test_every_image_once_in_order(self):
        batches = list(evaluation_batches(numbered(7), (4, 6), 3, 5))
        assert [images.shape for images, _ in batches] == [(3, 4, 6, 3), (3, 4, 6, 3), (1, 4, 6, 3)]
        images = np.concatenate([images for images, _ in batches])
        labels = np.concatenate([labels for _, labels in batches])
        np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(7))
        np.testing.assert_array_equal(labels, np.eye(5)[np.arange(7) % 3])

    @pytest.mark.parametrize(
        ("count", "expected"),
        [
            (11, [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10]]]),
            (7, [[[0, 1, 2], [6]], [[3, 4, 5], []]]),
            (2, [[[0, 1]], [[]]]),
        ],
    )
    def test_shards_are_parts_of_the_batches(self, count, expected):
        for index in range(2):
            batches = evaluation_batches(numbered(count), (4, 6), 6, 3, shard=(index, 2))
            found = [images[:, 0, 0, 0].tolist() for images, _ in batches.as_numpy_iterator()]
            assert found == expected[index]

    @pytest.mark.parametrize("count", [7, 9])
    def test_spread_images_are_all_where_as_many_are_asked_for(self, count):
        images, labels = spread_images(numbered(7), (2, 3), count)
        assert images.shape == (7, 2, 3, 3)
        np.testing.assert_array_equal(images[:, 0, 0, 0], np.arange(7))
        np.testing.assert_array_equal(labels, np.arange(7) % 3)

    def test_spread_images_are_of_all_parts(self):
        """Of a split sorted by class, and of one whose classes take turns as the parts do."""
        (images, labels), again = (spread_images(numbered(240), (2, 3), 80) for _ in range(2))
        places = images[:, 0, 0, 0]
        np.testing.assert_array_equal(places // 3, np.arange(80))
        assert min(np.bincount(labels)) > 15
        np.testing.assert_array_equal(again[0], images)
        np.testing.assert_array_equal(labels, places % 3)


GOLDEN = ([6, 4, 2, 1, 0, 5, 3], [0, 3, 1, 5, 2, 4, 6], [46622, 241520, 211331, 898605])


class TestOrder:
    def test_every_pass_is_a_permutation_of_its_own(self):
        """Batches of 5 straddle the passes over 13 images."""
        ids = np.concatenate([sample_ids(step, 5, 13, seed=3) for step in range(13)])
        orders = ids.reshape(5, 13)
        for order in orders:
            np.testing.assert_array_equal(np.sort(order), np.arange(13))
        assert len({tuple(order) for order in orders}) == 5

    def test_golden(self):
        """The order must never change: runs are resumed by it."""
        assert sample_ids(0, 7, 7, seed=0).numpy().tolist() == GOLDEN[0]
        assert sample_ids(1, 7, 7, seed=0).numpy().tolist() == GOLDEN[1]
        assert sample_ids(10**6, 4, 1_281_167, seed=5).numpy().tolist() == GOLDEN[2]

    def test_batch_may_be_larger_than_the_split(self):
        ids = sample_ids(2, 10, 3, seed=0).numpy()  # places 20 to 29: 20 ends a pass
        assert sorted(ids[1:4]) == sorted(ids[4:7]) == sorted(ids[7:]) == [0, 1, 2]

    def test_every_image_is_as_likely_at_every_place(self):
        passes = sample_ids(0, 5000, 5, seed=1).numpy().reshape(1000, 5)
        counts = np.stack([np.bincount(place, minlength=5) for place in passes.T])
        assert np.abs(counts - 200).max() < 50

    def test_seeds_differ(self):
        first, second = (sample_ids(0, 50, 50, seed=seed).numpy() for seed in (0, 1))
        assert (first == second).sum() < 10

    def test_training_follows_it(self):
        split = numbered(13)
        images, labels = as_arrays(training_batches(split, (4, 6), 5, 3, seed=3, steps=7))
        expected = np.stack([sample_ids(step, 5, 13, seed=3) for step in range(7)])
        np.testing.assert_array_equal(images[:, :, 0, 0, 0], expected)
        np.testing.assert_array_equal(labels, np.eye(3)[expected % 3])


class TestTrainingBatches:
    """The batches are the same, bit for bit, wherever they begin and whoever makes them."""

    @pytest.fixture(scope="class", params=["in memory", "decoded"])
    def case(self, request):
        size = (8, 12) if request.param == "in memory" else (5, 7)
        arguments = (pictures(11), size, 6, 4)
        options = {"seed": 2, "augmentation": EVERYTHING}
        return arguments, options, as_arrays(training_batches(*arguments, steps=5, **options))

    def test_types(self, case):
        arguments, options, (images, labels) = case
        assert images.shape == (5, 6, *arguments[1], 3)
        assert labels.shape == (5, 6, 4)
        assert (images.dtype, labels.dtype) == (np.uint8, np.float32)
        spec = training_batches(*arguments, **options).element_spec
        assert [tuple(s.shape) for s in spec] == [(6, *arguments[1], 3), (6, 4)]

    def test_same_again_and_others_for_another_seed(self, case):
        arguments, options, (images, labels) = case
        again = as_arrays(training_batches(*arguments, steps=5, **options))
        np.testing.assert_array_equal(again[0], images)
        np.testing.assert_array_equal(again[1], labels)
        other, _ = as_arrays(training_batches(*arguments, steps=5, **{**options, "seed": 3}))
        assert not np.array_equal(other, images)

    @pytest.mark.parametrize("first_step", [1, 3])
    def test_any_step_can_be_the_first(self, case, first_step):
        arguments, options, (images, labels) = case
        batches = training_batches(*arguments, first_step=first_step, **options)
        found = as_arrays(batches.take(5 - first_step))
        np.testing.assert_array_equal(found[0], images[first_step:])
        np.testing.assert_array_equal(found[1], labels[first_step:])

    @pytest.mark.parametrize(
        "count",
        [3, pytest.param(2, marks=pytest.mark.slow), pytest.param(6, marks=pytest.mark.slow)],
    )
    def test_shards_side_by_side_are_the_batch(self, case, count):
        arguments, options, (images, labels) = case
        shards = [
            as_arrays(training_batches(*arguments, shard=(i, count), steps=5, **options))
            for i in range(count)
        ]
        for part, whole in zip(zip(*shards, strict=True), (images, labels), strict=True):
            np.testing.assert_array_equal(np.concatenate(part, axis=1), whole)

    def test_shard_of_a_later_step(self, case):
        arguments, options, (images, _) = case
        batches = training_batches(*arguments, first_step=2, steps=2, shard=(1, 3), **options)
        np.testing.assert_array_equal(as_arrays(batches)[0], images[2:4, 2:4])

    def test_late_steps(self, case):
        arguments, options, _ = case
        batches = training_batches(*arguments, first_step=10**12, steps=1, **options)
        labels = sample_ids(10**12, 6, 11, seed=2).numpy() % 3
        np.testing.assert_array_equal(as_arrays(batches)[1][0], np.eye(4)[labels])

    def test_an_image_changes_with_the_pass(self):
        split = array_split(pictures(1).load(0)[0].numpy()[None], [0])
        images, _ = as_arrays(
            training_batches(split, (8, 12), 1, 2, steps=9, augmentation=Augmentation(shift=0.3))
        )
        assert len({image.tobytes() for image in images}) == 9

    @pytest.mark.parametrize("size", [(4, 6), (7, 3)])
    def test_size_asked_for(self, size):
        augmentation = Augmentation(min_crop_area=0.5)
        batches = training_batches(numbered(4), size, 2, 3, steps=1, augmentation=augmentation)
        assert as_arrays(batches)[0].shape == (1, 2, *size, 3)

    def test_small_images_are_read_once(self, monkeypatch, capsys):
        reads = []

        def load(index, window=None):
            tf.py_function(lambda: reads.append(1), [], [])
            return pictures(5).load(index, window)

        monkeypatch.setattr(progress_module, "_PROGRESS_FROM", 2)
        monkeypatch.setenv("FORCE_COLOR", "1")
        for cache_bytes, expected in ((5 * 8 * 12 * 3, 5), (5 * 8 * 12 * 3 - 1, 20)):
            monkeypatch.setattr(pipeline_module, "CACHE_BYTES", cache_bytes)
            reads.clear()
            list(training_batches(Split(load, 5), (8, 12), 5, 3, steps=4))
            assert len(reads) == expected
        assert "Reading images" in capsys.readouterr().err

    def test_crops_of_large_images_are_read_from_the_file(self):
        """Only what is asked for, and it is what comes out."""
        y, x = np.mgrid[:40, :60]
        ramps = np.stack([x, y, 0 * x], axis=-1).astype("uint8")
        split = array_split(np.stack([ramps] * 3), [0, 1, 2])
        augmentation = Augmentation(min_crop_area=0.3)
        images, _ = as_arrays(
            training_batches(split, (9, 11), 30, 3, steps=10, augmentation=augmentation)
        )
        images = images.reshape(-1, 9, 11, 3).astype(float)
        # The distance of the outermost pixels' centres is 10/11 and 8/9 of the crop's sides.
        width = (images[:, 4, -2, 0] - images[:, 4, 1, 0]) * 11 / 8
        height = (images[:, -2, 5, 1] - images[:, 1, 5, 1]) * 9 / 6
        area = width * height / 2400
        assert 0.25 < area.min() < 0.4
        assert 0.9 < area.max() < 1.1
        ratio = width / height / 1.5
        assert 0.68 < ratio.min() < 0.85
        assert 1.2 < ratio.max() < 1.48

    @pytest.mark.parametrize("shard", [(2, 2), (-1, 2)])
    @pytest.mark.parametrize("batches", [training_batches, evaluation_batches])
    def test_no_such_shard(self, shard, batches):
        with pytest.raises(ValueError, match=r"0 <= i < n\. Received: shard=\("):
            batches(numbered(4), (4, 6), 4, 3, shard=shard)

    @pytest.mark.parametrize("batches", [training_batches, evaluation_batches])
    def test_shards_must_divide_the_batch(self, batches):
        with pytest.raises(ValueError, match=r"divide `batch_size`.*=4, shard=\(0, 3\)"):
            batches(numbered(4), (4, 6), 4, 3, shard=(0, 3))
