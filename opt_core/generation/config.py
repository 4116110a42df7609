"""Settings of generation, under `transformers`' names and with their meanings.

Everything is checked before anything runs.
"""

import dataclasses
import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, cast

from opt_core.compatibility.config_keys import SPELLED_AS, near_miss
from opt_core.compatibility.notices import notice
from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.compatibility import (
    WITHOUT_EFFECT,
    Items,
    SettingsMethods,
    check_cache_name,
)
from opt_core.generation.limits import REFUSED, check_settings

DEFAULT_NEW_TOKENS = 20
"""New tokens where no length was asked for, as in `transformers` 5."""


@dataclass(init=False, repr=False)
class GenerationConfig(SettingsMethods):
    """Settings of one generation; fields can be set, and are checked when they are used.

    Several values (ids, words) are kept as a tuple that equals a list of the same.

    Attributes:
        max_length: Longest row, prompt included, where `max_new_tokens` is not given. With neither
            there are 20 new tokens at most.
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
        top_h: Draw among the likeliest tokens that bear this share of the entropy (arXiv
            2509.02510).
        epsilon_cutoff: Draw among tokens at least this probable (arXiv 2210.15191); 0 is off.
        eta_cutoff: The same, with a bound that falls where much is possible; 0 is off.
        repetition_penalty: Divides the positive and multiplies the negative scores of tokens that
            the row, prompt included, already has (arXiv 1909.05858); 1 is off.
        no_repeat_ngram_size: No n-gram of this size occurs twice in a row; 0 is off.
        suppress_tokens: Ids never generated.
        begin_suppress_tokens: Ids not generated as the first new token.
        bad_words_ids: Sequences of ids never generated.
        sequence_bias: What is added to the logit of the last id of a sequence wherever a row ends
            in its others: {(5, 7): -2.0}, or [[[5, 7], -2.0]].
        forced_bos_token_id: The first new token behind a prompt of a single one.
        forced_eos_token_id: Id or ids one of which is the last of the most new tokens.
        exponential_decay_length_penalty: A number of new tokens and a factor: from there on the
            ends of a row grow likelier by the factor with each token.
        remove_invalid_values: Replace logits that are NaN or infinite.
        renormalize_logits: Make log-probabilities of the filtered logits.
        num_beams: Beams W of beam search; 1 is greedy search or sampling.
        num_beam_groups: Groups of beams that are kept apart by `diversity_penalty` (arXiv
            1610.02424).
        diversity_penalty: What a token loses for each earlier group that took it at that place.
        penalty_alpha: Contrastive search (arXiv 2202.06417): the weight of being unlike what is
            there, against that of being likely, among the `top_k` likeliest.
        guidance_scale: How far to go from what follows `negative_prompt_ids=` (or the prompt's last
            token alone) towards what follows the prompt (arXiv 2306.17806); 1 is off.
        max_time: Seconds after which nothing more is begun.
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
        use_cache: As in `transformers`; there always is one, and no text depends on it.
        return_dict_in_generate: Return a `GenerateOutput` instead of ids.
        output_scores: Put the filtered scores of each new token into it.
        output_logits: Put the logits of each new token into it.
        output_attentions: Put the attention weights of each step into it.
        output_hidden_states: Put the hidden states of each step into it.
        refused: What a file asked for that is not done here, by name, and what `generate` says of
            it.
        others: Settings of `transformers` that have no effect here, by name, and names that nobody
            knows: they are kept for other readers of the file.

    Raises:
        GenerationError: A value out of range, settings that contradict one another, or a name that
            is nearly one of these.
    """

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = 50
    top_p: float = 1.0
    min_p: float | None = None
    typical_p: float = 1.0
    top_h: float | None = None
    epsilon_cutoff: float = 0.0
    eta_cutoff: float = 0.0
    repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    suppress_tokens: tuple[int, ...] | None = None
    begin_suppress_tokens: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] | None = None
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] | None = None
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | tuple[int, ...] | None = None
    exponential_decay_length_penalty: tuple[int, float] | None = None
    remove_invalid_values: bool = False
    renormalize_logits: bool = False
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    penalty_alpha: float | None = None
    guidance_scale: float | None = None
    max_time: float | None = None
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
    use_cache: bool = True
    return_dict_in_generate: bool = False
    output_scores: bool = False
    output_logits: bool = False
    output_attentions: bool = False
    output_hidden_states: bool = False
    refused: tuple[tuple[str, str], ...] = ()
    others: tuple[tuple[str, Any], ...] = dataclasses.field(default=(), compare=False)

    def __init__(self, **settings: Any) -> None:
        vars(self).update({name: field.default for name, field in _FIELDS.items()})
        for name, value in settings.items():
            setattr(self, name, value)
        check_settings(self)

    def __setattr__(self, name: str, value: Any) -> None:
        field = _FIELDS.get(name)
        if field is None:
            self._keep(name, value)
        elif name in ("refused", "others"):
            vars(self)[name] = tuple(value)
        else:
            value = _plain(value)
            # transformers takes None for "not set"; only some settings have a meaning for it.
            is_unset = value is None and "None" not in str(field.type)
            vars(self)[name] = field.default if is_unset else value

    def _keep(self, name: str, value: Any) -> None:
        line = ""
        if name in REFUSED:
            line = _refusal(name, value)
        elif name not in WITHOUT_EFFECT:
            if near_miss(name, _FIELDS):
                raise _unknown(name)
            notice(f"{name}: no setting of generation; it is kept, without effect")
        self.keep(name, value, line)

    def __repr__(self) -> str:
        shown = {k: v for k, v in self.to_diff_dict().items() if k != "transformers_version"}
        values = json.dumps(shown, indent=2, sort_keys=True, default=str)
        return f"{type(self).__name__} {values}"

    def __hash__(self) -> int:
        # Flax' programs are told apart by a model's attributes.
        return hash(tuple(getattr(self, name) for name in _FIELDS if name != "others"))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a row, none, one or several; negative ones mean that nothing does."""
        return tuple(i for i in as_ids(self.eos_token_id) if i >= 0)

    @property
    def forced_eos_ids(self) -> tuple[int, ...]:
        """The ids one of which is the last of the most new tokens, none, one or several."""
        return as_ids(self.forced_eos_token_id)

    @property
    def biases(self) -> dict[tuple[int, ...], float]:
        """`sequence_bias` by sequence."""
        return dict(self.sequence_bias or ())

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
    def from_dict(cls, config_dict: Mapping[str, Any], **overrides: Any) -> Any:
        """Settings by name, as a generation_config.json has them.

        What is not done here, `generate` refuses.

        Args:
            config_dict: Names and values.
            **overrides: Further ones, which count more; with `return_unused_kwargs`, those that are
                no settings are returned too.

        Raises:
            GenerationError: A bad value.
        """
        wants_unused = overrides.pop("return_unused_kwargs", False)
        unused = {k: v for k, v in overrides.items() if wants_unused and not _is_setting(k)}
        given = {**config_dict, **{k: v for k, v in overrides.items() if k not in unused}}
        values = {k: v for k, v in given.items() if v is not None}
        near = [k for k in values if not _is_setting(k) and near_miss(k, _FIELDS)]
        found = cls(**{k: v for k, v in values.items() if k not in near})
        found.refused = (*found.refused, *((k, str(_unknown(k))) for k in near))
        return (found, unused) if wants_unused else found

    def to_dict(self) -> dict[str, Any]:
        """All settings by name."""
        kept = {name: getattr(self, name) for name in _FIELDS if name not in _INNER}
        return kept | dict(self.others) | {"transformers_version": SPELLED_AS}

    def to_diff_dict(self) -> dict[str, Any]:
        """The settings that differ from the defaults."""
        values = {
            k: v for k, v in self.to_dict().items() if k not in _FIELDS or v != _FIELDS[k].default
        }
        if self.top_k is None:
            values["top_k"] = 0  # in a file, null would mean "not set"
        return values

    def replace(self, **overrides: Any) -> "GenerationConfig":
        """A copy with some settings changed.

        Raises:
            GenerationError: A name that is no setting (the nearest one is suggested), or a bad
                value.
        """
        given = dict[str, Any]()
        for name, value in overrides.items():
            if name in _FIELDS:
                given[name] = value
            elif line := _refusal(name, value):
                raise GenerationError(line)
            elif name == "cache_implementation":
                check_cache_name(value)
        if "max_length" in given and "max_new_tokens" not in given:
            given["max_new_tokens"] = None  # the caller's length counts, not the file's
        refused = tuple(pair for pair in self.refused if pair[0] not in overrides)
        made = dataclasses.replace(self, **given, refused=refused)
        if overrides.get("return_legacy_cache"):  # the cache is then an output that is wanted
            made.keep("return_legacy_cache", True, "")
        return made

    def new_tokens(self, prompt_length: int) -> int:
        """How many tokens to add at most to a prompt of `prompt_length` (padding included).

        Raises:
            GenerationError: `max_length` leaves no room for a new token.
        """
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return DEFAULT_NEW_TOKENS
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
        check_settings(self)
        for name, line in self.refused[:1]:
            way = f"{name}=None" if name else "generation_config=GenerationConfig(...)"
            raise GenerationError(f"{line}; pass {way} to go without")
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
            "forced_eos_token_id": self.forced_eos_ids,
            "forced_bos_token_id": as_ids(self.forced_bos_token_id),
            "pad_token_id": tuple(i for i in as_ids(self.pad_token_id) if i >= 0),
            "suppress_tokens": self.suppress_tokens or (),
            "begin_suppress_tokens": self.begin_suppress_tokens or (),
            "bad_words_ids": tuple(i for word in self.bad_words_ids or () for i in word),
            "sequence_bias": tuple(i for word in self.biases for i in word),
        }
        for name, ids in named.items():
            for i in ids:
                if not 0 <= i < config.vocab_size:
                    raise GenerationError(
                        f"{name}: {i} is outside the vocabulary (vocab_size={config.vocab_size})"
                    )


_INNER = ("refused", "others")
_FIELDS: Mapping[str, Any] = {f.name: f for f in dataclasses.fields(GenerationConfig)}


def as_ids(ids: int | Iterable[int] | None) -> tuple[int, ...]:
    """None, one or several ids as several."""
    if isinstance(ids, int):
        return (ids,)
    return () if ids is None else tuple(ids)


def _is_setting(name: str) -> bool:
    return name in _FIELDS or name in WITHOUT_EFFECT or name in REFUSED


def _refusal(name: str, value: Any) -> str:
    """Why a setting that is no field cannot be honoured; empty if nothing is lost."""
    if name in WITHOUT_EFFECT or value is None or (name in REFUSED and value == REFUSED[name][0]):
        return ""
    return f"{name} is not supported{REFUSED[name][1]}" if name in REFUSED else str(_unknown(name))


def _unknown(name: str) -> GenerationError:
    names = [name for name in _FIELDS if name not in _INNER]
    near = difflib.get_close_matches(name, names, 1)
    hint = f"; did you mean {near[0]!r}?" if near else f"; expected one of {', '.join(names)}"
    return GenerationError(f"unknown generation option {name!r}{hint}")


def _plain(value: Any) -> Any:
    """Built-in values for lists, ranges, mappings, and NumPy's or a framework's numbers."""
    if isinstance(value, Mapping):
        pairs = cast(Mapping[Any, Any], value).items()
        return _plain([[k if isinstance(k, tuple) else (k,), v] for k, v in pairs])
    if isinstance(value, list | tuple | range):
        return Items(_plain(v) for v in cast(Iterable[Any], value))
    return _plain(value.tolist()) if hasattr(value, "tolist") else value
