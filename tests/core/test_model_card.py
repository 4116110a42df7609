"""Model cards: what huggingface_hub reads in them, and sections that are put into them."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from opt_core.errors import CheckpointError
from opt_core.model_card import put_section, table, write_card
from opt_core.training import TrainConfig
from opt_core.training.run_card import write_run_card
from opt_core.training.run_folder import METRICS_FILE, RunState

MODEL = {"num_hidden_layers": 2, "hidden_size": 32, "head": "sequence_classification"}


def read(folder: Path) -> Any:
    return ModelCard.load(folder / "README.md")


def test_metadata_and_text(tmp_path):
    write_card(tmp_path, "mine", "Text.", head="causal_lm", base="facebook/opt-125m", tags=["x"])
    card = read(tmp_path)
    assert card.data.to_dict() == {
        "base_model": "facebook/opt-125m", "library_name": "transformers",
        "pipeline_tag": "text-generation", "tags": ["opt", "x"],
    }  # fmt: skip
    assert card.text.strip() == "# mine\n\nText."


def test_a_section_takes_the_place_of_its_like(tmp_path):
    write_card(tmp_path, "mine", "Text.\n\n## Evaluation\n\nNone.\n\n### Deeper\n\nNone.\n\n"
               "## Limits\n\nMany.")  # fmt: skip
    for text in ("first \\1", "second, with\n\n### parts\n\n| a |\n| --- |"):
        put_section(tmp_path, "Evaluation", text)
        expected = f"# mine\n\nText.\n\n## Evaluation\n\n{text}\n\n## Limits\n\nMany."
        assert read(tmp_path).text.strip() == expected
    put_section(tmp_path, "Limits", "Few.")
    put_section(tmp_path, "Limit", "One.")
    assert read(tmp_path).text.endswith("## Limits\n\nFew.\n\n## Limit\n\nOne.\n")
    assert read(tmp_path).data.tags == ["opt"]


def test_a_section_of_no_card(tmp_path):
    put_section(tmp_path / ".", "Limits", "Many.")
    assert read(tmp_path).text.strip() == f"# {tmp_path.name}\n\n## Limits\n\nMany."
    (tmp_path / "README.md").write_text("---\n- a list\n---\n")
    with pytest.raises(CheckpointError, match=r"README\.md: not a model card: "):
        put_section(tmp_path, "Limits", "Many.")
    with pytest.raises(CheckpointError, match=r"no/README\.md: "):
        write_card(Path("/dev/null/no"), "x", "")


def test_a_table_keeps_its_shape():
    assert table([("a|b", 1), ("c\nd", 2)], ("x", "y")) == (
        "| x | y |\n| --- | --- |\n| a\\|b | 1 |\n| c d | 2 |"
    )


def test_the_card_of_a_run(tmp_path):
    (tmp_path / METRICS_FILE).write_text(
        '{"step": 1, "loss": 3.5}\n{"step": 2, "loss": null, "skipped": true}\n'
        '{"step": 3, "loss": 2.5}\n{"step": 3, "eval_loss": 2.25, "best": true}\n'
    )
    (tmp_path / "model").mkdir()
    about = {"model": "facebook/opt-125m", "data": "/home/me/x.jsonl", "task": "classification",
             "validation": None, "from_scratch": False, "backend": "flax"}  # fmt: skip
    config = TrainConfig(max_steps=3, dropout=0.5)
    state = RunState(3, 2, {}, {}, best_step=3, best_loss=2.25, skipped=1)
    write_run_card(tmp_path, config, about, MODEL, state)
    card = read(tmp_path / "model")
    assert card.data.base_model == "facebook/opt-125m"
    assert card.data.pipeline_tag == "text-classification"
    headings = [line for line in card.text.splitlines() if line.startswith("## ")]
    assert headings == ["## Data", "## Training", "## Losses", "## Evaluation", "## Limits"]
    for line in (
        *("| trained on | `x.jsonl` |", "| framework | flax |", "| `dropout` | `0.5` |"),
        *("| training | 1 | 3.5000 |", "| training | 3 | 2.5000 |", "| validation | 3 | 2.2500 |"),
        "| best validation: this model | 3 | 2.2500 |",
        "1 steps were skipped: their loss or gradient was not finite.",
    ):
        assert f"\n{line}\n" in card.text, line
    assert "/home/me" not in card.text
    write_run_card(tmp_path, config, {**about, "from_scratch": True}, MODEL, state)
    card = read(tmp_path / "model")
    assert card.data.base_model is None
    assert "trained from random weights" in card.text
