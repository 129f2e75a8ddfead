"""No code of a model's folder is run, and no port is open to others, unless somebody asks for it."""

import ast
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from verl_dft.recipes.verbs import _CHECKS

GIVEN = ["model=/some/folder", "data=/some/rows.jsonl", "output_dir=/never/made"]
PACKAGE = Path(__file__).resolve().parents[2] / "verl_dft"


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


def values(config: Any, name: str) -> list[Any]:
    if isinstance(config, list):
        return [found for item in config for found in values(item, name)]
    if not isinstance(config, dict):
        return []
    below = [found for value in config.values() for found in values(value, name)]
    return [*below, *([config[name]] if name in config else [])]


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["sample", "rewrite", "groups", "score", "train", "rl", "evaluate"])
def test_trust_remote_code_is_off(verb: str) -> None:
    argv = [GIVEN[0], "benchmark=arithmetic", GIVEN[2]] if verb == "evaluate" else GIVEN
    for config in _CHECKS[verb](argv):
        found = values(OmegaConf.to_container(config, resolve=True, throw_on_missing=False), "trust_remote_code")
        assert found and not any(found)


def test_trust_remote_code_is_off_for_dpo() -> None:
    (config,) = _CHECKS["train"]([*GIVEN, "objective=dpo"])
    assert config.model.trust_remote_code is False


def test_no_line_of_ours_switches_it_on() -> None:
    """What is loaded gets it from a configuration, or not at all; a parameter's default is off."""
    calls = 0
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                calls += isinstance(node.func, ast.Attribute) and node.func.attr == "from_pretrained"
                given = [word.value for word in node.keywords if word.arg == "trust_remote_code"]
                assert not any(isinstance(value, ast.Constant) and value.value for value in given), path
            elif isinstance(node, ast.FunctionDef):
                names = [argument.arg for argument in node.args.args][::-1]
                for name, default in zip(names, node.args.defaults[::-1], strict=False):
                    assert name != "trust_remote_code" or (isinstance(default, ast.Constant) and not default.value), (
                        path
                    )
    assert calls >= 8


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["train", "rl"])
def test_ray_listens_on_loopback_and_has_no_dashboard(launcher: str) -> None:
    """With what is given to ``ray.init``; that Ray keeps to it is seen in test_replica_actors.py."""
    from verl_dft.training import sft_ray
    from verl_dft.training.online import driver

    (config,) = _CHECKS[launcher]([*GIVEN, "launcher=ray"] if launcher == "train" else GIVEN)
    options = (sft_ray if launcher == "train" else driver).ray_options
    found = options(config)
    assert found["_node_ip_address"] == "127.0.0.1" and found["include_dashboard"] is False
    key = "+ray_init.include_dashboard=true" if launcher == "train" else "+ray_kwargs.ray_init.include_dashboard=true"
    (config,) = _CHECKS[launcher]([*GIVEN, *(["launcher=ray"] if launcher == "train" else []), key])
    assert options(config)["include_dashboard"] is True
