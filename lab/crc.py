"""CRC32C as FEAT_CRC32 computes it: reflected, and not inverted at the end."""

from __future__ import annotations

POLYNOMIAL = 0x82F63B78
START = 0xFFFFFFFF
ONE = 1 << 31  # the polynomial 1, bits reversed


def crc32c(data: bytes, crc: int = START) -> int:
    """Fold `data` into `crc`."""
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ crc >> 8
    return crc


def change(difference: int, behind: int) -> int:
    """What to xor to a CRC when a byte that `behind` bytes follow is xored with `difference`."""
    return _times(crc32c(bytes([difference]), 0), _power(8 * behind))


def _times(a: int, b: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if a >> bit & 1:
            product ^= b
        b = b >> 1 ^ (POLYNOMIAL if b & 1 else 0)
    return product


def _power(n: int) -> int:
    """x to the n-th."""
    result, square = ONE, ONE >> 1
    while n:
        if n & 1:
            result = _times(result, square)
        square = _times(square, square)
        n >>= 1
    return result


def _row(byte: int) -> int:
    for _ in range(8):
        byte = byte >> 1 ^ (POLYNOMIAL if byte & 1 else 0)
    return byte


_TABLE = [_row(byte) for byte in range(256)]
