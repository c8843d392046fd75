"""The float32 product that the weight's gradient is made by, against float64; and what stands in for it elsewhere."""

import re
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.assertions import assert_bitwise_equal, assert_within, relative_error
from support.new_python import run_python
from support.strategies import Numbers, seeds

from ava_ext.ops import linear_rows
from ava_ext.ops.linear_logits import LinearLogits
from ava_ext.ops.row_fields import row_options
from ava_ext.ops.softmax_rows import row_loss
from ava_ext.ops.weight_gradient import add_weight_gradient_, has_bfloat16_products

BF16 = torch.bfloat16
needs_kernel = pytest.mark.skipif(not has_bfloat16_products(), reason="needs a processor with AVX512-BF16")
# name: the shape of what a matrix [n_rows, n] is a view of, all else in it being nan
LAYOUTS = {
    "contiguous": lambda n_rows, n: ((n_rows, n), lambda base: base),
    "columns of a wider tensor": lambda n_rows, n: ((n_rows + 1, n + 9), lambda base: base[1:, 3 : n + 3]),
    "every other row": lambda n_rows, n: ((2 * n_rows, n), lambda base: base[1::2]),
    "one row for all": lambda n_rows, n: ((1, n), lambda base: base.expand(n_rows, n)),
    "transposed": lambda n_rows, n: ((n, n_rows), lambda base: base.t()),
}
layouts = st.sampled_from(list(LAYOUTS))


def make_matrix(numbers, n_rows, n, layout="contiguous"):
    base_shape, view = LAYOUTS[layout](n_rows, n)
    matrix = view(torch.full(base_shape, torch.nan, dtype=BF16))
    stored = matrix[:1] if layout == "one row for all" else matrix
    stored.copy_(numbers.normal(*stored.shape))
    return matrix


def make_problem(seed, n_rows, n_columns, hidden_size, *of_layouts):
    """grad_weight [n_columns, hidden_size], grad_logits [n_rows, n_columns], hidden_states [n_rows, hidden_size]."""
    numbers, (of_gradient, of_states) = Numbers(seed), of_layouts or ("contiguous", "contiguous")
    grad_logits = make_matrix(numbers, n_rows, n_columns, of_gradient)
    hidden_states = make_matrix(numbers, n_rows, hidden_size, of_states)
    return numbers.normal(n_columns, hidden_size, scale=4.0).float(), grad_logits, hidden_states


def after(add, grad_weight, grad_logits, hidden_states):
    """What add leaves in a copy of grad_weight, which has an odd address and nan all around."""
    buffer = torch.full((grad_weight.numel() + 66,), torch.nan)
    copy = buffer[33:-33].view(grad_weight.shape).copy_(grad_weight)
    assert add(copy, grad_logits, hidden_states) is None
    assert buffer[:33].isnan().all() and buffer[-33:].isnan().all()
    return copy


def assert_exact(got, grad_weight, grad_logits, hidden_states, terms_bound=2.0**-22):
    """Within this bound of the size of the terms, and the rounding of their addition to grad_weight."""
    gradients, states = grad_logits.double(), hidden_states.double()
    expected = grad_weight.double() + gradients.t() @ states
    bound = terms_bound * (gradients.abs().t() @ states.abs()) + 2.0**-24 * expected.abs()
    assert_within(got, expected, bound, "grad_weight")


# -- values


@needs_kernel
@given(seeds, st.integers(1, 70), st.integers(1, 70), st.integers(1, 70), layouts, layouts)
def test_any_shape_and_stride(seed, n_rows, n_columns, hidden_size, of_gradient, of_states):
    problem = make_problem(seed, n_rows, n_columns, hidden_size, of_gradient, of_states)
    assert_exact(after(add_weight_gradient_, *problem), *problem)


@needs_kernel
@pytest.mark.parametrize("n_rows", [2047, 2048, 2049, 4097, 6150])
def test_many_rows_go_by_groups(n_rows):
    problem = make_problem(n_rows, n_rows, 15, 33)
    # the partial sums, and so their roundings, are far smaller than the sum of the magnitudes
    assert_exact(after(add_weight_gradient_, *problem), *problem)


@needs_kernel
def test_terms_of_one_sign():
    grad_weight, grad_logits, hidden_states = make_problem(0, 1000, 30, 40)
    problem = (grad_weight.abs(), grad_logits.abs(), hidden_states.abs())
    assert_exact(after(add_weight_gradient_, *problem), *problem, terms_bound=1000 * 2.0**-24)


@needs_kernel
def test_nearly_as_exact_as_a_float32_product():
    # that of MKL adds up shorter sums; a result rounded to bfloat16 would be 10000 times as wrong
    grad_weight, grad_logits, hidden_states = make_problem(1, 900, 300, 100)
    grad_weight.zero_()
    exact = grad_logits.double().t() @ hidden_states.double()
    in_float32 = grad_logits.float().t() @ hidden_states.float()
    got = after(add_weight_gradient_, grad_weight, grad_logits, hidden_states)
    assert relative_error(got, exact) <= 3 * relative_error(in_float32, exact)


@needs_kernel
def test_small_integers_are_exact():
    numbers = Numbers(2)
    grad_weight = numbers.integers(-8, 9, 50, 70).float()
    grad_logits, hidden_states = (numbers.integers(-8, 9, 301, n).to(BF16) for n in (50, 70))
    expected = grad_weight.double() + grad_logits.double().t() @ hidden_states.double()
    got = after(add_weight_gradient_, grad_weight, grad_logits, hidden_states)
    assert_bitwise_equal(got, expected.float())


@needs_kernel
@pytest.mark.parametrize("n_rows, n_columns, hidden_size", [(0, 5, 5), (5, 0, 5), (5, 5, 0)])
def test_nothing_to_add(n_rows, n_columns, hidden_size):
    problem = make_problem(3, n_rows, n_columns, hidden_size)
    assert_bitwise_equal(after(add_weight_gradient_, *problem), problem[0])


@needs_kernel
def test_infinities_and_nans_stay_in_their_columns_and_positions():
    grad_weight, grad_logits, hidden_states = make_problem(4, 9, 20, 40)
    grad_logits[2, 3], grad_logits[5, 13], grad_logits[8, 14] = torch.inf, torch.nan, -torch.inf
    hidden_states[7, 31], hidden_states[8, 32] = torch.nan, torch.inf
    problem = grad_weight, grad_logits, hidden_states
    got = after(add_weight_gradient_, *problem)
    assert_exact(got, *problem)
    assert got.isfinite().sum() == (20 - 3) * (40 - 2)


@needs_kernel
def test_subnormal_numbers_count_as_zeros():
    n_rows, least = 6, 2.0**-126
    grad_weight = torch.zeros(3, 2)
    grad_logits = torch.full((n_rows, 3), 3.0, dtype=BF16)
    hidden_states = torch.tensor([least / 2, least], dtype=BF16).expand(n_rows, 2)
    got = after(add_weight_gradient_, grad_weight, grad_logits, hidden_states)
    torch.testing.assert_close(got, torch.tensor([0.0, 18 * least]).expand(3, 2), rtol=0, atol=0)
    tiny_products = after(add_weight_gradient_, grad_weight, grad_logits * 2.0**-4, hidden_states)
    torch.testing.assert_close(tiny_products, torch.zeros(3, 2), rtol=0, atol=n_rows * least)
    # what grad_weight already holds is added as it is
    kept = after(add_weight_gradient_, torch.full((3, 2), least / 4), grad_logits * 0, hidden_states)
    torch.testing.assert_close(kept, torch.full((3, 2), least / 4), rtol=0, atol=0)


# a tensor that ends where memory that nobody may touch begins
NO_STEP_FURTHER = """
import ctypes, mmap, torch
from ava_ext.ops.weight_gradient import add_weight_gradient_
PAGE, kept = mmap.PAGESIZE, []
def before_a_wall(tensor):
    n_bytes = tensor.numel() * tensor.itemsize
    wall = -(-n_bytes // PAGE) * PAGE
    kept.append(memory := mmap.mmap(-1, wall + PAGE))
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + wall), PAGE, 0) == 0
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel(), offset=wall - n_bytes)
    return flat.view(tensor.shape).copy_(tensor)
for n_rows, n_columns, hidden_size in [(1, 1, 1), (3, 13, 15), (4, 14, 16), (5, 15, 17), (2, 29, 31), (7, 28, 33)]:
    shapes = [(n_columns, hidden_size), (n_rows, n_columns), (n_rows, hidden_size)]
    dtypes = [torch.float32, torch.bfloat16, torch.bfloat16]
    tensors = [before_a_wall(torch.ones(shape, dtype=dtype)) for shape, dtype in zip(shapes, dtypes)]
    add_weight_gradient_(*tensors)
    assert bool((tensors[0] == 1 + n_rows).all()), (n_rows, n_columns, hidden_size)
print("done")
"""


@needs_kernel
@pytest.mark.skipif(sys.platform != "linux", reason="protects memory as Linux does")
def test_nothing_beyond_the_tensors_is_read_or_written():
    result = run_python(NO_STEP_FURTHER)
    assert result.stdout.strip() == "done", f"exit status {result.returncode}\n{result.stderr}"


# -- one order of additions


@pytest.fixture
def n_threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@needs_kernel
def test_bitwise_equal_for_every_number_of_threads(n_threads):
    problem = make_problem(5, 2500, 400, 70)  # two groups of rows, several blocks of columns
    results = []
    for n in (1, 2, 3):
        n_threads(n)
        results.append(after(add_weight_gradient_, *problem))
    for result in results[1:]:
        assert_bitwise_equal(result, results[0])


@needs_kernel
@given(st.integers(0, 100), st.integers(1, 60), st.integers(0, 60), st.integers(1, 40))
def test_bitwise_equal_for_a_part_of_columns_and_positions(column, n_columns, position, n_positions):
    grad_weight, grad_logits, hidden_states = make_problem(6, 67, 160, 100)
    columns, positions = slice(column, column + n_columns), slice(position, position + n_positions)
    whole = after(add_weight_gradient_, grad_weight, grad_logits, hidden_states)
    part = grad_weight[columns, positions], grad_logits[:, columns], hidden_states[:, positions]
    assert_bitwise_equal(after(add_weight_gradient_, *part), whole[columns, positions])


# -- who uses it


def has_instructions():
    flags = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return flags is not None and {"avx512_bf16", "avx512bw", "avx512dq", "avx512vl"} <= set(flags[1].split())


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="asks Linux for the instruction sets")
@pytest.mark.parametrize("capability", ["", "avx512", "avx2"])
def test_processor_and_environment_decide(capability):
    code = "from ava_ext.ops.weight_gradient import has_bfloat16_products; print(has_bfloat16_products())"
    result = run_python(code, AVA_CPU_CAPABILITY=capability)
    if capability and f"AVA_CPU_CAPABILITY={capability}, but this processor has" in result.stderr:
        pytest.skip(f"this processor has no {capability}")
    assert result.stdout.strip() == str(has_instructions() and capability in ("", "avx512")), result.stderr


def test_an_error_where_it_does_not_work():
    code = "import torch; from ava_ext.ops.weight_gradient import add_weight_gradient_ as add;"
    code += "add(torch.zeros(3, 2), torch.zeros(4, 3).bfloat16(), torch.zeros(4, 2).bfloat16())"
    result = run_python(code, AVA_CPU_CAPABILITY="portable")
    assert "add_weight_gradient_: expected a processor with AVX512-BF16" in result.stderr


KERNEL = pytest.param(True, marks=needs_kernel, id="kernel")


@pytest.fixture
def calls(request, monkeypatch):
    """The calls of the kernel, if request.param lets it be taken."""
    calls = []

    def counted(*tensors):
        calls.append(tensors)
        add_weight_gradient_(*tensors)

    monkeypatch.setattr(linear_rows, "has_bfloat16_products", lambda: request.param)
    monkeypatch.setattr(linear_rows, "add_weight_gradient_", counted)
    calls_expected = 1 if request.param else 0
    return calls, calls_expected


def add_product(*problem):
    linear_rows._add_product(*problem, is_first=False)


@pytest.mark.parametrize("calls", [KERNEL, pytest.param(False, id="fallback")], indirect=True)
def test_the_first_product_does_not_read_what_is_there(calls):
    grad_weight, *product = make_problem(7, 67, 5000, 40)
    got = torch.full_like(grad_weight, torch.nan)
    linear_rows._add_product(got, *product, is_first=True)
    assert_exact(got, torch.zeros_like(grad_weight), *product)


@pytest.mark.parametrize("calls", [KERNEL, pytest.param(False, id="fallback")], indirect=True)
@pytest.mark.parametrize("of_states", ["contiguous", "transposed"])
def test_linear_rows_add_the_product(calls, of_states):
    problem = make_problem(7, 67, 5000, 40, "columns of a wider tensor", of_states)
    assert_exact(after(add_product, *problem), *problem)
    assert len(calls[0]) == calls[1]


@pytest.mark.parametrize("calls", [KERNEL, pytest.param(False, id="fallback")], indirect=True)
def test_float16_has_no_products_of_its_own(calls):
    grad_weight, grad_logits, hidden_states = make_problem(8, 30, 50, 40)
    problem = grad_weight, grad_logits.half(), hidden_states.half()
    assert_exact(after(add_product, *problem), *problem)
    assert not calls[0]


@pytest.mark.parametrize("calls", [KERNEL, pytest.param(False, id="fallback")], indirect=True)
@pytest.mark.parametrize("chunk_rows, n_sums", [(16, 3), (40, 0)])  # a single chunk: one product of torch, no sum
def test_the_loss_takes_it_for_every_chunk(calls, chunk_rows, n_sums):
    numbers, (n_rows, n_columns, hidden_size) = Numbers(9), (40, 70, 33)
    head = LinearLogits(numbers.normal(n_rows, hidden_size).to(BF16), numbers.normal(n_columns, hidden_size).to(BF16))
    weight = head.weight.requires_grad_()
    targets = numbers.integers(0, n_columns, n_rows)
    chunk_bytes = chunk_rows * n_columns * 2
    loss = row_loss(head, targets, row_options(weight), reduction="sum", chunk_bytes=chunk_bytes).loss
    (got,) = torch.autograd.grad(loss, weight)
    probabilities = (head.hidden_states @ weight.t()).detach().double().softmax(-1)
    grad_logits = (probabilities - torch.nn.functional.one_hot(targets, n_columns)).to(BF16)
    expected = grad_logits.double().t() @ head.hidden_states.double()
    assert len(calls[0]) == n_sums * calls[1]
    # one rounding to bfloat16, of a uniform mantissa: 2^-9 at most, and less in the mean
    assert relative_error(got, expected) < 2.0**-9


# -- the operator


@needs_kernel
def test_opcheck():
    torch.library.opcheck(torch.ops.ava_ext.add_weight_gradient_.default, make_problem(10, 5, 6, 7))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"grad_logits": torch.zeros(4, 3)}, "expected grad_logits of type bfloat16, got float32"),
        ({"hidden_states": torch.zeros(4, 2).half()}, "expected hidden_states of type bfloat16, got float16"),
        ({"grad_weight": torch.zeros(3, 2).to(BF16)}, "expected grad_weight of type float32, got bfloat16"),
        ({"grad_weight": torch.zeros(2, 3)}, "expected grad_weight of shape [3, 2], got [2, 3]"),
        ({"grad_weight": torch.zeros(2, 3).t()}, "expected a contiguous grad_weight"),
        ({"hidden_states": torch.zeros(5, 2).to(BF16)}, "expected hidden_states of shape [4, 2], got [5, 2]"),
        ({"hidden_states": torch.zeros(4).to(BF16)}, "expected hidden_states of two dimensions, got shape [4]"),
        ({"grad_logits": torch.zeros(3, 4).to(BF16).t()}, "expected grad_logits with last stride 1, got 4"),
        ({"hidden_states": torch.zeros(4, 4).to(BF16)[:, ::2]}, "expected hidden_states with last stride 1, got 2"),
    ],
)
def test_errors(changes, message):
    arguments = {
        "grad_weight": torch.zeros(3, 2),
        "grad_logits": torch.zeros(4, 3, dtype=BF16),
        "hidden_states": torch.zeros(4, 2, dtype=BF16),
    }
    with pytest.raises(RuntimeError, match=re.escape(f"add_weight_gradient_: {message}")):
        torch.ops.ava_ext.add_weight_gradient_(**arguments | changes)
