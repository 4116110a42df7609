"""`generate` and `stream`, the same methods for the language model of every backend."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

from opt_core.config import OPTConfig
from opt_core.errors import GenerationError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.request import Request, check_request
from opt_core.generation.speculation import check_assistant
from opt_core.text.tokenizer import OPTTokenizer


class GenerationMixin:
    """Gives a language model `generate` and `stream`."""

    backend: ClassVar[Any]
    """The backend's modules, an `opt_core.modeling.Backend`."""
    config: OPTConfig
    generation_config: GenerationConfig

    def generate(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        seed: int = 0,
        tokenizer: OPTTokenizer | None = None,
        past_key_values: Any = None,
        assistant_model: Any = None,
        **overrides: Any,
    ) -> Any:
        """Continues prompts: greedily, by sampling or by beam search.

        Args:
            input_ids: (B, T) prompts, padded on the left.
            attention_mask: (B, T): 1 for tokens, 0 for padding.
            generation_config: Settings; by default the checkpoint's.
            seed: Seed of sampling.
            tokenizer: Needed for `stop_strings`; where given, ids it does not know are
                never generated.
            past_key_values: A cache that holds the beginning of the prompts, which is not
                computed again then; one of a single row serves all rows. It is copied, so that
                it serves any number of calls.
            assistant_model: A smaller model of the same vocabulary: it drafts
                `num_assistant_tokens` at a time, this one checks them in one pass. Neither it nor
                `prompt_lookup_num_tokens` changes a greedy text or a distribution.
            **overrides: Fields of `GenerationConfig`, such as `max_new_tokens=20`.

        Returns:
            (B * num_return_sequences, T + new) ids: the prompt, then what was generated, then
            `pad_token_id` to the end of the longest row.

        Raises:
            GenerationError: A setting or prompt that cannot be honoured.
        """
        request = make_request(
            self, input_ids, attention_mask, generation_config, seed, tokenizer, past_key_values,
            assistant_model, **overrides,
        )  # fmt: skip
        if request.settings.is_beam_search:
            return self.backend.beam.search(self, request)
        return self._module_for(request).generate(self, request)

    def stream(
        self,
        input_ids: Any,
        attention_mask: Any = None,
        generation_config: GenerationConfig | None = None,
        seed: int = 0,
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
        if request.settings.is_beam_search:
            raise GenerationError("beam search cannot stream: no token is certain before its end")
        return self._module_for(request).stream(self, request)

    def _module_for(self, request: Request) -> Any:
        """The module that generates a request without beams."""
        has_draft = request.assistant is not None or request.settings.prompt_lookup_num_tokens
        return self.backend.speculative if has_draft else self.backend.generation


def make_request(
    model: GenerationMixin,
    input_ids: Any,
    attention_mask: Any = None,
    generation_config: GenerationConfig | None = None,
    seed: int = 0,
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
    ids, mask = inputs.check_prompts(model, input_ids, attention_mask)
    request = check_request(
        config, model.generation_config, ids, mask, generation_config, seed, tokenizer, **overrides
    )
    if past_key_values is not None:
        inputs.check_prefix(model, past_key_values, ids, request.mask)
    if assistant is not None:
        # Nothing but a language model of the same backend will do.
        if not isinstance(assistant, GenerationMixin) or assistant.backend is not model.backend:
            name, kind = type(model).__name__, type(assistant).__name__
            raise GenerationError(f"assistant_model: expected an {name}, received {kind}")
        check_assistant(request.settings, config, assistant.config)
    return replace(request, past=past_key_values, assistant=assistant)
