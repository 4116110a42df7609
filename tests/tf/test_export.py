"""SavedModels and LiteRT models, which need nothing of ours."""

import functools
import os
import subprocess
import sys
import textwrap

import numpy as np
import pytest

pytest.importorskip("tensorflow")

import tensorflow as tf

from opt_core.errors import GenerationError
from opt_tf.export import export_saved_model, export_tflite
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tf_models import model_of
from tests.support.tiers import tiered

CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
"""One layer: an export traces all of them alike."""
EOS = list(range(40, 50))


EXPORTS = {
    "greedy": {"eos_token_id": EOS},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_p": 0.9, "num_return_sequences": 2},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "eos_token_id": EOS},
    "filters": {
        "repetition_penalty": 1.3, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9]],
        "min_new_tokens": 3, "eos_token_id": EOS,
    },
}  # fmt: skip


SERVE = """
    import sys
    class Blocked:
        def find_spec(self, name, *_):
            if name.partition(".")[0] in ("opt_tf", "opt_core"):
                raise ImportError(f"{name} is not to be needed here")
    sys.meta_path.insert(0, Blocked())
    import numpy as np, tensorflow as tf
    loaded, data = tf.saved_model.load(sys.argv[1]), np.load(sys.argv[2])
    out = {}
    for i in range(int(data["count"])):
        inputs = {
            "input_ids": tf.constant(data[f"ids{i}"]),
            "attention_mask": tf.constant(data[f"mask{i}"]),
        }
        out[f"logits{i}"] = loaded.signatures["forward"](**inputs)["logits"]
        if data["seeded"]:
            inputs["seed"] = tf.constant(5, tf.int64)
        out[f"ids{i}"] = loaded.signatures["generate"](**inputs)["sequences"]
    np.savez(sys.argv[3], **out)
"""


@pytest.fixture(scope="module")
def exported(folder, tmp_path_factory):
    """Makes (once) the export of a case: the model, its settings, and where it is."""
    made = {}

    def export(case):
        if case not in made:
            model, path = model_of(folder, CONFIG), tmp_path_factory.mktemp("saved")
            settings = {"max_new_tokens": 10, "eos_token_id": None, **EXPORTS[case]}
            export_saved_model(model, path, max_prompt=20, **settings)
            made[case] = (model, settings, path)
        return made[case]

    return export


@pytest.mark.parametrize("case", tiered(EXPORTS, lambda case: case == "sampling"))
def test_an_exported_model_needs_nothing_of_ours(exported, case, tmp_path):
    model, settings, saved = exported(case)
    prompts = {}
    for i, lengths in enumerate(([7, 3], [20, 1, 9])):
        mask = make_mask("left", lengths).astype(np.int32)
        prompts[f"ids{i}"] = make_prompts(model.config, *mask.shape).astype(np.int32)
        prompts[f"mask{i}"] = mask
    np.savez(tmp_path / "in.npz", count=2, seeded="do_sample" in settings, **prompts)
    files = [str(saved), *(str(tmp_path / name) for name in ("in.npz", "out.npz"))]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SERVE), *files],
        cwd=tmp_path, env=environment, check=True, capture_output=True,
    )  # fmt: skip
    out = np.load(tmp_path / "out.npz")
    for i in range(2):
        ids, mask = prompts[f"ids{i}"], prompts[f"mask{i}"]
        # Of fifty seeds, one meets a choice that rounding decides.
        ours = model.generate(ids, attention_mask=mask, seed=5, **settings)
        np.testing.assert_array_equal(out[f"ids{i}"], ours)
        logits = model(ids, attention_mask=mask).logits.numpy()
        seen = np.cumsum(mask, 1) > 0
        np.testing.assert_allclose(out[f"logits{i}"][seen], logits[seen], rtol=0, atol=2e-5)


@pytest.mark.parametrize(
    "case", tiered([case for case in EXPORTS if case != "sampling"], lambda case: case == "beams")
)
def test_a_lite_model_has_built_in_operations_only(folder, case, tmp_path):
    """LiteRT's interpreter here has no others."""
    model = model_of(folder, CONFIG)
    settings = {"max_new_tokens": 10, "eos_token_id": None, **EXPORTS[case]}
    export_tflite(model, tmp_path / "model.tflite", max_prompt=20, **settings)
    lite = tf.lite.Interpreter(str(tmp_path / "model.tflite"))
    for lengths in ([7, 3], [20, 1, 9]):
        mask = make_mask("left", lengths).astype(np.int32)
        ids = make_prompts(model.config, *mask.shape).astype(np.int32)
        inputs = {"input_ids": ids, "attention_mask": mask}
        out = lite.get_signature_runner("generate")(**inputs)["sequences"]
        np.testing.assert_array_equal(out, model.generate(**inputs, **settings))
        logits = lite.get_signature_runner("forward")(**inputs)["logits"]
        expected, seen = model(**inputs).logits.numpy(), np.cumsum(mask, 1) > 0
        np.testing.assert_allclose(logits[seen], expected[seen], rtol=0, atol=2e-5)
    with pytest.raises(GenerationError, match="do_sample=True cannot be exported to LiteRT"):
        export_tflite(model, tmp_path / "x", 9, max_new_tokens=3, do_sample=True)


def test_an_exported_model_refuses_what_it_cannot_take(exported):
    *_, saved = exported("sampling")
    generate = tf.saved_model.load(saved).signatures["generate"]
    generate = functools.partial(generate, seed=tf.constant(5, tf.int64))
    ids = tf.constant(make_prompts(CONFIG, 2, 20), tf.int32)
    mask = tf.ones_like(ids)
    generate(input_ids=ids, attention_mask=mask)
    for bad_ids, bad_mask in (
        (tf.concat([ids, ids], 1), tf.concat([mask, mask], 1)),
        (ids + 95, mask),
        (ids - 9, mask),
        (ids, tf.constant(make_mask("right", [20, 5]), tf.int32)),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError):
            generate(input_ids=bad_ids, attention_mask=bad_mask)


EXPORT_ERRORS = {
    "no length": ({}, "max_new_tokens: an export needs it"),
    "stops": ({"max_new_tokens": 3, "stop_strings": "x"}, "stop_strings cannot be exported"),
    "too long": ({"max_new_tokens": 505}, "9 tokens and 505 new.*max_position_embeddings=512"),
}


@pytest.mark.parametrize("case", EXPORT_ERRORS)
def test_what_cannot_be_exported(folder, case, tmp_path):
    settings, message = EXPORT_ERRORS[case]
    with pytest.raises(GenerationError, match=message):
        export_saved_model(model_of(folder, CONFIG), tmp_path, max_prompt=9, **settings)


def test_a_saved_model_beside_the_weights(folder, tmp_path):
    """`save_pretrained(saved_model=True)`, and TensorFlow Serving's default signature."""
    model = model_of(folder, CONFIG)
    model.save_pretrained(tmp_path, saved_model=True)
    serve = tf.saved_model.load(tmp_path / "saved_model" / "1").signatures["serving_default"]
    ids = make_prompts(CONFIG, 2, 6).astype(np.int32)
    out = serve(input_ids=tf.constant(ids), attention_mask=tf.ones_like(ids))
    assert list(out) == ["logits"]
    np.testing.assert_allclose(out["logits"], model(ids).logits, atol=1e-5)
    fresh = type(model).from_config(model.config)
    assert fresh.config is model.config
