"""The models: what all share, the decoder alone, and the language model."""

from collections.abc import Callable
from dataclasses import replace
from os import PathLike
from typing import Any, Self, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.core import Tracer
from jax.sharding import Mesh, Sharding

from opt_core.compatibility.linen import check_seed, warn_of_dtype
from opt_core.compatibility.linen import refuse_linen as __getattr__  # noqa: F401
from opt_core.modeling import Backend, CausalLMMixin, PreTrainedMixin
from opt_core.quantization import check_not_quantized
from opt_flax import _private, attention, checkpoint, inputs, losses, sharding  # fmt: skip
from opt_flax.cache import KVCache, init_cache
from opt_flax.compatibility import (
    FlaxCallOptions,
    GenerationMethods,
    ModelMethods,
    split_mode,
)
from opt_flax.decoder import FlaxOPTDecoder, FlaxOPTOutput
from opt_flax.generation import beam, loop, prefill, sampling, speculative  # fmt: skip
from opt_flax.linear import Linear
from opt_flax.sharding import constrain_rows

_private.register_config()


class FlaxOPTPreTrainedModel(ModelMethods, PreTrainedMixin[FlaxOPTDecoder], nnx.Module):
    """The base of the model and of its heads: making, loading and caches."""

    backend = Backend(
        attention, checkpoint, inputs, losses, loop, beam, speculative, sampling, prefill
    )  # fmt: skip

    def __init__(
        self,
        config: Any,
        seed: int | None = 0,
        attn_implementation: str | None = None,
        scan_layers: bool = False,
        mesh: Mesh | None = None,
        input_shape: Any = None,
        dtype: Any = None,
        _do_init: bool = True,
    ):
        """Makes a freshly initialised model, in evaluation mode (`model.train()` turns dropout on).

        Args:
            config: The model's `OPTConfig`, or one of `transformers`.
            seed: Seed of the weights and of dropout; None leaves the weights as
                `jax.ShapeDtypeStruct`, for a loader to fill.
            attn_implementation: "sdpa", "eager" or "flash_attention_2" (cuDNN's kernel on GPU,
                Pallas' on TPU).
            scan_layers: Keep the layers' weights stacked and run them by `jax.lax.scan`, so that
                a deep model compiles sooner.
            mesh: Devices to spread the weights over (`opt_flax.sharding`); None: one device.
            input_shape: Without effect, as `transformers`' models had it.
            dtype: Type of the weights; None: float32.
            _do_init: False: as `seed=None`, for a call with `params=`.

        Raises:
            ArgumentError: The seed is a shape, which `transformers` has in its place.
            ConfigError: No such attention implementation, or a mesh that cannot be used.
        """
        check_seed(seed)
        self._configure(config, attn_implementation)
        sharding.check_mesh(mesh)
        self.mesh, self.scan_layers = mesh, scan_layers
        self._make_layers()
        self.get_decoder().rngs = nnx.Rngs(dropout=seed or 0)
        wanted = jnp.dtype(dtype or jnp.float32)
        warn_of_dtype(wanted)
        checkpoint.init_abstract(self, wanted)
        if seed is not None and _do_init:
            checkpoint.initialize(self, seed, wanted)

    def _make_layers(self) -> None:
        self.model = FlaxOPTModel(
            self.config, None, self.attn_implementation, self.scan_layers, self.mesh
        )

    @property
    def device(self) -> Sharding:
        """Where the weights are: on one device, or spread over a mesh."""
        return self.get_decoder().embed_positions.embedding[...].sharding

    @property
    def dtype(self) -> jnp.dtype:
        """Type of the weights."""
        return self.get_decoder().embed_positions.embedding.dtype

    def train(self, **attributes: Any) -> None:
        """Switches training mode on, dropout with it."""
        check_not_quantized(self, "train")
        super().train(**attributes)

    def _make_head(self, name: str, size: int, bias: bool) -> Linear:
        return Linear(self.config.embed_dim, size, bias=bias)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of at most `max_length` tokens.

        It has a mask from the beginning, so that a `lax.scan` may carry it whether or not the calls
        have one.
        """
        cache = init_cache(self.config, batch_size, max_length, self.dtype, self.mesh)
        mask = constrain_rows(jnp.ones((batch_size, max_length), bool), self.mesh)
        return replace(cache, mask=mask)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | PathLike[str] | None = None,
        dtype: Any = "float32",
        mesh: Mesh | None = None,
        attn_implementation: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        config: Any = None,
        scan_layers: bool = False,
        quantize: str | None = None,
        **arguments: Any,
    ) -> Self:
        """Loads a checkpoint, from safetensors or from PyTorch's `.bin`.

        Args:
            path_or_hub_id: Folder, weight file, hub id such as "facebook/opt-125m", or "mini".
            dtype: "float32", "bfloat16", "float16", "float64" (if JAX has it enabled), or "auto"
                for the stored one.
            mesh: Devices to spread the weights over, as `opt_flax.sharding` says: each reads its
                part of the file, no host holds the whole. None: JAX's default device.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            progress: Called with (bytes loaded, bytes in all) after each tensor.
            config: Replaces the checkpoint's config.json: a configuration, or where one is.
            scan_layers: As in the constructor.
            quantize: "int8" or "int4": keep the weights so (`opt_core.quantization`), only to run,
                on one device.
            **arguments: `revision`, `token`, `local_files_only` and so on, as in
                `opt_core.hub.resolve`; `adapter`, a PEFT adapter to merge; fields of the
                configuration, such as `num_labels`; and what else `transformers` takes
                (`opt_core.compatibility.loading`).

        Raises:
            CheckpointError: Files are missing or damaged, or do not fit the configuration.
            ConfigError: The configuration is malformed, or an option is not one of the above.
        """
        return checkpoint.from_pretrained(
            cls,
            path_or_hub_id,
            dtype,
            mesh,
            attn_implementation,
            progress,
            config,
            scan_layers,
            quantize,
            **arguments,
        )

    def _decode(self, *values: Any, **mode: Any) -> FlaxOPTOutput:
        given, options = values
        options, mode = split_mode(options, **mode)
        return super()._decode(given, options, **mode)

    def _trains(self, deterministic: bool | None = None, **mode: Any) -> bool:
        return not (self.get_decoder().deterministic if deterministic is None else deterministic)

    def _is_traced(self, *tensors: Any) -> bool:
        weight = self.get_decoder().embed_positions.embedding[...]
        return any(isinstance(x, Tracer) for x in (weight, *tensors))

    def _starts_cache(self, use_cache: bool | None, *tensors: Any, **mode: Any) -> bool:
        is_program = bool(
            getattr(jax.config, "jax_disable_jit", False)
        )  # which returns the same when run in steps
        return super()._starts_cache(bool(use_cache) if is_program else use_cache, *tensors, **mode)

    def _as_floats(self, name: str, values: Any) -> Array:
        return inputs.as_tensor(name, values).astype(self.dtype)

    def _check_inputs(self, *values: Any) -> Any:
        return inputs.check_inputs(self.config, self.dtype, *values)

    def _lengths(self, embeds: Array, cache: KVCache | None) -> tuple[int, int]:
        count = embeds.shape[1]
        return count, cache.filled(count) if cache else count


class FlaxOPTModel(FlaxOPTPreTrainedModel):
    """The decoder without a head."""

    head = "none"

    def _make_layers(self) -> None:
        self.decoder = FlaxOPTDecoder(
            self.config, self.attn_implementation, self.scan_layers, self.mesh
        )

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Unpack[FlaxCallOptions],
    ) -> FlaxOPTOutput:
        """Computes the hidden states.

        Args:
            input_ids: (B, T) token ids; NumPy arrays and lists are accepted too.
            attention_mask: (B, T), or (B, past + T) with a cache: 1 for tokens, 0 for padding.
            position_ids: (B, T) positions, -1 for padding; by default they follow from the mask.
            inputs_embeds: (B, T, P) embeddings in place of `input_ids`.
            past_key_values: A cache, of an earlier output or of `init_cache`: these tokens follow
                the ones it holds.
            deterministic: Whether dropout is off; None: `model.eval()` and `model.train()` say.
            rngs: Source of dropout, its stream "dropout"; None: the model's own.
            **kwargs: `output_hidden_states`, `use_cache` and the others of `FlaxCallOptions`.

        Raises:
            InputError: Ids outside the vocabulary, shapes that do not fit, or too long a sequence.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, kwargs, deterministic=deterministic, rngs=rngs)
        return self._finish(out, kwargs)


class FlaxOPTForCausalLM(GenerationMethods, CausalLMMixin, FlaxOPTPreTrainedModel):
    """The language model: the next token's logits."""

    def _make_layers(self) -> None:
        super()._make_layers()
        P, V = self.config.embed_dim, self.config.vocab_size
        is_tied = self.config.tie_word_embeddings
        self.lm_head = None if is_tied else Linear(P, V, bias=False, mesh=self.mesh)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        past_key_values: KVCache | None = None,
        labels: Any = None,
        logits_to_keep: Any = 0,
        deterministic: bool | None = None,
        rngs: nnx.Rngs | None = None,
        **kwargs: Unpack[FlaxCallOptions],
    ) -> FlaxOPTOutput:
        """Computes logits, and the loss where labels are given.

        Args:
            input_ids: As in `FlaxOPTModel.__call__`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            past_key_values: See there.
            labels: (B, T) ids, -100 to ignore one; the model shifts them. Usually `input_ids`.
            logits_to_keep: Compute logits for this many last tokens only, 0 for all, or for those
                of an index.
            deterministic: See there.
            rngs: See there.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, kwargs, deterministic=deterministic, rngs=rngs)
        return self._finish(out, kwargs, labels, logits_to_keep)

    def compute_logits(self, hidden: Array) -> Array:
        """The language-model head: (..., P) states to (..., V) logits."""
        if self.lm_head is not None:
            return self.lm_head(hidden)
        return self.get_decoder().embed_tokens.attend(hidden)
