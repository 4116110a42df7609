"""Values that settings of generation may have, and settings that are refused by name."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

from opt_core.errors import GenerationError

if TYPE_CHECKING:
    from opt_core.generation.config import GenerationConfig

REFUSED: Mapping[str, tuple[Any, str]] = {
    "constraints": (None, "; filter candidates with prefix_allowed_tokens_fn="),
    "force_words_ids": (None, "; filter candidates with prefix_allowed_tokens_fn="),
    "dola_layers": (None, ""),
    "watermarking_config": (None, "; use logits_processor="),
    "token_healing": (False, ""),
    "assistant_early_exit": (None, "; use assistant_model="),
    "encoder_repetition_penalty": (1.0, ": OPT has no encoder; use repetition_penalty"),
    "encoder_no_repeat_ngram_size": (0, ": OPT has no encoder; use no_repeat_ngram_size"),
}
"""Settings of `transformers` not done here: the value that asks for nothing, and advice."""

_INTEGERS: Mapping[str, int] = {
    "max_length": 1, "max_new_tokens": 1, "min_length": 0, "min_new_tokens": 0, "top_k": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_beam_groups": 1, "num_return_sequences": 1,
    "prompt_lookup_num_tokens": 1, "max_matching_ngram_size": 1, "num_assistant_tokens": 1,
    "prefill_chunk_size": 1, "forced_bos_token_id": 0,
}  # fmt: skip
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 1e6), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1), "top_h": (0, 1),
    "epsilon_cutoff": (0, 1), "eta_cutoff": (0, 1), "repetition_penalty": (0, 1e6),
    "length_penalty": (-100, 100), "diversity_penalty": (0, 1e6), "penalty_alpha": (0, 1),
    "guidance_scale": (0, 1e6), "max_time": (0, 1e9),
}  # fmt: skip
_OPEN_BELOW = ("top_p", "typical_p", "top_h", "repetition_penalty")
_SWITCHES = (
    *("do_sample", "remove_invalid_values", "renormalize_logits", "use_cache"),
    *("output_scores", "output_logits", "output_attentions", "output_hidden_states"),
    "return_dict_in_generate",
)
_IDS = ("suppress_tokens", "begin_suppress_tokens", "eos_token_id", "forced_eos_token_id")


_OF_SAMPLING = (
    *("temperature", "top_k", "top_p", "min_p", "top_h", "typical_p"),
    *("epsilon_cutoff", "eta_cutoff"),
)
"""Settings that only drawn tokens heed."""


def check_settings(config: "GenerationConfig") -> None:
    """Refuses values out of range, and settings that contradict one another.

    Raises:
        GenerationError: The first of them.
    """
    for name, least in _INTEGERS.items():
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < least):
            raise GenerationError(f"{name}: expected an integer >= {least}, received {value!r}")
    for name in _NUMBERS:
        _check_number(config, name)
    for name in _SWITCHES:
        value = getattr(config, name)
        if type(value) is not bool:
            raise GenerationError(f"{name}: expected True or False, received {value!r}")
    _check_ids(config)
    _check_pairs(config)
    if type(config.early_stopping) is not bool and config.early_stopping != "never":
        raise GenerationError(
            f'early_stopping: expected True, False or "never", received {config.early_stopping!r}'
        )
    stops: tuple[Any, ...] = config.stops  # whatever the file or the caller put there
    if any(not isinstance(s, str) or not s for s in stops):
        raise GenerationError(f"stop_strings: expected non-empty texts, received {config.stops!r}")
    _check_beams(config)


def check_heeded(config: "GenerationConfig") -> None:
    """Refuses settings that another one keeps from having any effect.

    Raises:
        GenerationError: The first of them.
    """
    default = type(config)()
    groups = [("do_sample", config.do_sample, _OF_SAMPLING)]
    groups += [("num_beams", config.is_beam_search, ("early_stopping", "length_penalty"))]
    for switch, is_on, names in groups:
        for name in () if is_on else names:
            value = getattr(config, name)
            is_heeded = name == "top_k" and config.penalty_alpha
            if value is not None and value != getattr(default, name) and not is_heeded:
                raise GenerationError(
                    f"{name}={value!r} has no effect with {switch}={getattr(config, switch)!r}; "
                    f"change {switch}, or leave {name} out"
                )


def _check_number(config: "GenerationConfig", name: str) -> None:
    value, (low, high), hint = getattr(config, name), _NUMBERS[name], ""
    if value is None:
        return
    is_open = name in _OPEN_BELOW
    if name == "temperature" and config.do_sample is True:
        is_open, hint = True, "; for the likeliest tokens pass do_sample=False"
    if not _is_number(value) or not low <= value <= high or (is_open and value == low):
        bounds = f"{'>' if is_open else '>='} {low:g} and <= {high:g}"
        raise GenerationError(f"{name}: expected a number {bounds}, received {value!r}{hint}")


def _check_beams(config: "GenerationConfig") -> None:
    beams, groups = config.num_beams, config.num_beam_groups
    if config.is_beam_search and config.prompt_lookup_num_tokens:
        raise GenerationError("num_beams > 1 with prompt_lookup_num_tokens is not supported")
    if config.is_beam_search and config.num_return_sequences > beams:
        raise GenerationError(
            f"num_return_sequences={config.num_return_sequences} exceeds num_beams={beams}"
        )
    if not config.is_beam_search and not config.do_sample and config.num_return_sequences > 1:
        raise GenerationError(
            "num_return_sequences > 1 needs do_sample=True or num_beams > 1: "
            "greedy rows are all the same"
        )
    if beams % groups:
        raise GenerationError(f"num_beam_groups={groups} does not divide num_beams={beams}")
    if groups > 1 and config.do_sample:
        raise GenerationError("num_beam_groups > 1 with do_sample=True is not supported")
    if config.penalty_alpha and (config.is_beam_search or config.do_sample or not config.top_k):
        raise GenerationError(
            "penalty_alpha is contrastive search: it needs top_k > 1, num_beams=1, do_sample=False"
        )


def _check_pairs(config: "GenerationConfig") -> None:
    biases: Any = config.sequence_bias
    pairs = [_parts(pair) for pair in _parts(biases)]
    if biases is not None and not (
        pairs and all(len(p) == 2 and _is_ids(p[0]) and p[0] and _is_number(p[1]) for p in pairs)
    ):
        raise GenerationError(
            f"sequence_bias: expected sequences of ids with a number each, received {biases!r}"
        )
    decay: Any = config.exponential_decay_length_penalty
    start, factor = _parts(decay) if len(_parts(decay)) == 2 else (None, 0)
    if decay is not None and not (type(start) is int and _is_number(factor) and factor > 0):
        raise GenerationError(
            "exponential_decay_length_penalty: expected a number of tokens and a factor > 0, "
            f"received {decay!r}"
        )


def _check_ids(config: "GenerationConfig") -> None:
    for name in (*_IDS, "pad_token_id", "bad_words_ids"):
        value: Any = getattr(config, name)
        if value is None or (name.endswith("token_id") and type(value) is int):
            continue
        if name == "bad_words_ids":
            is_right = bool(_parts(value)) and all(_is_ids(r) and r for r in _parts(value))
        else:
            is_right = _is_ids(value) and name != "pad_token_id"
        if not is_right:
            raise GenerationError(f"{name}: expected token ids, received {value!r}")


def _parts(value: Any) -> tuple[Any, ...]:
    return cast(tuple[Any, ...], value) if isinstance(value, tuple) else ()


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_ids(value: Any) -> bool:
    return isinstance(value, tuple) and all(type(i) is int for i in _parts(value))
