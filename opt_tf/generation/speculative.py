"""Speculative decoding: several tokens are drafted, one pass of the model checks them all.

Drafts come from the row itself (prompt lookup) or from a smaller model. Greedy texts stay what they
are, and sampled ones keep their distribution (arXiv 2211.17192). Rows may be right about different
numbers of tokens; what is wrong stays in the cache as a gap that the mask hides.
"""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import tensorflow as tf

from opt_core.generation import filters
from opt_core.generation.request import Ids, Request, check_logits
from opt_core.generation.rules import Rules
from opt_core.generation.speculation import Counts, Reader, Rows, speculate
from opt_tf.cache import KVCache
from opt_tf.compilation import generation_program, program_inputs
from opt_tf.generation import loop, sampling
from opt_tf.generation.prefill import read_prompts
from opt_tf.linear import sizes

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


def stream(model: "TFOPTForCausalLM", request: Request) -> Iterator[tf.Tensor]:
    """Drafts, checks and yields until every row has ended.

    Args:
        model: The language model.
        request: What to generate, with an assistant or `prompt_lookup_num_tokens`.

    Yields:
        (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended; several in a row
        where drafts were right.
    """
    for column in speculate(model, request, _Reader):
        yield tf.constant(column)


def generate(model: "TFOPTForCausalLM", request: Request) -> tf.Tensor:
    """The prompts and all that `stream` yields after them."""
    return tf.constant(request.join(stream(model, request)))


def accept_draft(
    scores_RTV: tf.Tensor,
    draft_RG: tf.Tensor,
    counts_R: tf.Tensor,
    probs_RGV: tf.Tensor | None,
    rules: Rules,
    seed: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Which drafted tokens are right, and the token after them.

    A sampled token that its draft gave the probability q, and the model p, is right with
    probability min(1, p / q); the token after a wrong one is drawn from what p has more than q.

    Args:
        scores_RTV: Constrained logits of a row's next token, and of the one after each drafted.
        draft_RG: G = T - 1 ids.
        counts_R: How many of them were drafted.
        probs_RGV: The probabilities they were drawn by; None: they were not drawn.
        rules: Those of the request.
        seed: int64 (2,), of random numbers.

    Returns:
        (R, T) ids and how many of them count, (R,): the drafted ones that are right and one
        token more.
    """
    R, T, V = sizes(scores_RTV)
    draft = tf.cast(draft_RG, tf.int32)
    is_drafted = tf.range(T - 1) < tf.cast(counts_R, tf.int32)[:, None]
    if not rules.do_sample:
        tokens = tf.argmax(scores_RTV, -1, output_type=tf.int32)
        return tokens, _leading(is_drafted & (tokens[:, :-1] == draft)) + 1
    p_RTV = tf.reshape(probabilities(tf.reshape(scores_RTV, (R * T, V)), rules), (R, T, V))
    # What was not drawn was certain.
    q_RGV = tf.one_hot(draft, V) if probs_RGV is None else probs_RGV
    p, q = (tf.gather(x, draft, batch_dims=2) for x in (p_RTV[:, :-1], q_RGV))
    whole: Any = {"minval": None, "maxval": None, "dtype": tf.uint32}
    bits = tf.random.stateless_uniform((R, T - 1), _other(seed, 0), **whole, alg="philox")
    chance = tf.cast(tf.bitwise.right_shift(bits, 8), tf.float32) * 2**-24
    right = _leading(is_drafted & (chance * q < p))
    q_RTV = tf.pad(tf.where(is_drafted[..., None], q_RGV, 0.0), [[0, 0], [0, 1], [0, 0]])
    p_RV, q_RV = (tf.gather(x, right, batch_dims=1) for x in (p_RTV, q_RTV))
    rest = tf.maximum(p_RV - q_RV, 0.0)
    # Where rounding alone refused a token, nothing is left.
    rest = tf.where(tf.reduce_sum(rest, 1, keepdims=True) > 0, rest, p_RV)
    tokens = tf.pad(draft, [[0, 0], [0, 1]])
    is_last = tf.range(T) == right[:, None]
    return tf.where(is_last, _draw(rest, seed)[:, None], tokens), right + 1


def probabilities(logits_BV: tf.Tensor, rules: Rules) -> tf.Tensor:
    """Probabilities (B, V) that sampling draws the next token by."""
    logits_BC, ids_BC = filters.candidates(sampling, logits_BV, rules)
    B, C = sizes(ids_BC)
    places = tf.stack([tf.repeat(tf.range(B)[:, None], C, 1), ids_BC], -1)
    return tf.scatter_nd(places, tf.nn.softmax(logits_BC, -1), tf.shape(logits_BV))


class _History(NamedTuple):
    """Texts that filters read (`Rows.histories`): (R, X, W) ids, their mask, and (R, X) counts."""

    ids: Any
    mask: Any
    made: Any


class _Reader(Reader):
    """A model and what it has read."""

    def __init__(self, model: "TFOPTForCausalLM", request: Request, rows: Rows, slots: int):
        super().__init__(model, request, rows, slots)
        inputs = program_inputs(request, slots)
        self.numbers = inputs["numbers"]
        copies = request.settings.num_return_sequences
        logits, cache = read_prompts(model, request, slots, copies)
        self.keys, self.values = cache.keys, cache.values
        self.token, self.best = self._run(_open, inputs, self._history(rows.no_draft), logits)

    def first_tokens(self) -> Ids:
        check_logits(self.best.numpy())
        return self.token.numpy()

    def propose(self, count: int, step: int) -> tuple[Ids, tf.Tensor | None]:
        inputs = self._inputs(self.positions(count + 1, 2), self.rows.newest(2), step)
        draft, probs, self.keys, self.values = self._run(
            _propose, inputs, self._history(self.rows.no_draft), self.keys, self.values
        )
        return draft.numpy(), probs if self.request.settings.do_sample else None

    def check(
        self, draft: Ids, counts: Counts, probs: tf.Tensor | None, step: int
    ) -> tuple[Ids, Counts]:
        ids = np.concatenate([self.rows.newest(1), draft], 1)
        inputs = self._inputs(self.positions(ids.shape[1], 1), ids, step)
        tokens, kept, self.keys, self.values = self._run(
            _check, inputs, self._history(draft), self.keys, self.values, tf.constant(counts), probs
        )
        return tokens.numpy(), kept.numpy()

    def reorder(self, order: Ids) -> None:
        self.keys, self.values = (
            tuple(_reorder(buffer, order) for buffer in buffers)
            for buffers in (self.keys, self.values)
        )

    def _run(self, program: Any, *inputs: Any) -> Any:
        return generation_program(self.model, self.request, program)(*inputs)

    def _history(self, draft: Ids) -> _History:
        return _History(*(tf.constant(x) for x in self.histories(draft)))

    def _inputs(self, positions: Ids, ids: Ids, step: int) -> dict[str, Any]:
        return {
            "ids": tf.constant(ids),
            "positions": tf.constant(positions),
            "mask": tf.constant(self.slots.mask),
            "length": tf.constant(self.slots.length, tf.int32),
            "seed": tf.constant([self.request.seed, step], tf.int64),
            "numbers": self.numbers,
        }


def _open(
    model: "TFOPTForCausalLM",
    rules: Rules,
    inputs: dict[str, Any],
    history: _History,
    logits_RV: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """The first token of each row, and the largest logit it was chosen by."""
    scores = _constrained(logits_RV[:, None], rules, history, is_first=True)[:, 0]
    seed = tf.stack([inputs["seed"], tf.constant(0, tf.int64)])
    token = filters.select_tokens(sampling, scores, rules, seed)
    return token, tf.reduce_max(scores, -1)


def _check(
    model: "TFOPTForCausalLM",
    rules: Rules,
    inputs: dict[str, Any],
    history: _History,
    keys: Any,
    values: Any,
    counts_R: tf.Tensor,
    probs_RGV: tf.Tensor | None,
) -> tuple[Any, ...]:
    """The answer of `accept_draft` for the draft behind each newest token, and the new buffers."""
    ids, cache = inputs["ids"], KVCache(keys, values, inputs["length"], inputs["mask"])
    logits, cache = _read(model, ids, inputs["positions"], cache)
    scores = _constrained(logits, rules, history)
    tokens, counts = accept_draft(scores, ids[:, 1:], counts_R, probs_RGV, rules, inputs["seed"])
    return tokens, counts, cache.keys, cache.values


def _propose(
    model: "TFOPTForCausalLM",
    rules: Rules,
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
        scores = _constrained(logits[:, -1:], rules, history)[:, 0]
        p = probabilities(scores, rules) if rules.do_sample else scores
        token = tf.argmax(scores, -1, output_type=tf.int32)
        if rules.do_sample:
            token = _draw(p, _other(inputs["seed"], i + 1))
        is_here = tf.range(count) == i
        draft = tf.where(is_here, token[:, None], new[0])
        probs = tf.where(is_here[:, None], p[:, None], new[1]) if rules.do_sample else new[1]
        history = _History(
            tf.concat([history.ids[:, :, 1:], token[:, None, None]], 2),
            tf.concat([history.mask[:, :, 1:], tf.ones((R, 1, 1), tf.bool)], 2),
            history.made + 1,
        )
        return (draft, probs), token[:, None], cache, history

    def loop(i: Any, new: Any, ids: Any, keys: Any, values: Any, history: Any) -> Any:
        cache = KVCache(keys, values, inputs["length"] + i + 1, mask)
        positions = tf.gather(places, i + 1, axis=1)[:, None]
        new, ids, cache, history = step(i, new, ids, positions, cache, _History(*history))
        return i + 1, new, ids, cache.keys, cache.values, history

    probs = tf.zeros((R, count, V)) if rules.do_sample else tf.zeros(())
    nothing = tf.zeros((R, count), tf.int32), probs
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
    logits_RTV: tf.Tensor, rules: Rules, history: _History, is_first: bool = False
) -> tf.Tensor:
    """Constrained logits (R, T, V) of the tokens after T histories of each row."""
    (R, T, V), W = sizes(logits_RTV), sizes(history.ids)[2]
    ids, mask = (tf.reshape(x, (R * T, W)) for x in history[:2])
    made = 0 if is_first else tf.reshape(history.made, (R * T,))
    is_last = made + 1 == rules.new_tokens
    scores = loop.mask_vocabulary(tf.reshape(logits_RTV, (R * T, V)), rules.vocabulary)
    scores = filters.process_logits(sampling, scores, ids, mask, W, made, rules, is_last)
    return tf.reshape(scores, (R, T, V))


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


def _reorder(buffer: tf.Tensor, order_RS: Ids) -> tf.Tensor:
    """A cache's buffer (R, H, S, K) with its slots in another order."""
    turned = tf.transpose(buffer, (0, 2, 1, 3))
    return tf.transpose(tf.gather(turned, order_RS, batch_dims=1), (0, 2, 1, 3))
