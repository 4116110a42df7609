"""The neutral half of the models: what every backend's classes do alike.

These are mixins: a backend's base class inherits `PreTrainedMixin` and its framework's module
class, and names in `backend` the modules that do the framework's part.
"""

from collections.abc import Mapping
from os import PathLike
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

from opt_core.compatibility.calls import (
    CallOptions,
    check_cache_position,
    check_options,
    each_layers_heads,
    kept_tokens,
)
from opt_core.compatibility.config_keys import check_fixed
from opt_core.compatibility.live_config import check_shapes, layers_follow, shapes_of
from opt_core.compatibility.methods import MethodsMixin
from opt_core.compatibility.saving import read_saving, refuse_of_quantized
from opt_core.compatibility.subclasses import warn_of_own_layers
from opt_core.config import OPTConfig
from opt_core.errors import AbsentError, ConfigError, InputError, UnsupportedError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.mixin import GenerationMixin
from opt_core.params import Head
from opt_core.quantization import is_quantized
from opt_core.training.labels import question_answering

Decoder = TypeVar("Decoder")
INTERCHANGEABLE = ("eager", "sdpa", "flash_attention_2")
"""Names of implementations of attention that give the same numbers: where a framework lacks one,
it takes "sdpa"."""


class Backend(NamedTuple):
    """Modules of a backend that the mixins call.

    Attributes:
        attention: Its `IMPLEMENTATIONS`.
        checkpoint: Its `save_pretrained`.
        inputs: Its `to_tensor`, `to_array`, `full_mask` and `check_window`;
            `check_prompts(model, input_ids, attention_mask)`, which returns ids (B, T) and their
            bool mask, or None, in NumPy;
            `check_prefix(model, cache, ids, mask)`.
        losses: Its `causal_lm`, `last_token`, `classification` and `span_position`.
        loop: Its `generate(model, request)` and `stream(model, request)`, token by token.
        beam: Its `search(model, request)`.
        speculative: Its `generate(model, request)` and `stream(model, request)`, by drafts.
        sampling: The filters that `opt_core.generation.filters` applies; its `request_rules`,
            `random_source` and `draw_seed`.
        prefill: Its `observe`, for `opt_core.generation.observed`.
    """

    attention: Any
    checkpoint: Any
    inputs: Any
    losses: Any
    loop: Any
    beam: Any
    speculative: Any
    sampling: Any
    prefill: Any


_NO_HEAD = (
    "{}: a class of your own extends OPTModel or one of the heads, not the base of them: "
    "super().__init__(config) makes their layers, and yours come behind"
)


class _NoHead:
    """The head of a class that has none, such as one of the caller's that extends the base."""

    def __get__(self, model: Any, owner: type) -> Any:
        raise AbsentError(_NO_HEAD.format(owner.__name__))


class PreTrainedMixin(MethodsMixin, Generic[Decoder]):
    """The part of all models that is no framework's: settings, counting, saving, decoding."""

    backend: ClassVar[Backend]
    head: ClassVar[Head] = _NoHead()  # type: ignore[assignment]
    accepts_loss_kwargs: ClassVar[bool] = False
    """Whether the loss heeds `num_items_in_batch`: the Trainer of `transformers` asks."""
    config: OPTConfig
    generation_config: GenerationConfig
    generation_config_class: ClassVar[type[GenerationConfig]] = GenerationConfig

    def _configure(self, config: Any, attn_implementation: str | None) -> None:
        """Takes the settings over.

        Raises:
            ConfigError: No such attention implementation, or a malformed configuration.
        """
        if not isinstance(getattr(type(self), "head", None), str):
            raise UnsupportedError(_NO_HEAD.format(type(self).__name__))
        config = OPTConfig.from_any(config)
        config.validate()
        check_fixed(config)
        known = self.backend.attention.IMPLEMENTATIONS
        name = attn_implementation or config.attn_implementation
        if name in INTERCHANGEABLE and name not in known:
            name = "sdpa"
        if name not in known:
            raise ConfigError(
                f"attn_implementation: expected one of {', '.join(known)}, received {name!r}"
            )
        if name != config.attn_implementation:
            config = config.copy()  # the caller's stays as it is
            config.attn_implementation = name
        self.config, self.attn_implementation = config, name
        self.note_structure()
        self.generation_config = GenerationConfig.from_model(config)

    def note_structure(self) -> None:
        """Takes the configuration as it is for that of the parameters."""
        self._made_of = shapes_of(self.config)

    def check_config(self) -> None:
        """Checks that the configuration still is that of the parameters.

        Raises:
            ConfigError: A field was changed that decides their shapes.
        """
        if layers_follow(self.config, self._made_of, self._decoder_layers):
            for part in (self, self.base_model):  # the caller took layers out, and said so
                part.note_structure()
        check_shapes(self.config, self._made_of, self.head)

    def get_decoder(self) -> Decoder:
        """The decoder, wherever the class keeps it."""
        owner: Any = self if self.head == "none" else getattr(self, "model")  # noqa: B009
        return owner.decoder

    def gradient_checkpointing_enable(
        self,
        gradient_checkpointing_kwargs: Mapping[str, Any] | None = None,
        activation_checkpointing_kwargs: Mapping[str, Any] | None = None,
        every_n_layers: int = 1,
        offload: bool = False,
    ) -> None:
        """In training, keep only each layer's input and compute the rest again when needed.

        Args:
            gradient_checkpointing_kwargs: Without effect: PyTorch's `use_reentrant` and the like
                change how, not what is computed.
            activation_checkpointing_kwargs: The same, under its newer name.
            every_n_layers: 1 only.
            offload: False only.
        """
        if every_n_layers != 1 or offload:
            raise ConfigError(
                "gradient checkpointing: expected every_n_layers=1 and offload=False, received "
                f"{every_n_layers} and {offload}"
            )
        self._checkpoint_gradients(True)

    activation_checkpointing_enable = gradient_checkpointing_enable

    def gradient_checkpointing_disable(self) -> None:
        """In training, keep every activation (the default)."""
        self._checkpoint_gradients(False)

    activation_checkpointing_disable = gradient_checkpointing_disable

    def _checkpoint_gradients(self, enabled: bool) -> None:
        decoder: Any = self.get_decoder()
        decoder.gradient_checkpointing = enabled

    def save_pretrained(
        self,
        folder: str | PathLike[str] | None = None,
        max_shard_size: str | int = "5GB",
        **arguments: Any,
    ) -> None:
        """Writes config.json, generation_config.json and safetensors, as `transformers` reads them.

        Args:
            folder: Made if missing; other files in it stay.
            max_shard_size: Larger models are split into files of at most this size.
            **arguments: Those of `transformers`, as `opt_core.compatibility.saving` takes them:
                `state_dict`, `safe_serialization`, `push_to_hub` and so on.
        """
        self.check_config()
        self.config.validate()
        warn_of_own_layers(self)
        options = read_saving(folder, max_shard_size, arguments)
        if is_quantized(self):
            refuse_of_quantized(options)
        if options.writes:
            options.write(lambda where: self.backend.checkpoint.save_pretrained(self, where))
        if options.repository:
            self.push_to_hub(options.repository, max_shard_size=max_shard_size, **options.hub)

    def _decode(self, given: tuple[Any, ...], options: CallOptions, **mode: Any) -> Any:
        """Checks the inputs, embeds them and runs the decoder.

        Args:
            given: `input_ids`, `attention_mask`, `position_ids`, `inputs_embeds` and
                `past_key_values`, as the model was given them.
            options: The call's other arguments.
            **mode: More arguments of the framework's decoder.
        """
        self.check_config()
        check_options(options)
        config, use_cache, inputs = self.config, options.get("use_cache"), self.backend.inputs
        past = options.get("cache") if given[-1] is None else given[-1]
        cache = self._adopt(past, self._starts_cache(use_cache, *given[:-1], **mode))
        ids, mask, positions, embeds, cache = self._check_inputs(*given[:-1], cache)
        decoder: Any = self.get_decoder()
        if embeds is None:
            embeds = decoder.embed_tokens(ids)
        count, length = self._lengths(embeds, cache)
        slots = options.get("cache_position")
        if slots is not None and inputs.is_known(slots) and inputs.is_known(length):
            check_cache_position(slots, length - count, count)
        mask = inputs.full_mask(mask, count, cache)
        if positions is None:
            inputs.check_window(config, mask, length)
        heads = options.get("head_mask")
        if heads is not None:
            mode["head_mask"] = each_layers_heads(config, self._as_floats("head_mask", heads))
        for name in ("output_hidden_states", "output_attentions"):
            wanted = options.get(name)
            mode[name] = getattr(config, name) if wanted is None else wanted
        out = decoder(embeds, position_ids=positions, mask_BS=mask, cache=cache, **mode)
        if use_cache is False:
            out.past_key_values = None
        return out

    def _finish(self, out: Any, options: CallOptions) -> Any:
        """The output in the shape that was asked for."""
        return_dict = options.get("return_dict")
        if return_dict is None:
            return_dict = self.config.use_return_dict
        return out if return_dict else out.to_tuple()

    def _starts_cache(self, use_cache: bool | None, *tensors: Any, **mode: Any) -> bool:
        """Whether a call without a cache begins one.

        Args:
            use_cache: As the caller gave it; None: where it costs nothing.
            *tensors: The inputs as they were given.
            **mode: More arguments of the framework's decoder.
        """
        decoder: Any = self.get_decoder()
        trains = self._trains(**mode)
        if trains and decoder.gradient_checkpointing:
            return False  # as in transformers: the layers run twice
        if use_cache is None:
            return self.config.use_cache and not trains and not self._is_traced(*tensors)
        return use_cache

    def _adopt(self, past: Any, starts: bool) -> Any:
        """The cache that a call goes on from: see `CacheMixin.adopt`."""
        return self.backend.inputs.KVCache.adopt(past, starts)

    def _as_floats(self, name: str, values: Any) -> Any:
        """Numbers as a tensor of the type the model computes in."""
        raise NotImplementedError

    def _trains(self, **mode: Any) -> bool:
        """Whether dropout is on."""
        raise NotImplementedError

    def _is_traced(self, *tensors: Any) -> bool:
        """Whether the call becomes part of a program, whose results a cache would add to."""
        raise NotImplementedError

    def _make_layers(self) -> None:
        """Makes the decoder, and the head that sits on it."""
        raise NotImplementedError

    def _make_head(self, name: str, size: int, bias: bool) -> Any:
        """The backend's linear layer from the decoder's output (P) to so many scores."""
        raise NotImplementedError

    def _check_inputs(self, *inputs: Any) -> tuple[Any, Any, Any, Any, Any]:
        """The backend's `check_inputs` for this model."""
        raise NotImplementedError

    def _lengths(self, embeds: Any, cache: Any) -> tuple[Any, Any]:
        """New tokens T, and tokens in all, those of the cache included."""
        count = embeds.shape[1]
        return count, count + (cache.length if cache else 0)


class CausalLMMixin(GenerationMixin):
    """The language model's head."""

    head: ClassVar[Head] = "causal_lm"
    accepts_loss_kwargs: ClassVar[bool] = True
    backend: ClassVar[Backend]

    def compute_logits(self, hidden: Any) -> Any:
        """The language-model head: (..., P) states to (..., V) logits."""
        raise NotImplementedError

    def _keep(self, hidden: Any, places: Any) -> Any:
        """The states of some tokens: a slice of them, or an index."""
        return hidden[:, places]

    def _finish(
        self, out: Any, options: CallOptions, labels: Any = None, logits_to_keep: Any = 0
    ) -> Any:
        """Adds the logits, and the loss where labels are given."""
        kept = self._keep(out.last_hidden_state, kept_tokens(logits_to_keep))
        logits, loss = self.compute_logits(kept), None
        if labels is not None:
            loss = self._token_loss(logits, labels, options.get("num_items_in_batch"))
        out = out.headed(loss=loss, logits=logits)
        # From Python 3.12 on PyTorch's compiler knows `super()` only together with its method.
        return super()._finish(out, options)  # pyright: ignore

    def _token_loss(self, logits: Any, labels: Any, items: Any) -> Any:
        return self.backend.losses.causal_lm(logits, labels, items=items)


class SequenceClassificationMixin:
    """The head of classifiers and regressors."""

    head: ClassVar[Head] = "sequence_classification"
    backend: ClassVar[Backend]
    config: OPTConfig
    score: Any

    def _make_layers(self) -> None:
        base: Any = super()
        base._make_layers()
        self.score = base._make_head("score", self.config.num_labels, bias=False)

    def _finish(self, out: Any, options: CallOptions, input_ids: Any, labels: Any) -> Any:
        """Adds the scores of each row's last token, and the loss where labels are given."""
        losses, hidden_BTP = self.backend.losses, out.last_hidden_state
        last_B = losses.last_token(input_ids, hidden_BTP, self.config.pad_token_id)
        logits, loss = self.score(self._pick(hidden_BTP, last_B)), None
        if labels is not None:
            loss = losses.classification(logits, labels, self.config)
        out = out.headed(loss=loss, logits=logits)
        return super()._finish(out, options)  # pyright: ignore

    def _pick(self, hidden_BTP: Any, index_B: Any) -> Any:
        """One state of each row, (B, P)."""
        raise NotImplementedError


class QuestionAnsweringMixin:
    """The head of extractive question answering."""

    head: ClassVar[Head] = "question_answering"
    backend: ClassVar[Backend]
    qa_outputs: Any

    def _make_layers(self) -> None:
        base: Any = super()
        base._make_layers()
        self.qa_outputs = base._make_head("qa_outputs", 2, bias=True)

    def _finish(
        self, out: Any, options: CallOptions, start_positions: Any, end_positions: Any
    ) -> Any:
        """Adds the logits of start and end, and the loss where both positions are given."""
        if (start_positions is None) != (end_positions is None):
            raise InputError("start_positions and end_positions belong together, received one")
        logits_BT2, loss = self.qa_outputs(out.last_hidden_state), None
        start, end = logits_BT2[..., 0], logits_BT2[..., 1]
        if start_positions is not None:
            loss = question_answering(
                self.backend.losses, start, end, start_positions, end_positions
            )
        out = out.headed(loss=loss, start_logits=start, end_logits=end)
        return super()._finish(out, options)  # pyright: ignore
