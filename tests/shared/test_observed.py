"""Generation that Python watches: against live `transformers`, and against the compiled loops."""

import numpy as np
import pytest

from opt_core.errors import GenerationError
from tests.support import oracle
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts, tensors
from tests.support.tiers import tiered

pytestmark = [pytest.mark.hf, pytest.mark.dealt]
CONFIG = CONFIGS["pre_ln"].replace(num_hidden_layers=1)
"""One layer: what is watched comes after the last."""
CLOSE = 1e-4
"""Of scores that eight tokens' float32 rounding went into."""
EOS = list(range(40, 50))
MASK = make_mask("left", [8, 3, 6])
WHOLE = make_prompts(CONFIG, 3, 8, seed=7)
IDS = np.where(MASK, WHOLE, 1)
COMMON = {"pad_token_id": 1, "eos_token_id": EOS, "max_new_tokens": 8}


@pytest.fixture
def model(load):
    return load(CONFIG)


@pytest.fixture
def theirs(folder):
    transformers = pytest.importorskip("transformers")
    made = transformers.OPTForCausalLM.from_pretrained(folder(CONFIG), dtype="float32").eval()
    made.generation_config.eos_token_id = EOS
    return made


def reference(theirs, **settings):
    prompts = tensors({"input_ids": IDS, "attention_mask": MASK})
    return theirs.generate(**{**prompts, "do_sample": False, **COMMON, **settings})


OUTPUTS = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
CASES = {
    "greedy": {},
    "filters": {"repetition_penalty": 1.3, "suppress_tokens": [5, 6], "min_new_tokens": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "beams filtered": {"num_beams": 3, "length_penalty": 0.5, "repetition_penalty": 1.2},
    "normalised": {"num_beams": 2, "renormalize_logits": True, "suppress_tokens": [5, 6]},
}


@pytest.mark.parametrize("name", tiered(CASES, lambda name: name in ("filters", "beams")))
def test_scores_and_logits_are_transformers(backend, model, theirs, name):
    ours = model.generate(IDS, MASK, **COMMON, **OUTPUTS, **CASES[name])
    other = reference(theirs, **OUTPUTS, **CASES[name])
    np.testing.assert_array_equal(backend.numpy(ours.sequences), other.sequences.numpy())
    assert len(ours.scores) == len(other.scores)
    for key in ("scores", "logits"):
        for mine, his in zip(backend.numpy(ours[key]), other[key], strict=True):
            np.testing.assert_allclose(mine, his.numpy(), rtol=0, atol=CLOSE)
    beams = None
    if "num_beams" in CASES[name]:
        beams, longest = backend.numpy(ours.beam_indices), other.beam_indices.shape[1]
        np.testing.assert_array_equal(beams, other.beam_indices.numpy()[:, : beams.shape[1]])
        assert longest <= beams.shape[1] or (other.beam_indices[:, beams.shape[1] :] == -1).all()
        np.testing.assert_allclose(
            backend.numpy(ours.sequences_scores), other.sequences_scores.numpy(), atol=CLOSE
        )
    mine = model.compute_transition_scores(ours.sequences, ours.scores, ours.beam_indices, True)
    his = theirs.compute_transition_scores(
        other.sequences, other.scores, getattr(other, "beam_indices", None), normalize_logits=True
    )
    np.testing.assert_allclose(backend.numpy(mine), his.numpy(), rtol=0, atol=CLOSE)


def test_attentions_and_hidden_states_of_each_step(backend, model, theirs):
    wanted = {
        "return_dict_in_generate": True, "output_attentions": True, "output_hidden_states": True,
    }  # fmt: skip
    theirs.set_attn_implementation("eager")
    ours = model.generate(WHOLE, **{**COMMON, "max_new_tokens": 3}, **wanted)
    other = theirs.generate(
        **tensors({"input_ids": WHOLE, "attention_mask": np.ones_like(WHOLE)}),
        **{**COMMON, "max_new_tokens": 3}, do_sample=False, **wanted,
    )  # fmt: skip
    for key in ("attentions", "hidden_states"):
        mine, his = backend.numpy(ours[key]), other[key]
        assert [len(step) for step in mine] == [len(step) for step in his]
        for a, b in zip(mine, his, strict=True):
            for layer, expected in zip(a, b, strict=True):
                expected = expected.numpy()
                seen = layer[..., : expected.shape[-1]]  # free slots have no weight
                np.testing.assert_allclose(seen, expected, rtol=0, atol=CLOSE)


def test_functions_of_the_caller(backend, model, theirs):
    """A processor, a criterion and a prefix function do what they do in transformers."""
    seen = []

    def ban_7(ids, scores):
        seen.append(tuple(ids.shape))
        allowed = np.arange(scores.shape[1]) % 7 != 0
        return scores + backend.array(np.where(allowed, 0, -np.inf).astype(np.float32))

    def stop_at_five(ids, scores):
        return ids.shape[1] >= 13

    def even(prompt, ids):
        return list(range(prompt, 99, 2))

    import torch

    def their_ban(ids, scores):
        return scores + torch.where(torch.arange(99) % 7 != 0, 0, -torch.inf)

    def their_stop(ids, scores):
        return torch.full((len(ids),), ids.shape[1] >= 13)

    settings = {**COMMON, "prefix_allowed_tokens_fn": even}
    for extra in ({}, {"num_beams": 3}):
        ours = backend.generate(
            model, IDS, attention_mask=MASK, logits_processor=[ban_7],
            stopping_criteria=[stop_at_five], **settings, **extra,
        )  # fmt: skip
        other = reference(
            theirs, logits_processor=[their_ban], stopping_criteria=[their_stop],
            prefix_allowed_tokens_fn=even, **extra,
        )  # fmt: skip
        np.testing.assert_array_equal(ours, other.numpy())
        assert ours.shape[1] <= 13
    assert seen[:2] == [(3, 8), (3, 9)]


def test_three_arguments_are_ids_scores_and_length(model):
    lengths = []

    def processor(input_ids, scores, cur_len):
        lengths.append(cur_len)
        return scores

    model.generate(IDS, logits_processor=processor, max_new_tokens=3, eos_token_id=None)
    assert lengths == [8, 9, 10]
    with pytest.raises(GenerationError, match="logits_processor: expected functions, received int"):
        model.generate(IDS, logits_processor=[3], max_new_tokens=3)
    with pytest.raises(GenerationError, match="prefix_allowed_tokens_fn: no ids for prompt 0"):
        model.generate(IDS, prefix_allowed_tokens_fn=lambda b, ids: [], max_new_tokens=3)


def test_prompts_of_embeddings(backend, model, theirs):
    embeds = theirs.get_input_embeddings().weight.detach().numpy()[IDS]
    whole = backend.generate(model, IDS, attention_mask=MASK, **COMMON)
    bare = backend.generate(
        model, None, inputs_embeds=backend.array(embeds), attention_mask=MASK, **COMMON
    )
    np.testing.assert_array_equal(bare, whole[:, 8:])
    both = backend.generate(
        model, IDS, inputs_embeds=backend.array(embeds), attention_mask=MASK, num_beams=3, **COMMON
    )
    np.testing.assert_array_equal(
        both, backend.generate(model, IDS, attention_mask=MASK, num_beams=3, **COMMON)
    )


def test_guidance(backend, model, theirs):
    for extra in ({}, {"negative_prompt_ids": WHOLE[:, :4]}):
        ours = backend.generate(
            model, WHOLE, guidance_scale=1.7, **{**COMMON, "eos_token_id": None}, **extra
        )
        other = theirs.generate(
            **tensors({"input_ids": WHOLE, "attention_mask": np.ones_like(WHOLE)}),
            guidance_scale=1.7, do_sample=False, **{**COMMON, "eos_token_id": None},
            **tensors(extra),
        )  # fmt: skip
        np.testing.assert_array_equal(ours, other.numpy())


def test_beams_that_are_drawn(backend, load):
    """With top_k=1 a draw has no choice; otherwise seeds differ, and the same one repeats."""
    model = load("pre_ln")  # whose likeliest tokens stand out
    settings = {**COMMON, "num_beams": 3, "do_sample": True}
    forced = backend.generate(model, IDS, top_k=0, temperature=0.01, seed=1, **settings)
    greedy = backend.generate(model, IDS, **{**COMMON, "num_beams": 1})
    np.testing.assert_array_equal(forced[:, :9], greedy[:, :9])
    free = {**settings, "top_k": 0, "temperature": 3.0}
    one, same, other = (backend.generate(model, IDS, seed=s, **free) for s in (1, 1, 2))
    np.testing.assert_array_equal(one, same)
    assert one.shape != other.shape or (one != other).any()


def test_groups_of_beams_differ(backend, model):
    """One group is plain search; without a penalty groups are alike, with a large one they part."""
    settings = {**COMMON, "eos_token_id": None, "num_beams": 3, "num_return_sequences": 3}
    alike = backend.generate(model, IDS, num_beam_groups=3, **settings).reshape(3, 3, -1)
    greedy = backend.generate(model, IDS, **{**COMMON, "eos_token_id": None})
    np.testing.assert_array_equal(alike, greedy[:, None].repeat(3, 1))
    parted = backend.generate(model, IDS, num_beam_groups=3, diversity_penalty=100.0, **settings)
    firsts = parted.reshape(3, 3, -1)[:, :, 8]
    assert all(len(set(row)) == 3 for row in firsts.tolist())


def test_contrastive_search_is_its_formula(backend, model):
    """Each token is the best of its k candidates, computed whole from the oracle's passes."""
    alpha, k, new = 0.6, 4, 6
    settings = {"eos_token_id": None, "max_new_tokens": new, "penalty_alpha": alpha, "top_k": k}
    out = backend.generate(model, IDS, attention_mask=MASK, **settings)
    config = CONFIG
    params = oracle.random_params(config)
    for row, mask in zip(out, MASK, strict=True):
        text = row[np.concatenate([mask > 0, np.ones(new, bool)])]
        for place in range(mask.sum(), mask.sum() + new):
            before = oracle.forward(params, config, text[None, :place])
            p = np.exp(oracle.log_softmax(before.logits[0, -1]))
            states = before.hidden_states[-1][0]
            states = states / np.linalg.norm(states, axis=-1, keepdims=True)
            scores = {}
            for token in np.argsort(-p)[:k]:
                tried = np.append(text[:place], token)[None]
                last = oracle.forward(params, config, tried).hidden_states[-1][0, -1]
                cosine = (states @ (last / np.linalg.norm(last))).max()
                scores[int(token)] = (1 - alpha) * p[token] - alpha * cosine
            assert text[place] == max(scores, key=lambda token: scores[token])


def test_stop_strings_end_beams(backend, texts):
    path, tokenizer = texts
    model = backend.load(path)
    ids = tokenizer(["Now is", "this sun"], padding_side="left").input_ids
    settings = {
        "num_beams": 2, "num_return_sequences": 2, "max_new_tokens": 12, "eos_token_id": None,
        "tokenizer": tokenizer, "length_penalty": -3.0,
    }  # fmt: skip
    free = backend.generate(model, ids, **settings)
    pieces = [tokenizer.decode(free[0, ids.shape[1] + n : ids.shape[1] + n + 2]) for n in range(9)]
    stop = next(piece for piece in pieces if "\ufffd" not in piece)
    out = backend.generate(model, ids, stop_strings=stop, **settings)
    found = 0
    for row in out[:, ids.shape[1] :]:
        ends = [n for n in range(1, len(row) + 1) if stop in tokenizer.decode(row[:n])]
        found += len(ends) > 0
        assert not ends or (row[ends[0] :] == 1).all()
    assert found


def test_watched_is_compiled(backend, model):
    """The same texts with and without a function between the steps, drawn ones too."""
    same = {"logits_processor": lambda ids, scores: scores}
    for settings in (
        {"do_sample": True, "seed": 5, "top_p": 0.9, "num_return_sequences": 2},
        {"num_beams": 3, "num_return_sequences": 3},
        {"no_repeat_ngram_size": 2, "bad_words_ids": [[4, 5], [9]]},
    ):
        plain = backend.generate(model, IDS, attention_mask=MASK, **COMMON, **settings)
        watched = backend.generate(model, IDS, attention_mask=MASK, **COMMON, **settings, **same)
        np.testing.assert_array_equal(plain, watched)


def test_streamers_and_time(backend, model):
    class Streamer:
        def __init__(self):
            self.put_values, self.ended = [], False

        def put(self, value):
            self.put_values.append(np.asarray(value))

        def end(self):
            self.ended = True

    streamer, settings = Streamer(), {**COMMON, "eos_token_id": None}
    out = backend.generate(model, IDS, streamer=streamer, **settings)
    first, *rest = streamer.put_values
    np.testing.assert_array_equal(np.concatenate([first, np.stack(rest, 1)], 1), out)
    np.testing.assert_array_equal(out, backend.generate(model, IDS, **settings))
    assert streamer.ended
    assert backend.generate(model, IDS, max_time=0.0, **settings).shape == (3, 9)
    assert backend.generate(model, IDS, max_time=0.0, num_beams=3, **settings).shape == (3, 9)
    with pytest.raises(GenerationError, match="streamer: in beam search no token is certain"):
        model.generate(IDS, streamer=streamer, num_beams=2, max_new_tokens=2)


def test_a_text_begins_without_a_prompt(backend, model):
    bos = model.config.bos_token_id
    free = backend.generate(model, None, **COMMON)
    np.testing.assert_array_equal(free, backend.generate(model, [[bos]], **COMMON))
    np.testing.assert_array_equal(free, backend.numpy(model.generate(inputs=[[bos]], **COMMON)))
    with pytest.raises(GenerationError, match="inputs and input_ids are the same"):
        model.generate([[5]], inputs=[[5]], max_new_tokens=2)


def test_seeds_follow_the_frameworks_generator(backend, model):
    settings = {**COMMON, "do_sample": True, "top_k": 0, "temperature": 4.0, "eos_token_id": None}
    one, two = (backend.generate(model, IDS, **settings) for _ in range(2))
    assert (one != two).any()
    np.testing.assert_array_equal(
        *(backend.generate(model, IDS, seed=(3, 4), **settings) for _ in range(2))
    )
    if backend.name == "flax":  # JAX has no generator of its own
        return
    again = []
    for _ in range(2):
        backend.seed_everything(7)
        again.append(backend.generate(model, IDS, **settings))
    np.testing.assert_array_equal(*again)
