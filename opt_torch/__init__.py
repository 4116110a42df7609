"""OPT for PyTorch."""

from opt_torch.cache import KVCache
from opt_torch.modeling import (
    OPTForCausalLM,
    OPTForQuestionAnswering,
    OPTForSequenceClassification,
    OPTModel,
    OPTOutput,
)

__all__ = [
    "KVCache",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "OPTOutput",
]
