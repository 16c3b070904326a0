"""Accuracy that each export mode costs a public ViT with a linear head on real images.

    python benchmarks/fashion_mnist.py data/fashion-mnist
    python benchmarks/export_accuracy.py --weights dinov2_vits14.safetensors \
        --data folder:data/fashion-mnist --image-size 98 --out runs/export-accuracy

The head is a logistic regression on standardised features of training images. With `--max-drop`
the layers that cost a mode most get a higher precision, chosen on validation images.
For a model of one's own the same table comes from `keras-vit export RUN --images 10000`.
"""

import argparse
import pathlib

import keras
import numpy as np
from rich.console import Console
from sklearn.linear_model import LogisticRegression

from keras_vit import from_checkpoint
from keras_vit.data import load_data
from keras_vit.data.pipeline import spread_images
from keras_vit.export import MODES, export_tflite, verify

_NEVER = -100.0  # logit of a class without images


def with_linear_head(backbone, images, labels, num_classes, c=0.01):
    """The backbone and the best linear head on its features, of inverse regularisation `c`.

    A class without images is never named.
    """
    features = backbone.predict(images)
    mean, deviation = features.mean(axis=0), features.std(axis=0)
    fitted = LogisticRegression(C=c, max_iter=300).fit((features - mean) / deviation, labels)
    coefficients, intercepts = fitted.coef_, fitted.intercept_
    if len(fitted.classes_) == 2:  # of the second class alone, against the first
        coefficients = np.concatenate([-coefficients, coefficients]) / 2
        intercepts = np.concatenate([-intercepts, intercepts]) / 2
    kernel, bias = np.zeros((features.shape[1], num_classes)), np.full(num_classes, _NEVER)
    kernel[:, fitted.classes_] = (coefficients / deviation).T
    bias[fitted.classes_] = intercepts - mean @ kernel[:, fitted.classes_]
    head = keras.layers.Dense(num_classes, name="head")
    model = keras.Model(backbone.input, head(backbone.output))
    head.set_weights([kernel, bias])
    return model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--weights", required=True, help="A checkpoint.")
    parser.add_argument("--data", required=True, help="As in `keras-vit train`.")
    parser.add_argument("--out", type=pathlib.Path, required=True, help="Folder to make.")
    parser.add_argument("--image-size", type=int, default=98)
    parser.add_argument("--train-images", type=int, default=10_000)
    parser.add_argument("--test-images", type=int, default=10_000)
    parser.add_argument("--calibration-images", type=int, default=128)
    parser.add_argument("--mode", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--max-drop", type=float, help="As in `keras-vit export`.")
    arguments = parser.parse_args()
    if arguments.out.exists():
        parser.error(f"{arguments.out} exists already.")
    data = load_data(arguments.data)
    size = (arguments.image_size, arguments.image_size)
    images, labels = spread_images(data.train, size, arguments.train_images)
    backbone = from_checkpoint(
        arguments.weights, num_classes=0, image_size=size, normalization="imagenet"
    )
    model = with_linear_head(backbone, images, labels, data.num_classes)
    calibration, _ = spread_images(data.train, size, arguments.calibration_images)
    arguments.out.mkdir(parents=True)
    chosen_by = None
    if arguments.max_drop is not None:
        chosen_by = spread_images(data.validation, size, arguments.test_images)
    files = {mode: arguments.out / f"{mode}.tflite" for mode in arguments.mode}
    reports = {
        mode: export_tflite(
            model,
            path,
            mode=mode,
            calibration=calibration,
            held_out=chosen_by,
            max_drop=arguments.max_drop,
        )
        for mode, path in files.items()
    }
    held_out, labels = spread_images(data.test, size, arguments.test_images)
    result = verify(model, files, held_out, labels, exports=reports)
    Console().print(result.table())
    result.to_json(arguments.out / "report.json")
    result.plot(arguments.out / "report.png")
    result.to_markdown(arguments.out / "report.md", plot="report.png")


if __name__ == "__main__":
    main()
