"""What a compiled program computes while its chunks travel between devices (spec §6.2).

The pipeline names its work by `jax.named_scope`: see `SCOPES`. A matmul issued between the start
and the end of an all-to-all can hide it; whether it does, a profile tells (`overlap_profile.py`).
"""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dsv3_jax.plan.hlo import Instruction, Program

# Of a chunk in training: F, B (input gradients), W. Of the halves of a prefill: first, second.
SCOPES = ("forward", "backward", "weight", "first", "second")
_OTHERS = {
    "forward": ("backward", "weight"),
    "backward": ("forward",),
    "weight": ("forward",),
    "first": ("second",),
    "second": ("first",),
    "other": ("backward", "weight"),
}
OTHER = "other"  # outside of those, or made by XLA without a name
KINDS = ("all-to-all", "ragged-all-to-all", "collective-permute")

_MATMULS = frozenset({"dot", "convolution", "ragged-dot"})  # a TPU's matmuls are convolutions
# Hand-written kernels and fused attention; our own that multiply have a scope that says so.
_KERNEL_CALL = re.compile(r"tpu_custom_call|mosaic_gpu|triton|__cudnn")
_MATMUL_SCOPE = re.compile(r"\b\w*(matmul|weight_gradient)\b")


@dataclass(frozen=True, kw_only=True)
class Transfer:
    """A collective that moves a chunk, and what is issued between its start and its end.

    Loops in between count once. A transfer that ends in another computation than it starts in
    counts up to the end of the first.
    """

    computation: str
    name: str
    kind: str  # one of KINDS
    scope: str  # one of SCOPES, or OTHER
    asynchronous: bool
    num_bytes: int  # handed over by one device
    matmuls: Mapping[str, int]  # scope -> number
    kernels: Mapping[str, int]  # scope -> number of other custom kernels

    @property
    def other_chunk_matmuls(self) -> int:
        """Matmuls in between of the other chunk, weight gradients included."""
        return sum(self.matmuls.get(scope, 0) for scope in _OTHERS[self.scope])


@dataclass(frozen=True, kw_only=True)
class Copy:
    """A copy that the device waits for."""

    computation: str
    name: str
    num_bytes: int


def scope_of(op_name: str) -> str:
    """The outermost of SCOPES in a path such as 'jit(f)/while/body/transpose(jvp(forward))/mul'.

    Outermost, since a backward chunk may run parts of a forward one again.
    """
    path = re.sub(r"\bp?jit\([^)]*\)", "", op_name)  # functions, which may have any name
    return next((part for part in re.split(r"[/()]", path) if part in SCOPES), OTHER)


def transfers(program: Program) -> list[Transfer]:
    """Every collective of KINDS, computation by computation in schedule order."""
    everything = (i for instructions in program.computations.values() for i in instructions)
    wrapped = {name for i in everything if i.opcode == "async-start" for name in i.called}
    return [
        _transfer(program, computation, position, kind)
        for computation, instructions in program.computations.items()
        if computation not in wrapped
        for position, instruction in enumerate(instructions)
        if (kind := _kind(program, instruction))
    ]


def in_fused_bodies(found: list[Transfer]) -> list[Transfer]:
    """The all-to-alls of computations that hold some of a forward and some of a backward chunk."""
    found = [t for t in found if t.kind != "collective-permute"]
    scopes = {
        name: {t.scope for t in found if t.computation == name}
        for name in {t.computation for t in found}
    }
    return [t for t in found if {"forward", "backward"} <= scopes[t.computation]]


def copies_of(program: Program, num_bytes: int) -> list[Copy]:
    """Copies of at least `num_bytes` in loop bodies, those that a fusion returns included.

    Copies that run beside the computation (`copy-start`) are left out.
    """
    return [
        Copy(computation=name, name=instruction.name, num_bytes=copied)
        for name, instructions in program.computations.items()
        if name in program.loop_bodies
        for instruction in instructions
        if (copied := _copied_bytes(program, instruction)) >= num_bytes
    ]


def _kind(program: Program, instruction: Instruction) -> str:
    """Of KINDS, if it starts such a collective or is one; else ''."""
    opcode = instruction.opcode.removesuffix("-start")
    if opcode == "async":  # around a computation with the collective
        inner = (i.opcode for name in instruction.called for i in program.computations[name])
        opcode = next((o for o in inner if o in KINDS), "")
    return opcode if opcode in KINDS else ""


def _transfer(program: Program, computation: str, position: int, kind: str) -> Transfer:
    instructions = program.computations[computation]
    start = instructions[position]
    by_name = {i.name: i for i in instructions}
    # A GPU's collectives are all printed as start and end; those that block say so.
    asynchronous = start.opcode.endswith("-start") and '"is_sync":true' not in start.backend_config
    counts: dict[str, Counter] = {"matmuls": Counter(), "kernels": Counter()}
    for between in _between(instructions, position) if asynchronous else ():
        for inner in program.expanded(between):
            if what := _work(inner):
                scope = scope_of(inner.op_name)
                counts[what][scope if scope != OTHER else scope_of(between.op_name)] += 1
    # Of a ragged one the other operands are the buffer it fills and the sizes.
    handed = start.operands[:1] if kind == "ragged-all-to-all" else start.operands
    scopes = (scope_of(inner.op_name) for inner in program.expanded(start))
    return Transfer(
        computation=computation,
        name=start.name,
        kind=kind,
        scope=next((scope for scope in scopes if scope != OTHER), OTHER),
        asynchronous=asynchronous,
        num_bytes=sum(by_name[name].num_bytes for name in handed),
        matmuls=dict(counts["matmuls"]),
        kernels=dict(counts["kernels"]),
    )


def _between(instructions: tuple[Instruction, ...], start: int) -> tuple[Instruction, ...]:
    """What is issued after a start and before its end."""
    flying = {instructions[start].name}
    for position in range(start + 1, len(instructions)):
        instruction = instructions[position]
        if flying & set(instruction.operands):
            if instruction.opcode.endswith("-done"):
                return instructions[start + 1 : position]
            if instruction.opcode.endswith("-update"):
                flying.add(instruction.name)
    return instructions[start + 1 :]


def _work(instruction: Instruction) -> str:
    if instruction.opcode in _MATMULS or instruction.custom_call_target.startswith("__cublas"):
        return "matmuls"
    if not _KERNEL_CALL.search(instruction.custom_call_target):
        return ""
    return "matmuls" if _MATMUL_SCOPE.search(instruction.op_name) else "kernels"


def _copied_bytes(program: Program, instruction: Instruction) -> int:
    """Bytes of the largest copy that it is, or that it returns as a fusion; 0 if none."""
    if instruction.opcode == "copy":
        return instruction.num_bytes
    if instruction.opcode != "fusion":
        return 0
    inner = program.computations[instruction.called[0]]
    by_name = {i.name: i for i in inner}
    waiting, largest = [next(i for i in inner if i.is_root)], 0
    while waiting:
        result = waiting.pop()
        if result.opcode in ("tuple", "bitcast"):
            waiting += [by_name[name] for name in result.operands]
        elif result.opcode == "copy":
            largest = max(largest, result.num_bytes)
    return largest
