"""Checkpoints within a run: everything that the next step depends on.

RUN/checkpoints/step-00001234/
    state.safetensors    weights, optimizer with its averages and loss scale, random state
    position.json        where training stood, and the checksum of the state
"""

import json
import pathlib
import shutil
import warnings

import keras
import safetensors
import safetensors.numpy

from keras_vit.files import replacing, write_json
from keras_vit.weights.sources import sha256

FOLDER = "checkpoints"


def state_variables(model):
    """The variables that a step of training depends on, by names that are the same in any run.

    Args:
        model: A compiled `DistributedModel`, with its optimizer built.

    Returns:
        Dict from names to variables: weights, random states, and what the optimizer keeps. The
        metrics are left out: they do not act on the model.
    """
    metrics = {id(variable) for variable in model.metrics_variables}
    weights = {id(variable) for variable in model.weights}
    variables = [variable for variable in model.variables if id(variable) not in metrics]
    variables = {id(variable): variable for variable in variables + model.optimizer.variables}
    # The paths of the others begin with what Keras has counted in this process: "adam_w_1/...".
    return {
        f"{index:05d} {variable.path if key in weights else variable.name}": variable
        for index, (key, variable) in enumerate(variables.items())
    }


def current_state(model):
    """The values of `state_variables`, as arrays."""
    return {
        name: keras.ops.convert_to_numpy(variable)
        for name, variable in state_variables(model).items()
    }


def save_state(model, run_folder, position, keep):
    """Writes a checkpoint, and removes all but the last ones up to it.

    Later ones are removed too: they are damaged, or training would not be going on before them.

    Args:
        model: A compiled `DistributedModel`.
        run_folder: The run folder.
        position: What JSON can hold; `position["step"]` names the checkpoint.
        keep: How many checkpoints stay, at least 1.

    Raises:
        OSError: It cannot be written; what stood there before stays.
    """
    folder = pathlib.Path(run_folder) / FOLDER / f"step-{position['step']:08d}"
    with replacing(folder) as temporary:
        temporary.mkdir()
        _write_arrays(temporary / "state.safetensors", current_state(model))
        digest = sha256(temporary / "state.safetensors")
        write_json(temporary / "position.json", {**position, "sha256": digest})
    folders = _folders(run_folder)
    newest = folders.index(folder)
    rests = folder.parent.glob(".step-*")  # of processes that were killed while they wrote
    for old in [*folders[:newest], *folders[newest + keep :], *rests]:
        shutil.rmtree(old)


def load_state(run_folder):
    """The newest checkpoint of a run that is whole.

    Args:
        run_folder: The run folder.

    Returns:
        `(position, state)` as `save_state` had them, state as arrays by name; None if the run has
        no checkpoint yet.

    Raises:
        ValueError: There are checkpoints, and none is whole.

    Warns:
        UserWarning: A newer checkpoint is damaged, and was passed over.
    """
    folders = _folders(run_folder)
    for folder in folders:
        try:
            return _read(folder)
        except (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError) as error:
            warnings.warn(
                f"The checkpoint {folder} is damaged ({type(error).__name__}: {error}): passed "
                "over.",
                stacklevel=2,
            )
    if folders:
        raise ValueError(
            f"No checkpoint of the run is whole: train again with --overwrite. Received: "
            f"{[str(folder) for folder in folders]}."
        )
    return None


def restore_state(model, state):
    """Assigns the arrays of a checkpoint to a model and its optimizer; see `check_state`."""
    check_state(model, state)
    for name, variable in state_variables(model).items():
        variable.assign(state[name])


def check_state(model, state):
    """Raises ValueError if a checkpoint is of another model or optimizer."""
    variables = state_variables(model)
    shapes = {name: tuple(variable.shape) for name, variable in variables.items()}
    received = {name: array.shape for name, array in state.items()}
    if shapes != received:
        different = sorted(set(shapes.items()) ^ set(received.items()))
        raise ValueError(
            "The checkpoint is of another model or optimizer than the run's. "
            f"Received: {different[:4]}."
        )


def _folders(run_folder):
    """The checkpoints of a run, the newest first."""
    return sorted(pathlib.Path(run_folder, FOLDER).glob("step-*"), reverse=True)


def _write_arrays(path, arrays):
    try:
        safetensors.numpy.save_file(arrays, path)
    except safetensors.SafetensorError as error:  # what a full disk is there
        raise OSError(str(error)) from error


def _read(folder):
    position = json.loads((folder / "position.json").read_text(encoding="utf-8"))
    digest = sha256(folder / "state.safetensors")
    if digest != position["sha256"]:
        raise ValueError(f"SHA-256 {digest}, expected {position['sha256']}")
    return position, safetensors.numpy.load_file(folder / "state.safetensors")
