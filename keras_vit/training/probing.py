"""`probe`: how good the features of a checkpoint are for someone's images.

The folder of a probe:

probe.json                             what was probed, and the accuracies
probe.png                              the accuracies over the training images per class
features/{train,validation,test}.npz   the features, which another call does not compute again
"""

import contextlib
import dataclasses
import json
import pathlib
import time
import warnings
import zipfile

import matplotlib.figure
import matplotlib.ticker
import numpy as np
import tensorflow as tf
from rich import progress
from rich.console import Console
from rich.table import Table
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import NearestNeighbors
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from keras_vit.config import check_positive_int
from keras_vit.data import load_data
from keras_vit.data.pipeline import resized_images, spread_places, untuned
from keras_vit.data.sources import check_outside
from keras_vit.files import is_free, replacing, write_json
from keras_vit.model import vit_arguments
from keras_vit.training.backbone import load_backbone
from keras_vit.training.fewshot import few_shot_accuracies
from keras_vit.versions import versions
from keras_vit.weights.sources import local_path, sha256

SPLITS = ("train", "validation", "test")
TRAIN_IMAGES = 10_000
VALIDATION_IMAGES = 2_000  # enough to choose one of a few values by

NEIGHBORS = 20
TEMPERATURE = 0.07
C_GRID = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
MAX_ITERATIONS = 1000


@dataclasses.dataclass(frozen=True)
class ProbeResult:
    """The result of `probe`. Accuracies are shares of the test images, in [0, 1].

    Args:
        info: What was probed: `weights` and their `sha256`, `data` and their `fingerprint`,
            `class_names`, number of `images` by split, `width` of the features, the `model` as
            arguments of `build_vit`, and `versions`.
        knn: `accuracy` of the `k` nearest neighbours.
        logistic: `accuracy` of the logistic regression and its `C`, `validation` accuracy and
            whether it `converged`; the last three of every C are in `fits`.
        few_shot: Images per class -> accuracies of the least squares on three draws.
        seconds: What each step took; of stored features, what it took to compute them.
    """

    info: dict
    knn: dict
    logistic: dict
    few_shot: dict[int, list[float]]
    seconds: dict

    def table(self):
        """The accuracies as a `rich.table.Table`."""
        images = self.info["images"]
        table = Table(title=f"accuracy on {images['test']:,} test images")
        table.add_column("classifier")
        for column in ("training images", "accuracy", "lowest", "highest"):
            table.add_column(column, justify="right")
        knn, logistic = self.knn, self.logistic
        total = f"{images['train']:,}"
        table.add_row(f"{knn['k']} nearest neighbours", total, f"{knn['accuracy']:.4f}")
        table.add_row(f"logistic, C = {logistic['C']:g}", total, f"{logistic['accuracy']:.4f}")
        for shots, draws in self.few_shot.items():
            accuracies = (np.mean(draws), min(draws), max(draws))
            cells = [f"{accuracy:.4f}" for accuracy in accuracies]
            table.add_row("least squares, 3 draws", f"{shots} per class", *cells)
        return table

    def save(self, folder):
        """Writes probe.json and probe.png, in place of older ones.

        Args:
            folder: Where; made if it is missing.
        """
        folder = pathlib.Path(folder)
        write_json(folder / "probe.json", dataclasses.asdict(self))
        with replacing(folder / "probe.png") as path:
            plot_probe(self).savefig(path, dpi=150)


def probe(
    weights,
    data,
    out,
    *,
    image_size=None,
    train_images=None,
    test_images=None,
    num_heads=None,
    normalization=None,
    batch_size=32,
    overwrite=False,
    skip_unreadable=False,
):
    """Says how good the features of a checkpoint are for images; the model is not trained.

    The features of each image are computed once and kept in `out`. Three classifiers learn from
    those of the training images: nearest neighbours, logistic regression, and least squares on a
    few images of each class; see `knn_classes`, `logistic_regression`, `few_shot_accuracies`.

    Example:

        result = probe("S_16.npz", "folder:flowers", "runs/probe-flowers", image_size=224)
        print(result.logistic["accuracy"])

    Args:
        weights: A checkpoint, as `keras_vit.from_checkpoint` takes it.
        data: "digits", "folder:PATH", "tfds:NAME[:CONFIG]" or "tfrecord:PATH".
        out: The folder to write. Features that it holds for the same arguments are not computed
            again: a call that was interrupted goes on with the split it was at.
        image_size: Pixels, or `(height, width)`; None: the checkpoint's.
        train_images: Number of training images, from all over their split; None: 10,000. More
            than there are means all, here and for the test. Validation takes 2,000 at most.
        test_images: Number of test images, from all over their split; None: all.
        num_heads: Attention heads, of a checkpoint that does not say; None: the checkpoint's.
        normalization: Of the pixels, as `build_vit` takes it; None: the checkpoint's.
        batch_size: Images at a time.
        overwrite: Replace what `out` holds of other weights, data or arguments.
        skip_unreadable: Leave out files that cannot be read instead of refusing them.

    Returns:
        A `ProbeResult`, which is in `out` too.

    Raises:
        ValueError: An argument is out of its range, the checkpoint or the data cannot be used,
            the training images are of one class alone, features are not finite, or `out` holds
            something else.
        TypeError: `weights` or `data` is of a type that cannot be used.
    """
    limits = {"train": train_images, "validation": VALIDATION_IMAGES, "test": test_images}
    check_positive_int("batch_size", batch_size)
    for name, limit in limits.items():
        if limit is not None:
            check_positive_int(f"{name}_images", limit)
    limits["train"] = train_images or TRAIN_IMAGES
    out = pathlib.Path(out)
    check_probe_folder(out)
    if isinstance(data, str):
        check_outside(data, out)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    path = local_path(weights)
    model = load_backbone(
        weights, image_size=image_size, num_heads=num_heads, normalization=normalization
    )
    data = load_data(data, skip_unreadable=skip_unreadable)
    info = {"weights": str(weights), "sha256": sha256(path), **_describe(model, data, limits)}
    check_stored(out, info, overwrite)
    _print_header(console, info, data)
    features, seconds = _features(out, info, model, data, batch_size, console)
    result = classify(features, info, seconds, console)
    result.save(out)
    return result


def classify(features, info, seconds, console):
    """Lets the classifiers learn from features.

    Args:
        features: Split -> features `(N, D)` and int labels `(N,)`.
        info: See `ProbeResult`.
        seconds: What the features took.
        console: The `rich.console.Console` that shows the steps.

    Returns:
        A `ProbeResult`.
    """
    train, validation, test = (features[name] for name in SPLITS)
    num_classes = len(info["class_names"])
    steps = {"features": round(seconds, 1)}
    with _timed(steps, "knn"), console.status("nearest neighbours"):
        k = min(NEIGHBORS, len(train[1]))
        classes = knn_classes(*train, test[0], num_classes, k)
        knn = {"k": k, "accuracy": float(np.mean(classes == test[1]))}
    with _timed(steps, "logistic"):
        grid = _tracked(C_GRID, "logistic regression", console)
        logistic = logistic_regression(train, validation, test, grid)
    with _timed(steps, "few_shot"), console.status("least squares"):
        few_shot = few_shot_accuracies(train, test, num_classes)
    if not logistic["converged"]:
        console.print(
            f"note: the logistic regression did not converge in {MAX_ITERATIONS} iterations"
        )
    return ProbeResult(info, knn, logistic, few_shot, steps)


def knn_classes(features, labels, test_features, num_classes, k):
    """The classes of images by their k nearest neighbours.

    The neighbours are those of the greatest cosine similarity s; each votes for its class with
    the weight exp(s / 0.07).

    Args:
        features: Of the training images, `(N, D)`.
        labels: Their int labels `(N,)` in [0, K).
        test_features: `(M, D)`.
        num_classes: Number K of classes.
        k: Number of neighbours, in [1, N].

    Returns:
        int array `(M,)`.

    Source: DINO, arXiv 2104.14294, Section 3.2 (k = 20), and eval_knn.py of
    facebookresearch/dino (the weights).
    """
    neighbors = NearestNeighbors(n_neighbors=k, metric="cosine").fit(features)
    distances, indices = neighbors.kneighbors(test_features)  # (M, k)
    votes = np.zeros((len(test_features), num_classes))
    rows = np.arange(len(test_features))[:, None]
    np.add.at(votes, (rows, labels[indices]), np.exp((1 - distances) / TEMPERATURE))
    return votes.argmax(axis=1)


def logistic_regression(train, validation, test, grid=C_GRID):
    """Multinomial logistic regression on features of mean 0 and deviation 1.

    Minimises the cross-entropy, summed over the training images, times C, plus |W|^2 / 2. The C
    is the one with the best validation accuracy, and the smallest of several.

    Args:
        train: Features `(N, D)` and int labels `(N,)` to fit on.
        validation: Features and labels to choose C by.
        test: Features and labels to report.
        grid: Values of C in ascending order.

    Returns:
        A dict as `ProbeResult.logistic`.
    """
    fits, best = [], None
    for c in grid:
        classifier = make_pipeline(
            StandardScaler(), LogisticRegression(C=c, max_iter=MAX_ITERATIONS)
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", ConvergenceWarning)
            classifier.fit(train[0].astype("float64"), train[1])
        converged = not any(issubclass(w.category, ConvergenceWarning) for w in caught)
        accuracy = classifier.score(*validation)
        fits.append({"C": c, "validation": accuracy, "converged": converged})
        if best is None or accuracy > best["validation"]:
            best = {"accuracy": classifier.score(*test), **fits[-1]}
    return {**best, "fits": fits}


def extract_features(model, split, count, batch_size, report):
    """Runs a model over images of a split, each once and in order: those of `spread_places`.

    Args:
        model: A Keras model, images `(B, H, W, 3)` in [0, 255] -> features `(B, D)`.
        split: A `keras_vit.data.Split`.
        count: How many images.
        batch_size: Images at a time.
        report: A function called with the number of images done.

    Returns:
        float32 features `(count, D)` and int labels `(count,)`.
    """
    resized = resized_images(split, spread_places(split.count, count), model.input_shape[1:3])
    batches = untuned(resized.batch(batch_size).prefetch(tf.data.AUTOTUNE))
    features, labels = [], []
    for images, batch_labels in batches:
        missing = batch_size - len(images)  # filled up: another shape would be compiled anew
        filled = tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])
        features.append(model.predict_on_batch(filled)[: len(images)])
        labels.append(batch_labels.numpy())
        report(sum(map(len, labels)))
    return np.concatenate(features).astype("float32"), np.concatenate(labels)


def check_probe_folder(folder):
    """Raises ValueError if something else than a probe stands at `folder`."""
    if is_free(folder):
        return
    if not (folder / "probe.json").exists() and not (folder / "features").is_dir():
        raise ValueError(f"{folder} exists and is not the folder of a probe: choose another path.")


def check_stored(folder, info, overwrite):
    """Raises ValueError if `folder` has features of something else, unless `overwrite`."""
    for name in SPLITS:
        path = _features_path(folder, name)
        if overwrite or not path.exists():
            continue
        wanted, stored = _key(info, name), _stored_key(path)
        other = {key: value for key, value in wanted.items() if stored.get(key) != value}
        if other:
            raise ValueError(
                f"{path} holds features of other {', '.join(other)}: pass overwrite=True "
                "(--overwrite) to replace them, or choose another folder. Received: "
                + ", ".join(f"{key}={other[key]!r}, not {stored.get(key)!r}" for key in other)
                + "."
            )


def _features_path(folder, split_name):
    return folder / "features" / f"{split_name}.npz"


def _key(info, split_name):
    """All that the features of a split depend on."""
    return {
        "weights": info["sha256"],
        "data": info["fingerprint"],
        "images": info["images"][split_name],
        **info["model"],
        "keras-vit": info["versions"]["keras-vit"],
    }


def _stored_key(path):
    """The key of stored features; an empty one if the file cannot be read or is none of ours."""
    try:
        with np.load(path) as file:
            return dict(json.loads(str(file["key"])))
    except (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, zipfile.BadZipFile):
        return {}


def _describe(model, data, limits):
    """What `ProbeResult.info` says beside the weights."""
    arguments = vit_arguments(model)
    arguments["variant"] = dataclasses.asdict(arguments["variant"])
    counts = {name: getattr(data, name).count for name in SPLITS}
    return {
        "data": data.name,
        "fingerprint": data.fingerprint,
        "class_names": list(data.class_names),
        "images": {name: min(count, limits[name] or count) for name, count in counts.items()},
        "width": model.output_shape[-1],
        "model": json.loads(json.dumps(arguments)),  # lists, as they are read back
        "versions": versions(),
    }


def _print_header(console, info, data):
    counts = []
    for name in SPLITS:
        images, total = info["images"][name], getattr(data, name).count
        counts.append(
            f"{images:,} {name}" if images == total else f"{images:,} of {total:,} {name}"
        )
    height, width = info["model"]["image_size"]
    console.print(
        f"{info['weights']}: {info['width']:,} features of images of {height} x {width} px\n"
        f"{data.name}: {data.num_classes} classes, {', '.join(counts)} images"
    )
    for error in data.skipped.values():
        console.print(f"skipped: {error}")


def _features(folder, info, model, data, batch_size, console):
    """Features and labels by split, computed or read from `folder`; and the seconds they took."""
    # XLA pays on small images; on large ones it makes little difference.
    model.compile(jit_compile=True)
    found, seconds = {}, 0.0
    for name in SPLITS:
        path, key, count = _features_path(folder, name), _key(info, name), info["images"][name]
        if _stored_key(path) != key:
            start = time.perf_counter()
            with _bar(name, count, console) as report:
                features, labels = extract_features(
                    model, getattr(data, name), count, batch_size, report
                )
            _check_features(name, features, labels, data.class_names)
            took = time.perf_counter() - start
            with replacing(path) as temporary:
                np.savez(
                    temporary, key=json.dumps(key), features=features, labels=labels, seconds=took
                )
            console.print(f"{name}: {count:,} images, {count / took:,.1f} images/s")
        else:
            console.print(f"{name}: {count:,} images, features of {path}")
        with np.load(path) as file:
            found[name] = file["features"], file["labels"]
            seconds += float(file["seconds"])
    _report_missing(found["train"][1], data.class_names, console)
    return found, seconds


def _check_features(split_name, features, labels, class_names):
    """Raises ValueError for features that are no use."""
    bad = np.sum(~np.isfinite(features).all(axis=1))
    if bad:
        raise ValueError(
            "The features of every image must be finite: are these the right weights, and their "
            f"normalization? Received: infinite or NaN for {bad} of {len(features)} "
            f"{split_name} images."
        )
    if split_name == "train" and len(np.unique(labels)) < 2:
        raise ValueError(
            "The training images must be of at least two classes: raise train_images "
            f"(--train-images). Received: train_images={len(labels)}, all of class "
            f"{class_names[labels[0]]!r}."
        )


def _report_missing(labels, class_names, console):
    missing = sorted(set(class_names) - {class_names[label] for label in labels})
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if missing[3:] else "")
        console.print(
            f"note: no training image is of the class {named}: it is never predicted, and there "
            "is no few-shot accuracy. More --train-images may help."
        )


@contextlib.contextmanager
def _timed(seconds, name):
    start = time.perf_counter()
    yield
    seconds[name] = round(time.perf_counter() - start, 1)


@contextlib.contextmanager
def _bar(name, total, console):
    """A bar on a terminal; yields a function that takes the number of images done."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(bar_width=30),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[speed]}"),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(name, total=total, speed="compiling")
        start = time.perf_counter()

        def show(done):
            speed = f"{done / (time.perf_counter() - start):,.1f} images/s"
            bar.update(task, completed=done, speed=speed)

        yield show


def _tracked(items, description, console):
    quiet = not console.is_terminal
    return progress.track(items, description, console=console, transient=True, disable=quiet)


def plot_probe(result):
    """Draws the few-shot accuracies, and those on all training images as lines across."""
    figure = matplotlib.figure.Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.subplots()
    if result.few_shot:
        shots, draws = list(result.few_shot), np.array(list(result.few_shot.values()))  # (S, 3)
        axes.plot(shots, draws.mean(axis=1), "o-", label="least squares, mean and range of 3 draws")
        axes.fill_between(shots, draws.min(axis=1), draws.max(axis=1), alpha=0.2)
        axes.set_xscale("log")
        axes.set_xticks(shots, [str(shot) for shot in shots], minor=False)
        axes.xaxis.set_minor_locator(matplotlib.ticker.NullLocator())
    else:
        axes.set_xticks([])
    images = f"{result.info['images']['train']:,} images"
    lines = (
        (result.knn["accuracy"], "--", "C1", f"{result.knn['k']} nearest neighbours, {images}"),
        (result.logistic["accuracy"], ":", "C2", f"logistic regression, {images}"),
    )
    for accuracy, style, color, label in lines:
        axes.axhline(accuracy, linestyle=style, color=color, label=label)
    axes.set(xlabel="training images per class", ylabel="test accuracy")
    title = f"{result.info['width']} features on {result.info['data']}"
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure
