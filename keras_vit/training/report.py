"""What a run shows: lines on the terminal, and curves."""

import csv
import os
import pathlib

import matplotlib.figure
import matplotlib.ticker
import tensorflow as tf
from rich.console import Console

from keras_vit.files import replacing
from keras_vit.model import vit_arguments

LARGE_SIDE = 384  # pixels, the paper's for fine-tuning
ENOUGH_PATCHES = 16  # the 4 x 4 of "tiny", the smallest grid of a recipe
_SHOWN_CLASSES = 5
_NVIDIA_DRIVER = pathlib.Path("/proc/driver/nvidia")


def chief_console(workers):
    """Where the chief speaks; the other workers are silent."""
    return Console(soft_wrap=True, highlight=False, markup=False, quiet=not workers.is_chief)


def print_header(console, run, model, workers):
    """Says what is trained on what, and by which devices."""
    data, weights, facts = run.info["data"], run.info["weights"], run.info["model"]
    skipped = f", {data['skipped']} unreadable skipped" if data["skipped"] else ""
    height, width = facts["image_size"]
    pixels = height if height == width else f"{height} x {width}"
    console.print(
        f"{data['name']}: {_classes(data['class_names'])}, {data['train']:,} training, "
        f"{data['validation']:,} validation, {data['test']:,} test images{skipped}"
    )
    if weights is not None:
        console.print(f"{weights['path']} (SHA-256 {weights['sha256'][:12]}...), new head")
    console.print(
        f"{_size(run.info['recipe'], model)}, images of {pixels} px, "
        f"{facts['parameters']:,} parameters, on {_devices(workers.replicas)}"
    )
    patches = model.get_layer("patches").output.shape[1]
    if patches < ENOUGH_PATCHES:
        is_free = weights is None and vit_arguments(model)["variant"].patch_size > 1
        smaller = " or a smaller patch_size (--patch-size)" if is_free else ""
        console.print(
            f"note: patches per image: {patches}, few for a transformer; a larger image_size "
            f"(--image-size){smaller} gives more"
        )
    if _misses_gpu():
        console.print(
            "note: this machine has an NVIDIA driver, and TensorFlow found no GPU: "
            f'pip install "tensorflow[and-cuda]=={tf.__version__}"'
        )
    if run.info["recipe"]["freeze_backbone"]:
        console.print(
            f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters trained"
        )


def _classes(names):
    """How many classes there are, and the first names, by which folders that are none are seen."""
    shown = ", ".join(names[:_SHOWN_CLASSES])
    more = ", ..." if len(names) > _SHOWN_CLASSES else ""
    return f"{len(names)} classes ({shown}{more})"


def _devices(replicas):
    """What trains, in words."""
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        return "the CPU" if replicas == 1 else f"{replicas} CPUs"
    name = tf.config.experimental.get_device_details(gpus[0]).get("device_name", "unknown")
    return f"{replicas} GPU{'s' if replicas > 1 else ''} ({name})"


def _misses_gpu():
    """Whether there is a GPU that TensorFlow did not find, and that nobody hid from it."""
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
    return _NVIDIA_DRIVER.exists() and not hidden and not tf.config.list_physical_devices("GPU")


def _size(recipe, model):
    """The size of a model in words: its variant, or its blocks and patches."""
    size, patch_size = recipe["variant"], recipe["patch_size"]
    if not isinstance(size, str):
        config = vit_arguments(model)["variant"]
        size = f"{config.depth} blocks of width {config.hidden_dim}"
        patch_size = config.patch_size
    return f"{size}, patches of {patch_size} px" if patch_size else size


def print_large(console, model):
    """Says what large images of a checkpoint cost, which are easily more than there is memory."""
    side = max(model.input_shape[1:3])
    if side > LARGE_SIDE:
        console.print(
            f"note: {side} px, the checkpoint's own size, takes much memory and time; a smaller "
            "image_size (--image-size) or batch_size (--batch-size) takes less"
        )


def plot_curves(folder):
    """Draws history.csv as curves.png: loss and accuracy over the epochs."""
    history = folder / "history.csv"
    if not history.exists():
        return
    rows = list(csv.DictReader(history.read_text().splitlines()))
    if not rows:
        return
    figure = matplotlib.figure.Figure(figsize=(9, 3.5), layout="constrained")
    epochs = [int(row["epoch"]) + 1 for row in rows]
    for axes, name in zip(figure.subplots(1, 2), ("loss", "accuracy"), strict=True):
        for key, label in ((name, "training"), (f"val_{name}", "validation")):
            marker = "o" if len(rows) == 1 else None  # no line goes through one point
            axes.plot(epochs, [float(row[key]) for row in rows], label=label, marker=marker)
        axes.set(xlabel="epoch", ylabel=name)
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(folder / "curves.png") as path:
        figure.savefig(path, dpi=150)
