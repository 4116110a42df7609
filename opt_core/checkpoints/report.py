"""Why a checkpoint does not fit its configuration, and what to do where the cause is known."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from opt_core.checkpoints.tensors import FLOAT_DTYPES, LazyTensor
from opt_core.checkpoints.wrappers import prefix_of_decoder
from opt_core.config import OPTConfig
from opt_core.params import POSITION_OFFSET, ParamSpec

_SHOWN = 8
_LAYER = re.compile(r"^(model\.decoder\.layers\.)([0-9]{1,6})(\..+)$")
_A_WEIGHT = "model.decoder.layers.0.fc1.weight"
_FINAL_NORM = "model.decoder.final_layer_norm.weight"
_TOKENS = "model.decoder.embed_tokens.weight"
_POSITIONS = "model.decoder.embed_positions.weight"
_LM_HEAD = "lm_head.weight"
_ADAPTER = re.compile(
    r"\.(lora_[AB]|lora_(left|right)_weight|modules_to_save|lora_embedding_[AB])\b"
)
_QUANTIZED = re.compile(r"\.(SCB|absmax|qweight|qzeros|weight_scale|weight_packed|quant_state)\b")


def describe_mismatch(
    folder: Path, config: OPTConfig, specs: Sequence[ParamSpec], tensors: Mapping[str, LazyTensor]
) -> str | None:
    """Lists in one line what is missing, unexpected, misshapen or of an impossible type.

    Args:
        folder: Where the checkpoint is.
        config: The configuration it was compared with.
        specs: Parameters the model has.
        tensors: Canonical names and tensors of the checkpoint.

    Returns:
        The message, or None if everything fits.
    """
    expected = {spec.name: spec.shape for spec in specs}
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = {
        name: f"expected {list(shape)}, received {list(tensors[name].shape)}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    }
    mistyped = {
        name: f"{tensors[name].dtype} is no floating-point type"
        for name in expected
        if name in tensors and tensors[name].dtype not in FLOAT_DTYPES.values()
    }
    problems = [
        *_listed("missing", dict.fromkeys(missing, "")),
        *_listed("unexpected", dict.fromkeys(unexpected, "")),
        *_listed("of another shape", misshapen),
        *_listed("of another type", mistyped),
    ]
    if not problems:
        return None
    hints = list(_hints(config, set(missing), set(unexpected), tensors))
    advice = f". {'; '.join(hints)}" if hints else ""
    return f"{folder}: weights and configuration do not fit: {'; '.join(problems)}{advice}"


def _listed(what: str, details: Mapping[str, str]) -> Iterator[str]:
    if not details:
        return
    groups: dict[tuple[str, str, str], list[int]] = {}
    for name, detail in details.items():
        match = _LAYER.match(name)
        before, index, after = match.groups() if match else (name, None, "")
        groups.setdefault((before, after, detail), []).extend([] if index is None else [int(index)])
    shown = [
        printable(f"{before}{_ranges(layers)}{after}") + (f" ({detail})" if detail else "")
        for (before, after, detail), layers in list(groups.items())[:_SHOWN]
    ]
    more = f" and {len(groups) - _SHOWN} more kinds" if len(groups) > _SHOWN else ""
    yield f"{len(details)} {what}: {', '.join(shown)}{more}"


def printable(name: str) -> str:
    """A name out of a file, safe to show: control characters and the like as escapes."""
    return name if name.isprintable() else repr(name)


def _ranges(layers: Iterable[int]) -> str:
    """0,1,2,5 as {0-2,5}; a single one as it is; none as nothing."""
    runs: list[list[int]] = []
    for i in sorted(layers):
        if runs and i == runs[-1][-1] + 1:
            runs[-1][1:] = [i]
        else:
            runs.append([i])
    text = ",".join("-".join(str(i) for i in run) for run in runs)
    return text if text.isdigit() or not text else f"{{{text}}}"


def _hints(
    config: OPTConfig, missing: set[str], unexpected: set[str], tensors: Mapping[str, LazyTensor]
) -> Iterator[str]:
    if _FINAL_NORM in missing and not _lacks_norms(missing):
        yield (
            "conversions made before June 2022 lost model.decoder.final_layer_norm "
            "(https://github.com/huggingface/transformers/pull/17785): download the weights again, "
            "or, if they were fine-tuned without it, set "
            '"_remove_final_layer_norm": true in config.json'
        )
    if _FINAL_NORM in unexpected and config.layer_norm_elementwise_affine:
        yield (
            "model.decoder.final_layer_norm is there, but config.json removes it: check "
            "do_layer_norm_before and _remove_final_layer_norm"
        )
    yield from _trainer_hints(config, missing, unexpected, tensors)
    yield from _row_hints(config, tensors)
    yield from _flag_hints(config, missing, unexpected)
    yield from _layer_hints(config, tensors)


def _trainer_hints(
    config: OPTConfig, missing: set[str], unexpected: set[str], tensors: Mapping[str, LazyTensor]
) -> Iterator[str]:
    if not config.tie_word_embeddings and len({_TOKENS, _LM_HEAD} & missing) == 1:
        yield (
            "config.json does not tie the head to the embedding, so both are needed: if the model "
            "was trained with one for both, set tie_word_embeddings to true"
        )
    if any(0 in tensor.shape for tensor in tensors.values()):
        yield (
            "tensors without elements are left where DeepSpeed ZeRO-3 keeps the weights in parts: "
            "join them with the zero_to_fp32.py in the checkpoint's folder"
        )
    if any(map(_ADAPTER.search, unexpected)):
        yield "adapters are there that were not merged: save it after merge_and_unload()"
    if any(map(_QUANTIZED.search, unexpected)):
        yield (
            "another library quantised these weights, and no quantization_config says how: put the "
            "config.json that belongs to them beside them"
        )
    elif any(t.dtype.kind in "iu" for name, t in tensors.items() if name not in unexpected):
        yield "integers are no weights without their scales: save the model after dequantize()"
    if prefix := prefix_of_decoder(sorted(unexpected)):
        prefix = printable(prefix)
        yield f"a decoder is there under another name: `opt-lm convert --prefix {prefix}` takes it"


def _row_hints(config: OPTConfig, tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    positions = tensors[_POSITIONS].shape if _POSITIONS in tensors else ()
    if len(positions) == 2 and positions[0] == config.max_position_embeddings:
        yield (
            "conversions to some other tools drop the position table's first "
            f"{POSITION_OFFSET} rows: use the original weights, or, if these are, set "
            f"max_position_embeddings to {positions[0] - POSITION_OFFSET} in config.json"
        )
    elif len(positions) == 2 and positions[0] != config.max_position_embeddings + POSITION_OFFSET:
        yield f"set max_position_embeddings to {positions[0] - POSITION_OFFSET} in config.json"
    tokens = tensors[_TOKENS].shape if _TOKENS in tensors else ()
    if len(tokens) == 2 and tokens[0] != config.vocab_size:
        yield f"the embedding was resized: set vocab_size to {tokens[0]} in config.json"
    if len(tokens) == 2 and tokens[1] != config.embed_dim:
        yield f"set word_embed_proj_dim to {tokens[1]} in config.json"


def _flag_hints(config: OPTConfig, missing: set[str], unexpected: set[str]) -> Iterator[str]:
    for flag, pattern in (
        ("enable_bias", r"\.(?:(?:q|k|v|out)_proj|fc1|fc2)\.bias$"),
        ("layer_norm_elementwise_affine", r"\.(?:self_attn|final)_layer_norm\.(?:weight|bias)$"),
    ):
        names = missing if getattr(config, flag) else unexpected
        layers = {m[2] for n in names if re.search(pattern, n) and (m := _LAYER.match(n))}
        # A layer that is absent as a whole says nothing about the flag.
        if len(layers) >= config.num_hidden_layers and _A_WEIGHT not in missing:
            yield f"set {flag} to {str(not getattr(config, flag)).lower()} in config.json"
    projections = {"model.decoder.project_in.weight", "model.decoder.project_out.weight"}
    if projections & (missing | unexpected):
        have = "has" if projections & unexpected else "lacks"
        yield f"the checkpoint {have} project_in and project_out: check word_embed_proj_dim"


def _lacks_norms(missing: set[str]) -> bool:
    return "model.decoder.layers.0.final_layer_norm.weight" in missing


def _layer_hints(config: OPTConfig, tensors: Mapping[str, LazyTensor]) -> Iterator[str]:
    indices = {int(m[2]) for name in tensors if (m := _LAYER.match(name))}
    count = max(indices, default=-1) + 1
    if indices and count != config.num_hidden_layers and indices == set(range(count)):
        yield f"the checkpoint has {count} layers: set num_hidden_layers to {count} in config.json"
