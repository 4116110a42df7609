"""Generation that Python watches: one call of the model per token, everything else on the host.

It does what compiled loops cannot: functions of the caller between the steps, the scores, attention
weights and hidden states of each step, prompts of embeddings, guidance, and beams that are drawn,
grouped or stopped by texts. Its texts are those of the compiled loops, which are faster.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from opt_core.generation import filters, own_calls
from opt_core.generation.hooks import Deadline
from opt_core.generation.outputs import GenerateOutput, Later, make_output
from opt_core.generation.request import Ids, Mask, Request, allocate_tokens, check_logits
from opt_core.generation.rules import Rules


class Steps:
    """A model that reads a token per row at a time, and what was asked to be kept of it.

    Args:
        model: The language model.
        request: What to generate.
        copies: Rows R of each prompt.

    Attributes:
        rules: Those of the request, in the framework's tensors.
        history: (R, S) ids, the prompts first.
        mask: bool (R, S), False where no filter looks.
        prompt: Slots of the prompts.
        made: Tokens generated.
        kept: What was asked for, of each step.
    """

    history: Ids
    mask: Mask
    prompt: int
    made: int

    def __init__(self, model: Any, request: Request, copies: int) -> None:
        self.model, self.request, self.copies = model, request, copies
        self.backend, self.settings = model.backend, request.settings
        self.rules: Rules = self.backend.sampling.request_rules(model, request)
        self.history, self.mask = allocate_tokens(request, request.slots, copies)
        self.prompt, self.made = request.ids.shape[1], 0
        if request.embeds is not None and request.is_bare:
            self.mask[:, : self.prompt] = False  # there are no ids to look at
        names = ("logits", "scores", "attentions", "hidden_states")
        self.kept: dict[str, list[Any]] = {name: [] for name in names}
        self._guide = None if request.guide is None else Steps(model, request.guide, copies)
        self._cache: Any = None
        self.states: Any = None

    def tensor(self, values: Any) -> Any:
        """NumPy's values as the framework's."""
        return self.backend.inputs.to_tensor(self.model, values)

    @property
    def end(self) -> int:
        """Slots in use."""
        return self.prompt + self.made

    @property
    def cache(self) -> Any:
        """The cache of what was read; None: nothing was."""
        return self._cache

    @property
    def ids(self) -> Any:
        """(R, L) ids so far, the framework's; only new ones where the prompts are embeddings."""
        start = self.prompt if self.request.is_bare else 0
        return self.tensor(self.history[:, start : self.end])

    def logits(self, keeps_states: bool = False) -> Any:
        """(R, V) float32 logits of the next tokens, ids that no token has left out.

        Args:
            keeps_states: Leave the hidden states (R, T, P) of what was read in `states`.
        """
        settings, request = self.settings, self.request
        observe = self.backend.prefill.observe
        flags = settings.output_attentions, settings.output_hidden_states or keeps_states
        if request.calls_model:
            found = own_calls.read(self, *flags)
        elif self.made == 0:
            mask = None if request.mask is None else request.mask.repeat(self.copies, 0)
            ids = None if request.embeds is not None else self.history[:, : self.prompt]
            copies = self.copies if ids is None else 1  # the history has its copies
            found = observe(
                self.model, ids, request.embeds, copies, mask, None, request.slots, *flags
            )
        else:
            ids = self.history[:, self.end - 1 : self.end]
            found = observe(self.model, ids, None, 1, None, self._cache, 0, *flags)
        logits, self._cache, attentions, states = found
        logits = self.backend.loop.mask_vocabulary(logits, self.rules.vocabulary)
        self.states = states[-1] if keeps_states else None
        if settings.output_attentions:
            self.kept["attentions"].append(attentions)
        if settings.output_hidden_states:
            self.kept["hidden_states"].append(states)
        if settings.output_logits:
            self.kept["logits"].append(logits)
        return logits if self._guide is None else self._guided(logits)

    def try_tokens(self, ids_RK: Ids) -> tuple[Any, NDArray[np.float32], NDArray[np.float32]]:
        """Tries some next tokens, none of which is taken yet.

        Returns:
            A cache of R * K rows; the logits (R, K, V) behind each token, and its state (R, K, P).
        """
        (R, K), backend = ids_RK.shape, self.backend
        rows = self.tensor(np.arange(R, dtype=np.int32).repeat(K))
        cache, ids = self._cache.select(rows), ids_RK.reshape(-1, 1)
        found = backend.prefill.observe(self.model, ids, None, 1, None, cache, 0, False, True)
        logits = backend.loop.mask_vocabulary(found[0], self.rules.vocabulary)
        states = self.array(found[3][-1])[:, -1]
        return found[1], self.array(logits).reshape(R, K, -1), states.reshape(R, K, -1)

    def take(self, cache: Any, tokens_R: Ids, rows_R: Ids) -> None:
        """Takes one of the tried tokens in each row.

        Args:
            cache: Of `try_tokens`.
            tokens_R: The tokens.
            rows_R: Their rows of the cache.
        """
        self._cache = cache.select(self.tensor(rows_R))
        self.add(tokens_R)

    def _guided(self, logits_RV: Any) -> Any:
        """Log-probabilities away from those behind the other prompt (arXiv 2306.17806)."""
        assert self._guide is not None
        sampling, scale = self.backend.sampling, self.settings.guidance_scale
        if self.made:
            self._guide.add(self.history[:, self.end - 1])
        wanted, other = (sampling.normalize(x) for x in (logits_RV, self._guide.logits()))
        # What cannot come has -inf in both: the difference would be no number.
        return sampling.add_bias(sampling.repair(scale * (wanted - other)), other)

    def constrain(self, scores_RV: Any) -> Any:
        """The scores that tokens are chosen by, the caller's functions applied last."""
        mask = self.mask.copy()
        mask[:, self.end :] = False
        scores = filters.process_logits(
            self.backend.sampling, scores_RV, self.tensor(self.history), self.tensor(mask),
            self.end, self.made, self.rules, is_last=self.made + 1 == self.request.new_tokens,
        )  # fmt: skip
        hooks = self.request.hooks
        if hooks.is_empty:
            return scores
        bias = hooks.allowed(self.ids, self.copies, self.request.vocab_size)
        if bias is not None:
            scores = self.backend.sampling.add_bias(scores, self.tensor(bias))
        return hooks.process(self.ids, scores)

    def draw(self, scores_RV: Any) -> tuple[Any, Any]:
        """The tokens to draw among, and all scores with -inf at the others."""
        values, ids = filters.candidates(self.backend.sampling, scores_RV, self.rules)
        numbers = np.full((len(self.history), self.request.vocab_size), -np.inf, np.float32)
        np.put_along_axis(numbers, self.array(ids).astype(np.int64), self.array(values), 1)
        return (values, ids), numbers

    def array(self, values: Any) -> NDArray[Any]:
        """The framework's values as NumPy's."""
        return self.backend.inputs.to_array(values)

    def add(self, tokens_R: Ids) -> None:
        """Writes the next tokens down."""
        self.history[:, self.end] = tokens_R
        self.made += 1

    def select(self, rows_R: Ids) -> None:
        """Other rows in place of these: `rows_R[i]` becomes row i."""
        self.history, self.mask = self.history[rows_R], self.mask[rows_R]
        if hasattr(self._cache, "select"):
            self._cache = self._cache.select(self.tensor(rows_R))
        else:  # a cache of `transformers`, which a call of the caller's makes
            self._cache.reorder_cache(self.tensor(rows_R))
        if self._guide is not None:
            self._guide.select(rows_R)

    def result(self, ids: Ids, **more: Any) -> Any:
        """The ids, or a `GenerateOutput` with what was kept."""
        sequences = self.tensor(ids[:, self.prompt if self.request.is_bare else 0 :])
        if not self.settings.return_dict_in_generate:
            return sequences
        kept: dict[str, Any] = {name: tuple(values) or None for name, values in self.kept.items()}
        kept |= {"sequences": sequences, "past_key_values": self._cache.growing()}
        return make_output(self.settings, **kept | more)


def wrap(
    model: Any, request: Request, sequences: Any, search: Callable[..., Any]
) -> GenerateOutput:
    """A `GenerateOutput` of what a compiled loop returned: the rest of it is made when it is read.

    Args:
        model: The language model.
        request: What was generated.
        sequences: (R, L) ids.
        search: Beam search on the host, which keeps the beams' ways.
    """
    fields: dict[str, Any] = {"sequences": sequences}
    if request.settings.is_beam_search:
        fields["beam_indices"] = Later(lambda: search(model, request).beam_indices)
    fields["past_key_values"] = Later(partial(_read_again, model, request, sequences))
    return make_output(request.settings, **fields)


def _read_again(model: Any, request: Request, sequences: Any) -> Any:
    """The cache of all tokens but the newest, as a loop that keeps one leaves it."""
    ids = model.backend.inputs.to_array(sequences)[:, :-1].astype(np.int32)
    mask = request.mask
    if mask is not None:
        copies, behind = len(ids) // len(mask), ids.shape[1] - mask.shape[1]
        mask = np.pad(mask.repeat(copies, 0), ((0, 0), (0, behind)), constant_values=True)
    observe = model.backend.prefill.observe
    return observe(model, ids, None, 1, mask, None, request.slots, False, False)[1].growing()


def generate(model: Any, request: Request) -> Any:
    """The prompts and what follows them, (R, T + new) ids or a `GenerateOutput`.

    Raises:
        GenerationError: No token can come in a row.
    """
    settings = request.settings
    steps = Steps(model, request, settings.num_return_sequences)
    for _ in _rows(steps):
        pass
    return steps.result(steps.history[:, : steps.end])


def stream(model: Any, request: Request) -> Iterator[Any]:
    """Yields the tokens of `generate`, (R,) each, as they are made."""
    steps = Steps(model, request, request.settings.num_return_sequences)
    for tokens in _rows(steps):
        yield steps.tensor(tokens)


def _rows(steps: Steps) -> Iterator[Ids]:
    """Greedy search and sampling: the tokens (R,) of each step."""
    request, settings, sampling = steps.request, steps.settings, steps.backend.sampling
    source: Callable[[int], Any] = steps.backend.sampling.random_source(steps.model, request.seed)
    trackers = request.stop_trackers(len(steps.history))
    ended, deadline = np.zeros(len(steps.history), bool), Deadline(settings.max_time)
    while steps.made < request.new_tokens and not ended.all():
        scores = steps.constrain(steps.logits())
        if steps.made == 0:
            check_logits(steps.array(scores).max(1))
        if settings.do_sample:
            (values, ids), numbers = steps.draw(scores)
            token = sampling.draw_tokens(values, ids, source(steps.made))
            if settings.renormalize_logits:
                numbers -= np.logaddexp.reduce(numbers, 1, keepdims=True)
            scores = steps.tensor(numbers)
        else:
            token = sampling.likeliest_tokens(scores)
        if settings.output_scores:
            steps.kept["scores"].append(scores)
        tokens = np.where(ended, request.pad, steps.array(token)).astype(np.int32)
        steps.add(tokens)
        ended |= np.isin(tokens, settings.eos_ids)
        for row, tracker in enumerate(trackers):
            ended[row] |= tracker.push(int(tokens[row]))
        if not request.hooks.is_empty:
            ended |= request.hooks.stops(steps.ids, scores)
        yield tokens
        if deadline.is_over:
            return
