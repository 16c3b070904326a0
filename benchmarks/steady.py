"""Whether training takes more and more memory: the resident set after each step of `model.fit`.

    python benchmarks/steady.py

A ViT of 4 blocks of width 96 on 64 px images, batch 32, with dropout and stochastic depth, trained
by `DistributedModel` on other images in each step. The slope is that of a straight line through
what comes after the first 50 steps.
"""

import statistics

import numpy as np
from harness import described, draw, markdown, parser, save, status_bytes

FIRST = 50  # steps in which buffers find their size
BATCH, SIDE, CLASSES = 32, 64, 10


def resident(steps):
    """Bytes after each step."""
    import keras
    import tensorflow as tf

    import keras_vit
    from keras_vit.training import DistributedModel

    class Memory(keras.callbacks.Callback):
        """Reads the resident set after each batch."""

        def __init__(self):
            super().__init__()
            self.values = []

        def on_train_batch_end(self, batch, logs=None):
            self.values.append(status_bytes("VmRSS"))

    size = keras_vit.ViTConfig(96, 4, 3, 384, 8)
    vit = keras_vit.build_vit(
        size, image_size=SIDE, num_classes=CLASSES, dropout=0.1, drop_path=0.1
    )
    model = DistributedModel(vit.input, vit.output)
    model.compile(
        keras.optimizers.AdamW(1e-3), keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    )
    random = np.random.default_rng(0)
    images = random.normal(size=(16 * BATCH, SIDE, SIDE, 3)).astype("float32")
    labels = random.integers(CLASSES, size=len(images))
    batches = tf.data.Dataset.from_tensor_slices((images, labels)).shuffle(len(images))
    batches = batches.batch(BATCH, drop_remainder=True).repeat()
    memory = Memory()
    model.fit(batches, steps_per_epoch=steps, callbacks=[memory], verbose=2)
    return memory.values


def slope(values):
    """Bytes per step after the first ones."""
    later = values[FIRST:]
    return statistics.linear_regression(range(len(later)), later).slope


def table(result):
    values = result["resident_bytes"]
    row = (
        f"{len(values)}",
        f"{values[FIRST] / 1e6:.1f}",
        f"{values[-1] / 1e6:.1f}",
        f"{slope(values) / 1e3:.1f}",
    )
    columns = ("steps", f"MB after {FIRST}", "MB at the end", "slope, kB per step")
    return markdown(columns, [row]) + "\n" + described(result)


def plot(result, path):
    def panel(axes):
        axes.plot([value / 1e6 for value in result["resident_bytes"]])
        axes.axvline(FIRST, linestyle=":", color="C7")
        axes.set_title("resident set after each step, MB")

    draw(path, [panel])


def main():
    quick = parser(__doc__).parse_args().quick
    save("steady", quick, resident_bytes=resident(60 if quick else 300))


if __name__ == "__main__":
    main()
