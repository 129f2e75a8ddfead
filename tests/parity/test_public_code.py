"""Each objective against the loss of public code, written again from its description; constants are that code's.

Only the per-token (or per-response) loss is compared: how each trainer then averages is the ``reduction`` key's matter.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity_dense import B, Case, T, assert_same, make_case
from torch import Tensor
from torch.nn.functional import cross_entropy, kl_div, log_softmax, softmax


def ce(case: Case, logits: Tensor) -> Tensor:
    return cross_entropy(logits.flatten(0, 1), case.label.flatten(), reduction="none").view(B, T)


def dft_authors(case: Case, logits: Tensor) -> Tensor:
    """yongliang-wu/DFT, verl/verl/trainer/fsdp_dft_trainer.py: cross-entropy times the detached softmax value."""
    p = softmax(logits, -1).gather(-1, case.label[..., None]).squeeze(-1)
    return ce(case, logits) * p.detach()


def dft_trl(case: Case, logits: Tensor) -> Tensor:
    """huggingface/trl, trl/trainer/sft_trainer.py, dft_loss: -exp(lp).detach() * lp."""
    lp = case.logp(logits)
    return -(lp.exp().detach() * lp)


def dft_swift(case: Case, logits: Tensor) -> Tensor:
    """modelscope/ms-swift, swift/trainers/utils.py, per_token_loss_func: loss * exp(-loss) without its gradient."""
    loss = ce(case, logits)
    return loss * torch.exp(-loss.detach())


def raft_scale(case: Case, logits: Tensor) -> Tensor:
    """yongliang-wu/DFT, core_algos.py, loss mode raft_scale: -A * lp * sg(max(exp(lp), 0.1)), with A = 1."""
    lp = case.logp(logits)
    return -lp * lp.exp().clamp(min=0.1).detach()


def row_weights(case: Case, numerator: Tensor, temperature: float, low: float, high: float) -> Tensor:
    """[B, 1] clamp(exp(temperature * mean over the row's own tokens of the log-ratio)); one row at a time."""
    weights = []
    for b in range(B):
        d = (case.logp(numerator)[b] - case.logp(case.ref_logits)[b])[case.mask[b]]
        weights.append(torch.clamp(torch.exp(temperature * d.sum() / d.numel()), low, high))
    return torch.stack(weights)[:, None].detach()


def iw_authors(case: Case, logits: Tensor) -> Tensor:
    """emmyqin/iw_sft, bounding_trainers.py, sum_over_time=True: its only valid batch size is one row."""
    return row_weights(case, logits, 1.0, 0.0, 16.0) * ce(case, logits)


def iw_authors_token(case: Case, logits: Tensor) -> Tensor:
    """emmyqin/iw_sft, bounding_trainers.py, sum_over_time=False: clamp(pi / ref, 0.2, 1.8), no temperature."""
    ratio = torch.exp(case.logp(logits) - case.logp(case.ref_logits)).detach()
    return torch.clamp(ratio, 0.2, 1.8) * ce(case, logits)


def iw_control(case: Case, logits: Tensor) -> Tensor:
    """emmyqin/iw_sft_control, main.py: the numerator is the averaged policy (here old_logits), temp 10, up to 1000."""
    return row_weights(case, case.old_logits, 10.0, 0.0, 1000.0) * ce(case, logits)


def asft_authors(case: Case, logits: Tensor, weight: float, scaled: bool) -> Tensor:
    """zhuchichi56/ASFT, train_v2.py, modes asft and sft+kl: F.kl_div(log_softmax(theta), softmax(ref))."""
    kl = kl_div(log_softmax(logits, -1), softmax(case.ref_logits, -1), reduction="none").sum(-1)
    p = torch.exp(-ce(case, logits)).detach() if scaled else 1.0
    return p * ce(case, logits) + weight * kl


def asft_k3(case: Case, logits: Tensor) -> Tensor:
    """NVIDIA-NeMo/RL pull request 3302: k3 of KL(theta || ref) at the target token."""
    d = case.logp(case.ref_logits) - case.logp(logits)
    return dft_trl(case, logits) + 0.05 * (torch.exp(d) - d - 1)


def psft_authors(case: Case, logits: Tensor, advantage: Tensor | float = 1.0) -> Tensor:
    """zwhong714/PSFT, recipe/psft on verl's vanilla PPO loss: max of the two negated terms."""
    ratio = torch.exp(torch.clamp(case.logp(logits) - case.logp(case.old_logits), -20.0, 20.0))
    return torch.maximum(-advantage * ratio, -advantage * torch.clamp(ratio, 1 - 0.2, 1 + 0.28))


def gft_authors(case: Case, logits: Tensor) -> Tensor:
    """ZJU-OmniAI/GFT, verl/trainer/ppo/core_algos.py, compute_gft_loss, tao as in the run script."""
    prob = softmax(logits, -1).gather(-1, case.label[..., None]).squeeze(-1)
    c = torch.where(prob > 0.1, torch.ones_like(prob), prob).detach()
    return -case.logp(logits) * c * case.advantage[:, None]


def phi_trinity(case: Case, logits: Tensor, cutoff: float = 1.0) -> Tensor:
    """modelscope/Trinity-RFT, chord_policy_loss.py, sft_phi: the log-prob clamped at the cutoff, times phi."""
    lp = case.logp(logits)
    p = lp.exp()
    return -lp.clamp(max=math.log(cutoff)) * (p * (1 - p)).detach()


def eaft_factory(case: Case, logits: Tensor) -> Tensor:
    """hiyouga/LLaMA-Factory, trainer_utils.py, eaft_loss_func: entropy of the 20 likeliest over 3 (V = 20 here)."""
    top = logits.detach().topk(20, dim=-1).values
    log_p = top - top.logsumexp(-1, keepdim=True)
    return -(log_p.exp() * log_p).sum(-1) / 3.0 * ce(case, logits)


def luffy_authors(case: Case, logits: Tensor, clip: bool) -> Tensor:
    """ElliottYan/LUFFY, mix_core_alg.py, reshape p_div_p_0.1; no ``clip``: loss_remove_clip, as in the script."""
    ratio, a = torch.exp(case.logp(logits) - case.logp(case.old_logits)), case.advantage[:, None]
    on = -a * ratio
    if clip:
        on = torch.maximum(on, -a * torch.clamp(ratio, 1.0 - 0.2, 1.0 + 0.2))
    prob = torch.exp(case.logp(logits))
    prefix = torch.tensor([1.0, 1.0, 0.0, 1.0], dtype=ratio.dtype)[:, None]  # the third row is the policy's own
    return -a * prob / (prob + 0.1) * prefix + on * (1 - prefix)


PUBLIC: dict[str, tuple[str, dict[str, Any], Callable[[Case, Tensor], Tensor]]] = {
    "sft": ("sft", {}, ce),
    "dft": ("dft", {}, dft_authors),
    "dft-trl": ("dft", {}, dft_trl),
    "dft-swift": ("dft", {}, dft_swift),
    "dft-raft-scale": ("dft", {"floor": 0.1}, raft_scale),
    "is_sft": ("is_sft", {}, dft_authors),  # Mind the Gap trained with DFT's trainer
    "iw_sft": ("iw_sft", {}, iw_authors),
    "iw_sft-token": ("iw_sft", {"level": "token"}, iw_authors_token),
    "iw_sft-control": ("iw_sft", {"policy": "ema", "temperature": 10.0, "clamp_max": 1000.0}, iw_control),
    "asft": ("asft", {"kl_weight": 0.1}, lambda c, x: asft_authors(c, x, 0.1, True)),
    "asft-readme": ("asft", {}, lambda c, x: asft_authors(c, x, 0.05, True)),
    "asft-sft+kl": ("asft", {"weight": "sft"}, lambda c, x: asft_authors(c, x, 0.05, False)),
    "asft-k3": ("asft", {"kl": "k3"}, asft_k3),
    "psft": ("psft", {}, psft_authors),
    "psft-online": ("psft", {"use_advantage": True}, lambda c, x: psft_authors(c, x, c.advantage[:, None])),
    "gft": ("gft", {"tau": 0.1, "strict": True}, gft_authors),
    "chord": ("chord", {}, phi_trinity),
    "chord-cutoff": ("chord", {"cutoff": 0.5}, lambda c, x: phi_trinity(c, x, 0.5)),
    "eaft": ("eaft", {}, eaft_factory),
    "luffy": ("luffy", {}, lambda c, x: luffy_authors(c, x, True)),
    "luffy-script": ("luffy", {"eps_low": 1.0, "eps_high": math.inf}, lambda c, x: luffy_authors(c, x, False)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("code", PUBLIC)
def test_public_code(code: str, seed: int) -> None:
    name, options, formula = PUBLIC[code]
    assert_same(make_case(seed), name, options, formula)


def far_reference() -> Case:
    """A case whose references are far enough away for every clamp to act."""
    case = make_case(2)
    g = torch.Generator().manual_seed(9)
    noise = torch.randn(*case.logits.shape, generator=g, dtype=torch.float64)
    shift = torch.tensor([8.0, -8.0, 0.0, 3.0], dtype=torch.float64)[:, None, None] * torch.nn.functional.one_hot(
        case.label, case.logits.shape[-1]
    )
    return Case(**{**vars(case), "ref_logits": case.logits + shift + noise, "old_logits": case.logits - shift})


@pytest.mark.parametrize("code", ["iw_sft", "iw_sft-token", "iw_sft-control", "psft", "psft-online", "asft-k3"])
def test_public_code_far_away(code: str) -> None:
    name, options, formula = PUBLIC[code]
    assert_same(far_reference(), name, options, formula)


def test_the_far_case_reaches_the_clamps() -> None:
    case = far_reference()
    free = row_weights(case, case.logits, 1.0, 0.0, math.inf)
    assert (free > 16).any() and (free < 16).any()
    control = row_weights(case, case.old_logits, 10.0, 0.0, math.inf)
    assert (control > 1000).any() and (control < 1000).any()
