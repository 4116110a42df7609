"""The words around a document: the prompts of EleutherAI's harness 0.4.13, task by task.

So figures can be compared with all that were made with it. A continuation follows its context after
one space, also where it begins with a space of its own (COPA, WinoGrad and ReCoRD have two or
three), as there. The paper's own prompts were never published.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from opt_core.evaluation.multiple_choice import without_marks

Doc = dict[str, Any]
DELIMITER = " "


class Prompt(NamedTuple):
    """One question.

    Attributes:
        contexts: What comes before each choice; they differ only where a choice is put into it.
        endings: What is scored for each choice, the space before it included.
        lengths: Characters of each choice, which "acc_norm" divides by.
        label: Which one is right; `len(endings)` or more, or negative: the data do not say.
        example: The question with its right answer, to be shown before other questions.
        names: What each choice stands for, where several may be right: ReCoRD's entities.
        answers: Which of them are right.
    """

    contexts: tuple[str, ...]
    endings: tuple[str, ...]
    lengths: tuple[int, ...]
    label: int
    example: str
    names: tuple[str, ...] = ()
    answers: tuple[str, ...] = ()


Wording = Callable[[Doc], Prompt]


def _choose(context: str, choices: Sequence[str], label: int) -> Prompt:
    """Choices after a context."""
    is_known = 0 <= label < len(choices)
    return Prompt(
        (context,) * len(choices),
        tuple(DELIMITER + choice for choice in choices),
        tuple(map(len, choices)),
        label,
        context + DELIMITER + (choices[label] if is_known else ""),
    )


def _fill(beginnings: Sequence[str], rest: str, label: int) -> Prompt:
    """Choices inside of a sentence, of which the rest is scored."""
    is_known = 0 <= label < len(beginnings)
    return Prompt(
        tuple(beginnings),
        (DELIMITER + rest,) * len(beginnings),
        tuple(map(len, beginnings)),
        label,
        (beginnings[label] if is_known else "") + DELIMITER + rest,
    )


def hellaswag(doc: Doc) -> Prompt:
    """HellaSwag: the activity, then the context."""
    context = f"{doc['activity_label']}: {doc['ctx_a']} {doc['ctx_b'].capitalize()}"
    return _choose(without_marks(context), [without_marks(e) for e in doc["endings"]], doc["label"])


def storycloze(doc: Doc) -> Prompt:
    """StoryCloze: four sentences, two ends."""
    context = " ".join(doc[f"input_sentence_{i}"] for i in range(1, 5))
    return _choose(context, [doc["sentence_quiz1"], doc["sentence_quiz2"]], doc["label"])


def piqa(doc: Doc) -> Prompt:
    """PIQA: a goal, two ways to it."""
    return _choose(f"Question: {doc['goal']}\nAnswer:", [doc["sol1"], doc["sol2"]], doc["label"])


def arc(doc: Doc) -> Prompt:
    """ARC: a question, its answers without their letters."""
    return _choose(f"Question: {doc['question']}\nAnswer:", doc["choices"]["text"], doc["label"])


def openbookqa(doc: Doc) -> Prompt:
    """OpenBookQA: the beginning of a sentence, ends of it."""
    return _choose(doc["question_stem"], doc["choices"]["text"], doc["label"])


def winograd(doc: Doc) -> Prompt:
    """WinoGrad: a name in place of the pronoun; what follows is scored."""
    text, at = doc["text"], doc["pronoun_loc"]
    rest = text[at + len(doc["pronoun"]) :]
    return _fill([text[:at] + option for option in doc["options"]], rest, doc["label"])


def winogrande(doc: Doc) -> Prompt:
    """WinoGrande: a name in the gap; what follows is scored."""
    before, _, after = doc["sentence"].partition("_")
    options = [before + doc["option1"], before + doc["option2"]]
    label = {"1": 0, "2": 1}.get(str(doc.get("answer")), -1)
    return _fill(options, after.strip(), label)


def boolq(doc: Doc) -> Prompt:
    """BoolQ: a passage and a question about it."""
    context = f"{doc['passage']}\nQuestion: {doc['question']}?\nAnswer:"
    return _choose(context, ["no", "yes"], doc["label"])


def cb(doc: Doc) -> Prompt:
    """CB: does the hypothesis follow?"""
    context = f"{doc['premise']}\nQuestion: {doc['hypothesis']}. True, False, or Neither?\nAnswer:"
    return _choose(context, ["True", "False", "Neither"], doc["label"])


def copa(doc: Doc) -> Prompt:
    """COPA: a premise, then its cause or effect."""
    word = {"cause": "because", "effect": "therefore"}[doc["question"]]
    choices = [doc["choice1"], doc["choice2"]]
    return _choose(
        f"{doc['premise'].strip()[:-1]} {word}",
        [f" {choice[0].lower()}{choice[1:]}" for choice in choices],
        doc["label"],
    )


def wic(doc: Doc) -> Prompt:
    """WiC: is a word meant in the same way twice?"""
    word = doc["sentence1"][doc["start1"] : doc["end1"]]
    context = (
        f"Sentence 1: {doc['sentence1']}\nSentence 2: {doc['sentence2']}\nQuestion: Is the word "
        f"'{word}' used in the same way in the two sentences above?\nAnswer:"
    )
    return _choose(context, ["no", "yes"], doc["label"])


def wsc(doc: Doc) -> Prompt:
    """WSC: does the pronoun, between stars, mean the noun?"""
    pronoun, text = doc["span2_text"], doc["text"]
    before = " ".join(text.split()[: doc["span2_index"]])
    after = text[len(before) + len(pronoun) + 1 :]
    context = (
        f"Passage: {_without_gaps(f'{before} *{pronoun}*{after}')}\n"
        f'Question: In the passage above, does the pronoun "*{pronoun}*" refer to '
        f'"*{doc["span1_text"]}*"?\nAnswer:'
    )
    return _choose(context, ["no", "yes"], doc["label"])


def _without_gaps(text: str) -> str:
    """A tokenised text without spaces before its punctuation and inside of its brackets."""
    for gap, mended in ((" n't", "n't"), (" )", ")"), ("( ", "("), ('" ', '"'), (' "', '"')):
        text = text.replace(gap, mended)
    return re.sub(r" (['.,])", r"\1", text)


def multirc(doc: Doc) -> Prompt:
    """MultiRC: an answer, and whether it is correct.

    Label 1 is "yes", as SuperGLUE has it. The harness takes its first choice, "yes", for label 0:
    its accuracy is ours from 1, and its examples say "no" to what is right.
    """
    context = f"{doc['paragraph']}\nQuestion: {doc['question']}\nAnswer:"
    ends = [f"{doc['answer']}\nIs the answer correct? {word}" for word in ("yes", "no")]
    return _choose(context, ends, 1 - doc["label"])


def rte(doc: Doc) -> Prompt:
    """RTE: does the hypothesis follow?"""
    context = f"{doc['premise']}\nQuestion: {doc['hypothesis']} True or False?\nAnswer:"
    return _choose(context, ["True", "False"], doc["label"])


def record(doc: Doc) -> Prompt:
    """ReCoRD: a passage, its highlights, and one more with an entity in the gap."""
    beginning, *highlights = doc["passage"].strip().split("\n@highlight\n")
    context = beginning + "\n\n" + "".join(f"  - {text}.\n" for text in highlights)
    ends = {
        name: "  - " + doc["query"].replace("@placeholder", name)
        for name in (*doc["entities"], doc["answers"][0])
    }
    prompt = _choose(context, [ends[name] for name in doc["entities"]], 0)
    return prompt._replace(
        example=context + DELIMITER + ends[doc["answers"][0]],
        names=tuple(doc["entities"]),
        answers=tuple(doc["answers"]),
    )
