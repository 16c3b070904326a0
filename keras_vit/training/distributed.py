"""`DistributedModel`: `model.fit` that gives the same model on one replica and on many."""

import contextlib
import math
import pathlib
import warnings

import keras
import tensorflow as tf

from keras_vit.config import check_positive_int
from keras_vit.layers import drawing_by
from keras_vit.training.keras_internals import (
    StrategyModel,
    batches_seen,
    creation_strategy,
    inner_optimizers,
)

PHILOX = 1  # TensorFlow's number of the generator, which counts in blocks of four values
BLOCK = 4
REDUCTIONS = ("sum_over_batch_size", "mean")  # of a loss: two names of one
CPUINFO = pathlib.Path("/proc/cpuinfo")


@keras.saving.register_keras_serializable(package="keras_vit")
class DistributedModel(StrategyModel):
    """A `keras.Model` whose `fit` gives the same training on 1, 2 or 64 replicas.

    w <- w - update(clip(sum over the replicas of their gradients)). What Keras does on each
    replica alone is done for the global batch, under no strategy, MirroredStrategy and
    MultiWorkerMirroredStrategy alike:

    - `clipnorm`, `clipvalue` and `global_clipnorm` of the optimizer clip the summed gradient, and
      the loss scale of float16 looks at it;
    - the Dropout and DropPath of the layers of `keras_vit` draw their masks by the image's place
      in the global batch and the optimizer's step, so that they do not depend on the number of
      replicas and micro-batches; other random layers draw by replica;
    - every image of a batch that does not divide into equal parts counts the same;
    - XLA may compile the step of each replica, and `steps_per_execution` works.

    Example:

        with tf.distribute.MirroredStrategy().scope():
            vit = keras_vit.build_vit("S/16", drop_path=0.1, normalization="imagenet")
            model = DistributedModel(vit.input, vit.output)
            loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            model.compile("adamw", loss, micro_batches=4)
        model.fit(dataset)  # images (B, 224, 224, 3) in [0, 255], and their classes (B,)

    Args:
        *args: As of `keras.Model`: inputs and outputs.
        **kwargs: As of `keras.Model`.

    Source: keras#20582, #20585, #19005 and #18145 are what it mends. Random numbers by
    counter: "Parallel random numbers: as easy as 1, 2, 3" (Salmon et al., SC 2011).
    """

    # Of a model that is not compiled, but may predict.
    micro_batches = 1
    mixing = None
    seed = 0
    xla = False
    jit_asked = False

    def compile(
        self,
        optimizer="rmsprop",
        loss=None,
        *,
        micro_batches=1,
        mixing=None,
        seed=0,
        jit_compile="auto",
        run_eagerly=False,
        **kwargs,
    ):
        """As `keras.Model.compile`, in the scope of the strategy.

        Args:
            optimizer: An optimizer or its name.
            loss: As in Keras; a mean over the batch of a value for each image.
            micro_batches: Parts k >= 1 in which a replica goes through its part of a batch, one
                after the other, before the one update: less memory for the same result. A last
                batch that they do not divide goes in more and smaller parts.
            mixing: `keras_vit.training.Mixing` or None; it blends pairs within each replica's part
                of a batch, and goes with no sample or class weights.
            seed: Seed of the mixing, an int.
            jit_compile: Whether XLA compiles the step; "auto": yes, also on CPUs and under a
                strategy, where Keras does not; no in bfloat16 on a CPU with AVX512-BF16 or
                AMX-BF16, whose instructions XLA does not use. Never with layers that XLA cannot
                compile, such as `keras.layers.RandomRotation`.
            run_eagerly: As in Keras.
            **kwargs: As in Keras.

        Raises:
            ValueError: `micro_batches` is not a positive int, `jit_compile` not a bool or "auto",
                `keras.distribution` is set, or the loss is no mean over the batch and there are
                micro-batches or a strategy. Under a strategy, the optimizer was made outside of
                its scope, has `gradient_accumulation_steps` or `ema_overwrite_frequency`, or is a
                `MultiOptimizer` of a function. On several replicas, a BatchNormalization is not
                `synchronized`; and, from `fit` on, the loss gives one value for all images.
            TypeError: `mixing` cannot be called, or `seed` is not an int.

        Warns:
            UserWarning: `jit_compile` is True, and XLA cannot compile a layer.
        """
        check_positive_int("micro_batches", micro_batches)
        if not isinstance(seed, int):
            raise TypeError(f"`seed` must be an int. Received: seed={seed!r}.")
        if mixing is not None and not callable(mixing):
            raise TypeError(f"`mixing` must be a Mixing or None. Received: mixing={mixing!r}.")
        if jit_compile not in (True, False, "auto"):
            raise ValueError(
                "`jit_compile` must be True, False or 'auto'. "
                f"Received: jit_compile={jit_compile!r}."
            )
        if keras.distribution.distribution() is not None:
            raise ValueError(
                "keras.distribution distributes nothing on the TensorFlow backend: make the model "
                "in the scope of a tf.distribute.Strategy instead. Received: "
                f"keras.distribution.distribution()={keras.distribution.distribution()!r}."
            )
        self.micro_batches = micro_batches
        self.mixing = mixing
        self.seed = seed
        self.jit_asked = jit_compile
        if jit_compile == "auto":
            jit_compile = _is_faster_with_xla(self)
        self.xla = bool(jit_compile) and not run_eagerly and self.supports_xla
        if self.jit_asked is True and not self.supports_xla:
            warnings.warn(
                "The model has layers that XLA cannot compile: its steps run without it. "
                "Received: jit_compile=True.",
                stacklevel=2,
            )
        # Under a strategy, a replica's part of the step is compiled here instead of the whole.
        whole_step = self.xla and self.strategy is None
        with self.strategy.scope() if self.strategy else contextlib.nullcontext():
            super().compile(
                optimizer, loss, jit_compile=whole_step, run_eagerly=run_eagerly, **kwargs
            )
        if micro_batches > 1 or self.strategy is not None:
            for one in keras.tree.flatten(loss):
                _check_reduction(one)
        if self.strategy is not None:
            optimizers = inner_optimizers(self.optimizer)
            if not optimizers:
                raise ValueError(
                    "Under a strategy, the optimizers of a MultiOptimizer must be in its "
                    "OptimizerMap, where they are known before training begins. "
                    f"Received: {self.optimizer!r} of a function."
                )
            for inner in optimizers:
                _check_optimizer(inner, self.strategy)
            self.share_out()
            if self.strategy.num_replicas_in_sync > 1:
                self.check_losses()
                for layer in self.all_layers():
                    _check_norm(layer)

    def get_compile_config(self):
        config = super().get_compile_config()
        if config:
            # With its loss scale, which Keras makes anew where the policy is of float16 alone.
            config["optimizer"] = keras.saving.serialize_keras_object(self.optimizer)
            config["jit_compile"] = self.jit_asked
            config["micro_batches"] = self.micro_batches
            config["seed"] = self.seed
            config["mixing"] = keras.saving.serialize_keras_object(self.mixing)
        return config

    def compile_from_config(self, config):
        self.compile(**keras.saving.deserialize_keras_object(config))
        self.optimizer.build(self.trainable_variables)

    def fit(self, *args, initial_step=0, **kwargs):
        """As `keras.Model.fit`.

        At its end, an epoch of stock Keras may wait up to a minute for a thread of tf.data that
        tunes the dataset, and under a strategy for one more of each replica. Here, and in
        `evaluate`, replicas have none, nor have arrays and generators without a strategy. For
        other data, `keras_vit.data.pipeline.untuned` gives a `tf.data.Dataset` without it.

        Args:
            *args: As in Keras.
            initial_step: Steps of the first epoch that lie behind already, in
                [0, steps_per_epoch): `x` begins after them, and the epoch is so much shorter.
            **kwargs: As in Keras; `initial_step` needs `steps_per_epoch`.

        Returns:
            The `History`.

        Raises:
            ValueError: `initial_step` is out of its range.
        """
        steps = kwargs.get("steps_per_epoch")
        if initial_step and not 0 < initial_step < (steps or 0):
            raise ValueError(
                "`initial_step` must lie in [0, steps_per_epoch). Received: "
                f"initial_step={initial_step!r}, steps_per_epoch={steps!r}."
            )
        self._steps_behind = initial_step
        return super().fit(*args, **kwargs)

    def train_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        step = tf.cast(batches_seen(self.optimizer), tf.int64)
        first_row, share = _place_in_batch(x)
        y, y_pred, loss, gradients = self._compiled(self._mean_gradients)(
            x, y, sample_weight, step, first_row
        )
        self.update_loss(loss, _count(x))
        gradients = _sum_over_replicas(gradients, share)
        self.optimizer.apply_gradients(zip(gradients, self.trainable_variables, strict=True))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def test_step(self, data):
        x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(data)
        y_pred, loss = self._compiled(self._infer_with_loss)(x, y, sample_weight)
        self.update_loss(loss, _count(x))
        return self.compute_metrics(x, y, y_pred, sample_weight=sample_weight)

    def predict_step(self, data):
        x, _, _ = keras.utils.unpack_x_y_sample_weight(data)
        return self._compiled(self._infer)(x)

    def predict_on_batch(self, x):
        """As `keras.Model.predict_on_batch`; Keras gives a strategy's rows once per replica."""
        rows = len(keras.tree.flatten(x)[0])
        outputs = super().predict_on_batch(x)
        return keras.tree.map_structure(lambda values: values[:rows], outputs)

    def _infer(self, x):
        return self(x, training=False)

    def _infer_with_loss(self, x, y, sample_weight):
        y_pred = self._infer(x)  # whose layers may add to the loss
        return y_pred, self.compute_loss(x, y, y_pred, sample_weight, training=False)

    def _compiled(self, function):
        """A part of the step, compiled for one replica and its variables."""
        if self.strategy is None or not self.xla:
            return function
        return tf.function(function, jit_compile=True, reduce_retracing=True, autograph=False)

    def _mean_gradients(self, x, y, sample_weight, step, first_row):
        """The labels, outputs, loss and gradients of a replica's part of the batch."""
        if self.mixing is not None:
            if sample_weight is not None:
                raise ValueError(
                    "`mixing` blends images of different weights, so that it goes with no "
                    "`sample_weight` and no `class_weight`. Received: sample weights of shape "
                    f"{sample_weight.shape}."
                )
            x, y = self.mixing(x, y, tf.stack([tf.constant(self.seed, tf.int64), step]))
        if self.micro_batches == 1:
            return y, *self._gradients(x, y, sample_weight, step, first_row)
        return y, *self._accumulated_gradients(x, y, sample_weight, step, first_row)

    def _gradients(self, x, y, sample_weight, step, first_row):
        with tf.GradientTape() as tape:
            with drawing_by(_draws(step, first_row)):
                y_pred = self(x, training=True)
            loss = self.compute_loss(x, y, y_pred, sample_weight, training=True)
            scaled = self.optimizer.scale_loss(loss)
        variables = [variable.value for variable in self.trainable_variables]
        return y_pred, loss, tape.gradient(scaled, variables)

    def _accumulated_gradients(self, x, y, sample_weight, step, first_row):
        """The outputs of all micro-batches, and the means of their losses and gradients."""
        k = _number_of_parts(x, self.micro_batches)
        parts = _map(lambda values: _split(values, k), (x, y, sample_weight))  # (k, rows, ...)
        rows = _count(_map(lambda values: values[0], parts[0]))
        seen = {}  # of the first micro-batch: the structure of its outputs, which gradients it has

        def body(index, outputs, loss, sums):
            part = _map(lambda values: values[index], parts)
            row = index * rows
            y_pred, part_loss, gradients = self._gradients(
                *part, step, first_row + tf.cast(row, tf.int64)
            )
            seen.update(y_pred=y_pred, gradients=gradients)
            places = row + tf.range(rows)[:, None]  # none, where a replica has no image
            outputs = [
                tf.tensor_scatter_nd_update(rows_of_all, places, new)
                for rows_of_all, new in zip(outputs, keras.tree.flatten(y_pred), strict=True)
            ]
            sums = [
                total if gradient is None else total + gradient / tf.cast(k, gradient.dtype)
                for total, gradient in zip(sums, gradients, strict=True)
            ]
            loss += tf.cast(part_loss, tf.float32) / tf.cast(k, tf.float32)
            return index + 1, outputs, loss, sums

        outputs = [tf.zeros([k * rows, *output.shape[1:]], output.dtype) for output in self.outputs]
        sums = [tf.zeros(variable.shape, variable.dtype) for variable in self.trainable_variables]
        state = (tf.constant(0), outputs, tf.constant(0.0), sums)
        _, outputs, loss, sums = tf.while_loop(
            lambda index, *_: index < k, body, state, parallel_iterations=1
        )
        y_pred = keras.tree.pack_sequence_as(seen["y_pred"], outputs)
        gradients = [
            None if gradient is None else total
            for gradient, total in zip(seen["gradients"], sums, strict=True)
        ]
        return y_pred, loss, gradients


def _is_faster_with_xla(model):
    on_gpu = bool(tf.config.list_logical_devices("GPU"))
    return on_gpu or not (model.computes_in("bfloat16") and cpu_multiplies_bfloat16())


def cpu_multiplies_bfloat16():
    """Whether the CPU says that it has instructions for it; only Linux and x86 are asked."""
    flags = CPUINFO.read_text().split() if CPUINFO.exists() else ()
    return not {"avx512_bf16", "amx_bf16"}.isdisjoint(flags)


def _check_reduction(loss):
    if isinstance(loss, keras.losses.Loss) and loss.reduction not in REDUCTIONS:
        raise ValueError(
            "With micro-batches or under a strategy, a loss must be a mean over the batch: "
            f"reduction='sum_over_batch_size'. Received: {loss.name!r} with "
            f"reduction={loss.reduction!r}."
        )


def _check_norm(layer):
    if (
        isinstance(layer, keras.layers.BatchNormalization)
        and layer.trainable
        and not layer.synchronized
    ):
        raise ValueError(
            "Under a strategy, BatchNormalization must have synchronized=True, or each replica "
            "norms by the mean and the variance of its own images, and the model has those of the "
            f"first one. Received: {layer.name!r} with synchronized=False."
        )


def _check_optimizer(optimizer, strategy):
    if creation_strategy(optimizer) is not strategy:
        raise ValueError(
            "The optimizer must be made in the scope of the model's strategy. Received: "
            f"{optimizer!r}, made under {creation_strategy(optimizer)!r}."
        )
    steps = getattr(optimizer, "gradient_accumulation_steps", None)
    if steps is not None:
        raise ValueError(
            "Under a strategy, compile(micro_batches=k) accumulates gradients, with batches k "
            f"times as large. Received: an optimizer with gradient_accumulation_steps={steps}."
        )
    frequency = getattr(optimizer, "ema_overwrite_frequency", None)
    if frequency is not None:
        raise ValueError(
            "Under a strategy, the optimizer's `ema_overwrite_frequency` must be None: the weights "
            f"become their average at the end of `fit`. Received: {frequency!r}."
        )


def _draws(step, first_row):
    """What draws the masks of `keras_vit.Dropout`, for images from a row of the global batch on.

    A number depends on the layer's seed, how many masks the model drew before it, the step and the
    number's place in the whole batch: a replica begins to count where its rows do.
    """
    masks = 0

    def uniform(seed, shape):
        nonlocal masks
        masks += 1
        # Far apart, so that layers with neighbouring seeds do not draw the same; in 31 bits, since
        # XLA takes no more of a seed.
        own = (tf.cast(seed[0], tf.int64) * 7919 + masks) % (2**31 - 1)
        seed = tf.stack([own, step])
        key, counter = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
        row = math.prod(shape[1:])
        place = first_row * tf.cast(row, tf.int64)
        counter += tf.stack([tf.cast(place // BLOCK, tf.uint64), tf.zeros((), tf.uint64)])
        if isinstance(row, int) and row % BLOCK == 0:  # each row begins a block
            return _uniform(shape, key, counter)
        values = tf.reduce_prod(shape)
        offset = tf.cast(place % BLOCK, tf.int32)
        drawn = _uniform([values + BLOCK - 1], key, counter)
        return tf.reshape(tf.slice(drawn, [offset], [values]), shape)

    return uniform


def _uniform(shape, key, counter):
    """float32 in [0, 1). Of whole numbers, of which XLA draws the same as TensorFlow without it."""
    bits = tf.raw_ops.StatelessRandomUniformFullIntV2(
        shape=shape, key=key, counter=counter, alg=PHILOX, dtype=tf.uint32
    )
    return tf.cast(tf.bitwise.right_shift(bits, tf.constant(8, tf.uint32)), tf.float32) * 2**-24


def _place_in_batch(x):
    """A replica's first row in the global batch, and its part's size over the mean size."""
    replica = tf.distribute.get_replica_context()
    index, replicas = replica.replica_id_in_sync_group, replica.num_replicas_in_sync
    count = _count(x)
    if replicas == 1 or _rows_of_all(x) is not None:
        return tf.cast(index * count, tf.int64), None  # all parts have one size
    counts = replica.all_reduce("SUM", tf.one_hot(index, replicas) * tf.cast(count, tf.float32))
    first_row = tf.reduce_sum(tf.where(tf.range(replicas) < index, counts, 0))
    share = tf.cast(count, tf.float32) / tf.reduce_mean(counts)
    return tf.cast(first_row, tf.int64), share


def _sum_over_replicas(gradients, share):
    """The gradient of the mean over the global batch, from those of the means over its parts."""
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return gradients
    present = [tf.convert_to_tensor(gradient) for gradient in gradients if gradient is not None]
    if share is not None:
        # Of no image, a layer may have a gradient that is not a number.
        present = [
            tf.where(share > 0, gradient * tf.cast(share, gradient.dtype), 0)
            for gradient in present
        ]
    summed = iter(replica.all_reduce("SUM", present))
    return [None if gradient is None else next(summed) for gradient in gradients]


def _map(function, *structures):
    """`keras.tree.map_structure`, which leaves None as it is."""
    return keras.tree.map_structure(
        lambda *values: None if values[0] is None else function(*values), *structures
    )


def _rows_of_all(x):
    """The rows of every batch, or None where they may differ: run eagerly, each has its own."""
    return None if tf.executing_eagerly() else keras.tree.flatten(x)[0].shape[0]


def _count(x):
    return tf.shape(keras.tree.flatten(x)[0])[0]


def _number_of_parts(x, micro_batches):
    """How many equal parts to go through a batch in: `micro_batches`, or the next that divides it.

    Parts of one size have one loop, and their mean is that of the batch. More parts than
    `micro_batches` are slower: where all batches have the same size, that is an error.
    """
    rows = _rows_of_all(x)
    if rows is None:
        rows = tf.maximum(_count(x), 1)  # a replica may have no part in a last batch
        parts = tf.range(tf.minimum(micro_batches, rows), rows + 1)
        return tf.reduce_min(tf.where(rows % parts == 0, parts, rows))
    if rows % micro_batches:
        raise ValueError(
            "`micro_batches` must divide the images of a replica. Received: "
            f"micro_batches={micro_batches}, {rows} images."
        )
    return micro_batches


def _split(values, parts):
    """`(B, ...)` -> `(parts, B / parts, ...)`."""
    shape = tf.concat([[parts, tf.shape(values)[0] // parts], tf.shape(values)[1:]], axis=0)
    return tf.ensure_shape(tf.reshape(values, shape), (None, None, *values.shape[1:]))
