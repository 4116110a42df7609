"""`generate` and `stream`, the same methods for the language model of every backend."""

from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from typing import Any, ClassVar, cast

import numpy as np

from opt_core.compatibility.generate_calls import (
    call_custom,
    check_custom,
    prefix_of,
    settle_arguments,
)
from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation import contrastive, host_beams, observed, own_calls
from opt_core.generation.config import GenerationConfig
from opt_core.generation.hooks import Deadline, Hooks
from opt_core.generation.outputs import GenerateOutput
from opt_core.generation.request import (
    Request,
    check_request,
    merge_settings,
    padding_id,
    pair_seed,
)
from opt_core.generation.scores import transition_scores
from opt_core.generation.speculation import check_assistant
from opt_core.text.tokenizer import OPTTokenizer

_HOOKS = tuple(field.name for field in fields(Hooks))


class GenerationMixin:
    """Gives a language model `generate` and `stream`."""

    backend: ClassVar[Any]
    """The backend's modules, an `opt_core.modeling.Backend`."""
    config: OPTConfig
    generation_config: GenerationConfig

    def generate(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        seed: Any = None,
        tokenizer: OPTTokenizer | None = None,
        past_key_values: Any = None,
        assistant_model: Any = None,
        streamer: Any = None,
        **overrides: Any,
    ) -> Any:
        """Continues prompts: greedily, by sampling, by beam search or by contrastive search.

        Args:
            input_ids: (B, T) prompts, padded on the left; None: a row that begins a text.
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            generation_config: Settings; by default the checkpoint's.
            seed: Seed of sampling, or a source of the framework to take it from (a generator, a
                key); None: another one at each call, by the framework's own generator where it has
                one (`torch.manual_seed`, `tf.random.set_seed`).
            tokenizer: Needed for `stop_strings`; where given, ids it does not know are
                never generated.
            past_key_values: A cache that holds the beginning of the prompts, which is not
                computed again then; one of a single row serves all rows. It is copied, so that
                it serves any number of calls.
            assistant_model: A smaller model of the same vocabulary: it drafts
                `num_assistant_tokens` at a time, this one checks them in one pass. Neither it nor
                `prompt_lookup_num_tokens` changes a greedy text or a distribution.
            streamer: Is given the prompt, then the tokens as they are made: its `put` and `end` are
                called, as those of `transformers`' `TextStreamer`.
            **overrides: Fields of `GenerationConfig`, such as `max_new_tokens=20`; `inputs_embeds`,
                (B, T, P) embeddings of the prompts: without `input_ids`, new tokens alone are
                returned; functions that run in Python between the steps, which takes longer:
                `logits_processor`, `stopping_criteria` and `prefix_allowed_tokens_fn` (see
                `opt_core.generation.hooks`); `negative_prompt_ids` and their
                `negative_prompt_attention_mask`, for `guidance_scale`; `custom_generate`, a
                function in place of this one (`opt_core.compatibility.generate_calls`).

        Returns:
            (B * num_return_sequences, T + new) ids: the prompt, then what was generated, then
            `pad_token_id` to the end of the longest row; a `GenerateOutput` with
            `return_dict_in_generate`.

        Raises:
            GenerationError: A setting or prompt that cannot be honoured.
        """
        custom = overrides.pop("custom_generate", None)
        is_custom = check_custom(custom)
        given = input_ids, attention_mask, seed, overrides.get("prng_key")
        if input_ids is not None and self._is_inside_program(*given):
            ids = input_ids if hasattr(input_ids, "shape") else np.array(input_ids, np.int32)
            return self._trace(ids, attention_mask, generation_config, seed, tokenizer, **overrides)
        request = make_request(
            self, input_ids, attention_mask, generation_config, seed, tokenizer, past_key_values,
            assistant_model, **overrides,
        )  # fmt: skip
        if is_custom:
            more = {"assistant_model": assistant_model, "streamer": streamer}
            return call_custom(self, request, custom, more)
        settings = request.settings
        if streamer is not None:
            found = self._stream_to(streamer, request)
        elif settings.penalty_alpha:
            found = contrastive.generate(self, request)
        elif settings.is_beam_search:
            search = host_beams.search if request.is_observed else self.backend.beam.search
            found = search(self, request)
        elif settings.max_time is not None and not request.is_observed:
            found = self._stream_to(None, request)
        else:
            found = self._module_for(request).generate(self, request)
        if settings.return_dict_in_generate and not isinstance(found, GenerateOutput):
            return observed.wrap(self, request, found, host_beams.search)
        cache: Any = getattr(found, "past_key_values", None)
        if settings.return_legacy_cache and cache is not None:
            found.past_key_values = cache.to_legacy_cache()
        return found

    def stream(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        seed: Any = None,
        tokenizer: OPTTokenizer | None = None,
        past_key_values: Any = None,
        assistant_model: Any = None,
        **overrides: Any,
    ) -> Iterator[Any]:
        """Yields the tokens of `generate`, whose arguments these are, as they are made.

        Yields:
            (B * num_return_sequences,) ids, `pad_token_id` in rows that have ended.
        """
        request = make_request(
            self, input_ids, attention_mask, generation_config, seed, tokenizer, past_key_values,
            assistant_model, **overrides,
        )  # fmt: skip
        if request.settings.is_beam_search or request.settings.penalty_alpha:
            raise GenerationError("beam search cannot stream: no token is certain before its end")
        return self._module_for(request).stream(self, request)

    def compute_transition_scores(
        self,
        sequences: Any,
        scores: tuple[Any, ...],
        beam_indices: Any = None,
        normalize_logits: bool = False,
    ) -> Any:
        """The score of each generated token, (R, new): see `opt_core.generation.scores`."""
        array = self.backend.inputs.to_array
        found = transition_scores(
            array(sequences), [array(x) for x in scores],
            None if beam_indices is None else array(beam_indices), normalize_logits,
        )  # fmt: skip
        return self.backend.inputs.to_tensor(self, found)

    def _is_inside_program(self, *given: Any) -> bool:
        """Whether a program is being traced, of which this generation is to be a part."""
        owner: Any = self
        return hasattr(self.backend.loop, "trace") and (
            owner._is_traced(*given) or not self.backend.inputs.is_known(given[0])
        )

    def _trace(
        self,
        ids_BT: Any,
        mask_BT: Any,
        generation_config: GenerationConfig | None,
        seed: Any,
        tokenizer: OPTTokenizer | None,
        **overrides: Any,
    ) -> Any:
        """Generates inside a program that is being traced (`jax.jit`, `tf.function`).

        What depends on values cannot be checked then, and rows keep their full width.
        """
        if own_calls.has_own_call(self):
            raise GenerationError(
                f"inside jax.jit or tf.function generate does not call {type(self).__name__} "
                "itself, whose call is a caller's; call generate outside"
            )
        seed = overrides.pop("prng_key", None) if seed is None else seed
        hooks = Hooks(**{name: overrides.pop(name, None) for name in _HOOKS})
        settings = merge_settings(self.generation_config, generation_config, **overrides)
        window, T = self.config.max_position_embeddings, ids_BT.shape[1]
        longest = window + 1 - settings.new_tokens(1) if T is None else T
        template = np.full((1, longest), self.config.vocab_size - 1, np.int32)
        defaults, known = self.generation_config, tokenizer
        request = check_request(
            self.config, defaults, template, None, generation_config, 0, known, **overrides
        )
        if not hooks.is_empty or request.is_observed or settings.penalty_alpha or settings.stops:
            raise GenerationError(
                "inside jax.jit or tf.function nothing can run in Python between the steps; "
                "call generate outside for outputs, functions, stop strings and contrastive search"
            )
        backend, padding = self.backend, padding_id(self.config, settings)
        if mask_BT is None and padding is not None:
            mask_BT = ids_BT != padding
        run = (backend.beam if settings.is_beam_search else backend.loop).run
        found = backend.loop.trace(self, request, run, ids_BT, mask_BT, seed)[0]
        found = found if T is None else found[:, : T + request.new_tokens]
        return GenerateOutput(sequences=found) if settings.return_dict_in_generate else found

    def _module_for(self, request: Request) -> Any:
        """The module that generates a request without beams."""
        if request.is_observed:
            return observed
        has_draft = request.assistant is not None or request.settings.prompt_lookup_num_tokens
        return self.backend.speculative if has_draft else self.backend.loop

    def _stream_to(self, streamer: Any, request: Request) -> Any:
        """Generates token by token: a streamer is given them, and time may run out."""
        settings, to_array = request.settings, self.backend.inputs.to_array
        if settings.is_beam_search or settings.penalty_alpha:
            raise GenerationError("streamer: in beam search no token is certain before its end")
        deadline, columns = Deadline(settings.max_time), list[Any]()
        if streamer is not None:
            streamer.put(self._for_streamer(request.ids))
        for tokens in self._module_for(request).stream(self, request):
            columns.append(to_array(tokens))
            if streamer is not None:
                streamer.put(self._for_streamer(columns[-1]))
            if deadline.is_over:
                break
        if streamer is not None:
            streamer.end()
        start = request.ids.shape[1] if request.is_bare else 0
        return self.backend.inputs.to_tensor(self, request.join(columns)[:, start:])

    @staticmethod
    def _for_streamer(ids: Any) -> Any:
        """A copy of ids on the host for a streamer, which may keep them."""
        return np.array(ids)


def make_request(
    model: GenerationMixin,
    input_ids: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: Any = None,
    tokenizer: OPTTokenizer | None = None,
    past_key_values: Any = None,
    assistant_model: Any = None,
    **overrides: Any,
) -> Request:
    """Checks the arguments of `GenerationMixin.generate`, before anything is computed.

    Raises:
        GenerationError: Padding on the right, a row without tokens, a setting that cannot be
            honoured, or an assistant that cannot draft for the model.
        InputError: Ids outside the vocabulary, shapes or a cache that do not fit.
    """
    owner: Any = model
    owner.check_config()
    config, assistant, inputs = model.config, assistant_model, model.backend.inputs
    criteria = overrides.get("stopping_criteria")
    hooks = Hooks(**{name: overrides.pop(name, None) for name in _HOOKS})
    embeds = overrides.pop("inputs_embeds", None)
    seed = overrides.pop("prng_key", None) if seed is None else seed
    negative = overrides.pop("negative_prompt_ids", None)
    negative_mask = overrides.pop("negative_prompt_attention_mask", None)
    input_ids = _only(input_ids, overrides.pop("inputs", None))
    if isinstance(input_ids, Mapping):
        given = cast(Mapping[str, Any], input_ids)
        attention_mask = given.get("attention_mask", attention_mask)
        input_ids = given["input_ids"]
    if hasattr(attention_mask, "to_diff_dict"):  # by place, where transformers has it second
        attention_mask, generation_config = None, attention_mask
    is_bare = input_ids is None and embeds is not None
    if is_bare:
        ids, mask, embeds = _check_embeds(model, embeds, attention_mask)
    else:
        if input_ids is None:
            input_ids, attention_mask = _begin_text(model, overrides), None
        ids, mask = inputs.check_prompts(model, input_ids, attention_mask)
    settle_arguments(ids.shape, mask, overrides, tokenizer, criteria)
    request = check_request(
        config, model.generation_config, ids, mask, generation_config, 0, tokenizer, **overrides
    )
    settings = request.settings
    _check_kept(settings)
    request = replace(
        request, seed=_seed(model, seed, settings.do_sample), hooks=hooks, embeds=embeds,
        is_bare=is_bare, calls_model=own_calls.has_own_call(model),
    )  # fmt: skip
    if settings.guidance_scale is not None and settings.guidance_scale != 1:
        request = replace(request, guide=_guide(model, request, negative, negative_mask))
    if past_key_values is not None:
        past_key_values = prefix_of(model, past_key_values)
    if past_key_values is not None:
        inputs.check_prefix(model, past_key_values, ids, request.mask)
    if assistant is not None:
        # Nothing but a language model of the same backend will do.
        if not isinstance(assistant, GenerationMixin) or assistant.backend is not model.backend:
            name, kind = type(model).__name__, type(assistant).__name__
            raise GenerationError(f"assistant_model: expected an {name}, received {kind}")
        check_assistant(settings, config, assistant.config)
    if request.calls_model and settings.penalty_alpha:
        raise GenerationError(
            f"penalty_alpha: contrastive search does not call {type(model).__name__} itself, whose "
            "call, or hooks on it, are a caller's"
        )
    return replace(request, past=past_key_values, assistant=assistant)


def _check_kept(settings: GenerationConfig) -> None:
    """Refuses results of `transformers` that only a generation without a cache has."""
    is_wanted = settings.output_hidden_states or settings.output_attentions
    if is_wanted and not settings.use_cache and settings.return_dict_in_generate:
        raise GenerationError(
            "use_cache=False: each step's hidden states and attentions are those of its new token "
            "alone; leave use_cache out, or call the model on the result for those of all tokens"
        )


def _only(input_ids: Any, inputs: Any) -> Any:
    """The prompts by either of their names.

    Raises:
        GenerationError: Both are given.
    """
    if input_ids is not None and inputs is not None:
        raise GenerationError("inputs and input_ids are the same argument; pass one of them")
    return inputs if input_ids is None else input_ids


def _begin_text(model: GenerationMixin, overrides: Mapping[str, Any]) -> Any:
    """A row of the token that begins a text.

    Raises:
        GenerationError: There is none.
    """
    bos = overrides.get("bos_token_id", model.generation_config.bos_token_id)
    if "bos_token_id" not in overrides and bos is None:
        bos = model.config.bos_token_id
    if bos is None:
        raise GenerationError("input_ids: none given, and there is no bos_token_id to begin with")
    return np.array([[bos]], np.int32)


def _check_embeds(model: Any, embeds: Any, attention_mask: Any) -> tuple[Any, Any, Any]:
    """Ids of padding in place of embeddings, their mask, and the embeddings."""
    _, mask, _, embeds, _ = model._check_inputs(None, attention_mask, None, embeds, None)
    mask = None if mask is None else model.backend.inputs.to_array(mask)
    shape = model.backend.inputs.to_array(embeds).shape[:2]
    pad = model.config.pad_token_id or 0
    return np.full(shape, pad, np.int32), np.ones(shape, bool) if mask is None else mask, embeds


def _seed(model: GenerationMixin, seed: Any, do_sample: bool) -> int:
    """A seed out of what was given, or a fresh one.

    Raises:
        GenerationError: It is none.
    """
    if seed is None:
        return model.backend.sampling.draw_seed() if do_sample else 0
    kind = type(seed).__name__
    if kind in ("tuple", "list") and [type(part) for part in seed] == [int, int]:
        return pair_seed(*seed)
    if hasattr(seed, "dtype") or kind == "Generator":
        return model.backend.sampling.draw_seed(seed)
    if type(seed) is not int or not 0 <= seed < 2**63:
        raise GenerationError(f"seed: expected an integer in 0..2**63 - 1, received {seed!r}")
    return seed


def _guide(model: GenerationMixin, request: Request, ids: Any, mask: Any) -> Request:
    """The request whose prompts guidance goes away from: by default the last token's alone."""
    if ids is None:
        ids, mask = request.ids[:, -1:], None
    else:
        ids, mask = model.backend.inputs.check_prompts(model, ids, mask)
    if len(ids) != len(request.ids):
        raise GenerationError(
            f"negative_prompt_ids: expected {len(request.ids)} rows, received {len(ids)}"
        )
    settings = request.settings.replace(
        guidance_scale=None, output_logits=False, output_attentions=False,
        output_hidden_states=False,
    )  # fmt: skip
    return replace(request, ids=ids, mask=mask, settings=settings, hooks=Hooks(), embeds=None)
