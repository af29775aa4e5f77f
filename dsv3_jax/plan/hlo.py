"""A compiled program's text (`jax.stages.Compiled.as_text()`) as instructions in schedule order."""

import functools
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dsv3_jax.errors import UserError

_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{$")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r"\s*([\w\-]+)(?=\()")
_CALLED = re.compile(r"\b(?:calls|to_apply|body|condition|branch_computations)=(\{[^}]*\}|[^,\s]+)")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLERS = frozenset({"while", "call", "conditional"})  # whose computations are schedules too
_ARRAY = re.compile(r"\b(pred|bf16|[sufc]\d+\w*)\[([\d,]*)\]")


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """One line of a computation."""

    name: str
    shape: str  # as printed, layout included
    opcode: str
    operands: tuple[str, ...]
    attributes: str  # what follows the operands, up to the backend's configuration
    backend_config: str
    is_root: bool

    @property
    def op_name(self) -> str:
        """The path of traced functions and named scopes it came from; '' if XLA made it."""
        found = re.search(r'metadata=\{[^}]*?op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def custom_call_target(self) -> str:
        found = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """Names of the computations it runs."""
        lists = _CALLED.findall(self.attributes)
        return tuple(name for found in lists for name in _NAME.findall(found))

    @property
    def num_bytes(self) -> int:
        """Of its result, every array of a tuple counted."""
        return sum(
            math.prod(int(d) for d in dims.split(",") if d) * _bits(dtype) // 8
            for dtype, dims in _ARRAY.findall(self.shape)
        )


@dataclass(frozen=True)
class Program:
    """Instructions of every computation by its name, in the order in which they are issued."""

    computations: Mapping[str, tuple[Instruction, ...]]

    def expanded(self, instruction: Instruction) -> Iterator[Instruction]:
        """An instruction and all those it runs: of its fusion, call or loop (once)."""
        yield instruction
        for name in instruction.called:
            for inner in self.computations[name]:
                yield from self.expanded(inner)

    @functools.cached_property
    def loop_bodies(self) -> frozenset[str]:
        """Names of the computations that a loop runs again and again, fusions left out."""
        everything = (i for c in self.computations.values() for i in c)
        waiting = [name for i in everything if i.opcode == "while" for name in i.called]
        bodies: set[str] = set()
        while waiting:
            if (name := waiting.pop()) not in bodies:
                bodies.add(name)
                inner = (i for i in self.computations[name] if i.opcode in _CALLERS)
                waiting += [called for i in inner for called in i.called]
        return frozenset(bodies)


def parse(text: str) -> Program:
    """Reads the text of a compiled program.

    Raises:
      UserError: it is none, or its instructions are not in schedule order.
    """
    if not text.startswith("HloModule") or "is_scheduled=true" not in text.partition("\n")[0]:
        raise UserError(
            "this is not the text of a compiled program; save that of "
            "jax.jit(f).lower(...).compile().as_text()"
        )
    computations: dict[str, tuple[Instruction, ...]] = {}
    name, instructions = "", []
    # Kernels in backend configurations hold bytes that str.splitlines takes for ends of lines.
    for line in text.split("\n"):
        if line.startswith("}"):
            computations[name] = tuple(instructions)
        elif header := _COMPUTATION.match(line):
            name, instructions = header[1], []
        elif found := _INSTRUCTION.match(line):
            instructions.append(_instruction(found[2], found[3], is_root=bool(found[1])))
    return Program(computations)


def _instruction(name: str, text: str, *, is_root: bool) -> Instruction:
    end = _closing(text) if text.startswith("(") else text.index(" ")
    shape, text = text[:end], text[end:]
    opcode = _OPCODE.match(text)
    text = text[opcode.end() :]
    end = _closing(text)
    attributes, _, backend_config = text[end:].partition("backend_config=")
    return Instruction(
        name=name,
        shape=shape,
        opcode=opcode[1],
        operands=tuple(_NAME.findall(text[:end])),
        attributes=attributes,
        backend_config=backend_config,
        is_root=is_root,
    )


def _closing(text: str) -> int:
    """The position after the bracket that closes the first one."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _bits(dtype: str) -> int:
    return 8 if dtype == "pred" else int(re.search(r"\d+", dtype)[0])
