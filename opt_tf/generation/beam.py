"""Beam search on the same prefill and decode step as everything else, as one compiled loop.

Its results equal those of `transformers` 5.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

import tensorflow as tf

from opt_core.generation import filters
from opt_core.generation.request import Request, check_logits
from opt_core.generation.rules import Rules
from opt_tf.cache import KVCache
from opt_tf.compilation import generation_program, program_inputs
from opt_tf.generation import loop, sampling
from opt_tf.generation.prefill import copy_rows, prefill_prompts, read_prompts
from opt_tf.linear import sizes

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM

NEG_INF = -1.0e9
"""Score of a place that holds no beam yet: finite, so that sums of it stay comparable."""


class Beams(NamedTuple):
    """A set of W hypotheses per prompt.

    Attributes:
        ids: (B, W, S) prompt and generated tokens, `pad` beyond a beam's length.
        scores: (B, W), best first.
        lengths: (B, W) tokens generated; 0 where there is no beam.
    """

    ids: tf.Tensor
    scores: tf.Tensor
    lengths: tf.Tensor

    def pick(self, index_BX: tf.Tensor) -> "Beams":
        """The hypotheses at some places of each prompt."""
        return Beams(*(tf.gather(x, index_BX, batch_dims=1) for x in self))

    def best(self, count: int) -> tuple["Beams", tf.Tensor]:
        """The `count` best hypotheses, best first, and where they were."""
        index = tf.math.top_k(self.scores, count)[1]
        return self.pick(index), index


class _State(NamedTuple):
    """The state that goes from one token to the next.

    Attributes:
        made: Tokens generated so far, scalar.
        running: Beams that may grow.
        finished: Beams that have ended.
        is_open: bool (B, 1), prompts whose result may still improve.
        is_done: bool scalar, whether nothing can change any more.
        keys: The cache's.
        values: The cache's.
    """

    made: tf.Tensor
    running: Beams
    finished: Beams
    is_open: tf.Tensor
    is_done: tf.Tensor
    keys: tuple[tf.Tensor, ...]
    values: tuple[tf.Tensor, ...]


def search(model: "TFOPTForCausalLM", request: Request) -> tf.Tensor:
    """Finds likely continuations by keeping the W best of them at every step.

    Args:
        model: The language model.
        request: A checked request with `num_beams` > 1.

    Returns:
        (B * num_return_sequences, T + new) ids, each prompt's best first.

    Raises:
        GenerationError: No token can come in a row.
    """
    inputs, state = _start(model, request)
    finished = generation_program(model, request, _loop)(inputs, state)
    found, made = _result(finished, request.settings)
    return found[:, : inputs["prompt"] + made]


def extend_beams(
    running: Beams,
    scores_RV: tf.Tensor,
    end: tf.Tensor,
    made: int | tf.Tensor,
    rules: Rules,
) -> tuple[Beams, tf.Tensor]:
    """The best continuations of the running beams by one token.

    There are enough of them for W to remain should all others end.

    Args:
        running: The beams so far.
        scores_RV: Log-probabilities of the next token of each of the B * W beams.
        end: Slot of the next token.
        made: Tokens each beam has.
        rules: Those of the request.

    Returns:
        The grown beams, (B, C), and the number of the beam each came from, (B, C).
    """
    W, V, S = sizes(running.scores)[1], sizes(scores_RV)[1], sizes(running.ids)[2]
    totals = tf.reshape(scores_RV, (-1, W, V)) + tf.expand_dims(running.scores, -1)
    count = min(max(2, 1 + rules.end_tokens) * W, W * V)
    scores, index = tf.math.top_k(tf.reshape(totals, (-1, W * V)), count)
    grown = running.pick(index // V)
    is_here = tf.range(S) == end
    ids = tf.where(is_here, tf.expand_dims(index % V, -1), grown.ids)
    return Beams(ids, scores, tf.zeros_like(grown.lengths) + made + 1), index // V


def finish_beams(
    finished: Beams,
    grown: Beams,
    ends_BC: tf.Tensor,
    made: int | tf.Tensor,
    is_open: tf.Tensor,
    rules: Rules,
) -> Beams:
    """The W best finished beams after some of the grown ones ended.

    Only a beam among the W best continuations may finish; the others are reserves.
    """
    W = sizes(finished.scores)[1]
    ends_BC &= tf.range(sizes(ends_BC)[1]) < W
    is_full = tf.reduce_all(finished.lengths > 0, 1, keepdims=True)
    closed = tf.logical_not(is_open) | (rules.is_full_enough & is_full)
    scores = grown.scores / _power(made + 1, rules)
    scores += tf.where(closed, NEG_INF, 0.0) + tf.where(ends_BC, 0.0, NEG_INF)
    grown = Beams(grown.ids, scores, tf.where(ends_BC, grown.lengths, 0))
    both = Beams(*(tf.concat(pair, 1) for pair in zip(finished, grown, strict=True)))
    return both.best(W)[0]


def can_improve(
    running: Beams,
    finished: Beams,
    made: int | tf.Tensor,
    limit: tf.Tensor,
    rules: Rules,
) -> tf.Tensor:
    """Whether a running beam could still beat a finished one, (B, 1).

    `early_stopping="never"` assumes the length that favours it most; otherwise its present one.
    """
    length = tf.where(rules.is_hopeful, limit, made)
    best = running.scores[:, :1] / _power(length, rules)
    worst = tf.reduce_min(finished.scores, 1, keepdims=True)
    return tf.reduce_any(best > tf.where(finished.lengths > 0, worst, NEG_INF), 1, keepdims=True)


def _power(length: int | tf.Tensor, rules: Rules) -> tf.Tensor:
    return tf.cast(length, tf.float32) ** rules.length_penalty


def run(
    model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any]
) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """All of a search: its best rows (R, S), the most tokens made, the largest scores at first."""
    found = prefill_prompts(model, inputs, rules.chunk, sizes(inputs["history"])[1])
    logits, cache = copy_rows(*found, rules.num_beams)
    state, best = _open(model, rules, inputs, logits, cache.keys, cache.values)
    return *_result(_loop(model, rules, inputs, state), rules), best


def _result(finished: Beams, rules: Any) -> tuple[tf.Tensor, tf.Tensor]:
    """Each prompt's best rows, and the tokens of the longest."""
    count, S = rules.num_return_sequences, sizes(finished.ids)[2]
    made = tf.reduce_max(finished.lengths[:, :count])
    return tf.reshape(finished.ids[:, :count], (-1, S)), made


def _start(model: "TFOPTForCausalLM", request: Request) -> tuple[dict[str, Any], _State]:
    """Reads the prompts and chooses the first tokens; the inputs of the programs that follow."""
    inputs = program_inputs(request, request.slots)
    logits, cache = read_prompts(model, request, request.slots, request.settings.num_beams)
    program = generation_program(model, request, _open)
    state, best = program(inputs, logits, cache.keys, cache.values)
    check_logits(best.numpy())
    return inputs, state


def _open(
    model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], logits_RV: tf.Tensor,
    keys: Any, values: Any,
) -> tuple[_State, tf.Tensor]:  # fmt: skip
    """The first token of each beam, and the largest score it was chosen by."""
    B, W = sizes(inputs["history"])[0], rules.num_beams
    none = Beams(
        tf.repeat(inputs["history"][:, None], W, 1),
        tf.fill((B, W), NEG_INF),
        tf.zeros((B, W), tf.int32),
    )
    # All beams start alike: only the first may be continued, or the same text would come W times.
    running = none._replace(scores=tf.repeat(tf.where(tf.range(W) == 0, 0.0, NEG_INF)[None], B, 0))
    is_open, is_done = tf.ones((B, 1), tf.bool), tf.constant(False)
    state = _State(tf.constant(0), running, none, is_open, is_done, keys, values)
    return _choose(logits_RV, rules, inputs, state, 0)


def _loop(model: "TFOPTForCausalLM", rules: Rules, inputs: dict[str, Any], state: _State) -> Beams:
    """Steps until nothing can change any more; the finished beams."""
    mask = tf.repeat(inputs["mask"], rules.num_beams, 0)

    def step(*parts: Any) -> _State:
        state = _State(*parts)
        end = inputs["prompt"] + state.made - 1
        last = tf.reshape(tf.gather(state.running.ids, end, axis=2), (-1,))
        cache = KVCache(state.keys, state.values, end, mask)
        logits, cache = loop.decode_step(model, last, cache)
        state = state._replace(keys=cache.keys, values=cache.values)
        return _choose(logits, rules, inputs, state, state.made)[0]

    return _State(
        *tf.while_loop(lambda *s: tf.logical_not(_State(*s).is_done), step, state)
    ).finished


def _choose(
    logits: tf.Tensor, rules: Rules, inputs: dict[str, Any], state: _State, made: int | tf.Tensor
) -> tuple[_State, tf.Tensor]:
    """Grows the beams by one token, and the largest score there was for each row."""
    B, W, S = sizes(state.running.ids)
    limit, end = rules.new_tokens, inputs["prompt"] + made
    mask = tf.repeat(inputs["mask"], W, 0) & (tf.range(S) < end)
    scores = tf.nn.log_softmax(loop.mask_vocabulary(logits, rules.vocabulary), -1)
    history = tf.reshape(state.running.ids, (-1, S))
    is_last = made + 1 == limit
    scores = filters.process_logits(sampling, scores, history, mask, end, made, rules, is_last)
    grown, parents = extend_beams(state.running, scores, end, made, rules)
    token = tf.gather(grown.ids, end, axis=2)
    ends = tf.gather(rules.ends, token) | is_last
    finished = finish_beams(state.finished, grown, ends, made, state.is_open, rules)
    open_scores = grown.scores + tf.where(ends, NEG_INF, 0.0)
    running, index = grown._replace(scores=open_scores).best(W)
    is_open = state.is_open & can_improve(running, finished, made + 1, limit, rules)
    is_done = tf.reduce_all(ends) | ~tf.reduce_any(is_open)
    is_done |= rules.is_full_enough & tf.reduce_all(finished.lengths > 0)
    parents = tf.gather(parents, index, batch_dims=1) + W * tf.range(B)[:, None]
    rows = tf.reshape(parents, (-1,))
    keys, values = (tuple(tf.gather(x, rows) for x in xs) for xs in (state.keys, state.values))
    state = _State(
        tf.convert_to_tensor(made + 1), running, finished, is_open, is_done, keys, values
    )
    return state, tf.reduce_max(scores, -1)
