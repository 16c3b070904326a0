"""What a trained model is worth: accuracies, per class, and which classes it confuses."""

import csv
import dataclasses
import io
import pathlib

import keras
import matplotlib.figure
import numpy as np
import sklearn.metrics
import tensorflow as tf

from keras_vit.data import read_image
from keras_vit.data.pipeline import evaluation_batches, resize
from keras_vit.files import replacing, write_json, write_text

MISTAKES = 24  # that are shown


@dataclasses.dataclass(frozen=True)
class Mistake:
    """An image that was taken for another class than its own.

    Args:
        index: Its place in the split.
        image: uint8 `(H, W, 3)`, as the model took it.
        label: Its class, an int in [0, K).
        predicted: The class that it was taken for.
        probability: That class's of the softmax, in [0, 1], whatever loss the model has.
    """

    index: int
    image: np.ndarray
    label: int
    predicted: int
    probability: float


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of `evaluate`.

    Args:
        class_names: Names of the K classes.
        top1: Share of the images whose most likely class is the label.
        top5: Share whose label is among the five most likely classes.
        confusion: int array `(K, K)`: images of the row's class that were taken for the column's.
        precision: Per class, share of the images taken for it that are of it.
        recall: Per class, share of its images that were recognised.
        f1: Per class, harmonic mean of the two.
        mistakes: The `Mistake`s of the highest probability, the most confident first.
    """

    class_names: tuple[str, ...]
    top1: float
    top5: float
    confusion: np.ndarray
    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    mistakes: tuple[Mistake, ...] = ()

    def rows(self):
        """One dict per class: class, images, precision, recall, f1."""
        images = self.confusion.sum(axis=1).tolist()
        columns = (self.precision.tolist(), self.recall.tolist(), self.f1.tolist())
        return [
            dict(zip(("class", "images", "precision", "recall", "f1"), row, strict=True))
            for row in zip(self.class_names, images, *columns, strict=True)
        ]

    def save(self, folder, **facts):
        """Writes evaluation.json, per_class.csv, confusion.png and mistakes.png anew.

        Args:
            folder: Where; made if it is missing.
            **facts: What else evaluation.json is to say, such as the name of the data.
        """
        folder = pathlib.Path(folder)
        rows = self.rows()
        write_json(
            folder / "evaluation.json",
            {
                **facts,
                "images": int(self.confusion.sum()),
                "top1": self.top1,
                "top5": self.top5,
                "per_class": rows,
                "confusion": self.confusion.tolist(),
                "mistakes": [
                    {
                        "index": mistake.index,
                        "class": self.class_names[mistake.label],
                        "predicted": self.class_names[mistake.predicted],
                        "probability": mistake.probability,
                    }
                    for mistake in self.mistakes
                ],
            },
        )
        text = io.StringIO()
        writer = csv.DictWriter(text, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(folder / "per_class.csv", text.getvalue())
        for name, plot in {"confusion": plot_confusion, "mistakes": plot_mistakes}.items():
            with replacing(folder / f"{name}.png") as path:
                plot(self).savefig(path, dpi=150)


def evaluate(model, split, class_names, batch_size=128):
    """Runs a model over a split.

    Args:
        model: A Keras model, images `(B, H, W, 3)` in [0, 255] -> logits `(B, K)`.
        split: A `keras_vit.data.Split`.
        class_names: Names of the K classes.
        batch_size: Images at a time.

    Returns:
        An `Evaluation`.
    """
    batches = evaluation_batches(split, model.input_shape[1:3], batch_size, len(class_names))
    best5, labels, mistakes = [], [], ()
    for images, one_hot in batches:
        first = sum(map(len, labels))
        logits = model.predict_on_batch(images)
        best5.append(np.argsort(-logits, axis=1, kind="stable")[:, :5])
        labels.append(np.argmax(one_hot, axis=1))
        mistakes += _mistakes(first, images.numpy(), logits, labels[-1])
        mistakes = tuple(sorted(mistakes, key=lambda m: -m.probability)[:MISTAKES])
    best5, labels = np.concatenate(best5), np.concatenate(labels)
    predicted = best5[:, 0]
    classes = np.arange(len(class_names))
    precision, recall, f1, _ = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    return Evaluation(
        class_names=tuple(class_names),
        top1=float(np.mean(predicted == labels)),
        top5=float(np.mean(np.any(best5 == labels[:, None], axis=1))),
        confusion=sklearn.metrics.confusion_matrix(labels, predicted, labels=classes),
        precision=precision,
        recall=recall,
        f1=f1,
        mistakes=mistakes,
    )


def _mistakes(first, images, logits, labels):
    """The most confident mistakes in a batch, of which `first` is the index of the first image."""
    probabilities = np.asarray(keras.ops.softmax(logits)).max(axis=1)
    predicted = np.argmax(logits, axis=1)
    [wrong] = np.nonzero(predicted != labels)
    wrong = wrong[np.argsort(-probabilities[wrong], kind="stable")[:MISTAKES]]
    return tuple(
        Mistake(
            first + int(i), images[i], int(labels[i]), int(predicted[i]), float(probabilities[i])
        )
        for i in wrong
    )


def predict(model, paths, class_names, top=5, batch_size=32):
    """Names what is in image files.

    Args:
        model: A Keras model, images `(B, H, W, 3)` in [0, 255] -> logits `(B, K)`.
        paths: Image files.
        class_names: Names of the K classes.
        top: How many classes to name for each image.
        batch_size: Images at a time.

    Yields:
        For each path, a list of (class name, probability), the most likely first.

    Raises:
        ValueError: A file cannot be read as an image, or `top` is below 1.
    """
    if top < 1:
        raise ValueError(f"`top` must be at least 1. Received: top={top}.")
    size = model.input_shape[1:3]
    for start in range(0, len(paths), batch_size):
        chunk = paths[start : start + batch_size]
        images = tf.stack([resize(read_image(path), size) for path in chunk])
        probabilities = np.asarray(keras.ops.softmax(model.predict_on_batch(images)))
        for row in probabilities:
            best = np.argsort(-row)[:top]
            yield [(class_names[index], float(row[index])) for index in best]


def plot_confusion(evaluation):
    """Draws the confusion matrix, each row as shares of its class, as a matplotlib Figure."""
    classes = len(evaluation.class_names)
    side = float(np.clip(0.45 * classes + 2, 5, 16))
    figure = matplotlib.figure.Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    counts = evaluation.confusion
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    image = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, label="share of the true class", shrink=0.7)
    axes.set(xlabel="predicted class", ylabel="true class")
    axes.set_title(f"top-1 {evaluation.top1:.2%} on {counts.sum():,} images")
    if classes <= 40:
        plain = {"parse_math": False}  # "$" is a character
        names = [_short(name, 24) for name in evaluation.class_names]
        axes.set_xticks(range(classes), names, rotation=90, **plain)
        axes.set_yticks(range(classes), names, **plain)
    if classes <= 20:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(
                column, row, counts[row, column], ha="center", va="center", color=color, fontsize=8
            )
    return figure


def plot_mistakes(evaluation):
    """Draws the most confident mistakes, each under its own class and the one it was taken for."""
    mistakes, names = evaluation.mistakes, evaluation.class_names
    columns = max(1, min(6, len(mistakes)))
    rows = -(-len(mistakes) // columns)
    figure = matplotlib.figure.Figure(
        figsize=(max(2.1 * columns, 5), 2.2 * rows + 0.5), layout="constrained"
    )
    images = evaluation.confusion.sum()
    wrong = images - evaluation.confusion.trace()
    shown = f", the {len(mistakes)} most confident" if wrong > len(mistakes) else ""
    figure.suptitle(f"mistakes: {wrong:,} of {images:,} images{shown}", fontsize=11)
    all_axes = figure.subplots(max(1, rows), columns, squeeze=False).reshape(-1)
    for axes in all_axes:
        axes.axis("off")
    for axes, mistake in zip(all_axes, mistakes, strict=False):
        axes.imshow(mistake.image)
        axes.set_title(
            f"{_short(names[mistake.label])}\ntaken for {_short(names[mistake.predicted])} "
            f"({mistake.probability:.0%})",
            fontsize=8,
            parse_math=False,
        )
    return figure


def _short(name, length=16):
    return name if len(name) <= length else name[: length - 1] + "…"
