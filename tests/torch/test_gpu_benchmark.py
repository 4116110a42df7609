"""`make gpu` where there is no GPU: it says so; its jobs and their resuming work on a CPU."""

import json
import sys

import pytest

pytest.importorskip("torch")

from benchmarks import gpu


def run(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["gpu", *map(str, arguments)])
    gpu.main()


def test_no_gpu_is_one_line(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(gpu, "card_name", lambda device: None)
    run(monkeypatch, "--results", tmp_path)
    assert capsys.readouterr().out == "make gpu: no CUDA device was found; nothing was measured\n"
    assert not list(tmp_path.iterdir())


def test_a_second_run_does_what_is_left(monkeypatch, capsys, tmp_path):
    asked = []

    def job(name, arguments, left):
        asked.append(name)
        return {"error": "out of memory"} if name == "tests" else {"tok_s": 1.0}

    monkeypatch.setattr(gpu, "run_job", job)
    given = ("--results", tmp_path, "--device", "cpu", "--only", "limits", "tests")
    run(monkeypatch, *given)
    assert asked == ["limits", "tests"]
    run(monkeypatch, *given)
    assert asked == ["limits", "tests", "tests"]
    run(monkeypatch, *given, "--seconds", 0)
    assert asked == ["limits", "tests", "tests"]
    assert "1 jobs are left" in capsys.readouterr().out
    found = json.loads((tmp_path / "gpu-cpu.json").read_text())
    assert found["jobs"] == {"limits": {"tok_s": 1.0}, "tests": {"error": "out of memory"}}


@pytest.mark.parametrize(
    "name",
    [
        *("limits", "parity", "opt-1.3b train", "opt-125m prefill sdpa"),
        *("opt-125m decode 1 bfloat16", "opt-125m decode 8 int8", "opt-125m decode 1 int4"),
    ],
)
def test_jobs_find_figures(monkeypatch, name):
    monkeypatch.setattr(gpu, "NEW", 4)
    monkeypatch.setattr(gpu, "TRIES", 1)
    function, given = gpu.jobs()[name]
    found = function("cpu", True, *given)
    assert found
    assert found.get("is_within", True)
    assert all(value is None or value >= 0 for value in found.values())
