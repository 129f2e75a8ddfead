"""Options: refused values, and YAML files that list every option, its default and what its values mean."""

import dataclasses
import math
import re
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_dft.errors import InputError
from verl_dft.objectives import build_objective, get_objective, list_objectives, objective_target
from verl_dft.objectives.options import check_choice, check_level, check_range, check_switch

BUILT_IN = [name for name in list_objectives() if objective_target(name).startswith("verl_dft.")]


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("dft", {"alpha": "1"}, "objective.alpha must be >= 0 (0 is SFT, 1 is DFT), got '1'"),
        ("dft", {"alpha": True}, "objective.alpha must be >= 0"),
        ("dft", {"floor": -0.1}, "objective.floor must be in [0, 1]"),
        ("dft", {"level": "word"}, "objective.level=word is not one of token, sequence"),
        ("dft", {"length_normalized": True}, "objective.length_normalized=true needs objective.level=sequence"),
        ("dft", {"level": "sequence", "length_normalized": "no"}, "objective.length_normalized must be true or false"),
        ("dft", {"exempt_tokens": "end_of_turn"}, "objective.exempt_tokens must be a list of tokens or ids"),
        ("dft", {"exempt_tokens": [1.5]}, "e.g. [end_of_turn], got [1.5]"),
        ("dft", {"exempt_tokens": [True]}, "objective.exempt_tokens must be a list"),
        ("dft", {"exempt_tokens": None}, "objective.exempt_tokens must be a list"),
        ("iw_sft", {"level": "row"}, "objective.level=row is not one of sequence, token"),
        ("iw_sft", {"temperature": -1}, "objective.temperature must be >= 0"),
        ("iw_sft", {"clamp_min": -1}, "objective.clamp_min must be >= 0"),
        ("iw_sft", {"clamp_max": math.nan}, "objective.clamp_max must be >= 0"),
        ("iw_sft", {"clamp_min": 2.0, "clamp_max": 1.0}, "objective.clamp_min=2.0 is above objective.clamp_max=1.0"),
        ("iw_sft", {"level": "token", "clamp_min": 1.9}, "objective.clamp_min=1.9 is above objective.clamp_max=1.8"),
        ("iw_sft", {"policy": "old"}, "objective.policy=old is not one of current, ema"),
        ("iw_sft", {"ema_decay": 1.1}, "objective.ema_decay must be in [0, 1]"),
        ("is_sft", {"behavior": "expert"}, "objective.behavior=expert is not one of one, self, all"),
        ("is_sft", {"clip": -1}, "objective.clip must be >= 0"),
        ("asft", {"kl_weight": -0.1}, "objective.kl_weight must be >= 0 (lambda;"),
        ("asft", {"kl": "k1"}, "objective.kl=k1 is not one of full, k3"),
        ("asft", {"weight": "none"}, "objective.weight=none is not one of dft, sft"),
        ("psft", {"eps_low": 1.5}, "objective.eps_low must be in [0, 1]"),
        ("psft", {"eps_high": -0.1}, "objective.eps_high must be >= 0"),
        ("psft", {"use_advantage": "yes"}, "objective.use_advantage must be true or false, got 'yes'"),
        ("gft", {"tau": -1}, "objective.tau must be >= 0 (0.7 is the paper"),
        ("gft", {"level": None}, "objective.level=None is not one of token, sequence"),
        ("gft", {"length_normalized": True}, "a token has no length"),
        ("gft", {"strict": 1}, "objective.strict must be true or false, got 1"),
        ("gft", {"no_dcr": "x"}, "objective.no_dcr must be true or false"),
        ("gft", {"no_gal": "x"}, "objective.no_gal must be true or false"),
        ("chord", {"cutoff": 0.0}, "objective.cutoff must be in [1e-06, 1]"),
        ("chord", {"cutoff": 1.1}, "objective.cutoff must be in"),
        ("focal", {"gamma": -1}, "objective.gamma must be >= 0"),
        ("focal", {"stop_gradient": 0}, "objective.stop_gradient must be true or false, got 0"),
        ("eaft", {"alpha": -1}, "objective.alpha must be >= 0"),
        ("eaft", {"scale": -1}, "objective.scale must be >= 0"),
        ("eaft", {"scale": 0}, "objective.scale must be above 0"),
        ("chord_mix", {"phi": 1}, "objective.phi must be true or false, got 1"),
        ("chord_mix", {"eps_low": 1.5}, "objective.eps_low must be in [0, 1] (0.2 is PPO's, 1 is off)"),
        ("chord_mix", {"eps_high": -0.1}, "objective.eps_high must be >= 0 (0.2 is PPO's, inf is off)"),
        ("luffy", {"gamma": 0.0}, "objective.gamma must be >= 1e-06 (0.1 is the paper, null is off), got 0.0"),
        ("luffy", {"eps_low": 1.5}, "objective.eps_low must be in [0, 1] (0.2 is PPO's, 1 is off)"),
        ("luffy", {"eps_high": -0.1}, "objective.eps_high must be >= 0 (0.2 is PPO's, inf is off)"),
        ("psft", {"eps": 0.1}, "no option 'eps'; valid: eps_low, eps_high, use_advantage"),
        ("sft", {"alpha": 1}, "no option 'alpha'; valid: none"),
    ],
    ids=str,
)
def test_a_value_that_cannot_be_meant_is_refused(name: str, options: dict[str, Any], words: str) -> None:
    with pytest.raises(InputError) as error:
        get_objective(name, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_ends_of_ranges_are_allowed() -> None:
    for name, options in (
        ("dft", {"floor": 1.0, "alpha": 0}),
        ("iw_sft", {"temperature": 0, "clamp_min": 1, "clamp_max": 1, "ema_decay": 1.0}),
        ("psft", {"eps_low": 1.0, "eps_high": 0}),
        ("chord", {"cutoff": 1.0}),
        ("chord_mix", {"eps_low": 1.0, "eps_high": 0}),
        ("luffy", {"gamma": 1e-6, "eps_low": 1.0, "eps_high": 0}),
        ("is_sft", {"clip": 0}),
    ):
        get_objective(name, **options)
    check_range("x", math.inf)
    check_choice("x", "a", ("a", "b"))
    check_switch("x", False)
    check_level("sequence", True)


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_yaml_lists_every_option_with_its_default_and_a_comment(name: str, repo_root: Path) -> None:
    path = repo_root / "configs" / "objective" / f"{name}.yaml"
    config = OmegaConf.to_container(OmegaConf.load(path))
    assert config["_target_"] == objective_target(name)
    objective = build_objective(config)
    options = {f.name: f.default for f in dataclasses.fields(objective)}
    listed = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
    assert list(listed) == ["_target_", *options] and listed == {"_target_": objective_target(name), **options}
    assert objective == get_objective(name)
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ") and max(map(len, lines)) <= 120
    for option in options:
        (line,) = [line for line in lines if line.startswith(f"{option}: ")]
        assert re.search(r" # .{10,}", line), f"{option} has no comment"
        assert isinstance(options[option], bool) or ("=" in line.split("#")[1]), f"{option}: which value is what?"


@pytest.mark.parametrize("name", BUILT_IN)
def test_every_option_has_a_docstring_and_every_objective_a_reference(name: str) -> None:
    cls = type(get_objective(name))
    source = Path(__import__(cls.__module__, fromlist=["_"]).__file__).read_text()
    assert "References:" in cls.__doc__ and ".. math::" in cls.__doc__ and "Reads ``logp``" in cls.__doc__
    for f in dataclasses.fields(cls):
        assert re.search(rf'\n    {f.name}: .*\n    """', source), f"{f.name} has no docstring"


def test_objectives_compare_and_hash_by_their_options() -> None:
    assert get_objective("dft", exempt_tokens=["a"]) == get_objective("dft", exempt_tokens=("a",))
    assert len({get_objective("gft"), get_objective("gft"), get_objective("gft", tau=0.1)}) == 2
