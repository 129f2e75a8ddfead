"""What a process imports before it has anything to do with it. Never times: those are in scripts/bench_startup.py."""

import subprocess
import sys

import pytest

from verl_dft.platform.hooks import refuse_import

HEAVY = ("torch", "verl", "vllm", "ray", "transformers", "datasets", "pyarrow", "numpy", "hydra")


def loaded(code: str, names: tuple[str, ...]) -> set[str]:
    """Which of ``names`` are loaded after ``code`` ran in a fresh process."""
    code += f"\nimport sys; print('LOADED', *(set({names!r}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=True)
    return set(next(line for line in done.stdout.splitlines() if line.startswith("LOADED")).split()[1:])


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["sample", "--help"], ["no-such-verb"]])
def test_help_imports_nothing_heavy(argv: list[str]) -> None:
    assert loaded(f"import verl_dft.cli as c; c.main({argv!r})", HEAVY) == set()


def test_doctor_itself_leaves_the_heavy_imports_to_its_probes() -> None:
    assert loaded("import verl_dft.doctor", HEAVY) == set()


CHOICES = """
import sys, verl_dft.training.sft
from transformers import LlamaConfig, Qwen2Config, Qwen2VLConfig
from verl.utils.model import get_hf_auto_model_class as choose
name = lambda kind, *of: choose(kind(architectures=list(of))).__name__
assert name(Qwen2Config, "Qwen2ForCausalLM") == "AutoModelForCausalLM"
assert name(LlamaConfig, "LlamaForTokenClassification") == "AutoModelForTokenClassification"
assert "transformers.models.mllama" not in sys.modules, "every vision model was imported"
assert name(Qwen2VLConfig, "Qwen2VLForConditionalGeneration") == "AutoModelForImageTextToText"
assert name(LlamaConfig, "LlamaModel") == "AutoModel"
"""


@pytest.mark.slow
def test_a_training_process_imports_no_vllm_and_finds_model_classes_as_verl_does() -> None:
    assert loaded(CHOICES, ("torch", "verl", "vllm", "trl", "torch._inductor.lowering")) == {"torch", "verl"}


def test_an_import_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    refuse_import("a_module_for_this_test", "there is no such device")
    with pytest.raises(ImportError, match="no such device"):
        __import__("a_module_for_this_test")
    before = list(sys.meta_path)
    refuse_import("json", "loaded already: nothing to refuse")
    assert sys.meta_path == before
