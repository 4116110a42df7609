"""The engine of serving: rows of one cache, each of its own length and with rules of its own.

`opt_core.serving.scheduler` says what it does when. There is one program for each width of the
cache; rows that come and go only change its inputs.
"""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array, lax

from opt_core.generation import filters
from opt_core.generation.request import Request
from opt_core.generation.rules import Rules, Structure
from opt_core.serving import engine
from opt_core.serving.engine import ALTERNATIVES, Chosen, RowRules, Scores, Table, structures
from opt_flax.cache import KVCache
from opt_flax.generation import loop, sampling
from opt_flax.serving.cache import RowsCache
from opt_flax.sharding import replicate

if TYPE_CHECKING:
    from opt_flax.modeling import FlaxOPTForCausalLM


class _Rows(NamedTuple):
    """Inputs of the choice of X rows' tokens: see `Table` and `RowRules`.

    Attributes:
        ids: (X, T) their tokens, and any behind them.
        counts: (X,) how many there are.
        made: (X,) how many were generated.
        is_scored: bool (X,).
        kinds: (X,) which structure of the rules is theirs; -1: no token is chosen.
        keys: Their sources of random numbers.
        numbers: Those of their rules.
    """

    ids: Any
    counts: Any
    made: Any
    is_scored: Any
    kinds: Any
    keys: Any
    numbers: Any


class Engine(engine.Engine):
    """A model with a cache of R rows; see `opt_core.serving.engine.Engine`."""

    is_compiled: ClassVar[bool] = True

    def __init__(self, model: "FlaxOPTForCausalLM", slots: int):
        super().__init__(model, slots)
        cache = model.init_cache(slots, self.width)
        self.keys, self.values = cache.keys, cache.values
        self.graph, self.state = nnx.split(model)
        self.rules = RowRules.allocate(slots, model.config.vocab_size)
        self.numbers: Any = None

    def place(self, slot: int, request: Request) -> None:
        """Gives a row another request's rules, and its own source of random numbers."""
        self.rules.place(slot, request)
        self.numbers = None  # those on the device are no longer these

    def resize(self, width: int) -> None:
        """Gives every row another number of cache slots."""
        if width != self.width:
            self.keys, self.values = _resize((self.keys, self.values), width, self.model.mesh)
            self.width = width

    def copy(self, source: int, target: int, count: int) -> None:
        """Copies the first tokens of one row's cache to another row."""
        buffers = self.keys, self.values
        self.keys, self.values = _copy(buffers, np.int32(source), np.int32(target))

    def read(
        self, table: Table, slot: int, start: int, end: int, chunk: int, scores_prompt: bool
    ) -> tuple[Chosen | None, Scores | None]:
        """Reads some tokens of a row into its cache."""
        last = table.ids.shape[1] - 1
        places = np.minimum(np.arange(start, start + chunk, dtype=np.int32), last - 1)
        logits, hidden, self.keys, self.values = _read(
            self.graph, self.state, self.keys, self.values, np.int32(slot), np.int32(start),
            np.int32(end), places, table.ids[slot, places],
        )  # fmt: skip
        chosen = scores = None
        if scores_prompt:
            scores = _score(self.graph, self.state, hidden, table.ids[slot, places + 1])
        if end == table.counts[slot]:
            chosen = _choose(self._rows(table, np.array([True]), slot), logits)
        return _on_host(chosen), _on_host(scores)

    def step(self, table: Table) -> Chosen:
        """Reads the newest token of every active row and chooses the next."""
        logits, self.keys, self.values = _step(
            self.graph, self.state, self.keys, self.values, table.newest, table.held
        )
        return _on_host(_choose(self._rows(table, table.is_active), logits))

    def _rows(self, table: Table, is_chosen: Any, slot: int | None = None) -> _Rows:
        if self.numbers is None:
            keys = jnp.stack([sampling.make_key(int(seed)) for seed in self.rules.seeds])
            self.numbers = keys, {n: jnp.asarray(x) for n, x in self.rules.numbers.items()}
        keys, numbers = self.numbers
        each: Any = (table.ids, table.counts, table.made, table.is_scored, self.rules.kinds)
        if slot is not None:
            each = tuple(x[slot : slot + 1] for x in each)
            keys, numbers = _row((keys, numbers), np.int32(slot))
        rows = _Rows(*each, keys=keys, numbers=numbers)
        return rows._replace(kinds=np.where(is_chosen, rows.kinds, -1).astype(np.int32))


@partial(jax.jit, static_argnames="graph", donate_argnames=("keys", "values"))
def _step(
    graph: Any, state: Any, keys: tuple[Array, ...], values: tuple[Array, ...], newest_R: Array,
    held_R: Array,
) -> tuple[Array, tuple[Array, ...], tuple[Array, ...]]:  # fmt: skip
    """Logits (R, V) behind the newest token of every row, and the buffers with it."""
    model, width = nnx.merge(graph, state), keys[0].shape[2]
    decoder, window = model.get_decoder(), model.config.max_position_embeddings
    seen = jnp.arange(width) <= held_R[:, None]
    cache = RowsCache(keys, values, width - 1, places=held_R)
    embeds, positions = decoder.embed_tokens(newest_R[:, None]), held_R.clip(max=window - 1)
    out = decoder(embeds, positions[:, None], seen, cache, deterministic=True)
    cache, logits = out.past_key_values, model.compute_logits(out.last_hidden_state[:, 0])
    return replicate(logits, model.mesh), cache.keys, cache.values


@partial(jax.jit, static_argnames="graph", donate_argnames=("keys", "values"))
def _read(
    graph: Any, state: Any, keys: tuple[Array, ...], values: tuple[Array, ...], slot: Array,
    start: Array, end: Array, places_T: Array, ids_T: Array,
) -> tuple[Array, Array, tuple[Array, ...], tuple[Array, ...]]:  # fmt: skip
    """Logits (1, V) behind the token before `end`, all hidden states, and the buffers."""
    model = nnx.merge(graph, state)
    decoder = model.get_decoder()
    one = KVCache(*_row((keys, values), slot), length=start)
    out = decoder(decoder.embed_tokens(ids_T[None]), places_T[None], None, one, deterministic=True)
    hidden, cache = out.last_hidden_state[0], out.past_key_values
    logits = model.compute_logits(lax.dynamic_slice_in_dim(hidden, end - start - 1, 1, 0))
    keys, values = jax.tree.map(
        lambda buffer, new: lax.dynamic_update_slice_in_dim(buffer, new, slot, 0),
        (keys, values), (cache.keys, cache.values),
    )  # fmt: skip
    return replicate(logits, model.mesh), hidden, keys, values


@partial(jax.jit, static_argnames="graph")
def _score(graph: Any, state: Any, hidden_TP: Array, ids_T: Array) -> Scores:
    """Scores of the tokens behind each."""
    model = nnx.merge(graph, state)
    return _scores(replicate(model.compute_logits(hidden_TP), model.mesh), ids_T)


@partial(jax.jit, donate_argnames="buffers")
def _copy(buffers: Any, source: Array, target: Array) -> Any:
    """The buffers with a row's tokens in another row too."""
    return jax.tree.map(
        lambda x, row: lax.dynamic_update_slice_in_dim(x, row, target, 0),
        buffers, _row(buffers, source),
    )  # fmt: skip


@partial(jax.jit, static_argnames=("width", "mesh"))
def _resize(buffers: Any, width: int, mesh: Any) -> Any:
    """The buffers with another number of slots."""
    keys, values = buffers
    count = min(width, keys[0].shape[2])
    cache = KVCache(keys, values, count).resize(keys[0].shape[0], width, mesh)
    return cache.keys, cache.values


@jax.jit
def _row(arrays: Any, slot: Array) -> Any:
    """One row (1, ...) of each array."""
    return jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, slot, 1, 0), arrays)


@jax.jit
def _choose(rows: _Rows, logits_XV: Array) -> Chosen:
    """Chooses as each row alone would, (1, V) logits at a time; those without a kind get nothing.

    All rows are one loop: there is one program, whatever rows there are.
    """

    def choose(inputs: tuple[_Rows, Array]) -> Chosen:
        row, raw = inputs[0], inputs[1][None]
        begin, bias = row.numbers["begin_bias"], row.numbers["bias"]
        numbers = row.numbers | {"bias": jnp.where(row.made == 0, begin, bias)}
        is_there = (jnp.arange(len(row.ids)) < row.counts)[None]
        rules = Rules(Structure(), numbers)
        logits = loop.mask_vocabulary(raw, rules.vocabulary)
        logits = filters.process_logits(
            sampling, logits, row.ids[None], is_there, row.counts, row.made, rules
        )
        select = [
            partial(
                filters.select_tokens, sampling, rules=Rules(kind, numbers),
                source=jax.random.fold_in(row.keys, row.made),
            )
            for kind in structures(row.numbers["bias"].shape[0])
        ]  # fmt: skip
        token = lax.switch(row.kinds, select, logits)
        scores = lax.cond(row.is_scored, _scores, partial(_nothing, _scores), raw, token)
        return Chosen(token[0], logits.max(), Scores(*(x[0] for x in scores)))

    def choose_or_not(inputs: tuple[_Rows, Array]) -> Chosen:
        return lax.cond(inputs[0].kinds < 0, partial(_nothing, choose), choose, inputs)

    return lax.map(choose_or_not, (rows, logits_XV))


def _scores(logits_XV: Array, ids_X: Array) -> Scores:
    """How likely each of some tokens is, and the likeliest at its place."""
    logprobs_XV = jax.nn.log_softmax(logits_XV.astype(jnp.float32), -1)
    best, ids = lax.top_k(logprobs_XV, min(ALTERNATIVES, logits_XV.shape[1]))
    logprob = jnp.take_along_axis(logprobs_XV, ids_X[:, None], 1)[:, 0]
    return Scores(logprob, ids, best)


def _nothing(function: Callable[..., Any], *arguments: Any) -> Any:
    """Zeros in place of a function's result."""
    shapes = jax.eval_shape(function, *arguments)
    return jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)


def _on_host(values: Any) -> Any:
    return jax.tree.map(np.asarray, values)
