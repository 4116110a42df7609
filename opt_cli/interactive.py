"""`opt-lm generate --interactive`: one text, written by turns by its user and the model.

The cache is kept from turn to turn: the scheduler of serving, with one row, reads what is new.
"""

from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np

from opt_cli import console
from opt_core.errors import ConfigError, GenerationError, OPTError
from opt_core.generation.config import GenerationConfig
from opt_core.generation.mixin import make_request
from opt_core.serving.row import Row
from opt_core.serving.scheduler import Scheduler
from opt_core.text import Detokenizer, OPTTokenizer

HELP = """\
A line is added to the text, on a line of its own; an empty one lets the model go on.
/undo     take back the last turn
/seed N   draw from another seed from now on; the same text and seed give the same turn
/new      begin another text
/quit     leave, as Control-D does; Control-C ends a turn
"""


class Conversation:
    """A text that grows by turns.

    Args:
        model: A language model.
        tokenizer: Its tokenizer.
        backend: Name of its backend.
        settings: How the model writes.
        seed: Seed of sampling.

    Attributes:
        ids: The text so far.
        seed: Seed of the next turn.

    Raises:
        GenerationError: A setting that cannot be had here.
    """

    def __init__(
        self, model: Any, tokenizer: OPTTokenizer, backend: str, settings: GenerationConfig,
        seed: int,
    ) -> None:  # fmt: skip
        self.model, self.tokenizer, self.settings, self.seed = model, tokenizer, settings, seed
        self.scheduler = Scheduler(import_module(f"opt_{backend}.serving.engine").Engine(model, 1))
        self.ids: list[int] = []
        self._turns: list[list[int]] = []
        self._row(tokenizer.encode(""))  # a setting that does not fit is told before the first turn

    def turn(self, line: str) -> Iterator[str]:
        """Adds a line and what the model writes after it; yields the pieces of that.

        Raises:
            GenerationError: The model's window is full.
        """
        ids = [*self.ids, *self._encode(line)]
        row, text = self._row(ids), Detokenizer(self.tokenizer)
        self._turns.append(self.ids)
        self.ids = ids
        self.scheduler.submit(row)
        try:
            while row.ended is None:
                for event in self.scheduler.step():
                    if event.ended == "error":
                        raise GenerationError(str(row.error))
                    if event.token is None:
                        continue
                    if event.token not in self.settings.eos_ids:
                        self.ids.append(event.token)
                    yield text.push(event.token)
            yield text.flush()
        finally:
            row.is_cancelled = True
            while not self.scheduler.is_idle:
                self.scheduler.step()

    def undo(self) -> bool:
        """Takes back the last turn; whether there was one."""
        if self._turns:
            self.ids = self._turns.pop()
            return True
        return False

    def clear(self) -> None:
        """Begins another text."""
        self.ids, self._turns = [], []

    def _encode(self, line: str) -> list[int]:
        if not self.ids:
            return self.tokenizer.encode(line)
        ends = self.tokenizer.decode(self.ids[-1:]).endswith("\n")
        line = line if ends or not line else "\n" + line
        return self.tokenizer.encode(line, add_special_tokens=False)

    def _row(self, ids: list[int]) -> Row:
        window = self.model.config.max_position_embeddings
        room = window - len(ids) + 1
        if room < 1:
            raise GenerationError(f"the text fills the model's {window} tokens; /undo or /new")
        new = min(self.settings.new_tokens(len(ids)), room)
        settings = self.settings.replace(max_new_tokens=new)
        prompt = np.array([ids], np.int32)
        request = make_request(
            self.model, prompt, np.ones_like(prompt), settings, self.seed, self.tokenizer
        )
        return Row(request)


def converse(conversation: Conversation) -> None:
    """Asks for lines and writes turns until the user leaves.

    Raises:
        ConfigError: There is no terminal, or no library to edit lines with.
    """
    if not console.stderr.is_terminal or not console.stdout.is_terminal:
        raise ConfigError("--interactive needs a terminal; for one text, pass it as an argument")
    try:
        from prompt_toolkit import PromptSession
    except ModuleNotFoundError:
        raise ConfigError(
            "--interactive needs prompt_toolkit, which is not installed: "
            'pip install "opt-lm[interactive]"'
        ) from None
    console.note("/help says what can be typed; Control-D leaves")
    ask: Callable[[str], str] = PromptSession[str]().prompt
    while True:
        try:
            line = ask("> ")
        except EOFError:
            return
        except KeyboardInterrupt:  # it gives up the line, as in a shell
            continue
        if line.startswith("/"):
            if line.strip() == "/quit":
                return
            console.note(command(conversation, line))
            continue
        try:
            for piece in conversation.turn(line):
                console.write(piece)
        except KeyboardInterrupt:
            console.note(" (ended)")
            continue
        except OPTError as error:
            console.note(str(error))
            continue
        console.write("\n")


def command(conversation: Conversation, line: str) -> str:
    """Does what a line that begins with "/" says; what to tell of it."""
    name, _, argument = line.strip().partition(" ")
    if name == "/undo":
        return "taken back" if conversation.undo() else "there is no turn to take back"
    if name == "/new":
        conversation.clear()
        return "a new text"
    if name == "/seed" and argument.strip().isdecimal() and int(argument) < 2**63:
        conversation.seed = int(argument)
        return f"seed {conversation.seed}"
    if name == "/seed":
        return f"/seed: expected an integer in 0..2**63 - 1, received {argument!r}"
    return HELP if name == "/help" else f"no such command: {name}\n{HELP}"
