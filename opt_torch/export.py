"""A model's forward pass as a program of `torch.export`."""

from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

from opt_core.errors import CheckpointError, ConfigError
from opt_core.quantization import check_not_quantized
from opt_torch.modeling import OPTForCausalLM


class _Forward(nn.Module):
    """The forward pass with plain inputs and outputs, which every loader knows."""

    def __init__(self, model: OPTForCausalLM):
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> dict[str, Tensor]:
        logits = self.model(input_ids, attention_mask=attention_mask).logits
        assert logits is not None
        return {"logits": logits}


def export_program(model: OPTForCausalLM, file: str | PathLike[str]) -> None:
    """Writes the forward pass as `torch.export.save` does.

    `torch.export.load(file).module()` is a function of `input_ids` and `attention_mask`, int64
    (B, T), that returns {"logits": (B, T, V)}. B is free, T is at most `max_position_embeddings`.

    Args:
        model: The language model.
        file: Where to, usually ending in ".pt2".

    Raises:
        CheckpointError: The disk refuses.
        ConfigError: A quantised model, one in training mode, or with the attention kernel that
            takes no mask.
    """
    check_not_quantized(model, "export")
    if model.training:
        raise ConfigError("export: expected a model in evaluation mode; call model.eval()")
    if model.get_decoder().implementation == "flash_attention_2":
        raise ConfigError('export: expected attn_implementation="sdpa", received flash_attention_2')
    # Two rows and three tokens: sizes of 0 and 1 would be taken for constants.
    ids = torch.zeros(2, 3, dtype=torch.long, device=model.device)
    window = model.config.max_position_embeddings
    free = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", min=2, max=window)}
    with torch.no_grad():
        program = torch.export.export(
            _Forward(model), (ids, torch.ones_like(ids)), dynamic_shapes=(free, free), strict=False
        )
    file = Path(file)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent, prefix=f".{file.name}.") as stage:
            made = Path(stage) / "program.pt2"
            torch.export.save(program, made)
            made.replace(file)
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be written: {error.strerror or error}") from None
