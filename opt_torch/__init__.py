"""OPT for PyTorch."""

from opt_torch.cache import KVCache
from opt_torch.decoder import OPTOutput
from opt_torch.heads import OPTForQuestionAnswering, OPTForSequenceClassification
from opt_torch.modeling import OPTForCausalLM, OPTModel, OPTPreTrainedModel

__all__ = [
    "KVCache",
    "OPTForCausalLM",
    "OPTForQuestionAnswering",
    "OPTForSequenceClassification",
    "OPTModel",
    "OPTOutput",
    "OPTPreTrainedModel",
]
