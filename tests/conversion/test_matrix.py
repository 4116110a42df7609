"""Every pair of formats: what is written depends on the model alone, and comes back bit by bit."""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import conversion
from conversion.readers import open_any_checkpoint
from conversion.writers import WRITERS
from opt_core.checkpoints.plan import plan_load
from opt_core.config import OPTConfig
from opt_core.errors import OPTError
from tests.support.files.checkpoint_fixtures import (
    BARE,
    PROJECTED,
    TINY,
    UNTIED,
    random_weights,
    write,
)

GALACTICA = BARE.replace(activation_function="gelu", bos_token_id=0)
# Model, stored type, and the formats that cannot hold it.
MODELS: dict[str, tuple[OPTConfig, str, set[str]]] = {
    "pre-LN": (TINY, "float16", set()),
    "like 350m": (PROJECTED, "float32", {"keras-hub"}),
    "like Galactica": (GALACTICA, "float32", {"keras-hub"}),
    "untied": (UNTIED, "float16", {"keras-hub"}),
    "bfloat16": (UNTIED, "bfloat16", {"keras-hub", "tf-h5"}),
}
Fingerprint = dict[str, str]


def fingerprint(folder: Path) -> Fingerprint:
    """Digests of each file that every conversion to this format should write alike."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.name not in ("config.json", "metadata.json")
    }


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A model in every format that can hold it."""
    config, dtype, without = MODELS[request.param]
    root = tmp_path_factory.mktemp("matrix")
    weights = random_weights(config, dtype=dtype)
    original = write(root / "original", weights)
    config.save_pretrained(original)
    for to in WRITERS.keys() - without:
        done = conversion.convert(original, root / to, to)
        assert (done.source_format, done.format) == ("safetensors", to)
    return root, config, weights, without


@pytest.mark.parametrize("source", WRITERS)
def test_what_is_written_comes_back(source: str, model: Any):
    root, config, weights, without = model
    if source in without:
        with pytest.raises(OPTError, match=r"cannot hold|no bfloat16"):
            conversion.convert(root / "original", root / source, source)
        assert not (root / source).exists()
        return
    found = open_any_checkpoint(root / source)
    plan = plan_load(found.checkpoint, found.read_config(), "causal_lm")
    loaded = {spec.name: tensor.read() for spec, tensor in plan.entries}
    assert loaded.keys() == weights.keys()
    for name, array in weights.items():
        assert loaded[name].dtype == array.dtype, name
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)
    ours, theirs = plan.config.to_dict(), config.to_dict()
    own = {"torch_dtype", "dtype", "bos_token_id", "architectures"}
    assert {k: v for k, v in ours.items() if k not in own and theirs.get(k) != v} == {}


@pytest.mark.parametrize("to", WRITERS)
@pytest.mark.parametrize("source", WRITERS)
def test_every_pair(source: str, to: str, model: Any, tmp_path: Path):
    root, _, _, without = model
    if {source, to} & without:
        return
    done = conversion.convert(root / source, tmp_path / "new", to)
    assert done.source_format == source
    assert not done.notes or "ties every head" in done.notes[0]
    assert fingerprint(tmp_path / "new") == fingerprint(root / to)
