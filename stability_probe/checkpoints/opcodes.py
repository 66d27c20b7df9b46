"""What a pickle would do, read from its instructions without doing it.

`weights_only=True` runs no code of a file's author, but what it does run can be made to take
forever or to crash: the hash of a tuple visits its parts by every way there is to them, so a few
dozen tuples of twice the one before, as the key of a dict, take longer than anybody waits; a
million tuples of one part overflow the stack; and `bytearray(n)` writes n bytes. None of these has
a place among weights.
"""

import pickletools
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from stability_probe.checkpoints.reading import problem

Instruction = tuple[pickletools.OpcodeInfo, Any, int | None]

LARGEST_TUPLE = 10_000
"""Parts of a tuple, those of its parts included."""
_COSTLY = ("builtins bytearray", "__builtin__ bytearray")


def check_pickle(path: Path, instructions: Iterable[Instruction]) -> None:
    """Refuse a pickle if what it does could take forever.

    Raises:
        StabilityProbeError: saying what it does.
    """
    stack: list[int | None] = []
    memo: dict[int, int | None] = {}
    for instruction in instructions:
        if instruction[0].name == "GLOBAL" and instruction[1] in _COSTLY:
            raise problem(path, "its pickle makes a bytearray, which could be of any size; "
                          "save model.state_dict() by itself")  # fmt: skip
        if _parts_made(instruction, stack, memo) > LARGEST_TUPLE:
            raise problem(path, f"its pickle makes a tuple of more than {LARGEST_TUPLE} parts, "
                          "nested ones counted; save model.state_dict() by itself")  # fmt: skip


def _parts_made(
    instruction: Instruction, stack: list[int | None], memo: dict[int, int | None]
) -> int:
    """Do to a stack of counts of parts (`None`: a mark) what one instruction does to its objects.

    Returns:
        The parts of what it made; all but tuples count as one, as they have no hash of their parts.
    """
    code, value, _ = instruction
    if code.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if value is None else value] = stack[-1]
        return 0
    if code.name in ("GET", "BINGET", "LONG_BINGET"):
        stack.append(memo[value])
        return 0
    taken = list(_take(code.stack_before, stack))
    made = 1 + sum(taken) if code.name.startswith("TUPLE") else 1
    stack += [None if kind is pickletools.markobject else made for kind in code.stack_after]
    return made


def _take(kinds: list[pickletools.StackObject], stack: list[int | None]) -> Iterator[int]:
    """Take off a stack what an instruction takes, down to the last mark if it takes that."""
    count = len(kinds)
    if pickletools.markobject in kinds:
        count = kinds.index(pickletools.markobject)
        while (parts := stack.pop()) is not None:
            yield parts
    for _ in range(count):
        yield stack.pop() or 0


def names_in(instructions: Iterable[Instruction]) -> Iterator[str]:
    """Names of the classes and functions that a pickle asks for."""
    strings: list[str] = []
    for code, value, _ in instructions:
        if code.name == "GLOBAL":
            yield str(value).replace(" ", ".")
        elif code.name == "STACK_GLOBAL":
            yield ".".join(strings[-2:])
        elif isinstance(value, str):
            strings.append(value)
