"""CHORD's mix in ``verl-dft rl``: the schedule of mu, the shares that row weights make, and what is refused."""

import math
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from verl_dft.errors import InputError
from verl_dft.training.online.configure import compose_rl
from verl_dft.training.online.mix import mu_of, row_weights


def schedule(peak: float, valley: float, warmup: int, decay: int, steps: int) -> list[float]:
    mix = OmegaConf.create({"peak": peak, "valley": valley, "warmup_steps": warmup, "decay_steps": decay})
    return [mu_of(step, mix) for step in range(1, steps + 1)]


def test_chord_mu_falls_from_peak_to_valley() -> None:
    found = schedule(0.9, 0.05, 0, 200, 260)
    assert found[0] == pytest.approx(0.9) and found[100] == pytest.approx((0.9 + 0.05) / 2)
    assert found[50] == pytest.approx(0.05 + 0.85 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert found[200:] == pytest.approx([0.05] * 60) and all(
        a > b for a, b in zip(found[:200], found[1:201], strict=True)
    )


def test_warm_up_is_a_line_and_chord_phi_is_constant() -> None:
    assert schedule(0.8, 0.0, 4, 2, 8) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 0.4, 0, 0])
    assert schedule(0.1, 0.1, 0, 200, 3) == schedule(0.1, 0.1, 0, 0, 3) == pytest.approx([0.1] * 3)


def test_weights_make_shares_of_two_means() -> None:
    own, tokens = torch.tensor([True, False, True, False, True]), torch.tensor([3, 7, 0, 2, 5])
    loss = torch.tensor([2.0, -1.0, 9.0, 4.0, 0.5])  # of each token of a row
    mean = (row_weights(own, tokens, 0.3) * loss * tokens).sum() / tokens.sum()
    expected = 0.7 * (3 * 2 + 5 * 0.5) / 8 + 0.3 * (7 * -1 + 2 * 4) / 9
    assert float(mean) == pytest.approx(expected)
    alone = row_weights(torch.ones(2, dtype=torch.bool), torch.tensor([3, 5]), 0.3)
    assert alone.tolist() == pytest.approx([0.7, 0.7])  # a part without a token is left out, and not made up for


def rl(tmp_path: Path, *overrides: str):
    base = ["--config-name", "tiny/rl", "algorithm=chord", f"output_dir={tmp_path}"]
    return compose_rl([*base, *overrides])


def test_the_papers_two_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    objective = "actor_rollout_ref.actor.policy_loss.objective"
    config = rl(tmp_path)
    assert dict(config.mix) == {"peak": 0.9, "valley": 0.05, "warmup_steps": 0, "decay_steps": 200}
    assert config.actor_rollout_ref.actor.policy_loss.objective.phi is False
    phi = rl(tmp_path, "mix.peak=0.1", "mix.valley=0.1", f"{objective}.phi=true")
    assert mu_of(1, phi.mix) == mu_of(500, phi.mix) == pytest.approx(0.1)
    assert config.actor_rollout_ref.rollout.agent.default_agent_loop == "verl_dft_group"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["mix.peak=1.5"], "mix.peak=1.5 must be a share"),
        (["mix.valley=null"], "mix.valley=None must be a share"),
        (["mix.decay_steps=-1"], "mix.decay_steps=-1 must be a whole number"),
        (["group.composition=null"], "set group.composition"),
        (["actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum"], "use token-mean"),
        (["algorithm.rollout_correction.rollout_is=token"], "weigh the same tokens"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_mixed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: list[str], words: str
) -> None:
    monkeypatch.setenv("VERL_DFT_HARDWARE", "cpu")
    with pytest.raises(InputError, match=words):
        rl(tmp_path, *overrides)
