"""The models: what all share, the decoder alone, and the language model."""

import functools
import sys
from collections.abc import Callable
from os import PathLike
from typing import Any, Self, Unpack

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from opt_core.compatibility.calls import CallOptions
from opt_core.modeling import Backend, CausalLMMixin, PreTrainedMixin
from opt_core.quantization import check_not_quantized
from opt_torch import _private, attention, checkpoint, distribution, inputs, losses, sharding
from opt_torch import offload as offloading
from opt_torch.cache import KVCache, init_cache
from opt_torch.compatibility import (
    GenerationMethods,
    ModelMethods,
    adopt_cache,
    serve_trainer,
)
from opt_torch.decoder import OPTDecoder, OPTOutput
from opt_torch.generation import beam, loop, prefill, sampling, speculative
from opt_torch.linear import apply_linear, forget_packed


class OPTPreTrainedModel(ModelMethods, PreTrainedMixin[OPTDecoder], nn.Module):
    """The base of the model and of its heads: making, loading and caches."""

    backend = Backend(
        attention, checkpoint, inputs, losses, loop, beam, speculative, sampling, prefill
    )  # fmt: skip

    def __init__(
        self,
        config: Any,
        seed: int | None = 0,
        attn_implementation: str | None = None,
        mesh: DeviceMesh | None = None,
    ):
        """Makes a freshly initialised model, in evaluation mode (`model.train()` turns dropout on).

        Args:
            config: The model's `OPTConfig`, or one of `transformers`.
            seed: Seed of the weights; None leaves them on the meta device, for a loader to fill.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            mesh: Processes to spread the weights over (`opt_torch.sharding`); None: this one has
                them all.

        Raises:
            ConfigError: No such attention implementation, or a mesh that cannot be used.
        """
        super().__init__()
        self._configure(config, attn_implementation)
        sharding.check_mesh(mesh)
        self.mesh = mesh
        is_meant_empty = torch.get_default_device().type == "meta"
        with torch.device("meta"):
            self._make_layers()
        if seed is not None and not is_meant_empty:
            checkpoint.initialize(self, seed)
            if mesh is None:
                self.to(torch.get_default_dtype())
        self.register_state_dict_post_hook(serve_trainer)
        self.eval()

    def _make_layers(self) -> None:
        self.model = OPTModel(self.config, None, self.attn_implementation)

    @property
    def device(self) -> torch.device:
        """Where the weights are, or, while accelerate keeps them elsewhere, where it computes."""
        positions = self.get_decoder().embed_positions
        place = positions.weight.device
        if place.type != "meta" or not hasattr(positions, "_hf_hook"):
            return place
        return torch.device(positions._hf_hook.execution_device)

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.get_decoder().embed_positions.weight.dtype

    def train(self, mode: bool = True) -> Self:
        """Switches training mode, dropout with it."""
        if mode:
            check_not_quantized(self, "train")
            offloading.check_not_offloaded(self, "train")
            forget_packed(self)
        return super().train(mode)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Self:
        forget_packed(self)
        return super()._apply(fn, recurse)

    def _make_head(self, name: str, size: int, bias: bool) -> nn.Linear:
        return nn.Linear(self.config.embed_dim, size, bias=bias)

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of at most `max_length` tokens."""
        heads = distribution.local_heads(self, self.mesh)
        return init_cache(self.config, batch_size, max_length, self.dtype, self.device, heads)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | PathLike[str] | None = None,
        dtype: str | torch.dtype | None = "float32",
        device: str | torch.device = "cpu",
        attn_implementation: str | None = None,
        progress: Callable[[int, int], None] | None = None,
        config: Any = None,
        quantize: str | None = None,
        mesh: DeviceMesh | None = None,
        offload: bool | str = False,
        **arguments: Any,
    ) -> Self:
        """Loads a checkpoint.

        On the CPU, weights already stored in `dtype` are mapped from the file, not copied.

        Args:
            path_or_hub_id: Folder, weight file, hub id such as "facebook/opt-125m", or "mini".
            dtype: "float32", "bfloat16", "float16", "float64", or "auto" for the stored one.
            device: Where to put the weights.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            progress: Called with (bytes loaded, bytes in all) after each tensor.
            config: Replaces the checkpoint's config.json: a configuration, or where one is.
            quantize: "int8" or "int4": keep the weights so (`opt_core.quantization`), only to run,
                in one process.
            mesh: Processes to spread the weights over, as `opt_torch.sharding` says: each reads its
                part of the file onto its own device, none holds the whole. None: no others.
            offload: True: leave the weights in the file, on the CPU, only to run: each layer is
                read when its turn comes, what fits into memory stays there. `dtype` is that of the
                file or wider. "auto": where the weights do not fit into free memory.
            **arguments: `revision`, `token`, `local_files_only` and so on, as in
                `opt_core.hub.resolve`; `adapter`, a PEFT adapter to merge; fields of the
                configuration, such as `num_labels`; and what else `transformers` takes
                (`opt_core.compatibility.loading`).

        Raises:
            CheckpointError: Files are missing or damaged, or do not fit the configuration.
            ConfigError: The configuration is malformed, or an option is not one of the above.
        """
        return checkpoint.from_pretrained(
            cls, path_or_hub_id, dtype, device, attn_implementation, progress, config, quantize,
            mesh, offload, **arguments,
        )  # fmt: skip

    def _adopt(self, past: Any, starts: bool) -> Any:
        return adopt_cache(past) or super()._adopt(past, starts)

    def _trains(self, **mode: Any) -> bool:
        return self.training

    def _is_traced(self, *tensors: Any) -> bool:
        return _private.is_jit_tracing() or torch.compiler.is_exporting()

    def _as_floats(self, name: str, values: Any) -> Tensor:
        return inputs.as_tensor(name, values, self.device).to(self.dtype)

    def _check_inputs(self, *values: Any) -> Any:
        heads = distribution.local_heads(self, self.mesh)
        return inputs.check_inputs(self.config, self.device, self.dtype, heads, *values)

    def _gather_rest(self) -> None:
        """Nothing by itself; FSDP gathers the weights of no layer before it does that."""


class OPTModel(OPTPreTrainedModel):
    """The decoder without a head."""

    head = "none"

    def _make_layers(self) -> None:
        self.decoder = OPTDecoder(self.config, self.attn_implementation)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        **kwargs: Unpack[CallOptions],
    ) -> OPTOutput:
        """Computes the hidden states.

        Args:
            input_ids: (B, T) token ids; NumPy arrays and lists are accepted too.
            attention_mask: (B, T), or (B, past + T) with a cache: 1 for tokens, 0 for padding.
            position_ids: (B, T) positions, -1 for padding; by default they follow from the mask.
            inputs_embeds: (B, T, P) embeddings in place of `input_ids`.
            past_key_values: A cache, of an earlier output or of `init_cache`: these tokens follow
                the ones it holds.
            **kwargs: `output_hidden_states`, `use_cache` and the others of `CallOptions`.

        Raises:
            InputError: Ids outside the vocabulary, shapes that do not fit, or too long a sequence.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, kwargs)
        return self._finish(out, kwargs)


@functools.wraps(CausalLMMixin.generate)
def _generate(model: Any, *arguments: Any, **options: Any) -> Any:
    # Python runs between the steps: within a compiled function it stays outside of the graph.
    # Where nothing is compiled, PyTorch's compiler is not imported: that takes a second.
    run: Any = CausalLMMixin.generate
    if "torch._dynamo" in sys.modules:
        run = torch.compiler.disable(run)
    return run(model, *arguments, **options)


class OPTForCausalLM(GenerationMethods, CausalLMMixin, OPTPreTrainedModel):
    """The language model: the next token's logits."""

    generate: Any = _generate

    def _make_layers(self) -> None:
        super()._make_layers()
        self.lm_head = nn.Linear(self.config.embed_dim, self.config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: Any = 0,
        **kwargs: Unpack[CallOptions],
    ) -> OPTOutput:
        """Computes logits, and the loss where labels are given.

        Args:
            input_ids: As in `OPTModel.forward`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            past_key_values: See there.
            labels: (B, T) ids, -100 to ignore one; the model shifts them. Usually `input_ids`.
            logits_to_keep: Compute logits for this many last tokens only, 0 for all, or for those
                of an index.
            **kwargs: See there.
        """
        given = input_ids, attention_mask, position_ids, inputs_embeds, past_key_values
        out = self._decode(given, kwargs)
        return self._finish(out, kwargs, labels, logits_to_keep)

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """The language-model head: (..., P) states to (..., V) logits."""
        return apply_linear(self.lm_head, hidden)
