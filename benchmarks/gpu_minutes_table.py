"""The results of `benchmarks.gpu_minutes`: read from its file, and as Markdown."""

import json
from collections.abc import Sequence
from pathlib import Path

from benchmarks.gpu_minutes_rows import COMPILED, EAGER, OURS, Result, Row

# Bytes and operations a second that were measured: copies, and products of 8192x8192 bfloat16.
MEASURED_PEAK = {"NVIDIA H200": (4.3e12, 790e12), "NVIDIA H100 80GB HBM3": (3.0e12, 798e12)}
COLUMNS = ("code", "what", "model", "trunk", "batch", "ms", "images/s", "TFLOP/s", "of peak")
COLUMNS += ("GB moved", "roofline", "temporaries", "compile", "eager / this", "compiled / this")


def table(results: Sequence[Result]) -> str:
    """Return Markdown: the machines and versions, one table, and the notes of rows."""
    lines = [
        f"- {machine}" for machine in sorted({r["machine"] for r in results if "machine" in r})
    ]
    lines += ["", "| " + " | ".join(COLUMNS) + " |"]
    lines += ["|---|---|---|---|" + "---:|" * (len(COLUMNS) - 4)]
    lines += ["| " + " | ".join(_cells(result, results)) + " |" for result in results]
    notes = [f"- {row_of(r)}: {r['note']}" for r in results if "note" in r]
    return "\n".join([*lines, "", *notes, ""])


def row_of(result: Result) -> Row:
    """Return the row that a result is of."""
    return Row(**{name: result[name] for name in Row.__dataclass_fields__})


def _cells(result: Result, results: Sequence[Result]) -> list[str]:
    names = [str(result[name]) for name in ("code", "kind", "model", "dtype", "batch")]
    if "ms" not in result:
        text = result.get("error") or result.get("note", "")
        return [*names, text.replace("|", "/"), *[""] * (len(COLUMNS) - 6)]
    flops, peak = result.get("flops"), result.get("peak")
    rate = flops and flops * 1000 / result["ms"]
    moved, temporary = result.get("bytes"), result.get("temporary_bytes")
    share = roofline(result)
    return [
        *names,
        f"{result['ms']:.2f}",
        f"{result['batch'] * 1000 / result['ms']:.2f}" if result["kind"] != "step" else "",
        f"{rate / 1e12:.3g}" if rate else "",
        f"{100 * rate / peak:.0f}%" if rate and peak else "",
        f"{moved / 1e9:.2f}" if moved else "",
        f"{100 * share:.0f}%" if share else "",
        f"{temporary / 1e6:.0f} MB" if temporary else "",
        f"{result['compile_s']:.0f} s" if "compile_s" in result else "",
        *(_ratio(result, results, code) for code in (EAGER, COMPILED)),
    ]


def roofline(result: Result) -> float | None:
    """Return the least time that the card's memory and arithmetic allow, over the time measured."""
    limits = MEASURED_PEAK.get(result.get("device", ""))
    if not limits or not result.get("bytes") or not result.get("flops"):
        return None
    least = max(result["bytes"] / limits[0], result["flops"] / limits[1])
    return least * 1000 / result["ms"]


def _ratio(result: Result, results: Sequence[Result], code: str) -> str:
    """Return the time of the original code for the same, divided by the time of the result."""
    if result["code"] != OURS:
        return ""
    for other in results:
        same = all(other[name] == result[name] for name in ("kind", "model", "batch"))
        if same and other["code"] == code and "ms" in other:
            return f"{other['ms'] / result['ms']:.2f}x"
    return ""


def known(path: Path) -> dict[Row, Result]:
    """Return the last result of each row in a file; a line that a kill cut short is left out."""
    results = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        results[row_of(result)] = result
    return results


def write_table(folder: Path, results: Sequence[Result]) -> None:
    """Replace `rows.md`; it is whole at any time."""
    temporary = folder / "rows.md.part"
    temporary.write_text(table(results), encoding="utf-8")
    temporary.replace(folder / "rows.md")
