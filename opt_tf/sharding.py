"""Devices of one host that split batches: `tf.distribute`, which splits nothing else.

Keras' distribution API has no maintained form of model parallelism on TensorFlow (its DTensor layer
was never finished), so a model is whole on every device; the torch and flax backends split models.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import tensorflow as tf

from opt_core import mesh as rules
from opt_core.errors import ConfigError
from opt_core.team import Team


def make_mesh(data: int = 1, fsdp: int = 1, model: int = 1) -> tf.distribute.MirroredStrategy:
    """The first `data` devices of this host; models made in its scope are on all of them.

    Args:
        data: Ways to split the batch.
        fsdp: 1 only.
        model: 1 only.

    Raises:
        ConfigError: There are fewer devices, sizes below 1, models are to be split, or `TF_CONFIG`
            names several hosts.
    """
    sizes = rules.check_sizes(data, fsdp, model)
    if fsdp > 1 or model > 1:
        raise ConfigError(
            f"mesh: {rules.describe_sizes(sizes)}: TensorFlow splits batches only (data=N); "
            "the torch and flax backends split models"
        )
    if _hosts() > 1:
        raise ConfigError(
            "TF_CONFIG: names several hosts, and mesh is for the devices of one; Keras' fit trains "
            "on several in MultiWorkerMirroredStrategy's scope, opt-lm train with --backend torch "
            "or flax"
        )
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    found = [device.name for device in tf.config.list_logical_devices(kind)]
    count = rules.check_count(sizes, len(found), is_exact=False)
    return tf.distribute.MirroredStrategy(found[:count])


def _hosts() -> int:
    """Hosts that TensorFlow's own variable names."""
    try:
        return len(json.loads(os.environ.get("TF_CONFIG") or "{}")["cluster"]["worker"])
    except (KeyError, TypeError):
        return 1
    except ValueError as error:
        raise ConfigError(f"TF_CONFIG: not valid JSON: {error}") from None


def check_mesh(mesh: Any) -> None:
    """Refuses a mesh that is not of `make_mesh`'s kind.

    Raises:
        ConfigError: It is no `tf.distribute` strategy.
    """
    if mesh is not None and not isinstance(mesh, tf.distribute.Strategy):
        raise ConfigError(
            f"mesh: expected a tf.distribute.Strategy, received {type(mesh).__name__}"
        )


def spread_values(values: list[Any]) -> Any:
    """One value for each replica of the present strategy."""
    strategy = tf.distribute.get_strategy()
    return strategy.experimental_distribute_values_from_function(
        lambda context: values[context.replica_id_in_sync_group]
    )


def sum_replicas(values: list[Any]) -> list[Any]:
    """The sums over replicas of what each of them returned."""
    strategy, add = tf.distribute.get_strategy(), tf.distribute.ReduceOp.SUM
    return [strategy.reduce(add, value, axis=None) for value in values]


def team_of(mesh: Any) -> Team:
    """The processes that share a model: this one."""
    return Team()


def disconnect() -> None:
    """Ends the work of the processes with one another: there are no others."""


@contextmanager
def told_of_losses(team: Team) -> Iterator[None]:
    """Makes one line of what is said where another process is gone: none can be."""
    yield
