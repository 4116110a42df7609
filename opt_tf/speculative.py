"""Speculative decoding: several tokens are guessed, one pass of the model checks them all.

Guesses come from the row itself (prompt lookup) or from a smaller model. Greedy texts stay what
they are, and sampled ones keep their distribution (arXiv 2211.17192). Rows may be right about
different numbers of guesses; what is wrong stays in the cache as a gap that the mask hides.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.speculation import Ids, Rows, Slots, check_assistant
from opt_core.text.tokenizer import OPTTokenizer
from opt_tf import generation, sampling
from opt_tf.cache import KVCache
from opt_tf.compilation import bucket, compiled, program_inputs
from opt_tf.linear import sizes
from opt_tf.prefill import prefill_prompts

if TYPE_CHECKING:
    from opt_tf.generation import Request
    from opt_tf.modeling import TFOPTForCausalLM


def is_requested(settings: GenerationConfig, assistant: Any) -> bool:
    """Whether a request says where guesses come from."""
    return assistant is not None or settings.prompt_lookup_num_tokens is not None


def check(model: "TFOPTForCausalLM", request: "Request", assistant: Any) -> None:
    """Refuses an assistant that cannot guess for a model.

    Raises:
        GenerationError: It is no language model of this framework, has other ids or too short a
            window, or the settings leave no place for it.
    """
    from opt_tf.modeling import TFOPTForCausalLM as expected

    if assistant is None:
        return
    if not isinstance(assistant, expected):
        kind = type(assistant).__name__
        raise GenerationError(f"assistant_model: expected an {expected.__name__}, received {kind}")
    check_assistant(request.settings, model.config, assistant.config)


def stream(
    model: "TFOPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "TFOPTForCausalLM | None",
) -> Iterator[tf.Tensor]:
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
    model: "TFOPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "TFOPTForCausalLM | None",
) -> tf.Tensor:
    """The prompts and all that `stream` yields after them."""
    new = [np.asarray(x) for x in stream(model, request, seed, tokenizer, assistant)]
    prompts = request.ids.repeat(request.settings.num_return_sequences, 0)
    return tf.constant(np.concatenate([prompts, np.stack(new, 1)], 1))


def accept_draft(
    scores_RTV: tf.Tensor,
    guesses_RG: tf.Tensor,
    counts_R: tf.Tensor,
    drafted_RGV: tf.Tensor | None,
    settings: Any,
    seed: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Which guesses are right, and the token after them.

    A sampled guess that its draft gave the probability q, and the model p, is right with
    probability min(1, p / q); the token after a wrong one is drawn from what p has more than q.

    Args:
        scores_RTV: Constrained logits of a row's next token, and of the one after each guess.
        guesses_RG: G = T - 1 ids.
        counts_R: How many of them are guesses.
        drafted_RGV: The probabilities they were drawn by; None: they were not drawn.
        settings: How tokens are chosen.
        seed: int64 (2,), of random numbers.

    Returns:
        (R, T) ids and how many of them count, (R,): the guesses that are right and one token more.
    """
    R, T, V = sizes(scores_RTV)
    guesses = tf.cast(guesses_RG, tf.int32)
    is_guess = tf.range(T - 1) < tf.cast(counts_R, tf.int32)[:, None]
    if not settings.do_sample:
        tokens = tf.argmax(scores_RTV, -1, output_type=tf.int32)
        return tokens, _leading(is_guess & (tokens[:, :-1] == guesses)) + 1
    p_RTV = tf.reshape(probabilities(tf.reshape(scores_RTV, (R * T, V)), settings), (R, T, V))
    # What was not drawn was certain.
    q_RGV = tf.one_hot(guesses, V) if drafted_RGV is None else drafted_RGV
    p, q = (tf.gather(x, guesses, batch_dims=2) for x in (p_RTV[:, :-1], q_RGV))
    whole: Any = {"minval": None, "maxval": None, "dtype": tf.uint32}
    bits = tf.random.stateless_uniform((R, T - 1), _other(seed, 0), **whole, alg="philox")
    chance = tf.cast(tf.bitwise.right_shift(bits, 8), tf.float32) * 2**-24
    right = _leading(is_guess & (chance * q < p))
    q_RTV = tf.pad(tf.where(is_guess[..., None], q_RGV, 0.0), [[0, 0], [0, 1], [0, 0]])
    p_RV, q_RV = (tf.gather(x, right, batch_dims=1) for x in (p_RTV, q_RTV))
    rest = tf.maximum(p_RV - q_RV, 0.0)
    # Where rounding alone refused a guess, nothing is left.
    rest = tf.where(tf.reduce_sum(rest, 1, keepdims=True) > 0, rest, p_RV)
    tokens = tf.pad(guesses, [[0, 0], [0, 1]])
    is_last = tf.range(T) == right[:, None]
    return tf.where(is_last, _draw(rest, seed)[:, None], tokens), right + 1


def probabilities(logits_BV: tf.Tensor, settings: Any) -> tf.Tensor:
    """What sampling draws the next token by, (B, V)."""
    logits_BC, ids_BC = sampling.candidates(logits_BV, settings)
    B, C = sizes(ids_BC)
    places = tf.stack([tf.repeat(tf.range(B)[:, None], C, 1), ids_BC], -1)
    return tf.scatter_nd(places, tf.nn.softmax(logits_BC, -1), tf.shape(logits_BV))


class _History(NamedTuple):
    """What filters look at (`Rows.histories`): (R, X, W) ids, which are real, and (R, X) counts."""

    ids: Any
    real: Any
    made: Any


class _Reader:
    """A model and what it has read: the cache, and which of its slots hold tokens."""

    def __init__(
        self, model: "TFOPTForCausalLM", request: "Request", rows: Rows, slots: int, seed: int
    ):
        copies = request.settings.num_return_sequences
        self.model, self.request = model, request
        self.last = model.config.max_position_embeddings - 1
        self.slots = Slots(request.mask.repeat(copies, 0), slots)
        free = ((0, 0), (0, slots - request.ids.shape[1]))
        history = np.pad(request.ids, free, constant_values=request.pad)
        inputs = program_inputs(request, history, self.slots.mask[::copies], seed)
        self.numbers, self.seed = inputs["numbers"], seed
        self.token, self.best, self.keys, self.values = compiled(model, request, _open)(
            inputs, self._history(rows, rows.no_guesses)
        )

    def guess(self, rows: Rows, count: int, step: int) -> tuple[Ids, tf.Tensor | None]:
        """What this model writes, (R, count) ids, and by which probabilities if they are drawn."""
        # It is a token behind the other: then it has read what that has, whatever was right.
        guesses, drafted, self.keys, self.values = compiled(self.model, self.request, _guess)(
            self._inputs(rows.positions(count + 1, 2), rows.newest(2), step),
            self._history(rows, rows.no_guesses), self.keys, self.values,
        )  # fmt: skip
        return guesses.numpy(), drafted if self.request.settings.do_sample else None

    def check(
        self, rows: Rows, guesses: Ids, counts: Ids, drafted: tf.Tensor | None, step: int
    ) -> tuple[Ids, Ids]:
        """The tokens that `accept_draft` gives, and how many they are."""
        ids = np.concatenate([rows.newest(1), guesses], 1)
        found: Any = compiled(self.model, self.request, _check)(
            self._inputs(rows.positions(ids.shape[1], 1), ids, step),
            self._history(rows, guesses), self.keys, self.values, tf.constant(counts), drafted,
        )  # fmt: skip
        tokens, kept, self.keys, self.values = found
        return tokens.numpy(), kept.numpy()

    def keep(self, counts: Ids, room: int) -> None:
        """Forgets all but the first tokens of each row since `keep` was last called.

        Args:
            counts: (R,) how many each row keeps.
            room: Slots that must be free then: where they are not, gaps are closed.
        """
        self.slots.keep(counts)
        if not self.slots.has_room(room):
            order = tf.constant(self.slots.pack())
            self.keys, self.values = (
                tuple(_reorder(buffer, order) for buffer in buffers)
                for buffers in (self.keys, self.values)
            )

    def _history(self, rows: Rows, guesses: Ids) -> _History:
        found = rows.histories(guesses, self.slots.mask.shape[1])
        return _History(*(tf.constant(x) for x in found))

    def _inputs(self, positions: Ids, ids: Ids, step: int) -> dict[str, Any]:
        return {
            "ids": tf.constant(ids),
            "positions": tf.constant(np.minimum(positions, self.last)),
            "mask": tf.constant(self.slots.mask),
            "length": tf.constant(self.slots.length, tf.int32),
            "seed": tf.constant([self.seed, step], tf.int64),
            "numbers": self.numbers,
        }


def _stream(
    model: "TFOPTForCausalLM",
    request: "Request",
    seed: int,
    tokenizer: OPTTokenizer | None,
    assistant: "TFOPTForCausalLM | None",
) -> Iterator[tf.Tensor]:
    settings, new = request.settings, request.new_tokens
    most = settings.num_assistant_tokens if assistant else settings.prompt_lookup_num_tokens
    assert most is not None
    rows = Rows(request.ids, request.mask, settings, new, tokenizer, request.pad)
    # Gaps take slots too, until they are closed.
    gaps = 0 if len(rows.texts) == 1 else new
    slots = bucket(request.ids.shape[1] + new + most + gaps)
    target = _Reader(model, request, rows, slots, seed)
    generation.check_logits(target.best.numpy())
    draft = None
    if assistant is not None:
        draft = _Reader(assistant, _behind(request), rows, slots, seed)
    rows.take(target.token.numpy()[:, None], np.ones(len(rows.texts), np.int32))
    for step in count(1):
        for column in rows.columns():
            yield tf.constant(column)
        if rows.ended.all():
            return
        drafted = None
        if draft is None:
            guesses, counts = rows.look_up(most, settings.max_matching_ngram_size)
            guesses = guesses if counts.any() else rows.no_guesses
        else:
            guesses, drafted = draft.guess(rows, most, step)
            counts = np.minimum(rows.wanted, most)
        tokens, counts = target.check(rows, guesses, counts, drafted, step)
        taken = rows.take(tokens, counts)
        if not rows.ended.all():
            for reader in (target, draft):
                if reader is not None:
                    reader.keep(taken, most + 1)


def _open(
    model: "TFOPTForCausalLM", settings: Any, inputs: dict[str, Any], history: _History
) -> tuple[Any, ...]:
    """The first token of each row, the largest logit it was chosen by, and the cache's buffers."""
    logits, cache = prefill_prompts(model, settings, inputs)
    if settings.num_return_sequences > 1:
        copies = tf.repeat(tf.range(sizes(logits)[0]), settings.num_return_sequences)
        logits, cache = tf.gather(logits, copies), cache.select(copies)
    scores = _constrained(logits[:, None], settings, history, is_first=True)[:, 0]
    seed = tf.stack([inputs["seed"], tf.constant(0, tf.int64)])
    token = sampling.select_tokens(scores, settings, seed)
    return token, tf.reduce_max(scores, -1), cache.keys, cache.values


def _check(
    model: "TFOPTForCausalLM",
    settings: Any,
    inputs: dict[str, Any],
    history: _History,
    keys: Any,
    values: Any,
    counts_R: tf.Tensor,
    drafted_RGV: tf.Tensor | None,
) -> tuple[Any, ...]:
    """What `accept_draft` says of the draft behind a row's newest token, and the new buffers."""
    ids, cache = inputs["ids"], KVCache(keys, values, inputs["length"], inputs["mask"])
    logits, cache = _read(model, ids, inputs["positions"], cache)
    scores = _constrained(logits, settings, history)
    tokens, counts = accept_draft(
        scores, ids[:, 1:], counts_R, drafted_RGV, settings, inputs["seed"]
    )
    return tokens, counts, cache.keys, cache.values


def _guess(
    model: "TFOPTForCausalLM",
    settings: Any,
    inputs: dict[str, Any],
    history: _History,
    keys: Any,
    values: Any,
) -> tuple[Any, ...]:
    """Tokens (R, count) one after the other, their probabilities, and the cache's buffers."""
    places, mask = inputs["positions"], inputs["mask"]
    R, count = sizes(places)[0], sizes(places)[1] - 1
    V = model.config.vocab_size

    def step(i: Any, new: Any, ids: Any, positions: Any, cache: KVCache, history: _History) -> Any:
        logits, cache = _read(model, ids, positions, cache)
        scores = _constrained(logits[:, -1:], settings, history)[:, 0]
        p = probabilities(scores, settings) if settings.do_sample else scores
        token = tf.argmax(scores, -1, output_type=tf.int32)
        if settings.do_sample:
            token = _draw(p, _other(inputs["seed"], i + 1))
        is_here = tf.range(count) == i
        guesses = tf.where(is_here, token[:, None], new[0])
        drafted = tf.where(is_here[:, None], p[:, None], new[1]) if settings.do_sample else new[1]
        history = _History(
            tf.concat([history.ids[:, :, 1:], token[:, None, None]], 2),
            tf.concat([history.real[:, :, 1:], tf.ones((R, 1, 1), tf.bool)], 2),
            history.made + 1,
        )
        return (guesses, drafted), token[:, None], cache, history

    def loop(i: Any, new: Any, ids: Any, keys: Any, values: Any, history: Any) -> Any:
        cache = KVCache(keys, values, inputs["length"] + i + 1, mask)
        positions = tf.gather(places, i + 1, axis=1)[:, None]
        new, ids, cache, history = step(i, new, ids, positions, cache, _History(*history))
        return i + 1, new, ids, cache.keys, cache.values, history

    drafted = tf.zeros((R, count, V)) if settings.do_sample else tf.zeros(())
    nothing = tf.zeros((R, count), tf.int32), drafted
    cache = KVCache(keys, values, inputs["length"], mask)
    new, ids, cache, history = step(
        tf.constant(0), nothing, inputs["ids"], places[:, :2], cache, history
    )
    first = (tf.constant(1), new, ids, cache.keys, cache.values, history)
    _, new, _, keys, values, _ = tf.while_loop(lambda i, *_: i < count, loop, first)
    return *new, keys, values


def _read(
    model: "TFOPTForCausalLM", ids_RT: tf.Tensor, positions_RT: tf.Tensor, cache: KVCache
) -> tuple[tf.Tensor, KVCache]:
    """Logits (R, T, V) after each of these tokens, and the cache that holds them."""
    decoder = model.get_decoder()
    embeds = decoder.embed_tokens(ids_RT)
    out = decoder(
        embeds, position_ids=positions_RT, mask_BS=cache.mask, cache=cache, training=False
    )
    return model.compute_logits(out.last_hidden_state), out.past_key_values


def _constrained(
    logits_RTV: tf.Tensor, settings: Any, history: _History, is_first: bool = False
) -> tf.Tensor:
    """Constrained logits (R, T, V) of the tokens after T histories of each row."""
    (R, T, V), W = sizes(logits_RTV), sizes(history.ids)[2]
    ids, real = (tf.reshape(x, (R * T, W)) for x in history[:2])
    made = 0 if is_first else tf.reshape(history.made, (R * T,))
    scores = generation.mask_vocabulary(tf.reshape(logits_RTV, (R * T, V)), settings.vocabulary)
    return tf.reshape(sampling.process_logits(scores, ids, real, W, made, settings), (R, T, V))


def _leading(is_right_RG: tf.Tensor) -> tf.Tensor:
    """(R,) how many are right before the first wrong one."""
    return tf.reduce_sum(tf.math.cumprod(tf.cast(is_right_RG, tf.int32), 1), 1)


def _draw(probabilities_BV: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    B, V = sizes(probabilities_BV)
    ids = tf.repeat(tf.range(V)[None], B, 0)
    return sampling.draw_tokens(tf.math.log(probabilities_BV), ids, seed)


def _other(seed: tf.Tensor, number: Any) -> tf.Tensor:
    """A seed of its own for a further draw in the same step."""
    return seed + tf.stack([tf.constant(0, tf.int64), (tf.cast(number, tf.int64) + 1) * 2**40])


def _reorder(buffer: tf.Tensor, order_RS: tf.Tensor) -> tf.Tensor:
    """A cache's buffer (R, H, S, K) with its slots in another order."""
    turned = tf.transpose(buffer, (0, 2, 1, 3))
    return tf.transpose(tf.gather(turned, order_RS, batch_dims=1), (0, 2, 1, 3))


def _behind(request: "Request") -> "Request":
    """The prompts without their last token, and with padding before the first."""
    first = ((0, 0), (1, 0))
    ids = np.pad(request.ids[:, :-1], first, constant_values=request.pad)
    return replace(request, ids=ids, mask=np.pad(request.mask[:, :-1], first), past=None)
