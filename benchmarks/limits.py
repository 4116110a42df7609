"""Measures the machine's ceilings and prints one JSON line.

    python -m benchmarks.limits [--tries N]

`read_gb_s`: bytes read per second by all cores together, from an array far larger than any cache.
`float32_gflop_s` and `bfloat16_gflop_s`: the rate of a large matrix product, of MKL or of oneDNN.
Each is the best of several tries: a ceiling is what the machine can do, not what it does usually.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

READ_BYTES = 2**30
PRODUCTS = (256, 512, 1024, 2048)
"""Rows and columns of the matrices: the largest whose product takes no longer than LONGEST."""
LONGEST = 0.2
"""Seconds. Some processors need a hundred times as long for bfloat16 as for float32."""


def best(call: Callable[[], Any], tries: int) -> float:
    """Seconds of the fastest of several calls, one more before them left out."""
    call()
    seconds = []
    for _ in range(tries):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def measure(tries: int = 7) -> dict[str, float]:
    """The ceilings, through PyTorch, which uses every core for both."""
    import torch

    from opt_torch import _private

    block = torch.ones(READ_BYTES // 4)  # zeros may be one page of the system's, read from a cache
    limits = {"read_gb_s": READ_BYTES / best(block.sum, tries) / 1e9}
    for dtype in (torch.float32, torch.bfloat16):
        rate = 0.0
        for size in PRODUCTS:
            a, b = (torch.randn(size, size).to(dtype) for _ in range(2))
            products = [lambda a=a, b=b: a @ b]
            if _private.mkldnn_linear is not None:
                products.append(lambda a=a, b=b: _private.mkldnn_linear(a, b, None, "none", [], ""))
            seconds = min(best(product, tries) for product in products)
            rate = max(rate, 2 * size**3 / seconds / 1e9)
            if 8 * seconds > LONGEST:
                break
        limits[f"{str(dtype).removeprefix('torch.')}_gflop_s"] = rate
    return {name: round(value, 1) for name, value in limits.items()}


def main() -> None:
    """Runs the command line above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--tries", type=int, default=7)
    print(json.dumps(measure(parser.parse_args().tries)))


if __name__ == "__main__":
    main()
