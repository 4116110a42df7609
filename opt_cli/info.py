"""`opt-lm info`: what a checkpoint is and what is wrong with it."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from opt_cli import console

if TYPE_CHECKING:
    from rich.table import Table

    from conversion import Description


def info(
    model: Annotated[
        str, typer.Argument(help='Folder, weight file, hub id, or "mini".', metavar="MODEL")
    ],
    revision: Annotated[
        str | None, typer.Option(help="Branch, tag or commit of a hub id.", metavar="NAME")
    ] = None,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead.")] = False,
) -> None:
    """Describe a checkpoint or an adapter: format, configuration, parameters, sizes, problems.

    No weights are loaded. Exits with 1 if there are problems.
    """
    from conversion import describe

    description = describe(model, revision=revision)
    if json:
        config = description.config
        values = asdict(description) | {"config": config and config.to_dict()}
        console.print_json(values | {"path": str(description.path)})
    else:
        _print(description, tensors)
    if description.problems:
        raise typer.Exit(console.EXIT_DIFFERENT)


def _print(description: "Description", tensors: bool) -> None:
    from rich.text import Text

    for name, value in _summary(description):
        console.stdout.print(Text.assemble((f"{name:<14}", "bold"), value), soft_wrap=True)
    if description.parts:
        console.stdout.print()
        console.stdout.print(_parts(description))
    if tensors:
        console.stdout.print()
        console.stdout.print(_tensors(description))
    for note in description.notes:
        console.stdout.print(Text.assemble(("note: ", "bold"), note), soft_wrap=True)
    for problem in description.problems:
        console.stdout.print(Text.assemble(("problem: ", "bold red"), problem), soft_wrap=True)


def _summary(description: "Description") -> list[tuple[str, str]]:
    files = description.files
    rows = [("path", str(description.path)), *_adapter(description)]
    if description.format is not None:
        count = "1 file" if len(files) == 1 else f"{len(files)} files"
        rows.append(
            ("format", f"{description.format}, {count}, {console.size(sum(files.values()))}")
        )
        dtypes = (f"{name} ({count} tensors)" for name, count in description.dtypes.items())
        rows.append(("stored as", ", ".join(dtypes)))
        if description.quantization is not None:
            rows.append(("quantised", description.quantization))
        if description.head is not None:
            rows.append(("head", _head(description)))
        rows.append(("parameters", f"{description.parameters:,}"))
    config = description.config
    if config is not None:
        layers = f"{config.num_hidden_layers} layers, {config.num_attention_heads} heads"
        norm = "pre-LN" if config.do_layer_norm_before else "post-LN"
        rows.append(("model", f"{layers}, {norm}, {config.activation_function}"))
        width = f"hidden {config.hidden_size}, feed-forward {config.ffn_dim}"
        if config.has_projections:
            width += f", embedding {config.embed_dim}"
        rows.append(("widths", width))
        window = f"{config.max_position_embeddings} positions"
        rows.append(("input", f"{config.vocab_size} token ids, {window}"))
    known = description.vocabulary
    if description.adapter is None:
        rows.append(("tokenizer", "none" if known is None else f"{known} token ids"))
    return rows


def _adapter(description: "Description") -> list[tuple[str, str]]:
    adapter = description.adapter
    if adapter is None:
        return []
    size = f"rank {adapter.rank}, alpha {adapter.alpha:g}"
    rows = [("base", adapter.base or "not named")]
    rows.append(("adapter", f"LoRA, {size}, on {adapter.layers} weights"))
    rows.append(("targets", ", ".join(adapter.targets) or "none"))
    if adapter.whole:
        more = f" and {len(adapter.whole) - 4} more" if len(adapter.whole) > 4 else ""
        rows.append(("whole", ", ".join(adapter.whole[:4]) + more))
    return rows


def _head(description: "Description") -> str:
    name = (description.head or "none").replace("_", " ")
    tied = description.config is not None and description.config.tie_word_embeddings
    return f"{name}, tied to the token embedding" if tied and name == "causal lm" else name


def _parts(description: "Description") -> "Table":
    table = _table("part", "tensors", "parameters", "size")
    for part in description.parts:
        table.add_row(
            part.name, str(part.tensors), f"{part.parameters:,}", console.size(part.nbytes)
        )
    return table


def _tensors(description: "Description") -> "Table":
    from rich.text import Text

    table = _table("tensor", "shape", "type", "size")
    for tensor in description.tensors:
        shape = " x ".join(map(str, tensor.shape))
        table.add_row(Text(tensor.name), shape, tensor.dtype, console.size(tensor.nbytes))
    return table


def _table(first: str, *others: str) -> "Table":
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right", no_wrap=True)
    return table
