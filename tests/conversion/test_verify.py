"""Checkpoints described, models compared: what is right is called right, what is wrong is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

pytest.importorskip("torch")

import conversion
import opt_torch
from conversion import backends
from conversion.verify import PROMPTS, Difference, Report, Side
from opt_core import OPTConfig
from opt_core.errors import CheckpointError, ConfigError, InputError, OPTError, TokenizerError
from opt_core.params import count_parameters
from tests.support.configs import CONFIGS
from tests.support.files.tiny_folder import save_model

FINAL_NORM = "model.decoder.final_layer_norm"
POSITIONS = "model.decoder.embed_positions.weight"
EMBEDDING = "model.decoder.embed_tokens.weight"

Weights = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("models") / "original")


@pytest.fixture
def copy(original: Path, tmp_path: Path) -> Path:
    """A copy of the original that a test may damage."""
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def edit_weights(folder: Path, edit: Callable[[Weights], Any]) -> None:
    weights = load_file(folder / "model.safetensors")
    edit(weights)
    save_file(weights, folder / "model.safetensors")


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", CONFIGS)
def test_describe_counts_what_the_specification_counts(name: str, tmp_path: Path):
    config = CONFIGS[name]
    opt_torch.OPTForCausalLM(config).save_pretrained(tmp_path)
    found = conversion.describe(tmp_path)
    assert not found.problems
    assert found.parameters == count_parameters(config)
    assert sum(part.parameters for part in found.parts) == found.parameters
    assert found.nbytes == 4 * found.parameters == sum(t.nbytes for t in found.tensors)
    assert (found.format, found.head, found.vocabulary) == ("safetensors", "causal_lm", None)
    assert found.dtypes == {"float32": len(found.tensors)}
    assert found.files == {"model.safetensors": (tmp_path / "model.safetensors").stat().st_size}


def test_describe_reads_a_single_weight_file(original: Path):
    found = conversion.describe(original / "model.safetensors")
    assert not found.problems
    assert found.vocabulary == 320


@pytest.mark.parametrize(
    ("model", "head"),
    [
        (opt_torch.OPTForSequenceClassification, "sequence_classification"),
        (opt_torch.OPTForQuestionAnswering, "question_answering"),
    ],
)
def test_describe_knows_the_head(model: Any, head: str, tmp_path: Path):
    model(CONFIGS["pre_ln"]).save_pretrained(tmp_path)
    found = conversion.describe(tmp_path)
    assert found.head == head
    assert found.parts[-1].name == "head"
    assert not found.problems


def test_describe_does_not_count_a_copy_of_the_embedding(copy: Path):
    before = conversion.describe(copy).parameters
    edit_weights(copy, lambda w: w.update({"lm_head.weight": w[EMBEDDING].copy()}))
    found = conversion.describe(copy)
    assert found.parameters == before
    assert "copy" in found.parts[-1].name
    assert not found.problems


def lose_final_norm(folder: Path) -> None:
    edit_weights(folder, lambda w: [w.pop(f"{FINAL_NORM}.{leaf}") for leaf in ("weight", "bias")])


def lose_position_offset(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({POSITIONS: w[POSITIONS][2:].copy()}))


def untie_head(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({"lm_head.weight": w[EMBEDDING] + 1}))


def leave_stale_file(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    save_file(weights, folder / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(weights, "model-00001-of-00001.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def shrink_vocabulary(folder: Path) -> None:
    edit_weights(folder, lambda w: w.update({EMBEDDING: w[EMBEDDING][:280].copy()}))
    edit_json(folder / "config.json", vocab_size=280)


def truncate(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lose_final_norm, "June 2022"),
        (lose_position_offset, "first 2 rows"),
        (untie_head, "lm_head.weight differs"),
        (leave_stale_file, "stale"),
        (shrink_vocabulary, "vocab_size=280"),
        (truncate, "model.safetensors"),
        (lambda f: edit_json(f / "config.json", bos_token_id=0), "bos_token_id=0"),
        (lambda f: edit_json(f / "config.json", hiden_size=8), "hiden_size"),
        (lambda f: (f / "vocab.json").write_text("{"), "vocab.json"),
        (lambda f: (f / "merges.txt").unlink(), "merges.txt"),
        (lambda f: (f / "model.safetensors").unlink(), "no weights"),
        (lambda f: edit_json(f / "generation_config.json", dola_layers="low"), "dola_layers"),
    ],
)
def test_describe_names_the_problem(damage: Callable[[Path], Any], named: str, copy: Path):
    assert not conversion.describe(copy).problems
    damage(copy)
    (problem,) = conversion.describe(copy).problems
    assert named in problem
    assert "\n" not in problem


def test_describe_collects_several_problems(copy: Path):
    lose_final_norm(copy)
    leave_stale_file(copy)
    edit_json(copy / "config.json", bos_token_id=0)
    assert len(conversion.describe(copy).problems) == 3


def test_describe_of_no_model_raises(tmp_path: Path):
    with pytest.raises(CheckpointError, match=r"no weights.*config\.json: no such file"):
        conversion.describe(tmp_path)
    with pytest.raises(CheckpointError, match="no such folder"):
        conversion.describe(tmp_path / "nowhere")


def test_verify_finds_a_model_equal_to_itself(original: Path, copy: Path):
    # How the model would generate on its own is no part of the comparison.
    edit_json(copy / "generation_config.json", do_sample=True, max_new_tokens=3)
    report = conversion.verify(original, copy, max_new_tokens=8)
    assert report.equal
    assert report.max_difference == 0
    assert [d.prompt for d in report.differences] == list(PROMPTS)
    assert all(0 < d.tokens <= 8 for d in report.differences)
    assert all(d.max_logit > 0.1 for d in report.differences)
    assert str(report.reference) == f"{original} (torch)"


def test_verify_measures_the_difference(original: Path, copy: Path):
    # With the last norm's bias moved along one axis, a logit moves by the embedding's entry there.
    def move(weights: Weights) -> None:
        weights[f"{FINAL_NORM}.bias"][3] += 0.5

    edit_weights(copy, move)
    report = conversion.verify(original, copy)
    embedding = load_file(copy / "model.safetensors")[EMBEDDING]
    assert report.max_difference == pytest.approx(0.5 * np.abs(embedding[:, 3]).max(), rel=1e-4)
    assert not report.equal
    assert any(d.first_difference is not None for d in report.differences)


def test_verify_allows_what_the_tolerance_allows(original: Path, copy: Path):
    def nudge(weights: Weights) -> None:
        weights[f"{FINAL_NORM}.bias"][0] += 1e-5

    edit_weights(copy, nudge)
    report = conversion.verify(original, copy, max_new_tokens=1)
    assert report.max_difference > 0
    assert report.equal
    assert not conversion.verify(original, copy, max_new_tokens=1, tolerance=1e-9).equal


def test_verify_never_calls_nan_equal(original: Path, copy: Path):
    edit_weights(copy, lambda w: w[f"{FINAL_NORM}.bias"].fill(np.nan))
    report = conversion.verify(original, copy, max_new_tokens=1)
    assert np.isnan(report.max_difference)
    assert not report.equal


@pytest.mark.parametrize(
    ("difference", "largest", "first", "equal"),
    [
        (0.009, 10.0, None, True),
        (0.011, 10.0, None, False),
        (0.0009, 0.1, None, True),
        (0.0011, 0.1, None, False),
        (0.0, 10.0, 0, False),
        (float("nan"), 10.0, None, False),
    ],
)
def test_equal_means_close_logits_and_the_same_tokens(
    difference: float, largest: float, first: int | None, equal: bool
):
    a, b = Side("a", "torch"), Side("b", "torch")
    same = Difference(b, "x", 0.0, 10.0, 4, None)
    other = Difference(b, "y", difference, largest, 4, first)
    assert Report(a, 1e-3, (same, other)).equal is equal


def test_verify_without_a_tokenizer_uses_the_same_random_ids_each_time(tmp_path: Path):
    opt_torch.OPTForCausalLM(CONFIGS["pre_ln"]).save_pretrained(tmp_path)
    first, second = (conversion.verify(tmp_path, tmp_path, max_new_tokens=2) for _ in range(2))
    assert first == second
    assert first.equal
    assert all(len(d.prompt.split()) == 16 for d in first.differences)
    with pytest.raises(TokenizerError, match=r"vocab\.json"):
        conversion.verify(tmp_path, tmp_path, prompts=["text"])


def test_verify_compares_the_ids_that_both_vocabularies_have(original: Path, copy: Path):
    edit_weights(copy, lambda w: w.update({EMBEDDING: w[EMBEDDING][:321].copy()}))
    edit_json(copy / "config.json", vocab_size=321)
    report = conversion.verify(original, copy, max_new_tokens=1)
    assert report.notes == ("vocabularies of 323 and 321 ids: the first 321 are compared",)
    assert report.max_difference == 0


def test_verify_shortens_its_own_prompts_to_the_window(tmp_path: Path):
    save_model(tmp_path, max_position_embeddings=20)
    assert conversion.verify(tmp_path, tmp_path, max_new_tokens=16).equal
    with pytest.raises(OPTError, match="max_position_embeddings=20"):
        conversion.verify(tmp_path, tmp_path, prompts=[PROMPTS[0]])


def test_verify_reports_progress_by_side(original: Path, copy: Path):
    seen: list[tuple[str, int, int]] = []
    conversion.verify(
        original,
        copy,
        prompts=["a"],
        max_new_tokens=1,
        progress=lambda side, done, total: seen.append((side.path, done, total)),
    )
    ends = [(path, done) for path, done, total in seen if done == total]
    assert [path for path, _ in ends] == [str(original), str(copy)]
    assert all(done > 0 for _, done in ends)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"backends": ("jax",)}, ConfigError, "expected one of torch, tf, flax"),
        ({"backends": ()}, InputError, "a backend"),
        ({"prompts": ()}, InputError, "a prompt"),
        ({"max_new_tokens": 0}, OPTError, "max_new_tokens"),
    ],
)
def test_verify_refuses(arguments: Any, error: type[OPTError], message: str, original: Path):
    with pytest.raises(error, match=message):
        conversion.verify(original, original, **arguments)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("opt_flax", "not part of this version"),
        ("jax", r'needs jax, which is not installed: pip install "opt-lm\[flax\]"'),
    ],
)
def test_a_backend_that_is_not_there_is_named(
    missing: str, message: str, monkeypatch: pytest.MonkeyPatch
):
    def import_module(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(backends, "import_module", import_module)
    with pytest.raises(ConfigError, match=message):
        backends.load_backend("flax")


def test_load_backend_returns_the_class_asked_for():
    assert backends.load_backend("torch") is opt_torch.OPTForCausalLM
    assert backends.load_backend("torch", "OPTModel") is opt_torch.OPTModel


def test_to_numpy_keeps_integers_and_upcasts_half_precision():
    import torch

    half = torch.tensor([0.1, 3.0], dtype=torch.bfloat16, requires_grad=True)
    assert backends.to_numpy(half).dtype == np.float32
    assert backends.to_numpy(half)[1] == 3
    assert backends.to_numpy(torch.tensor([1, 2])).dtype == np.int64


def test_description_keeps_the_configuration(original: Path):
    config = conversion.describe(original).config
    assert config == OPTConfig.from_pretrained(original)


@pytest.mark.parametrize("to", ["tf-h5", "flax-msgpack", "metaseq", "keras-hub"])
def test_verify_reads_what_no_backend_loads(to: str, original: Path, tmp_path: Path):
    conversion.convert(original, tmp_path / "other", to)
    report = conversion.verify(tmp_path / "other", original, prompts=None, max_new_tokens=2)
    assert report.equal
    assert report.max_difference == 0
    assert report.reference.path == str(tmp_path / "other")
