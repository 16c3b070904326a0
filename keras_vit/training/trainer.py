"""`train`: data and a recipe in, a run folder out; `resume`: on from where a run stood."""

import contextlib
import csv
import dataclasses
import datetime
import io
import math
import pathlib
import warnings

import keras
import tensorflow as tf

from keras_vit.config import ViTConfig, check_count, check_positive_int
from keras_vit.data import load_data
from keras_vit.data.sources import check_outside
from keras_vit.files import write_text
from keras_vit.model import vit_arguments
from keras_vit.training.backbone import load_backbone
from keras_vit.training.building import (
    check_model,
    compiled_model,
    model_arguments,
    steps_per_epoch,
)
from keras_vit.training.checkpoints import check_state, current_state, load_state, restore_state
from keras_vit.training.fitting import fit_and_record, lost_workers
from keras_vit.training.recipes import Recipe, resolve_recipe
from keras_vit.training.report import chief_console, print_header, print_large
from keras_vit.training.run import (
    Run,
    check_run_folder,
    forget_old_run,
    load_run,
    new_run_folder,
)
from keras_vit.training.workers import join_workers
from keras_vit.versions import versions
from keras_vit.weights.sources import local_path, sha256

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
    strategy="auto",
    early_stop=None,
    seed=0,
    checkpoint_steps=None,
    checkpoint_minutes=10.0,
    keep_checkpoints=2,
    skip_unreadable=False,
    overwrite=False,
    **overrides,
):
    """Trains a Vision Transformer on images and writes a run folder.

    From scratch, or from a checkpoint, whose head gives way to a new one that starts at zero. On
    any number of devices and workers the result is the same, up to rounding, and an interrupted
    run goes on by `resume` to the result it would have had.

    Example:

        run = train("folder:flowers", "runs/flowers", epochs=20)
        run = train("folder:flowers", "runs/tuned", weights="hf://google/vit-base-patch16-224")
        model = run.model()

    Args:
        data: "digits", "folder:PATH", "tfds:NAME[:CONFIG]" or "tfrecord:PATH".
        out: The run folder to write; see `keras_vit.training.run` for what it holds.
        weights: A checkpoint to start from, as `keras_vit.from_checkpoint` takes it, or None.
        num_heads: Attention heads, for a checkpoint that does not say.
        recipe: A `Recipe`, a name of `RECIPES`, or None: "finetune_small" with weights, else the
            one that fits the images' size.
        precision: "float32", "mixed_bfloat16" or "mixed_float16".
        jit_compile: Whether XLA compiles the training step; "auto": as in `DistributedModel`.
        strategy: "auto", "one", "mirrored" or "multiworker": the devices to train on; see
            `keras_vit.training.cluster.build_strategy`. With several workers each of them makes
            the same call; the chief alone writes.
        early_stop: Epochs without a new best model (by validation loss) before training stops,
            or None.
        seed: Seed of the weights, the order of the images, the augmentation and the dropout.
        checkpoint_steps: Steps between checkpoints within an epoch, or None. There is one after
            each epoch in any case.
        checkpoint_minutes: Minutes between checkpoints within an epoch, or None.
        keep_checkpoints: How many checkpoints stay, at least 1.
        skip_unreadable: Leave out files that cannot be read instead of refusing them.
        overwrite: Replace the run that stands at `out`.
        **overrides: Fields of the recipe to change, such as `epochs=20`.

    Returns:
        The `Run`. `run.info["results"]` has the accuracies; `run.model()` loads the best model,
        without an optimizer.

    Raises:
        ValueError: An argument is out of its range or does not fit another, the checkpoint or the
            data cannot be used, or `out` exists.
        TypeError: An override is not a field of `Recipe`.
        NonFiniteLossError: The training diverged; the last good model stays in `out`, or the
            run that was to be replaced if there is none yet.
        TrainingInterrupted: SIGTERM or Ctrl-C came; `resume` continues.
        RuntimeError: Another worker was lost; `resume` continues.

    Warns:
        UserWarning: More than a fifth of the averaged weights (`ema`) would be the initial ones.

    Source: fine-tuning as in the paper (arXiv 2010.11929, Sections 3.2 and B.1.1): the whole head
    of pre-training is left out, `pre_logits` too, and positions are interpolated.
    """
    _check_arguments(precision, weights, num_heads, jit_compile, early_stop, seed)
    _check_checkpoints(checkpoint_steps, checkpoint_minutes, keep_checkpoints)
    early = resolve_recipe(recipe, (0, 0), overrides, weights)
    _check_source(data)
    check_outside(data, out)
    workers = join_workers(strategy)
    if workers.is_chief:
        check_run_folder(out, overwrite)
    # The images may take minutes to read, so that everything else is checked before. Without
    # weights, the recipe that None stands for depends on them.
    source, backbone = _load_weights(weights, num_heads, early)
    if recipe is not None and weights is None:
        check_model(early)
    if recipe is not None or weights is not None or "batch_size" in overrides:
        _check_batch(early, workers.replicas)
    console = chief_console(workers)
    data = load_data(data, skip_unreadable=skip_unreadable)
    with lost_workers(out):
        _check_same_data(data, workers)
    recipe = resolve_recipe(recipe, data.image_size, overrides, weights)
    recipe = _fit_batch(recipe, data.train.count, console)
    _check_batch(recipe, workers.replicas)
    _check_average(recipe, recipe.epochs * steps_per_epoch(recipe, data))
    options = {
        "precision": precision,
        "jit_compile": jit_compile,
        "early_stop": early_stop,
        "seed": seed,
        "checkpoint_steps": checkpoint_steps,
        "checkpoint_minutes": checkpoint_minutes,
        "keep_checkpoints": keep_checkpoints,
    }
    arguments = model_arguments(recipe, data.num_classes, backbone)
    with lost_workers(out):
        vit, model = compiled_model(arguments, recipe, data, options, workers, backbone)
    options["jit_compile"] = model.xla  # what it was, for who resumes on another machine
    del backbone
    info = _describe(data, source, recipe, options, workers, model)
    with new_run_folder(out, overwrite) if workers.is_chief else _no_folder(out) as folder:
        run = Run(folder, info)
        print_header(console, run, model, workers)
        if weights is not None and recipe.image_size is None:
            print_large(console, model)
        for error in data.skipped.values():
            console.print(f"skipped: {error}")
        fit_and_record(run, vit, model, data, recipe, console, workers)
    return run


def resume(run, *, data=None, strategy="auto"):
    """Continues a run that was interrupted, to the result it would have had.

    Everything is as `train` was told, and goes on from the newest whole checkpoint: bit for bit on
    CPUs with XLA and as many workers, up to rounding without or with another number. The training
    loss and accuracy that are reported of the epoch that was interrupted are those of its rest.

    Args:
        run: The run folder.
        data: Where the images are now, as in `train`; None: where they were. They are the same.
        strategy: As in `train`; it need not be the same as before.

    Returns:
        The `Run`; one that was finished before is returned as it is.

    Raises:
        ValueError: `run` is not a run folder of this version, its data have changed since it
            began, or none of its checkpoints is whole.
        TrainingInterrupted: As in `train`, and so are RuntimeError and NonFiniteLossError.

    Warns:
        UserWarning: A checkpoint is damaged, and the one before it was taken; or other versions
            of the libraries began the run, so that its end may differ.
    """
    workers = join_workers(strategy)
    console = chief_console(workers)
    with lost_workers(run):
        info = workers.json_from_chief(load_run(run).info if workers.is_chief else None)
    run = Run(pathlib.Path(run).absolute(), info)
    if run.info["results"]["status"] == "finished":
        console.print(f"{run.folder} is finished: nothing to resume")
        return run
    if "arguments" not in run.info["model"]:
        raise ValueError(f"{run.folder} was begun by an older keras-vit, without checkpoints.")
    if versions() != run.info["versions"]:
        warnings.warn(
            f"The run was begun with {run.info['versions']}, and goes on with {versions()}: its "
            "result may differ in the last digits.",
            stacklevel=2,
        )
    data = _same_data(run, data)
    recipe = Recipe(**_with_config(run.info["recipe"]))
    _check_batch(recipe, workers.replicas)
    arguments = _with_config(run.info["model"]["arguments"])
    with lost_workers(run.folder):
        position, state = _newest_state(run, workers)
        backbone = _same_backbone(run, recipe) if position is None else None
        vit, model = compiled_model(arguments, recipe, data, run.info["options"], workers, backbone)
        print_header(console, run, model, workers)
        if position is not None:
            _restore(model, state, workers)
    if workers.is_chief:
        _cut_history(run.folder, position["epoch"] if position else 0)
    done = position["step"] if position else 0
    console.print(f"from step {done:,} of {recipe.epochs * steps_per_epoch(recipe, data):,}")
    try:
        fit_and_record(run, vit, model, data, recipe, console, workers, position)
    finally:
        if workers.is_chief:
            forget_old_run(run.folder)
    return run


def _with_config(fields):
    """The fields that JSON holds, with their `ViTConfig` made of its own."""
    variant = fields["variant"]
    return {**fields, "variant": ViTConfig(**variant) if isinstance(variant, dict) else variant}


def _same_data(run, source):
    """The data of a run, there or at another place, if they have not changed since it began."""
    recorded = run.info["data"]
    try:
        data = load_data(source or recorded["name"], skip_unreadable=recorded["skipped"] > 0)
    except ValueError as error:
        if source is not None:
            raise
        raise ValueError(
            f"The run's images cannot be loaded: {error} Where they are elsewhere now, say so with "
            "`--data`."
        ) from error
    if data.fingerprint != recorded["fingerprint"]:
        raise ValueError(
            f"{data.name} has changed since the run began, so that it cannot go on as it would "
            f"have: put the data back, or train anew. Received: {data.train.count} training images "
            f"with the fingerprint {data.fingerprint}, expected {recorded['train']} with "
            f"{recorded['fingerprint']}."
        )
    recorded["name"] = data.name
    return data


def _check_same_data(data, workers):
    """ValueError unless all workers have the chief's images, in this order."""
    expected = workers.json_from_chief(data.fingerprint)
    if workers.any(data.fingerprint != expected):
        raise ValueError(
            f"{data.name} must be the same for all workers. Received: {data.train.count} training "
            f"images with the fingerprint {data.fingerprint} here, and {expected} on the first one."
        )


def _newest_state(run, workers):
    """Where the newest checkpoint stands, None without one, and its state, the chief's alone."""
    found = load_state(run.folder) if workers.is_chief else None
    position, state = found or (None, None)
    return workers.json_from_chief(position), state


def _same_backbone(run, recipe):
    """The backbone of the weights that a run began with, None if it began without."""
    recorded = run.info["weights"]
    if recorded is None:
        return None
    weights, backbone = _load_weights(recorded["path"], recorded["num_heads"], recipe)
    if weights["sha256"] != recorded["sha256"]:
        raise ValueError(
            f"{recorded['path']} has changed since the run began, which has no checkpoint yet: "
            f"train anew. Received: SHA-256 {weights['sha256']}, expected {recorded['sha256']}."
        )
    return backbone


def _restore(model, state, workers):
    """Gives the model of every worker the chief's state; ValueError for all if it does not fit."""
    problem = None
    if workers.is_chief:
        try:
            check_state(model, state)
        except ValueError as error:
            problem = str(error)
    if problem := workers.json_from_chief(problem):
        raise ValueError(problem)
    state = state if workers.is_chief else current_state(model)
    with workers.scope():
        restore_state(model, {name: workers.from_chief(state[name]) for name in sorted(state)})


def _cut_history(folder, epochs):
    """Leaves the first epochs in history.csv; a run may have died after writing more."""
    path = folder / "history.csv"
    if path.exists():
        rows = list(csv.reader(io.StringIO(path.read_text())))
        whole = [row for row in rows[1:] if len(row) == len(rows[0])]
        kept = rows[:1] + [row for row in whole if int(row[0]) < epochs]
        write_text(path, "".join(",".join(row) + "\n" for row in kept))


def _check_arguments(precision, weights, num_heads, jit_compile, early_stop, seed):
    if precision not in PRECISIONS:
        raise ValueError(f"`precision` must be one of {PRECISIONS}. Received: {precision!r}.")
    if keras.backend.backend() != "tensorflow":
        raise ValueError(
            "Training needs Keras on its TensorFlow backend. Received: "
            f"KERAS_BACKEND={keras.backend.backend()!r}."
        )
    if num_heads is not None and weights is None:
        raise ValueError(f"`num_heads` is for `weights` alone. Received: num_heads={num_heads!r}.")
    if jit_compile not in (True, False, "auto"):
        raise ValueError(
            f"`jit_compile` must be True, False or 'auto'. Received: jit_compile={jit_compile!r}."
        )
    if early_stop is not None:
        check_positive_int("early_stop", early_stop)
    check_count("seed", seed)


def _check_source(data):
    """Has `load_data` raise for a source or a folder that is none, before images are read."""
    source, _, rest = str(data).partition(":")
    in_folder = source in ("folder", "tfrecord") and pathlib.Path(rest).expanduser().is_dir()
    if data != "digits" and not (rest and (source == "tfds" or in_folder)):
        load_data(data)


def _check_checkpoints(steps, minutes, keep):
    if steps is not None:
        check_positive_int("checkpoint_steps", steps)
    if minutes is not None and not (isinstance(minutes, (int, float)) and minutes > 0):
        raise ValueError(
            f"`checkpoint_minutes` must be positive. Received: checkpoint_minutes={minutes!r}."
        )
    check_positive_int("keep_checkpoints", keep)


def _load_weights(weights, num_heads, recipe):
    """What run.json says of a checkpoint to start from, and its backbone; None, None for None."""
    if weights is None:
        return None, None
    path = local_path(weights)
    backbone = load_backbone(
        weights,
        image_size=recipe.image_size,
        num_heads=num_heads,
        pooling=recipe.pooling,
        normalization=recipe.normalization,
    )
    # A file is found again from another folder, too; an address is no file.
    where = str(weights) if "://" in str(weights) else str(pathlib.Path(path).absolute())
    return {"path": where, "sha256": sha256(path), "num_heads": num_heads}, backbone


def _fit_batch(recipe, images, console):
    """The recipe with a batch that there are images for, the same for any number of replicas."""
    if images >= recipe.batch_size:
        return recipe
    fitting = 2 ** int(math.log2(images))
    console.print(
        f"note: a batch of {recipe.batch_size:,} is more than the {images:,} training images: took "
        f"{fitting:,}"
    )
    return dataclasses.replace(recipe, batch_size=fitting)


def _check_average(recipe, steps):
    """Warns of an average of the weights that would be of the initial ones above all."""
    left = 0 if recipe.ema is None else recipe.ema**steps
    if left > 0.2:
        share = float(f"{min(0.5, 10 / steps):.1g}")  # of a step, with which e^-10 would be left
        warnings.warn(
            f"After the {steps:,} steps of the training, {left:.0%} of the averaged weights, which "
            f"are evaluated and kept, would be the initial ones. Received: ema={recipe.ema}; take "
            f"{1 - share:.10g}, say.",
            stacklevel=3,
        )


def _check_batch(recipe, replicas):
    unit = _batch_unit(recipe, replicas)
    if recipe.batch_size % unit:
        pairs = ", in pairs for MixUp or CutMix" if recipe.mixing else ""
        raise ValueError(
            f"`batch_size` must be a multiple of {unit}: {replicas} devices with "
            f"{recipe.micro_batches} micro-batches each{pairs}. "
            f"Received: batch_size={recipe.batch_size}."
        )


def _batch_unit(recipe, replicas):
    # A replica's part is mixed before it is cut into micro-batches.
    return replicas * math.lcm(recipe.micro_batches, 2 if recipe.mixing else 1)


@contextlib.contextmanager
def _no_folder(path):
    yield pathlib.Path(path).absolute()


def _describe(data, weights, recipe, options, workers, model):
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
            "arguments": _plain(vit_arguments(model)),
        },
        "versions": versions(),
        "devices": [device.device_type for device in tf.config.list_physical_devices()],
        "replicas": workers.replicas,
        "results": {"status": "running"},
    }


def _plain(arguments):
    return {**arguments, "variant": dataclasses.asdict(arguments["variant"])}
