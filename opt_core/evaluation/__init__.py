"""Evaluation without a framework: models come in as functions from ids to scores.

`opt_core.evaluation.lm_eval` is for EleutherAI's harness, which is to be installed.
"""

from opt_core.evaluation.bias import BiasResult, evaluate_bias, read_comparisons
from opt_core.evaluation.heads import (
    ClassificationResult,
    QuestionResult,
    evaluate_classification,
    evaluate_questions,
)
from opt_core.evaluation.multiple_choice import ChoiceResult, evaluate_choices, read_items
from opt_core.evaluation.perplexity import (
    PerplexityResult,
    score_continuations,
    score_text,
    text_perplexity,
)

__all__ = [
    "BiasResult",
    "ChoiceResult",
    "ClassificationResult",
    "PerplexityResult",
    "QuestionResult",
    "evaluate_bias",
    "evaluate_choices",
    "evaluate_classification",
    "evaluate_questions",
    "read_comparisons",
    "read_items",
    "score_continuations",
    "score_text",
    "text_perplexity",
]
