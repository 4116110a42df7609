"""Methods and attributes that `transformers` gives every model: what needs no framework."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from opt_core.compatibility.names import ModelNames
from opt_core.compatibility.upload import UploadMixin
from opt_core.config import OPTConfig
from opt_core.errors import ArgumentError, ConfigError, InputError
from opt_core.params import Head, ParamSpec, param_specs
from opt_core.quantization import check_not_quantized
from opt_core.summaries import describe_modules

DUMMY_INPUT_IDS = ((7, 6, 0, 0, 1), (1, 2, 3, 0, 0), (0, 0, 0, 4, 5))
"""Ids that `dummy_inputs` holds."""

_SPREAD = 1e-9
"""Share of the old rows' covariance that new rows differ by, as in `transformers`."""


class MethodsMixin(ModelNames, UploadMixin):
    """The embeddings, the vocabulary's size, counts and names, as `transformers` spells them."""

    head: ClassVar[Head]
    config_class: ClassVar[type[OPTConfig]] = OPTConfig
    base_model_prefix: ClassVar[str] = "model"
    main_input_name: ClassVar[str] = "input_ids"
    supports_gradient_checkpointing: ClassVar[bool] = True
    backend: ClassVar[Any]
    _steps: ClassVar[frozenset[str]] = frozenset()
    """Methods that a step of generation calls in `transformers`."""
    config: OPTConfig
    attn_implementation: str

    @property
    def name_or_path(self) -> str:
        """Path or name that the model was loaded from; empty if it was not."""
        return str(getattr(self.config, "name_or_path", ""))

    @property
    def base_model(self) -> Any:
        """The model without its head."""
        return self if self.head == "none" else getattr(self, self.base_model_prefix)

    @property
    def is_gradient_checkpointing(self) -> bool:
        """Whether `gradient_checkpointing_enable` is in effect."""
        return self._decoder.gradient_checkpointing

    @property
    def is_activation_checkpointing(self) -> bool:
        """`is_gradient_checkpointing`, as newer versions call it."""
        return self.is_gradient_checkpointing

    @property
    def dummy_inputs(self) -> dict[str, Any]:
        """A small batch, to try a model with."""
        ids = np.array(DUMMY_INPUT_IDS, np.int32) % self.config.vocab_size
        return {self.main_input_name: self._as_tensor(ids)}

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the class has `generate`."""
        return cls.head == "causal_lm"

    @classmethod
    def from_config(cls, config: OPTConfig, **options: Any) -> Any:
        """A freshly initialised model, as `AutoModel.from_config` makes one.

        Args:
            config: The model's configuration.
            **options: Those of the constructor, and `dtype` or `torch_dtype`;
                `trust_remote_code` is without effect.
        """
        options.pop("trust_remote_code", None)
        dtype = options.pop("torch_dtype", None) or options.pop("dtype", None) or config.dtype
        model: Any = cls(config, **options)  # type: ignore[call-arg]
        return model if dtype is None else model._cast(dtype)

    _from_config = from_config

    def set_decoder(self, decoder: Any) -> None:
        """Replaces the decoder."""
        self.base_model.decoder = decoder

    def get_input_embeddings(self) -> Any:
        """The layer that looks tokens up."""
        return self._decoder.embed_tokens

    def set_input_embeddings(self, value: Any) -> None:
        """Replaces the layer that looks tokens up; a tied head follows.

        Args:
            value: A layer of the framework with a table (V, P); `config.vocab_size` follows it.
        """
        check_not_quantized(self, "set_input_embeddings")
        self._put_embeddings(value)
        self.tie_weights()

    def get_output_embeddings(self) -> Any:
        """The language-model head (the embedding, where it is the same layer); else None."""
        if self.head != "causal_lm":
            return None
        head: Any = getattr(self, "lm_head", None)
        return self.get_input_embeddings() if head is None else head

    def set_output_embeddings(self, new_embeddings: Any) -> None:
        """Replaces the language-model head; where it was tied it is so no more.

        Raises:
            ConfigError: The model has none.
        """
        check_not_quantized(self, "set_output_embeddings")
        if self.head != "causal_lm":
            raise ConfigError(f"set_output_embeddings: {type(self).__name__} has no head")
        self._put_head(new_embeddings)

    def get_position_embeddings(self) -> Any:
        """The table of positions, two rows longer than `max_position_embeddings`."""
        return self._decoder.embed_positions

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Makes a tied head the token embedding; they are one by construction, or are made so."""

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> Any:
        """Gives the vocabulary another size: rows are added to, or taken from, its end.

        Token embedding and language-model head change, tied or not, and `config.vocab_size`.

        Args:
            new_num_tokens: Rows wanted; None: as many as there are.
            pad_to_multiple_of: Round up to a multiple of this.
            mean_resizing: Draw new rows around the mean of the old ones, as narrowly as
                `transformers` does, so that they start unlikely; else N(0, `init_std`).

        Returns:
            The layer that looks tokens up.

        Raises:
            ConfigError: No size, the padding token would be lost, or the model is quantised.
        """
        check_not_quantized(self, "resize_token_embeddings")
        count = self.config.vocab_size if new_num_tokens is None else new_num_tokens
        multiple = 1 if pad_to_multiple_of is None else pad_to_multiple_of
        sizes: dict[str, Any] = {"new_num_tokens": count, "pad_to_multiple_of": multiple}
        for name, value in sizes.items():
            if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < 1:
                raise ConfigError(f"{name}: expected an integer of at least 1, received {value!r}")
        count = -(-int(count) // int(multiple)) * int(multiple)
        if count != self.config.vocab_size:
            old, checkpoint = self.config, self.backend.checkpoint
            self._set_config(vocab_size=count)
            for spec in param_specs(old, self.head):
                if spec.axes[0] == "vocab":
                    table = self._to_array(checkpoint.get_parameter(self, spec))
                    width = old.init_std if not mean_resizing else None
                    self._put_table(spec, resize_table(table, count, width))
            self.tie_weights()
        return self.get_input_embeddings()

    def _described(self: Any) -> str:
        name = type(self).__name__
        if "config" not in dir(self):  # half made, within an error's message
            return f"{name}()"
        specs = param_specs(self.config, self.head)
        count = sum(spec.size for spec in specs)
        return describe_modules(name, specs, f"{count:,} parameters, {self.dtype}")

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Number of parameters, a tied head counted once.

        Args:
            only_trainable: Leave out what a training would not change.
            exclude_embeddings: Leave out the tables of tokens and positions.
        """
        specs = param_specs(self.config, self.head)
        kept = [spec for spec in specs if not (exclude_embeddings and spec.kind == "embedding")]
        return self._count_trainable(kept) if only_trainable else sum(spec.size for spec in kept)

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights.

        Args:
            return_buffers: Count what is no parameter too (quantised weights).
        """
        return sum(self._sizes_in_bytes(return_buffers))

    def estimate_tokens(self, input_dict: Mapping[str, Any]) -> int:
        """Tokens of a batch.

        Raises:
            InputError: It has no `input_ids` and no `inputs_embeds`.
        """
        for name, dimensions in ((self.main_input_name, None), ("inputs_embeds", 2)):
            if name in input_dict:
                return math.prod(tuple(input_dict[name].shape)[:dimensions])
        raise InputError("estimate_tokens: expected input_ids or inputs_embeds, received neither")

    def floating_point_ops(
        self, input_dict: Mapping[str, Any], exclude_embeddings: bool = True
    ) -> int:
        """Operations of one training step, forward and backward: 6 a token and parameter."""
        parameters = self.num_parameters(exclude_embeddings=exclude_embeddings)
        return 6 * self.estimate_tokens(input_dict) * parameters

    def set_attn_implementation(
        self, attn_implementation: str | Mapping[str, str], allow_all_kernels: bool = False
    ) -> None:
        """Computes attention otherwise from now on.

        Args:
            attn_implementation: As in `from_pretrained`; of a dict, the value for "".
            allow_all_kernels: Without effect: no kernel is downloaded.

        Raises:
            ConfigError: No such implementation, or one that cannot be used here.
        """
        given: Any = attn_implementation
        name = given if isinstance(given, str) else given.get("")
        attention = self.backend.attention
        if name not in attention.IMPLEMENTATIONS:
            raise ConfigError(
                f"attn_implementation: expected one of {', '.join(attention.IMPLEMENTATIONS)}, "
                f"received {name!r}"
            )
        if name == "flash_attention_2":
            self._check_flash()
        self.config.attn_implementation = name
        for part in (self, self.base_model):
            part.attn_implementation = name
        self._decoder.implementation = name
        for layer in self._decoder_layers():
            layer.self_attn.implementation = name
        self._forget_programs()

    def add_model_tags(self, tags: str | list[str]) -> None:
        """Adds tags for the model card that `push_to_hub` writes."""
        self.model_tags = (*self.model_tags, *([tags] if isinstance(tags, str) else tags))

    @property
    def _decoder(self) -> Any:
        return self.base_model.decoder

    def _check_width(self, name: str, width: int) -> None:
        """Refuses a table that does not fit the decoder."""
        if width != self.config.embed_dim:
            raise ConfigError(f"{name}: expected a width of {self.config.embed_dim}, found {width}")

    def _set_config(self, **changes: Any) -> None:
        """Changes the configuration, as far as the parameters do."""
        self.config.replace(**changes)  # refuses what does not fit, before anything is changed
        for name, value in changes.items():
            setattr(self.config, name, value)
        for part in (self, self.base_model):
            part.note_structure()

    def note_structure(self) -> None:
        """Takes the configuration as it is for that of the parameters."""
        raise NotImplementedError

    def _without_params(self) -> tuple[Any, Any]:
        """The model, and its parameters apart from it, which only Flax has.

        Raises:
            ConfigError: This is another framework.
        """
        raise ConfigError("_do_init=False: only Flax' models have parameters apart from them")

    def _forget_programs(self) -> None:
        """Drops what was compiled for the layers as they were, where the backend keeps that."""

    def _decoder_layers(self) -> Iterator[Any]:
        """The decoder's layers."""
        raise NotImplementedError

    def _is_patched(self) -> bool:
        """Whether a caller put a function or a hook in the way of the model's call."""
        return False

    def _own_tensors(self) -> dict[str, Any]:
        """Tensors that are none of OPT's, by their paths, with dots between."""
        raise NotImplementedError

    def _own_array(self, tensor: Any) -> NDArray[Any]:
        """The values of one of these, on the host."""
        raise NotImplementedError

    def _build_own(self) -> None:
        """Makes those that are made in a first call, where the backend has such layers."""

    def _put_own(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Puts these tensors where the model is, in its type, and gives some of them values.

        Args:
            values: Canonical name -> values.
        """
        raise NotImplementedError

    def _as_tensor(self, array: NDArray[Any]) -> Any:
        """The framework's tensor."""
        raise NotImplementedError

    def _to_array(self, tensor: Any) -> NDArray[Any]:
        """A parameter's values, on the host."""
        raise NotImplementedError

    def _put_embeddings(self, value: Any) -> None:
        """Makes a layer the token embedding, or its values those of the token embedding."""
        raise NotImplementedError

    def _put_head(self, value: Any) -> None:
        """Makes a layer the language-model head, or its values those of the head."""
        raise NotImplementedError

    def _put_table(self, spec: ParamSpec, table: NDArray[Any]) -> None:
        """Gives the token embedding, or the language-model head, another number of rows."""
        raise NotImplementedError

    def _count_trainable(self, specs: list[ParamSpec]) -> int:
        """Number of the parameters among these that a training would change."""
        raise NotImplementedError

    def _sizes_in_bytes(self, with_buffers: bool) -> Iterator[int]:
        """Bytes of each tensor of the model."""
        raise NotImplementedError

    def _cast(self, dtype: Any) -> Any:
        """The model with weights of another type."""
        raise NotImplementedError

    def _check_flash(self) -> None:
        """Refuses FlashAttention where it cannot run."""
        raise NotImplementedError


def refuse_to_generate(model: MethodsMixin) -> None:
    """Says which class generates.

    Raises:
        ArgumentError: Always, for this is what a model without a language-model head does.
    """
    name = type(model).__name__
    prefix = name[: name.index("OPT")]
    raise ArgumentError(f"{name} does not generate; load it as {prefix}OPTForCausalLM")


def resize_table(
    table_VP: NDArray[Any], count: int, init_std: float | None, seed: int = 0
) -> NDArray[Any]:
    """A table with another number of rows, those that stay unchanged.

    Args:
        table_VP: The old rows.
        count: Rows of the result.
        init_std: Standard deviation of new rows around 0; None: they are drawn around the mean of
            the old ones, with `_SPREAD` of their covariance.
        seed: Of the draw.
    """
    more = count - len(table_VP)
    if more <= 0:
        return table_VP[:count].copy()
    rng = np.random.default_rng(seed)
    if init_std is not None:
        new = rng.standard_normal((more, table_VP.shape[1]), np.float32) * np.float32(init_std)
    else:
        wide = table_VP.astype(np.float32)
        mean = wide.mean(0, keepdims=True)
        # Random sums of what the old rows differ by have their covariance.
        weights = rng.standard_normal((more, len(wide)), np.float32)
        new = mean + weights @ (wide - mean) * np.float32(math.sqrt(_SPREAD / len(wide)))
    return np.concatenate([table_VP, new.astype(table_VP.dtype)])
