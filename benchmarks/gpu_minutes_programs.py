"""What is known of a compiled GPU program besides its time: bytes, text and kernels.

XLA reports no costs of GPU programs: the bytes that its kernels move are counted in its text. Each
kernel is taken to read its operands, or the slices of them that it uses, and to write its result,
once. Caches are left out, and so is what a library's kernel reads twice.
"""

import json
import math
import re
import tempfile
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

WIDTHS = {"pred": 1, "bf16": 2} | {f"{kind}{n}": n // 8 for kind in "fsu" for n in (8, 16, 32, 64)}
SHAPE = re.compile(r"\b([a-z]+\d*)\[([\d,]*)\]")
HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{\s*$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\([^=]*?\)|\S+) ([a-z][\w\-]*)\((.*)$")
NO_KERNEL = {"parameter", "bitcast", "get-tuple-element", "tuple", "constant", "after-all"}
# Operations that a fused kernel reads through, one value for one.
VIEWS = {"bitcast", "reshape", "convert", "transpose", "copy"}
CALLS = re.compile(
    r"(?:body|calls|to_apply|called_computations|branch_computations)=\{?%?([\w.\-]+)"
)


class Instruction(NamedTuple):
    """One instruction of a computation: `name = shape operation(operands), rest`."""

    name: str
    shape: str
    operation: str
    operands: tuple[str, ...]
    calls: str


Bodies = dict[str, list[Instruction]]


def moved_bytes(text: str, loop: bool = False) -> int:
    """Return the bytes of a call of a program; the body of a loop counts once.

    Args:
        loop: count one round of the program's longest loop alone.
    """
    bodies, entry = _computations(text)
    if loop:
        rounds = [i.calls for body in bodies.values() for i in body if i.operation == "while"]
        entry = max(rounds, key=lambda name: len(bodies[name]), default=entry)
    return _moved(entry, bodies)


def _moved(name: str, bodies: Bodies) -> int:
    total, sizes = 0, {}
    for one in bodies.get(name, ()):
        sizes[one.name] = _size(one.shape)
        if one.operation in ("while", "call", "conditional"):
            total += _moved(one.calls, bodies)
        elif one.operation not in NO_KERNEL and not one.operation.endswith("-done"):
            # Bytes (u8) among a library's results are its scratch memory.
            library = one.operation == "custom-call"
            total += _size(re.sub(r"u8\[\d+\]\S*", "", one.shape) if library else one.shape)
            if one.operation == "fusion":
                total += _read(bodies.get(one.calls, ()))
            else:
                total += sum(sizes.get(operand, 0) for operand in set(one.operands))
    return total


def _read(body: Sequence[Instruction]) -> int:
    """Return the bytes of its parameters that a fused kernel reads."""

    def used(one: Instruction) -> int:
        users = [user for user in body if one.name in user.operands]
        whole, total = _size(one.shape), 0
        for user in users:
            if user.operation in ("dynamic-slice", "slice", "gather"):
                total += _size(user.shape)
            elif user.operation == "dynamic-update-slice" and user.operands[0] == one.name:
                continue
            elif user.operation in VIEWS:
                total += used(user) * whole // max(1, _size(user.shape))
            else:
                return whole
        return min(whole, total) if users else whole

    return sum(used(one) for one in body if one.operation == "parameter")


def _computations(text: str) -> tuple[Bodies, str]:
    """Split a program: the instructions of each computation by its name, and the entry's name."""
    bodies: Bodies = {}
    entry, here = "", None
    for line in re.sub(r"/\*index=\d+\*/", "", text).splitlines():
        if head := HEAD.match(line):
            here = bodies.setdefault(head.group(2), [])
            entry = head.group(2) if head.group(1) else entry
        elif here is not None and (found := INSTRUCTION.match(line)):
            name, shape, operation, rest = found.groups()
            argument, _, attributes = rest.partition(")")
            operands = tuple(re.findall(r"%([\w.\-]+)", argument))
            calls = CALLS.search(attributes)
            called = calls.group(1) if calls else ""
            here.append(Instruction(name, shape, operation, operands, called))
    return bodies, entry


def _size(shape: str) -> int:
    return sum(
        WIDTHS.get(kind, 0) * math.prod(int(side) for side in sides.split(",") if side)
        for kind, sides in SHAPE.findall(shape)
    )


def write_program(folder: Path, name: str, text: str) -> None:
    """Add the text of a compiled program to `programs.zip`."""
    with zipfile.ZipFile(folder / "programs.zip", "a", zipfile.ZIP_DEFLATED) as file:
        if f"{name}.hlo.txt" not in file.namelist():
            file.writestr(f"{name}.hlo.txt", text)


def write_profile(folder: Path, name: str, call: Callable[[], Any]) -> None:
    """Add the time of each kernel in a call, the longest first, to `kernels.jsonl`."""
    import jax
    from jax.profiler import ProfileData

    with tempfile.TemporaryDirectory() as traces:
        with jax.profiler.trace(traces):
            jax.block_until_ready(call())
        files = list(Path(traces).rglob("*.xplane.pb"))
        times: Counter[str] = Counter()
        for plane in ProfileData.from_file(str(files[0])).planes if files else ():
            for line in plane.lines if "GPU" in (plane.name or "") else ():
                # Lines of streams hold the kernels; the others group them.
                for event in line.events if "Stream" in (line.name or "") else ():
                    times[event.name or ""] += round(event.duration_ns)
    longest = [[kernel, ns / 1e6] for kernel, ns in times.most_common(60)]
    result = {"row": name, "all_ms": times.total() / 1e6, "kernels_ms": longest}
    with open(folder / "kernels.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")
