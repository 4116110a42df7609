"""A tokenizer's results as tensors, by the framework whose name the caller gives.

Nothing is imported here before that, and nothing but what was named.
"""

import sys
from collections.abc import Callable
from importlib import import_module
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.errors import TokenizerError

# Each framework's own integers for ids, as transformers gives them.
_FRAMEWORKS = {
    "np": ("numpy", "asarray", np.int64),
    "pt": ("torch", "as_tensor", np.int64),
    "tf": ("tensorflow", "constant", np.int32),
    "jax": ("jax.numpy", "asarray", np.int32),
}


def maker(kind: Any) -> Callable[[NDArray[Any]], Any]:
    """The function that makes a framework's tensors of arrays.

    Args:
        kind: "np", "pt", "tf" or "jax", or an enumeration's member of that value.

    Raises:
        TokenizerError: Another one, or one that is not installed.
    """
    name = getattr(kind, "value", kind)
    if name not in _FRAMEWORKS:
        names = ", ".join(map(repr, _FRAMEWORKS))
        raise TokenizerError(f"return_tensors: expected one of {names}, received {name!r}")
    module, function, integers = _FRAMEWORKS[name]
    try:
        make = getattr(import_module(module), function)
    except ImportError as error:
        raise TokenizerError(f"return_tensors={name!r} needs {module}: {error}") from None

    def convert(array: NDArray[Any]) -> Any:
        return make(array.astype(integers) if array.dtype.kind in "iu" else array)

    return convert


def is_symbolic(value: Any) -> bool:
    """Whether a value is a TensorFlow tensor whose strings cannot be read now."""
    tensorflow = sys.modules.get("tensorflow")
    return tensorflow is not None and bool(tensorflow.is_symbolic_tensor(value))


def texts_of(value: Any) -> Any:
    """The strings of a tensor or an array of strings; anything else as it is."""
    array = value.numpy() if type(value).__module__.startswith("tensorflow") else value
    if isinstance(array, bytes) and array is not value:  # a tensor that holds one string
        return array.decode("utf-8")
    if isinstance(array, np.ndarray):
        return [x.decode("utf-8") if isinstance(x, bytes) else x for x in array.tolist()]
    return value


def in_graph(encode: Callable[[list[str]], Any], texts: Any) -> dict[str, Any]:
    """Encodes strings inside a TensorFlow graph, as `tf.data.Dataset.map` makes one.

    The texts leave the graph for Python and come back as ids: slower than ids made beforehand, and
    no part of a SavedModel.

    Args:
        encode: Makes ids and mask, int32 [B, T], of texts.
        texts: A symbolic tensor of strings: one of them, or a vector.

    Returns:
        "input_ids" and "attention_mask", [T] for one text and [B, T] for several.
    """
    tf: Any = sys.modules["tensorflow"]  # where else would the tensor be from?

    def run(array: Any) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        made = encode([text.decode("utf-8") for text in np.atleast_1d(array)])
        ids, mask = made["input_ids"], made["attention_mask"]
        return (ids[0], mask[0]) if np.ndim(array) == 0 else (ids, mask)

    if texts.dtype != tf.string or texts.shape.rank not in (0, 1):
        raise TokenizerError(
            f"text: expected one string or a vector of them, received a {texts.dtype.name} tensor "
            f"of shape {texts.shape}"
        )
    made = tf.numpy_function(run, [texts], [tf.int32, tf.int32])
    for tensor in made:
        tensor.set_shape([*texts.shape, None])
    return dict(zip(("input_ids", "attention_mask"), made, strict=True))
