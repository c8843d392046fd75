"""Arithmetic of PTX that numpy does not have, on arrays."""

import numpy as np


def _two_sum(a, b):
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fma_f32(a, b, c):
    """a b + c rounded once: the product is exact in float64; a sum on a tie of float32 is first rounded to odd."""
    product = a.astype(np.float64) * b.astype(np.float64)
    addend = c.astype(np.float64)
    total = np.asarray(product + addend)
    bits = total.view(np.int64)
    if np.any((bits & 0x1FFFFFFF) == 0x10000000):
        _, lost = _two_sum(product, addend)
        move = np.where((lost > 0) == (total > 0), 1, -1)
        odd = np.isfinite(lost) & (lost != 0) & (bits & 1 == 0)
        total = np.where(odd, bits + move, bits).view(np.float64)
    return total.astype(np.float32)


def _directed(total, lost, down):
    """float32 of total + lost, towards -inf where `down`, else towards 0."""
    near = total.astype(np.float32)
    wide = near.astype(np.float64)
    if down:
        return np.where((wide > total) | ((wide == total) & (lost < 0)), np.nextafter(near, np.float32(-np.inf)), near)
    away = (np.abs(wide) > np.abs(total)) | ((wide == total) & (lost * np.sign(total) < 0))
    return np.where(away, np.nextafter(near, np.float32(0)), near)


def fma_rm_f32(a, b, c):
    return _directed(*_two_sum(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64)), down=True)


def add_rz_f32(a, b):
    return _directed(*_two_sum(a.astype(np.float64), b.astype(np.float64)), down=False)


def fma_f64(a, b, c):
    """Within 2^-100 of the exact value before the last rounding, where nothing overflows."""
    product = a * b

    def halves(x):
        scaled = x * 134217729.0
        high = scaled - (scaled - x)
        return high, x - high

    a_high, a_low = halves(a)
    b_high, b_low = halves(b)
    lost = ((a_high * b_high - product) + a_high * b_low + a_low * b_high) + a_low * b_low
    total, lost_too = _two_sum(product, c)
    fixed = total + (lost_too + lost)
    return np.where(np.isfinite(fixed), fixed, product + c)


def flush(x):
    return np.where(np.abs(x) < np.float32(2.0**-126), np.copysign(np.float32(0), x), x).astype(np.float32)


def rcp_approx_f64(x):
    """Upper halves in and out, as the instruction."""
    upper = (np.asarray(x).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)
    return (np.asarray(1 / upper).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


def bf16_to_f32(x):
    return (np.asarray(x).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(x):
    bits = np.asarray(x).astype(np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FFF), rounded)


def f32_to_f16(x):
    return np.where(np.isnan(x), np.uint16(0x7FFF), np.asarray(x).astype(np.float16).view(np.uint16))


def pair(narrow, high, low):
    return (narrow(high).astype(np.uint32) << np.uint32(16)) | narrow(low).astype(np.uint32)


def f16_to_f32(x):
    return np.asarray(x).view(np.float16).astype(np.float32)


def of_pairs(function, widen, narrow, a, b):
    """function on the two 16-bit floats of each uint32"""
    result = []
    for shift in (np.uint32(16), np.uint32(0)):
        x, y = (widen(((v >> shift) & np.uint32(0xFFFF)).astype(np.uint16)) for v in (a, b))
        result.append(function(x, y))
    return pair(narrow, *result)


def masks_of_pairs(compare, widen, a, b):
    """16 bits of ones for each of the two 16-bit floats of a uint32 that compares so"""
    result = np.uint32(0)
    for shift in (np.uint32(0), np.uint32(16)):
        x, y = (widen(((v >> shift) & np.uint32(0xFFFF)).astype(np.uint16)) for v in (a, b))
        result = result | np.where(compare(x, y), np.uint32(0xFFFF) << shift, np.uint32(0))
    return result


def to_integer(x, rounding, target):
    rounded = rounding(x.astype(np.float64))
    limits = np.iinfo(target)
    top = np.nextafter(np.float64(limits.max), 0) if limits.max > 2**53 else np.float64(limits.max)
    inside = np.clip(np.where(np.isnan(rounded), 0, rounded), np.float64(limits.min), top).astype(target)
    return np.where(rounded > top, limits.max, inside).astype(target)


def divide(a, b):
    """Integers, towards 0."""
    safe = np.where(b == 0, 1, b).astype(a.dtype if hasattr(a, "dtype") else b.dtype)
    quotient = a // safe
    if np.issubdtype(safe.dtype, np.signedinteger):
        quotient = quotient + ((a % safe != 0) & ((a < 0) != (safe < 0)))
    return np.where(b == 0, -1, quotient).astype(safe.dtype)


def remainder(a, b):
    return (a - divide(a, b) * b).astype(np.asarray(a).dtype)


def shift_left(a, count, bits):
    kept = np.minimum(count, bits - 1).astype(a.dtype)
    return np.where(count >= bits, a.dtype.type(0), a << kept)


def shift_right(a, count, bits):
    kept = np.minimum(count, bits - 1).astype(a.dtype)
    shifted = a >> kept
    return shifted if np.issubdtype(a.dtype, np.signedinteger) else np.where(count >= bits, a.dtype.type(0), shifted)


def funnel_shift(low, high, count, is_left, wraps):
    """shf: 32 bits of high:low, shifted"""
    count = (count & np.uint32(31) if wraps else np.minimum(count, np.uint32(32))).astype(np.uint64)
    both = (high.astype(np.uint64) << np.uint64(32)) | low.astype(np.uint64)
    return ((both << count) >> np.uint64(32) if is_left else both >> count).astype(np.uint32)


def multiply_high(a, b):
    bits = 8 * np.asarray(a).dtype.itemsize
    if bits < 64:
        wide = np.int64 if np.issubdtype(np.asarray(a).dtype, np.signedinteger) else np.uint64
        return ((a.astype(wide) * b.astype(wide)) >> wide(bits)).astype(a.dtype)
    both = np.broadcast(a, b)
    return np.array([int(x) * int(y) >> bits for x, y in both]).astype(np.asarray(a).dtype)


def bit_field_insert(a, b, position, length):
    bits = 8 * np.asarray(b).dtype.itemsize
    kind = np.asarray(b).dtype.type
    mask = kind((1 << min(int(length), bits)) - 1) << kind(int(position))
    return (b & ~mask) | ((a << kind(int(position))) & mask)


def count_bits(a):
    """[n] integers"""
    return np.unpackbits(np.ascontiguousarray(a)[:, None].view(np.uint8), axis=1).sum(1).astype(np.uint32)


def highest_bit(a):
    """Place of the highest one, -1 where there is none (uint32)."""
    return np.where(a == 0, -1, np.floor(np.log2(np.maximum(a, 1).astype(np.float64)))).astype(np.int32)


def reverse_bits(a):
    result = np.zeros_like(a)
    for _ in range(32):
        result = (result << np.uint32(1)) | (a & np.uint32(1))
        a = a >> np.uint32(1)
    return result


def multiply_tiles(a, b, c, widen):
    """D of a warp's mma.m16n8k16, [32, 4]: A B + C, cut to float32 as tensor cores may do.

    a: [32, 4] words with two elements of A [16, 16] each, low half first; b: [32, 2] of B [16, 8]; c: [32, 4], of
    C [16, 8]. PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type".
    """
    group, place = np.divmod(np.arange(32)[:, None, None], 4)
    register, half = np.arange(4)[:, None], np.arange(2)
    tiles = np.zeros((16, 16)), np.zeros((16, 8))
    tiles[0][group + 8 * (register % 2), 2 * place + half + 8 * (register // 2)] = _elements(a, widen)
    tiles[1][2 * place + half + 8 * register[:2], group] = _elements(b, widen)
    of_result = group[..., 0] + 8 * (np.arange(4) // 2), 2 * place[..., 0] + np.arange(4) % 2
    total = (tiles[0] @ tiles[1])[of_result] + c.astype(np.float64)
    return _directed(total, 0, down=False)


def _elements(words, widen):
    """[32, n, 2] from [32, n] words."""
    return widen(np.stack([words & 0xFFFF, words >> 16], -1).astype(np.uint16)).astype(np.float64)
