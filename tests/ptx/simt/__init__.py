"""Runs PTX, as nvcc writes it, on the CPU: a SIMT interpreter in numpy that checks every access to memory.

    memory = Memory()
    x = memory.put(array)                                          # address of a copy of the array
    launch = Launch(Module(text).kernel("name"), memory, grid=(2, 1), block=128, shared_bytes=0, cluster_size=1)
    launch.run(parameters)                                         # the bytes of the kernel's parameters
    launch.findings, launch.warp_instructions

A basic block of PTX becomes one Python function over the registers of the active threads. Every thread has its own
program counter. Of the threads that are scheduled, those with the lowest counter run, so that they meet again behind a
branch. All warps are scheduled together or, with `seed`, random warps for random times.

What it reports in `findings`, and then goes on:

  race            two accesses, one of them a write, that no barrier orders, in shared or global memory. Found by
                  happens-before (vector clocks of warps), whatever the schedule was. Among the lanes of one warp only
                  bar.warp.sync orders accesses.
  uninitialised   a read of memory that nobody has written
  pending copy    an access to memory that a cp.async still owns. The copy takes place at the wait_group that covers
                  it, or at once without `late_copies`: the ISA allows both.
  shared memory   of another block of the cluster, which has ended or may have
  collectives     lanes that are missing in a shuffle or a vote; lanes of one warp at different block barriers

mbarriers and st.async: mbarriers.py says what is modelled.

What raises KernelFault: an access to memory that is not mapped or not aligned, a device assert, a deadlock (also of
lanes that wait for the rest of their warp at an aligned barrier).

What a GPU may do and this does not: fuse mul and add that are not marked .rn, round approximations in another way (ex2
and rcp give the exact value rounded; `ex2_error` adds relative errors), caches. An access that a missing fence leaves
unordered is a race here. Clusters run one after another. What nvcc has not written for the kernels at hand (textures,
atomics, wgmma, local memory) raises NotImplementedError when the kernel is translated.

Files, in reading order: module.py (text to basic blocks), memory.py (global memory, who touched what),
translation.py and instructions.py (basic blocks to Python), arithmetic.py (what numpy lacks), launch.py (threads and
their schedule), synchronisation.py (barriers, shuffles, votes), access.py (loads, stores, copies), mbarriers.py.
"""

from simt.launch import KernelFault, Launch
from simt.memory import Memory
from simt.module import Module

__all__ = ["KernelFault", "Launch", "Memory", "Module"]
