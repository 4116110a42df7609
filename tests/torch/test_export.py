"""Exported PyTorch programs: run by PyTorch alone, for any number of rows."""

import numpy as np
import pytest

pytest.importorskip("torch")

import torch

import opt_torch
from opt_core.errors import CheckpointError, ConfigError
from opt_torch.export import export_program
from tests.support.backends import ORACLE_TOLERANCE
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.tiers import tiered


def prompts(lengths):
    mask = make_mask("left", lengths).astype(np.int64)
    return make_prompts(CONFIGS["pre_ln"], *mask.shape).astype(np.int64), mask


def close(found, model, ids, mask):
    expected, seen = model(ids, attention_mask=mask).logits, np.cumsum(mask, 1) > 0
    found, expected = (x.detach().numpy()[seen] for x in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=0, atol=ORACLE_TOLERANCE)


@pytest.mark.parametrize("variant", tiered(CONFIGS, lambda variant: variant != "galactica"))
def test_an_exported_program_computes_what_the_model_does(folder, variant, tmp_path):
    model = opt_torch.OPTForCausalLM.from_pretrained(folder(variant))
    export_program(model, tmp_path / "new" / "model.pt2")
    forward = torch.export.load(tmp_path / "new" / "model.pt2").module()
    for lengths in ([7, 3], [1, 12, 9], [2], [1]):
        ids, mask = prompts(lengths)
        close(forward(torch.tensor(ids), torch.tensor(mask))["logits"], model, ids, mask)


def test_what_cannot_be_exported(folder, tmp_path, monkeypatch):
    model = opt_torch.OPTForCausalLM.from_pretrained(folder("pre_ln"))
    model.train()
    with pytest.raises(ConfigError, match="in evaluation mode"):
        export_program(model, tmp_path / "no")
    model.eval()
    monkeypatch.setattr(model.get_decoder(), "implementation", "flash_attention_2")
    with pytest.raises(ConfigError, match='expected attn_implementation="sdpa"'):
        export_program(model, tmp_path / "no")
    monkeypatch.undo()
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot be written"):
        export_program(model, tmp_path / "file" / "model.pt2")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
