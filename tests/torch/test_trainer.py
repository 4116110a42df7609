"""Hugging Face's live Trainer."""

from typing import Any

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers")

import torch
import transformers

import opt_torch
from tests.support.configs import CONFIGS
from tests.support.tiers import tiered

CONFIG = CONFIGS["pre_ln"].replace(dropout=0.0, num_labels=3)
ROWS = np.random.default_rng(0).integers(4, 99, (8, 6))
TARGETS = {
    "OPTForCausalLM": {"labels": ROWS},
    "OPTForSequenceClassification": {"labels": ROWS[:, 0] % 3},
    "OPTForQuestionAnswering": {"start_positions": ROWS[:, 0] % 6, "end_positions": ROWS[:, 1] % 6},
}


def make_trainer(folder, kind, **options) -> Any:
    model = getattr(opt_torch, kind)(CONFIG, seed=0)
    columns = {"input_ids": ROWS, "attention_mask": np.ones_like(ROWS), **TARGETS[kind]}
    rows: Any = [{name: column[i] for name, column in columns.items()} for i in range(len(ROWS))]
    settings = transformers.TrainingArguments(
        folder, per_device_train_batch_size=2, per_device_eval_batch_size=3, learning_rate=1e-2,
        max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True, save_strategy="no", **options,
    )  # fmt: skip
    return transformers.Trainer(model, settings, train_dataset=rows, eval_dataset=rows)


@pytest.mark.parametrize(
    "kind", tiered(TARGETS, lambda kind: kind != "OPTForSequenceClassification")
)  # one output with labels, two with positions
def test_it_trains_evaluates_and_predicts(tmp_path, kind):
    trainer = make_trainer(str(tmp_path), kind)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    found = trainer.predict(trainer.eval_dataset).predictions
    shapes = {
        "OPTForCausalLM": (8, 6, 99),
        "OPTForSequenceClassification": (8, 3),
        "OPTForQuestionAnswering": (2, 8, 6),
    }
    assert np.shape(found) == shapes[kind]
    with torch.no_grad():
        out = trainer.model(torch.tensor(ROWS))
    expected = out["logits"] if "logits" in out else torch.stack(out[:2])
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)


def test_accumulated_steps_are_steps_of_the_whole(tmp_path):
    """The loss of a part is its share of the whole batch's, by `num_items_in_batch`."""
    TARGETS["OPTForCausalLM"]["labels"] = np.where(ROWS % 5 == 0, -100, ROWS)
    weights = []
    for size, parts in ((4, 1), (1, 4)):
        trainer = make_trainer(
            str(tmp_path), "OPTForCausalLM", gradient_accumulation_steps=parts, optim="sgd"
        )
        trainer.args.per_device_train_batch_size = trainer._train_batch_size = size
        trainer.train()
        weights.append(trainer.model.get_decoder().embed_tokens.weight)
    torch.testing.assert_close(weights[0], weights[1], rtol=0, atol=1e-6)


def test_a_checkpoint_is_written_and_taken_up(tmp_path):
    trainer = make_trainer(str(tmp_path), "OPTForCausalLM")
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    trainer.train()
    again = make_trainer(str(tmp_path), "OPTForCausalLM")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    pairs = zip(trainer.model.parameters(), again.model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_what_it_saves_loads(tmp_path):
    """It knows no configuration of another library's model: the model puts its own there."""
    trainer = make_trainer(str(tmp_path), "OPTForCausalLM", gradient_checkpointing=True)
    trainer.args.save_strategy, trainer.args.save_steps = "steps", 2
    trainer.model.generation_config.top_k = 7
    trainer.train()
    trainer.save_model(str(tmp_path / "last"))
    ids = torch.tensor(ROWS)
    with torch.no_grad():
        expected = trainer.model.eval()(ids).logits
        for folder in ("checkpoint-4", "last"):
            ours = opt_torch.OPTForCausalLM.from_pretrained(tmp_path / folder)
            torch.testing.assert_close(ours(ids).logits, expected)
            assert ours.generation_config.top_k == 7
        theirs = transformers.OPTForCausalLM.from_pretrained(tmp_path / "last")
        torch.testing.assert_close(theirs.eval()(ids).logits, expected, rtol=0, atol=1e-5)
    before = {path.name for path in tmp_path.iterdir()}
    trainer.model.state_dict()  # anyone else's call writes nothing
    assert {path.name for path in tmp_path.iterdir()} == before
