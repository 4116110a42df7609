"""A file as safetensors and a trainer leave it gives every backend the numbers of its model."""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support import oracle
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.reference import make_prompts

torch: Any = pytest.importorskip("torch")
transformers: Any = pytest.importorskip("transformers")
CONFIG = CONFIGS["post_ln"]


class Trained(torch.nn.Module):
    """A user's model around another, wrapped once more, with a value head beside it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.pretrained_model = torch.nn.DataParallel(model)
        self.v_head = torch.nn.ModuleDict({"summary": torch.nn.Linear(24, 1)})


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Saved with save_model, which keeps lm_head.weight alone of the tied pair."""
    save: Any = pytest.importorskip("safetensors.torch")
    folder = tmp_path_factory.mktemp("trained")
    CONFIG.save_pretrained(folder)
    values = {k: v for k, v in CONFIG.to_dict().items() if k != "model_type"}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**values))
    state = {name: torch.from_numpy(a) for name, a in oracle.random_params(CONFIG).items()}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    save.save_model(Trained(model), str(folder / "model.safetensors"))
    names = save.load_file(folder / "model.safetensors").keys()
    assert "pretrained_model.module.lm_head.weight" in names
    assert not any("embed_tokens" in name for name in names)
    return folder


@pytest.mark.parametrize("head", ["causal_lm", "none"])
def test_a_trainers_file_in_every_backend(backend, trained, head):
    ids = make_prompts(CONFIG, 2, 5)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        model = backend.load(trained, head)
    caught = [warning for warning in caught if str(trained) in str(warning.message)]
    told = " ".join(str(warning.message) for warning in caught)
    assert "without pretrained_model., module. in them" in told
    assert "v_head.summary.weight" in told
    assert all(Path(warning.filename).name == "backends.py" for warning in caught)
    ours = backend.run(model, input_ids=ids)
    theirs = oracle.forward(oracle.random_params(CONFIG), CONFIG, ids)
    for name in ("logits",) if head == "causal_lm" else ("last_hidden_state",):
        want = getattr(theirs, name)
        np.testing.assert_allclose(getattr(ours, name), want, rtol=0, atol=ORACLE_TOLERANCE)
