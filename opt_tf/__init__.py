"""OPT for TensorFlow, as Keras 3 models."""

import os
import sys

from opt_core.errors import ConfigError


def _choose_backend() -> None:
    """Makes Keras compute with TensorFlow, or says in one line why it cannot.

    Raises:
        ConfigError: Keras is set to another backend, or is of a version that is not supported.
    """
    chosen = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if "keras" in sys.modules or chosen == "tensorflow":
        import keras

        chosen = keras.config.backend()
        version = keras.__version__
        if not (3, 15) <= tuple(int(part) for part in version.split(".")[:2]) < (4, 0):
            raise ConfigError(f"opt_tf needs Keras >= 3.15 and < 4, found {version}")
    if chosen != "tensorflow":
        raise ConfigError(
            f"opt_tf needs Keras' tensorflow backend, but KERAS_BACKEND is {chosen!r}; "
            "set KERAS_BACKEND=tensorflow before keras is imported"
        )


_choose_backend()

from opt_core.compatibility.keras_hub_preprocessor import (  # noqa: E402
    OPTCausalLMPreprocessor,
)
from opt_tf.cache import KVCache  # noqa: E402
from opt_tf.decoder import TFOPTOutput  # noqa: E402
from opt_tf.heads import TFOPTForQuestionAnswering, TFOPTForSequenceClassification  # noqa: E402
from opt_tf.modeling import TFOPTForCausalLM, TFOPTModel, TFOPTPreTrainedModel  # noqa: E402

__all__ = [
    "KVCache",
    "OPTCausalLMPreprocessor",
    "TFOPTForCausalLM",
    "TFOPTForQuestionAnswering",
    "TFOPTForSequenceClassification",
    "TFOPTModel",
    "TFOPTOutput",
    "TFOPTPreTrainedModel",
]
