"""Each objective against its paper's equation, written out again from the logits."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from parity_dense import ORIGIN, B, Case, T, assert_same, make_case
from torch import Tensor
from torch.nn.functional import softmax


def token_p(case: Case, logits: Tensor) -> Tensor:
    """[B, T] probability of the labels."""
    return softmax(logits, -1).gather(-1, case.label[..., None]).squeeze(-1)


def response_p(case: Case, logits: Tensor, power: Callable[[int], float] = lambda n: 1.0) -> Tensor:
    """[B, 1] product of the trained tokens' probabilities, one by one, to the power ``power(number of tokens)``."""
    p = token_p(case, logits)
    products = []
    for b in range(B):
        product = torch.ones((), dtype=p.dtype)
        for t in range(T):
            if case.mask[b, t]:
                product = product * p[b, t]
        products.append(product ** power(int(case.mask[b].sum())))
    return torch.stack(products)[:, None]


def sft(case: Case, logits: Tensor) -> Tensor:
    """DFT paper, Eq. 1: -log pi."""
    return -torch.log(token_p(case, logits))


def dft(case: Case, logits: Tensor) -> Tensor:
    """DFT paper, Eq. 9: -sg(pi_t) log pi_t."""
    p = token_p(case, logits)
    return -p.detach() * torch.log(p)


def dft_sequence(case: Case, logits: Tensor) -> Tensor:
    """DFT paper, Eq. 7: the gradient of SFT times sg(pi(y|x))."""
    return sft(case, logits) * response_p(case, logits).detach()


def dft_geometric(case: Case, logits: Tensor) -> Tensor:
    """Eq. 7 with the geometric mean of the token probabilities."""
    return sft(case, logits) * response_p(case, logits, lambda n: 1 / n).detach()


def dft_floor_alpha(case: Case, logits: Tensor) -> Tensor:
    """-sg(max(pi, 0.2)^2) log pi."""
    p = token_p(case, logits)
    return -torch.where(p > 0.2, p, 0.2).detach().square() * torch.log(p)


def iw_sft(case: Case, logits: Tensor) -> Tensor:
    """iw-SFT: sequence weight (pi(y|x) / ref(y|x))^(1 / |y|)."""
    ratio = response_p(case, logits, lambda n: 1 / n) / response_p(case, case.ref_logits, lambda n: 1 / n)
    return sft(case, logits) * ratio.detach()


def is_sft(case: Case, logits: Tensor, stored_rows: tuple[int, ...], clip: float = math.inf) -> Tensor:
    """Data rewriting, Eq. 5 per token: sg(pi / pi_b), with pi_b = 1 for rows and tokens that have none."""
    p = token_p(case, logits)
    weight = torch.empty(B, T, dtype=p.dtype)
    for b in range(B):
        for t in range(T):
            known = ORIGIN[b] in stored_rows and not math.isnan(case.behavior[b, t])
            weight[b, t] = min(float(p[b, t].detach()) / (math.exp(case.behavior[b, t]) if known else 1.0), clip)
    return -weight * torch.log(p)


def asft(case: Case, logits: Tensor, weight: float = 0.05) -> Tensor:
    """ASFT: DFT + lambda * KL(ref || theta), the sum over the vocabulary written out."""
    p, q = softmax(logits, -1), softmax(case.ref_logits, -1)
    return dft(case, logits) + weight * (q * (torch.log(q) - torch.log(p))).sum(-1)


def psft(case: Case, logits: Tensor) -> Tensor:
    """PSFT: -min(r, clip(r, 1 - eps_low, 1 + eps_high))."""
    ratio = token_p(case, logits) / token_p(case, case.old_logits)
    return -torch.where(ratio > 1.28, torch.full_like(ratio, 1.28), ratio)


def psft_advantage(case: Case, logits: Tensor) -> Tensor:
    """PPO's clipped surrogate, case by case."""
    ratio = token_p(case, logits) / token_p(case, case.old_logits)
    a = case.advantage[:, None].expand(B, T)
    positive = torch.where(ratio > 1.28, torch.full_like(ratio, 1.28), ratio)
    negative = torch.where(ratio < 0.8, torch.full_like(ratio, 0.8), ratio)
    return -torch.where(a > 0, positive, negative) * a


def gft(case: Case, logits: Tensor, tau: float) -> Tensor:
    """GFT, Eqs. 5 and 21: -A C(pi_t) log pi_t."""
    p = token_p(case, logits)
    c = torch.where(p < tau, p.detach(), 1.0)
    return -case.advantage[:, None] * c * torch.log(p)


def gft_sequence(case: Case, logits: Tensor, tau: float) -> Tensor:
    """GFT, Eqs. 5 and 16: -A C(pi(y|x)) log pi(y|x), its log split over the tokens (Eq. 19)."""
    p = response_p(case, logits)
    c = torch.where(p < tau, p.detach(), 1.0)
    return -case.advantage[:, None] * c * torch.log(token_p(case, logits))


def chord(case: Case, logits: Tensor) -> Tensor:
    """CHORD-phi: -sg(p (1 - p)) log p."""
    p = token_p(case, logits)
    return -(p * (1 - p)).detach() * torch.log(p)


def focal(case: Case, logits: Tensor) -> Tensor:
    """Lin et al., Eq. 4: -(1 - p)^gamma log p, gradient through everything."""
    p = token_p(case, logits)
    return -((1 - p) ** 2) * torch.log(p)


def focal_mirror(case: Case, logits: Tensor) -> Tensor:
    """SFT minus DFT: -sg(1 - p) log p."""
    return sft(case, logits) - dft(case, logits)


def eaft(case: Case, logits: Tensor) -> Tensor:
    """EAFT: sg((H / 3)^2) * nll, H over the whole vocabulary."""
    p = softmax(logits, -1)
    return ((-(p * torch.log(p)).sum(-1) / 3) ** 2).detach() * sft(case, logits)


def chord_mix(case: Case, logits: Tensor, phi: bool) -> Tensor:
    """CHORD: PPO's surrogate with clip 0.2 in the policy's row, SFT (times p (1 - p)) in the others."""
    own = luffy(case, logits)
    others = chord(case, logits) if phi else sft(case, logits)
    return torch.stack([own[b] if ORIGIN[b] == 2 else others[b] for b in range(B)])


def luffy(case: Case, logits: Tensor, gamma: float | None = 0.1) -> Tensor:
    """LUFFY: PPO's surrogate with clip 0.2 for the policy's row, -A p / (p + gamma) for the others, row by row."""
    p, old, rows = token_p(case, logits), token_p(case, case.old_logits), []
    for b in range(B):
        a, ratio = case.advantage[b], p[b] / old[b]
        if ORIGIN[b] == 2:
            bound = torch.full_like(ratio, 1.2 if a > 0 else 0.8)
            beyond = ratio > 1.2 if a > 0 else ratio < 0.8
            rows.append(-a * torch.where(beyond, bound, ratio))
        else:
            rows.append(-a * (p[b] if gamma is None else p[b] / (p[b] + gamma)))
    return torch.stack(rows)


EQUATIONS: dict[str, tuple[str, dict[str, Any], Callable[[Case, Tensor], Tensor]]] = {
    "sft-eq1": ("sft", {}, sft),
    "dft-eq9": ("dft", {}, dft),
    "dft-eq7": ("dft", {"level": "sequence"}, dft_sequence),
    "dft-eq7-normalised": ("dft", {"level": "sequence", "length_normalized": True}, dft_geometric),
    "dft-floor-alpha": ("dft", {"floor": 0.2, "alpha": 2.0}, dft_floor_alpha),
    "iw_sft": ("iw_sft", {"clamp_max": math.inf}, iw_sft),
    "is_sft-eq5-one": ("is_sft", {}, lambda c, x: is_sft(c, x, ())),
    "is_sft-eq5-self": ("is_sft", {"behavior": "self"}, lambda c, x: is_sft(c, x, (2,))),
    "is_sft-eq5-all": ("is_sft", {"behavior": "all"}, lambda c, x: is_sft(c, x, (2, 3))),
    "is_sft-clip": ("is_sft", {"behavior": "all", "clip": 0.9}, lambda c, x: is_sft(c, x, (2, 3), 0.9)),
    "asft": ("asft", {}, asft),
    "asft-lambda": ("asft", {"kl_weight": 2.0}, lambda c, x: asft(c, x, 2.0)),
    "psft": ("psft", {}, psft),
    "psft-advantage": ("psft", {"use_advantage": True}, psft_advantage),
    "gft-eq21": ("gft", {}, lambda c, x: gft(c, x, 0.7)),
    "gft-eq21-low": ("gft", {"tau": 0.1}, lambda c, x: gft(c, x, 0.1)),
    "gft-eq16": ("gft", {"level": "sequence", "tau": 1e-5}, lambda c, x: gft_sequence(c, x, 1e-5)),
    "chord": ("chord", {}, chord),
    "focal": ("focal", {}, focal),
    "focal-mirror": ("focal", {"gamma": 1.0, "stop_gradient": True}, focal_mirror),
    "eaft": ("eaft", {"alpha": 2.0}, eaft),
    "chord_mix": ("chord_mix", {}, lambda c, x: chord_mix(c, x, True)),
    "chord_mix-mu": ("chord_mix", {"phi": False}, lambda c, x: chord_mix(c, x, False)),
    "luffy": ("luffy", {}, luffy),
    "luffy-unshaped": ("luffy", {"gamma": None}, lambda c, x: luffy(c, x, None)),
}


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("equation", EQUATIONS)
def test_equation(equation: str, seed: int) -> None:
    name, options, formula = EQUATIONS[equation]
    assert_same(make_case(seed), name, options, formula)


def test_the_cases_reach_every_branch() -> None:
    """Otherwise a clip or a threshold could be missing and no value differ."""
    case = make_case(0)
    p, old = token_p(case, case.logits)[case.mask], token_p(case, case.old_logits)[case.mask]
    assert (p < 0.1).any() and (p > 0.7).any() and ((p > 0.1) & (p < 0.2)).any()
    assert (p / old > 1.28).any() and (p / old < 0.8).any()
    whole = response_p(case, case.logits)
    assert (whole < 1e-5).any() and (whole > 1e-5).any()
    assert (case.advantage > 0).any() and (case.advantage < 0).any()
