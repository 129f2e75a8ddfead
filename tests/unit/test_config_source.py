"""Configuration files are parsed once, and again when they change."""

import os
from pathlib import Path

import pytest
import yaml

from verl_dft.config import compose
from verl_dft.errors import InputError


def write(file: Path, rate: str) -> None:
    file.write_text(f"defaults: [sft, _self_]\noptim: {{lr: {rate}}}\n")


def test_a_file_that_changed_is_read_again(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    write(file, "1e-4")
    before = file.stat()
    assert compose(str(file), []).optim.lr == 1e-4
    write(file, "3e-4")  # of the same size
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns + 1))
    assert compose(str(file), []).optim.lr == 3e-4
    file.unlink()
    with pytest.raises(InputError, match=r"mine\.yaml does not exist"):
        compose(str(file), [])


def test_what_is_done_to_one_config_is_not_seen_by_the_next(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    write(file, "1e-4")
    config = compose(str(file), ["objective=dft"])
    config.optim.lr, config.objective.alpha = 7.0, 7.0
    again = compose(str(file), ["objective=dft"])
    assert (again.optim.lr, again.objective.alpha) == (1e-4, 1.0)
    assert compose(str(file), ["objective=sft"]).objective._target_ == "verl_dft.objectives.sft.SFT"


def test_files_are_parsed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "mine.yaml"
    write(file, "1e-4")
    compose(str(file), [])
    parsed: list[str] = []
    real = yaml.load
    monkeypatch.setattr(yaml, "load", lambda stream, *a, **k: parsed.append(stream.name) or real(stream, *a, **k))
    compose(str(file), [])
    assert not [name for name in parsed if "hydra" not in name]
    compose(str(file), ["objective=psft"])
    assert [Path(name).name for name in parsed if "hydra" not in name] == ["psft.yaml"]
