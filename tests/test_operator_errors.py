"""Errors of the operators begin with the operator's name, whatever the machine that built them."""

import sys

import pytest
import torch
from support.new_python import run_python

from ava_ext.ops.row_fields import N_OPTIONS

_ops = torch.ops.ava_ext
OPTIONS = torch.ones(N_OPTIONS)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("row_loss", (torch.ones(2, 3), torch.ones(2), OPTIONS, None, None, None, [], 1, 3, -100, False, False)),
        ("row_statistics", (torch.ones(2, 3), None, None, OPTIONS, 0, 4)),
        ("row_gradient", (torch.ones(2, 3), torch.ones(2, 6), torch.ones(2, 3), None, OPTIONS, 0, 3)),
        ("scale_rows_", (torch.ones(2, 3), torch.ones(3))),
        ("router_statistics", ([torch.ones(2, 3)], None, None, None, None, 1, 1, False)),
        ("router_gradient", ([], *[None] * 8, 1, False)),
        ("count_rows", (torch.ones(2, 3), None, None, None, None, -100, True, False)),
        ("temperature_step_", (*[torch.zeros(3)] * 5, 1.0, 1.0, 1.0, 1.0)),
        ("add_weight_gradient_", (torch.zeros(3), torch.zeros(3), torch.zeros(3))),
    ],
)
def test_errors_begin_with_the_operator(operator, arguments):
    with pytest.raises(RuntimeError, match=rf"^{operator}: expected "):
        getattr(_ops, operator)(*arguments)


def test_index_errors_begin_with_the_operator():
    with pytest.raises(IndexError, match=r"^row_statistics: expected ids in \[0, 3\)"):
        _ops.row_statistics(torch.ones(2, 3), torch.full((2, 1), 3, dtype=torch.int32), None, OPTIONS, 0, 3)


WITHOUT_MEMORY = """
import resource
import torch, ava_ext

torch.set_num_threads(2)
logits, ids, options = torch.zeros(2, 2**18), torch.zeros(2, 2**22, dtype=torch.int32), torch.ones(8)
statistics_of = torch.ops.ava_ext.row_statistics
statistics_of(logits, None, None, options, 0, 9)  # the threads are there
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 64 * 2**20, -1))
for n_rows in (1, 2):  # in this thread, and in others
    try:
        statistics_of(logits[:n_rows], ids[:n_rows], None, options, 0, 9)
    except Exception as error:
        print(type(error).__name__, error)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits memory as Linux does")
def test_an_operator_without_memory_to_work_in():
    result = run_python(WITHOUT_MEMORY)
    assert result.stdout.count("RuntimeError DefaultCPUAllocator: can't allocate memory") == 2, result
