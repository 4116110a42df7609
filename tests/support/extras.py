"""The promises of one extra, tried where nothing but that extra is installed.

    python -P tests/support/extras.py flax            # by the command and in Python
    python -P tests/support/extras.py flax formats    # what a further extra adds to it

-P: the installed packages are tried, not the clone's. Nothing of tests/ is imported, since no test
library has to be there. `tests/support/matrix.py` calls this in fresh environments.
"""

import importlib
import json
import os
import pty
import subprocess
import sys
import tempfile
from contextlib import chdir
from functools import partial
from importlib.util import find_spec
from itertools import repeat
from pathlib import Path
from urllib.request import Request, urlopen

import numpy as np

FRAMEWORKS = {"torch": "torch", "tf": "tensorflow", "flax": "jax"}
PREFIXES = {"torch": "", "tf": "TF", "flax": "Flax"}
PROMPT, NEW, WINDOW = "ROMEO:", 8, 64
RELATIVE_TOLERANCE = 1e-6
"""Of the same computation, called in two ways."""
SETTINGS = ("--max-steps", "3", "--batch-size", "2", "--sequence-length", "32")
TEXT = Path(__file__).read_text("utf-8")
"""A text that is there."""
TASK = """
task: mine
dataset_path: json
dataset_kwargs: {data_files: {test: questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""
QUESTION = '{"question": "My lord,", "choices": [" I am", " xqz"], "answer": 0}\n'


def opt_lm(*arguments: object) -> str:
    """Output of the command; where it fails, this program ends with its words."""
    words = [str(argument) for argument in arguments]
    command = [sys.executable, "-P", "-m", "opt_cli", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"opt-lm {' '.join(words)} ended with {done.returncode}:\n{done.stderr}")
    return done.stdout


def by_command(backend: str) -> tuple[str, float]:
    """Generates, trains, exports and evaluates with `opt-lm`, which is to find the backend.

    Returns:
        The text and the perplexity.
    """
    written = opt_lm("generate", PROMPT, "--greedy", "--max-new-tokens", NEW)
    assert written.startswith(PROMPT), written
    assert len(written.strip()) > len(PROMPT), written
    opt_lm("train", "mini", "text.txt", "--out", "run", *SETTINGS)
    tokens = () if backend == "torch" else ("--max-prompt", 8, "--max-new-tokens", NEW)
    opt_lm("export", "run/model", program("command", backend), *tokens)
    measured = opt_lm("eval", "perplexity", "text.txt", "--window", WINDOW, "--json")
    return written, json.loads(measured)["perplexity"]


def program(name: str, backend: str) -> Path:
    """The place of an exported program: torch's is a file."""
    return Path(f"{name}.pt2" if backend == "torch" else name)


def in_python(backend: str, written: str, perplexity: float) -> None:
    """The same as a program does it, with the same results."""
    from opt_core import OPTTokenizer, TrainConfig
    from opt_core.evaluation import text_perplexity

    package, training, export, scoring = (
        importlib.import_module(f"opt_{backend}{part}")
        for part in ("", ".training", ".export", ".scoring")
    )
    model_class = getattr(package, PREFIXES[backend] + "OPTForCausalLM")
    tokenizer = OPTTokenizer.from_pretrained("mini")
    model = model_class.from_pretrained("mini")

    prompt = tokenizer([PROMPT])
    ids = model.generate(**prompt, max_new_tokens=NEW, do_sample=False)
    text = tokenizer.decode(np.asarray(ids)[0], skip_special_tokens=True)
    assert text.strip() == written.strip(), (text, written)

    scores = partial(scoring.token_scores, model)
    result = text_perplexity(scores, TEXT, tokenizer, window=WINDOW)
    assert abs(result.perplexity / perplexity - 1) < RELATIVE_TOLERANCE, (result, perplexity)

    losses: list[float] = []
    batch = np.asarray(tokenizer([TEXT]).input_ids)[:, :32].repeat(2, 0)
    config = TrainConfig(max_steps=3, learning_rate=1e-3)
    training.fit(model, repeat(batch), config, lambda step, loss: losses.append(loss))
    assert len(losses) == 3, losses
    assert losses[-1] < losses[0], losses

    destination = program("python", backend)
    if backend == "torch":
        export.export_program(model, destination)
    else:
        write = {"tf": "export_saved_model", "flax": "export_stablehlo"}[backend]
        getattr(export, write)(model, destination, 8, max_new_tokens=NEW)
    assert destination.exists()


def formats() -> None:
    """A file that takes h5py to write and to read."""
    opt_lm("convert", "mini", "h5", "--to", "tf-h5")
    assert "tf-h5" in opt_lm("info", "h5")


def plots() -> None:
    """A picture of the run."""
    opt_lm("train", "mini", "text.txt", "--out", "run", *SETTINGS)
    opt_lm("plot", "run", "--out", "loss.png")
    assert Path("loss.png").read_bytes().startswith(b"\x89PNG")


def data() -> None:
    """A compressed text and a table."""
    import pyarrow
    import zstandard
    from pyarrow import parquet

    Path("text.txt.zst").write_bytes(zstandard.compress(TEXT.encode()))
    parquet.write_table(pyarrow.table({"text": TEXT.split("\n\n")}), "rows.parquet")
    for name in ("text.txt.zst", "rows.parquet"):
        opt_lm("prepare", name, f"of-{name}", "--sequence-length", 16)


def tensorboard() -> None:
    """Event files of a run."""
    opt_lm("train", "mini", "text.txt", "--out", "shown", "--tensorboard", *SETTINGS)
    assert list(Path("shown/tensorboard").glob("events*"))


def lm_eval() -> None:
    """A task of lm-eval on a file of our own."""
    Path("tasks").mkdir()
    Path("tasks/mine.yaml").write_text(TASK, "utf-8")
    Path("questions.jsonl").write_text(QUESTION * 4, "utf-8")
    assert "acc" in opt_lm("eval", "harness", "mine", "--include-path", "tasks")


def serve() -> None:
    """A completion over HTTP."""
    command = [sys.executable, "-P", "-m", "opt_cli", "serve", "mini", "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        words = (line.split()[-1:] for line in process.stderr)  # JAX may speak first
        url = next(last for (last,) in filter(None, words) if last.startswith("http"))
        body = json.dumps({"model": "mini", "prompt": PROMPT, "max_tokens": NEW}).encode()
        request = Request(f"{url}/v1/completions", body, {"Content-Type": "application/json"})
        with urlopen(request, timeout=120) as answer:
            assert json.load(answer)["usage"]["completion_tokens"] == NEW
        process.terminate()
        assert process.wait(60) == 0


def interactive() -> None:
    """A turn at a terminal."""
    end, terminal = pty.openpty()
    command = [sys.executable, "-P", "-m", "opt_cli", "generate", "--interactive"]
    with subprocess.Popen(command, stdin=terminal, stdout=terminal, stderr=terminal) as process:
        os.close(terminal)
        os.write(end, f"{PROMPT}\r/quit\r".encode())
        assert process.wait(120) == 0
    os.close(end)


def ray() -> None:
    """A text, prepared by a cluster that is started for it."""
    opt_lm("prepare", "text.txt", "by-ray", "--sequence-length", 16, "--engine", "ray")


FURTHER = {
    "formats": formats,
    "plots": plots,
    "data": data,
    "tensorboard": tensorboard,
    "lm-eval": lm_eval,
    "serve": serve,
    "interactive": interactive,
    "ray": ray,
}
"""Extras on top of a backend, each with a check."""


def main(backend: str, extra: str | None = None) -> None:
    """Tries a backend, or what a further extra adds to it, in a folder of its own.

    Raises:
        SystemExit: Something failed, or another framework is installed.
    """
    others = [module for name, module in FRAMEWORKS.items() if name != backend]
    found = [name for name in (*others, "tests") if find_spec(name)]
    # lm-eval's first releases bring torch with them.
    if found and extra != "lm-eval":
        sys.exit(f"{backend} is to be tried alone, found: {', '.join(found)}")
    with tempfile.TemporaryDirectory() as folder, chdir(folder):
        Path("text.txt").write_text(TEXT, "utf-8")
        if extra:
            FURTHER[extra]()
        else:
            in_python(backend, *by_command(backend))


if __name__ == "__main__":
    main(*sys.argv[1:])
