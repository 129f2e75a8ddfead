"""Arrays with a checksum: what was damaged is not taken for whole."""

from pathlib import Path

import numpy as np
import pytest

from verl_dft.training import checked_array
from verl_dft.training.checked_array import is_whole, read_array, write_array


@pytest.mark.parametrize("at_once", [7, 1 << 20])
def test_cut_anywhere_or_with_a_bit_turned_anywhere(
    tmp_path: Path, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checked_array, "_AT_ONCE", at_once)
    array, path = np.arange(6, dtype=np.float32).reshape(2, 3), tmp_path / "a.npy"
    with open(path, "wb") as file:
        write_array(file, array)
    assert is_whole(path) and np.array_equal(read_array(path), array)
    assert np.array_equal(np.load(path), array) and np.array_equal(np.load(path, mmap_mode="r"), array)
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place])
        assert not is_whole(path) and read_array(path) is None, place
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not is_whole(path) and read_array(path) is None, place
    path.write_bytes(bytes(4))
    assert not is_whole(path) and read_array(path) is None
    path.unlink()
    assert not is_whole(path) and read_array(path) is None


def test_an_array_larger_than_a_buffer(tmp_path: Path) -> None:
    array, path = np.random.default_rng(0).normal(size=1_000_000), tmp_path / "a.npy"
    with open(path, "wb") as file:
        write_array(file, array)
    assert is_whole(path) and np.array_equal(read_array(path), array)
