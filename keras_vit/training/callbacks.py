"""What `train` does besides fitting: progress, checkpoints, and stopping at a loss of NaN."""

import math
import time

import keras
from rich import progress

from keras_vit.files import replacing


class NonFiniteLossError(ArithmeticError):
    """The loss or a validation result became infinite or NaN: the training has diverged."""


class StopOnNonFinite(keras.callbacks.Callback):
    """Raises `NonFiniteLossError` with the step at the first loss that is not finite."""

    def on_train_begin(self, logs=None):
        self.step = 0

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


class Checkpoints(keras.callbacks.Callback):
    """Saves `last.keras` after every epoch, and `best.keras` when validation accuracy rises.

    Of epochs with equal accuracy, the one with the smaller validation loss is the best.

    Args:
        folder: The run folder.
        patience: Epochs without a new best before training stops, or None.
    """

    def __init__(self, folder, patience=None):
        super().__init__()
        self.folder = folder
        self.patience = patience
        self.best_epoch = 0
        self.best_accuracy = -math.inf
        self.best_loss = math.inf

    def on_epoch_end(self, epoch, logs=None):
        self._save("last.keras")
        accuracy, loss = logs["val_accuracy"], logs["val_loss"]
        if (accuracy, -loss) > (self.best_accuracy, -self.best_loss):
            self.best_epoch, self.best_accuracy, self.best_loss = epoch + 1, accuracy, loss
            self._save("best.keras")
        elif self.patience is not None and epoch + 1 - self.best_epoch >= self.patience:
            self.model.stop_training = True

    def _save(self, name):
        with replacing(self.folder / name) as path:
            self.model.save(path)


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

    def on_train_begin(self, logs=None):
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
        self.bar.start()

    def on_epoch_begin(self, epoch, logs=None):
        epochs = self.params["epochs"]
        self.epoch = f"{epoch + 1:{len(str(epochs))}}/{epochs}"
        self.task = self.bar.add_task(
            "", total=self.params["steps"], epoch=self.epoch, figures="compiling"
        )
        self.start = time.perf_counter()
        self.training_seconds = None

    def on_train_batch_end(self, batch, logs=None):
        figures = self._figures(logs, (batch + 1) * self.batch_size, time.perf_counter())
        self.bar.update(self.task, completed=batch + 1, figures=figures)

    def on_test_begin(self, logs=None):
        # Within fit, the validation: training ends here.
        self.training_seconds = time.perf_counter() - self.start

    def on_epoch_end(self, epoch, logs=None):
        self.bar.remove_task(self.task)
        now = self.start + (self.training_seconds or time.perf_counter() - self.start)
        images = self.params["steps"] * self.batch_size
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
