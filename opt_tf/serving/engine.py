"""The engine of serving: rows of one cache, each of its own length and with rules of its own.

`opt_core.serving.scheduler` says what it does when. There is one program for each width of the
cache; rows that come and go only change its inputs.
"""

from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import keras
import numpy as np
import tensorflow as tf

from opt_core.generation import filters
from opt_core.generation.request import Request
from opt_core.generation.rules import Rules, Structure
from opt_core.serving import engine
from opt_core.serving.engine import ALTERNATIVES, Chosen, RowRules, Scores, Table, structures
from opt_tf.cache import KVCache
from opt_tf.compilation import compiled
from opt_tf.generation import loop, sampling
from opt_tf.linear import sizes
from opt_tf.serving.cache import RowCache, RowsCache, contents, make_variables

if TYPE_CHECKING:
    from opt_tf.modeling import TFOPTForCausalLM


class _Rows(NamedTuple):
    """Inputs of the choice of X rows' tokens: see `Table` and `RowRules`.

    Attributes:
        ids: (X, T) their tokens, and any behind them.
        counts: (X,) how many there are.
        made: (X,) how many were generated.
        is_scored: bool (X,).
        kinds: (X,) which structure of the rules is theirs; -1: no token is chosen.
        seeds: (X,) those of their random numbers.
        numbers: Those of their rules.
    """

    ids: Any
    counts: Any
    made: Any
    is_scored: Any
    kinds: Any
    seeds: Any
    numbers: Any


class Engine(engine.Engine):
    """A model with a cache of R rows; see `opt_core.serving.engine.Engine`."""

    is_compiled: ClassVar[bool] = True

    def __init__(self, model: "TFOPTForCausalLM", slots: int):
        super().__init__(model, slots)
        cache = model.init_cache(slots, self.width)
        self.keys, self.values = make_variables((cache.keys, cache.values))
        self.rules = RowRules.allocate(slots, model.config.vocab_size)
        self.numbers: Any = None

    def place(self, slot: int, request: Request) -> None:
        """Gives a row another request's rules, and its own source of random numbers."""
        self.rules.place(slot, request)
        self.numbers = None  # those on the device are no longer these

    def resize(self, width: int) -> None:
        """Gives every row another number of cache slots."""
        if width != self.width:
            buffers = self.keys, self.values
            wide = compiled(self.model, _resize, self.width, width)(*buffers)
            tf.nest.map_structure(lambda buffer, new: buffer.assign(new), buffers, wide)
            self.width = width

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first tokens of one row's cache to another row."""
        buffers = self.keys, self.values
        program = compiled(self.model, _copy, self.width)
        program(buffers, _number(source), _number(target))

    def read(
        self, table: Table, slot: int, start: int, end: int, chunk: int, scores_prompt: bool
    ) -> tuple[Chosen | None, Scores | None]:
        """Reads some tokens of a row into its cache."""
        last = table.ids.shape[1] - 1
        places = np.minimum(np.arange(start, start + chunk, dtype=np.int32), last - 1)
        logits, hidden = compiled(self.model, _read, self.width)(
            self.keys, self.values, _number(slot), _number(start), _number(end),
            tf.constant(places), tf.constant(table.ids[slot, places]),
        )  # fmt: skip
        chosen = scores = None
        if scores_prompt:
            following = tf.constant(table.ids[slot, places + 1])
            scores = compiled(self.model, _score)(hidden, following)
        if end == table.counts[slot]:
            rows = self._rows(table, np.array([True]), slot)
            chosen = compiled(self.model, _choose)(rows, logits)
        return _on_host(chosen), _on_host(scores)

    def step(self, table: Table) -> Chosen:
        """Reads the newest token of every active row and chooses the next."""
        logits = compiled(self.model, _step, self.width)(
            self.keys, self.values, tf.constant(table.newest), tf.constant(table.held)
        )
        rows = self._rows(table, table.is_active)
        return _on_host(compiled(self.model, _choose)(rows, logits))

    def _rows(self, table: Table, is_chosen: Any, slot: int | None = None) -> _Rows:
        if self.numbers is None:
            numbers = {name: tf.constant(x) for name, x in self.rules.numbers.items()}
            self.numbers = tf.constant(self.rules.seeds), numbers
        seeds, numbers = self.numbers
        each: Any = (table.ids, table.counts, table.made, table.is_scored, self.rules.kinds)
        if slot is not None:
            each = tuple(x[slot : slot + 1] for x in each)
            seeds, numbers = tf.nest.map_structure(lambda x: x[slot : slot + 1], (seeds, numbers))
        rows = _Rows(*each, seeds=seeds, numbers=numbers)
        rows = rows._replace(kinds=np.where(is_chosen, rows.kinds, -1).astype(np.int32))
        return tf.nest.map_structure(tf.convert_to_tensor, rows)


def _step(
    model: "TFOPTForCausalLM", width: int, keys: Any, values: Any, newest_R: tf.Tensor,
    held_R: tf.Tensor,
) -> tf.Tensor:  # fmt: skip
    """Logits (R, V) behind the newest token of every row; the buffers have it then."""
    decoder, window = model.get_decoder(), model.config.max_position_embeddings
    seen = tf.range(width) <= held_R[:, None]
    cache = RowsCache(keys, values, width - 1, width=width, places=held_R)
    embeds, positions = decoder.embed_tokens(newest_R[:, None]), tf.minimum(held_R, window - 1)
    out = decoder(
        embeds, position_ids=positions[:, None], mask_BS=seen, cache=cache, training=False
    )
    return model.compute_logits(out.last_hidden_state[:, 0])


def _read(
    model: "TFOPTForCausalLM", width: int, keys: Any, values: Any, slot: tf.Tensor,
    start: tf.Tensor, end: tf.Tensor, places_T: tf.Tensor, ids_T: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:  # fmt: skip
    """Logits (1, V) behind the token before `end`, and all hidden states."""
    decoder = model.get_decoder()
    one = RowCache(keys, values, start, width=width, row=slot)
    embeds, positions = decoder.embed_tokens(ids_T[None]), places_T[None]
    out = decoder(embeds, position_ids=positions, mask_BS=None, cache=one, training=False)
    hidden = out.last_hidden_state[0]
    return model.compute_logits(tf.gather(hidden, (end - start - 1)[None])), hidden


def _score(model: "TFOPTForCausalLM", hidden_TP: tf.Tensor, ids_T: tf.Tensor) -> Scores:
    """Scores of the tokens behind each."""
    return _scores(model.compute_logits(hidden_TP), ids_T)


def _copy(
    model: "TFOPTForCausalLM", width: int, buffers: Any, source: tf.Tensor, target: tf.Tensor
) -> None:
    """Puts a row's tokens into another row too."""
    write: Any = keras.ops.slice_update
    for buffer in tf.nest.flatten(buffers):
        value = contents(buffer, width)
        buffer.assign(write(value, (target, 0, 0, 0), tf.gather(value, source[None])))


def _resize(
    model: "TFOPTForCausalLM", old: int, width: int, keys: Any, values: Any
) -> tuple[tuple[tf.Tensor, ...], tuple[tf.Tensor, ...]]:
    """The buffers with another number of slots."""
    keys, values = (tuple(contents(x, old) for x in buffers) for buffers in (keys, values))
    cache = KVCache(keys, values, min(old, width)).resize(sizes(keys[0])[0], width)
    return cache.keys, cache.values


def _choose(model: "TFOPTForCausalLM", rows: _Rows, logits_XV: tf.Tensor) -> Chosen:
    """Chooses as each row alone would, (1, V) logits at a time; those without a kind get nothing.

    All rows are one loop: there is one program, whatever rows there are.
    """
    vocab_size = sizes(logits_XV)[1]
    count = min(ALTERNATIVES, vocab_size)

    def no_scores() -> Scores:
        return Scores(tf.zeros(1), tf.zeros((1, count), tf.int32), tf.zeros((1, count)))

    def choose(row: _Rows, raw: tf.Tensor) -> Chosen:
        begin, bias = row.numbers["begin_bias"], row.numbers["bias"]
        numbers = row.numbers | {"bias": tf.where(row.made == 0, begin, bias)}
        is_there = (tf.range(sizes(row.ids)[0]) < row.counts)[None]
        rules = Rules(Structure(), numbers)
        logits = loop.mask_vocabulary(raw, rules.vocabulary)
        logits = filters.process_logits(
            sampling, logits, row.ids[None], is_there, row.counts, row.made, rules
        )
        seed = tf.stack([row.seeds, tf.cast(row.made, tf.int64)])
        select = [
            partial(filters.select_tokens, sampling, logits, Rules(kind, numbers), seed)
            for kind in structures(vocab_size)
        ]
        token = tf.switch_case(row.kinds, select)
        scores = tf.cond(row.is_scored, partial(_scores, raw, token), no_scores)
        return Chosen(token[0], tf.reduce_max(logits), Scores(*(x[0] for x in scores)))

    def choose_or_not(inputs: tuple[_Rows, tf.Tensor]) -> Chosen:
        row, raw = inputs[0], inputs[1][None]
        nothing = Chosen(tf.constant(0), tf.constant(0.0), Scores(*(x[0] for x in no_scores())))
        return tf.cond(row.kinds < 0, lambda: nothing, partial(choose, row, raw))

    number, many = tf.TensorSpec((), tf.float32), tf.TensorSpec((count,), tf.float32)
    ids = tf.TensorSpec((count,), tf.int32)
    kinds = Chosen(tf.TensorSpec((), tf.int32), number, Scores(number, ids, many))
    return tf.map_fn(choose_or_not, (rows, logits_XV), fn_output_signature=kinds)


def _scores(logits_XV: tf.Tensor, ids_X: tf.Tensor) -> Scores:
    """How likely each of some tokens is, and the likeliest at its place."""
    logprobs_XV = tf.nn.log_softmax(tf.cast(logits_XV, tf.float32), -1)
    best, ids = tf.math.top_k(logprobs_XV, min(ALTERNATIVES, sizes(logits_XV)[1]))
    return Scores(tf.gather(logprobs_XV, ids_X, batch_dims=1), ids, best)


def _number(value: int) -> tf.Tensor:
    return tf.constant(value, tf.int32)


def _on_host(values: Any) -> Any:
    return tf.nest.map_structure(lambda x: x if x is None else x.numpy(), values)
