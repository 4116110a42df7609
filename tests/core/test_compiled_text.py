"""The text of compiled programs is read as it is meant: kernels, copies, traffic, collectives."""

import pytest

from benchmarks import compiled_text
from benchmarks.compiled_text import Program, count_copies, count_kernels, total_traffic

BUFFER = "bf16[2,3,16,8]{3,2,1,0}"
STEP = f"""HloModule jit__step, is_scheduled=true

%put (p.0: bf16[2,3,16,8], p.1: bf16[2,3,1,8], p.2: s32[]) -> bf16[2,3,16,8] {{
  %p.0 = {BUFFER} parameter(0)
  %p.1 = bf16[2,3,1,8]{{3,2,1,0}} parameter(1)
  %p.2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  ROOT %dus = {BUFFER} dynamic-update-slice(%p.0, %p.1, %zero, %zero, %p.2, /*index=5*/%zero)
}}

%look (t.0: bf16[100,8], t.1: s32[2]) -> bf16[2,8] {{
  %t.0 = bf16[100,8]{{1,0}} parameter(0)
  %t.1 = s32[2]{{0}} parameter(1)
  ROOT %found = bf16[2,8]{{1,0}} gather(%t.0, %t.1), offset_dims={{1}}
}}

%part (w.0: f32[4,6]) -> f32[2] {{
  %w.0 = f32[4,6]{{1,0}} parameter(0)
  %sum = f32[6]{{0}} reduce(%w.0, %w.0), dimensions={{0}}, to_apply=%add
  ROOT %slice = f32[2]{{0}} slice(%sum), slice={{[0:2]}}
}}

ENTRY %main (a: {BUFFER}, b: bf16[2,3,1,8], c: s32[], d: bf16[100,8]) -> {BUFFER} {{
  %a = {BUFFER} parameter(0), sharding={{replicated}}, metadata={{op_name="a"}}
  %b = bf16[2,3,1,8]{{3,2,1,0}} parameter(1)
  %c = s32[] parameter(2)
  %d = bf16[100,8]{{1,0}} parameter(3)
  %e = s32[2]{{0}} parameter(4)
  %f = f32[4,6]{{1,0}} parameter(5)
  %fusion.1 = {BUFFER} fusion(%a, %b, %c), kind=kLoop, calls=%put, metadata={{op_name="x"}}
  %fusion.2 = bf16[2,8]{{1,0}} fusion(%d, %e), kind=kLoop, calls=%look
  %fusion.3 = f32[2]{{0}} fusion(%f), kind=kInput, calls=%part
  %view = bf16[6,16,8]{{2,1,0}} bitcast(%fusion.1)
  ROOT %out = {BUFFER} bitcast(%view)
}}
"""
PUT, LOOK, PART = 2 * 2 * 3 * 8 * 2 + 4, 2 * 2 * 8 * 2 + 2 * 4, 4 * 6 * 4 // 3 + 2 * 4
"""Bytes: the update twice and its place; the rows twice and their numbers; a third of the sum."""


def test_what_is_written_in_place_or_looked_up_counts_as_far_as_it_is_touched():
    program = Program(STEP)
    assert program.entry == "main"
    assert [program.traffic(*kernel) for kernel in program.kernels] == [PUT, LOOK, PART]
    assert total_traffic(program) == PUT + LOOK + PART


def test_only_an_array_of_its_own_is_a_copy_of_the_buffer():
    assert count_copies(Program(STEP), (2, 3, 16, 8), 2) == 0
    copied = STEP.replace("%view = bf16[6,16,8]{2,1,0} bitcast", "%view = bf16[6,16,8] copy")
    assert count_copies(Program(copied), (6, 16, 8), 2) == 1
    turned = STEP.replace("%view = bf16[6,16,8]{2,1,0} bitcast", "%view = bf16[8,2,16,3] copy")
    assert count_copies(Program(turned), (2, 3, 16, 8), 2) == 1
    assert count_copies(Program(turned), (2, 3, 16, 8), 4) == 0


LOOP = """HloModule jit__loop

%body (s: (f32[8], f32[8])) -> (f32[8], f32[8]) {
  %s = (f32[8]{0}, f32[8]{0}) parameter(0)
  %x = f32[8]{0} get-tuple-element(%s), index=0
  %y = f32[8]{0} all-reduce(%x), replica_groups={}, to_apply=%add
  %z = f32[8]{0} fusion(%y), kind=kCustom, calls=%g, backend_config={"kind":"__triton_gemm"}
  ROOT %t = (f32[8]{0}, f32[8]{0}) tuple(%z, %y)
}

%condition (s: (f32[8], f32[8])) -> pred[] {
  %s = (f32[8]{0}, f32[8]{0}) parameter(0)
  ROOT %less = pred[] fusion(%s), kind=kLoop, calls=%h
}

ENTRY %main (s: (f32[8], f32[8])) -> (f32[8], f32[8]) {
  %s = (f32[8]{0}, f32[8]{0}) parameter(0)
  %m = (f32[8]{0}, u8[0]{0}) custom-call(%s), custom_call_target="__cudnn$fmhaSoftmax"
  %n = (f32[8]{0}, s8[4]{0}) custom-call(%s), custom_call_target="__cublas$lt$matmul"
  ROOT %w = (f32[8]{0}, f32[8]{0}) while(%s), condition=%condition, body=%body
}
"""


def test_kernels_of_loops_count_once_and_by_kind():
    assert count_kernels(Program(LOOP)) == {
        "Triton product": 1, "all-reduce": 1, "cuBLAS product": 1, "cuDNN attention": 1,
        "fusion": 1,
    }  # fmt: skip


def test_collectives_are_counted_once():
    text = """
      %a = bf16[8,128]{1,0} all-reduce(%x), replica_groups={}
      %b = (bf16[2,4]{1,0}, bf16[16,4]{1,0}) all-gather-start(%a), dimensions={0}
      %c = bf16[16,4]{1,0} all-gather-done(%b)
    """
    assert compiled_text.count_collectives(text) == {"all-reduce": 1, "all-gather": 1}
    assert compiled_text.largest_gather(text) == 16 * 4 * 2


@pytest.mark.parametrize(
    ("type", "sizes"),
    [
        ("f32[8,2]{1,0}", [64]),
        ("pred[5]", [5]),
        ("(s32[], bf16[3]{0})", [4, 6]),
        ("f8e4m3fn[4]", [4]),
    ],
)
def test_bytes_of_types(type, sizes):
    assert [size for _, size in compiled_text.arrays(type)] == sizes
