"""Speculative decoding: several tokens are guessed, one pass of the model checks them all.

Guesses come from the row itself (prompt lookup) or from a smaller model. Greedy texts stay what
they are, and sampled ones keep their distribution (arXiv 2211.17192). Rows may be right about
different numbers of guesses; what is wrong stays in the cache as a gap that the mask hides.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.speculation import Ids, Mask, Rows, Slots, check_assistant
from opt_core.text.tokenizer import OPTTokenizer
from opt_flax import generation, sampling
from opt_flax.cache import KVCache
from opt_flax.compilation import TracedSettings, bucket
from opt_flax.prefill import prefill_prompts
from opt_flax.sharding import replicate

if TYPE_CHECKING:
    from opt_flax.generation import Request
    from opt_flax.modeling import FlaxOPTForCausalLM


def is_requested(settings: GenerationConfig, assistant: Any) -> bool:
    """Whether a request says where guesses come from."""
    return assistant is not None or settings.prompt_lookup_num_tokens is not None


def check(model: "FlaxOPTForCausalLM", request: "Request", assistant: Any) -> None:
    """Refuses an assistant that cannot guess for a model.

    Raises:
        GenerationError: It is no language model of this framework, has other ids or too short a
            window, or the settings leave no place for it.
    """
    from opt_flax.modeling import FlaxOPTForCausalLM as expected

    if assistant is None:
        return
    if not isinstance(assistant, expected):
        kind = type(assistant).__name__
        raise GenerationError(f"assistant_model: expected an {expected.__name__}, received {kind}")
    check_assistant(request.settings, model.config, assistant.config)


def stream(
    model: "FlaxOPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "FlaxOPTForCausalLM | None",
) -> Iterator[Array]:
    """Guesses, checks and yields until every row has ended.

    Args:
        model: The language model.
        request: What to generate.
        seed: Seed of sampling, 0 to 2**63 - 1.
        tokenizer: For stop strings.
        assistant: The model that guesses; None: the rows themselves are looked through.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended; several in a row
        where guesses were right.
    """
    check(model, request, assistant)
    return _stream(model, request, seed, tokenizer, assistant)


def generate(
    model: "FlaxOPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "FlaxOPTForCausalLM | None",
) -> Array:
    """The prompts and all that `stream` yields after them."""
    new = [np.asarray(x) for x in stream(model, request, seed, tokenizer, assistant)]
    prompts = request.ids.repeat(request.settings.num_return_sequences, 0)
    return jnp.asarray(np.concatenate([prompts, np.stack(new, 1)], 1))


def accept_draft(
    scores_RTV: Array,
    guesses_RG: Array,
    counts_R: Array,
    drafted_RGV: Array | None,
    settings: Any,
    key: Array,
) -> tuple[Array, Array]:
    """Which guesses are right, and the token after them.

    A sampled guess that its draft gave the probability q, and the model p, is right with
    probability min(1, p / q); the token after a wrong one is drawn from what p has more than q.

    Args:
        scores_RTV: Constrained logits of a row's next token, and of the one after each guess.
        guesses_RG: G = T - 1 ids.
        counts_R: How many of them are guesses.
        drafted_RGV: The probabilities they were drawn by; None: they were not drawn.
        settings: How tokens are chosen.
        key: Source of random numbers.

    Returns:
        (R, T) ids and how many of them count, (R,): the guesses that are right and one token more.
    """
    R, T, V = scores_RTV.shape
    is_guess = jnp.arange(T - 1) < counts_R[:, None]
    if not settings.do_sample:
        tokens = scores_RTV.argmax(-1).astype(jnp.int32)
        right = is_guess & (tokens[:, :-1] == guesses_RG)
        return tokens, jnp.cumprod(right, 1, dtype=jnp.int32).sum(1) + 1
    p_RTV = probabilities(scores_RTV.reshape(R * T, V), settings).reshape(R, T, V)
    # What was not drawn was certain.
    q_RGV = jax.nn.one_hot(guesses_RG, V) if drafted_RGV is None else drafted_RGV
    places = guesses_RG[..., None]
    p, q = (jnp.take_along_axis(x, places, 2)[..., 0] for x in (p_RTV[:, :-1], q_RGV))
    key, other = jax.random.split(key)
    chance = jax.random.uniform(other, p.shape)
    right = jnp.cumprod(is_guess & (chance * q < p), 1, dtype=jnp.int32).sum(1)
    row = jnp.arange(R)
    q_RTV = jnp.pad(q_RGV * is_guess[..., None], ((0, 0), (0, 1), (0, 0)))
    p_RV = p_RTV[row, right]
    rest = (p_RV - q_RTV[row, right]).clip(min=0)
    # Where rounding alone refused a guess, nothing is left.
    rest = jnp.where(rest.sum(1, keepdims=True) > 0, rest, p_RV)
    tokens = jnp.pad(guesses_RG, ((0, 0), (0, 1))).astype(jnp.int32)
    return tokens.at[row, right].set(_draw(rest, key)), right + 1


def probabilities(logits_BV: Array, settings: Any) -> Array:
    """What sampling draws the next token by, (B, V)."""
    logits_BC, ids_BC = sampling.candidates(logits_BV, settings)
    rows = jnp.arange(len(logits_BV))[:, None]
    return jnp.zeros_like(logits_BV).at[rows, ids_BC].set(jax.nn.softmax(logits_BC, -1))


class _History(NamedTuple):
    """What filters look at (`Rows.histories`): (R, X, W) ids, which are real, and (R, X) counts."""

    ids: Any
    real: Any
    made: Any


class _Place(NamedTuple):
    """Where new tokens go: slots in use, their mask (R, S) or None, and positions (R, T)."""

    length: Any
    mask: Any
    positions: Any


class _Numbers(NamedTuple):
    """What a program takes of a request: settings, key of a random number, and the vocabulary."""

    settings: TracedSettings
    key: Any
    vocabulary: int


class _Reader:
    """A model and what it has read: the cache, and which of its slots hold tokens."""

    def __init__(
        self,
        model: "FlaxOPTForCausalLM",
        request: "Request",
        rows: Rows,
        slots: int,
        numbers: _Numbers,
    ):
        self.graph, self.state = nnx.split(model)
        self.last = model.config.max_position_embeddings - 1
        self.slots = Slots(
            _prompts(request)[1].repeat(request.settings.num_return_sequences, 0), slots
        )
        self.is_bare = len(rows.texts) == 1 and self.slots.is_plain  # and stays so
        ids, _ = generation.bucketed(request)
        mask = None
        if request.mask is not None:
            width = ids.shape[1] if request.block is None else slots
            mask = self.slots.mask[:: request.settings.num_return_sequences, :width]
        self.token, self.best, self.keys, self.values = _open(
            self.graph, self.state, ids, mask, self.slots.mask, np.int32(request.ids.shape[1]),
            request.past, self.history(rows, rows.no_guesses), numbers, request.block,
        )  # fmt: skip

    def history(self, rows: Rows, guesses: Ids) -> _History:
        """What filters look at, as wide as the cache."""
        return _History(*rows.histories(guesses, self.slots.mask.shape[1]))

    def guess(self, rows: Rows, count: int, numbers: _Numbers) -> tuple[Ids, Array | None]:
        """What this model writes, (R, count) ids, and by which probabilities if they are drawn."""
        # It is a token behind the other: then it has read what that has, whatever was right.
        guesses, drafted, self.keys, self.values = _guess(
            self.graph, self.state, self.keys, self.values,
            self._place(rows.positions(count + 1, 2)), rows.newest(2),
            self.history(rows, rows.no_guesses), numbers, count,
        )  # fmt: skip
        return np.asarray(guesses), drafted

    def check(
        self, rows: Rows, guesses: Ids, counts: Ids, drafted: Array | None, numbers: _Numbers
    ) -> tuple[Ids, Ids]:
        """The tokens that `accept_draft` gives, and how many they are."""
        ids = np.concatenate([rows.newest(1), guesses], 1)
        tokens, counts, self.keys, self.values = _check(
            self.graph, self.state, self.keys, self.values,
            self._place(rows.positions(ids.shape[1], 1)), ids, counts, drafted,
            self.history(rows, guesses), numbers,
        )  # fmt: skip
        return np.asarray(tokens), np.asarray(counts)

    def keep(self, counts: Ids, room: int) -> None:
        """Forgets all but the first tokens of each row since `keep` was last called.

        Args:
            counts: (R,) how many each row keeps.
            room: Slots that must be free then: where they are not, gaps are closed.
        """
        self.slots.keep(counts)
        if not self.slots.has_room(room):
            self.keys, self.values = _pack(self.keys, self.values, self.slots.pack())

    def _place(self, positions: Ids) -> _Place:
        mask = None if self.is_bare else self.slots.mask
        return _Place(np.int32(self.slots.length), mask, np.minimum(positions, self.last))


def _stream(
    model: "FlaxOPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "FlaxOPTForCausalLM | None",
) -> Iterator[Array]:
    settings, new = request.settings, request.new_tokens
    key = jax.random.fold_in(jax.random.key(seed % 2**31), seed // 2**31)
    most = settings.num_assistant_tokens if assistant else settings.prompt_lookup_num_tokens
    assert most is not None
    rows = Rows(*_prompts(request), settings, new, tokenizer, request.pad)
    # Gaps take slots too, until they are closed.
    gaps = 0 if len(rows.texts) == 1 else new
    slots = bucket(request.ids.shape[1] + new + most + gaps)
    numbers = _Numbers(TracedSettings.of(settings), key, request.vocabulary)
    target = _Reader(model, request, rows, slots, numbers)
    generation.check_logits(target.best)
    draft = None
    if assistant is not None:
        draft = _Reader(assistant, _behind(request), rows, slots, numbers)
    rows.take(np.asarray(target.token)[:, None], np.ones(len(rows.texts), np.int32))
    later = TracedSettings.of(settings.replace(begin_suppress_tokens=None))
    for step in count(1):
        for column in rows.columns():
            yield jnp.asarray(column)
        if rows.ended.all():
            return
        numbers = _Numbers(later, jax.random.fold_in(key, step), request.vocabulary)
        drafted = None
        if draft is None:
            guesses, counts = rows.look_up(most, settings.max_matching_ngram_size)
            guesses = guesses if counts.any() else rows.no_guesses
        else:
            guesses, drafted = draft.guess(rows, most, numbers)
            counts = np.minimum(rows.wanted, most)
        tokens, counts = target.check(rows, guesses, counts, drafted, numbers)
        taken = rows.take(tokens, counts)
        if not rows.ended.all():
            for reader in (target, draft):
                if reader is not None:
                    reader.keep(taken, most + 1)


@partial(jax.jit, static_argnames=("graph", "block"))
def _open(
    graph: Any, state: Any, ids_BT: Array, mask_BT: Array | None, real_RS: Array, length: Array,
    past: KVCache | None, history: _History, numbers: _Numbers, block: int | None,
) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:  # fmt: skip
    """The first token of each row, the highest logit it was chosen by, and the cache's buffers."""
    model = nnx.merge(graph, state)
    logits, cache = prefill_prompts(model, ids_BT, mask_BT, real_RS, length, past, block)
    scores = _constrained(logits[:, None], history._replace(made=0), numbers)[:, 0]
    token = sampling.select_tokens(scores, numbers.settings, numbers.key)
    token, best = (replicate(x, model.mesh) for x in (token, scores.max(-1)))
    return token, best, cache.keys, cache.values


@partial(jax.jit, static_argnames="graph", donate_argnames=("keys", "values"))
def _check(
    graph: Any, state: Any, keys: tuple[Array, ...], values: tuple[Array, ...], place: _Place,
    ids_RT: Array, counts_R: Array, drafted_RGV: Array | None, history: _History,
    numbers: _Numbers,
) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:  # fmt: skip
    """What `accept_draft` says of the draft behind a row's newest token, and the new buffers."""
    model = nnx.merge(graph, state)
    cache = KVCache(keys, values, place.length, place.mask)
    logits, cache = _read(model, ids_RT, place.positions, cache)
    scores = _constrained(logits, history, numbers)
    found = accept_draft(
        scores, ids_RT[:, 1:], counts_R, drafted_RGV, numbers.settings, numbers.key
    )
    tokens, counts = (replicate(x, model.mesh) for x in found)
    return tokens, counts, cache.keys, cache.values


@partial(jax.jit, static_argnames=("graph", "count"), donate_argnames=("keys", "values"))
def _guess(
    graph: Any, state: Any, keys: tuple[Array, ...], values: tuple[Array, ...], place: _Place,
    newest_R2: Array, history: _History, numbers: _Numbers, count: int,
) -> tuple[Array, Array | None, tuple[Array, ...], tuple[Array, ...]]:  # fmt: skip
    """Tokens (R, count) one after the other, their probabilities, and the cache's buffers."""
    model, settings = nnx.merge(graph, state), numbers.settings

    def step(carry: Any, inputs: Any) -> Any:
        (ids, cache, history), (positions, key) = carry, inputs
        logits, cache = _read(model, ids, positions, cache)
        scores = _constrained(logits[:, -1:], history, numbers)[:, 0]
        p = probabilities(scores, settings) if settings.do_sample else None
        token = scores.argmax(-1) if p is None else _draw(p, key)
        token = token.astype(jnp.int32)[:, None]
        ids = jnp.concatenate([history.ids[:, :, 1:], token[..., None]], 2)
        real = jnp.roll(history.real, -1, 2).at[:, :, -1].set(True)
        return (token, cache, _History(ids, real, history.made + 1)), (token[:, 0], p)

    # Another key than the one that guesses are checked by.
    draws = jax.random.split(jax.random.fold_in(numbers.key, 1), count)
    cache = KVCache(keys, values, place.length, place.mask)
    carry, first = step((newest_R2, cache, history), (place.positions[:, :2], draws[0]))
    others = place.positions[:, 2:].T[..., None]
    (_, cache, _), rest = lax.scan(step, carry, (others, draws[1:]))
    made = jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]).swapaxes(0, 1), first, rest)
    return replicate(made[0], model.mesh), made[1], cache.keys, cache.values


@partial(jax.jit, donate_argnames=("keys", "values"))
def _pack(keys: Any, values: Any, order_RS: Array) -> tuple[Any, Any]:
    """The buffers with their slots in another order."""
    order = order_RS[:, None, :, None]
    return jax.tree.map(lambda x: jnp.take_along_axis(x, order, 2), (keys, values))


def _read(
    model: "FlaxOPTForCausalLM", ids_RT: Array, positions_RT: Array, cache: KVCache
) -> tuple[Array, KVCache]:
    """Logits (R, T, V) after each of these tokens, and the cache that holds them."""
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(ids_RT)
    out = decoder(embeds, positions_RT, cache.mask, cache, deterministic=True)
    assert out.last_hidden_state is not None
    assert out.past_key_values is not None
    return model.compute_logits(out.last_hidden_state), out.past_key_values


def _constrained(logits_RTV: Array, history: _History, numbers: _Numbers) -> Array:
    """Constrained logits (R, T, V) of the tokens after T histories of each row."""
    (R, T, V), W = logits_RTV.shape, history.ids.shape[2]
    made = history.made if isinstance(history.made, int) else history.made.reshape(R * T)
    ids, real = (x.reshape(R * T, W) for x in history[:2])
    scores = generation.mask_vocabulary(logits_RTV.reshape(R * T, V), numbers.vocabulary)
    scores = sampling.process_logits(scores, ids, real, W, made, numbers.settings)
    return scores.reshape(R, T, V)


def _draw(probabilities_BV: Array, key: Array) -> Array:
    B, V = probabilities_BV.shape
    ids = jnp.broadcast_to(jnp.arange(V, dtype=jnp.int32), (B, V))
    return sampling.draw_tokens(jnp.log(probabilities_BV), ids, key)


def _prompts(request: "Request") -> tuple[Ids, Mask]:
    """The prompts, and where their tokens are real."""
    mask = np.ones(request.ids.shape, bool) if request.mask is None else request.mask
    return request.ids, mask


def _behind(request: "Request") -> "Request":
    """The prompts without their last token, and with padding before the first."""
    ids, mask = (x[:, :-1] for x in _prompts(request))
    ids = np.pad(ids, ((0, 0), (1, 0)), constant_values=request.pad)
    return replace(request, ids=ids, mask=np.pad(mask, ((0, 0), (1, 0))), past=None)
