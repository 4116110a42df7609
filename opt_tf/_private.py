"""Everything undocumented of Keras and TensorFlow that this backend uses; the rest imports it here.

All of it was seen in Keras 3.15 and TensorFlow 2.21. Each entry says what happens without it.

Not here, as classes of ours must carry them: `__tf_flatten__` and `__tf_unflatten__`, by which
TensorFlow 2.21 takes caches and outputs apart for tf.function. Without them tf.function would
refuse both; there is no other way to the same.
"""

from typing import Any

import keras
import optree
import tensorflow as tf

from opt_core.errors import ConfigError, OPTError

# Keras wraps what a layer raises in several lines about its arguments, unless it finds this mark:
# our messages say in one line what is wrong. Without it they stand within those lines.
OPTError._keras_call_info_injected = True  # type: ignore[attr-defined]


def keep_inputs(model: keras.Model) -> None:
    """Has Keras leave a model's inputs as they are: they are ours to convert.

    Without it Keras casts NumPy's floats to the type the model computes in before we see them:
    in half precision a regressor's labels lose digits.
    """
    model._convert_input_args = False


def register_pytree(cls: Any) -> None:
    """Lets outputs through Keras' fit and predict, which flatten what they find in this namespace.

    Keras' way in, `keras.tree`, only uses what is registered. Without optree Keras flattens them as
    TensorFlow does, which takes them for the mappings they are.
    """

    def flatten(output: Any) -> tuple[Any, Any]:
        return tuple(output.values()), tuple(output)

    unflatten: Any = lambda names, values: cls(zip(names, values, strict=True))  # noqa: E731
    optree.register_pytree_node(
        cls,
        flatten,
        unflatten,
        namespace="keras",
    )


def sublayers(layer: keras.layers.Layer) -> list[keras.layers.Layer]:
    """A layer and all within it; without Keras' own list they are found among the attributes."""
    if hasattr(layer, "_flatten_layers"):
        return list(layer._flatten_layers())
    found: dict[int, Any] = {}
    todo: list[Any] = [layer]
    while todo:
        part = todo.pop()
        if isinstance(part, list | tuple):
            todo.extend(part)
        elif isinstance(part, keras.layers.Layer) and id(part) not in found:
            found[id(part)] = part
            todo.extend(vars(part).values())
    return list(found.values())


def replace_layer(parent: Any, name: str, new: keras.layers.Layer) -> None:
    """Puts a layer in the place of another, also in a built layer, as Keras' own LoRA does.

    Raises:
        ConfigError: This Keras keeps its layers otherwise. There is no other way: a layer that
            was put there past its tracker would be neither trained nor saved.
    """
    tracker = getattr(parent, "_tracker", None)
    if tracker is None:
        raise ConfigError(
            f"{name}: adapters and quantize need Layer._tracker of Keras 3.15, "
            f"which Keras {keras.__version__} lacks"
        )
    was_locked = tracker.locked
    tracker.unlock()
    tracker.untrack(getattr(parent, name))
    setattr(parent, name, new)
    if was_locked:
        tracker.lock()


def unlock(model: Any) -> None:
    """Lets a built model have more layers; without this Keras refuses them in its own words."""
    tracker = getattr(model, "_tracker", None)
    if tracker is not None:
        tracker.unlock()


def has_compiled_loss(model: keras.Model) -> bool:
    """Whether `compile` was given a loss; without the attribute, its settings are written out."""
    if hasattr(model, "_compile_loss"):
        return model._compile_loss is not None
    with tf.init_scope():  # it reads numbers, also while a program is traced
        settings: Any = model.get_compile_config() or {}
    return settings.get("loss") is not None


def forget_compilation(model: keras.Model) -> None:
    """Drops the loss and metrics of an earlier `compile`.

    Without it Keras keeps them where the next one gives none.
    """
    model._compile_loss = model._compile_metrics = None


def moments(optimizer: Any, variable: Any) -> tuple[Any, Any]:
    """AdamW's running means of a variable's gradient and of its square.

    Without Keras' lists they are found among the optimizer's variables, by what their names end in
    and by their order.

    Args:
        optimizer: Of this package: its `trained` gives the variables it was built for.
        variable: One of them, or what TensorFlow holds for it.
    """
    try:
        index = optimizer._get_variable_index(variable)
        return optimizer._momentums[index], optimizer._velocities[index]
    except AttributeError:
        trained = enumerate(optimizer.trained())
        index = next(i for i, v in trained if variable is v or variable is v.value)
        ends = ("_momentum", "_velocity")
        mean, square = ([v for v in optimizer.variables if v.path.endswith(end)] for end in ends)
        return mean[index], square[index]
