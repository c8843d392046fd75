"""A function in several processes with a process group, and what each of them returned.

The processes are forked from one that may have computed with several threads. OpenMP's do not come along, and a child
that asks for more than one waits for them for ever: each has one thread, and tells the libraries that choose a number.
"""

import gc
import io
import multiprocessing
import os
import tempfile
import time
import traceback
from datetime import timedelta

import torch
import torch.distributed

TIMEOUT = 120  # seconds for one call or collective; only a hang takes so long

_pools = {}


def on_ranks(world_size, function, *arguments):
    """[function(rank, *arguments) of each rank]; raises where a rank raises, and where one hangs. The processes are
    kept for the next call: to start them takes longer than most tests do."""
    if world_size not in _pools:
        _pools[world_size] = Pool(world_size)
    try:
        return _pools[world_size].run(function, arguments)
    except BaseException:
        _pools.pop(world_size).kill()  # the others may wait for the one that has failed
        raise


def on_new_ranks(world_size, function, *arguments):
    """The same in processes of its own, for what leaves something behind, such as a library's state."""
    pool = Pool(world_size)
    try:
        return pool.run(function, arguments)
    finally:
        pool.kill()


class Pool:
    """Processes of one default group."""

    def __init__(self, world_size):
        context = multiprocessing.get_context("fork")
        self.folder = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(world_size):
            here, there = context.Pipe()
            arguments = (self.folder.name, rank, world_size, there)
            self.connections.append(here)
            self.processes.append(context.Process(target=_serve, args=arguments, daemon=True))
            self.processes[-1].start()

    def run(self, function, arguments):
        for connection in self.connections:
            connection.send((function, _packed(arguments)))
        deadline, answers = time.monotonic() + TIMEOUT, []
        for rank, connection in enumerate(self.connections):
            if not connection.poll(max(0, deadline - time.monotonic())):
                raise TimeoutError(f"{function.__name__}: expected an answer of rank {rank} in {TIMEOUT} s, got none")
            answers.append(connection.recv())
        failed = [answer for answer in answers if isinstance(answer, str)]
        if failed:
            raise AssertionError("\n".join(failed))
        return [_unpacked(answer) for answer in answers]

    def kill(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _packed(value):
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def _unpacked(packed):
    return torch.load(io.BytesIO(packed), weights_only=False)


def _serve(folder, rank, world_size, connection):
    gc.freeze()  # what is there already, all of the tests, would be looked through at every collection below
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # else accelerate and Lightning ask for as many as there are cores
    # as torchrun tells a process, for libraries that ask. The group is there already: nobody goes to this port
    variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "LOCAL_WORLD_SIZE": world_size}
    variables |= {"GROUP_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 1, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in variables.items()}
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    while True:
        function, arguments = connection.recv()
        try:
            answer = _packed(function(rank, *_unpacked(arguments)))
        except BaseException:
            answer = f"rank {rank}: {traceback.format_exc()}"
        connection.send(answer)
        gc.collect()  # a reducer of DistributedDataParallel that outlives its group may hang
