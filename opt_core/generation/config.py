"""Settings of generation, under `transformers`' names and with their meanings.

Everything is checked before anything runs.
"""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, cast

from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.json_files import read_json, write_json

# Keys of generation_config.json that change nothing here. The other features of `transformers`
# raise unless they are switched off, which is what _NEUTRAL lists.
_IGNORED = frozenset([
    "_from_model_config", "transformers_version", "cache_implementation", "cache_config",
    "use_cache", "output_attentions", "output_hidden_states", "output_scores", "output_logits",
    "return_dict_in_generate", "return_legacy_cache", "renormalize_logits", "remove_invalid_values",
    "decoder_start_token_id", "is_assistant", "num_assistant_tokens_schedule",
    "assistant_confidence_threshold", "assistant_lookbehind", "target_lookbehind",
    "disable_compile", "compile_config", "generation_kwargs", "low_memory",
])  # fmt: skip
_NEUTRAL: dict[str, Any] = {
    "num_beam_groups": 1, "diversity_penalty": 0.0, "epsilon_cutoff": 0.0, "eta_cutoff": 0.0,
    "encoder_repetition_penalty": 1.0, "encoder_no_repeat_ngram_size": 0, "penalty_alpha": 0.0,
    "token_healing": False, "use_mtp": False, "guidance_scale": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of one generation.

    Attributes:
        max_length: Longest row, prompt included, where `max_new_tokens` is not given.
        max_new_tokens: Most tokens to add to the prompt.
        min_length: Fewest tokens of a row, prompt included, before it may end.
        min_new_tokens: Fewest tokens to add before a row may end.
        do_sample: Draw from the distribution instead of taking the likeliest token.
        temperature: Divides the logits before drawing; below 1 is more conservative.
        top_k: Draw among this many likeliest tokens; 0 or None for all.
        top_p: Draw among the fewest likeliest tokens whose probabilities reach this sum.
        min_p: Draw among tokens at least this many times as likely as the likeliest (arXiv
            2407.01082).
        typical_p: Draw among the tokens whose information is nearest the expected one, up to this
            sum of probabilities (arXiv 2202.00666).
        repetition_penalty: Divides the positive and multiplies the negative scores of tokens that
            the row, prompt included, already has (arXiv 1909.05858); 1 is off.
        no_repeat_ngram_size: No n-gram of this size occurs twice in a row; 0 is off.
        suppress_tokens: Ids never generated.
        begin_suppress_tokens: Ids not generated as the first new token.
        bad_words_ids: Sequences of ids never generated.
        num_beams: Beams W of beam search; 1 is greedy search or sampling.
        length_penalty: A beam's score is its log-likelihood divided by its new length to this
            power.
        early_stopping: True stops when enough beams are finished; False when the best open one
            cannot win at its present length; "never" when it cannot win at any length.
        num_return_sequences: Rows returned per prompt, at most `num_beams` in beam search.
        prompt_lookup_num_tokens: Draft this many tokens at a time by looking for the last ones
            earlier in the row, and check them in one pass; None is off.
        max_matching_ngram_size: Most tokens to look for then.
        num_assistant_tokens: Tokens that a smaller `assistant_model=` drafts at a time.
        prefill_chunk_size: Read prompts this many tokens at a time, which takes less memory;
            None reads them whole.
        eos_token_id: Id or ids that end a row. Only generated tokens end one (OPT's BOS is its
            EOS).
        pad_token_id: Id that fills a row after its end.
        bos_token_id: First id of a text; kept for other readers of the file.
        stop_strings: Texts that end a row once generated; they need `tokenizer=`.

    Raises:
        GenerationError: A value out of range, or settings that contradict one another.
    """

    max_length: int = 20
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    num_beams: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False
    num_return_sequences: int = 1
    prompt_lookup_num_tokens: int | None = None
    max_matching_ngram_size: int = 2
    num_assistant_tokens: int = 5
    prefill_chunk_size: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    stop_strings: str | tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        for f in dataclasses.fields(self):
            value = _plain(getattr(self, f.name))
            # transformers takes None for "not set"; only some settings have a meaning for it.
            is_unset = value is None and "None" not in str(f.type)
            object.__setattr__(self, f.name, f.default if is_unset else value)
        _check(self)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a row, none, one or several."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings, none, one or several."""
        stops = self.stop_strings
        return () if stops is None else stops if isinstance(stops, tuple) else (stops,)

    @property
    def is_beam_search(self) -> bool:
        """Whether several beams are kept per prompt."""
        return self.num_beams > 1

    @classmethod
    def from_model(cls, config: OPTConfig) -> "GenerationConfig":
        """The defaults of a model without generation_config.json: special ids, greedy search."""
        return cls(
            eos_token_id=config.eos_token_id,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
        )

    @classmethod
    def from_pretrained(cls, folder: str | PathLike[str]) -> "GenerationConfig":
        """Reads generation_config.json from a folder.

        Raises:
            GenerationError: An unknown or unsupported setting; ConfigError: not a JSON object.
        """
        path = Path(folder) / "generation_config.json"
        values = {k: v for k, v in read_json(path).items() if k not in _IGNORED and v is not None}
        for key in [k for k in values if k in _NEUTRAL]:
            if values.pop(key) != _NEUTRAL[key]:
                raise GenerationError(f"{path}: {key} is not supported")
        try:
            return cls().replace(**values)
        except GenerationError as error:
            raise GenerationError(f"{path}: {error}") from None

    def save_pretrained(self, folder: str | PathLike[str]) -> None:
        """Writes generation_config.json into a folder, only what differs from the defaults."""
        default = GenerationConfig()
        values = {k: v for k, v in vars(self).items() if v != getattr(default, k)}
        if self.top_k is None:
            values["top_k"] = 0  # in a file, null would mean "not set"
        write_json(Path(folder) / "generation_config.json", values)

    def replace(self, **overrides: Any) -> "GenerationConfig":
        """A copy with some settings changed.

        Raises:
            GenerationError: A name that is no setting (the nearest one is suggested), or a bad
                value.
        """
        names = [f.name for f in dataclasses.fields(self)]
        for name in overrides:
            if name not in names:
                near = difflib.get_close_matches(name, names, 1)
                hint = (
                    f"; did you mean {near[0]!r}?"
                    if near
                    else f"; expected one of {', '.join(names)}"
                )
                raise GenerationError(f"unknown generation option {name!r}{hint}")
        if "max_length" in overrides and "max_new_tokens" not in overrides:
            overrides["max_new_tokens"] = None  # the caller's length counts, not the file's
        return dataclasses.replace(self, **overrides)

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens to add at most to a prompt of `prompt_length` (padding included).

        Raises:
            GenerationError: `max_length` leaves no room for a new token.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length <= prompt_length:
            raise GenerationError(
                f"max_length={self.max_length} leaves no room after a prompt of "
                f"{prompt_length} tokens; pass max_new_tokens"
            )
        return self.max_length - prompt_length

    def check(
        self, config: OPTConfig, prompt_length: int, longest: int, has_tokenizer: bool
    ) -> None:
        """Checks the settings against a model and a prompt, before anything is computed.

        Args:
            config: The model's configuration.
            prompt_length: Width T of the prompt, padding included.
            longest: Tokens of the longest row, padding left out.
            has_tokenizer: Whether the caller passed `tokenizer=`.

        Raises:
            GenerationError: The row would outgrow the model's window, an id lies outside the
                vocabulary, or a setting needs what is not there.
        """
        new, window = self.new_tokens(prompt_length), config.max_position_embeddings
        # The last token generated is never read back, hence the - 1.
        if longest + new - 1 > window:
            raise GenerationError(
                f"a prompt of {longest} tokens and {new} new ones do not fit into "
                f"max_position_embeddings={window}; shorten the prompt or lower max_new_tokens"
            )
        if self.stops and not has_tokenizer:
            raise GenerationError("stop_strings needs tokenizer=")
        named = {
            "eos_token_id": self.eos_ids,
            "pad_token_id": () if self.pad_token_id is None else (self.pad_token_id,),
            "suppress_tokens": self.suppress_tokens or (),
            "begin_suppress_tokens": self.begin_suppress_tokens or (),
            "bad_words_ids": tuple(i for word in self.bad_words_ids or () for i in word),
        }
        for name, ids in named.items():
            for i in ids:
                if not 0 <= i < config.vocab_size:
                    raise GenerationError(
                        f"{name}: {i} is outside the vocabulary (vocab_size={config.vocab_size})"
                    )


_Setting = tuple[Any, ...] | str | float | None


def _plain(value: Any) -> _Setting:
    """Hashable built-in values for lists, ranges, and NumPy's or a framework's numbers."""
    if isinstance(value, list | tuple | range):
        return tuple(_plain(v) for v in cast(Iterable[Any], value))
    return _plain(value.tolist()) if hasattr(value, "tolist") else value


_INTEGERS: Mapping[str, int] = {
    "max_length": 1, "max_new_tokens": 1, "min_length": 0, "min_new_tokens": 0, "top_k": 0,
    "no_repeat_ngram_size": 0, "num_beams": 1, "num_return_sequences": 1,
    "prompt_lookup_num_tokens": 1, "max_matching_ngram_size": 1, "num_assistant_tokens": 1,
    "prefill_chunk_size": 1,
}  # fmt: skip
_NUMBERS: Mapping[str, tuple[float, float]] = {
    "temperature": (0, 1e6), "top_p": (0, 1), "min_p": (0, 1), "typical_p": (0, 1),
    "repetition_penalty": (0, 1e6), "length_penalty": (-100, 100),
}  # fmt: skip
_OPEN_BELOW = ("temperature", "top_p", "typical_p", "repetition_penalty")


def _check(config: GenerationConfig) -> None:
    for name, least in _INTEGERS.items():
        value = getattr(config, name)
        if value is not None and (type(value) is not int or value < least):
            raise GenerationError(f"{name}: expected an integer >= {least}, received {value!r}")
    for name, (low, high) in _NUMBERS.items():
        value = getattr(config, name)
        if value is None:
            continue
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not low <= value <= high or (name in _OPEN_BELOW and value == low):
            bounds = f"{'>' if name in _OPEN_BELOW else '>='} {low:g} and <= {high:g}"
            raise GenerationError(f"{name}: expected a number {bounds}, received {value!r}")
    _check_ids(config)
    if type(config.early_stopping) is not bool and config.early_stopping != "never":
        raise GenerationError(
            f'early_stopping: expected True, False or "never", received {config.early_stopping!r}'
        )
    stops: tuple[Any, ...] = config.stops  # whatever the file or the caller put there
    if any(not isinstance(s, str) or not s for s in stops):
        raise GenerationError(f"stop_strings: expected non-empty texts, received {config.stops!r}")
    if type(config.do_sample) is not bool:
        raise GenerationError(f"do_sample: expected True or False, received {config.do_sample!r}")
    if config.is_beam_search and config.do_sample:
        raise GenerationError("num_beams > 1 with do_sample=True is not supported; choose one")
    if config.is_beam_search and config.prompt_lookup_num_tokens:
        raise GenerationError("num_beams > 1 with prompt_lookup_num_tokens is not supported")
    if config.is_beam_search and config.num_return_sequences > config.num_beams:
        raise GenerationError(
            f"num_return_sequences={config.num_return_sequences} exceeds "
            f"num_beams={config.num_beams}"
        )
    if not config.is_beam_search and not config.do_sample and config.num_return_sequences > 1:
        raise GenerationError(
            "num_return_sequences > 1 needs do_sample=True or num_beams > 1: "
            "greedy rows are all the same"
        )


def _check_ids(config: GenerationConfig) -> None:
    for name in (
        "suppress_tokens",
        "begin_suppress_tokens",
        "eos_token_id",
        "pad_token_id",
        "bad_words_ids",
    ):
        value: _Setting = getattr(config, name)
        if value is None or (name.endswith("token_id") and type(value) is int):
            continue
        if name == "bad_words_ids":
            is_right = isinstance(value, tuple) and all(_is_ids(row) and row for row in value)
        else:
            is_right = _is_ids(value) and name != "pad_token_id"
        if not is_right:
            raise GenerationError(f"{name}: expected token ids, received {value!r}")


def _is_ids(value: _Setting) -> bool:
    return isinstance(value, tuple) and all(type(i) is int for i in value)
