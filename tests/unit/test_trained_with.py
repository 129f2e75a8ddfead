"""A model asked otherwise than it was trained is told of: another chat template, turns that it has never seen."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from data_helpers import FAMILIES, family

from verl_dft.data.records import Row, write_rows
from verl_dft.data.turns import RECORD, adds_system_turn, rendered_turns, template_sha256, trained_with
from verl_dft.errors import InputError
from verl_dft.evaluation.trained_with import read_record, training_warnings
from verl_dft.files import write_json

# what each family documents: Qwen and SmolLM2 write a system turn where none is given
ADDS_SYSTEM = {"qwen2", "qwen2-base", "smollm2"}
DEEPSEEK_MATH = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ 'Assistant: ' + m['content'] + eos_token }}"
    "{% else %}{{ m['content'] + '\n\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
REFUSING = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + DEEPSEEK_MATH
# as Llama 3.1's: the system turn is always there, and a given text is put into it
ALWAYS = (
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday: 26 Jul 2024\n\n' }}"
    "{% if messages[0]['role'] == 'system' %}{{ messages[0]['content'] }}{% set messages = messages[1:] %}{% endif %}"
    "{{ '<|eot_id|>' }}"
    "{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] }}"
    "{{ '<|eot_id|>' }}{% endfor %}"
)
IGNORING = "{% for m in messages %}{% if m['role'] != 'system' %}{{ m['content'] }}{% endif %}{% endfor %}"


def with_template(template: str):
    tokenizer = family("llama3")
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize("name", FAMILIES)
def test_a_templates_own_system_turn_is_found(name: str) -> None:
    assert adds_system_turn(family(name)) == (name in ADDS_SYSTEM)


@pytest.mark.parametrize(
    ("template", "adds"),
    [(DEEPSEEK_MATH, False), (REFUSING, False), (ALWAYS, True), (IGNORING, False)],
    ids=["deepseek-math", "refusing", "always", "ignoring"],
)
def test_other_forms_of_a_system_turn(template: str, adds: bool) -> None:
    assert adds_system_turn(with_template(template)) == adds


def test_turns_as_rendered() -> None:
    assert rendered_turns(["user"], adds_system=False) == "user"
    assert rendered_turns(["user"], adds_system=True) == "system user"
    assert rendered_turns(["system", "user"], adds_system=True) == "system user"
    assert rendered_turns(["user", "assistant", "user"], adds_system=False) == "user assistant user"


def rows(path: Path, *roles: str, count: int = 2) -> Path:
    turns = [{"role": role, "content": f"{role} says"} for role in (*roles, "assistant")]
    return write_rows(path, [Row(turns, f"{path.stem}-{i}", "expert") for i in range(count)])


def trained(folder: Path, tokenizer, *files: Path) -> str:
    """A model's folder as far as the check reads it: the tokenizer, and the record of its training."""
    tokenizer.save_pretrained(folder)
    write_json(folder / RECORD, trained_with(files, tokenizer))
    return str(folder)


def test_the_record_counts_the_turns_of_every_file(tmp_path: Path) -> None:
    alone, system = rows(tmp_path / "a.parquet", "user", count=3), rows(tmp_path / "b.parquet", "system", "user")
    lines = tmp_path / "c.jsonl"
    lines.write_text(json.dumps({"messages": [{"role": "user", "content": "q"}], "response_ids": [1]}) + "\n")
    record = trained_with([alone, system, lines], family("llama3"))
    assert record["turns"] == {"user": 4, "system user": 2} and list(record["turns"])[0] == "user"
    assert record["chat_template_sha256"] == template_sha256(family("llama3")) and record["prompts"] == []
    assert trained_with([alone, system], family("qwen2"))["turns"] == {"system user": 5}


def test_the_record_names_the_prompt_of_rows_made_from_problems(tmp_path: Path) -> None:
    from verl_dft.config import compose
    from verl_dft.data.prepare import prepare_rows

    config = compose("data", ["data=arithmetic", "data.source.num_rows=4", "data.prompt=qwen-boxed"])
    prepared = prepare_rows(config.data, tmp_path)
    record = trained_with(prepared.train, family("llama3"))
    assert record["prompts"] == ["qwen-boxed"] and record["turns"] == {"system user": 4}


def test_asked_as_trained_there_is_nothing_to_warn_of(tmp_path: Path) -> None:
    """The tokenizer is saved and loaded between, as an export and an evaluation do; the texts may differ."""
    from transformers import AutoTokenizer

    for name in FAMILIES:
        model = trained(tmp_path / name, family(name), rows(tmp_path / f"{name}.parquet", "user"))
        assert training_warnings(model, AutoTokenizer.from_pretrained(model), ["user"]) == []
    qwen = str(tmp_path / "qwen2")  # its template adds a system turn in training and has one here
    assert training_warnings(qwen, AutoTokenizer.from_pretrained(qwen), ["system", "user"]) == []


def test_another_template_is_warned_of(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    model = trained(tmp_path / "model", family("llama3"), rows(tmp_path / "a.parquet", "user"))
    (tmp_path / "model" / "chat_template.jinja").write_text(FAMILIES["no-generation"]["template"])
    (warning,) = training_warnings(model, AutoTokenizer.from_pretrained(model), ["user"])
    assert warning.startswith(f"the chat template is not the one that {model} was trained with (trained_with.json)")


def test_turns_that_training_never_had_are_warned_of(tmp_path: Path) -> None:
    tokenizer = family("llama3")
    model = trained(tmp_path / "model", tokenizer, rows(tmp_path / "a.parquet", "user", count=3))
    (warning,) = training_warnings(model, tokenizer, ["system", "user"])
    assert "'system user', in none of the 3 rows counted in training, which have 'user';" in warning
    both = trained(
        tmp_path / "both",
        tokenizer,
        rows(tmp_path / "b.parquet", "user"),
        rows(tmp_path / "c.parquet", "system", "user"),
    )
    assert training_warnings(both, tokenizer, ["system", "user"]) == []


def test_a_model_without_a_record_is_compared_with_nothing(tmp_path: Path) -> None:
    tokenizer = family("llama3")
    assert read_record(str(tmp_path)) is None and read_record("some/hub-name") is None
    assert training_warnings("some/hub-name", tokenizer, ["system", "user"]) == []


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"chat_template_sha256": "a", "turns": ["user"], "prompts": []}'])
def test_a_damaged_record_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(InputError, match="trained_with.json is damaged"):
        read_record(str(tmp_path))
