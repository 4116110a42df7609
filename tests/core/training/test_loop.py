"""The run loop: nothing is lost, nothing is half-written, whatever happens to the process."""

import errno
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from opt_core.errors import CheckpointError, DataError, InputError, TrainingError
from opt_core.training import run_folder
from opt_core.training.run_folder import read_metrics
from tests.support.fake_trainer import CONFIG, FakeTrainer, train

ROOT = Path(__file__).parents[3]


class Stopped(Exception):
    pass


def stop_at(step):
    def watch(record):
        if record["step"] == step:
            raise Stopped

    return watch


def outcome(folder):
    """All that must be the same in a run that was interrupted: metrics but for speed, weights."""
    records = [{k: v for k, v in r.items() if k != "tokens_per_s"} for r in read_metrics(folder)]
    return records, np.load(folder / "model" / "value.npy").tobytes()


def steps(folder):
    return sorted(int(path.name[5:]) for path in (folder / "checkpoints").iterdir())


def test_a_run_that_was_interrupted_ends_as_one_that_was_not(tmp_path):
    result = train(tmp_path / "whole", FakeTrainer())
    assert (result.steps, result.skipped, result.stopped) == (20, 0, None)
    assert result.loss == read_metrics(tmp_path / "whole")[-2]["loss"]
    for step in (1, 3, 7, 11, 20):
        with pytest.raises(Stopped):
            train(tmp_path / "parts", FakeTrainer(), resume=True, watch=stop_at(step))
    train(tmp_path / "parts", FakeTrainer(), resume=True)
    assert outcome(tmp_path / "parts") == outcome(tmp_path / "whole")
    # A run that is complete does nothing more.
    again = train(tmp_path / "parts", FakeTrainer(), resume=True)
    assert again.loss is None
    assert again.steps == 20


def test_killed_at_random_moments(tmp_path):
    """With SIGKILL, three times in one run."""
    count = 40
    train(tmp_path / "whole", FakeTrainer(CONFIG.replace(max_steps=count)))
    folder = tmp_path / "killed"
    moments = random.Random(0)
    command = [sys.executable, "-m", "tests.support.fake_trainer", folder, str(count)]
    killed = 0
    while killed < 3:
        process = subprocess.Popen([*command, "0.02"], cwd=ROOT, stderr=subprocess.PIPE)
        seen = len(read_metrics(folder)) if (folder / "metrics.jsonl").exists() else 0
        wanted = min(seen + 4, count - 1)
        while process.poll() is None and len(_lines(folder)) < wanted:
            time.sleep(0.005)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, process.stderr.read()  # type: ignore[union-attr]
        killed += 1
    assert not (folder / "model").exists()
    subprocess.run([*command, "0"], cwd=ROOT, check=True)
    assert outcome(folder) == outcome(tmp_path / "whole")


def _lines(folder):
    path = folder / "metrics.jsonl"
    return path.read_text().splitlines() if path.exists() else []


def test_the_newest_few_and_the_best_are_kept(tmp_path):
    best = train(tmp_path, FakeTrainer(CONFIG.replace(keep_checkpoints=2))).best_step
    assert best == 5
    assert steps(tmp_path) == [5, 18, 20]


def test_the_final_model_is_the_best_one(tmp_path):
    result = train(tmp_path, FakeTrainer())
    rows = {r["step"]: r for r in read_metrics(tmp_path) if "eval_loss" in r}
    assert result.best_loss == min(r["eval_loss"] for r in rows.values())
    assert result.best_step == 5
    assert rows[5]["best"]
    value = np.load(tmp_path / "model" / "value.npy")
    assert float(abs(value).sum()) / 2 == pytest.approx(result.best_loss)


def test_training_stops_when_validations_do_not_improve(tmp_path):
    result = train(tmp_path, FakeTrainer(CONFIG.replace(patience=2)))
    assert result.steps == 15
    assert result.stopped == "no better validation loss in 2 validations"
    again = train(tmp_path, FakeTrainer(CONFIG.replace(patience=2)), resume=True)
    assert again.steps == 15


def test_steps_that_are_not_finite_are_skipped_and_counted(tmp_path):
    trainer = FakeTrainer(losses=lambda step: math.nan if step in (2, 3) else 0.0)
    result = train(tmp_path, trainer)
    assert (result.skipped, result.steps) == (2, 20)
    state = tmp_path / "checkpoints" / "step-00000020" / "state.json"
    assert json.loads(state.read_text())["updates"] == 18
    records = read_metrics(tmp_path)
    assert [r["step"] for r in records if r.get("skipped")] == [3, 4]
    assert records[2]["loss"] is None


def test_a_run_that_diverges_is_stopped(tmp_path):
    config = CONFIG.replace(max_skipped_steps=3)
    trainer = FakeTrainer(config, losses=lambda step: math.inf if step > 8 else 0.0)
    with pytest.raises(TrainingError, match=r"diverged: .* in 4 steps in a row, the last one step"):
        train(tmp_path, trainer)
    assert steps(tmp_path)[-1] == 12


def test_a_full_disk_keeps_the_last_good_checkpoint(tmp_path, monkeypatch):
    real, writes = run_folder.write_safetensors, []

    def write(path, tensors):
        writes.append(path)
        if len(writes) > 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, tensors)

    monkeypatch.setattr(run_folder, "write_safetensors", write)
    with pytest.raises(CheckpointError, match=r"No space left on device; the last good one is"):
        train(tmp_path, FakeTrainer())
    monkeypatch.undo()
    assert steps(tmp_path) == [3, 5]
    assert not list((tmp_path / "checkpoints").glob(".*"))
    train(tmp_path, FakeTrainer(), resume=True)
    train(tmp_path / "whole", FakeTrainer())
    assert outcome(tmp_path) == outcome(tmp_path / "whole")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_metrics_that_cannot_be_written(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, FakeTrainer(), watch=stop_at(4))
    (tmp_path / "metrics.jsonl").unlink()
    real = run_folder.RunFolder.rewind
    run_folder.RunFolder.rewind = lambda self, step: None  # type: ignore[method-assign]
    try:
        (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
        with pytest.raises(TrainingError, match=r"metrics\.jsonl: cannot be written: No space"):
            train(tmp_path, FakeTrainer(), resume=True)
    finally:
        run_folder.RunFolder.rewind = real  # type: ignore[method-assign]


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").touch()
    for folder in ("file", "file/run"):
        with pytest.raises(TrainingError, match=r"already exists|cannot be used"):
            train(tmp_path / folder, FakeTrainer())
    train(tmp_path / "run", FakeTrainer())
    with pytest.raises(TrainingError, match="already exists; resume it or name another folder"):
        train(tmp_path / "run", FakeTrainer())


def test_other_settings_and_other_models_are_refused(tmp_path):
    with pytest.raises(Stopped):
        train(tmp_path, FakeTrainer(), watch=stop_at(7), about={"model": "a"})
    other = CONFIG.replace(learning_rate=0.2)
    with pytest.raises(
        TrainingError, match=r"other settings: config\.learning_rate: 0\.1, now 0\.2; model: 'a'"
    ):
        train(tmp_path, FakeTrainer(other), resume=True)
    trainer = FakeTrainer()
    trainer.identity = trainer.identity | {"ffn_dim": 5}
    with pytest.raises(CheckpointError, match="of another model: ffn_dim: expected 5, found 3072"):
        train(tmp_path, trainer, resume=True, about={"model": "a"})


def test_other_data_is_refused(tmp_path, monkeypatch):
    with pytest.raises(Stopped):
        train(tmp_path, FakeTrainer(), watch=stop_at(7))
    monkeypatch.setattr("tests.support.fake_trainer.blocks", lambda: [np.zeros(4, int)] * 9)
    with pytest.raises(DataError, match="examples=14"):
        train(tmp_path, FakeTrainer(), resume=True)


@pytest.mark.parametrize("name", ["state.json", "state.safetensors"])
def test_damaged_checkpoints_are_refused(tmp_path, name):
    with pytest.raises(Stopped):
        train(tmp_path, FakeTrainer(), watch=stop_at(7))
    path = tmp_path / "checkpoints" / "step-00000006" / name
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=r"damaged checkpoint .* remove it to go on"):
        train(tmp_path, FakeTrainer(), resume=True)


def test_one_process_at_a_time(tmp_path):
    def watch(record):
        with pytest.raises(TrainingError, match="another process is training here"):
            train(tmp_path, FakeTrainer(), resume=True)
        raise Stopped

    with pytest.raises(Stopped):
        train(tmp_path, FakeTrainer(), watch=watch)


def test_damaged_metrics(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "loss": 2.0}) + '\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]
    path.write_text('{"st\n' + json.dumps({"step": 1, "loss": 2.0}) + "\n")
    with pytest.raises(TrainingError, match="line 1 is damaged"):
        read_metrics(tmp_path)


def test_validations_need_batches(tmp_path):
    with pytest.raises(InputError, match="eval_every: expected batches to validate on"):
        train(tmp_path, FakeTrainer(), validation=None)
