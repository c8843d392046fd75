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
        ("mov.u32 %r10, WARP_SZ; sub.s32 %r12, %r10, 1;", np.full(64, 31)),
        # 0 is -0; a nan is neither larger nor equal
        ("mov.u32 %r10, 0x3F818000; set.ge.u32.bf16x2 %r12, %r10, 0;", np.full(64, 0xFFFFFFFF)),
        ("mov.u32 %r10, 0xBF807FC0; set.ge.u32.bf16x2 %r12, %r10, 0;", np.full(64, 0)),
        ("mov.u32 %r10, 0x80003C00; set.eq.u32.f16x2 %r12, %r10, 0;", np.full(64, 0xFFFF0000)),
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


PARTS = """
and.b32 %r11, %r1, 16; setp.eq.u32 %p1, %r11, 0; selp.b32 %r10, 0x0000ffff, {}, %p1;
shfl.sync.bfly.b32 %r12|%p2, %r1, 1, 31, %r10; st.global.u32 [%rd4], %r12;
"""


@pytest.mark.parametrize("seed", [None, 1, 2])
def test_parts_of_a_warp_have_masks_of_their_own(seed):
    got, findings = run(PARTS.format("0xffff0000"), seed=seed)
    assert (got == THREADS ^ 1).all() and not findings
    with pytest.raises(KernelFault, match="deadlock"):
        run(PARTS.format("0xffff8000"), seed=seed)


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


# An element of A alone, one of B alone, and where their product is in D. Lane 13 has row 3, columns 2 and 3, in its
# first register, and row 11, columns 10 and 11, in its last. Lane 21 has rows 2 and 3 of column 5, and 10 and 11 of it.
# Lane 14 has columns 4 and 5 of D's row 3, and of row 11.
@pytest.mark.parametrize(("of_a", "of_b", "of_d"), [(0, 0, 1), (3, 1, 3)])
@pytest.mark.parametrize(("kind", "one"), [("f16", 0x3C00), ("bf16", 0x3F80)])
def test_products_of_tiles(kind, one, of_a, of_b, of_d):
    a = ", ".join("%r14" if k == of_a else "%r13" for k in range(4))
    b = ", ".join("%r15" if k == of_b else "%r13" for k in range(2))
    body = f"""
    mov.u32 %r13, 0; mov.u32 %r14, 0; mov.u32 %r15, 0; mov.f32 %f1, 0f41000000;
    setp.eq.s32 %p1, %r1, 13; @%p1 mov.u32 %r14, {one << 16}; setp.eq.s32 %p1, %r1, 21; @%p1 mov.u32 %r15, {one << 16};
    MEET: mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32
      {{%f10, %f11, %f12, %f13}}, {{{a}}}, {{{b}}}, {{%f1, %f1, %f1, %f1}};
    st.global.f32 [%rd4], %f1{of_d};
    """
    got, findings = run(body, block=32)
    assert (got.view(np.float32) == 8 + (THREADS[:32] == 14)).all() and not findings
    with pytest.raises(KernelFault, match="deadlock"):
        run(body.replace("MEET:", "setp.eq.s32 %p1, %r1, 7; @%p1 bra MEET; bar.warp.sync -1; MEET:"), block=32)


def test_instructions_of_warps_are_counted():
    """All but mov and bra, up to each barrier of a block."""
    body = "setp.lt.s32 %p1, %r1, 32; @%p1 bra END; mov.u32 %r9, %r1; add.s32 %r12, %r9, 1; add.s32 %r12, %r12, 1;"
    body += "END: bar.sync 0; bar.sync 0;"
    text = HEADER + f".visible .entry k(.param .u64 out)\n{{\n{DECLARATIONS}\n{body}\nret;\n}}"
    launch = Launch(Module(text).kernel("k"), Memory(1 << 10), (1, 1), 64).run(bytes(8))
    first, second = launch.issued_at_barriers
    assert first[1] == first[0] + 2 and (second - first == 1).all()


def test_memory_that_is_not_there():
    assert "uninitialised" in run("ld.shared.u32 %r12, [%r4]; st.global.u32 [%rd4], %r12;")[1]
    for offset in (256, 257):  # behind the array; across two words
        with pytest.raises(KernelFault, match="unmapped"):
            run(f"st.global.u32 [%rd4+{offset}], %r1;")
    with pytest.raises(KernelFault, match="misaligned"):
        run("st.global.u32 [%rd2+2], %r1;", block=1, inputs=np.zeros(4, np.uint32))
    with pytest.raises(KernelFault, match="deadlock"):
        run("setp.lt.s32 %p1, %r1, 3; @%p1 bra END; bar.warp.sync -1; bar.sync 0; END: bar.warp.sync -1;", block=32)


# Two blocks of a warp, each of which stores 5 + its rank into both.
INIT = "@%p1 mbarrier.init.shared::cta.b64 [%r20], 1;"
CLUSTER_BARRIER = "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned;"
ARRIVE = "@%p1 mbarrier.arrive.expect_tx.release.cta.shared::cta.b64 _, [%r20], 32;"
WAIT = "WAIT: mbarrier.try_wait.parity.shared::cta.b64 %p3, [%r20], 0; @!%p3 bra WAIT;"
EXCHANGE = f"""
mov.u32 %r21, %cluster_ctarank; add.s32 %r20, %r2, 256; setp.eq.s32 %p1, %r1, 0; setp.lt.s32 %p2, %r1, 2;
{INIT} {CLUSTER_BARRIER}
shl.b32 %r22, %r21, 4; add.s32 %r23, %r2, %r22; add.s32 %r26, %r21, 5; bar.warp.sync -1;
mapa.shared::cluster.u32 %r24, %r23, %r1; mapa.shared::cluster.u32 %r25, %r20, %r1;
@%p2 st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [%r24], {{%r26, %r1, %r1, %r1}}, [%r25];
{ARRIVE} {WAIT}
ld.shared.u32 %r12, [%r2]; ld.shared.u32 %r13, [%r2+16]; shl.b32 %r13, %r13, 4; add.s32 %r12, %r12, %r13;
mov.u32 %r30, %ctaid.x; shl.b32 %r31, %r30, 7; cvt.u64.u32 %rd7, %r31; add.s64 %rd8, %rd4, %rd7;
st.global.u32 [%rd8], %r12;
"""


def exchange(body, seed):
    text = HEADER + f".visible .entry k(.param .u64 out)\n{{\n{DECLARATIONS}\n{body}\nret;\n}}"
    memory = Memory(1 << 16)
    out = memory.put(np.zeros(64, np.uint32))
    launch = Launch(Module(text).kernel("k"), memory, (2, 1), 32, cluster_size=2, seed=seed)
    launch.run(np.array([out], np.uint64).tobytes())
    return memory.get(out, np.zeros(64, np.uint32)), {text.split(":")[0] for text in launch.findings}


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
def test_mbarriers_count_stores(seed):
    got, findings = exchange(EXCHANGE, seed)
    assert (got == 5 + 16 * 6).all() and not findings


@pytest.mark.parametrize("seed", [None, 1, 2, 3])
@pytest.mark.parametrize(
    ("right", "wrong", "finds"),
    [
        (WAIT, "", {"pending copy", "race", "uninitialised"}),
        (WAIT, WAIT.replace("], 0", "], 1"), {"pending copy", "race", "uninitialised"}),
        (ARRIVE, ARRIVE.replace("32", "16"), {"pending copy", "race", "uninitialised"}),
    ],
)
def test_stores_are_waited_for(right, wrong, finds, seed):
    """Noticed, whenever the stores land."""
    try:
        _, findings = exchange(EXCHANGE.replace(right, wrong), seed)
    except KernelFault as fault:
        assert "lands in a block that has ended" in str(fault) or "deadlock" in str(fault)
    else:
        assert findings & finds


@pytest.mark.parametrize(
    ("right", "wrong", "fault"),
    [
        (ARRIVE, ARRIVE.replace("32", "48"), "deadlock"),
        (ARRIVE, ARRIVE.replace("@%p1 ", ""), "more arrivals than expected"),
        (ARRIVE, ARRIVE.replace("32", "1048576"), "a tx-count"),
        (INIT, "", "no mbarrier there"),
        (INIT, INIT + INIT, "there is an mbarrier already"),
        (INIT, INIT.replace("1;", "0;"), "a count of 0"),
        ("[%r24]", "[%r23]", "in two blocks"),
        ("[%r24]", "[%r24+8]", "misaligned"),
        ("[%r24]", "[%r24+16777216]", "unmapped"),
        (ARRIVE, ARRIVE.replace("32", "0").replace("@%p1 ", "@%p2 ") + ARRIVE, "nobody has waited|more arrivals"),
    ],
)
def test_faults_of_mbarriers(right, wrong, fault):
    assert right in EXCHANGE
    with pytest.raises(KernelFault, match=fault):
        exchange(EXCHANGE.replace(right, wrong, 1), None)


def test_an_mbarrier_is_set_up_before_others_use_it():
    body = EXCHANGE.replace(CLUSTER_BARRIER, "")
    with pytest.raises(KernelFault, match="no mbarrier there"):
        exchange(body, 1)
    assert "race with mbarrier.init" in exchange(body, None)[1]  # which happened to come first
