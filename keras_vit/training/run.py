"""The run folder: everything to look at, reproduce, evaluate and export a training run.

run.json             configuration, seed, versions, data fingerprint, results
best.keras           the model of the epoch with the smallest validation loss
last.keras           the model after the last epoch
checkpoints/         what training continues from, see `keras_vit.training.checkpoints`
history.csv          one row per epoch; of one that was resumed in its midst, the training loss
                     and accuracy are those of its rest
curves.png           loss and accuracy over the epochs
tensorboard/         the same for TensorBoard
evaluation/          written by `keras-vit evaluate`
export/              written by `keras-vit export`
"""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import warnings

import keras

import keras_vit.model  # noqa: F401  registers the layers that a model file needs
from keras_vit.data import load_data
from keras_vit.files import is_free, write_json
from keras_vit.training.callbacks import NonFiniteLossError


@dataclasses.dataclass(frozen=True)
class Run:
    """A training run on disk.

    Args:
        folder: The run folder.
        info: The content of run.json.
    """

    folder: pathlib.Path
    info: dict

    @property
    def class_names(self):
        """Names of the classes, in the order of the logits."""
        return self.info["data"]["class_names"]

    @property
    def model_name(self):
        """Name of the model, such as "vit_Ti16"."""
        return self.info["model"]["name"]

    @property
    def images_at_once(self):
        """Images that a device had room for in training: at most 128."""
        recipe = self.info["recipe"]
        parts = recipe.get("micro_batches", 1) * self.info.get("replicas", 1)  # of old runs
        return min(128, max(1, recipe["batch_size"] // parts))

    def model(self, which="best"):
        """Loads the "best" or the "last" model."""
        path = self.folder / f"{which}.keras"
        if not path.exists():
            raise ValueError(f"{path} is missing: the run saved no model yet.")
        return keras.saving.load_model(path)

    def data(self, spec=None, skip_unreadable=False):
        """Loads the data of the run, or other data with the same classes.

        Args:
            spec: As in `train`, or None for the run's own.
            skip_unreadable: Leave out files that cannot be read; the run's own data are read
                as they were in training.

        Raises:
            ValueError: The data cannot be loaded, their classes are not the run's, or the run's own
                data have changed since, so that its splits may differ.
        """
        recorded = self.info["data"]
        try:
            data = load_data(
                spec or recorded["name"],
                skip_unreadable=skip_unreadable or (recorded["skipped"] > 0 and spec is None),
            )
        except ValueError as error:
            if spec is not None:
                raise
            raise ValueError(
                f"The run's data cannot be loaded: {error} Name the data to use with `--data`."
            ) from error
        if list(data.class_names) != self.class_names:
            raise ValueError(
                f"The classes of {data.name} must be those the model was trained on: "
                f"{self.class_names}. Received: {list(data.class_names)}."
            )
        if spec is None and data.fingerprint != recorded["fingerprint"]:
            raise ValueError(
                f"{data.name} has changed since the run was trained on it, and its splits with "
                f"it. Name the data to use with `--data`. Received: fingerprint "
                f"{data.fingerprint}, expected {recorded['fingerprint']}."
            )
        return data


def load_run(folder):
    """Opens a run folder.

    Args:
        folder: A folder that `train` wrote.

    Returns:
        A `Run`.

    Raises:
        ValueError: `folder` is not a run folder.
    """
    folder = pathlib.Path(folder)
    try:
        info = json.loads((folder / "run.json").read_text(encoding="utf-8"))
        _ = info["results"]["status"]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(
            f"{folder} is not a run folder: run.json cannot be read ({error})."
        ) from error
    return Run(folder, info)


def save_run(run):
    """Writes run.json."""
    write_json(run.folder / "run.json", run.info)


def check_run_folder(folder, overwrite):
    """Raises ValueError if something stands at `folder`: a run, unless `overwrite`, or else."""
    folder = pathlib.Path(folder)
    if is_free(folder):
        return
    if not (folder / "run.json").exists():
        raise ValueError(f"{folder} exists and is not a run folder: choose another path.")
    if os.path.ismount(folder.resolve()):
        raise ValueError(
            f"{folder} is a mount, and the run in it cannot be replaced: choose a folder in it."
        )
    if not overwrite:
        raise ValueError(
            f"{folder} holds a run already: pass overwrite=True (--overwrite) to replace it, "
            "or choose another path."
        )


@contextlib.contextmanager
def new_run_folder(folder, overwrite):
    """Makes an empty run folder, in the place of a run if one stood there.

    Args:
        folder: Where; see `check_run_folder` for what it refuses.
        overwrite: Whether a run may stand there.

    Yields:
        The folder as a `pathlib.Path`. At the end, the run that stood there is put back if there
        is neither a model of the new one nor, unless it diverged, a checkpoint. Of a process that
        was killed, `resume` or the next one that replaces the run makes up for it.
    """
    check_run_folder(folder, overwrite)
    folder = pathlib.Path(folder).resolve()
    old = _old_run(folder)
    if overwrite and old.exists():
        shutil.rmtree(old if _has_begun(folder) else folder, ignore_errors=True)
    if folder.exists() and any(folder.iterdir()):
        os.replace(folder, old)
    folder.mkdir(parents=True, exist_ok=True)  # an empty one stays: it may be a mount
    diverged = False
    try:
        yield folder
    except NonFiniteLossError:
        diverged = True
        raise
    finally:
        if overwrite and old.exists():
            if _has_begun(folder, diverged):
                shutil.rmtree(old, ignore_errors=True)
            else:
                _put_back(old, folder)


def _put_back(old, folder):
    """Puts an old run where a new one failed; a warning, lest it hide why the new one did."""
    failed = folder.with_name(f".{folder.name}.failed")
    shutil.rmtree(failed, ignore_errors=True)
    try:
        # Moved away first: of files that are still open, not every system lets a folder be removed.
        os.replace(folder, failed)
        os.replace(old, folder)
    except OSError as error:
        warnings.warn(
            f"The run that stood at {folder} could not be put back, and is at {old}: {error}.",
            stacklevel=2,
        )
    shutil.rmtree(failed, ignore_errors=True)


def forget_old_run(folder):
    """Removes what a run replaced, if that has begun: its process was killed before it could."""
    folder = pathlib.Path(folder).resolve()
    if _has_begun(folder):
        shutil.rmtree(_old_run(folder), ignore_errors=True)


def _old_run(folder):
    """Where a run is while another is made in its place."""
    return folder.with_name(f".{folder.name}.old")


def _has_begun(folder, diverged=False):
    """Whether a run has a model or, unless it diverged, a checkpoint to go on from."""
    can_go_on = not diverged and any(folder.glob("checkpoints/step-*"))
    return (folder / "best.keras").exists() or can_go_on
