"""An array as ``.npy`` with the file's CRC-32 behind it, so that a turned bit is seen; ``numpy.load`` reads it too."""

import io
import zlib
from pathlib import Path
from typing import IO

import numpy as np

_CHECKSUM = 4
"""Bytes of the checksum, the least significant first."""
_AT_ONCE = 1 << 20


class _Summed:
    """A file that sums up what goes through it."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.sum = file, 0

    def write(self, data: bytes) -> int:
        self.sum = zlib.crc32(data, self.sum)
        return self.file.write(data)


def write_array(file: IO[bytes], array: np.ndarray) -> None:
    """Write an array and its checksum into a file opened for it, without a copy of the whole."""
    summed = _Summed(file)
    np.save(summed, array)
    file.write(summed.sum.to_bytes(_CHECKSUM, "little"))


def read_array(path: Path) -> np.ndarray | None:
    """The array, or None where the file is missing or damaged."""
    try:
        written = path.read_bytes()
    except OSError:
        return None
    array, checksum = written[:-_CHECKSUM], written[-_CHECKSUM:]
    if not array or zlib.crc32(array).to_bytes(_CHECKSUM, "little") != checksum:
        return None
    return np.load(io.BytesIO(array))


def is_whole(path: Path) -> bool:
    """Whether the file is there and agrees with its checksum; it is read part by part."""
    try:
        with open(path, "rb") as file:
            left, found = path.stat().st_size - _CHECKSUM, 0
            if left <= 0:
                return False
            while left and (part := file.read(min(left, _AT_ONCE))):
                found, left = zlib.crc32(part, found), left - len(part)
            return file.read() == found.to_bytes(_CHECKSUM, "little")
    except OSError:
        return False
