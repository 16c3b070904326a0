"""What distributed training needs of Keras and TensorFlow beyond their public interfaces.

All of it is here. setup.cfg pins both to the versions that have it; `test_keras_internals` says
which attribute disappeared when one does not.
"""

import functools

import keras
import tensorflow as tf
from keras.src.losses.loss import unscale_loss_for_distribution
from keras.src.trainers.data_adapters.tf_dataset_adapter import TFDatasetAdapter
from keras.src.trainers.trainer import model_supports_jit
from tensorflow.python.data.ops import multi_device_iterator_ops

from keras_vit.data.pipeline import untuned

# What is used below, by the owner's place.
ATTRIBUTES = {
    "keras.src.backend.tensorflow.trainer.TensorFlowTrainer": (
        "_make_function",
        "_maybe_symbolic_build",
        "_symbolic_build",
    ),
    "keras.src.layers.layer.Layer": ("_flatten_layers",),
    "keras.src.backend.tensorflow.trainer.TFEpochIterator": (
        "_enumerate_iterator",
        "_get_iterator",
    ),
    "keras.src.trainers.data_adapters.tf_dataset_adapter": ("TFDatasetAdapter",),
    "keras.src.backend.tensorflow.optimizer.TFOptimizer": ("_all_reduce_sum_gradients",),
    "keras.src.losses.loss": ("unscale_loss_for_distribution",),
    "keras.src.trainers.trainer": ("model_supports_jit",),
    "tensorflow.python.data.ops": ("multi_device_iterator_ops",),
    "tensorflow.python.data.ops.multi_device_iterator_ops": ("_create_device_dataset",),
}
CROSSENTROPIES = ("crossentropy", "ce")
# The same, for what only instances have.
INSTANCE_ATTRIBUTES = {
    "model": ("_compile_loss", "_distribute_strategy", "_loss_tracker"),
    "compile_loss": ("_user_loss",),
    "layer": ("_seed_generators",),
    "optimizer": (
        "_distribution_strategy",
        "_iterations",
        "_trainable_variables",
        "_model_variables_moving_average",
    ),
    "epoch_iterator": ("_distributed_dataset", "data_adapter", "steps_per_epoch"),
}


class StrategyModel(keras.Model):
    """A model whose steps Keras runs as they have to be run under a tf.distribute strategy."""

    _steps_behind = 0  # of the first epoch of `fit`

    @property
    def strategy(self):
        """The strategy in whose scope the model was made, or None."""
        return self._distribute_strategy

    def all_layers(self):
        """The layers, those within other layers included."""
        return self._flatten_layers(include_self=False)

    def computes_in(self, dtype):
        """Whether any layer does."""
        return any(layer.compute_dtype == dtype for layer in self.all_layers())

    def update_loss(self, loss, count):
        """Gives the mean loss of `count` examples to the loss that `fit` reports."""
        self._loss_tracker.update_state(unscale_loss_for_distribution(loss), sample_weight=count)

    @property
    def supports_xla(self):
        """Whether Keras lets XLA compile the model: some layers of preprocessing cannot be."""
        return model_supports_jit(self)

    def check_losses(self):
        """Lets a loss that gives one value for all of its images say so, when it is called.

        Keras would take the sum of these values over the replicas.
        """
        if self._compile_loss is not None:
            losses = self._compile_loss._user_loss
            self._compile_loss._user_loss = keras.tree.map_structure(_of_each_image, losses)

    def share_out(self):
        """Takes from Keras what it does wrong under the model's strategy.

        The optimizer takes gradients as they are, since they come to it summed over the replicas,
        and each replica has random numbers of its own in all layers with a `SeedGenerator`.
        """
        for optimizer in inner_optimizers(self.optimizer):
            optimizer._all_reduce_sum_gradients = list
        for layer in self._flatten_layers():
            for generator in layer._seed_generators:
                if not hasattr(generator.next, "by_replica"):
                    generator.next = _next_by_replica(generator.next)

    def _maybe_symbolic_build(self, iterator=None, data_batch=None):
        if iterator is not None:
            _untune(iterator)
        # Keras averages the batch over the replicas here, which fails where its parts differ in
        # size, and under MultiWorkerMirroredStrategy altogether.
        if self.strategy is not None and iterator is not None:
            iterator.reset()  # that of validation may have come to its end before
            _, _, batches = next(iterator._enumerate_iterator())
            data_batch = keras.tree.map_structure(
                lambda value: self.strategy.experimental_local_results(value)[0], next(batches)
            )
        if self.strategy is not None:
            with self.strategy.scope():
                self._symbolic_build(data_batch=data_batch)
        if self._steps_behind:
            _skip_steps(iterator, self._steps_behind)
            self._steps_behind = 0

    def _make_function(self, step_function):
        if self.strategy is None:
            return super()._make_function(step_function)

        def one_step(data):
            return self._mean_over_replicas(self.strategy.run(step_function, args=(data,)))

        def more_steps(iterator, logs):
            def body(step, _, logs):
                batch = iterator.get_next_as_optional()
                logs = tf.cond(batch.has_value(), lambda: one_step(batch.get_value()), lambda: logs)
                return step + 1, batch.has_value(), logs

            return tf.while_loop(
                lambda step, more, _: more & (step < self.steps_per_execution),
                body,
                (tf.constant(1), tf.constant(True), logs),
            )[2]

        functions = {}

        def compiled(function, *signature):
            if self.run_eagerly:
                return function
            key = function, repr(signature)
            if key not in functions:
                options = {"input_signature": signature} if signature else {}
                functions[key] = tf.function(function, autograph=False, **options)
            return functions[key]

        def function(iterator):
            if not isinstance(iterator, tf.distribute.DistributedIterator):
                # Of train_on_batch and test_on_batch: every replica gets all rows.
                if step_function == self.train_step and self.strategy.num_replicas_in_sync > 1:
                    raise ValueError(
                        "Under a strategy of several replicas, `train_on_batch` would train each "
                        "of them on the whole batch: use `fit`. Received: "
                        f"{self.strategy.num_replicas_in_sync} replicas."
                    )
                return compiled(one_step)(next(iterator))
            # The batch is asked for outside of the step, of which a part would run without it;
            # the signature says whether all batches have one size.
            step = compiled(one_step, iterator.element_spec)
            logs = step(next(iterator))
            if step_function == self.train_step and self.steps_per_execution > 1:
                return compiled(more_steps)(iterator, logs)
            for _ in range(1, self.steps_per_execution):
                try:
                    logs = step(next(iterator))
                except (StopIteration, tf.errors.OutOfRangeError):
                    break
            return logs

        return function

    def _mean_over_replicas(self, logs):
        values = tf.nest.flatten(logs)
        if self.strategy.num_replicas_in_sync > 1:
            # One vector: one reduction over the network for all.
            flat = self.strategy.run(
                lambda *values: tf.concat([tf.reshape(_float(v), [-1]) for v in values], axis=0),
                args=values,
            )
            shapes = [self.strategy.experimental_local_results(v)[0].shape for v in values]
            parts = tf.split(
                self.strategy.reduce("MEAN", flat, axis=None), [s.num_elements() for s in shapes]
            )
            values = [tf.reshape(part, s) for part, s in zip(parts, shapes, strict=True)]
        return tf.nest.pack_sequence_as(logs, values)


def inner_optimizers(optimizer):
    """An optimizer, or what a loss scale or a `MultiOptimizer` is wrapped around."""
    optimizer = getattr(optimizer, "inner_optimizer", optimizer)
    return list(getattr(optimizer, "optimizers", [optimizer]))


def batches_seen(optimizer):
    """How many batches an optimizer has taken; its `iterations` counts the updates."""
    return getattr(optimizer, "inner_optimizer", optimizer)._iterations


def creation_strategy(optimizer):
    """The strategy in whose scope an optimizer was made."""
    return optimizer._distribution_strategy


def weight_averages(optimizer):
    """The (weight, moving average) pairs of an optimizer; none without `use_ema`."""
    return [
        pair
        for inner in inner_optimizers(optimizer)
        if inner.use_ema and inner.built
        for pair in zip(
            inner._trainable_variables, inner._model_variables_moving_average, strict=True
        )
    ]


def _float(value):
    return tf.cast(value, tf.float32)


def _of_each_image(loss):
    """A loss as `compile` takes it, an error where its values are not of one image each.

    One with a `__call__` of its own stays as it is.
    """
    if loss is None or loss in CROSSENTROPIES:  # which Keras chooses by the shapes
        return loss
    loss = keras.losses.get(loss)
    if not isinstance(loss, keras.losses.Loss):
        name = getattr(loss, "__name__", type(loss).__name__)
        return functools.wraps(loss)(functools.partial(_values_of_each_image, loss, name))
    has_own_call = type(loss).__call__ is not keras.losses.Loss.__call__
    return loss if has_own_call else _LossOfEachImage(loss)


class _LossOfEachImage(keras.losses.Loss):
    def __init__(self, loss):
        super().__init__(loss.name, loss.reduction, loss.dtype)
        self.loss = loss

    def call(self, y_true, y_pred):
        return _values_of_each_image(self.loss.call, self.name, y_true, y_pred)


def _values_of_each_image(function, name, y_true, y_pred):
    values = function(y_true, y_pred)
    if len(values.shape) == 0:
        raise ValueError(
            "Under a strategy, a loss must give a value for each image, of shape (B,): of means "
            f"over a replica's images, Keras would take the sum. Received: {name!r}, which gives "
            "a scalar."
        )
    return values


def _next_by_replica(stock):
    def next_by_replica(ordered=True):
        seed = stock(ordered=ordered)
        replica = tf.distribute.get_replica_context()
        if replica is None:  # outside of a step
            return seed
        index = tf.cast(replica.replica_id_in_sync_group, seed.dtype)
        return seed + tf.stack([index * 7919, tf.zeros((), seed.dtype)])

    next_by_replica.by_replica = True
    return next_by_replica


def _untune(epoch_iterator):
    """Applies `untuned` to what the user did not make.

    Under a strategy that is what each replica reads from, without one what Keras makes of arrays
    or a generator.
    """
    dataset = epoch_iterator._distributed_dataset
    if isinstance(dataset, tf.distribute.DistributedDataset):
        epoch_iterator._get_iterator = functools.partial(_untuned_iterator, dataset)
    is_of_keras = not isinstance(epoch_iterator.data_adapter, TFDatasetAdapter)
    # The iterator of validation comes again in each epoch.
    if (
        is_of_keras
        and isinstance(dataset, tf.data.Dataset)
        and dataset.options().autotune.enabled is None
    ):
        epoch_iterator._distributed_dataset = untuned(dataset)


def _untuned_iterator(distributed_dataset):
    """An iterator whose datasets on the replicas' devices, made by TensorFlow, are `untuned`."""
    create = multi_device_iterator_ops._create_device_dataset
    multi_device_iterator_ops._create_device_dataset = lambda *args: untuned(create(*args))
    try:
        return iter(distributed_dataset)
    finally:
        multi_device_iterator_ops._create_device_dataset = create


def _skip_steps(epoch_iterator, steps):
    """Lets the first epoch of `fit` begin at a step other than 0, and end where it always does."""
    whole_epoch = epoch_iterator._enumerate_iterator
    length = epoch_iterator.steps_per_epoch

    def rest_of_epoch():
        epoch_iterator._enumerate_iterator = whole_epoch
        epoch_iterator.steps_per_epoch = length - steps
        for begin, end, batches in whole_epoch():
            yield begin + steps, end + steps, batches
        epoch_iterator.steps_per_epoch = length

    epoch_iterator._enumerate_iterator = rest_of_epoch
