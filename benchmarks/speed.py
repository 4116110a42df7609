"""Times one backend on one task and prints one JSON line: `opt_cli.speed` says which and how.

python -m benchmarks.speed --backend torch --model DIR --task decode --dtype float32
"""

import argparse
import json

from opt_cli.speed import BACKENDS, SHAPES, measure
from opt_core.quantization import SCHEMES


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--task", choices=SHAPES, required=True)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", choices=SCHEMES)
    parser.add_argument("--reps", type=int, default=3)
    parser.add_argument("--new", type=int, default=64)
    print(json.dumps(measure(**vars(parser.parse_args()))))


if __name__ == "__main__":
    main()
