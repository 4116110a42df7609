"""README and docs: code runs, commands have such options, messages, figures and links exist."""

import ast
import json
import re
import shlex
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

from benchmarks import compare
from opt_cli.main import app, main

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
README_LINES = 150
SITE = "https://github.com/opt-lm/opt-lm/blob/main/"
RAW = "https://raw.githubusercontent.com/opt-lm/opt-lm/main/"

BLOCK = re.compile(r"(?:<!-- (\w+) -->\n)?^```(\w+)\n(.*?)^```", re.DOTALL | re.MULTILINE)


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """Mark ("run", "parse" or none), language and text of each block of a page."""
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def commands(text: str) -> list[list[str]]:
    """The `opt-lm` lines of a shell block, without the program's name."""
    lines = text.replace("\\\n", " ").splitlines()
    found = [shlex.split(line, comments=True) for line in lines]
    return [words[1:] for words in found if words and words[0] == "opt-lm"]


def run(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert not ended.value.code, arguments


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_code_runs(page, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a classifier's head is new, as the text says
        for mark, language, text in blocks(page):
            if language == "python":
                code = compile(text, page.name, "exec")
                if mark != "parse":
                    exec(code, names)
            elif mark == "run":
                for arguments in commands(text):
                    run(arguments)


def test_there_is_code_to_run():
    found = [block for page in PAGES for block in blocks(page)]
    assert sum(language == "python" for _, language, _ in found) >= 15
    assert sum(mark == "run" for mark, _, _ in found) >= 5
    assert {language for _, language, _ in found} <= {"python", "bash", "text"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_have_such_options(page, tmp_path, monkeypatch):
    """Parsed by the real command line, as far as it goes before anything is done."""
    monkeypatch.chdir(tmp_path)
    for _, language, text in blocks(page):
        for arguments in commands(text) if language == "bash" else []:
            parse(arguments)


def parse(arguments: list[str]) -> None:
    command: Any = typer.main.get_command(app)
    while hasattr(command, "commands") and arguments and not arguments[0].startswith("-"):
        assert arguments[0] in command.commands, arguments
        command, arguments = command.commands[arguments[0]], arguments[1:]
    if "--help" not in arguments:
        command.make_context(command.name, list(arguments))


def test_a_wrong_option_is_seen():
    with pytest.raises(Exception, match="no-such"):
        parse(["generate", "x", "--no-such", "3"])


def test_the_readme_is_short_and_its_links_are_absolute():
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= README_LINES
    for target in re.findall(r"\]\((.*?)\)", text):
        assert target.startswith("https://"), target
        for start in (SITE, RAW, SITE.replace("blob", "tree")):
            if target.startswith(start):
                assert (ROOT / target.removeprefix(start)).exists(), target


def test_every_file_named_exists():
    for page in PAGES:
        for name in re.findall(r"`([a-z_]+/[\w/.]+\.(?:py|md))`", page.read_text("utf-8")):
            assert (ROOT / name).exists(), (page.name, name)


def test_the_table_of_speeds_is_that_of_the_results():
    table = compare.table(json.loads(compare.RESULTS.read_text()))
    assert table in (ROOT / "docs" / "speed.md").read_text("utf-8")


@cache
def messages() -> str:
    """Every text of the packages, values left out, a line each."""
    packages = ("opt_core", "opt_torch", "opt_tf", "opt_flax", "opt_cli", "conversion")
    found: list[str] = []
    for path in (file for name in packages for file in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(found)


def test_the_messages_of_the_troubleshooting_page_are_the_codes():
    text = (ROOT / "docs" / "troubleshooting.md").read_text("utf-8")
    rows = re.findall(r"^\| `(.*?)` \|", text, re.MULTILINE)
    assert len(rows) >= 25
    for message in rows:
        for part in filter(None, (part.strip(" :;,") for part in message.split("…"))):
            assert part in messages(), message


def test_the_first_notebook_runs_in_a_shell(tmp_path, monkeypatch):
    """A notebook's shell without a process of its own, which has to import everything anew."""
    pytest.importorskip("torch")
    import nbformat
    from IPython.core.interactiveshell import InteractiveShell

    monkeypatch.chdir(tmp_path)
    shell = InteractiveShell()
    book = nbformat.read(ROOT / "docs" / "notebooks" / "first-steps.ipynb", as_version=4)
    cells = [cell.source for cell in book.cells if cell.cell_type == "code"]
    assert len(cells) >= 3
    for cell in cells:
        shell.run_cell(cell).raise_error()


@pytest.mark.slow
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_notebooks_run(notebook, tmp_path, monkeypatch):
    pytest.importorskip("torch")
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "1")
    book = nbformat.read(notebook, as_version=4)
    assert not any(cell.get("outputs") for cell in book.cells), "clear the outputs"
    resources = {"metadata": {"path": str(tmp_path)}}
    kernel = {"kernel_name": "python3", "timeout": 300, "resources": resources}
    NotebookClient(book, **kernel).execute()  # raises what a cell raises
