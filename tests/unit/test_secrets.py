"""Keys, tokens and passwords are in no file that a command writes and in nothing that it prints."""

import sys
from pathlib import Path

import pytest

from verl_dft.cli import main
from verl_dft.errors import InputError
from verl_dft.redact import redacted, redacted_values

WANDB, HUB, OTHER, TYPED = "0123abcd" * 5, "hf_QwErTyUiOpAsDfGh", "sk-endpoint-key-000111", "typed-on-the-line"
SECRETS = (WANDB, HUB, OTHER, TYPED, "hunter22secret")


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("WANDB_API_KEY", WANDB), ("HF_TOKEN", HUB), ("TEACHER_KEY", OTHER)):
        monkeypatch.setenv(name, value)


def commands(folder: Path) -> list[list[str]]:
    """Commands that need no model, whose lines hold secrets in every way that one could type them."""
    rows, url = folder / "rows", "http://me:hunter22secret@127.0.0.1/x"
    typed = [f"+note.api_key={TYPED}", f"+note.url={url}", f"+note.token={HUB}", f"+note.other={OTHER}"]
    return [
        [
            "data",
            "make",
            "data=arithmetic",
            "data.source.num_rows=8",
            "data.source.num_val=4",
            f"output_dir={rows}",
            *typed,
        ],
        ["data", "make", f"data={rows}/problems.jsonl", f"output_dir={folder}/again", *typed],
        ["data", "check", "benchmark=arithmetic", f"output_dir={folder}/check", *typed],
        ["recipe", "run", "study/claims", "scale=tiny", "--dry-run"],
        ["sample", "model=/no/model", "data=arithmetic", f"output_dir={folder}/s", *typed],
        ["evaluate", "model=/no/model", "benchmark=arithmetic", f"output_dir={folder}/e", *typed],
        ["reject", f"samples={folder}/none", f"output_dir={folder}/r", *typed],
        ["doctor", "--json"],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "number", [*range(3), *range(4, 7), *(pytest.param(n, marks=pytest.mark.nightly) for n in (3, 7))]
)
def test_no_command_tells(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    wanted = commands(tmp_path)
    for argv in [wanted[0], wanted[number]]:
        monkeypatch.setattr(sys, "argv", ["verl-dft", *argv])
        main(argv)
    printed = "".join(capfd.readouterr())
    written = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) >= 4 and any(b"api_key=***" in data for data in written)
    for secret in SECRETS:
        assert secret not in printed and not [data for data in written if secret.encode() in data]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        (f"a {WANDB} b", "a *** b"),
        ("http://u:p@h/x https://h/y user@h", "http://***@h/x https://h/y user@h"),
        ("trainer.wandb_api_key=abc max_tokens=110", "trainer.wandb_api_key=*** max_tokens=110"),
        ('{"api_key": "abc", "api_key_env": "TEACHER_KEY"}', '{"api_key": "***", "api_key_env": "TEACHER_KEY"}'),
        ('{"api_key": null}', '{"api_key": null}'),
        ("db_password='x y'", "db_password='*** y'"),
        ("key=1 token=2 monkey=banana", "key=1 token=2 monkey=banana"),
    ],
)
def test_what_is_a_secret(text: str, shown: str) -> None:
    assert redacted(text) == shown


def test_short_values_and_paths_are_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "EMPTY")
    monkeypatch.setenv("SSH_KEY", "/home/somebody/.ssh/id")
    assert redacted("the set is EMPTY /home/somebody/.ssh/id") == "the set is EMPTY /home/somebody/.ssh/id"


def test_a_result_is_gone_on_with_whatever_the_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    from verl_dft.sampling.folder import identity

    before = identity({"url": "http://u:one@h", "n": 1})
    assert before == identity({"url": "http://u:two@h", "n": 1}) and before["url"] == "http://***@h"


def test_values_of_a_configuration() -> None:
    config = {"db_password": 12345678, "api_key": None, "endpoint": {"api_key": "$KEY", "urls": ["http://u:p@h", 3.5]},
              OTHER: OTHER, "passwords": ["a"], "secret": ["b", "c"]}  # fmt: skip
    shown = {"db_password": "***", "api_key": None, "endpoint": {"api_key": "$KEY", "urls": ["http://***@h", 3.5]},
             "***": "***", "passwords": ["a"], "secret": ["***", "***"]}  # fmt: skip
    assert redacted_values(config) == shown
    assert redacted_values(shown) == shown


def test_a_training_is_gone_on_with_whatever_the_secret(tmp_path: Path) -> None:
    from omegaconf import OmegaConf

    from verl_dft.training.setup import as_recorded, check_output

    def config(secret: str, rate: float = 1e-5) -> OmegaConf:
        return OmegaConf.create({"optim": {"lr": rate}, "note": {"password": secret, "url": f"http://me:{secret}@h"}})

    (tmp_path / "config.yaml").write_text(as_recorded(config("hunter22secret")))
    (tmp_path / "metrics.jsonl").touch()
    assert "hunter" not in (tmp_path / "config.yaml").read_text()
    check_output(config("another"), tmp_path)
    with pytest.raises(InputError, match=r"another configuration .optim.lr: 1e-05 there, 0.0001 here"):
        check_output(config("another", 1e-4), tmp_path)
    (tmp_path / "config.yaml").write_text(OmegaConf.to_yaml(config("of-an-earlier-version")))
    check_output(config("another"), tmp_path)
