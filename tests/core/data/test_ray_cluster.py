"""A cluster's results are those of one process, also where a machine is lost."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from opt_core import OPTTokenizer
from opt_core.data.preparation import DataConfig, prepare
from opt_core.errors import DataError
from tests.support.small_tokenizer import write_opt_folder

TEXTS = [f"Text number {i}: {' '.join(str(i * k) for k in range(20))}." for i in range(1, 61)]


def test_a_machine_is_lost_and_nothing_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    monkeypatch.setattr("opt_core.data.preparation._CHUNK", 400)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[3]))
    tokenizer = OPTTokenizer.from_pretrained(write_opt_folder(tmp_path / "tokenizer"))
    source = tmp_path / "a.jsonl"
    lines = [*TEXTS, TEXTS[3], "x\0"]
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in lines))
    config = DataConfig(16, 0.25)
    report = prepare([source], tmp_path / "alone", tokenizer, config)

    cluster: Any = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    try:
        second: list[Any] = [cluster.add_node(num_cpus=1)]
        cluster.wait_for_nodes()
        monkeypatch.setenv("RAY_ADDRESS", cluster.address)

        def lose_one(done: int, total: int) -> None:
            if second and done > total / 2:
                cluster.remove_node(second.pop(), allow_graceful=False)

        found = prepare(
            [source], tmp_path / "cluster", tokenizer, config, progress=lose_one, engine="ray"
        )
    finally:
        cluster.shutdown()
    assert not second
    assert found == report
    for name in ("train/tokens.bin", "validation/tokens.bin", "report.json"):
        files = [tmp_path / place / name for place in ("alone", "cluster")]
        assert files[0].read_bytes() == files[1].read_bytes()


def test_what_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tokenizer = OPTTokenizer.from_pretrained(write_opt_folder(tmp_path / "tokenizer"))
    text = tmp_path / "text.txt"
    text.write_text("To be, or not to be.")
    with pytest.raises(DataError, match="engine: expected processes or ray, received 'spark'"):
        prepare([text], tmp_path / "new", tokenizer, engine="spark")
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(DataError, match=r'engine: "ray" needs Ray: pip install "opt-lm\[ray\]"'):
        prepare([text], tmp_path / "new", tokenizer, engine="ray")
    assert not (tmp_path / "new").exists()
