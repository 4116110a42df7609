"""A model with an adapter merged into it, as a plan to load: each weight is computed when read.

So an adapter can be had wherever a checkpoint can: loaded into any backend, quantised, sharded,
converted. Products are made in float32, whatever type the weights are stored in.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.adapters.settings import Initialization
from opt_core.adapters.targets import LM_HEAD, adapted_names, saved_names, token_rows
from opt_core.adapters.tensors import PREFIX, AdapterFolder, Parts
from opt_core.checkpoints.plan import LoadPlan
from opt_core.checkpoints.tensors import LazyTensor, StoredTensor
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError
from opt_core.params import HEAD_PARAMETERS, Head, ParamSpec, param_specs

EMBEDDING = "model.decoder.embed_tokens.weight"
_LABELS = "score.weight"
_BLOCK = 1 << 22  # numbers of a product at a time: 16 MiB
_SHOWN = 4
Matrix = NDArray[np.float32]


@dataclass(frozen=True)
class LowRank:
    """A product that is added to a weight: scale times high times low.

    Attributes:
        high: B, (out, rank).
        low: A, (rank, in).
        scale: The factor.
    """

    high: Matrix
    low: Matrix
    scale: float


@dataclass(frozen=True, eq=False)
class AdaptedTensor:
    """A parameter with an adapter merged into it.

    Attributes:
        name: Canonical name.
        base: The parameter without.
        parts: What the adapter has for it.
        initialization: What making the adapter did to `base`.
        scale: The factor of its products.
        token_rows: The rows that `parts.tokens` replaces.
        window: The rows that are read; None: all.
    """

    name: str
    base: LazyTensor
    parts: Parts
    initialization: Initialization
    scale: float
    token_rows: tuple[int, ...]
    window: range | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape."""
        rows, *columns = self.base.shape
        return rows if self.window is None else len(self.window), *columns

    @property
    def dtype(self) -> np.dtype[Any]:
        """Data type of one element."""
        return np.dtype(np.float64 if self.base.dtype == np.float64 else np.float32)

    @property
    def nbytes(self) -> int:
        """Bytes of all elements."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def file(self) -> Path:
        """The file of the parameter without the adapter."""
        return self.base.file

    @property
    def offset(self) -> int:
        """Where that parameter starts in its file."""
        return self.base.offset

    @property
    def rank(self) -> int:
        """Rank of the product that the file has."""
        low = self.parts.low if self.parts.embedding_low is None else self.parts.embedding_low
        return 0 if low is None else low.shape[0]

    @property
    def is_beside(self) -> bool:
        """Whether the adapter is nothing but a product that can be computed beside the weight."""
        parts = self.parts
        return parts.low is not None and parts.magnitude is None and parts.tokens is None

    def is_same_as(self, other: LazyTensor) -> bool:
        """Whether it is this one."""
        return self is other

    def rows(self, start: int, stop: int) -> LazyTensor:
        """Part of the tensor along its first dimension, which computes all of it."""
        window = range(self.base.shape[0]) if self.window is None else self.window
        return replace(self, window=window[start:stop])

    def low_rank(self) -> LowRank:
        """The product that is added to the base, what PiSSA or OLoRA took away from it included.

        Both begin with a part of the weight itself as adapter and leave the rest as the weight.
        Their adapter less that part is one of twice the rank, and belongs to the whole weight.
        """
        parts, scale = self.parts, self.scale
        if parts.embedding_low is not None and parts.embedding_high is not None:
            return LowRank(_wide(parts.embedding_low).T, _wide(parts.embedding_high).T, scale)
        assert parts.low is not None
        assert parts.high is not None
        high, low = _wide(parts.high), _wide(parts.low)
        if self.initialization == "kept":
            return LowRank(high, low, scale)
        weight, rank = _wide(self.base), len(low)
        if self.initialization == "pissa":
            left, sizes, right = np.linalg.svd(weight, full_matrices=False)
            taken, part = left[:, :rank] * (-sizes[:rank] / scale), right[:rank]
        else:
            left, right = np.linalg.qr(weight)
            taken, part = -left[:, :rank], right[:rank]
        return LowRank(
            np.concatenate((high, taken.astype(high.dtype)), 1), np.concatenate((low, part)), scale
        )

    def read(self) -> NDArray[Any]:
        """The values."""
        out = self.base.read().astype(self.dtype, order="C")  # a copy, always
        if self.parts.has_adapter:
            _add(out, self.low_rank())
        if self.parts.magnitude is not None:
            axis = 0 if self.parts.embedding_low is not None else 1
            factors = _wide(self.parts.magnitude) / np.sqrt(np.square(out).sum(axis))
            out *= np.expand_dims(factors, axis)
        if self.parts.tokens is not None:
            out[list(self.token_rows)] = _wide(self.parts.tokens)
        if self.parts.shift is not None:
            out += self.scale * _wide(self.parts.shift)
        return out if self.window is None else out[self.window.start : self.window.stop]


def merge_adapter(plan: LoadPlan, head: Head, adapter: AdapterFolder) -> LoadPlan:
    """The plan of a model with an adapter merged into it.

    The vocabulary, and a classifier's labels, become as many as the adapter has rows for them. A
    tied language-model head gets a weight of its own where the adapter changes one of the two.

    Args:
        plan: The model's own.
        head: The head on the decoder.
        adapter: The adapter.

    Raises:
        CheckpointError: The adapter does not fit the model.
    """
    return _Merging(plan, head, adapter).plan()


class _Merging:
    def __init__(self, plan: LoadPlan, head: Head, adapter: AdapterFolder):
        self._adapter, self._config = adapter, plan.config
        self._head: Head = head
        self._fresh = plan.fresh
        self._base: dict[str, LazyTensor] = {spec.name: t for spec, t in plan.entries}
        self._is_tied = head == "causal_lm" and plan.config.tie_word_embeddings
        untied = plan.config.replace(tie_word_embeddings=False) if self._is_tied else plan.config
        specs = param_specs(untied, head)
        settings, prefix = adapter.settings, adapter.prefix
        self._saved = saved_names(settings, specs, prefix)
        self._keys = adapted_names(settings, specs, prefix)
        if self._is_tied and settings.ensure_weight_tying:
            if EMBEDDING in self._keys:
                self._keys[LM_HEAD] = LM_HEAD.removesuffix(".weight")
            if self._saved & {EMBEDDING, LM_HEAD}:
                self._saved |= {EMBEDDING, LM_HEAD}
        self._names = [spec.name for spec in specs]
        self._parts = {n: p for n, p in adapter.parts.items() if self._concerns(n)}

    def plan(self) -> LoadPlan:
        self._check_names()
        merged = {name: t for name in self._names if (t := self._merged(name)) is not None}
        config = self._fitted(merged)
        specs = param_specs(config, self._head)
        fresh = [spec for spec in specs if spec.name not in merged]
        entries = [(spec, merged[spec.name]) for spec in specs if spec.name in merged]
        self._check_shapes(entries)
        return LoadPlan(config, entries, fresh)

    def _concerns(self, name: str) -> bool:
        """Whether a parameter is the model's; a bare decoder leaves those of heads aside."""
        return self._head != "none" or not any(name in h for h in HEAD_PARAMETERS.values())

    def _merged(self, name: str) -> LazyTensor | None:
        parts, base = self._parts.get(name), self._start(name)
        if name == LM_HEAD and self._is_tied and (parts is None or parts.tokens is None):
            parts = self._with_tokens_of_embedding(parts)
        if base is None or parts is None:
            return base
        if not parts.has_adapter and parts.tokens is None and parts.shift is None:
            return base
        settings = self._adapter.settings
        scale = settings.rank_and_scale(self._key(name))[1]
        # A weight in the adapter's file is what making the adapter left of it.
        initialization = settings.initialization if parts.whole is None else "kept"
        return AdaptedTensor(name, base, parts, initialization, scale, self._rows(name))

    def _key(self, name: str) -> str:
        """The name that rank and scale of a layer go by, of which this is a parameter."""
        return self._keys.get(f"{name.rpartition('.')[0]}.weight", name)

    def _start(self, name: str) -> LazyTensor | None:
        """The tensor under the adapter: the model's own, or one of the adapter's file."""
        pair = (name, EMBEDDING, LM_HEAD) if self._is_tied else (name,)
        if name in (EMBEDDING, LM_HEAD) and name not in self._saved:
            for twin in pair:  # both names stand for one weight
                parts = self._parts.get(twin)
                if parts is not None and parts.whole is not None and twin not in self._saved:
                    return parts.whole
        elif (parts := self._parts.get(name)) is not None and parts.whole is not None:
            return parts.whole
        return self._base.get(EMBEDDING if self._is_tied and name == LM_HEAD else name)

    def _with_tokens_of_embedding(self, parts: Parts | None) -> Parts | None:
        """A tied head's parts: rows of the embedding that were trained are its own as well."""
        embedding = self._parts.get(EMBEDDING)
        if embedding is None or embedding.tokens is None:
            return parts
        return replace(parts or Parts(), tokens=embedding.tokens)

    def _fitted(self, merged: dict[str, LazyTensor]) -> OPTConfig:
        """The configuration of what came out."""
        changes: dict[str, Any] = {}
        if len(merged[EMBEDDING].shape) == 2:  # else it is refused a little later
            changes["vocab_size"] = merged[EMBEDDING].shape[0]
        if self._is_tied:
            changes["tie_word_embeddings"] = self._stays_tied()
        if _LABELS in self._parts and len(merged[_LABELS].shape) == 2:
            changes["num_labels"] = merged[_LABELS].shape[0]
        now = {key: getattr(self._config, key) for key in changes}
        return self._config if now == changes else self._config.replace(**changes)

    def _stays_tied(self) -> bool:
        """Whether head and embedding have been changed alike, or not at all."""
        one, other = (self._parts.get(name) or Parts() for name in (EMBEDDING, LM_HEAD))
        if EMBEDDING in self._saved and LM_HEAD in self._saved:
            assert one.whole is not None
            assert other.whole is not None
            return np.array_equal(one.whole.read(), other.whole.read())
        if (EMBEDDING in self._saved) != (LM_HEAD in self._saved):
            return False
        if one.has_adapter or other.has_adapter:
            return False
        if one.tokens is None or other.tokens is None:
            return other.tokens is None
        alike = self._rows(EMBEDDING) == self._rows(LM_HEAD)
        return alike and np.array_equal(one.tokens.read(), other.tokens.read())

    def _rows(self, name: str) -> tuple[int, ...]:
        """The rows of a weight that were trained; a tied head's are the embedding's."""
        settings, prefix = self._adapter.settings, self._adapter.prefix
        rows = token_rows(settings, name, prefix)
        if not rows and name == LM_HEAD and self._is_tied:
            return token_rows(settings, EMBEDDING, prefix)
        return rows

    def _check_names(self) -> None:
        """Compares what the file has with what the configuration says it should have.

        Raises:
            CheckpointError: They differ.
        """
        problems: list[str] = []
        for name in sorted(self._parts.keys() - set(self._names)):
            kind = "lora_B" if self._parts[name].shift is not None else ""
            problems.append(f"unexpected {self._file_name(name, kind)}")
        for name in self._names:
            problems += self._misnamed(name, self._parts.get(name) or Parts())
        self._refuse(problems)

    def _misnamed(self, name: str, parts: Parts) -> Iterator[str]:
        settings, is_key = self._adapter.settings, name in self._keys
        twins = (parts.low, parts.high), (parts.embedding_low, parts.embedding_high)
        if name in self._saved and parts.whole is None:
            yield f"missing {self._file_name(name)}"
        if is_key != parts.has_adapter:
            yield f"{'missing' if is_key else 'unexpected'} {self._file_name(name, 'lora_A')}"
        elif any((low is None) != (high is None) for low, high in twins):
            yield f"missing {self._file_name(name, 'lora_B')}"
        elif is_key and settings.use_dora != (parts.magnitude is not None):
            what = "missing" if settings.use_dora else "unexpected"
            yield f"{what} {self._file_name(name, 'lora_magnitude_vector')}"
        if parts.magnitude is not None and not parts.has_adapter:
            yield f"unexpected {self._file_name(name, 'lora_magnitude_vector')}"
        if parts.shift is not None and self._key(name) == name:
            yield f"unexpected {self._file_name(name, 'lora_B')}"
        implied = name == LM_HEAD and self._is_tied
        if bool(self._rows(name)) != (parts.tokens is not None) and not implied:
            yield f"trainable_token_indices does not fit {self._file_name(name)}"
        if implied and is_key and settings.initialization != "kept" and parts.whole is None:
            yield (
                f"init_lora_weights={settings.initialization!r} on a tied lm_head, which changed "
                "the token embedding too, needs the weights of both"
            )

    def _check_shapes(self, entries: list[tuple[ParamSpec, LazyTensor]]) -> None:
        problems: list[str] = []
        for spec, tensor in entries:
            if tensor.shape != spec.shape:
                problems.append(self._misshapen(spec.name, "", spec.shape, tensor))
            if isinstance(tensor, AdaptedTensor):
                problems += self._misshapen_parts(tensor)
        self._refuse(problems)

    def _misshapen_parts(self, tensor: AdaptedTensor) -> list[str]:
        parts, shape = tensor.parts, tensor.shape
        rank = self._adapter.settings.rank_and_scale(self._key(tensor.name))[0]
        wanted: dict[str, tuple[StoredTensor | None, tuple[int, ...]]] = {
            "lora_A": (parts.low, (rank, shape[-1])),
            "lora_B": (parts.high, (shape[0], rank)),
            "lora_embedding_A": (parts.embedding_low, (rank, shape[0])),
            "lora_embedding_B": (parts.embedding_high, (shape[-1], rank)),
            "lora_magnitude_vector": (
                parts.magnitude, shape[-1:] if parts.embedding_low is not None else shape[:1]
            ),
            "trainable_tokens_delta": (parts.tokens, (len(tensor.token_rows), shape[-1])),
            "lora_B.bias": (parts.shift, shape),
        }  # fmt: skip
        problems = [
            self._misshapen(tensor.name, kind, expected, found)
            for kind, (found, expected) in wanted.items()
            if found is not None and found.shape != expected
        ]
        if max(tensor.token_rows, default=0) >= shape[0]:
            problems.append(f"trainable_token_indices: expected ids below {shape[0]}")
        if problems and self._adapter.settings.use_qalora:
            problems.append("use_qalora on a quantised model is not supported")
        return problems

    def _misshapen(self, name: str, kind: str, shape: tuple[int, ...], found: LazyTensor) -> str:
        return f"{self._file_name(name, kind)}: expected {list(shape)}, found {list(found.shape)}"

    def _file_name(self, name: str, kind: str = "") -> str:
        module, _, leaf = name.removeprefix(self._adapter.prefix).rpartition(".")
        return f"{PREFIX}{module}.{kind}.{leaf}" if kind else f"{PREFIX}{module}.{leaf}"

    def _refuse(self, problems: list[str]) -> None:
        if problems:
            more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
            raise CheckpointError(
                f"{self._adapter.file} does not fit the model: {'; '.join(problems[:_SHOWN])}{more}"
            )


def _add(out: NDArray[Any], product: LowRank) -> None:
    """Adds a product to a weight, some rows at a time."""
    high = product.high * np.float32(product.scale)
    step = max(1, _BLOCK // max(1, out.shape[1]))
    for start in range(0, len(out), step):
        out[start : start + step] += high[start : start + step] @ product.low


def _wide(tensor: LazyTensor) -> Matrix:
    return tensor.read().astype(np.float32, copy=False)
