"""The README's Python blocks run, one after another, as a reader would run them."""

import json
import re
import warnings
from pathlib import Path

import pytest

from benchmarks import compare

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_python_blocks(tmp_path, monkeypatch, capsys):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    assert len(BLOCKS) >= 4
    names: dict[str, object] = {}
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", UserWarning
        )  # the classifier's head is new, as the text says
        for block in BLOCKS:
            exec(compile(block, str(README), "exec"), names)
    printed = capsys.readouterr().out
    assert "ROMEO:" in printed
    assert "torch.Size" in printed
    assert (tmp_path / "my-classifier" / "model.safetensors").exists()


def test_every_file_it_names_exists():
    root = README.parent
    for name in re.findall(r"`([a-z_]+/[\w/.]+\.(?:py|md))`", README.read_text(encoding="utf-8")):
        assert (root / name).exists(), name


def test_the_table_of_speeds_is_that_of_the_results():
    assert compare.table(json.loads(compare.RESULTS.read_text())) in README.read_text("utf-8")
