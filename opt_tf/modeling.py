"""The models: what all share, the decoder alone, and the language model."""

from collections import UserDict
from collections.abc import Callable
from os import PathLike
from typing import Any, Self, Unpack

import keras
import tensorflow as tf

from opt_core.compatibility import keras_hub
from opt_core.compatibility.calls import CallOptions
from opt_core.config import OPTConfig
from opt_core.generation.config import GenerationConfig
from opt_core.modeling import Backend, CausalLMMixin, PreTrainedMixin
from opt_core.quantization import check_not_quantized, check_scheme
from opt_tf import _private, attention, checkpoint, inputs, losses, quantization
from opt_tf.cache import KVCache, init_cache
from opt_tf.compatibility import ModelMethods
from opt_tf.decoder import TFOPTDecoder, TFOPTOutput
from opt_tf.generation import beam, loop, prefill, sampling, speculative
from opt_tf.keras_fit import Fitted
from opt_tf.keras_hub import GenerationMethods
from opt_tf.linear import Linear, sizes
from opt_tf.named_inputs import name_inputs


class _Untracked(UserDict[Any, Any]):
    """A dict that Keras does not take for a part of the model."""


class TFOPTPreTrainedModel(ModelMethods, PreTrainedMixin[TFOPTDecoder], Fitted):
    """The base of the model and of its heads: making, loading and caches."""

    backend = Backend(
        attention, checkpoint, inputs, losses, loop, beam, speculative, sampling, prefill
    )  # fmt: skip

    def __init__(
        self,
        config: Any = None,
        seed: int | None = 0,
        attn_implementation: str | None = None,
        quantize: str | None = None,
        **options: Any,
    ):
        """Makes a freshly initialised model; `training=True` turns dropout on, as fit does.

        Args:
            config: The model's `OPTConfig`, or one of `transformers`.
            seed: Seed of the weights; None leaves them zero, for a loader to fill.
            attn_implementation: "sdpa" or "eager".
            quantize: As in `from_pretrained`.
            **options: Keras' own: `name`, `trainable`, and `dtype` ("bfloat16", or a policy such
                as "mixed_bfloat16"); in place of the configuration KerasHub's, such as
                `vocabulary_size`, or `backbone` and `preprocessor`.

        Raises:
            ArgumentError: No configuration.
            ConfigError: No such attention implementation or quantisation.
        """
        backbone, preprocessor = options.pop("backbone", None), options.pop("preprocessor", None)
        self.compiles_itself = options.pop("compile", True)
        config = keras_hub.find_config(config, backbone, options)
        super().__init__(**options)
        self.preprocessor = preprocessor
        self._configure(config, attn_implementation)
        check_scheme(quantize)
        self.quantized = quantize
        self.programs = _Untracked()
        _private.keep_inputs(self)
        self.programs["backbone"] = backbone  # where Keras does not look
        self._make_layers()
        quantization.prepare(self, quantize)
        self.build()
        _private.unlock(self)  # a class of a user's adds layers of its own
        weights = None if self.programs.pop("backbone") is None else backbone.get_weights()
        if seed is not None:
            checkpoint.initialize(self, seed)
        if weights is not None:
            backbone.set_weights(weights)

    def _make_layers(self) -> None:
        self.model = self.programs["backbone"] or TFOPTModel(
            self.config, None, self.attn_implementation, self.quantized, name="model",
            dtype=self.dtype_policy,
        )  # fmt: skip

    def build(self, input_shape: Any = None) -> None:
        """Makes the variables, which depend on no input; Keras may call it again."""
        for part in self.layers:
            if not part.built:
                part.build()

    @tf.autograph.experimental.do_not_convert  # there is nothing for it in here, and much to read
    def __call__(self, input_ids: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Computes the output (`call`); several inputs may come as one dict, tuple or list.

        Of a dict by KerasHub's names it is what its models return: the logits or states alone.
        """
        out = super().__call__(**name_inputs(self, input_ids, args, kwargs))
        is_alone = keras_hub.are_keras_hubs(input_ids) and self.head in ("none", "causal_lm")
        return self._predictions(out) if is_alone else out

    @property
    def device(self) -> str:
        """Where the weights are, as TensorFlow names devices; `dtype` is Keras' own."""
        weight: Any = self.get_decoder().embed_positions.embeddings
        return weight.value.device

    def _make_head(self, name: str, size: int, bias: bool) -> Linear:
        return Linear(self.config.embed_dim, size, bias, name=name, dtype=self.dtype_policy)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of at most `max_length` tokens."""
        return init_cache(self.config, batch_size, max_length, self.compute_dtype)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | PathLike[str] | None = None,
        dtype: Any = "float32",
        attn_implementation: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        config: Any = None,
        quantize: str | None = None,
        **arguments: Any,
    ) -> Self:
        """Loads a checkpoint.

        Args:
            path_or_hub_id: Folder, weight file, hub id such as "facebook/opt-125m", or "mini".
            dtype: "float32", "bfloat16", "float16", "float64", "auto" for the stored one, or
                Keras' "mixed_bfloat16" or "mixed_float16".
            attn_implementation: "sdpa" or "eager".
            progress: Called with (bytes loaded, bytes in all) after each tensor.
            config: Replaces the checkpoint's config.json: a configuration, or where one is.
            quantize: "int8" or "int4": keep the weights so (`opt_core.quantization`), only to run.
            **arguments: `revision`, `token`, `local_files_only` and so on, as in
                `opt_core.hub.resolve`; `adapter`, a PEFT adapter to merge; fields of the
                configuration, such as `num_labels`; and what else `transformers` takes
                (`opt_core.compatibility.loading`).

        Raises:
            CheckpointError: Files are missing or damaged, or do not fit the configuration.
            ConfigError: The configuration is malformed, or an option is not one of the above.
        """
        return checkpoint.from_pretrained(
            cls, path_or_hub_id, dtype, attn_implementation, progress, config, quantize, **arguments
        )

    def get_config(self) -> dict[str, Any]:
        """The settings that Keras writes beside the weights in a .keras file."""
        base: Any = super().get_config()
        return base | {
            "config": self.config.to_dict(),
            "attn_implementation": self.attn_implementation,
            "quantize": self.quantized,
            "generation_config": dict(vars(self.generation_config)),
        }

    @classmethod
    def from_config(cls, config: Any, custom_objects: Any = None) -> Self:
        """Makes the model that `get_config` describes, its weights zero.

        Of an `OPTConfig`, or of what its `to_dict` gives, the model is freshly initialised.
        """
        if isinstance(config, OPTConfig) or "config" not in config:
            return cls(config if isinstance(config, OPTConfig) else OPTConfig.from_dict(config))
        values = dict(config)
        settings = GenerationConfig(**values.pop("generation_config"))
        model = cls(OPTConfig.from_dict(values.pop("config")), None, **values)
        model.generation_config = settings
        return model

    def _decode(self, *values: Any, training: bool | None = None, **options: Any) -> TFOPTOutput:
        if training:
            check_not_quantized(self, "training=True")
        return super()._decode(*values, training=training, **options)

    def _trains(self, training: bool | None = None, **mode: Any) -> bool:
        return bool(training)

    def _is_traced(self, *tensors: Any) -> bool:
        return not tf.executing_eagerly()

    def _as_floats(self, name: str, values: Any) -> tf.Tensor:
        return tf.cast(inputs.as_tensor(name, values), self.compute_dtype)

    def _check_inputs(self, *values: Any) -> Any:
        return inputs.check_inputs(self.config, self.compute_dtype, *values)

    def _lengths(self, embeds: Any, cache: KVCache | None) -> tuple[Any, Any]:
        count = sizes(embeds)[1]
        return count, count + (cache.length if cache else 0)


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTModel(TFOPTPreTrainedModel):
    """The decoder without a head."""

    head = "none"

    def _make_layers(self) -> None:
        self.decoder = TFOPTDecoder(
            self.config, self.attn_implementation, name="decoder", dtype=self.dtype_policy
        )

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        training: bool | None = None,
        **kwargs: Unpack[CallOptions],
    ) -> TFOPTOutput:
        """Computes the hidden states.

        Args:
            input_ids: (B, T) token ids; NumPy arrays and lists are accepted too.
            attention_mask: (B, T), or (B, past + T) with a cache: 1 for tokens, 0 for padding.
            position_ids: (B, T) positions, -1 for padding; by default they follow from the mask.
            inputs_embeds: (B, T, P) embeddings in place of `input_ids`.
            past_key_values: A cache, of an earlier output or of `init_cache`: these tokens follow
                the ones it holds.
            training: Whether to apply dropout and layerdrop; by default not.
            **kwargs: `output_hidden_states`, `use_cache` and the others of `CallOptions`.

        Raises:
            InputError: Ids outside the vocabulary, shapes that do not fit, or too long a sequence.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, kwargs, training=training)
        return self._finish(out, kwargs)

    def _predictions(self, output: TFOPTOutput) -> Any:
        return output.last_hidden_state


@keras.saving.register_keras_serializable("opt_tf")
class TFOPTForCausalLM(GenerationMethods, CausalLMMixin, TFOPTPreTrainedModel):
    """The language model: the next token's logits."""

    backbone_cls = TFOPTModel

    def _make_layers(self) -> None:
        super()._make_layers()
        config, dtype = self.config, self.dtype_policy
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(
                config.embed_dim, config.vocab_size, False, name="lm_head", dtype=dtype
            )

    def call(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        labels: Any = None,
        logits_to_keep: Any = 0,
        training: bool | None = None,
        **kwargs: Unpack[CallOptions],
    ) -> TFOPTOutput:
        """Computes logits, and the loss where labels are given.

        Args:
            input_ids: As in `TFOPTModel.call`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            past_key_values: See there.
            labels: (B, T) ids, -100 to ignore one; the model shifts them. Usually `input_ids`.
            logits_to_keep: Compute logits for this many last tokens only, 0 for all, or for those
                of an index.
            training: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, kwargs, training=training)
        return self._finish(out, kwargs, labels, logits_to_keep)

    def compute_logits(self, hidden: tf.Tensor) -> tf.Tensor:
        """The language-model head: (..., P) states to (..., V) logits."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return self.get_decoder().embed_tokens.attend(hidden)

    def _keep(self, hidden: tf.Tensor, places: Any) -> tf.Tensor:
        if isinstance(places, slice):
            return super()._keep(hidden, places)
        return tf.gather(hidden, places, axis=1)

    def _loss(self, x: Any, y: Any, output: TFOPTOutput) -> tf.Tensor:
        assert output.logits is not None
        return losses.causal_lm(output.logits, self._labels(x, y))

    def _labels(self, x: Any, y: Any) -> Any:
        """Labels (B, T): y, or the ids that are no padding."""
        if y is not None:
            return y
        ids, mask = (x["input_ids"], x.get("attention_mask")) if isinstance(x, dict) else (x, None)
        return ids if mask is None else tf.where(tf.cast(mask, tf.bool), ids, losses.IGNORE_INDEX)
