"""The benchmark of a few minutes: its rows, lost processes, its table, and a small measurement."""

import os
import subprocess
import sys

import pytest

from benchmarks import gpu_minutes_jax
from benchmarks.gpu_minutes import parse
from benchmarks.gpu_minutes_programs import moved_bytes, write_program
from benchmarks.gpu_minutes_rows import COMPILED, EAGER, GROUPS, OURS, Row, rows_of, timed
from benchmarks.gpu_minutes_table import known, roofline, table

# A stand-in for the processes of the original: one row crashes it, one takes too long.
STAND_IN = """#!{python}
import json, os, sys, time
for row in json.loads(sys.argv[3])["rows"]:
    print("some library's words")
    print("@row " + json.dumps({{"stage": "running"}}), flush=True)
    if (row["kind"], row["model"]) == ("forward", "upsampler"):
        os._exit(3)
    if (row["kind"], row["model"]) == ("step", "base"):
        time.sleep(60)
    print("@row " + json.dumps({{"result": {{"ms": 5.0, "machine": "a card"}}}}), flush=True)
"""


def test_rows_come_in_order_of_worth():
    rows = rows_of(GROUPS)
    assert len(set(rows)) == len(rows)
    assert [row.code for row in rows[:15]] == [OURS] * 5 + [EAGER] * 5 + [COMPILED] * 5
    assert rows[0] == Row(OURS, "forward", "base", "bfloat16", 16)
    # Each of the original's has one of ours beside it.
    for row in rows[5:15]:
        assert Row(OURS, row.kind, row.model, "bfloat16", row.batch) in rows
    assert rows_of(("training",))[0] == Row(OURS, "training", "base", "bfloat16", 64)
    assert {row.batch for row in rows_of(GROUPS, toy=True)} == {1, 2}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "glide_text2im").mkdir()
    python = tmp_path / "python"
    python.write_text(STAND_IN.format(python=sys.executable))
    os.chmod(python, 0o755)

    def run(*more):
        command = [sys.executable, "-m", "benchmarks.gpu_minutes", "--out", tmp_path / "out"]
        command += ["--original", tmp_path, "--original-python", python, *more]
        found = subprocess.run(command, capture_output=True, text=True, check=True)
        return found.stdout, known(tmp_path / "out" / "rows.jsonl")

    return run


def test_a_lost_process_loses_one_row(tmp_path, run):
    limits = ("--seconds", "60", "--row-limit", "1.5", "--start-limit", "1")
    printed, results = run("--groups", "original", *limits)
    assert list(results) == rows_of(("original",))
    errors = [result.get("error") for result in results.values()]
    # The first row of a new process has both limits.
    lost = ["exit 3 while running", "stopped after 2.5 s while running"]
    assert errors == [None, *lost, None, None] and "no time" not in printed
    assert "some library's words" in (tmp_path / "out" / "log.txt").read_text()
    text = (tmp_path / "out" / "rows.md").read_text()
    assert text.startswith("- a card") and text.count("| original |") == 5

    # A kill cut the last line short. What is known is kept, and lost rows are tried again.
    path = tmp_path / "out" / "rows.jsonl"
    path.write_text(path.read_text().rstrip()[:-20])
    printed, again = run("--groups", "original", *limits)
    assert "forward, base" not in printed and "procedure" in printed
    assert [result.get("error") for result in again.values()] == errors


def test_the_time_is_up(run):
    printed, results = run("--groups", "compiled", "--seconds", "1.5")
    assert [result["error"] for result in results.values()] == ["time was up while running"]
    assert "no time for 4 of 5 rows" in printed


def test_the_command_line(tmp_path, capsys):
    assert parse([]).groups == GROUPS and parse(["--seconds", "150"]).seconds == 150
    for wrong in (["--original", str(tmp_path)], ["--groups", "theirs"]):
        with pytest.raises(SystemExit):
            parse(wrong)
    assert "glide_text2im" in capsys.readouterr().err


def result(code, ms, **more):
    fields = {"kind": "step", "model": "base", "dtype": "bfloat16", "batch": 1}
    return {"code": code, **fields, "ms": ms} | more


def test_the_table():
    ours = result(OURS, 2.0, flops=1e12, bytes=2e9, device="NVIDIA H200", peak=1e15, compile_s=3.2)
    lost = result(COMPILED, 0.0) | {"error": "exit 3 | sorry", "note": "words"}
    del lost["ms"]
    rows = table([ours, result(EAGER, 10.0), result(COMPILED, 5.0), lost]).splitlines()
    rows = [row for row in rows if row.startswith("|")][2:]
    assert len({row.count("|") for row in rows}) == 1
    assert rows[0].endswith("| 3 s | 5.00x | 2.50x |") and "| 500 | 50% | 2.00 |" in rows[0]
    assert "exit 3 / sorry" in rows[3]
    # 1e12 operations take longer than 2e9 bytes.
    assert roofline(ours) == pytest.approx(1e12 / 790e12 / 2e-3)
    assert roofline(result(OURS, 2.0)) is None


def test_timings():
    calls = []
    found = timed(lambda: calls.append(1), lambda result: result, seconds=1e-3, parts=2, warm=3)
    assert len(found["all_ms"]) >= 1 and len(calls) >= 5
    assert found["ms"] >= 0


PROGRAM = """HloModule jit_f

%fused (param_0.1: f32[8,100], param_1.1: s32[]) -> f32[1,100] {
  %param_0.1 = f32[8,100]{1,0} parameter(0)
  %param_1.1 = s32[] parameter(1)
  ROOT %slice.1 = f32[1,100]{1,0} dynamic-slice(%param_0.1, %param_1.1), dynamic_slice_sizes={1,100}
}

%body (state: (s32[], f32[8,100])) -> (s32[], f32[8,100]) {
  %state = (s32[], f32[8,100]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%state), index=0
  %x = f32[8,100]{1,0} get-tuple-element(%state), index=1
  %row = f32[1,100]{1,0} fusion(%x, %i), kind=kLoop, calls=%fused
  %gemm = (bf16[8,100]{1,0}, u8[4096]{0}) custom-call(%x, %row), custom_call_target="gemm"
  ROOT %out = (s32[], f32[8,100]{1,0}) tuple(%i, %x)
}

ENTRY %main (p: f32[8,100]) -> f32[8,100] {
  %p = f32[8,100]{1,0} parameter(0)
  %c = f32[8,100]{1,0} copy(%p)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,100]{1,0}) tuple(%zero, %c)
  %loop = (s32[], f32[8,100]{1,0}) while(%t), condition=%cond, body=%body
  ROOT %r = f32[8,100]{1,0} get-tuple-element(%loop), index=1
}
"""


def test_the_bytes_of_a_program(tmp_path):
    # The slice reads a row and the index, the product reads both and writes 16 bits; no scratch.
    body = (400 + 4 + 400) + (3200 + 400 + 1600)
    assert moved_bytes(PROGRAM, loop=True) == body
    assert moved_bytes(PROGRAM) == body + 2 * 3200
    write_program(tmp_path, "step", PROGRAM)
    write_program(tmp_path, "step", PROGRAM)
    assert (tmp_path / "programs.zip").stat().st_size < len(PROGRAM) + 500


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("step", "base"),
        pytest.param("forward", "upsampler", marks=pytest.mark.slow),
        pytest.param("procedure", "both", marks=pytest.mark.slow),
        pytest.param("quick", "both", marks=pytest.mark.slow),
        pytest.param("training", "upsampler", marks=pytest.mark.slow),
        pytest.param("numerics", "base", marks=pytest.mark.slow),
    ],
)
def test_a_row_of_ours(kind, model, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(gpu_minutes_jax.TASK, "out", str(tmp_path))
    row = Row(OURS, kind, model, "float16" if kind == "numerics" else "float32", 1)
    found = gpu_minutes_jax.measure(row)
    gpu_minutes_jax.after(row)
    assert '@row {"stage": ' in capsys.readouterr().out
    if kind == "numerics":
        assert found["largest"] <= 2
        return
    assert found["ms"] > 0 and found["compile_s"] > 0
    if kind == "step":
        # A toy of 16x16 pixels, twice a step: between 0.01 and 1 GFLOP, and its weights are read.
        assert found["branches"] == 2 and found["steps"] == 10
        assert 1e7 < found["flops"] < 1e9 and 1e6 < found["bytes"] < 1e9
        assert (tmp_path / "programs.zip").exists()
