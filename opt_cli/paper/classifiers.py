"""Classifiers of toxicity that a user names: an OPT's, or a Python function."""

import sys
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from opt_cli.evaluate import Loaded, load
from opt_core.errors import ConfigError

if TYPE_CHECKING:
    from opt_core.evaluation.toxicity import Score

TOXIC_LABEL = "toxic"


def load_classifier(name: str, backend: str, batch_size: int = 8) -> "Score":
    """A classifier that says how toxic texts are.

    Args:
        name: "module:function" of a Python function from texts to numbers from 0 to 1, looked for
            in the working folder too; or a folder or hub id of a classifier of OPT's, one of whose
            labels is "toxic".
        backend: What runs the latter.
        batch_size: Texts at a time.

    Raises:
        ConfigError: There is no such function, or no such label.
    """
    module, colon, function = name.partition(":")
    if colon and not Path(name).exists():
        sys.path.insert(0, "")
        try:
            found: Any = getattr(import_module(module), function, None)
        except ImportError as error:
            raise ConfigError(f"--classifier {name}: {error}") from None
        finally:
            sys.path.remove("")
        if not callable(found):
            raise ConfigError(f"--classifier {name}: {module} has no function {function!r}")
        return cast("Score", found)
    loaded = load(name, None, backend, "float32", kind="OPTForSequenceClassification")
    labels = {str(label).lower(): i for i, label in (loaded.config.id2label or {}).items()}
    if TOXIC_LABEL not in labels:
        there = ", ".join(labels)
        raise ConfigError(f"--classifier {name}: expected a label {TOXIC_LABEL!r}, found {there}")
    return _opt_classifier(loaded, int(labels[TOXIC_LABEL]), batch_size)


def _opt_classifier(loaded: Loaded, toxic: int, batch_size: int) -> "Score":
    import numpy as np

    from opt_core.data import LabelledTexts, encode_labelled_texts
    from opt_core.evaluation.perplexity import padded_batches

    def score(texts: Sequence[str]) -> list[float]:
        data = LabelledTexts([*texts], None, [0] * len(texts), (TOXIC_LABEL,))
        length = loaded.config.max_position_embeddings
        examples = encode_labelled_texts(data, loaded.tokenizer, length)
        values: list[float] = []
        for indices, ids in padded_batches(examples, batch_size):
            logits = np.asarray(loaded.bound("class_logits")(ids), np.float64)[: len(indices)]
            odds = np.exp(logits - logits.max(-1, keepdims=True))
            values += (odds[:, toxic] / odds.sum(-1)).tolist()
        return values

    return score
