"""What `train` does besides fitting: progress, models, checkpoints, and when to stop."""

import contextlib
import math
import os
import signal
import threading
import time
import warnings

import keras
from rich import progress

from keras_vit.training.checkpoints import save_state
from keras_vit.training.keras_internals import weight_averages

ASK_EVERY = 10  # steps


class NonFiniteLossError(ArithmeticError):
    """The loss or a validation result became infinite or NaN: the training has diverged."""


class StopOnNonFinite(keras.callbacks.Callback):
    """Raises `NonFiniteLossError` with the step at the first loss that is not finite.

    Args:
        step: Steps that were done before.
    """

    def __init__(self, step=0):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch, logs=None):
        self.step += 1
        self._check(logs)

    def on_epoch_end(self, epoch, logs=None):
        self._check(logs)

    def _check(self, logs):
        for name, value in (logs or {}).items():
            if "loss" in name and not math.isfinite(value):
                raise NonFiniteLossError(
                    f"The {name} is {value} at step {self.step}: try a smaller learning rate, a "
                    "longer warm-up or gradient clipping."
                )


class TrainingInterrupted(Exception):
    """The process was told to end, by SIGTERM or Ctrl-C; the run can be resumed."""


@contextlib.contextmanager
def averaged_weights(model):
    """Puts the moving averages of the weights in their place within the block.

    With an optimizer without `use_ema`, nothing changes. Keras' `SwapEMAWeights` swaps by adding
    and subtracting, after which the weights are not the same to the last bit.
    """
    pairs = weight_averages(model.optimizer)
    kept = [keras.ops.convert_to_numpy(weight) for weight, _ in pairs]
    for weight, average in pairs:
        weight.assign(average)
    try:
        yield
    finally:
        for (weight, _), value in zip(pairs, kept, strict=True):
            weight.assign(value)


class Averages(keras.callbacks.Callback):
    """Has the validation within `fit` done with the averaged weights."""

    def on_test_begin(self, logs=None):
        self.stack = contextlib.ExitStack()
        self.stack.enter_context(averaged_weights(self.model))

    def on_test_end(self, logs=None):
        self.stack.close()


class BestModel(keras.callbacks.Callback):
    """Saves `best.keras` when the validation loss falls, with averaged weights if there are any.

    By accuracy, a lucky epoch in the middle of the training is the best where validation images are
    few: of 180, one more is half a percent.

    Args:
        save: Function of a name that writes the model to that file of the run folder.
        patience: Epochs without a new best before training stops, or None.
    """

    def __init__(self, save, patience=None):
        super().__init__()
        self.save = save
        self.patience = patience
        self.epoch = 0
        self.accuracy = -math.inf
        self.loss = math.inf

    def on_epoch_end(self, epoch, logs=None):
        if logs["val_loss"] < self.loss:
            self.epoch = epoch + 1
            self.accuracy, self.loss = logs["val_accuracy"], logs["val_loss"]
            with averaged_weights(self.model):
                self.save("best.keras")
        elif self.patience is not None and epoch + 1 - self.epoch >= self.patience:
            self.model.stop_training = True


class Checkpoints(keras.callbacks.Callback):
    """Saves what the next step depends on, after every epoch and within it.

    SIGTERM and Ctrl-C (SIGINT) save one, too, and end the training; of one of several workers
    within `ASK_EVERY` steps, when all of them ask each other.

    A checkpoint that cannot be written, as on a full disk, is a warning, and the one before stays.

    Args:
        folder: The run folder, or None for a worker that does not write.
        best: The run's `BestModel`, which a checkpoint speaks of.
        steps_per_epoch: Steps of a whole epoch.
        every_steps: Steps between checkpoints, or None.
        every_minutes: Minutes between checkpoints, or None.
        keep: How many stay, at least 1.
        any_worker: Function from whether this worker is to stop to whether any is, which all of
            them call at the same steps; None for one alone.
    """

    def __init__(
        self,
        folder,
        best,
        steps_per_epoch,
        *,
        every_steps,
        every_minutes,
        keep,
        any_worker=None,
    ):
        super().__init__()
        self.folder = folder
        self.best = best
        self.steps_per_epoch = steps_per_epoch
        self.any_worker = any_worker
        self.every_steps = every_steps
        self.every_minutes = every_minutes
        self.keep = keep
        self.stopped_by = None  # the name of a signal
        self.saved_as_told = False
        self.last_time = time.monotonic()

    @contextlib.contextmanager
    def listening(self):
        """Notes the signals within the block, in the main thread, the only one that can.

        A second Ctrl-C does what the first does elsewhere. A signal that is ignored, as Ctrl-C is
        in a script's background, stays so.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return

        def note(number, _):
            self.stopped_by = signal.Signals(number).name
            if number == signal.SIGINT:
                signal.signal(signal.SIGINT, before[signal.SIGINT])
                # Not `print`, which the signal may have interrupted.
                os.write(2, b"\nstopping with a checkpoint; Ctrl-C again stops at once\n")

        numbers = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.getsignal(number) for number in numbers}
        before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}
        for number in before:
            signal.signal(number, note)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = epoch

    def on_train_batch_end(self, batch, logs=None):
        step = batch + 1
        if step == self.steps_per_epoch:
            return  # the validation and its results come first
        alone = self.any_worker is None
        all_stop = (alone or step % ASK_EVERY == 0) and self._any_is_to_stop()
        # Told between two times of asking, the chief saves at once: it may not be given the time.
        is_new = self.stopped_by and not self.saved_as_told
        if self.folder is not None and (all_stop or is_new or self._is_due(self.epoch, step)):
            self._save(self.epoch, step)
        if all_stop:
            self._stop(self.epoch, step)

    def on_epoch_end(self, epoch, logs=None):
        all_stop = self._any_is_to_stop()
        if self.folder is not None:
            self._save(epoch + 1, 0)
        if all_stop:
            self._stop(epoch + 1, 0)

    def _any_is_to_stop(self):
        if self.any_worker is None:
            return self.stopped_by is not None
        any_stops = self.any_worker(self.stopped_by is not None)
        if any_stops and self.stopped_by is None:
            self.stopped_by = "a signal to another worker"
        return any_stops

    def _stop(self, epoch, step):
        if self.any_worker is not None:
            self.any_worker(True)  # waits until the chief has saved
        step += epoch * self.steps_per_epoch
        raise TrainingInterrupted(f"Stopped by {self.stopped_by} at step {step}.")

    def _is_due(self, epoch, step):
        step_due = time_due = False
        if self.every_steps is not None:
            step_due = (epoch * self.steps_per_epoch + step) % self.every_steps == 0
        if self.every_minutes is not None:
            time_due = time.monotonic() - self.last_time >= 60 * self.every_minutes
        return step_due or time_due

    def _save(self, epoch, step):
        position = {
            "step": epoch * self.steps_per_epoch + step,
            "epoch": epoch,
            "step_of_epoch": step,
            "stopped": bool(self.model.stop_training),
            "best": [self.best.epoch, self.best.accuracy, self.best.loss]
            if self.best.epoch
            else None,
        }
        try:
            save_state(self.model, self.folder, position, self.keep)
        except OSError as error:
            warnings.warn(
                f"The checkpoint of step {position['step']} could not be written ({error}): "
                "training goes on, and the one before stays.",
                stacklevel=2,
            )
        self.last_time = time.monotonic()
        self.saved_as_told = self.stopped_by is not None


class Progress(keras.callbacks.Callback):
    """Shows a bar within an epoch on a terminal, and prints one line per epoch.

    Adds `images_per_second` (of the training alone) and `learning_rate` to the logs of the epoch,
    so that the history and TensorBoard have them.

    Args:
        console: The `rich.console.Console` to write to.
        batch_size: Images per step.
    """

    def __init__(self, console, batch_size):
        super().__init__()
        self.console = console
        self.batch_size = batch_size
        self.bar = progress.Progress(
            progress.TextColumn("epoch {task.fields[epoch]}"),
            progress.BarColumn(bar_width=30),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[figures]}"),
            progress.TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )

    def on_train_begin(self, logs=None):
        self.bar.start()

    def on_epoch_begin(self, epoch, logs=None):
        epochs = self.params["epochs"]
        self.epoch = f"{epoch + 1:{len(str(epochs))}}/{epochs}"
        self.task = self.bar.add_task(
            "", total=self.params["steps"], epoch=self.epoch, figures="compiling"
        )
        self.start = time.perf_counter()
        self.training_seconds = None
        self.steps = 0  # of this epoch, less than all where a run is resumed in it

    def on_train_batch_end(self, batch, logs=None):
        self.steps += 1
        figures = self._figures(logs, self.steps * self.batch_size, time.perf_counter())
        self.bar.update(self.task, completed=batch + 1, figures=figures)

    def on_test_begin(self, logs=None):
        # Within fit, the validation: training ends here.
        self.training_seconds = time.perf_counter() - self.start

    def on_epoch_end(self, epoch, logs=None):
        self.bar.remove_task(self.task)
        now = self.start + (self.training_seconds or time.perf_counter() - self.start)
        images = self.steps * self.batch_size
        self.console.print(f"epoch {self.epoch}  {self._figures(logs, images, now)}")
        logs["images_per_second"] = images / (now - self.start)
        logs["learning_rate"] = float(self.model.optimizer.learning_rate)

    def on_train_end(self, logs=None):
        self.close()

    def close(self):
        """Takes the bar off the terminal; training that fails does not reach its end."""
        self.bar.stop()

    def _figures(self, logs, images, now):
        text = f"loss {logs['loss']:.4f}  accuracy {logs['accuracy']:.4f}"
        if "val_loss" in logs:
            text += f"  val_loss {logs['val_loss']:.4f}  val_accuracy {logs['val_accuracy']:.4f}"
        return text + f"  {images / (now - self.start):,.0f} images/s"
