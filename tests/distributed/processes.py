"""A function in several processes with a process group, and what each of them returned."""

import gc
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed
import torch.multiprocessing

TIMEOUT = 60  # seconds for one collective, and beyond that for a test: only a hang takes so long


def on_ranks(world_size, function, *arguments):
    """[function(rank, *arguments) of each rank]; raises what a rank raises, and where one hangs."""
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.start_processes(
            _worker, (folder, world_size, function, arguments), world_size, join=False, start_method="fork"
        )
        deadline = time.monotonic() + 2 * TIMEOUT
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise TimeoutError(f"{function.__name__}: expected an end within {2 * TIMEOUT} s, got none")
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        return [torch.load(Path(folder) / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _worker(rank, folder, world_size, function, arguments):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=TIMEOUT),
    )
    torch.save(function(rank, *arguments), Path(folder) / f"{rank}.pt")
    gc.collect()  # a reducer of DistributedDataParallel that outlives its group may hang
    torch.distributed.destroy_process_group()
