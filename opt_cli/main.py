"""The command's entry point and the list of its subcommands."""

import builtins
import os
from typing import Annotated

import typer

from opt_cli import (
    bench,
    compilation_cache,
    console,
    convert,
    download,
    evaluate,
    export,
    generate,
    info,
    plan,
    prepare,
    push,
    quantize,
    smooth,
    verify,
)
from opt_cli.commands import App
from opt_cli.paper.command import paper
from opt_cli.serving.command import serve
from opt_cli.training.command import train
from opt_cli.training.plot import plot

app = App(
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("generate")(generate.generate)
app.command("convert")(convert.convert)
app.command("info")(info.info)
app.command("verify")(verify.verify)
app.command("quantize")(quantize.quantize)
app.command("serve")(serve)
app.command("smooth")(smooth.smooth)
app.command("export")(export.export)
app.command("bench")(bench.bench)
app.command("prepare")(prepare.prepare)
app.command("train")(train)
app.command("plan")(plan.plan)
app.command("plot")(plot)
app.command("download")(download.download)
app.command("push")(push.push)
evaluate.app.command("paper")(paper)
app.add_typer(evaluate.app, name="eval")


@app.callback(invoke_without_command=True)
def opt_lm(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """OPT language models in PyTorch, TensorFlow and Flax.

    A model is a folder, a hub id such as facebook/opt-125m, or the embedded "mini".
    """
    if version:
        from opt_core import __version__

        typer.echo(f"opt-lm {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())
    elif context.invoked_subcommand in ("generate", "eval", "serve", "train"):
        compilation_cache.keep_programs()


def main(arguments: list[str] | None = None) -> None:
    """Runs `opt-lm` and ends the process; in a notebook, a success ends nothing.

    Exit codes: 0 success, 1 a comparison that failed or problems found, 2 a user's error (one line
    on stderr), 130 interrupted, 141 the reader of the output went away.

    Args:
        arguments: Command-line arguments; None takes those of the process.
    """
    # What TensorFlow says while it loads is for its own developers; errors are raised all the same.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    code = console.run(app, arguments)
    if code or not hasattr(builtins, "__IPYTHON__"):
        raise SystemExit(code)
