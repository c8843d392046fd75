"""benchmarks/gpu_model.py: counts of a small listing, and bounds that can be checked by hand."""

import gpu_model
import gpu_model_repetition
import gpu_model_tables
import pytest
import sass

# a loop over two vectors at a time, with the bounds of a row (a way past the work), the one vector that holds the
# maximum (a way around), and a loop over single elements where a vector straddles the row's end
LISTING = """\
\t\tFunction : _Z6kernelv
        /*0000*/                   MOV R1, RZ ;                      /* 0x0 */
        /*0010*/               @P0 BRA 0x00d0 ;                      /* 0x0 */
                                                                     /* 0x0 */
        /*0020*/                   LDS.128 R4, [R2] ;                /* 0x0 */
        /*0030*/              @!P1 BRA 0x0070 ;                      /* 0x0 */
        /*0040*/                   FSETP.NEU.AND P1, PT, R4, R5, PT ; /* 0x0 */
        /*0050*/                   SEL R9, R8, R9, P1 ;              /* 0x0 */
        /*0060*/                   BRA 0x0070 ;                      /* 0x0 */
        /*0070*/                   MUFU.EX2 R4, R4 ;                 /* 0x0 */
        /*0080*/                   BRA.U !UP0, 0x00c0 ;              /* 0x0 */
        /*0090*/                   LDG.E.U16 R6, [R6.64] ;           /* 0x0 */
        /*00a0*/                   IADD3 R7, R7, -0x1, RZ ;          /* 0x0 */
        /*00b0*/               @P2 BRA 0x0090 ;                      /* 0x0 */
        /*00c0*/                   LDS.128 R8, [R2+0x10] ;           /* 0x0 */
        /*00d0*/                   ISETP.LT.AND P3, PT, R1, R0, PT ; /* 0x0 */
        /*00e0*/               @P3 BRA 0x0010 ;                      /* 0x0 */
        /*00f0*/                   EXIT ;                            /* 0x0 */
"""


@pytest.fixture
def kernel():
    (kernel,) = sass.functions(LISTING.splitlines())
    return kernel


def test_instructions_of_a_listing(kernel):
    assert kernel.name == "_Z6kernelv" and len(kernel.instructions) == 16
    assert kernel.instructions[1] == sass.Instruction(0x10, "@P0", "BRA", 0xD0)
    assert kernel.instructions[8] == sass.Instruction(0x80, "!UP0", "BRA.U", 0xC0)
    assert kernel.loops() == [sass.Loop(1, 14), sass.Loop(9, 11)]


def test_the_path_does_the_work_and_nothing_rare(kernel):
    over_vectors, over_elements = kernel.loops()
    path = kernel.path(over_vectors, r"LDS.128|MUFU")
    assert path.n_instructions == 8 and path.count("LDS.128") == 2 and path.count("MUFU") == 1
    assert path.count("LDG") == path.count("SEL") == 0
    assert kernel.path(over_vectors, "nothing").n_instructions == 3  # past the work
    with_elements = kernel.path(over_vectors, "LDS.128|MUFU|LDG", lambda inner: 7)
    assert with_elements.n_instructions == 8 + 7 * 3
    assert kernel.path(over_elements, "LDG").n_instructions == 3


def test_names_select_kernels():
    assert not list(sass.functions(LISTING.splitlines(), "another"))


def test_loops_that_are_not_there_are_an_error(kernel):
    with pytest.raises(ValueError, match="expected the loops"):
        gpu_model.count_row_instructions(kernel, 8)


def test_bounds():
    # alone: one after the other; many: the scarcest decides, and chance takes at most as long as one after the other
    assert gpu_model.bounds([3.0, 5.0], 2.0, 1) == (10.0, 10.0)
    least, most = gpu_model.bounds([3.0, 5.0], 2.0, 4)
    assert least == 5.0 < most < 10.0
    assert gpu_model.bounds([3.0, 5.0], 2.0, 100)[1] == pytest.approx(5.0, rel=0.01)


def test_the_plan_is_the_launcher_s():
    h100 = gpu_model.GPUS[0]
    assert gpu_model.plan_rows(128256, 2, h100) == gpu_model.Plan(2, 4, 4009, 320, 3)
    assert gpu_model.plan_rows(128256, 4, h100).cluster_size == 8
    short = gpu_model.plan_rows(1024, 2, h100)
    assert short.is_of_warps and short.rows_at_once == 4


def test_tables_go_between_their_marks():
    page = gpu_model_tables.with_tables("a\n<!-- rows -->\nold\n<!-- end -->\nb", {"rows": ["new", "lines"]})
    assert page == "a\n<!-- rows -->\nnew\nlines\n<!-- end -->\nb"
    with pytest.raises(ValueError, match="linear"):
        gpu_model_tables.with_tables(page, {"linear": []})
    marks = [f"<!-- {name} -->" for name in gpu_model_tables.TABLES]
    assert all(gpu_model_tables.PAGE.read_text().count(mark) == 1 for mark in marks)


def test_repetition_grows_with_its_tokens_alone():
    """But for what reads: twice the tokens take no more than twice the time, once launches are little beside them."""
    executed = gpu_model_repetition.Executed(text=15, rest=300, step=100, read=0.1)
    for gpu in gpu_model.GPUS:
        short, long = (gpu_model_repetition.milliseconds(executed, 1, n, gpu) for n in (1 << 20, 1 << 21))
        assert short < long < 2 * short
        assert gpu_model_repetition.reading_milliseconds(executed, 8, 512, gpu) == pytest.approx(
            4 * gpu_model_repetition.reading_milliseconds(executed, 8, 256, gpu)
        )
