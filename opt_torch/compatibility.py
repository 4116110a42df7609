"""The layer for code written for `transformers`: what PyTorch has to do for it."""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from opt_core.compatibility.caches import CacheMixin
from opt_core.compatibility.methods import MethodsMixin
from opt_core.compatibility.notices import notice
from opt_core.dialects import TORCH
from opt_core.errors import InputError
from opt_core.generation.compatibility import FILE
from opt_core.generation.config import GenerationConfig
from opt_core.json_files import write_json
from opt_core.params import ParamSpec, param_specs
from opt_core.quantization import check_not_quantized
from opt_torch import _private, attention, checkpoint
from opt_torch.own_layers import OwnLayers

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
    if isinstance(past, CacheMixin):
        return None
    if not (hasattr(past, "layers") and hasattr(past, "get_seq_length")):
        return None
    kind = type(past).__name__
    if kind != "DynamicCache":
        raise InputError(
            f"past_key_values: expected a DynamicCache or one of init_cache, received a {kind}"
        )
    return AdoptedCache(past)


def serve_trainer(module: Any, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Makes a state dict one that the Trainer of `transformers` can write down, and others read.

    It saves the state of any other library's model by safetensors, which refuses tensors that share
    memory, and nothing else: a tied head gets memory of its own, and the configuration is put
    beside the weights. Nobody else pays for the copy.
    """
    if "transformers.trainer" not in sys.modules:
        return
    pair = [state[prefix + name] for name in TIED if prefix + name in state]
    if len(pair) == 2 and pair[0].data_ptr() == pair[1].data_ptr():
        state[prefix + TIED[0]] = pair[0].clone()
    folder = None if prefix else _private.trainers_folder()
    if folder is not None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        dtype = str(module.dtype).removeprefix("torch.")
        values = module.config.replace(dtype=dtype).to_dict()
        # It warns of weights that another version has trained.
        values["transformers_version"] = sys.modules["transformers"].__version__
        name = type(module).__name__
        write_json(Path(folder, "config.json"), values | {"architectures": [name]})
        if module.can_generate():
            settings = GenerationConfig.from_any(module.generation_config)
            settings.to_json_file(Path(folder, FILE))


class ModelMethods(OwnLayers, MethodsMixin):
    """Methods of every model, beside `torch.nn.Module`'s own."""

    framework: ClassVar[str] = "pt"
    _steps = frozenset({"forward", "prepare_inputs_for_generation"})
    _tied_weights_keys: ClassVar[Any] = None

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.warnings_issued: dict[str, bool] = {}

    def _configure(self: Any, *args: Any) -> None:
        base: Any = super()
        base._configure(*args)
        vars(self)["name_or_path"] = self.name_or_path  # PEFT looks for it nowhere else

    def named_modules(self: Any, *args: Any, **kwargs: Any) -> Any:
        """Every module with its name; of PEFT's "all-linear" the head is none, as it is there.

        Raises:
            ConfigError: PEFT is to adapt quantised layers.
        """
        base: Any = super()
        found, step = base.named_modules(*args, **kwargs), _private.peft_step()
        if step is None:
            return found
        check_not_quantized(self, "PEFT")
        name, values = step
        if name != "_maybe_include_all_linear_layers":
            return found
        head = self.get_output_embeddings()
        if getattr(values.get("peft_config"), "task_type", None) == "SEQ_CLS":
            head = getattr(self, "score", head)
        return (item for item in found if item[1] is not head)

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
        self._require_grads_hook = self.get_input_embeddings().register_forward_hook(
            lambda module, args, output: output.requires_grad_(True)
        )

    def disable_input_require_grads(self) -> None:
        """Undoes `enable_input_require_grads`."""
        hook = vars(self).pop("_require_grads_hook", None)
        if hook is not None:
            hook.remove()

    def _checkpoint_gradients(self: Any, enabled: bool) -> None:
        base: Any = super()
        base._checkpoint_gradients(enabled)
        if self._hf_peft_config_loaded:  # transformers' mark of a model with adapters in it
            (self.enable_input_require_grads if enabled else self.disable_input_require_grads)()

    @torch.no_grad()
    def _init_weights(self: Any, module: nn.Module) -> None:
        """Gives one layer its starting values: N(0, `init_std`), biases and padding 0, norms 1."""
        if isinstance(module, nn.LayerNorm):
            module.reset_parameters()
        elif isinstance(module, nn.Linear | nn.Embedding):
            module.weight.normal_(0, self.config.init_std)
            padding = getattr(module, "padding_idx", None)
            if padding is not None:
                module.weight[padding] = 0
            bias: Any = getattr(module, "bias", None)
            if bias is not None:
                bias.zero_()

    def init_weights(self: Any) -> None:
        """Gives every layer new starting values, by PyTorch's own generator."""
        for module in self.modules():
            self._init_weights(module)
        self._init_weights(self.get_input_embeddings())  # a tied head has no padding
        self.tie_weights()

    initialize_weights = init_weights

    def post_init(self: Any) -> None:
        """Gives the layers that a class of the user's adds their starting values."""
        own = {id(TORCH.owner(self, spec)[0]) for spec in param_specs(self.config, self.head)}
        for module in self.modules():
            if id(module) not in own and module not in set(self.get_decoder().modules()):
                self._init_weights(module)

    @property
    def all_tied_weights_keys(self) -> dict[str, str]:
        """Names of parameters that are another one, and of which."""
        return dict(self._tied_weights_keys or {})

    def get_parameter_or_buffer(self: Any, target: str) -> Tensor:
        """A parameter or buffer by its name.

        Raises:
            AttributeError: There is none.
        """
        found = {**dict(self.named_parameters()), **dict(self.named_buffers())}
        if target not in found:
            raise AttributeError(f"{target!r} is neither a parameter nor a buffer")
        return found[target]

    def named_non_persistent_buffers(self: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        """Buffers that are not saved."""
        saved = self.state_dict()
        return ((n, b) for n, b in self.named_buffers(*args, **kwargs) if n not in saved)

    def warn_if_padding_and_no_attention_mask(
        self: Any, input_ids: Tensor, attention_mask: Tensor | None
    ) -> None:
        """Warns of padding that no mask tells from text."""
        pad, ends = self.config.pad_token_id, input_ids[:, [0, -1]]
        if attention_mask is None and pad is not None and bool((ends == pad).any()):
            notice("input_ids begin or end in padding; pass attention_mask")

    def invert_attention_mask(self: Any, encoder_attention_mask: Tensor) -> Tensor:
        """A mask (B, S) or (B, T, S) as what is added to scores: 0 for tokens, the least else."""
        mask = encoder_attention_mask
        mask = mask[:, None] if mask.dim() == 3 else mask[:, None, None]
        return (1 - mask.to(self.dtype)) * torch.finfo(self.dtype).min

    def get_extended_attention_mask(self: Any, attention_mask: Tensor, *_: Any, **__: Any) -> Any:
        """The same, as `transformers` calls it for a decoder's own mask."""
        return self.invert_attention_mask(attention_mask)

    def get_head_mask(self: Any, head_mask: Any, num_hidden_layers: int, *_: Any) -> Any:
        """A head mask for each layer, (N, 1, H, 1, 1); without one None for each."""
        if head_mask is None:
            return [None] * num_hidden_layers
        mask = head_mask if head_mask.dim() == 2 else head_mask.expand(num_hidden_layers, -1)
        return mask[:, None, :, None, None].to(self.dtype)

    def _is_patched(self: Any) -> bool:
        put = {name: vars(self)[name] for name in self._steps & vars(self).keys()}
        if hasattr(self, "_hf_hook"):  # accelerate's, which moves inputs
            put.pop("forward", None)
        others = (getattr(f, "__func__", f) is not getattr(type(self), k) for k, f in put.items())
        return any(others) or _private.has_own_hooks(self)

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

    _tied_weights_keys: ClassVar[Any] = {TIED[0]: TIED[1]}
    loss_type: ClassVar[str] = "ForCausalLM"

    @property
    def loss_function(self: Any) -> Callable[..., Tensor]:
        """The function of `logits`, `labels`, `vocab_size` and more that gives the loss.

        It can be set.

        A function that is set is called so, with `num_items_in_batch` too.
        """
        return vars(self).get("_loss_function") or self._default_loss

    @loss_function.setter
    def loss_function(self, function: Callable[..., Tensor] | None) -> None:
        vars(self)["_loss_function"] = function

    def _default_loss(
        self: Any,
        logits: Tensor,
        labels: Tensor,
        *_: Any,
        num_items_in_batch: Any = None,
        **__: Any,
    ) -> Tensor:
        return self.backend.losses.causal_lm(logits, labels, items=num_items_in_batch)

    def _token_loss(self: Any, logits: Tensor, labels: Tensor, items: Any) -> Tensor:
        sizes = {"vocab_size": self.config.vocab_size}
        return self.loss_function(logits=logits, labels=labels, **sizes, num_items_in_batch=items)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache_position: Any = None,
        is_first_iteration: bool = False,
        next_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The model's inputs for the next token, of all ids so far and a cache of the earlier ones.

        Args:
            input_ids: (B, S) all ids.
            past_key_values: A cache that holds the first of them, or None.
            attention_mask: (B, S); positions follow from it.
            inputs_embeds: Used in place of the ids where there is no cache yet.
            cache_position: Without effect, like the next one: the cache says what it holds.
            is_first_iteration: See there.
            next_sequence_length: New ids, where a cache holds more than the ids before them.
            **kwargs: Passed on.
        """
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if past and next_sequence_length is not None:
            past = input_ids.shape[1] - next_sequence_length
        if inputs_embeds is not None and not past:
            inputs: dict[str, Any] = {"inputs_embeds": inputs_embeds}
        else:
            inputs = {"input_ids": input_ids[:, past:]}
        if attention_mask is not None and "position_ids" not in kwargs:
            positions = (attention_mask.long().cumsum(1) - 1).masked_fill(attention_mask == 0, -1)
            inputs["position_ids"] = positions[:, past:]
        return {
            **inputs, "past_key_values": past_key_values, "attention_mask": attention_mask, **kwargs
        }  # fmt: skip

    def _update_model_kwargs_for_generation(
        self: Any, outputs: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> dict[str, Any]:
        """Arguments of a caller's loop for its next call: the cache, a mask of one token more."""
        made = {**model_kwargs, "past_key_values": outputs.past_key_values}
        mask = made.get("attention_mask")
        if mask is not None:
            made["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        return made

    @staticmethod
    def _for_streamer(ids: Any) -> Tensor:
        return torch.tensor(ids, dtype=torch.long)

    @staticmethod
    def _reorder_cache(past_key_values: Any, beam_idx: Tensor) -> Any:
        """The cache of other rows: `beam_idx[i]` becomes row i."""
        return past_key_values.select(beam_idx)
