"""How fast images are read and augmented, without a model."""

from __future__ import annotations

import dataclasses
import statistics
import time

import tensorflow as tf
from rich.console import Console
from rich.progress import track
from rich.table import Table

from keras_vit.config import check_positive_int
from keras_vit.data.augmentation import MAX_MAGNITUDE, Augmentation
from keras_vit.data.pipeline import training_batches, untuned
from keras_vit.data.structures import Split


@dataclasses.dataclass(frozen=True)
class DataSpeed:
    """Images per second, one figure for each round.

    Attributes:
        ours: Of `training_batches`.
        keras: Of the same images with `keras.layers.RandAugment` instead; empty where it was not
            measured. A round of it follows the same round of ours.
    """

    ours: tuple[float, ...]
    keras: tuple[float, ...] = ()

    @property
    def images_per_second(self) -> float:
        """The median of ours."""
        return statistics.median(self.ours)

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours over Keras', round by round."""
        return tuple(a / b for a, b in zip(self.ours, self.keras, strict=bool(self.keras)))

    def table(self) -> Table:
        """The slowest round and the median, for a terminal."""
        table = Table("", "minimum", "median")
        table.add_row("keras-vit, images/s", *_minimum_and_median(self.ours, ".0f"))
        if self.keras:
            table.add_row("Keras RandAugment, images/s", *_minimum_and_median(self.keras, ".0f"))
            table.add_row("ratio", *_minimum_and_median(self.ratios, ".1f"))
        return table


def _minimum_and_median(values, form):
    return format(min(values), form), format(statistics.median(values), form)


def data_speed(
    split: Split,
    image_size: tuple[int, int],
    *,
    batch_size: int = 32,
    augmentation: Augmentation | None = None,
    compare_keras: bool = False,
    rounds: int = 5,
    seconds: float = 3.0,
) -> DataSpeed:
    """Measures the batches of training alone, and draws a progress bar on stderr.

    Each round begins a new pipeline and leaves its first two batches out.

    Args:
        split: A `Split`.
        image_size: `(height, width)` in pixels.
        batch_size: Images per batch.
        augmentation: An `Augmentation`, or None.
        compare_keras: Whether each round is followed by one with `keras.layers.RandAugment` in
            the place of `augmentation.rand_augment`, the rest being the same.
        rounds: How many.
        seconds: Least duration of a round.

    Returns:
        A `DataSpeed`.

    Raises:
        ValueError: `compare_keras` without `augmentation.rand_augment`, or `rounds` or `seconds`
            are not positive.
    """
    check_positive_int("rounds", rounds)
    if not seconds > 0:
        raise ValueError(f"`seconds` must be positive. Received: seconds={seconds!r}.")
    augmentation = augmentation or Augmentation()
    if compare_keras and not augmentation.rand_augment:
        raise ValueError(
            "`augmentation` must have `rand_augment` to be compared with Keras'. "
            f"Received: augmentation={augmentation!r}."
        )

    def pipeline(augmentation):
        return training_batches(split, image_size, batch_size, 2, augmentation=augmentation)

    pipelines = [pipeline(augmentation)]
    if compare_keras:
        without = dataclasses.replace(augmentation, rand_augment=None)
        pipelines.append(_keras_rand_augment(pipeline(without), *augmentation.rand_augment))
    todo = [batches for _ in range(rounds) for batches in pipelines]
    speeds = [
        _measure(batches, batch_size, seconds)
        for batches in track(todo, "Measuring", console=Console(stderr=True))
    ]
    return DataSpeed(tuple(speeds[:: len(pipelines)]), tuple(speeds[1::2] if compare_keras else ()))


def _keras_rand_augment(batches: tf.data.Dataset, num_ops: int, magnitude: float):
    import keras

    layer = keras.layers.RandAugment(
        value_range=(0, 255), num_ops=num_ops, factor=magnitude / MAX_MAGNITUDE
    )
    augmented = batches.map(
        lambda images, labels: (layer(images, training=True), labels),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    return untuned(augmented.prefetch(tf.data.AUTOTUNE))


def _measure(batches: tf.data.Dataset, batch_size: int, seconds: float) -> float:
    """Images per second."""
    iterator = iter(batches)
    for _ in range(2):
        next(iterator)
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < seconds:
        next(iterator)
        count += 1
    return count * batch_size / elapsed
