"""On-policy distillation on the tiny world: verl's loss against a teacher in a vLLM server of its own."""

import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from verl_dft.training.metrics import read_metrics

pytestmark = [pytest.mark.integration, pytest.mark.alone, pytest.mark.slow]
TEACHER = "distillation.teacher_models.teacher_model.model_path"
LOSS = "distillation.distillation_loss"


@pytest.fixture(scope="module")
def other_teacher(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with some noise in its weights: it still writes such text, with other probabilities."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path_factory.mktemp("models") / "teacher"
    shutil.copytree(tiny_base, folder)
    tensors, generator = load_file(folder / "model.safetensors"), torch.Generator().manual_seed(0)
    for name, value in tensors.items():
        noise = torch.randn(value.shape, generator=generator) * value.float().std()
        tensors[name] = value + (0.2 * noise).to(value.dtype)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture
def distill(run_cli: Callable, tmp_path: Path) -> Callable:
    """``distill(teacher, steps, *overrides)``: the metrics of each step."""

    def run(teacher: Path, steps: int, *more: str) -> list[dict[str, float]]:
        args = ["rl", "--config-name", "tiny/rl", "algorithm=distill", f"{TEACHER}={teacher}"]
        args += [f"trainer.total_training_steps={steps}", "trainer.logger=[console]", f"output_dir={tmp_path / 'run'}"]
        done = run_cli([*args, *more], timeout=900)
        assert done.rc == 0, done.stdout[-3000:] + done.stderr[-3000:]
        metrics = read_metrics(tmp_path / "run" / "metrics.jsonl")
        assert [m["step"] for m in metrics] == list(range(1, steps + 1))
        assert all(math.isfinite(value) for m in metrics for value in m.values())
        assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
        return metrics

    return run


@pytest.mark.nightly
def test_a_teacher_that_is_the_student_teaches_nothing(distill: Callable, tiny_base: Path) -> None:
    """Before the first update, where the trainer and the teacher's server agree to float32's rounding."""
    first, _ = distill(tiny_base, 2)
    assert abs(first["actor/distillation/loss"]) < 1e-6 and first["actor/distillation/abs_loss"] < 1e-6
    assert first["actor/grad_norm"] < 1e-4


@pytest.mark.nightly
def test_another_teacher_pulls(distill: Callable, other_teacher: Path) -> None:
    first, _ = distill(other_teacher, 2)
    assert first["actor/distillation/loss"] > 1e-3 and first["actor/grad_norm"] > 1e-2
    assert first["actor/distillation/loss_min"] >= -1e-6  # k3 is not below 0


@pytest.mark.nightly
def test_the_loss_as_a_reward(distill: Callable, other_teacher: Path) -> None:
    """k1, of which verl makes a policy gradient."""
    (step,) = distill(other_teacher, 1, f"{LOSS}.loss_mode=k1", f"{LOSS}.use_policy_gradient=true")
    assert step["actor/distillation/abs_loss"] > 1e-3 and step["actor/grad_norm"] > 1e-2
    assert step["actor/distillation/pg_clipfrac"] == 0  # one update
