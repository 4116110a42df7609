"""The matrix of Pythons and libraries covers what pyproject.toml promises."""

import sys
import tomllib

import pytest

from tests.support import extras, matrix

PROJECT = tomllib.loads((matrix.ROOT / "pyproject.toml").read_text("utf-8"))["project"]
NO_USERS = {"test", "test-core", "lint", "docs", "release", "dev"}
NOT_ALONE = {"all", "tpu-compile", "wandb"}
"""Sums of others; what benchmarks need; and what `make test` tries as it is."""


def test_each_extra_is_tried_alone():
    assert set(extras.FURTHER) == set(matrix.FURTHER)
    tried = {*matrix.BACKENDS, *matrix.FURTHER}
    assert set(PROJECT["optional-dependencies"]) - NO_USERS - NOT_ALONE == tried


def test_every_requirement_says_the_oldest_that_is_tested(tmp_path):
    bounds = matrix.lower_bounds(matrix.ROOT / "pyproject.toml")
    names = [bound.partition("==")[0] for bound in bounds]
    assert len(names) == len(set(names))
    assert {"numpy", "torch", "tensorflow", "jax", "flax", "transformers", "h5py"} <= set(names)
    numpy = next(r for r in PROJECT["dependencies"] if r.startswith("numpy"))
    assert f"numpy=={numpy.removeprefix('numpy>=').partition(',')[0]}" in bounds
    without = tmp_path / "pyproject.toml"
    without.write_text('[project]\nname = "a"\ndependencies = ["b<2"]\noptional-dependencies = {}')
    with pytest.raises(ValueError, match="b<2: expected a lower bound"):
        matrix.lower_bounds(without)


def test_every_python_that_is_there_has_its_rows(capsys):
    """Once, whatever names it has, and none that does not run."""
    version = "{}.{}".format(*sys.version_info)
    found = matrix.rows([sys.executable, sys.executable, "python-that-is-not-there"])
    kinds = ["newest", *matrix.BACKENDS, "extras"]
    oldest = sys.version_info[:2] == matrix.OLDEST_PYTHON
    assert [row.name for row in found if row.kind != "oldest"] == [f"{version} {k}" for k in kinds]
    assert any(row.kind == "oldest" for row in found) is oldest
    minimum = ".".join(map(str, matrix.OLDEST_PYTHON))
    assert PROJECT["requires-python"] == f">={minimum}"
    classifiers = [c for c in PROJECT["classifiers"] if c.startswith("Programming Language")]
    listed = {name.removeprefix("python") for name in matrix.PYTHONS.split()}
    assert {c.rpartition(" ")[2] for c in classifiers} == {*listed, "3"}


def test_rows_are_chosen_by_words(capsys, monkeypatch):
    monkeypatch.setenv("PYTHONS", sys.executable)
    version = "{}.{}".format(*sys.version_info)
    assert matrix.main([version, "flax", "torch", "--list"]) == 0
    assert capsys.readouterr().out.split("\n")[:-1] == [f"{version} torch", f"{version} flax"]
    with pytest.raises(SystemExit):
        matrix.main(["falx", "--list"])
    assert "no row is called ['falx']" in capsys.readouterr().err


def test_a_step_that_fails_is_a_red_row(tmp_path, capsys):
    """An interpreter that ends with an error in place of making an environment."""
    row = matrix.Row("false", "3.99", "newest")
    is_green, line = matrix.run(row, tmp_path / "environment", tmp_path / "no.whl", [])
    assert not is_green
    assert line.startswith("| 3.99 newest |")
    assert "**venv ended with 1: nothing**" in line
