"""tests/cuda_gates.py reads what it has to; the gates themselves take minutes of nvcc and are run by .ci/run."""

import cuda_gates

REPORT = """\
ptxas info    : 24 bytes gmem
ptxas info    : Compiling entry function '_Z15row_loss_kernelIfEv' for 'sm_90'
ptxas info    : Function properties for _Z15row_loss_kernelIfEv
    {stack} bytes stack frame, 0 bytes spill stores, {spilled} bytes spill loads
ptxas info    : Used 64 registers, used 1 barriers
"""
SASS = """\
\t\tFunction : _Z15row_loss_kernelIfEv
        /*0010*/                   LDC R1, c[0x0][0x28] ;    /* 0x00000a00ff017b82 */
        /*0020*/              @!P0 LDGSTS.E.BYPASS.128 [R7], desc[UR6][R2.64] ;    /* 0x0000000002077fae */
        /*0030*/               @P1 {store} desc[UR6][R32.64], R24 ;    /* 0x0000001820007986 */
"""


FENCES = """\
        /*0040*/                   MEMBAR.ALL.GPU ;                  /* 0x0000000000007992 */
        /*0050*/                   UCGABAR_WAIT ;                    /* 0x0000000000007dc7 */
        /*0060*/               @P0 CCTL.IVALL ;                      /* 0x00000000ff00798f */
"""


def faults(stack=0, spilled=0, store="STG.E.128", end=""):
    kernels = cuda_gates.kernels_of_report(REPORT.format(stack=stack, spilled=spilled))
    cuda_gates.add_instructions(kernels, SASS.format(store=store) + end)
    (kernel,) = kernels.values()
    assert kernel.registers == 64 and kernel.loads == {"LDGSTS.E.BYPASS.128"}
    return kernel.faults()


def test_a_good_kernel_passes():
    assert faults() == []


def test_what_is_wrong_is_found():
    assert faults(store="STG.E.64") == ["no 128-bit store"]
    assert "8 bytes of local memory" in faults(stack=8)[0]
    assert "12 bytes spilled" in faults(spilled=12)[0]
    assert "1 instructions" in faults(store="STL.64")[0]
    assert faults(end=FENCES) == ["2 fences of all memory"]


def test_one_barrier_of_a_cluster_is_for_its_beginning():
    name = "_ZN3ava15row_loss_kernelIfLNS_9ResidenceE2ELNS_8FeaturesE0EEEvNS_12RowArgumentsE"
    for n, found in ((1, []), (2, ["4 fences of all memory"])):
        kernel = cuda_gates.Kernel(name, loads={"LDG.E.128"}, stores={"STG.E.128"})
        cuda_gates.add_instructions({name: kernel}, f"\t\tFunction : {name}\n" + FENCES * n)
        assert kernel.faults() == found


def test_kernels_for_clusters_are_excused_where_there_are_none():
    name = "_ZN3ava15row_loss_kernelIfLNS_9ResidenceE2ELNS_8FeaturesE0EEEvNS_12RowArgumentsE"
    trap = cuda_gates.Kernel(name)
    assert trap.faults(has_clusters=False) == [] and len(trap.faults()) == 2
    assert len(cuda_gates.Kernel(name.replace("E2E", "E1E")).faults(has_clusters=False)) == 2
