"""What a disk does to files: cut off, bits turned, lines half written, no room."""

import os
import random
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cut(path: Path, rng: random.Random) -> str:
    """Take away some of the end of a file."""
    size = path.stat().st_size
    kept = rng.randrange(size)
    os.truncate(path, kept)
    return f"{path.name} cut from {size} to {kept} bytes"


def turn_bit(path: Path, rng: random.Random, first: int, last: int) -> str:
    """Turn one bit between two places of a file."""
    content, at = bytearray(path.read_bytes()), rng.randrange(first, last)
    content[at] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return f"{path.name}: a bit of byte {at} of {len(content)} turned"


def row_group(path: Path, rng: random.Random) -> str:
    """Damage a column of a row group: a bit, 64 bytes of zeros, or all of the file from there on."""
    import pyarrow.parquet as pq

    with pq.ParquetFile(path) as file:
        group = file.metadata.row_group(rng.randrange(file.metadata.num_row_groups))
        column = group.column(rng.randrange(group.num_columns))
    first = column.data_page_offset
    if column.dictionary_page_offset is not None:
        first = min(first, column.dictionary_page_offset)
    last = first + column.total_compressed_size
    where = f" (column {column.path_in_schema})"
    how = rng.choice(["bit", "bit", "zeros", "cut"])
    if how == "bit":
        return turn_bit(path, rng, first, last) + where
    at = rng.randrange(first, last)
    content = path.read_bytes()
    kept = content[:at] + bytes(min(64, last - at)) + content[min(at + 64, last) :] if how == "zeros" else content[:at]
    path.write_bytes(kept)
    return f"{path.name}: {'zeros' if how == 'zeros' else 'nothing'} from byte {at} on{where}"


def half_line(path: Path, rng: random.Random) -> str:
    """Leave half of a file's last line; a whole line more is begun where there is but one."""
    content = path.read_bytes()
    start = content.rstrip(b"\n").rfind(b"\n") + 1
    kept = rng.randrange(start + 1, len(content)) if len(content) > start + 1 else len(content)
    os.truncate(path, kept)
    return f"{path.name}: {kept - start} of {len(content) - start} bytes of the last line kept"


def can_mount() -> bool:
    """Whether this user may mount a file system of a given size."""
    return os.geteuid() == 0 and subprocess.run(["mount", "--version"], capture_output=True).returncode == 0


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[None]:
    """A file system of ``size`` bytes at ``folder``."""
    folder.mkdir(parents=True)
    _mount("-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder))
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=False)


def make_room(folder: Path) -> None:
    """Give the file system of :func:`small_disk` plenty of room."""
    _mount("-o", "remount,size=1g", str(folder))


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True, capture_output=True)
