"""Errors of the operators begin with the operator's name, whatever the machine that built them."""

import pytest
import torch

_ops = torch.ops.ava_ext
OPTIONS = torch.ones(7)


@pytest.mark.parametrize(
    ("operator", "arguments"),
    [
        ("row_loss", (torch.ones(2, 3), torch.ones(2), OPTIONS, None, None, None, [], 1, 3, -100, False, False)),
        ("row_statistics", (torch.ones(2, 3), None, None, OPTIONS, 0, 4)),
        ("row_gradient", (torch.ones(2, 3), torch.ones(2, 6), torch.ones(2, 3), None, OPTIONS, 0, 3)),
        ("scale_rows_", (torch.ones(2, 3), torch.ones(3))),
        ("router_statistics", ([torch.ones(2, 3)], None, None, None, None, 1, 1, False)),
        ("router_gradient", ([], None, None, None, None, None, None, None, 1, False)),
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
