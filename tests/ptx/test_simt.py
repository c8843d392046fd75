"""The interpreter itself, on PTX written by hand, without nvcc."""

from fractions import Fraction

import numpy as np
import pytest
from simt import KernelFault, Launch, Memory, Module, arithmetic

HEADER = ".version 8.0\n.target sm_90\n.address_size 64\n"
DECLARATIONS = """
.reg .pred %p<9>; .reg .b16 %rs<9>; .reg .b32 %r<40>; .reg .f32 %f<40>; .reg .b64 %rd<40>; .reg .f64 %fd<9>;
.shared .align 16 .b8 tile[512];
ld.param.u64 %rd1, [out]; cvta.to.global.u64 %rd2, %rd1;
mov.u32 %r1, %tid.x; mul.wide.u32 %rd3, %r1, 4; add.s64 %rd4, %rd2, %rd3;
mov.u32 %r2, tile; shl.b32 %r3, %r1, 2; add.s32 %r4, %r2, %r3; xor.b32 %r5, %r3, 128; add.s32 %r6, %r2, %r5;
xor.b32 %r7, %r3, 4; add.s32 %r8, %r2, %r7;
"""


def run(body, block=64, inputs=None, **options):
    """out[thread] of a kernel, and what was found."""
    text = HEADER + f".visible .entry k(.param .u64 out)\n{{\n{DECLARATIONS}\n{body}\nret;\n}}"
    memory = Memory(1 << 16)
    values = np.zeros(block, np.uint32) if inputs is None else inputs
    out = memory.put(values)
    launch = Launch(Module(text).kernel("k"), memory, (1, 1), block, **options)
    launch.run(np.array([out], np.uint64).tobytes())
    return memory.get(out, values), {text.split(":")[0] for text in launch.findings}


THREADS = np.arange(64, dtype=np.uint32)


def nearest_float32(exact):
    """The float32 next to a fraction, of two the even one."""
    guess = np.float32(float(exact))
    around = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    return min(around, key=lambda x: (abs(Fraction(float(x)) - exact), int(x.view(np.uint32)) & 1))


def test_fma_rounds_once():
    random = np.random.default_rng(0)
    a, b = (random.normal(size=4000).astype(np.float32) for _ in range(2))
    c = (random.normal(size=4000) * 2.0 ** random.integers(-40, 8, 4000)).astype(np.float32)
    a[:2000], c[:2000] = 1 + 2.0**-12, 2.0 ** -random.integers(30, 60, 2000)  # beside ties
    b[:2000] = 1 + 2.0**-12
    exact = [Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)) for x, y, z in zip(a, b, c, strict=True)]
    assert (arithmetic.fma_f32(a, b, c) == [nearest_float32(x) for x in exact]).all()
    below = arithmetic.fma_rm_f32(a, b, c)
    above = np.nextafter(below, np.float32(np.inf))
    assert all(Fraction(float(x)) <= y < Fraction(float(z)) for x, y, z in zip(below, exact, above, strict=True))
    cut = arithmetic.add_rz_f32(a, c)
    sums = [Fraction(float(x)) + Fraction(float(y)) for x, y in zip(a, c, strict=True)]
    assert all(abs(Fraction(float(x))) <= abs(y) for x, y in zip(cut, sums, strict=True))
    p = a.astype(np.float64) / 3
    assert (arithmetic.fma_f64(p, p, -(p * p)) == [float(Fraction(x) ** 2 - Fraction(x * x)) for x in p]).all()


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("shr.s32 %r10, %r1, 31; sub.s32 %r11, 5, %r1; shr.s32 %r12, %r11, 1;", (5 - THREADS.astype(np.int32)) >> 1),
        ("shl.b32 %r12, %r1, 40;", 0 * THREADS),
        ("mov.u32 %r10, -7; div.s32 %r12, %r10, 2;", np.full(64, -3)),
        ("mul.hi.s32 %r12, %r1, -2147483648;", -((THREADS.astype(np.int64) + 1) // 2)),
        ("shf.l.wrap.b32 %r12, 0xf0000000, %r1, 4;", THREADS * 16 + 15),
        ("brev.b32 %r10, %r1; bfind.shiftamt.u32 %r12, %r10;", [(x & -x).bit_length() - 1 for x in THREADS.tolist()]),
        ("mov.f32 %f1, 0fBF800000; mov.f32 %f2, 0f40000000; copysign.f32 %f3, %f1, %f2; mov.b32 %r12, %f3;",
         np.full(64, 0xC0000000)),
        ("mov.f32 %f1, 0f7FC00000; setp.ne.f32 %p1, %f1, %f1; setp.neu.f32 %p2, %f1, %f1;"
         "selp.b32 %r10, 1, 0, %p1; selp.b32 %r11, 2, 0, %p2; add.s32 %r12, %r10, %r11;", np.full(64, 2)),
        ("mov.f32 %f1, 0f7FC00000; mov.f32 %f2, 0f3F800000; max.f32 %f3, %f1, %f2; max.NaN.f32 %f4, %f1, %f2;"
         "setp.nan.f32 %p1, %f4, %f4; selp.b32 %r10, 1, 0, %p1; mov.b32 %r11, %f3; add.s32 %r12, %r11, %r10;",
         np.full(64, 0x3F800001)),
        ("mov.f32 %f1, 0f3F808000; mov.f32 %f2, 0f3F818000; cvt.rn.bf16x2.f32 %r12, %f1, %f2;",
         np.full(64, 0x3F803F82)),
        ("shfl.sync.bfly.b32 %r12|%p1, %r1, 5, 31, -1;", THREADS ^ 5),
        ("shfl.sync.idx.b32 %r12|%p1, %r1, 3, 31, -1;", THREADS // 32 * 32 + 3),
        ("sub.s32 %r9, %r1, 35; redux.sync.max.s32 %r12, %r9, -1;", np.uint32(THREADS // 32 * 32 + 31 - 35)),
        ("sub.s32 %r9, %r1, 35; redux.sync.min.s32 %r12, %r9, -1;", np.uint32(THREADS // 32 * 32 - 35)),
        ("setp.lt.s32 %p1, %r1, 40; vote.sync.ballot.b32 %r12, %p1, -1;", np.where(THREADS < 32, 2**32 - 1, 255)),
    ],
)  # fmt: skip
def test_instructions(body, expected):
    got, findings = run(body + "st.global.u32 [%rd4], %r12;")
    assert (got == np.asarray(expected).astype(np.int64).astype(np.uint32)).all() and not findings


DIVERGENT = """
setp.lt.s32 %p1, %r1, 7; mov.u32 %r12, 0; mov.u32 %r13, 0; @%p1 bra LATER;
BACK: shfl.sync.bfly.b32 %r12|%p2, %r1, 1, 31, -1; add.s32 %r12, %r12, %r13; st.global.u32 [%rd4], %r12; ret;
LATER: mov.u32 %r13, 100; bra.uni BACK;
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_lanes_that_come_later_are_waited_for(seed):
    got, findings = run(DIVERGENT, seed=seed)
    assert (got == (THREADS ^ 1) + np.where(THREADS < 7, 100, 0)).all() and not findings


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(
    ("barrier", "other", "is_race"),
    [
        ("bar.sync 0;", "%r6", False),
        ("bar.warp.sync -1;", "%r8", False),
        ("", "%r8", True),
        ("bar.warp.sync -1;", "%r6", True),
    ],
)  # fmt: skip
def test_races_in_shared_memory(barrier, other, is_race, seed):
    _, findings = run(
        f"st.shared.u32 [%r4], %r1; {barrier} ld.shared.u32 %r12, [{other}]; st.global.u32 [%rd4], %r12;", seed=seed
    )
    assert ("race" in findings) == is_race


COPY = "cp.async.cg.shared.global [%r9], [%rd5], 16; cp.async.commit_group; {} ld.shared.u32 %r12, [%r9];"


@pytest.mark.parametrize("late_copies", [True, False])
@pytest.mark.parametrize(
    ("wait", "is_found"), [("cp.async.wait_group 0;", False), ("cp.async.wait_group 1;", True), ("", True)]
)
def test_copies_are_waited_for(wait, is_found, late_copies):
    body = "shl.b32 %r10, %r1, 4; add.s32 %r9, %r2, %r10; mul.wide.u32 %rd6, %r1, 16; add.s64 %rd5, %rd2, %rd6;"
    body += COPY.format(wait) + "add.s32 %r12, %r12, 1; bar.sync 0; st.global.u32 [%rd4], %r12;"
    got, findings = run(body, block=32, inputs=np.arange(128, dtype=np.uint32), late_copies=late_copies)
    assert ("pending copy" in findings) == is_found
    assert is_found or (got[:32] == np.arange(32) * 4 + 1).all()


def test_memory_that_is_not_there():
    assert "uninitialised" in run("ld.shared.u32 %r12, [%r4]; st.global.u32 [%rd4], %r12;")[1]
    for offset in (256, 257):  # behind the array; across two words
        with pytest.raises(KernelFault, match="unmapped"):
            run(f"st.global.u32 [%rd4+{offset}], %r1;")
    with pytest.raises(KernelFault, match="misaligned"):
        run("st.global.u32 [%rd2+2], %r1;", block=1, inputs=np.zeros(4, np.uint32))
    with pytest.raises(KernelFault, match="deadlock"):
        run("setp.lt.s32 %p1, %r1, 3; @%p1 bra END; bar.warp.sync -1; bar.sync 0; END: bar.warp.sync -1;", block=32)
