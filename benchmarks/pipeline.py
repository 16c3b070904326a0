"""How fast images are read and augmented, against `keras.layers.RandAugment` in the place of ours.

    python benchmarks/pipeline.py

What `keras-vit data-speed --data digits --recipe tiny --image-size 224 --set rand_augment=2,9
--compare-keras` measures: crop, rotation, shift and RandAugment at 224 px, from memory, in turns.
"""

import dataclasses
import statistics

from harness import described, draw, markdown, parser, save


def table(result):
    ours, keras = result["images_per_second"].values()
    ratios = [a / b for a, b in zip(ours, keras, strict=True)]
    rows = [
        (name, f"{min(values):.0f}", f"{statistics.median(values):.0f}", f"{max(values):.0f}")
        for name, values in result["images_per_second"].items()
    ]
    rows.append(
        ("ratio, round by round", *(f"{f(ratios):.1f}" for f in (min, statistics.median, max)))
    )
    columns = ("images/s", "minimum", "median", "maximum")
    return markdown(columns, rows) + "\n" + described(result)


def plot(result, path):
    def panel(axes):
        medians = {k: statistics.median(v) for k, v in result["images_per_second"].items()}
        axes.barh(list(medians), list(medians.values()))
        axes.invert_yaxis()
        axes.set_title("images/s, median")

    draw(path, [panel], height=1.6)


def main():
    quick = parser(__doc__).parse_args().quick
    from keras_vit.data import load_data
    from keras_vit.data.speed import data_speed
    from keras_vit.training.recipes import named_recipe

    recipe = dataclasses.replace(named_recipe("tiny"), rand_augment=(2, 9))
    speed = data_speed(
        load_data("digits").train,
        (224, 224),
        augmentation=recipe.augmentation,
        compare_keras=True,
        rounds=1 if quick else 3,
        seconds=1.0 if quick else 2.0,
    )
    save(
        "pipeline",
        quick,
        images_per_second={"keras-vit": speed.ours, "keras.layers.RandAugment": speed.keras},
    )


if __name__ == "__main__":
    main()
