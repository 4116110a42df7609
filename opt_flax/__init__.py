"""OPT for JAX, on Flax NNX."""

from opt_core.compatibility.linen import refuse_linen as __getattr__  # noqa: F401
from opt_flax.cache import KVCache
from opt_flax.decoder import FlaxOPTOutput
from opt_flax.heads import FlaxOPTForQuestionAnswering, FlaxOPTForSequenceClassification
from opt_flax.modeling import FlaxOPTForCausalLM, FlaxOPTModel, FlaxOPTPreTrainedModel

__all__ = [
    "FlaxOPTForCausalLM",
    "FlaxOPTForQuestionAnswering",
    "FlaxOPTForSequenceClassification",
    "FlaxOPTModel",
    "FlaxOPTOutput",
    "FlaxOPTPreTrainedModel",
    "KVCache",
]
