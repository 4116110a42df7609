"""Advice for code that TensorFlow's models of `transformers` ran by Keras 2."""

from collections.abc import Mapping
from os import PathLike

from opt_core.errors import ConfigError

REFUSED: Mapping[str, str] = {
    "to": "make the model within tf.device(...), and of the type dtype=; transformers' pipelines "
    "take the models of opt_torch",
    "cuda": "make the model within tf.device(...)",
    "half": 'load it with dtype="float16"',
    "eval": "a call computes without dropout unless it has training=True",
}
"""Attributes that there are not."""


def check_weights_name(method: str, path: str | PathLike[str]) -> None:
    """Refuses the name of a file of weights that Keras 3 would refuse in its own words.

    Args:
        method: The method that was called.
        path: The file.

    Raises:
        ConfigError: It does not end in ".weights.h5" (or ".weights.json", Keras' own index).
    """
    if not str(path).endswith((".weights.h5", ".weights.json")):
        raise ConfigError(
            f"{method}: Keras 3 has weights in files named .weights.h5, received {str(path)!r}; "
            "name it so, or use save_pretrained and from_pretrained, which reads tf_model.h5 too"
        )
