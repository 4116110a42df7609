"""Whole programs as users write them for `transformers` and for NNX, with the import changed."""

from functools import partial
from typing import Any

import numpy as np
import pytest

pytest.importorskip("jax")

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from flax.training import train_state
from flax.traverse_util import flatten_dict, unflatten_dict

from opt_flax import FlaxOPTForCausalLM
from tests.support.files.tiny_folder import save_model

transformers = pytest.importorskip("transformers")
SENTENCES = [
    "I like you.",
    "The quick brown fox jumps over the lazy dog.",
    "Hello world, the dog sleeps.",
    "My dog is older than yours.",
]
RATE = 0.02


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without dropout and its tokenizer."""
    folder = tmp_path_factory.mktemp("user") / "opt"
    return str(save_model(folder, dropout=0.0, num_hidden_layers=1))


@pytest.fixture(scope="module")
def blocks(home: str) -> Any:
    """(8, 6) ids: texts end to end, cut into blocks."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    ids = np.concatenate([tokenizer(text)["input_ids"] for text in SENTENCES * 2])
    return ids[: 8 * 6].reshape(8, 6).astype(np.int32)


@pytest.fixture(scope="module")
def expected(home: str, blocks: Any) -> list[float]:
    """Losses of the same training in PyTorch, by transformers."""
    torch = pytest.importorskip("torch")
    model = transformers.OPTForCausalLM.from_pretrained(home)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    ids, losses = torch.tensor(blocks, dtype=torch.long), []
    for _ in range(3):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.01
    return losses


class TrainState(train_state.TrainState):
    dropout_rng: Any


def test_a_train_state_on_eight_devices(home, blocks, expected, tmp_path):
    """A language model is trained data-parallel, its parameters outside of the model."""
    model = FlaxOPTForCausalLM.from_pretrained(home, seed=42, dtype=jnp.float32)

    def decay_mask(params: Any) -> Any:
        leaves = flatten_dict(params)
        return unflatten_dict({path: path[-1] not in ("bias", "scale") for path in leaves})

    optimizer = optax.chain(optax.add_decayed_weights(0.0, decay_mask), optax.sgd(RATE))
    state = TrainState.create(
        apply_fn=model.__call__, params=model.params, tx=optimizer,
        dropout_rng=jax.random.PRNGKey(0),
    )  # fmt: skip

    def mean_loss(logits: Any, labels: Any) -> Any:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    @partial(jax.pmap, axis_name="batch", in_axes=(None, 0), out_axes=None)
    def train_step(state: Any, batch: Any) -> Any:
        key, following = jax.random.split(state.dropout_rng)
        batch = dict(batch)
        labels = batch.pop("labels")

        def compute_loss(params: Any) -> Any:
            logits = state.apply_fn(**batch, params=params, dropout_rng=key, train=True)[0]
            return mean_loss(logits, labels)

        loss, gradients = jax.value_and_grad(compute_loss)(state.params)
        gradients = jax.lax.pmean(gradients, "batch")
        state = state.apply_gradients(grads=gradients, dropout_rng=following)
        return state, {"loss": jax.lax.pmean(loss, "batch")}

    count = jax.local_device_count()
    assert count == 8
    sharded = blocks.reshape(count, 1, -1)
    batch = {"input_ids": sharded, "attention_mask": np.ones_like(sharded), "labels": sharded}
    losses = []
    for _ in range(3):
        state, metrics = train_step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)
    params = jax.device_get(state.params)
    model.save_pretrained(tmp_path / "trained", params=params)
    again = FlaxOPTForCausalLM.from_pretrained(tmp_path / "trained")
    trained = jax.jit(lambda ids: again(ids, labels=ids).loss)(blocks)
    assert float(trained) < losses[-1]


def test_an_nnx_loop(home, blocks, expected):
    """The model as NNX' own: an optimizer holds it, a jitted step changes both in place."""
    model = FlaxOPTForCausalLM.from_pretrained(home)
    optimizer = nnx.Optimizer(model, optax.sgd(RATE), wrt=nnx.Param)

    @nnx.jit
    def train_step(model: Any, optimizer: Any, ids: Any) -> Any:
        loss, gradients = nnx.value_and_grad(lambda model: model(ids, labels=ids).loss)(model)
        optimizer.update(model, gradients)
        return loss

    model.train()
    losses = [float(train_step(model, optimizer, jnp.asarray(blocks))) for _ in range(3)]
    model.eval()
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-4)


def test_texts_are_generated(home):
    """A script that keeps the parameters beside the model, in half precision and not."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(home, padding_side="left")
    load: Any = FlaxOPTForCausalLM.from_pretrained
    model, params = load(home, _do_init=False)
    inputs = tokenizer(SENTENCES[:2], padding=True, return_tensors="np")
    options = {"max_new_tokens": 3, "do_sample": False}
    ids = np.asarray(model.generate(**inputs, params=params, **options))
    assert ids.shape == (2, inputs["input_ids"].shape[1] + 3)
    assert all(tokenizer.batch_decode(ids, skip_special_tokens=True))
    theirs = transformers.OPTForCausalLM.from_pretrained(home)
    expected = theirs.generate(**inputs.convert_to_tensors("pt"), **options)
    np.testing.assert_array_equal(ids, expected)
    assert (
        model.to_bf16(params)["model"]["decoder"]["embed_tokens"]["embedding"].dtype == "bfloat16"
    )
