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
from keras_vit.model import build_vit
from keras_vit.training.callbacks import Checkpoints, Progress, StopOnNonFinite
from keras_vit.training.evaluation import evaluate
from keras_vit.training.recipes import RECIPES, Recipe, default_recipe
from keras_vit.training.run import Run, check_run_folder, new_run_folder, save_run
from keras_vit.versions import versions

PRECISIONS = ("float32", "mixed_bfloat16", "mixed_float16")


def train(
    data="digits",
    out="runs/digits",
    *,
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

    AdamW with linear warm-up and cosine decay; the weight decay acts on kernels alone, not on
    biases, norms, tokens and positions.

    Example:

        run = train("folder:flowers", "runs/flowers", epochs=20)
        model = run.model()

    Args:
        data: "digits", "folder:PATH" or "tfds:NAME[:CONFIG]".
        out: The run folder to write; see `keras_vit.training.run` for what it holds.
        recipe: A `Recipe`, a name of `RECIPES`, or None for the one that fits the images' size.
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

    Raises:
        ValueError: An argument is out of its range, the data cannot be used, or `out` exists.
        TypeError: An override is not a field of `Recipe`.
        NonFiniteLossError: The training diverged; the last good model stays in `out`, or the
            run that was to be replaced if there is none yet.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}. Received: {precision!r}.")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Training needs Keras on its TensorFlow backend. Received: "
            f"KERAS_BACKEND={keras.backend.backend()!r}."
        )
    check_run_folder(out, overwrite)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    data = load_data(data, skip_unreadable=skip_unreadable)
    recipe = resolve_recipe(recipe, data.image_size, overrides)
    recipe = dataclasses.replace(recipe, batch_size=min(recipe.batch_size, data.train.count))
    keras.utils.set_random_seed(seed)
    with dtype_policy(precision):
        model = build_model(recipe, data.num_classes)
    options = {
        "precision": precision,
        "jit_compile": jit_compile,
        "early_stop": early_stop,
        "seed": seed,
    }
    info = _describe(data, recipe, options, model)
    with new_run_folder(out, overwrite) as folder:
        run = Run(folder, info)
        save_run(run)
        _print_header(console, run)
        for path in data.skipped:
            console.print(f"skipped {path}")
        _fit_and_record(run, model, data, recipe, console)
    return run


def resolve_recipe(recipe, image_size, overrides):
    """The `Recipe` of a name, of None (by the images' native size) or of itself, with overrides."""
    if recipe is None:
        recipe = default_recipe(image_size)
    if isinstance(recipe, str):
        if recipe not in RECIPES:
            raise ValueError(f"`recipe` must be one of {', '.join(RECIPES)}. Received: {recipe!r}.")
        recipe = RECIPES[recipe]
    if not isinstance(recipe, Recipe):
        raise TypeError(f"`recipe` must be a Recipe, a name or None. Received: {recipe!r}.")
    unknown = set(overrides) - {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise TypeError(f"Not a field of Recipe: {', '.join(sorted(unknown))}.")
    return dataclasses.replace(recipe, **overrides)


def build_model(recipe, num_classes):
    """The model of a recipe."""
    return build_vit(
        recipe.variant,
        image_size=recipe.image_size,
        num_classes=num_classes,
        patch_size=recipe.patch_size,
        pooling=recipe.pooling,
        class_token=recipe.pooling in ("token", "mean"),
        position=recipe.position,
        dropout=recipe.dropout,
        drop_path=recipe.drop_path,
        normalization=recipe.normalization,
    )


def build_optimizer(recipe, model, steps_per_epoch):
    """AdamW whose rate rises linearly from 0 and falls as a cosine to 0 at the last step."""
    steps = recipe.epochs * steps_per_epoch
    warmup_steps = min(round(recipe.warmup * steps), steps - 1)
    schedule = keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else recipe.learning_rate,
        warmup_target=recipe.learning_rate if warmup_steps else None,
        warmup_steps=warmup_steps,
        decay_steps=steps - warmup_steps,
    )
    optimizer = keras.optimizers.AdamW(
        schedule, weight_decay=recipe.weight_decay, global_clipnorm=recipe.clip_norm
    )
    optimizer.exclude_from_weight_decay(
        [weight for weight in model.trainable_weights if weight.name != "kernel"]
    )
    return optimizer


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
    size = (recipe.image_size,) * 2
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
    return checkpoints


def _describe(data, recipe, options, model):
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
        "recipe": dataclasses.asdict(recipe),
        "options": options,
        "model": {"name": model.name, "parameters": model.count_params()},
        "versions": versions(),
        "devices": [device.device_type for device in tf.config.list_physical_devices()],
        "results": {"status": "running"},
    }


def _print_header(console, run):
    data, recipe, model = run.info["data"], run.info["recipe"], run.info["model"]
    size, patch_size = recipe["variant"], recipe["patch_size"]
    if not isinstance(size, str):
        patch_size = patch_size or size["patch_size"]
        size = f"{size['depth']} blocks of width {size['hidden_dim']}"
    if patch_size:
        size += f", patches of {patch_size} px"
    skipped = f", {data['skipped']} unreadable skipped" if data["skipped"] else ""
    console.print(
        f"{data['name']}: {len(data['class_names'])} classes, {data['train']:,} training, "
        f"{data['validation']:,} validation, {data['test']:,} test images{skipped}\n"
        f"{size}, images of {recipe['image_size']} px, {model['parameters']:,} parameters"
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
