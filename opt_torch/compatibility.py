"""The layer for code written for `transformers`: what PyTorch has to do for it."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opt_core.compatibility.caches import CacheMixin
from opt_core.compatibility.methods import MethodsMixin
from opt_core.dialects import TORCH
from opt_core.errors import InputError
from opt_core.params import ParamSpec
from opt_torch import attention, checkpoint

if TYPE_CHECKING:
    from opt_torch.modeling import OPTPreTrainedModel

TIED = "lm_head.weight", "model.decoder.embed_tokens.weight"
"""The two names of one parameter, where the head is the embedding."""


class AdoptedCache(CacheMixin):
    """A `DynamicCache` of `transformers` in the place of a `KVCache`: it is filled as it is there.

    Such a cache knows no padding: each call's mask covers all tokens.
    """

    mask = None

    def __init__(self, cache: Any):
        self.cache, self.grows = cache, True
        self.length = int(cache.get_seq_length())

    @property
    def keys(self) -> tuple[Tensor, ...]:
        """One (B, H, S, K) tensor per layer; none while it is empty."""
        return tuple(layer.keys for layer in self.cache.layers) if self.length else ()

    def filled(self, count: int) -> int:
        """Slots filled once `count` more tokens are in."""
        return self.length + count

    def with_room(self, count: int | None) -> "AdoptedCache":
        """Itself: each layer grows as it is written."""
        return self

    def check_intact(self, count: int = 0) -> None:
        """Accepts it: its owner sees every change."""

    def write(self, layer: int, key_BHTK: Tensor, value_BHTK: Tensor) -> tuple[Tensor, Tensor]:
        """Stores one layer's new keys and values; returns all of them, (B, H, length + T, K)."""
        return self.cache.update(key_BHTK, value_BHTK, layer)

    def advance(self, count: int, mask_BS: Tensor | None) -> Any:
        """The caller's own cache, which holds the new tokens now."""
        return self.cache


def adopt_cache(past: Any) -> AdoptedCache | None:
    """A cache of `transformers` made usable; None for anything else.

    Raises:
        InputError: It is one of a fixed size, which returns slots that hold nothing.
    """
    if not (hasattr(past, "layers") and hasattr(past, "get_seq_length")):
        return None
    kind = type(past).__name__
    if kind != "DynamicCache":
        raise InputError(
            f"past_key_values: expected a DynamicCache or one of init_cache, received a {kind}"
        )
    return AdoptedCache(past)


def part_tied(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Gives the head of a state dict memory of its own, where the Trainer may write it down.

    The Trainer of `transformers` saves the state of any other library's model by safetensors, which
    refuses tensors that share memory. Nobody else pays for the copy.
    """
    pair = [state[prefix + name] for name in TIED if prefix + name in state]
    is_tied = len(pair) == 2 and pair[0].data_ptr() == pair[1].data_ptr()
    if is_tied and "transformers.trainer" in sys.modules:
        state[prefix + TIED[0]] = pair[0].clone()


class ModelMethods(MethodsMixin):
    """Methods of every model, beside `torch.nn.Module`'s own."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.warnings_issued: dict[str, bool] = {}

    def _configure(self: Any, *args: Any) -> None:
        base: Any = super()
        base._configure(*args)
        vars(self)["name_or_path"] = self.name_or_path  # PEFT looks for it nowhere else

    def tie_weights(self: Any, *args: Any, **kwargs: Any) -> None:
        """Makes a tied head the token embedding, and both layers say how many rows they have."""
        checkpoint.tie(self)
        embedding, head = self.get_input_embeddings(), self.get_output_embeddings()
        if isinstance(embedding, nn.Embedding):
            embedding.num_embeddings = len(embedding.weight)
        if isinstance(head, nn.Linear):
            head.out_features = len(head.weight)

    def enable_input_require_grads(self) -> None:
        """Lets gradients flow through the embeddings though they are frozen, as adapters need it.

        Checkpointed layers have no gradient where none of their inputs wants one.
        """
        self.disable_input_require_grads()
        self._input_hook = self.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        hook = vars(self).pop("_input_hook", None)
        if hook is not None:
            hook.remove()

    def _decoder_layers(self) -> Iterator[Any]:
        return iter(self._decoder.layers)

    def _as_tensor(self: Any, array: NDArray[Any]) -> Tensor:
        return torch.from_numpy(array).long().to(self.device)

    def _to_array(self, tensor: Tensor) -> NDArray[Any]:
        return checkpoint.as_array(tensor)

    def _put_embeddings(self, value: Any) -> None:
        self._decoder.embed_tokens = value
        if value.weight.shape[1] == self.config.embed_dim:
            self._set_config(vocab_size=len(value.weight))

    def _put_head(self: Any, value: Any) -> None:
        self._check_width("set_output_embeddings", value.weight.shape[1])
        self.lm_head = value
        if self.config.tie_word_embeddings and not checkpoint.is_tied(self):
            self._set_config(tie_word_embeddings=False)

    def _put_table(self: Any, spec: ParamSpec, table: NDArray[Any]) -> None:
        owner, leaf = TORCH.owner(self, spec)
        old = getattr(owner, leaf)
        new = checkpoint.as_tensor(table).to(old.device)
        setattr(owner, leaf, nn.Parameter(new, requires_grad=old.requires_grad))

    def _count_trainable(self: Any, specs: list[ParamSpec]) -> int:
        every = [checkpoint.locate(self, spec) for spec in specs]
        return sum(weight.numel() for weight in every if weight.requires_grad)

    def _sizes_in_bytes(self: Any, with_buffers: bool) -> Iterator[int]:
        yield from (tensor.nbytes for tensor in self.parameters())
        yield from (tensor.nbytes for tensor in self.buffers() if with_buffers)

    def _cast(self: Any, dtype: str | torch.dtype) -> "OPTPreTrainedModel":
        return self.to(getattr(torch, str(dtype).removeprefix("torch.")))

    def _check_flash(self: Any) -> None:
        attention.check_flash(self.device, self.dtype)


class GenerationMethods:
    """Methods that libraries which generate by themselves ask of a language model."""

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The model's inputs for the next token, of all ids so far and a cache of the earlier ones.

        Args:
            input_ids: (B, S) all ids.
            past_key_values: A cache that holds the first of them, or None.
            attention_mask: (B, S).
            inputs_embeds: Used in place of the ids where there is no cache yet.
            **kwargs: Passed on.
        """
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if inputs_embeds is not None and not past:
            inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds}
        else:
            inputs = {"input_ids": input_ids[:, past:]}
        return {
            **inputs, "past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs
        }  # fmt: skip
