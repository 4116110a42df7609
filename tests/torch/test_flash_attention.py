"""FlashAttention: padding is packed away, and where the kernel cannot run."""

import pytest

pytest.importorskip("torch")

import torch

from opt_core.errors import ConfigError
from opt_torch import attention
from tests.support.configs import CONFIGS
from tests.support.reference import make_mask, make_prompts
from tests.support.torch_models import model_of


@pytest.fixture
def varlen_on_cpu(monkeypatch):
    """PyTorch's variable-length kernel runs on CUDA only; this one means the same, for packing."""

    def varlen(q, k, v, starts_q, starts_k, longest_q, longest_k, *, window_size):
        assert window_size == (-1, 0)
        assert longest_q >= starts_q.diff().max()
        assert longest_k >= starts_k.diff().max()
        out = torch.empty_like(q)
        for a, b, c, d in zip(starts_q, starts_q[1:], starts_k, starts_k[1:], strict=False):
            query, key, value = (x.transpose(0, 1)[None] for x in (q[a:b], k[c:d], v[c:d]))
            out[a:b] = attention.eager(query, key, value, None, 0.0)[0][0].transpose(0, 1)
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen)
    monkeypatch.setattr(attention, "check_flash", lambda device, dtype: None)


@pytest.mark.parametrize(
    "mask", [make_mask("left", [9, 5, 2]), make_mask("right", [9, 5, 2])], ids=["left", "right"]
)
def test_packing_padding_away_changes_no_token(folder, varlen_on_cpu, mask):
    ids = make_prompts(CONFIGS["pre_ln"], 3, 9)
    packed = model_of(folder, attn_implementation="flash_attention_2")(
        ids, attention_mask=mask
    ).logits
    plain = model_of(folder)(ids, attention_mask=mask).logits
    seen = torch.tensor(mask).bool()
    torch.testing.assert_close(packed[seen], plain[seen], rtol=0, atol=2e-5)


def test_packing_works_through_a_cache(folder, varlen_on_cpu):
    ids, mask = make_prompts(CONFIGS["pre_ln"], 3, 9), make_mask("left", [9, 5, 2])
    settings = {"attention_mask": mask, "max_new_tokens": 10, "eos_token_id": None}
    packed = model_of(folder, attn_implementation="flash_attention_2").generate(ids, **settings)
    torch.testing.assert_close(packed, model_of(folder).generate(ids, **settings))


def test_flash_attention_says_where_it_cannot_run(folder):
    with pytest.raises(
        ConfigError, match="needs a CUDA device and float16 or bfloat16, received cpu and float32"
    ):
        model_of(folder, attn_implementation="flash_attention_2")


@pytest.mark.gpu
@pytest.mark.parametrize("mask", [None, make_mask("left", [9, 5, 2])], ids=["bare", "left"])
def test_flash_attention_on_a_gpu(folder, mask):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    config = CONFIGS["pre_ln"].replace(hidden_size=128, num_attention_heads=2)
    ids = torch.tensor(make_prompts(config, 3, 9), device="cuda")
    options = {"device": "cuda", "dtype": "float16"}
    flash = model_of(folder, config, attn_implementation="flash_attention_2", **options)
    plain = model_of(folder, config, attn_implementation="eager", **options)
    a, b = (m(ids, attention_mask=mask).logits.float() for m in (flash, plain))
    seen = torch.ones(3, 9).bool() if mask is None else torch.tensor(mask).bool()
    torch.testing.assert_close(a[seen], b[seen], rtol=2e-2, atol=5e-2)
