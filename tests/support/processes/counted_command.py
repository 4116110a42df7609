"""A command as `opt-lm`, which writes down how much of weights and data it has read."""

import json
import os
import sys
from pathlib import Path
from typing import Any

from opt_cli.main import main
from opt_core.data import TokenBlocks


def count_reads(backend: str) -> dict[str, Any]:
    """The bytes of weights and, for each folder of blocks, the rows; they grow with each read."""
    found: dict[str, Any] = {"weights": 0, "rows": []}
    kind = "tensor" if backend == "torch" else "array"
    checkpoint: Any = __import__(f"opt_{backend}.checkpoint").checkpoint
    cast, get = getattr(checkpoint, f"cast_{kind}"), TokenBlocks.__getitem__
    rows: dict[int, set[int]] = {}

    def counted_cast(name: str, values: Any, dtype: Any) -> Any:
        found["weights"] += values.nbytes
        return cast(name, values, dtype)

    def counted_get(blocks: TokenBlocks, index: int) -> Any:
        rows.setdefault(id(blocks), set()).add(index)
        found["rows"] = [len(seen) for seen in rows.values()]
        return get(blocks, index)

    setattr(checkpoint, f"cast_{kind}", counted_cast)
    setattr(TokenBlocks, "__getitem__", counted_get)  # noqa: B010 its argument has another name
    return found


if __name__ == "__main__":
    out, *arguments = sys.argv[1:]
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # before PyTorch is loaded
    reads = count_reads(arguments[arguments.index("--backend") + 1])
    try:
        main(arguments)
    finally:
        Path(out).write_text(json.dumps(reads))
