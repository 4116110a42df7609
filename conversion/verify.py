"""Whether two checkpoints, or two backends, compute the same: logits, then greedy tokens."""

import os
import tempfile
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from conversion.backends import inference, load_backend, to_numpy
from conversion.convert import convert
from conversion.readers import open_any_checkpoint
from opt_core.checkpoints.load import open_checkpoint
from opt_core.config import OPTConfig
from opt_core.errors import CheckpointError, InputError
from opt_core.generation.config import GenerationConfig
from opt_core.hub import resolve
from opt_core.text.tokenizer import OPTTokenizer

PROMPTS = (
    "The capital of France is",
    "In 1905, a clerk at the patent office in Bern wrote that",
    "def fibonacci(n):\n    ",
)
"""Prompts where the caller names none and the first checkpoint has a tokenizer."""

TOLERANCE = 1e-4
_RANDOM_PROMPTS, _RANDOM_LENGTH = 3, 16


@dataclass(frozen=True)
class Side:
    """One checkpoint on one backend.

    Attributes:
        path: Folder or hub id, as the caller wrote it.
        backend: Name of the backend.
    """

    path: str
    backend: str

    def __str__(self) -> str:
        return f"{self.path} ({self.backend})"


@dataclass(frozen=True)
class Difference:
    """How one side answers one prompt, compared with the reference.

    Attributes:
        side: The side compared.
        prompt: The prompt's text, or its token ids where there is no text.
        max_difference: Largest |difference| of two logits over all positions of the prompt.
        max_logit: Largest |logit| of the reference: what `max_difference` is measured against.
        tokens: Greedy tokens compared.
        first_difference: Index of the first greedy token that differs; None if all agree.
    """

    side: Side
    prompt: str
    max_difference: float
    max_logit: float
    tokens: int
    first_difference: int | None


@dataclass(frozen=True)
class Report:
    """The outcome of a comparison.

    Attributes:
        reference: The side that the others are compared with.
        tolerance: Largest allowed |difference| of logits, relative to the largest |logit| or 1.
        differences: One entry per other side and prompt.
        notes: Remarks, such as vocabularies of different sizes.
    """

    reference: Side
    tolerance: float
    differences: tuple[Difference, ...]
    notes: tuple[str, ...] = ()

    @property
    def max_difference(self) -> float:
        """Largest |difference| of logits over all sides and prompts."""
        return float(np.max([d.max_difference for d in self.differences]))

    @property
    def equal(self) -> bool:
        """Whether all logits are within the tolerance and all greedy tokens agree."""
        return all(self.agrees(difference) for difference in self.differences)

    def agrees(self, difference: Difference) -> bool:
        """Whether one entry is within the tolerance (NaN never is) and its tokens agree."""
        limit = self.tolerance * max(1.0, difference.max_logit)
        return difference.max_difference <= limit and difference.first_difference is None


def verify(
    a: str | PathLike[str],
    b: str | PathLike[str],
    backends: Sequence[str] = ("torch",),
    prompts: Sequence[str] | None = None,
    max_new_tokens: int = 16,
    tolerance: float = TOLERANCE,
    progress: Callable[[Side, int, int], None] | None = None,
    mesh: Any = None,
) -> Report:
    """Runs the same prompts through both checkpoints on each backend, in float32, and compares.

    One model is in memory at a time. The reference is `a` on the first backend. What no backend
    loads (TensorFlow's, Flax', KerasHub's and metaseq's files) is converted first, into a folder
    for temporary files that needs as much room as the checkpoint.

    Args:
        a: Folder, weight file, hub id or "mini".
        b: The same; it may be `a` where several backends are compared.
        backends: Names of backends: "torch", "tf", "flax".
        prompts: Texts, encoded with the tokenizer of `a`. By default `PROMPTS`, or seeded
            random ids where `a` has no tokenizer.
        max_new_tokens: Greedy tokens to compare after each prompt.
        tolerance: Largest |difference| of logits that counts as equal, times the largest |logit|
            where that exceeds 1.
        progress: Called with (side, bytes loaded, bytes in all) while models load.
        mesh: The backend's mesh to spread each model over (`opt_*.sharding`); None: one device.

    Raises:
        OPTError: A checkpoint or backend cannot be loaded, or there are no prompts to compare.
    """
    if not backends or (prompts is not None and not prompts):
        raise InputError(f"verify needs a backend and a prompt, received {backends!r}, {prompts!r}")
    names = [os.fspath(a), os.fspath(b)]
    if names[0] == names[1] and len(backends) > 1:
        names = names[:1]
    sides = [Side(name, backend) for name in names for backend in backends]
    with ExitStack() as scratch:
        folders = {
            side.path: scratch.enter_context(_loadable(side, progress))
            for side in sides[:: len(backends)]
        }
        notes = tuple(_notes([folders[name] for name in names]))
        labels, encoded = _encode(folders[names[0]], prompts, max_new_tokens)
        reference, *others = (
            _answers(side, folders[side.path], encoded, max_new_tokens, progress, mesh)
            for side in sides
        )
    differences = [
        _compare(side, label, expected, received)
        for side, answers in zip(sides[1:], others, strict=True)
        for label, expected, received in zip(labels, reference, answers, strict=True)
    ]
    return Report(sides[0], tolerance, tuple(differences), notes)


@dataclass(frozen=True)
class _Answer:
    logits_TV: NDArray[Any]
    tokens: list[int]


@contextmanager
def _loadable(
    side: Side, progress: Callable[[Side, int, int], None] | None
) -> Generator[Path, None, None]:
    """The files of one side, or a conversion of them that lasts as long as it is needed."""
    path = resolve(side.path, convertible=True)
    if _is_native(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="opt-lm-") as scratch:
        folder = Path(scratch) / "converted"
        report = None if progress is None else partial(progress, side)
        yield convert(path, folder, progress=report).path


def _is_native(path: Path) -> bool:
    found = open_any_checkpoint(path).checkpoint
    try:
        return open_checkpoint(path).tensors.keys() == found.tensors.keys()
    except CheckpointError:
        return False


def _encode(
    path: Path, prompts: Sequence[str] | None, max_new_tokens: int
) -> tuple[list[str], list[NDArray[np.int32]]]:
    """The prompts as they are called in the report, and each as (1, T) ids."""
    folder = _folder(path)
    if prompts is not None:
        tokenizer = OPTTokenizer.from_pretrained(folder)
        return list(prompts), [_ids(tokenizer, text) for text in prompts]
    config = OPTConfig.from_pretrained(folder)
    longest = max(1, config.max_position_embeddings - max_new_tokens)
    if any((folder / file).exists() for file in ("vocab.json", "tokenizer.json")):
        tokenizer = OPTTokenizer.from_pretrained(folder)
        return list(PROMPTS), [_ids(tokenizer, text)[:, :longest] for text in PROMPTS]
    shape = (_RANDOM_PROMPTS, 1, min(_RANDOM_LENGTH, longest))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, shape, dtype=np.int32)
    return [" ".join(map(str, row)) for row in ids[:, 0].tolist()], list(ids)


def _ids(tokenizer: OPTTokenizer, text: str) -> NDArray[np.int32]:
    return tokenizer(text, return_tensors="np").input_ids.astype(np.int32)


def _answers(
    side: Side,
    path: Path,
    encoded: list[NDArray[np.int32]],
    max_new_tokens: int,
    progress: Callable[[Side, int, int], None] | None,
    mesh: Any,
) -> list[_Answer]:
    """Loads one side, lets it answer every prompt, and lets go of it."""

    def report(done: int, total: int) -> None:
        if progress is not None:
            progress(side, done, total)

    options = {} if mesh is None else {"mesh": mesh}
    model = load_backend(side.backend).from_pretrained(path, progress=report, **options)
    settings = GenerationConfig.from_model(model.config).replace(max_new_tokens=max_new_tokens)
    answers: list[_Answer] = []
    with inference(side.backend):
        for ids in encoded:
            logits = to_numpy(model(ids, use_cache=False).logits)[0]
            tokens: list[int] = []
            if np.isfinite(logits[-1]).all():  # else there is nothing to choose among
                rows = model.generate(ids, generation_config=settings)
                tokens = to_numpy(rows)[0, ids.shape[1] :].tolist()
            answers.append(_Answer(logits, tokens))
    return answers


def _compare(side: Side, prompt: str, expected: _Answer, received: _Answer) -> Difference:
    shared = min(expected.logits_TV.shape[-1], received.logits_TV.shape[-1])
    reference = expected.logits_TV[:, :shared].astype(np.float64)
    pairs = zip_longest(expected.tokens, received.tokens)
    return Difference(
        side=side,
        prompt=prompt,
        max_difference=float(np.abs(reference - received.logits_TV[:, :shared]).max()),
        max_logit=float(np.abs(reference).max()),
        tokens=max(len(expected.tokens), len(received.tokens)),
        first_difference=next((i for i, (x, y) in enumerate(pairs) if x != y), None),
    )


def _notes(paths: Sequence[Path]) -> Iterator[str]:
    sizes = [OPTConfig.from_pretrained(_folder(path)).vocab_size for path in paths]
    if len(set(sizes)) > 1:
        yield f"vocabularies of {sizes[0]} and {sizes[1]} ids: the first {min(sizes)} are compared"


def _folder(path: Path) -> Path:
    return path if path.is_dir() else path.parent
