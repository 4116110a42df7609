"""The plan of a load: a checkpoint's names and shapes, compared with those of a model."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from opt_core.checkpoints.load import Checkpoint, shorten
from opt_core.checkpoints.quantized.tensor import numbers_of
from opt_core.checkpoints.report import describe_mismatch
from opt_core.checkpoints.tensors import LazyTensor, cast_array, float_dtype
from opt_core.checkpoints.wrappers import is_beside_model
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, MismatchError
from opt_core.params import HEAD_PARAMETERS, Head, ParamSpec, param_specs
from opt_core.quantization import scheme_of

_MANY_LAYERS = 1000  # listing what they lack would take long
_COMPARED_BYTES = 1 << 26
_EMBEDDING = "model.decoder.embed_tokens.weight"
_LM_HEAD = "lm_head.weight"
_TIED = {_EMBEDDING, _LM_HEAD}


@dataclass(frozen=True)
class LoadPlan:
    """A checkpoint that fits a model, ready to be loaded.

    Attributes:
        config: The configuration to build; untied if the checkpoint's head differs from its
            embedding.
        entries: Each parameter and where it lies, in the order of the modules.
        fresh: Parameters of a head the checkpoint does not have, and those of another shape there,
            for the caller to initialise.
        misshapen: Of the latter, name -> shape in the checkpoint.
        aside: Names of the checkpoint's tensors that are no part of the model.
        own: Tensors that are none of OPT's, for layers that a class of the caller's adds.
        notes: What was left aside though no head of OPT has it, one line.
    """

    config: OPTConfig
    entries: list[tuple[ParamSpec, LazyTensor]]
    fresh: list[ParamSpec]
    misshapen: dict[str, tuple[int, ...]] = field(default_factory=dict[str, tuple[int, ...]])
    aside: list[str] = field(default_factory=list[str])
    own: dict[str, LazyTensor] = field(default_factory=dict[str, LazyTensor])
    notes: tuple[str, ...] = ()

    def stream(
        self,
        dtype: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        quantize: str | None = None,
    ) -> Iterator[tuple[ParamSpec, Any]]:
        """Reads the tensors one at a time, in the order they lie in the files.

        Args:
            dtype: Type to convert to ("float32", "bfloat16", ...), or None for the stored one. A
                tensor that has it already is a view of the file (see `StoredTensor.read`).
            progress: Called after each tensor with the bytes read so far and in all.
            quantize: The scheme to keep weights by (`opt_core.quantization.scheme_of`), or None.

        Yields:
            Each parameter with its array, in the canonical (torch) layout, or its
            `QuantizedTensor`.

        Raises:
            CheckpointError: A value is out of the new type's range, or cannot be quantised.
        """
        target = None if dtype is None else float_dtype(dtype)
        total, done = sum(stored.nbytes for _, stored in self.entries), 0
        for spec, stored in sorted(self.entries, key=lambda e: (str(e[1].file), e[1].offset)):
            if scheme := scheme_of(spec, quantize):
                yield spec, numbers_of(spec.name, stored, scheme)
            else:
                yield spec, cast_array(spec.name, stored.read(), target or stored.dtype)
            done += stored.nbytes
            if progress is not None:
                progress(done, total)


def plan_load(
    checkpoint: Checkpoint,
    config: OPTConfig,
    head: Head,
    skip_misshapen: bool = False,
    has_own_layers: bool = False,
) -> LoadPlan:
    """Compares a checkpoint with a model, by names and shapes, and says how to load it.

    Tensors of another head are left out. A classification or question-answering head that is absent
    as a whole is listed in `fresh`. A language-model head that equals the embedding is left out; if
    it differs it is honoured, by a configuration that does not tie them. If a tied head is there
    alone, it is the embedding too. Tensors beside the model, under names that OPT has nowhere, are
    left aside with a note.

    Args:
        checkpoint: From `open_checkpoint`.
        config: The model's configuration.
        head: The head that is to sit on the decoder.
        skip_misshapen: Whether tensors of another shape are left out, their parameters `fresh`.
        has_own_layers: Whether the model has layers that OPT lacks: what is unexpected is `own`.

    Raises:
        CheckpointError: Tensors are missing, unexpected, or of another shape; all are listed.
    """
    if config.num_hidden_layers > max(_MANY_LAYERS, len(checkpoint.tensors)):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json says {config.num_hidden_layers} layers, the weights "
            f"are {len(checkpoint.tensors)} tensors"
        )
    stored = dict(checkpoint.tensors)
    if config.tie_word_embeddings and _EMBEDDING not in stored and _LM_HEAD in stored:
        stored[_EMBEDDING] = stored.pop(_LM_HEAD)  # as safetensors' save_model keeps a tied pair
    tensors = {name: tensor for name, tensor in stored.items() if _belongs(name, head)}
    if head == "causal_lm" and config.tie_word_embeddings and {*tensors} >= _TIED:
        if _equal(tensors[_LM_HEAD], tensors[_EMBEDDING]):
            del tensors[_LM_HEAD]
        else:
            config = config.replace(tie_word_embeddings=False)
    specs = param_specs(config, head)
    fresh: list[ParamSpec] = []
    if head in ("sequence_classification", "question_answering"):
        fresh = [spec for spec in specs if spec.name in HEAD_PARAMETERS[head]]
        if any(spec.name in tensors for spec in fresh):
            fresh = []
    misshapen: dict[str, tuple[int, ...]] = {}
    if skip_misshapen:
        given = [spec for spec in specs if spec.name in tensors]
        wrong = [spec for spec in given if spec.shape != tensors[spec.name].shape]
        misshapen = {spec.name: tensors.pop(spec.name).shape for spec in wrong}
        fresh = [*fresh, *wrong]
    specs = [spec for spec in specs if spec not in fresh]
    aside = [name for name in stored if not _belongs(name, head)]
    expected = {spec.name for spec in specs}
    own = {name: tensor for name, tensor in tensors.items() if name not in expected}
    if has_own_layers:
        tensors = {name: tensors[name] for name in tensors if name in expected}
    if mismatch := describe_mismatch(checkpoint.folder, config, specs, tensors):
        fitting = {name: tensors[name] for name in tensors if name in expected}
        is_beside = all(map(is_beside_model, own))
        if not is_beside or describe_mismatch(checkpoint.folder, config, specs, fitting):
            raise MismatchError(mismatch)
    entries = [(spec, tensors[spec.name]) for spec in specs]
    if has_own_layers:
        own |= {**checkpoint.aside, **{name: stored[name] for name in aside}}
        return LoadPlan(config, entries, fresh, misshapen, aside, own)
    rest = [*checkpoint.aside, *own]
    notes = (left_aside(checkpoint.folder, rest),) if rest else ()
    return LoadPlan(config, entries, fresh, misshapen, [*aside, *rest], notes=notes)


def left_aside(where: Path, names: Sequence[str]) -> str:
    """The note that names what is no part of the model."""
    return f"{where}: left aside, as no part of OPT: {shorten(names)}"


def _belongs(name: str, head: Head) -> bool:
    others = {n for h, names in HEAD_PARAMETERS.items() if h != head for n in names}
    return name not in others


def _equal(a: LazyTensor, b: LazyTensor) -> bool:
    if a.is_same_as(b):
        return True
    if a.shape != b.shape or not a.shape or not a.nbytes:
        return False
    rows = max(1, _COMPARED_BYTES // a.rows(0, 1).nbytes)
    return all(
        np.array_equal(a.rows(i, i + rows).read(), b.rows(i, i + rows).read())
        for i in range(0, a.shape[0], rows)
    )
