"""Whole programs as users write them for `transformers`' TensorFlow models, the import changed."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("tensorflow")

from opt_tf import TFOPTForCausalLM  # isort: skip  it chooses Keras' backend
import keras
import tensorflow as tf

from tests.support.files.tiny_folder import save_model

transformers = pytest.importorskip("transformers")
SENTENCES = [
    "I like you.",
    "The quick brown fox jumps over the lazy dog.",
    "Hello world, the dog sleeps.",
]
RATE = 0.02


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A model without dropout and its tokenizer."""
    folder = tmp_path_factory.mktemp("user") / "opt"
    return str(save_model(folder, dropout=0.0, num_hidden_layers=1))


class Server(tf.Module):
    """Serves a model: texts become ids before it is asked."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    @tf.function(
        input_signature=[
            tf.TensorSpec((None, 8), tf.int32, "input_ids"),
            tf.TensorSpec((None, 8), tf.int32, "attention_mask"),
        ]
    )
    def serving(self, input_ids: Any, attention_mask: Any) -> dict[str, Any]:
        """Ids of the prompts and what follows."""
        return {
            "sequences": self.model.generate(
                input_ids=input_ids, attention_mask=attention_mask, max_new_tokens=3
            )
        }


def test_a_module_that_serves_texts(home, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(home, padding_side="left")
    server = Server(TFOPTForCausalLM.from_pretrained(home))
    tf.saved_model.save(server, str(tmp_path / "1"), signatures={"serving_default": server.serving})
    serve = tf.saved_model.load(str(tmp_path / "1")).signatures["serving_default"]
    theirs = transformers.OPTForCausalLM.from_pretrained(home)
    for count in (1, 2):
        texts = ["I like", "The dog"][:count]
        inputs = tokenizer(texts, padding="max_length", max_length=8, return_tensors="np")
        tensors = {name: tf.constant(value, tf.int32) for name, value in inputs.items()}
        ids = serve(**tensors)["sequences"].numpy()
        expected = theirs.generate(
            **inputs.convert_to_tensors("pt"), max_new_tokens=3, do_sample=False
        )
        np.testing.assert_array_equal(ids, expected)
        assert all(tokenizer.batch_decode(ids, skip_special_tokens=True))


def test_a_script_that_fine_tunes(home, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    model = TFOPTForCausalLM.from_pretrained(home)
    rows = [dict(tokenizer(text)) for text in SENTENCES]
    rows = [row | {"labels": row["input_ids"]} for row in rows]
    data = model.prepare_tf_dataset(rows, batch_size=3, shuffle=False, tokenizer=tokenizer)
    model.compile(optimizer=keras.optimizers.SGD(RATE), jit_compile=False)
    losses = model.fit(data, validation_data=data, epochs=3, verbose=0).history
    model.save_pretrained(tmp_path / "trained")
    again = TFOPTForCausalLM.from_pretrained(tmp_path / "trained")
    batch, labels = next(iter(data))
    loss = again(batch, labels=labels)["loss"]
    assert float(loss) == pytest.approx(losses["val_loss"][-1], abs=1e-5)

    torch = pytest.importorskip("torch")
    theirs = transformers.OPTForCausalLM.from_pretrained(home)
    optimizer = torch.optim.SGD(theirs.parameters(), lr=RATE)
    given = {name: torch.tensor(value.numpy()).long() for name, value in batch.items()}
    expected = []
    for _ in range(3):
        found = theirs(**given, labels=torch.tensor(labels.numpy()).long()).loss
        found.backward()
        optimizer.step()
        optimizer.zero_grad()
        expected.append(found.item())
    assert expected[-1] < expected[0] - 0.01
    np.testing.assert_allclose(losses["loss"], expected, rtol=0, atol=1e-4)


def test_a_notebook_that_generates(home):
    tokenizer = transformers.AutoTokenizer.from_pretrained(home)
    model = TFOPTForCausalLM.from_pretrained(home)
    model.config.pad_token_id = tokenizer.pad_token_id
    inputs = tokenizer("I like", return_tensors="np")
    output = model.generate(**inputs, max_new_tokens=3)
    theirs = transformers.OPTForCausalLM.from_pretrained(home)
    expected = theirs.generate(**inputs.convert_to_tensors("pt"), max_new_tokens=3, do_sample=False)
    assert tokenizer.decode(output[0].numpy()) == tokenizer.decode(expected[0])
    tf.random.set_seed(0)
    first = model.generate(**inputs, max_new_tokens=3, do_sample=True, top_k=50, top_p=0.95)
    tf.random.set_seed(0)
    again = model.generate(**inputs, max_new_tokens=3, do_sample=True, top_k=50, top_p=0.95)
    np.testing.assert_array_equal(first, again)
