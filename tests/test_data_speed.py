"""Measuring the input pipeline: what is measured, never how fast it is."""

import numpy as np
import pytest
from rich.console import Console

from keras_vit.data import speed as module
from keras_vit.data.augmentation import Augmentation
from keras_vit.data.speed import DataSpeed, data_speed
from keras_vit.data.structures import array_split

SPLIT = array_split(np.zeros((6, 8, 9, 3), "uint8"), np.arange(6) % 2)


def test_figures_and_table():
    speed = DataSpeed((300.0, 100.0, 200.0), (10.0, 10.0, 5.0))
    assert speed.images_per_second == 200
    assert speed.ratios == (30, 10, 40)
    console = Console(record=True, width=80)
    console.print(speed.table())
    rows = [line.split("│")[1:4] for line in console.export_text().splitlines() if "│" in line]
    assert [[cell.strip() for cell in row] for row in rows] == [
        ["keras-vit, images/s", "100", "200"],
        ["Keras RandAugment, images/s", "5", "10"],
        ["ratio", "10.0", "30.0"],
    ]


def test_ours_alone():
    speed = data_speed(SPLIT, (8, 9), batch_size=4, rounds=2, seconds=0.01)
    assert len(speed.ours) == 2
    assert min(speed.ours) > 0
    assert (speed.keras, speed.ratios) == ((), ())
    assert speed.table().row_count == 1


def test_rounds_are_interleaved_and_in_their_places(monkeypatch):
    augmentation = Augmentation(flip=True, rand_augment=(3, 4))
    measured, asked = [], []

    def keras_rand_augment(batches, num_ops, magnitude):
        asked.append((num_ops, magnitude))
        return "keras"

    def measure(batches, batch_size, seconds):
        measured.append(batches == "keras")
        return float(len(measured))

    monkeypatch.setattr(module, "_keras_rand_augment", keras_rand_augment)
    monkeypatch.setattr(module, "_measure", measure)
    speed = data_speed(SPLIT, (8, 9), augmentation=augmentation, compare_keras=True, rounds=3)
    assert asked == [(3, 4)]
    assert measured == [False, True] * 3
    assert speed == DataSpeed((1, 3, 5), (2, 4, 6))


def test_compared_images_are_of_the_same_kind():
    batches = module._keras_rand_augment(
        module.training_batches(SPLIT, (8, 9), 4, 2, steps=2), num_ops=2, magnitude=9
    )
    shapes = [(images.shape, labels.shape) for images, labels in batches]
    assert shapes == [((4, 8, 9, 3), (4, 2))] * 2


def test_nothing_to_measure():
    with pytest.raises(ValueError, match=r"`rounds` must be a positive int.*rounds=0"):
        data_speed(SPLIT, (8, 9), rounds=0)
    with pytest.raises(ValueError, match=r"`seconds` must be positive. Received: seconds=0"):
        data_speed(SPLIT, (8, 9), seconds=0)


@pytest.mark.parametrize("augmentation", [None, Augmentation(flip=True)])
def test_nothing_to_compare(augmentation):
    with pytest.raises(ValueError, match=r"must have `rand_augment`.*Received: augmentation=Augm"):
        data_speed(SPLIT, (8, 9), augmentation=augmentation, compare_keras=True)
