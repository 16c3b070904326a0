"""From a compiled model to a trained and tested one, with run.json true whatever happens."""

import contextlib
import math
import time

import keras
import tensorflow as tf

from keras_vit.data.pipeline import evaluation_batches, training_batches
from keras_vit.files import replacing
from keras_vit.training.building import steps_per_epoch
from keras_vit.training.callbacks import (
    Averages,
    BestModel,
    Checkpoints,
    Progress,
    StopOnNonFinite,
    TrainingInterrupted,
)
from keras_vit.training.evaluation import evaluate
from keras_vit.training.report import plot_curves
from keras_vit.training.run import save_run

START = {"step": 0, "epoch": 0, "step_of_epoch": 0, "stopped": False, "best": None}


def fit_and_record(run, vit, model, data, recipe, console, workers, position=None):
    """Trains, tests the best model, and keeps run.json true whatever happens.

    Args:
        run: The `Run`.
        vit: The model to save.
        model: The `DistributedModel` of its weights.
        data: The `ImageData`.
        recipe: The `Recipe`.
        console: Where to print.
        workers: The `Workers`.
        position: Where the training goes on, as a checkpoint has it; None for the start.
    """
    start = time.perf_counter()
    results = run.info["results"]
    seconds = results.get("seconds", 0)  # before it was resumed
    results.pop("error", None)
    results["status"] = "running"
    _save_run(run, workers)
    try:
        best = _fit(run, vit, model, data, recipe, console, workers, position)
        results.update(best_epoch=best.epoch, validation_accuracy=best.accuracy, status="finished")
        if workers.is_chief:
            tested = evaluate(run.model(), data.test, run.class_names, run.images_at_once)
            results["test_accuracy"] = tested.top1
    except BaseException as error:
        interrupted = isinstance(error, TrainingInterrupted)
        results.update(
            status="interrupted" if interrupted else "stopped",
            error=f"{type(error).__name__}: {error}",
        )
        if interrupted:
            console.print(f"{error} Continue with: keras-vit train --resume {run.folder}")
        raise
    finally:
        results["seconds"] = round(seconds + time.perf_counter() - start, 1)
        _save_run(run, workers)
        if workers.is_chief:
            with contextlib.suppress(OSError):
                plot_curves(run.folder)
    with lost_workers(run.folder):
        workers.json_from_chief(None)  # whoever ended before the chief could not be started again
    if workers.is_chief:
        console.print(
            f"test accuracy {results['test_accuracy']:.4f} (best epoch {results['best_epoch']}, "
            f"{results['seconds']:.0f} s) -> {run.folder}"
        )


def _fit(run, vit, model, data, recipe, console, workers, position):
    """Trains to the end; returns the `BestModel`, with the place of the best epoch."""
    position = position or START
    options = run.info["options"]
    steps = steps_per_epoch(recipe, data)

    def save(name):
        if workers.is_chief:
            with replacing(run.folder / name) as path:
                vit.save(path)

    best = BestModel(save, patience=options["early_stop"])
    if position["best"]:
        best.epoch, best.accuracy, best.loss = position["best"]
    checkpoints = Checkpoints(
        run.folder if workers.is_chief else None,
        best,
        steps,
        every_steps=options["checkpoint_steps"],
        every_minutes=options["checkpoint_minutes"],
        keep=options["keep_checkpoints"],
        any_worker=workers.any if workers.several else None,
    )
    progress = Progress(console, recipe.batch_size)
    finite = StopOnNonFinite(position["step"])
    callbacks = [finite, progress, Averages(), best, *_logs(run, workers), checkpoints]
    batches, validation = _batches(data, recipe, model, options["seed"], workers, position["step"])
    guard = lost_workers(run.folder, checkpoints)
    with contextlib.closing(progress), checkpoints.listening(), guard:
        model.fit(
            batches,
            epochs=position["epoch"] if position["stopped"] else recipe.epochs,
            initial_epoch=position["epoch"],
            initial_step=position["step_of_epoch"],
            steps_per_epoch=steps,
            validation_data=validation,
            validation_steps=math.ceil(data.validation.count / _at_once(recipe)),
            callbacks=callbacks,
            shuffle=False,  # the batches are
            verbose=0,
        )
    save("last.keras")  # `fit` ends with the averaged weights, if there are any
    return best


def _logs(run, workers):
    """The callbacks that write what TensorBoard and people read."""
    if not workers.is_chief:
        return []
    return [
        keras.callbacks.CSVLogger(str(run.folder / "history.csv"), append=True),
        keras.callbacks.TensorBoard(str(run.folder / "tensorboard"), write_graph=False),
    ]


def _at_once(recipe):
    """The images of a batch of validation: a training step holds as many, and more of each."""
    return recipe.batch_size // recipe.micro_batches


def _batches(data, recipe, model, seed, workers, first_step):
    """The batches of training, from a step on, and those of validation."""
    size, batch_size, at_once = model.input_shape[1:3], recipe.batch_size, _at_once(recipe)

    def training(shard):
        return training_batches(
            data.train,
            size,
            batch_size,
            data.num_classes,
            seed=seed,
            first_step=first_step,
            shard=shard,
            augmentation=recipe.augmentation,
        )

    def validation(shard):
        return evaluation_batches(
            data.validation, size, at_once, data.num_classes, shard=shard, cached=True
        )

    return (
        workers.distribute(training, batch_size, drop_remainder=True),
        workers.distribute(validation, at_once, drop_remainder=False),
    )


@contextlib.contextmanager
def lost_workers(folder, checkpoints=None):
    """Says what to do when another worker is gone."""
    try:
        yield
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.CancelledError) as error:
        if checkpoints and checkpoints.stopped_by:
            # So were the others, and the chief saved a checkpoint.
            raise TrainingInterrupted(f"Stopped by {checkpoints.stopped_by}.") from error
        raise RuntimeError(
            "Another worker was lost, see what it said. Start all of them again; once training "
            f"has begun, with `keras-vit train --resume {folder}`. {str(error).splitlines()[0]}"
        ) from error


def _save_run(run, workers):
    if workers.is_chief:
        save_run(run)
