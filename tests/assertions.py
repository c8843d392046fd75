"""Assertions that several test files make."""

import torch


def assert_within(value, expected, bound, name=""):
    """|value - expected| <= bound, element by element. inf is within any bound of itself, nan of nan."""
    value = value.double()
    same = (value == expected) | (value.isnan() & expected.isnan())
    wrong = ~same & ~((value - expected).abs() <= bound)
    if wrong.any():
        place = tuple(wrong.nonzero()[0].tolist())
        raise AssertionError(
            f"{name}{list(place)} is {value[place].item()!r}, expected {expected[place].item()!r} within "
            f"{bound[place].item():.3g}; {int(wrong.sum())} of {wrong.numel()} are wrong"
        )


def relative_error(value, expected):
    """|value - expected| / |expected| in the L2 norm."""
    return ((value.double() - expected.double()).norm() / expected.double().norm()).item()


def assert_bitwise_equal(value, expected, name=""):
    """The same bits, nan included; 0 and -0 are the same."""
    torch.testing.assert_close(value, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m: f"{name}: {m}")
