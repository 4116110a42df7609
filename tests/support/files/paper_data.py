"""Made-up rows of the paper's 16 tasks: as on the hub, and the same as they were first published.

Written by hand from the data sets' descriptions, with nothing of the project's readers.
"""

import csv
import json
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]
SPLITS = ("train", "validation", "test")

_CHOICES = {
    "text": ["a warm stone", "the moon", "ice and snow", "a dog's tail"],
    "label": ["A", "B", "C", "D"],
}
_NUMBERS = {"text": ["rain", "clouds", "wind"], "label": ["1", "2", "3"]}


def _arc(prefix: str) -> Rows:
    return [
        {"id": f"{prefix}{i}", "question": text, "choices": choices, "answerKey": key}
        for i, (text, choices, key) in enumerate(
            (
                ("Which of these melts?", _CHOICES, "C"),
                ("What fills the sky before a storm?", _NUMBERS, "2"),
                ("What does a happy dog wag?", _CHOICES, "D"),
                ("What lights the night?", _CHOICES, "B"),
            )
        )
    ]


def _hellaswag() -> Rows:
    endings = [
        "puts it into [substeps] the oven.", " throws it at a wall.", "sings  a song.", "sleeps.",
    ]  # fmt: skip
    contexts = (
        ("Baking", "A woman stands in a kitchen.", "she", 0),
        ("Finance", "How to save [title] Write down what you spend. [step] Use a book.", "", 2),
        ("Running", "A man ties his shoes.", "the MAN", 1),
    )
    return [
        {
            "ind": i, "activity_label": name, "ctx_a": a, "ctx_b": b, "ctx": f"{a} {b}",
            "endings": endings, "label": str(label),
        }
        for i, (name, a, b, label) in enumerate(contexts)
    ]  # fmt: skip


def _storycloze() -> Rows:
    names = [f"input_sentence_{i}" for i in range(1, 5)]
    stories = (
        ("Ann had a dog.", "It ran away.", "She looked for it.", "It was dark.", 1),
        ("Bob was hungry.", "He had no food.", "He went out.", "The shop was open.", 2),
        ("It rained.", "The road was wet.", "Tom drove fast.", "He saw a bend.", 2),
    )
    return [
        {
            "story_id": str(i), **dict(zip(names, story, strict=False)),
            "sentence_quiz1": "She found it, at last.", "sentence_quiz2": 'He said "no".',
            "answer_right_ending": story[-1],
        }
        for i, story in enumerate(stories)
    ]  # fmt: skip


def _winograd() -> Rows:
    texts = (
        ("The dog chased the cat because ", "it", " was hungry.", ["The dog", "The cat"], 0),
        ("Ann gave Sue a book. ", "She", " liked to give.", ["Ann", "Sue"], 0),
        ("The man sold the boy's bike; ", "his", " hands were cold.", ["The man", "The boy"], 1),
        ("A fox saw a hen and ", "it", " ran  off.", ["A fox", "A hen"], 1),
    )
    return [
        {
            "text": before + pronoun + after, "pronoun": pronoun, "pronoun_loc": len(before),
            "options": options, "label": label, "quote": "", "quote_loc": 0, "source": "",
        }
        for before, pronoun, after, options, label in texts
    ]  # fmt: skip


def _wsc() -> Rows:
    text = "Mark told Pete many lies , but he did n't believe ( any of ) them ."
    return [
        {
            "text": text, "span1_index": i, "span2_index": 6, "span1_text": name,
            "span2_text": "he", "idx": i, "label": label,
        }
        for i, name, label in ((0, "Mark", 0), (2, "Pete", 1), (3, "many lies", 0))
    ]  # fmt: skip


def _multirc() -> Rows:
    paragraph = "Ann went to the sea. She saw a ship. Bob stayed at home."
    return [
        {"paragraph": paragraph, "question": question, "answer": answer, "label": label}
        for question, answer, label in (
            ("Who saw a ship?", "Ann", 1),
            ("Who saw a ship?", "The home of Bob", 0),
            ("Where was Bob?", "At home", 1),
        )
    ]


def _record() -> Rows:
    passage = (
        "Bonn and Rome play today. Rome has won before.\n@highlight\nBonn is the host"
        "\n@highlight\nTurin looks on"
    )
    return [
        {"passage": passage, "query": query, "entities": ["Bonn", "Rome", "Turin"],
         "answers": answers}
        for query, answers in (
            ("The team of @placeholder has won once.", ["Rome"]),
            ("In @placeholder, the host's own town, it rains.", ["Bonn", "Turin"]),
            ("Nobody in @placeholder plays.", ["Turin"]),
        )
    ]  # fmt: skip


def _premises(labels: int) -> Rows:
    pairs = (
        ("It rains in the north.", "It is wet there"), ("Tom is home.", "Tom is at sea"),
        ("I think that Ann may come", "Ann will come"), ("The dog sleeps.", "An animal sleeps"),
    )  # fmt: skip
    return [
        {"premise": a, "hypothesis": b, "label": i % labels, "idx": i}
        for i, (a, b) in enumerate(pairs)
    ]


def hub_rows() -> dict[str, Rows]:
    """Each task's documents as the hub has them."""
    return {
        "hellaswag": _hellaswag(),
        "storycloze": _storycloze(),
        "piqa": [
            {"goal": "Open a jar", "sol1": "turn the lid", "sol2": "eat the lid", "label": 0},
            {"goal": "How to boil water?", "sol1": "Freeze it.", "sol2": "Heat it.", "label": 1},
            {"goal": "Cut bread", "sol1": "with a cloud", "sol2": "with a knife", "label": 1},
        ],
        "arc_easy": _arc("E"),
        "arc_challenge": _arc("C")[::-1],
        "openbookqa": [
            {"id": row["id"], "question_stem": f"{row['question'][:-1]} is called",
             "choices": row["choices"], "answerKey": row["answerKey"]}
            for row in _arc("O")
        ],
        "winograd": _winograd(),
        "winogrande": [
            {"sentence": text, "option1": "dog", "option2": "old cat", "answer": answer}
            for text, answer in (
                ("The dog met the old cat and the _ ran away.", "2"),
                ("The _ barked at the old cat .", "1"),
                ("Ann fed both but the _  , it seems, was full.", "1"),
            )
        ],
        "boolq": [
            {"question": "is ice cold", "passage": "Ice is frozen water.", "idx": 0, "label": 1},
            {"question": "can fish fly", "passage": "Fish (most) swim.", "idx": 1, "label": 0},
            {"question": "is it so", "passage": "It is.", "idx": 2, "label": 1},
        ],
        "cb": _premises(3),
        "copa": [
            {"premise": premise, "choice1": one, "choice2": two, "question": kind, "label": label,
             "idx": 0}
            for premise, one, two, kind, label in (
                ("The man fell.", "The floor was wet.", "It was late.", "cause", 0),
                ("I pushed the door. ", "It closed.", "It opened.", "effect", 1),
                ("The sun rose.", "Birds sang.", "Ann slept.", "effect", 0),
            )
        ],
        "wic": [
            {"word": "bank", "sentence1": "The bank of the river.", "sentence2": "A bank lends.",
             "start1": 4, "end1": 8, "start2": 2, "end2": 6, "idx": 0, "label": 0},
            {"word": "run", "sentence1": "We run.", "sentence2": "They run, too.",
             "start1": 3, "end1": 6, "start2": 5, "end2": 8, "idx": 1, "label": 1},
            {"word": "play", "sentence1": "Go and play.", "sentence2": "A play in acts.",
             "start1": 7, "end1": 11, "start2": 2, "end2": 6, "idx": 2, "label": 0},
        ],
        "wsc": _wsc(),
        "multirc": _multirc(),
        "rte": _premises(2),
        "record": _record(),
    }  # fmt: skip


def _published(task: str, rows: Rows) -> Rows:
    """The rows of a task as they were first published, where a line is a row."""
    if task in ("arc_easy", "arc_challenge", "openbookqa"):
        return [
            {
                "id": row["id"], "answerKey": row["answerKey"],
                "question": {
                    "stem": row.get("question", row.get("question_stem")),
                    "choices": [
                        {"text": text, "label": label}
                        for text, label in zip(*row["choices"].values(), strict=True)
                    ],
                },
            }
            for row in rows
        ]  # fmt: skip
    if task == "hellaswag":
        return [{**row, "label": int(row["label"])} for row in rows]
    if task == "piqa":
        return [{name: row[name] for name in ("goal", "sol1", "sol2")} for row in rows]
    if task in ("boolq", "wic"):
        return [{**row, "label": bool(row["label"])} for row in rows]
    names = {
        "cb": ("entailment", "contradiction", "neutral"), "rte": ("entailment", "not_entailment"),
    }  # fmt: skip
    if task in names:
        return [{**row, "label": names[task][row["label"]]} for row in rows]
    if task == "wsc":
        spans = ("span1_index", "span2_index", "span1_text", "span2_text")
        return [
            {"text": r["text"], "target": {s: r[s] for s in spans}, "idx": r["idx"],
             "label": bool(r["label"])}
            for r in rows
        ]  # fmt: skip
    if task == "multirc":
        return _published_multirc(rows)
    if task == "record":
        return _published_record(rows)
    return rows


def _published_multirc(rows: Rows) -> Rows:
    questions: dict[str, Rows] = {}
    for row in rows:
        answer = {"text": row["answer"], "label": row["label"], "idx": 0}
        questions.setdefault(row["question"], []).append(answer)
    asked = [{"question": q, "answers": answers} for q, answers in questions.items()]
    return [{"idx": 0, "passage": {"text": rows[0]["paragraph"], "questions": asked}}]


def _published_record(rows: Rows) -> Rows:
    text = rows[0]["passage"]

    def span(name: str, start: int = 0) -> dict[str, Any]:
        at = text.index(name, start)
        return {"start": at, "end": at + len(name) - 1}

    entities = [span("Rome"), span("Bonn"), span("Turin"), span("Rome", 20)]
    queries = [
        {"query": row["query"], "answers": [{**span(a), "text": a} for a in row["answers"]]}
        for row in rows
    ]
    return [{"source": "", "passage": {"text": text, "entities": entities}, "qas": queries}]


_PATHS = {
    "hellaswag": "hellaswag_{}.jsonl", "piqa": "physicaliqa-train-dev/{}.jsonl",
    "arc_easy": "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-{}.jsonl",
    "arc_challenge": "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-{}.jsonl",
    "openbookqa": "OpenBookQA-V1-Sep2018/Data/Main/{}.jsonl",
    "boolq": "SuperGLUE/BoolQ/{}.jsonl", "cb": "SuperGLUE/CB/{}.jsonl",
    "copa": "SuperGLUE/COPA/{}.jsonl", "wic": "SuperGLUE/WiC/{}.jsonl",
    "wsc": "SuperGLUE/WSC/{}.jsonl", "multirc": "SuperGLUE/MultiRC/{}.jsonl",
    "rte": "SuperGLUE/RTE/{}.jsonl", "record": "SuperGLUE/ReCoRD/{}.jsonl",
}  # fmt: skip
_NAMES = {
    "hellaswag": "train val test", "piqa": "train dev test", "arc_easy": "Train Dev Test",
    "arc_challenge": "Train Dev Test", "openbookqa": "train dev test",
    "winogrande": "train_xl dev test",
}  # fmt: skip


def write_published(folder: Path) -> None:
    """The files of every task as they are downloaded from where they were first published."""
    for task, rows in hub_rows().items():
        if task in ("storycloze", "winograd"):
            continue
        path = _PATHS.get(task, "winogrande_1.1/{}.jsonl")
        for name in _NAMES.get(task, "train val test").split():
            file = folder / path.format(name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("\n".join(map(json.dumps, _published(task, rows))), "utf-8")
            if task == "piqa":
                labels = "".join(f"{row['label']}\n" for row in rows)
                file.with_name(f"{name}-labels.lst").write_text(labels)
    for name in ("val", "test"):
        _write_storycloze(folder / f"cloze_test_{name}__spring2016 - cloze_test_ALL_{name}.csv")
    _write_winograd(folder / "WSCollection.xml")


def _write_storycloze(path: Path) -> None:
    header = (
        "InputStoryid", *(f"InputSentence{i}" for i in range(1, 5)), "RandomFifthSentenceQuiz1",
        "RandomFifthSentenceQuiz2", "AnswerRightEnding",
    )  # fmt: skip
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([header, *(row.values() for row in _storycloze())])


def _write_winograd(path: Path) -> None:
    schemas = ""
    for row in _winograd():
        at, pronoun = row["pronoun_loc"], row["pronoun"]
        answers = "".join(f"<answer>\n {option}</answer>" for option in row["options"])
        schemas += (
            f"<schema><text><txt1>\n   {row['text'][:at].strip()}\n</txt1><pron>{pronoun}</pron>"
            f"<txt2>{row['text'][at + len(pronoun) :]}</txt2></text><answers>{answers}</answers>"
            f"<correctAnswer>\n {'AB'[row['label']]}.</correctAnswer></schema>\n"
        )
    path.write_text(f"<?xml version='1.0'?>\n<collection>\n{schemas}</collection>\n", "utf-8")


def write_hub(folder: Path) -> None:
    """The files of every task as the hub has them, in Parquet."""
    from pyarrow import Table, parquet

    for task, rows in hub_rows().items():
        name = {"arc_easy": "ARC-Easy", "arc_challenge": "ARC-Challenge", "wsc": "wsc.fixed"}
        where = folder / name.get(task, task)
        where.mkdir(parents=True)
        for split in SPLITS:
            file = where / f"{split}-00000-of-00001.parquet"
            parquet.write_table(Table.from_pylist(rows), file)
