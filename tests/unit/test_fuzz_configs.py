"""Any command line is a configuration or one line that names what is wrong with it; never another exception."""

import random

import pytest
from omegaconf import OmegaConf

from verl_dft.config import blamed, compose
from verl_dft.errors import InputError
from verl_dft.recipes.verbs import _CHECKS

GIVEN = ["model=/some/folder", "data=/some/rows.jsonl", "output_dir=/never/made"]
VERBS = {
    "data make": ["data=arithmetic", GIVEN[2]], "sample": [*GIVEN, "n=2"], "reject": ["samples=/x", GIVEN[2]],
    "rewrite": GIVEN, "groups": GIVEN, "score": GIVEN, "train": GIVEN, "rl": GIVEN,
    "evaluate": [GIVEN[0], "benchmark=arithmetic", GIVEN[2]], "compare": ["/a", "/b"],
}  # fmt: skip
VALUES = [
    "null", "true", "-1", "0", "1.5", "1e400", "nan", "[]", "[1]", "{}", "{a: 1}", "text", "''", "é🙂",
    "9" * 30, "[[[]]]", "${nowhere}", "${oc.env:NO_SUCH_VARIABLE}", "${data}", "???", "[", "{", "'", "\\", "a=b",
    "${", "x" * 5000, "~", "*", "../../etc/passwd", "!!python/object:os.system", "@", "\ud800", "a\nb", "", "\x00",
]  # fmt: skip
KEYS = [
    "", "=", "+", "~", "a", "a..b", ".a", "data", "model", "objective", "objective._target_", "hydra.run.dir", "x@y",
    "/a", "--config-name", "--config-name=", "~data", "++optim.lr", "\x00", "k[0]", "🙂", "-", "--no",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")


def composed_or_refused(verb: str, overrides: list[str]) -> bool:
    try:
        _CHECKS[verb]([*VERBS[verb], *overrides])
    except InputError as error:
        message = str(error)
        assert message.isprintable() and message.strip() and len(message) < 2000, message
        return False
    return True


def keys_of(config: dict, prefix: str = "") -> list[str]:
    below = [
        key for name, value in config.items() if isinstance(value, dict) for key in keys_of(value, f"{prefix}{name}.")
    ]
    return [*(f"{prefix}{name}" for name in config), *below]


def cases(verb: str, count: int) -> None:
    chance = random.Random(verb)
    found = _CHECKS[verb](VERBS[verb])
    keys = keys_of(OmegaConf.to_container(found[0], resolve=False)) if found else ["a"]
    outcomes = []
    for _ in range(count):
        key = chance.choice(keys) if chance.random() < 0.8 else chance.choice(KEYS)
        overrides = [f"{key}={chance.choice(VALUES)}" if chance.random() < 0.9 else chance.choice(KEYS)]
        outcomes.append(composed_or_refused(verb, overrides))
    assert not all(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("verb", ["data make", "evaluate", "compare"])
def test_any_override_of_a_small_command(verb: str) -> None:
    cases(verb, 6)


@pytest.mark.nightly
@pytest.mark.slow
@pytest.mark.parametrize("verb", VERBS)
def test_any_override(verb: str) -> None:
    cases(verb, 100)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("verb", "override"),
    [
        ("data make", "data=1.5"),
        ("data make", "+=x"),
        ("sample", "output_dir=???"),
        ("reject", "rejected=null"),
        ("reject", "prompt={a: 1}"),
        ("evaluate", "benchmark.limit=???"),
        ("rewrite", "guided=1.5"),
        ("train", "data.train_batch_size=???"),
        ("train", "data.mini_batch_size=inf"),
        ("train", "engine.ulysses_sequence_parallel_size=null"),
        ("compare", "a=" + "x" * 5000),
    ],
)
def test_what_once_was_a_traceback(verb: str, override: str) -> None:
    assert not composed_or_refused(verb, [override])


def test_the_override_to_blame_is_named() -> None:
    @blamed
    def check(argv: list[str]) -> int:
        return sum(int(item.partition("=")[2]) for item in argv)

    assert check(["a=1", "b=2"]) == 3
    with pytest.raises(InputError, match=r"^'b=x' cannot be used \(ValueError: invalid literal"):
        check(["a=1", "b=x", "c=3"])
    with pytest.raises(InputError, match=r"^'b=x' 'c=y' cannot be used together"):
        check(["b=x", "c=y"])


def test_a_resolver_runs_nothing() -> None:
    """OmegaConf reads the environment where it is asked to; nothing that a value can name runs code."""
    config = compose("sample", ["prompt='!!python/object/apply:os.system [true]'"])
    assert config.prompt == "!!python/object/apply:os.system [true]"
    with pytest.raises(InputError):
        compose("sample", ["prompt=${python:os.system}"])
