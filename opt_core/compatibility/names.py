"""Names that libraries ask `transformers`' models for: switches, plans, and what there is not."""

from collections.abc import Mapping
from typing import Any, ClassVar

from opt_core.compatibility.refusals import refuse_methods
from opt_core.errors import UnsupportedError

_NO_ADAPTER = "adapters are those of the module `lora` of this package, or of peft.get_peft_model"
_NO_BETTER = 'attention is the framework\'s fused kernel already (attn_implementation="sdpa")'
_NO_ENCODER = "OPT is a decoder; get_decoder and set_decoder are there"
_NO_BATCHING = "generate takes a padded batch, and stream yields its tokens"
_NO_PLAN = "spread a model by the framework's own means (Flax: mesh=)"
_NO_EXPERTS = "OPT has no experts"
_NO_KERNELS = "the framework's kernels are used"
_INNER = "it is an inner step of transformers' loading or saving"
_STEPS = "it is an inner step of generate; write your own loop of calls, or custom_generate="
_SIZE = "the position table is the checkpoint's; it has max_position_embeddings rows"

REFUSED: Mapping[str, str] = {
    "to_bettertransformer": _NO_BETTER,
    "reverse_bettertransformer": _NO_BETTER,
    "prune_heads": "heads stay; set their columns of out_proj to zero to switch them off",
    "resize_position_embeddings": _SIZE,
    "add_adapter": _NO_ADAPTER,
    "set_adapter": _NO_ADAPTER,
    "enable_adapters": _NO_ADAPTER,
    "disable_adapters": _NO_ADAPTER,
    "active_adapter": _NO_ADAPTER,
    "active_adapters": _NO_ADAPTER,
    "delete_adapter": _NO_ADAPTER,
    "load_adapter": "use lora.load_adapter(model, folder) or from_pretrained(..., adapter=folder)",
    "get_adapter_state_dict": _NO_ADAPTER,
    "enable_peft_hotswap": _NO_ADAPTER,
    "create_model_card": "write README.md yourself; push_to_hub(tags=...) makes one with tags",
    "dequantize": "load the checkpoint without quantize=",
    "get_encoder": _NO_ENCODER,
    "set_encoder": _NO_ENCODER,
    "tie_embeddings_and_encoder_decoder": _NO_ENCODER,
    "create_extended_attention_mask_for_decoder": "pass attention_mask (B, T)",
    "add_memory_hooks": "measure with the framework's own profiler",
    "reset_memory_hooks_state": "measure with the framework's own profiler",
    "generate_batch": _NO_BATCHING,
    "init_continuous_batching": _NO_BATCHING,
    "continuous_batching_context_manager": _NO_BATCHING,
    "destroy_cached_continuous_batching_manager": _NO_BATCHING,
    "heal_tokens": "cut the prompt's last token off yourself",
    "load_custom_generate": "pass a function: generate(custom_generate=function)",
    "get_compiled_call": "use the framework's own compiler on the model",
    "get_experts_implementation": _NO_EXPERTS,
    "set_experts_implementation": _NO_EXPERTS,
    "get_correct_experts_implementation": _NO_EXPERTS,
    "set_use_kernels": _NO_KERNELS,
    "kernelize": _NO_KERNELS,
    "init_parallel_plans": _NO_PLAN,
    "maybe_distribute_model": _NO_PLAN,
    "prepare_distribute_model": _NO_PLAN,
    "gather_sharded_state_dict_for_save": _NO_PLAN,
    "save_distributed_checkpoint": "use save_pretrained",
    "retrieve_modules_from_names": "use the framework's own walk over modules",
    "get_init_context": _INNER,
    "get_correct_attn_implementation": _INNER,
    "get_expanded_tied_weights_keys": _INNER,
    "mark_tied_weights_as_initialized": _INNER,
    "should_save_on_this_rank": _INNER,
    "barrier_after_gathered_checkpoint_save": _INNER,
    "adjust_generation_fn": _INNER,
    "greedy_search": "use generate(do_sample=False)",
    "sample": "use generate(do_sample=True)",
    "beam_search": "use generate(num_beams=...)",
    "beam_sample": "use generate(num_beams=..., do_sample=True)",
    "group_beam_search": "use generate(num_beam_groups=...)",
    "contrastive_search": "use generate(penalty_alpha=..., top_k=...)",
    "assisted_decoding": "use generate(assistant_model=...)",
    "_sample": _STEPS,
    "_beam_search": _STEPS,
    "_assisted_decoding": _STEPS,
    "_prepare_model_inputs": _STEPS,
    "_prepare_generation_config": _STEPS,
    "_prepare_attention_mask_for_generation": _STEPS,
    "_get_logits_processor": _STEPS,
    "_get_stopping_criteria": _STEPS,
    "_get_initial_cache_position": _STEPS,
    "_expand_inputs_for_generation": _STEPS,
    "_extract_past_from_model_output": _STEPS,
    "_validate_model_kwargs": _STEPS,
}
"""Methods of `transformers` that there are not, and what to do instead."""


class ModelNames:
    """Attributes that `transformers`, accelerate and PEFT look at before they use a model."""

    _no_split_modules: ClassVar[Any] = ["OPTDecoderLayer"]
    _keep_in_fp32_modules: ClassVar[Any] = None
    _keep_in_fp32_modules_strict: ClassVar[Any] = None
    _keys_to_ignore_on_load_missing: ClassVar[Any] = None
    _keys_to_ignore_on_load_unexpected: ClassVar[Any] = None
    _keys_to_ignore_on_save: ClassVar[Any] = None
    _skip_keys_device_placement: ClassVar[Any] = ["past_key_values"]
    _auto_class: ClassVar[Any] = None
    _hf_peft_config_loaded: bool = False
    _is_stateful: ClassVar[bool] = False
    _can_compile_fullgraph: ClassVar[bool] = True
    _supports_sdpa: ClassVar[bool] = True
    _supports_flash_attn: ClassVar[bool] = True
    _supports_flash_attn_2: ClassVar[bool] = True
    _supports_flex_attn: ClassVar[bool] = False
    _supports_attention_backend: ClassVar[bool] = False
    _supports_cache_class: ClassVar[bool] = True
    _supports_static_cache: ClassVar[bool] = True
    is_parallelizable: ClassVar[bool] = False
    model_parallel: ClassVar[bool] = False
    input_modalities: ClassVar[Any] = "text"
    output_modalities: ClassVar[Any] = ("text",)
    can_record_outputs: ClassVar[Any] = {}
    kernel_config: ClassVar[Any] = None
    use_kernels: ClassVar[bool] = False
    tp_plan: ClassVar[Any] = {}
    pp_plan: ClassVar[Any] = {}
    ep_plan: ClassVar[Any] = {}
    fsdp_plan: ClassVar[Any] = {}
    tp_size: ClassVar[Any] = None
    fsdp_size: ClassVar[Any] = None
    supports_tp_plan: ClassVar[bool] = False
    supports_pp_plan: ClassVar[bool] = False
    supports_context_parallel: ClassVar[bool] = False
    is_distributed_loading_by_transformers: ClassVar[bool] = False
    config: Any

    @property
    def num_labels(self) -> int:
        """Classes of the sequence-classification head."""
        return self.config.num_labels

    @classmethod
    def is_remote_code(cls) -> bool:
        """False: the code is this package's."""
        return False

    is_custom_code = is_remote_code

    @classmethod
    def _supports_logits_to_keep(cls) -> bool:
        return cls.__name__.endswith("ForCausalLM")

    @classmethod
    def is_backend_compatible(cls) -> bool:
        """False: the class takes no attention function of another library."""
        return False

    @classmethod
    def register_for_auto_class(cls, auto_class: Any = "AutoModel") -> None:
        """Notes the name, as `transformers` does for classes of a user's own.

        Args:
            auto_class: Name or class of an auto class.
        """
        cls._auto_class = getattr(auto_class, "__name__", auto_class)


refuse_methods(ModelNames, REFUSED, UnsupportedError)
