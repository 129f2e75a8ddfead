"""Names and classes: what is registered, what a package of the user's adds, and what is refused."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from verl_dft import objectives
from verl_dft.errors import InputError
from verl_dft.objectives import TokenBatch, TokenLoss, build_objective, get_objective, list_objectives, objective_name


@dataclass
class Mine:
    """An objective of the user's."""

    tau: float
    requires: ClassVar[frozenset[str]] = frozenset()

    def __call__(self, batch: TokenBatch) -> TokenLoss: ...


class Bare:
    requires = frozenset({"advantage"})

    def __init__(self, tau: float = 1.0) -> None:
        self.tau = tau


class Listed:
    requires = ["advantage"]


class Unheard:
    requires = frozenset({"mood"})


class Greedy:
    requires = frozenset(objectives.OPTIONAL_FIELDS)


class Silent:
    pass


def add_entry_points(monkeypatch: pytest.MonkeyPatch, folder: Path, **targets: str) -> None:
    """Install the metadata of a package with these entry points."""
    info = folder / "their_package-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: their-package\nVersion: 1.0\n")
    lines = [f"{name} = {value}" for name, value in targets.items()]
    (info / "entry_points.txt").write_text("\n".join(["[verl_dft.objectives]", *lines, ""]))
    monkeypatch.syspath_prepend(folder)


def test_every_built_in_name_builds() -> None:
    assert list_objectives() == sorted(list_objectives()) and len(list_objectives()) >= 10
    for name in list_objectives():
        objective = get_objective(name)
        assert objective_name({"_target_": objectives.objective_target(name)}) == name
        assert isinstance(objective, objectives.Objective)


def test_a_package_adds_its_own(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_entry_points(monkeypatch, tmp_path, mine=f"{__name__}:Mine")
    assert "mine" in list_objectives() and "dft" in list_objectives()
    assert get_objective("mine", tau=0.5) == Mine(0.5)
    assert objective_name({"_target_": f"{__name__}.Mine"}) == "mine"


def test_a_package_may_not_take_our_names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    add_entry_points(monkeypatch, tmp_path, dft=f"{__name__}:Mine", sft=f"{__name__}:Mine", mine=f"{__name__}:Mine")
    with pytest.raises(InputError, match="reuse the built-in name.s. dft, sft; rename them"):
        list_objectives()


def test_a_class_by_its_path() -> None:
    assert build_objective({"_target_": f"{__name__}.Mine", "tau": 2}) == Mine(2)
    assert build_objective({"_target_": f"{__name__}.Bare", "tau": 2}).tau == 2
    assert len(build_objective({"_target_": f"{__name__}.Greedy"}).requires) == len(objectives.OPTIONAL_FIELDS)
    assert objective_name({"_target_": f"{__name__}.Mine"}) == "mine"


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"_target_": "???"}, "objective._target_ is not set"),
        ({}, "objective._target_ is not set; give a class"),
        ({"_target_": "no.such.Loss"}, "cannot import objective 'no.such.Loss'"),
        ({"_target_": "Loss"}, "cannot import objective 'Loss'"),
        ({"_target_": f"{__name__}.Missing"}, "built-in names: asft, chord"),
        ({"_target_": f"{__name__}.Mine"}, "missing 1 required positional argument: 'tau'"),
        ({"_target_": f"{__name__}.Mine", "rho": 1}, "has no option 'rho'; valid: tau"),
        ({"_target_": f"{__name__}.Mine", "requires": 1}, "has no option 'requires'; valid: tau"),
        ({"_target_": f"{__name__}.Bare", "rho": 1}, "unexpected keyword argument 'rho'"),
        ({"_target_": f"{__name__}.Listed"}, "`requires` must be a frozenset of advantage, ref_logp"),
        ({"_target_": f"{__name__}.Unheard"}, "got frozenset({'mood'})"),
        ({"_target_": f"{__name__}.Silent"}, "got None"),
    ],
    ids=str,
)
def test_what_is_refused(config: dict, words: str) -> None:
    with pytest.raises(InputError) as error:
        build_objective(config)
    assert words in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "hint"), [("gtf", " Did you mean 'gft'?"), ("zzzz", "")])
def test_an_unknown_name_is_answered_with_the_valid_ones(name: str, hint: str) -> None:
    with pytest.raises(InputError) as error:
        get_objective(name)
    assert str(error.value) == f"unknown objective {name!r}; valid: {', '.join(list_objectives())}.{hint}"
