"""Kernels, copies and traffic of a program that XLA has compiled, from its text.

Nothing here needs a device, or JAX. The text is `compiled.as_text()`. A kernel is an instruction
that a device runs on its own: of the program itself, of a loop's body or of a branch, but not of a
fusion, which is one kernel. A loop's body counts once.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute",
)  # fmt: skip
_FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota",
    "partition-id", "replica-id", "while", "conditional", "call", "opt-barrier",
}  # fmt: skip
"""Operations that run no kernel of their own."""
_VIEWS = ("bitcast", "reshape", "copy", "convert")
"""Between a parameter of a fusion and the part of it that is read."""
_INSTRUCTION = re.compile(
    r"^\s+(ROOT )?%(?P<name>\S+) = (?P<type>.+?) (?P<kind>[a-z][\w-]*)\((?P<operands>.*?)\)(?:,|$)"
)
_HEADING = re.compile(r"^(ENTRY )?%?(?P<name>\S+) \(.*\{$")
_ARRAY = re.compile(r"(pred|[a-z]+(\d+)\w*)\[([\d,]*)\]")


@dataclass(frozen=True)
class Instruction:
    """A line of a program.

    Attributes:
        name: Its name.
        kind: What it does: "fusion", "custom-call", "copy" ...
        type: Types and shapes of its results.
        operands: Names of what it takes.
        line: All of it.
        is_root: Whether its computation returns it.
    """

    name: str
    kind: str
    type: str
    operands: tuple[str, ...]
    line: str
    is_root: bool

    @property
    def bytes(self) -> int:
        """Of its results."""
        return sum(size for _, size in arrays(self.type))

    @property
    def called(self) -> list[str]:
        """Computations that its attributes name."""
        attributes = self.line.partition("), ")[2].partition(", metadata=")[0]
        return re.findall(r"%([\w.-]+)", attributes)

    def refers(self, what: str) -> str | None:
        """The computation that an attribute names ("calls", "body" ...); None: it has no such."""
        found = re.search(rf"\b{what}=%?([\w.-]+)", self.line)
        return None if found is None else found[1]


class Program:
    """The text of a compiled program, by computations."""

    def __init__(self, text: str):
        self.text = text
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        lines: dict[str, Instruction] = {}
        for line in text.splitlines():
            heading = _HEADING.match(line)
            if heading is not None:
                lines = self.computations.setdefault(heading["name"], {})
                self.entry = heading["name"] if heading[1] else self.entry
            elif (found := _INSTRUCTION.match(line)) is not None:
                operands = tuple(re.findall(r"%([^\s,()]+)", found["operands"]))
                lines[found["name"]] = Instruction(
                    found["name"], found["kind"], found["type"], operands, line, bool(found[1])
                )

    @cached_property
    def kernels(self) -> list[tuple[str, Instruction]]:
        """Every kernel with the name of its computation."""
        waiting, seen, found = [self.entry], set(), []
        while waiting:
            name = waiting.pop()
            if name in seen or name not in self.computations:
                continue
            seen.add(name)
            for instruction in self.computations[name].values():
                if instruction.kind not in _FREE and not instruction.kind.endswith("-done"):
                    found.append((name, instruction))
                elif instruction.kind in ("while", "conditional", "call"):
                    waiting += re.findall(
                        r"%([\w.-]+)",
                        re.sub(r"^.*?\)(?=,)", "", instruction.line.split("metadata")[0]),
                    )
        return found

    def is_in_place(self, instruction: Instruction) -> bool:
        """Whether it writes a part of a buffer where the buffer lies."""
        if instruction.kind == "dynamic-update-slice":
            return True
        return bool(self._updates(instruction))

    def _updates(self, fusion: Instruction) -> list[Instruction]:
        """The updates that are results of a fusion."""
        lines = self.computations.get(fusion.refers("calls") or "", {})
        roots = [i for i in lines.values() if i.is_root]
        if roots and roots[0].kind == "tuple":
            roots = [lines[name] for name in roots[0].operands]
        found = []
        for root in roots:
            while root.kind in _VIEWS and root.operands[0] in lines:
                root = lines[root.operands[0]]
            if root.kind in ("dynamic-update-slice", "scatter"):
                found.append(root)
        return found

    def traffic(self, computation: str, instruction: Instruction) -> int:
        """Bytes that a kernel reads and writes, every operand and result once.

        Of what it looks up, only what it finds counts; of a buffer that it writes in place, only
        the part that it writes.
        """
        around = self.computations[computation]
        if instruction.kind in ("dynamic-update-slice", "scatter"):
            return (
                2 * around[instruction.operands[-1 if instruction.kind == "scatter" else 1]].bytes
            )
        inner = self.computations.get(instruction.refers("calls") or "", {})
        if instruction.kind != "fusion" or not inner:
            return instruction.bytes + sum(around[name].bytes for name in instruction.operands)
        updates = self._updates(instruction)
        written = instruction.bytes - sum(update.bytes for update in updates)
        written += sum(inner[update.operands[1]].bytes for update in updates)
        given = [i for i in inner.values() if i.kind == "parameter"]
        return written + sum(round(i.bytes * _share(inner, i)) for i in given)


def _share(lines: dict[str, Instruction], source: Instruction) -> float:
    """How much of an array inside a fusion is used by the rest of it."""
    if source.is_root:
        return 1.0
    total = 0.0
    for user in lines.values():
        if source.name not in user.operands:
            continue
        is_first = user.operands[0] == source.name
        if user.kind == "gather" and is_first:
            total += user.bytes / source.bytes
        elif user.kind in ("dynamic-slice", "slice") and is_first:
            total += _share(lines, user) * user.bytes / source.bytes
        elif user.kind != "dynamic-update-slice" or not is_first:
            total += _share(lines, user)
    return min(total, 1.0)


def arrays(type: str) -> Iterator[tuple[tuple[int, ...], int]]:
    """Shapes and bytes of the arrays in a type."""
    for name, bits, shape in _ARRAY.findall(type):
        sizes = tuple(int(n) for n in shape.split(",") if n)
        yield sizes, max(int(bits or 8), 8) // 8 * math.prod(sizes) if name else 0


def count_collectives(text: str) -> dict[str, int]:
    """Instructions of a compiled program that speak to other devices, by kind."""
    kinds = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    return {kind: kinds[kind] for kind in COLLECTIVES if kinds[kind]}


def largest_gather(text: str) -> int:
    """Bytes of the largest array that an all-gather of a compiled program makes."""
    made = re.findall(r"= (.*?) all-gather(?:-start)?\(", text)
    return max((size for type in made for _, size in arrays(type)), default=0)


def count_kernels(program: Program) -> dict[str, int]:
    """Kernels by what they do: products of each library, attention, other fusions, copies."""
    kinds: Counter[str] = Counter()
    for _, instruction in program.kernels:
        kinds[_kernel_kind(instruction)] += 1
    return dict(sorted(kinds.items()))


def _kernel_kind(instruction: Instruction) -> str:
    line = instruction.line
    if instruction.kind == "custom-call":
        target = re.search(r'custom_call_target="([^"]+)"', line)
        name = target[1] if target else ""
        if "fmha" in name:
            return "cuDNN attention"
        if "cublas" in name:
            return "cuBLAS product"
        return name or "custom-call"
    if instruction.kind == "fusion":
        if "__triton_gemm" in line or "__triton_nested_gemm" in line:
            return "Triton product"
        if "__cudnn$fusion" in line:
            return "cuDNN product"
        return "Triton fusion" if '"__triton"' in line else "fusion"
    return instruction.kind.removesuffix("-start")


def count_copies(program: Program, shape: tuple[int, ...], itemsize: int) -> int:
    """Kernels that make another array of a buffer's size, and do not write it in place.

    Args:
        program: The program.
        shape: The buffer's, on one device; axes in another order count too.
        itemsize: Bytes of an element.
    """
    wanted, size = sorted(n for n in shape if n > 1), math.prod(shape) * itemsize
    count = 0
    for _, instruction in program.kernels:
        made = [
            dims for dims, found in arrays(instruction.type)
            if found == size and sorted(n for n in dims if n > 1) == wanted
        ]  # fmt: skip
        count += bool(made) and not program.is_in_place(instruction)
    return count


def total_traffic(program: Program) -> int:
    """Bytes that all kernels of a program read and write."""
    return sum(program.traffic(*kernel) for kernel in program.kernels)
