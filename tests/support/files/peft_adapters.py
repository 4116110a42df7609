"""Adapters that live PEFT makes, and what it computes with them: the independent right value.

Their values are random, as training would leave them.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from opt_core.params import Head
from tests.support.backends import CLASSES

TASKS: dict[Head, str] = {
    "none": "FEATURE_EXTRACTION",
    "causal_lm": "CAUSAL_LM",
    "sequence_classification": "SEQ_CLS",
    "question_answering": "QUESTION_ANS",
}


def make_adapter(
    base: Path,
    adapter: Path,
    ids: NDArray[Any],
    head: Head = "causal_lm",
    *,
    vocabulary: int | None = None,
    labels: int | None = None,
    half: bool = False,
    as_bin: bool = False,
    **settings: Any,
) -> NDArray[np.float32]:
    """Writes an adapter's folder and gives the logits that PEFT computes with it.

    Args:
        base: Folder of the model.
        adapter: The new folder.
        ids: The model's input.
        head: Which of transformers' classes is adapted.
        vocabulary: Size of the vocabulary that the model is given first.
        labels: Labels of a classifier.
        half: Store the adapter in bfloat16.
        as_bin: Store it as adapter_model.bin.
        **settings: Of PEFT's LoraConfig.
    """
    torch = pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(0)
        model = theirs(base, head, vocabulary, labels)
        settings = {"r": 3, "lora_alpha": 5, "target_modules": ["k_proj", "fc2"]} | settings
        model = peft.get_peft_model(model, peft.LoraConfig(task_type=TASKS[head], **settings))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                    if half:
                        parameter.copy_(parameter.bfloat16())
        logits = theirs_logits(model.eval(), ids)
        if half:
            model = model.bfloat16()
        model.save_pretrained(adapter, safe_serialization=not as_bin)
    return logits


def theirs(base: Path, head: Head, vocabulary: int | None = None, labels: int | None = None) -> Any:
    """transformers' model of a folder."""
    transformers = pytest.importorskip("transformers")
    options = {} if labels is None else {"num_labels": labels}
    model = getattr(transformers, CLASSES[head]).from_pretrained(base, dtype="float32", **options)
    if vocabulary is not None:
        model.resize_token_embeddings(vocabulary)
    return model.eval()


def theirs_logits(model: Any, ids: NDArray[Any]) -> NDArray[np.float32]:
    """The first output of one of their models."""
    torch = pytest.importorskip("torch")
    with torch.no_grad():
        return model(input_ids=torch.tensor(ids), return_dict=False)[0].numpy()


def ours_logits(backend: Any, model: Any, ids: NDArray[Any]) -> NDArray[np.float32]:
    """The same output of one of ours."""
    out = backend.run(model, input_ids=ids)
    names = {"none": "last_hidden_state", "question_answering": "start_logits"}
    return getattr(out, names.get(model.head, "logits"))
