"""What scripts/compile_for_h200.py counts; that XLA compiles for a GPU needs its plugin."""

import importlib
import pathlib

import pytest

SCRIPTS = pathlib.Path(__file__).resolve().parent.parent / "scripts"

PROGRAM = """HloModule a_program

%fused (p0: bf16[8,4], p1: f32[100,4]) -> f32[8,4] {
  %p0 = bf16[8,4]{1,0} parameter(0)
  %p1 = f32[100,4]{1,0} parameter(1)
  %wide = f32[8,4]{1,0} convert(%p0)
  %some = f32[8,4]{1,0} slice(%p1), slice={[0:8], [0:4]}
  ROOT %sum = f32[8,4]{1,0} add(%wide, %some)
}

ENTRY %main (a: bf16[8,4], b: f32[100,4]) -> f32[8,4] {
  %a = bf16[8,4]{1,0} parameter(0)
  %b = f32[100,4]{1,0} parameter(1)
  %fusion = f32[8,4]{1,0} fusion(%a, %b), kind=kLoop, calls=%fused
  %other = (f32[8,8]{1,0}, s8[4]{0}) custom-call(%fusion, %fusion), custom_call_target="matmul"
  ROOT %copy = f32[8,4]{1,0} copy(%fusion)
}
"""


@pytest.fixture
def script(monkeypatch):
    """The module."""
    monkeypatch.syspath_prepend(SCRIPTS)
    return importlib.import_module("compile_for_h200")


def test_bytes_are_those_of_operands_results_and_slices(script):
    numbers = 8 * 4
    assert script.traffic(PROGRAM) == {
        "matmul": (1, 4 * 8 * 8 + 4 + 4 * numbers),
        "kLoop": (1, 2 * numbers + 4 * numbers + 4 * numbers),
        "copy": (1, 2 * 4 * numbers),
    }


@pytest.mark.parametrize("shape", ["f32[2,3]{1,0}", "(f32[5]{0}, s8[4]{0})", "f32[6]"])
def test_a_shape_has_24_bytes(script, shape):
    assert script._bytes(shape) == 24


def test_a_number_has_its_bytes_too(script):
    assert script._bytes("bf16[]") == 2
