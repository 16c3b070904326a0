"""`train`: data and a recipe in, a run folder out."""

import contextlib
import csv
import dataclasses
import datetime
import math
import time

import keras
import matplotlib.figure
import tensorflow as tf
from rich.console import Console

from keras_vit.data import load_data
from keras_vit.data.pipeline import evaluation_batches, training_batches
from keras_vit.files import replacing
from keras_vit.model import build_vit, vit_arguments
from keras_vit.training.backbone import load_backbone
from keras_vit.training.callbacks import Checkpoints, Progress, StopOnNonFinite
from keras_vit.training.evaluation import evaluate
from keras_vit.training.optimizers import build_optimizer
from keras_vit.training.recipes import resolve_recipe
from keras_vit.training.run import Run, check_run_folder, new_run_folder, save_run
from keras_vit.versions import versions
from keras_vit.weights.loading import HEAD
from keras_vit.weights.sources import local_path, sha256

LARGE_SIDE = 384  # pixels, the paper's for fine-tuning
PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def train(
    data="digits",
    out="runs/digits",
    *,
    weights=None,
    num_heads=None,
    recipe=None,
    precision="float32",
    jit_compile="auto",
    early_stop=None,
    seed=0,
    skip_unreadable=False,
    overwrite=False,
    **overrides,
):
    """Trains a Vision Transformer on images and writes a run folder.

    From scratch, or from a checkpoint, whose head gives way to a new one that starts at zero.
    Linear warm-up and cosine decay of the learning rate; the weight decay acts on kernels alone,
    not on biases, norms, tokens and positions.

    Example:

        run = train("folder:flowers", "runs/flowers", epochs=20)
        run = train("folder:flowers", "runs/tuned", weights="hf://google/vit-base-patch16-224")
        model = run.model()

    Args:
        data: "digits", "folder:PATH" or "tfds:NAME[:CONFIG]".
        out: The run folder to write; see `keras_vit.training.run` for what it holds.
        weights: A checkpoint to start from, as `keras_vit.from_checkpoint` takes it, or None.
        num_heads: Attention heads, for a checkpoint that does not say.
        recipe: A `Recipe`, a name of `RECIPES`, or None: "finetune_small" with weights, else the
            one that fits the images' size.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        jit_compile: Whether XLA compiles the training step; "auto": wherever Keras can.
        early_stop: Epochs without a new best model (by validation accuracy, then loss) before
            training stops, or None.
        seed: Seed of the weights, the order of the images and the augmentation.
        skip_unreadable: Leave out files that cannot be read instead of refusing them.
        overwrite: Replace the run that stands at `out`.
        **overrides: Fields of the recipe to change, such as `epochs=20`.

    Returns:
        The `Run`. `run.info["results"]` has the accuracies; `run.model()` loads the best model.
        Trained from weights, that model comes without an optimizer, and nothing in it is frozen,
        whatever was in training.

    Raises:
        ValueError: An argument is out of its range or does not fit another, the checkpoint or the
            data cannot be used, or `out` exists.
        TypeError: An override is not a field of `Recipe`.
        NonFiniteLossError: The training diverged; the last good model stays in `out`, or the
            run that was to be replaced if there is none yet.

    Source: fine-tuning as in the paper (arXiv 2010.11929, Sections 3.2 and B.1.1): the whole head
    of pre-training is left out, `pre_logits` too, and positions are interpolated.
    """
    _check_arguments(precision, weights, num_heads)
    check_run_folder(out, overwrite)
    # The images may take minutes to read, so that everything else is checked before. Without
    # weights, the recipe that None stands for depends on them.
    early = resolve_recipe(recipe, (0, 0), overrides, weights)
    source = backbone = None
    if weights is not None:
        path = local_path(weights)
        source = {"path": str(weights), "sha256": sha256(path), "num_heads": num_heads}
        backbone = load_backbone(
            path,
            image_size=early.image_size,
            num_heads=num_heads,
            pooling=early.pooling,
            normalization=early.normalization,
        )
    console = Console(soft_wrap=True, highlight=False, markup=False)
    data = load_data(data, skip_unreadable=skip_unreadable)
    recipe = resolve_recipe(recipe, data.image_size, overrides, weights)
    recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, data.train.count))
    keras.utils.set_random_seed(seed)
    with dtype_policy(precision):
        model = build_model(recipe, data.num_classes, backbone)
    del backbone
    options = {
        "precision": precision,
        "jit_compile": jit_compile,
        "early_stop": early_stop,
        "seed": seed,
    }
    info = _describe(data, source, recipe, options, model)
    with new_run_folder(out, overwrite) as folder:
        run = Run(folder, info)
        save_run(run)
        _print_header(console, run, model)
        if weights is not None and recipe.image_size is None:
            _print_large(console, model)
        for path in data.skipped:
            console.print(f"skipped {path}")
        _fit_and_record(run, model, data, recipe, console)
    return run


def _check_arguments(precision, weights, num_heads):
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}. Received: {precision!r}.")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Training needs Keras on its TensorFlow backend. Received: "
            f"KERAS_BACKEND={keras.backend.backend()!r}."
        )
    if num_heads is not None and weights is None:
        raise ValueError(f"`num_heads` is for `weights` alone. Received: num_heads={num_heads!r}.")


def build_model(recipe, num_classes, backbone=None):
    """The model of a recipe, or a copy of a backbone with a head of zeros."""
    if backbone is not None:
        return _build_on(backbone, recipe, num_classes)
    return build_vit(
        recipe.variant,
        image_size=recipe.image_size,
        num_classes=num_classes,
        patch_size=recipe.patch_size,
        pooling=recipe.pooling,
        class_token=recipe.pooling not in ("gap", "map"),
        position=recipe.position,
        dropout=recipe.dropout,
        drop_path=recipe.drop_path,
        normalization=recipe.normalization,
    )


def _build_on(backbone, recipe, num_classes):
    arguments = vit_arguments(backbone)
    frozen = recipe.freeze_backbone
    arguments |= {
        "num_classes": num_classes,
        "dropout": 0.0 if frozen else recipe.dropout,
        "drop_path": 0.0 if frozen else recipe.drop_path,
    }
    model = build_vit(**arguments)
    loaded = {weight.path: weight for weight in backbone.weights}
    for weight in model.weights:
        if not weight.path.startswith(HEAD):
            weight.assign(loaded[weight.path])
            if frozen:
                # Not its layer's `trainable`, which Keras saves and restores by halves.
                weight.trainable = False
    return model


@contextlib.contextmanager
def dtype_policy(name):
    """Sets Keras' dtype policy within the block."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def _fit_and_record(run, model, data, recipe, console):
    """Trains, tests the best model, and keeps run.json true whatever happens."""
    start = time.perf_counter()
    results = run.info["results"]
    try:
        checkpoints = _fit(run, model, data, recipe, console)
        results.update(
            best_epoch=checkpoints.best_epoch,
            validation_accuracy=checkpoints.best_accuracy,
            test_accuracy=evaluate(run.model(), data.test, run.class_names).top1,
            status="finished",
        )
    except BaseException as error:
        results.update(status="stopped", error=f"{type(error).__name__}: {error}")
        with contextlib.suppress(OSError):
            plot_curves(run.folder)
        raise
    finally:
        results["seconds"] = round(time.perf_counter() - start, 1)
        save_run(run)
    plot_curves(run.folder)
    console.print(
        f"test accuracy {results['test_accuracy']:.4f} (best epoch {results['best_epoch']}, "
        f"{results['seconds']:.0f} s) -> {run.folder}"
    )


def _fit(run, model, data, recipe, console):
    options = run.info["options"]
    size = model.input_shape[1:3]
    steps_per_epoch = math.ceil(data.train.count / recipe.batch_size)
    model.compile(
        optimizer=build_optimizer(recipe, model, steps_per_epoch),
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=recipe.label_smoothing
        ),
        metrics=[keras.metrics.CategoricalAccuracy(name="accuracy")],
        jit_compile=options["jit_compile"],
    )
    batches = training_batches(
        data.train,
        size,
        recipe.batch_size,
        data.num_classes,
        seed=options["seed"],
        min_crop_area=recipe.min_crop_area,
        rotation=recipe.rotation,
        shift=recipe.shift,
        flip=recipe.flip,
    )
    checkpoints = Checkpoints(run.folder, patience=options["early_stop"])
    progress = Progress(console, recipe.batch_size)
    callbacks = [
        StopOnNonFinite(),
        progress,
        checkpoints,
        keras.callbacks.CSVLogger(str(run.folder / "history.csv")),
        keras.callbacks.TensorBoard(str(run.folder / "tensorboard"), write_graph=False),
    ]
    validation = evaluation_batches(data.validation, size, recipe.batch_size, data.num_classes)
    try:
        with contextlib.closing(progress):
            model.fit(
                batches,
                epochs=recipe.epochs,
                steps_per_epoch=steps_per_epoch,
                validation_data=validation,
                callbacks=callbacks,
                shuffle=False,  # the batches are
                verbose=0,
            )
    finally:
        _drop_optimizer(run)
    return checkpoints


def _drop_optimizer(run):
    """Leaves the model alone in best.keras of a checkpoint.

    The optimizer of a frozen backbone is not that of the model that is loaded, and one with the
    rates of layers could be loaded only where `keras_vit.training` is imported.
    """
    path = run.folder / "best.keras"
    if run.info["weights"] is not None and path.exists():
        model = keras.saving.load_model(path, compile=False)
        with replacing(path) as temporary:
            model.save(temporary)


def _describe(data, weights, recipe, options, model):
    """What run.json says at the start."""
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "data": {
            "name": data.name,
            "class_names": list(data.class_names),
            "train": data.train.count,
            "validation": data.validation.count,
            "test": data.test.count,
            "skipped": len(data.skipped),
            "fingerprint": data.fingerprint,
        },
        "weights": weights,
        "recipe": dataclasses.asdict(recipe),
        "options": options,
        "model": {
            "name": model.name,
            "image_size": list(model.input_shape[1:3]),
            "parameters": model.count_params(),
            "trained_parameters": sum(math.prod(w.shape) for w in model.trainable_weights),
        },
        "versions": versions(),
        "devices": [device.device_type for device in tf.config.list_physical_devices()],
        "results": {"status": "running"},
    }


def _print_header(console, run, model):
    data, weights, facts = run.info["data"], run.info["weights"], run.info["model"]
    skipped = f", {data['skipped']} unreadable skipped" if data["skipped"] else ""
    height, width = facts["image_size"]
    pixels = height if height == width else f"{height} x {width}"
    console.print(
        f"{data['name']}: {len(data['class_names'])} classes, {data['train']:,} training, "
        f"{data['validation']:,} validation, {data['test']:,} test images{skipped}"
    )
    if weights is not None:
        console.print(f"{weights['path']} (SHA-256 {weights['sha256'][:12]}...), new head")
    console.print(
        f"{_size(run.info['recipe'], model)}, images of {pixels} px, "
        f"{facts['parameters']:,} parameters"
    )
    if run.info["recipe"]["freeze_backbone"]:
        console.print(
            f"{facts['trained_parameters']:,} of {facts['parameters']:,} parameters trained"
        )


def _size(recipe, model):
    """The size of a model in words: its variant, or its blocks and patches."""
    size, patch_size = recipe["variant"], recipe["patch_size"]
    if not isinstance(size, str):
        config = vit_arguments(model)["variant"]
        size = f"{config.depth} blocks of width {config.hidden_dim}"
        patch_size = config.patch_size
    return f"{size}, patches of {patch_size} px" if patch_size else size


def _print_large(console, model):
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
            axes.plot(epochs, [float(row[key]) for row in rows], label=label)
        axes.set(xlabel="epoch", ylabel=name)
        axes.grid(alpha=0.3)
        axes.legend()
    with replacing(folder / "curves.png") as path:
        figure.savefig(path, dpi=150)
