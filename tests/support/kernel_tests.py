"""Which test files run on every device, by the file stem of the kernels that they test.

Each runs on "cpu", over the emulated CUDA kernels, and on a GPU where there is one. "pytorch" is what a device without
kernels gets.
"""

FILES_OF_KERNELS = {
    "repetition": {"test_repetition.py"},
    "row_weights": {"test_row_weights.py"},
    "temperature": {"test_temperature.py"},
    "softmax_rows": {
        "test_column_weights.py",
        "test_token_metrics.py",
        "test_derivatives.py",
        "test_gradient_layout.py",
        "test_softmax_rows.py",
        "test_softmax_rows_autograd.py",
        "test_softmax_rows_edges.py",
        "test_softmax_rows_limits.py",
        "test_softmax_rows_nonfinite.py",
        "test_softmax_rows_precision.py",
        "test_softmax_statistics.py",
        "test_softmax_rows_sure.py",
        "test_softmax_rows_tail.py",
    },
    "router_rows": {"test_router_rows.py", "test_router_rows_autograd.py", "test_router_rows_properties.py"},
}
WITHOUT_KERNELS = {
    "test_column_weights.py",
    "test_derivatives.py",
    "test_gradient_layout.py",
    "test_repetition.py",
    "test_router_rows.py",
    "test_router_rows_properties.py",
    "test_row_weights.py",
    "test_softmax_rows.py",
    "test_softmax_statistics.py",
    "test_softmax_rows_limits.py",
    "test_softmax_rows_nonfinite.py",
    "test_softmax_rows_precision.py",
    "test_softmax_rows_sure.py",
    "test_softmax_rows_tail.py",
    "test_temperature.py",
    "test_token_metrics.py",
}
TOO_LONG_TO_EMULATE = {
    "test_many_rows_are_counted_exactly",
    "test_more_than_two_billion_logits",
}  # minutes; a GPU does them in a second
