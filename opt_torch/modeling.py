"""The models: what all share, the decoder alone, and the language model."""

from collections.abc import Callable
from os import PathLike
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from opt_core.config import OPTConfig
from opt_core.errors import ConfigError, InputError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.mixin import Engine, GenerationMixin
from opt_core.params import Head, count_parameters
from opt_torch import beam, checkpoint, generation, inputs, losses, quantization, speculative
from opt_torch.attention import IMPLEMENTATIONS
from opt_torch.cache import KVCache, init_cache
from opt_torch.decoder import OPTDecoder, OPTOutput
from opt_torch.inputs import check_inputs, check_window, full_mask
from opt_torch.linear import Linear


class OPTPreTrainedModel(nn.Module):
    """What the model and its heads share: making, loading, saving and counting."""

    head: ClassVar[Head]

    def __init__(self, config: OPTConfig, seed: int | None = 0, attn_implementation: str = "sdpa"):
        """Makes a freshly initialised model, in evaluation mode (`model.train()` turns dropout on).

        Args:
            config: The model's configuration.
            seed: Seed of the weights; None leaves them on the meta device, for a loader to fill.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".

        Raises:
            ConfigError: No such attention implementation.
        """
        super().__init__()
        if attn_implementation not in IMPLEMENTATIONS:
            raise ConfigError(
                f"attn_implementation: expected one of {', '.join(IMPLEMENTATIONS)}, "
                f"received {attn_implementation!r}"
            )
        self.config = config
        self.generation_config = GenerationConfig.from_model(config)
        with torch.device("meta"):
            self._build(attn_implementation)
        if seed is not None:
            checkpoint.initialize(self, seed)
        self.eval()

    def _build(self, implementation: str) -> None:
        self.model = OPTModel(self.config, None, implementation)

    def get_decoder(self) -> OPTDecoder:
        """The decoder, wherever the class keeps it."""
        return self.model.decoder

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.get_decoder().embed_positions.weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the weights."""
        return self.get_decoder().embed_positions.weight.dtype

    def train(self, mode: bool = True) -> Self:
        """Switches training mode, dropout with it."""
        if mode:
            quantization.check_not_quantized(self, "train")
        return super().train(mode)

    def num_parameters(self) -> int:
        """Number of parameters, a tied head counted once."""
        return count_parameters(self.config, self.head)

    def gradient_checkpointing_enable(self) -> None:
        """In training, keep only each layer's input and compute the rest again when needed."""
        self.get_decoder().gradient_checkpointing = True

    def gradient_checkpointing_disable(self) -> None:
        """In training, keep every activation (the default)."""
        self.get_decoder().gradient_checkpointing = False

    def init_cache(self, batch_size: int, max_length: int) -> KVCache:
        """An empty cache for `batch_size` rows of at most `max_length` tokens."""
        return init_cache(self.config, batch_size, max_length, self.dtype, self.device)

    @classmethod
    def from_pretrained(
        cls,
        path_or_hub_id: str | PathLike[str],
        dtype: str | torch.dtype = "float32",
        device: str | torch.device = "cpu",
        attn_implementation: str = "sdpa",
        progress: Callable[[int, int], None] | None = None,
        config: OPTConfig | None = None,
        quantize: str | None = None,
        **hub: Any,
    ) -> Self:
        """Loads a checkpoint.

        On the CPU, weights already stored in `dtype` are mapped from the file, not copied.

        Args:
            path_or_hub_id: Folder, weight file, hub id such as "facebook/opt-125m", or "mini".
            dtype: "float32", "bfloat16", "float16", "float64", or "auto" for the stored one.
            device: Where to put the weights.
            attn_implementation: "sdpa", "eager" or "flash_attention_2".
            progress: Called with (bytes loaded, bytes in all) after each tensor.
            config: Replaces the checkpoint's config.json, for example to set `num_labels`.
            quantize: "int8" or "int4": keep the weights so (`opt_core.quantization`), only to run.
            **hub: `revision`, `token`, `local_files_only`, as in `opt_core.hub.resolve`.

        Raises:
            CheckpointError: Files are missing or damaged, or do not fit the configuration.
            ConfigError: The configuration is malformed, or an option is not one of the above.
        """
        return checkpoint.from_pretrained(
            cls, path_or_hub_id, dtype, device, attn_implementation, progress, config, quantize,
            **hub,
        )  # fmt: skip

    def save_pretrained(
        self, folder: str | PathLike[str], max_shard_size: str | int = "5GB"
    ) -> None:
        """Writes config.json, generation_config.json and safetensors, as `transformers` reads them.

        Args:
            folder: Made if missing; other files in it stay.
            max_shard_size: Larger models are split into files of at most this size.
        """
        checkpoint.save_pretrained(self, folder, max_shard_size)

    def _decode(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        inputs_embeds: Tensor | None,
        past_key_values: KVCache | None,
        output_hidden_states: bool,
        output_attentions: bool,
    ) -> OPTOutput:
        """Checks the inputs, embeds them and runs the decoder."""
        input_ids, attention_mask, position_ids, inputs_embeds = check_inputs(
            self.config,
            self.device,
            self.dtype,
            input_ids,
            attention_mask,
            position_ids,
            inputs_embeds,
            past_key_values,
        )
        decoder = self.get_decoder()
        embeds = decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        count = embeds.shape[1]
        mask = full_mask(attention_mask, count, past_key_values)
        if position_ids is None:
            check_window(
                self.config, mask, count + (past_key_values.length if past_key_values else 0)
            )
        return decoder(
            embeds,
            position_ids,
            mask,
            past_key_values,
            output_hidden_states,
            output_attentions,
        )


class OPTModel(OPTPreTrainedModel):
    """The decoder without a head."""

    head = "none"

    def _build(self, implementation: str) -> None:
        self.decoder = OPTDecoder(self.config, implementation)

    def get_decoder(self) -> OPTDecoder:
        """The decoder."""
        return self.decoder

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
    ) -> OPTOutput:
        """Computes the hidden states.

        Args:
            input_ids: (B, T) token ids; NumPy arrays and lists are accepted too.
            attention_mask: (B, T), or (B, past + T) with a cache: 1 for tokens, 0 for padding.
            position_ids: (B, T) positions, -1 for padding; by default they follow from the mask.
            inputs_embeds: (B, T, P) embeddings in place of `input_ids`.
            past_key_values: A cache (`init_cache`): these tokens follow the ones it holds.
            output_hidden_states: Return `hidden_states`.
            output_attentions: Return `attentions`.

        Raises:
            InputError: Ids outside the vocabulary, shapes that do not fit, or too long a sequence.
        """
        return self._decode(
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values,
            output_hidden_states, output_attentions,
        )  # fmt: skip


class OPTForCausalLM(GenerationMixin, OPTPreTrainedModel):
    """The language model: the next token's logits."""

    head = "causal_lm"
    engine = Engine(inputs, generation, beam, speculative)

    def _build(self, implementation: str) -> None:
        super()._build(implementation)
        self.lm_head = Linear(self.config.embed_dim, self.config.vocab_size, bias=False)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        past_key_values: KVCache | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        logits_to_keep: int = 0,
    ) -> OPTOutput:
        """Computes logits, and the loss where labels are given.

        Args:
            input_ids: As in `OPTModel.forward`, like the other arguments not listed here.
            attention_mask: See there.
            position_ids: See there.
            inputs_embeds: See there.
            past_key_values: See there.
            labels: (B, T) ids, -100 to ignore one; the model shifts them. Usually `input_ids`.
            output_hidden_states: Return `hidden_states`.
            output_attentions: Return `attentions`.
            logits_to_keep: Compute logits for this many last tokens only; 0 for all.
        """
        out = self._decode(
            input_ids, attention_mask, position_ids, inputs_embeds, past_key_values,
            output_hidden_states, output_attentions,
        )  # fmt: skip
        assert out.last_hidden_state is not None
        if logits_to_keep < 0:
            raise InputError(f"logits_to_keep: expected at least 0, received {logits_to_keep}")
        out.logits = logits = self.compute_logits(out.last_hidden_state[:, -logits_to_keep:])
        if labels is not None:
            out.loss = losses.causal_lm(logits, labels)
        return out

    def compute_logits(self, hidden: Tensor) -> Tensor:
        """The language-model head: (..., P) states to (..., V) logits."""
        return self.lm_head(hidden)
