"""The processes that train one model together, and what they have to agree on."""

import contextlib
import dataclasses
import json

import numpy as np
import tensorflow as tf

from keras_vit.training.cluster import build_strategy, resolve_cluster


@dataclasses.dataclass(frozen=True)
class Workers:
    """This process among those that train one model.

    Args:
        strategy: What spans them and their devices; None for one device.
        is_chief: Whether this process writes files and speaks.
    """

    strategy: tf.distribute.Strategy | None = None
    is_chief: bool = True

    @property
    def several(self):
        """Whether there are other processes, or might be."""
        return isinstance(self.strategy, tf.distribute.MultiWorkerMirroredStrategy)

    @property
    def replicas(self):
        """The devices of all workers."""
        return self.strategy.num_replicas_in_sync if self.strategy else 1

    def scope(self):
        """The context in which models and optimizers are made."""
        return self.strategy.scope() if self.strategy else contextlib.nullcontext()

    def distribute(self, batches, batch_size, drop_remainder):
        """Batches for `fit` whose parts go to the replicas in the order of their rows.

        Args:
            batches: Function from a shard `(i, n)` to a `tf.data.Dataset` of the i-th of n equal
                parts of every global batch.
            batch_size: Images of a global batch.
            drop_remainder: Whether all batches are whole, and without end.

        Returns:
            A dataset that `DistributedModel` takes.
        """
        if self.strategy is None:
            return batches((0, 1))

        def of_worker(context):
            part = batches((context.input_pipeline_id, context.num_input_pipelines))
            if context.num_input_pipelines != self.replicas:
                part = part.rebatch(batch_size // self.replicas, drop_remainder=drop_remainder)
            if drop_remainder:  # without end: no worker has to ask the others if they have more
                endless = tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY)
                part = part.apply(endless)
            return part

        return self.strategy.distribute_datasets_from_function(of_worker)

    def from_chief(self, value):
        """The chief's array in every worker; the others pass one of the same shape and dtype."""
        if not self.several:
            return value
        return self._sum(lambda replica: value if replica == 0 else np.zeros_like(value))

    def any(self, value):
        """Whether any worker's bool is True, in every worker; all of them have to ask."""
        if not self.several:
            return value
        return bool(self._sum(lambda _: np.int32(value)) > 0)

    def _sum(self, of_replica):
        """The sum over all replicas of an array that a function has for each of this worker's."""

        def value(context):
            return tf.constant(of_replica(context.replica_id_in_sync_group))

        with self.strategy.scope():
            values = self.strategy.experimental_distribute_values_from_function(value)
            return self.strategy.reduce("SUM", values, axis=None).numpy()

    def json_from_chief(self, value):
        """The chief's value, anything that JSON can hold, in every worker."""
        if not self.several:
            return value
        text = np.frombuffer(json.dumps(value).encode(), np.uint8).astype(np.int32)
        size = self.from_chief(np.array(len(text), np.int32))
        text = text if self.is_chief else np.zeros(size, np.int32)
        return json.loads(self.from_chief(text).astype(np.uint8).tobytes())


def join_workers(strategy):
    """Waits for the other workers, if there are any, and returns the `Workers`.

    Args:
        strategy: "auto", "one", "mirrored" or "multiworker"; see
            `keras_vit.training.cluster.build_strategy`. Must come before anything that
            TensorFlow computes in this process.

    Raises:
        ValueError: As `build_strategy` and `resolve_cluster`.
    """
    cluster = resolve_cluster() if strategy in ("auto", "multiworker") else None
    workers = Workers(build_strategy(strategy, cluster))
    if workers.several:
        return dataclasses.replace(workers, is_chief=cluster.is_chief)
    return workers
