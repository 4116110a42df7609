"""Generation: against the oracle, and against itself cut, padded, batched and streamed."""

import itertools

import numpy as np
import pytest

from opt_core.errors import GenerationError, InputError
from opt_core.generation.config import GenerationConfig
from tests.support import oracle, oracle_generation
from tests.support.configs import CONFIGS
from tests.support.oracle_generation import Settings
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered

pytestmark = pytest.mark.dealt

PAD = 1
PLAIN = {"eos_token_id": None, "max_new_tokens": 24}


@pytest.mark.parametrize(
    "variant", [pytest.param("pre_ln", marks=pytest.mark.xla), "post_ln", "galactica"]
)
def test_greedy_equals_the_oracle(backend, load, variant):
    """256 tokens, checked in one uncached pass of the oracle: each is its predecessor's argmax."""
    config = CONFIGS[variant]
    ids = make_prompts(config, 2, 9)
    model = load(variant)
    out = backend.generate(model, ids, max_new_tokens=256, eos_token_id=None)
    logits = oracle.forward(oracle.random_params(config), config, out).logits
    np.testing.assert_array_equal(out[:, 9:], logits[:, 8:-1].argmax(-1))
    assert len(set(out[0, 9:].tolist())) > 12, "the text is stuck: this test proves nothing"


FILTERS = {
    "repetition": {"repetition_penalty": 1.3},
    "ngram": {"no_repeat_ngram_size": 2},
    "trigram": {"no_repeat_ngram_size": 3},
    "bad_words": {"bad_words_ids": [[52], [51, 51], [15, 15, 52], [92, 92]]},
    "suppress": {"suppress_tokens": list(range(10, 60))},
    "begin": {"begin_suppress_tokens": list(range(3, 90))},
    "min_new": {"min_new_tokens": 6, "eos_token_id": list(range(2, 80))},
    "min_length": {"min_length": 13, "eos_token_id": list(range(2, 80))},
    "several_eos": {"eos_token_id": list(range(40, 70)), "pad_token_id": PAD},
    "sequence_bias": {"sequence_bias": [[[52], 3.0], [[51, 7], 9.0], [[15, 15, 52], -9.0]]},
    "forced_end": {"forced_eos_token_id": 7},
    "decay": {
        "exponential_decay_length_penalty": (4, 1.3), "eos_token_id": list(range(2, 60)),
    },
    "all": {
        "repetition_penalty": 1.2, "no_repeat_ngram_size": 2, "bad_words_ids": [[7], [8, 9]],
        "suppress_tokens": [5], "begin_suppress_tokens": [6], "min_new_tokens": 3,
        "eos_token_id": list(range(60, 99)),
    },
}  # fmt: skip


ALONE = ("repetition", "trigram", "bad_words", "min_length", "several_eos")


@pytest.mark.parametrize(
    ("name", "padded"),
    tiered(
        itertools.product(FILTERS, [False, True]),
        lambda name, padded: name == "all" or padded == (name not in ALONE),
    ),
)
def test_filters_equal_the_oracle(backend, load, name, padded):
    config, settings = CONFIGS["pre_ln"], FILTERS[name]
    ids = make_prompts(config, 4, 9)
    mask = make_mask("left", [9, 4, 7, 2]) if padded else None
    model = load("pre_ln")
    ours = backend.generate(model, ids, attention_mask=mask, **{**PLAIN, **settings})
    values = {k: v for k, v in settings.items() if k not in ("eos_token_id", "pad_token_id")}
    theirs = oracle_generation.greedy(
        oracle.random_params(config), config, ids, mask, max_new_tokens=24,
        settings=Settings(
            eos_token_ids=settings.get("eos_token_id", ()), max_new_tokens=24, **values
        ),
    )  # fmt: skip
    np.testing.assert_array_equal(ours, theirs)
    plain = backend.generate(model, ids, attention_mask=mask, **PLAIN)
    assert ours.shape != plain.shape or (ours != plain).any(), "the filter did nothing"


@pytest.mark.parametrize("variant", tiered(CONFIGS, lambda variant: variant == "pre_ln"))
def test_a_batch_is_its_rows(backend, load, variant):
    config, lengths = CONFIGS[variant], [11, 5, 1]
    ids, mask = make_prompts(config, 3, 11), make_mask("left", lengths)
    model = load(variant)
    settings = {**PLAIN, "repetition_penalty": 1.1, "no_repeat_ngram_size": 3}
    together = backend.generate(model, ids, attention_mask=mask, **settings)
    for row, length in enumerate(lengths):
        # Three copies of it: rows of another number would be another program.
        alone = backend.generate(model, ids[[row] * 3, -length:], **settings)
        np.testing.assert_array_equal(together[row, 11:], alone[0, length:])


@pytest.mark.xla
@pytest.mark.parametrize(
    "settings",
    tiered(
        [{}, {"do_sample": True}, {"do_sample": True, "num_return_sequences": 3}],
        lambda settings: settings.keys() != {"do_sample"},
    ),
)
def test_stream_equals_generate(backend, load, settings):
    ids = make_prompts(CONFIGS["pre_ln"], 2, 5)
    model = load("pre_ln")
    settings = {**PLAIN, **settings, "seed": 5, "eos_token_id": list(range(50, 60))}
    tokens = [backend.numpy(t) for t in model.stream(ids, **settings)]
    whole = backend.generate(model, ids, **settings)
    np.testing.assert_array_equal(np.stack(tokens, 1), whole[:, 5:])


def test_a_generated_text_scores_as_it_was_generated(backend, load):
    """Self-consistency: one uncached pass over a cached generation finds the same choices."""
    ids = make_prompts(CONFIGS["post_ln"], 3, 6)
    model = load("post_ln")
    out = backend.generate(model, ids, eos_token_id=None, max_new_tokens=100)
    logits = backend.run(model, input_ids=out).logits
    np.testing.assert_array_equal(logits[:, 5:-1].argmax(-1), out[:, 6:])


def test_the_prompt_never_ends_a_row(backend, load):
    """OPT's BOS is its EOS: the leading 2 must not stop anything."""
    ids = make_prompts(CONFIGS["pre_ln"], 2, 5)
    assert (ids[:, 0] == 2).all()
    model = load("pre_ln")
    out = backend.generate(model, ids, eos_token_id=2, max_new_tokens=6, suppress_tokens=[2])
    assert out.shape == (2, 11)


@pytest.mark.xla
def test_rows_end_separately_and_are_padded(backend, load):
    model = load("pre_ln")
    ids = make_prompts(CONFIGS["pre_ln"], 4, 5)
    eos = [15, 32, 49, 59]
    out = backend.generate(model, ids, eos_token_id=eos, max_new_tokens=40, pad_token_id=PAD)[:, 5:]
    ends = [next(i for i, t in enumerate(row) if t in eos) for row in out]
    assert len(set(ends)) > 1
    assert out.shape[1] == max(ends) + 1
    assert all((row[end + 1 :] == PAD).all() for row, end in zip(out, ends, strict=True))
    free = backend.generate(model, ids, eos_token_id=None, max_new_tokens=40)[:, 5:]
    assert all((a[: e + 1] == b[: e + 1]).all() for a, b, e in zip(out, free, ends, strict=True))


def test_max_length_counts_the_prompt(backend, load):
    ids = make_prompts(CONFIGS["pre_ln"], 1, 5)
    model = load("pre_ln")
    assert backend.generate(model, ids, eos_token_id=None, max_length=9).shape == (1, 9)
    with pytest.warns(UserWarning, match="no length was asked for: 20 new tokens at most"):
        assert backend.generate(model, ids, eos_token_id=None).shape == (1, 25)  # as transformers 5
    both = backend.generate(model, ids, eos_token_id=None, max_length=9, max_new_tokens=2)
    assert both.shape == (1, 7)


def test_the_window_can_be_filled_to_its_last_place(backend, load):
    config = CONFIGS["pre_ln"].replace(max_position_embeddings=48)
    ids = make_prompts(config, 1, 36)
    model = load(config)
    out = backend.generate(model, ids, eos_token_id=None, max_new_tokens=13)
    logits = backend.run(model, input_ids=out[:, :48]).logits
    np.testing.assert_array_equal(out[:, 36:], logits[:, 35:].argmax(-1))


@pytest.mark.xla
def test_sampling_depends_on_the_seed_alone(backend, load):
    ids = make_prompts(CONFIGS["pre_ln"], 2, 5)
    model = load("pre_ln")
    settings = {**PLAIN, "do_sample": True, "temperature": 2.0}
    first, again, other = (backend.generate(model, ids, seed=s, **settings) for s in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


def test_top_1_sampling_is_greedy(backend, load):
    ids = make_prompts(CONFIGS["pre_ln"], 2, 5)
    model = load("pre_ln")
    drawn = backend.generate(model, ids, **PLAIN, do_sample=True, top_k=1, num_return_sequences=2)
    greedy = backend.generate(model, ids, **PLAIN)
    np.testing.assert_array_equal(drawn, greedy.repeat(2, 0))


BAD_SETTINGS = {
    "unknown": ({"max_tokens": 3}, "unknown generation option 'max_tokens'; did you mean"),
    "no new tokens": ({"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1"),
    "max_length too short": ({"max_length": 5}, "max_length=5 leaves no room.*5 tokens"),
    "too long": ({"max_new_tokens": 600}, "5 tokens and 600 new.*max_position_embeddings=512"),
    "temperature": (
        {"temperature": 0.0, "do_sample": True},
        "temperature: .* > 0 .* do_sample=False",
    ),
    "temperature type": ({"temperature": "hot"}, "temperature"),
    "top_k": ({"top_k": -1}, "top_k: expected an integer >= 0"),
    "top_p": ({"top_p": 1.5}, "top_p"),
    "nan": ({"top_p": float("nan")}, "top_p"),
    "groups": ({"num_beams": 4, "num_beam_groups": 3}, "num_beam_groups=3 does not divide"),
    "contrast": ({"penalty_alpha": 0.5, "do_sample": True}, "penalty_alpha is contrastive search"),
    "refused": ({"dola_layers": "high"}, "dola_layers is not supported"),
    "advice": ({"force_words_ids": [[3]]}, "not supported; .* prefix_allowed_tokens_fn="),
    "bias": ({"sequence_bias": [[3, 4]]}, "sequence_bias: expected sequences of ids with a number"),
    "decay": ({"exponential_decay_length_penalty": 3}, "exponential_decay_length_penalty: exp"),
    "too many sequences": ({"num_beams": 2, "num_return_sequences": 3}, "exceeds num_beams=2"),
    "copies of greedy": ({"num_return_sequences": 3}, "needs do_sample=True or num_beams"),
    "early stopping": ({"early_stopping": "sometimes"}, "early_stopping"),
    "stop strings": ({"stop_strings": ["x"]}, "stop_strings needs tokenizer="),
    "empty stop string": ({"stop_strings": [""]}, "stop_strings: expected non-empty"),
    "eos outside": ({"eos_token_id": 99}, "eos_token_id: 99 is outside the vocabulary"),
    "eos type": ({"eos_token_id": "</s>"}, "eos_token_id: expected token ids"),
    "bad word outside": ({"bad_words_ids": [[3, 200]]}, "bad_words_ids: 200"),
    "bad word empty": ({"bad_words_ids": [[]]}, "bad_words_ids"),
    "bad word flat": ({"bad_words_ids": [3]}, "bad_words_ids"),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_bad_settings_raise_one_clear_line(load, case):
    settings, message = BAD_SETTINGS[case]
    with pytest.raises(GenerationError, match=message) as error:
        load("pre_ln").generate(make_prompts(CONFIGS["pre_ln"], 1, 5), **settings)
    assert "\n" not in str(error.value)


def test_bad_prompts_raise_one_clear_line(load):
    model = load("pre_ln")
    ids = make_prompts(CONFIGS["pre_ln"], 2, 5)
    with pytest.raises(GenerationError, match="prompt 1 ends in padding; pad on the left"):
        model.generate(ids, attention_mask=make_mask("right", [5, 3]), max_new_tokens=2)
    with pytest.raises(GenerationError, match="prompt 0 ends in padding"):
        model.generate(ids, attention_mask=np.zeros_like(ids), max_new_tokens=2)
    with pytest.raises(InputError, match=r"input_ids.*99"):
        model.generate(ids * 0 + 99, max_new_tokens=2)
    with pytest.raises(GenerationError, match="beam search cannot stream"):
        model.stream(ids, num_beams=2, max_new_tokens=2)


def test_stop_strings_end_each_row_where_they_occur(backend, texts):
    path, tokenizer = texts
    model, prompts = (
        backend.load(path),
        tokenizer(["Now is", "this sun", "York"], padding_side="left"),
    )
    settings = {
        "attention_mask": prompts.attention_mask, "max_new_tokens": 40, "eos_token_id": None,
        "tokenizer": tokenizer,
    }  # fmt: skip
    free = backend.generate(model, prompts.input_ids, **settings)
    width = prompts.input_ids.shape[1]
    # Stop at something that the rows really write, at different places.
    stop = tokenizer.decode(free[0, width + 4 : width + 6], True)
    out = backend.generate(
        model, prompts.input_ids, stop_strings=[stop, "never written"], **settings
    )
    for row, whole in zip(out[:, width:], free[:, width:], strict=True):
        ends = [n for n in range(1, 41) if stop in tokenizer.decode(whole[:n])]
        length = ends[0] if ends else 40
        np.testing.assert_array_equal(row[:length], whole[:length])
        assert (row[length:] == PAD).all()
    assert out.shape[1] < free.shape[1] or (out != free).any()


def test_ids_without_a_token_are_never_generated(backend, texts):
    """The embedding has rows that no token has; with a tokenizer they are out of reach."""
    path, tokenizer = texts
    model = backend.load(path)
    untrained = list(range(tokenizer.id_limit, model.config.vocab_size))
    assert untrained
    ids = tokenizer("Now", return_tensors="np").input_ids
    settings = {
        "max_new_tokens": 5, "eos_token_id": None, "do_sample": True, "num_return_sequences": 8,
        "top_k": 0, "suppress_tokens": list(range(tokenizer.id_limit - 1)),
    }  # fmt: skip
    free = backend.generate(model, ids, **settings)[:, ids.shape[1] :]
    assert np.isin(free, untrained).any()
    known = backend.generate(model, ids, tokenizer=tokenizer, **settings)[:, ids.shape[1] :]
    assert (known == tokenizer.id_limit - 1).all()


def test_callers_settings_keep_the_models_special_ids(backend, folder):
    model, ids = backend.load(folder("pre_ln")), make_prompts(CONFIGS["pre_ln"], 1, 5)
    settings = GenerationConfig(max_new_tokens=40)
    free = backend.generate(model, ids, generation_config=settings, eos_token_id=None)
    assert free.shape == (1, 45)
    end = int(free[0, 15])
    model.generation_config = model.generation_config.replace(eos_token_id=end)
    ended = backend.generate(model, ids, generation_config=settings)[0]
    assert ended[-1] == end
    assert len(ended) <= 16
    with pytest.raises(GenerationError, match="expected a GenerationConfig, received list"):
        model.generate(ids, generation_config=[3])


def test_padding_without_a_mask_is_padding(backend, load):
    """As in transformers: where the padding id occurs and ends no text, it is no text."""
    ids, mask = make_prompts(CONFIGS["pre_ln"], 2, 8), make_mask("left", [8, 5])
    ids = np.where(mask, ids, PAD)
    model = load("pre_ln")
    settings = {**PLAIN, "eos_token_id": 2}
    guessed = backend.generate(model, ids, **settings)
    told = backend.generate(model, ids, attention_mask=mask, **settings)
    np.testing.assert_array_equal(guessed, told)


@pytest.mark.parametrize(("pad", "marked"), [(None, 0), (2, 2)])
def test_ids_of_texts_are_no_padding(backend, load, pad, marked):
    """No padding id, or one that begins or ends texts: then nothing is guessed to be padding."""
    config = CONFIGS["pre_ln"].replace(pad_token_id=pad)
    model, ids = load(config), make_prompts(config, 1, 6)
    ids[0, :2] = marked
    guessed = backend.generate(model, ids, **PLAIN)
    told = backend.generate(model, ids, attention_mask=np.ones_like(ids), **PLAIN)
    np.testing.assert_array_equal(guessed, told)


def test_a_row_without_a_possible_token_is_an_error(load):
    model, ids = load("pre_ln"), make_prompts(CONFIGS["pre_ln"], 1, 5)
    for extra in ({}, {"do_sample": True}, {"num_beams": 2}):
        with pytest.raises(GenerationError, match="row 0: no token can be generated: every token"):
            model.generate(ids, max_new_tokens=2, suppress_tokens=range(99), **extra)


@pytest.mark.parametrize("seed", [-1, 1.5, 2**70, (1, 2, 3)])
def test_bad_seeds(load, seed):
    with pytest.raises(GenerationError, match="seed: expected an integer"):
        load("pre_ln").generate([[2, 5]], max_new_tokens=1, seed=seed)


def test_copies_of_padded_prompts(backend, load):
    """Sampling several texts per prompt: a padded prompt's copies start where it ends."""
    ids, mask = make_prompts(CONFIGS["pre_ln"], 2, 8), make_mask("left", [8, 3])
    model = load("pre_ln")
    settings = {**PLAIN, "do_sample": True, "top_k": 1, "num_return_sequences": 2}
    out = backend.generate(model, ids, attention_mask=mask, **settings)
    for row, length in enumerate([8, 3]):
        alone = backend.generate(model, ids[[row] * 2, -length:], **settings)
        np.testing.assert_array_equal(out[2 * row : 2 * row + 2, 8:], alone[:2, length:])
