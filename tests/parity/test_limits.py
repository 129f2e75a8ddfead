"""Where one method becomes another: the lattice of limits, on losses and gradients."""

import dataclasses
import math
from typing import Any, NamedTuple

import pytest
import torch

from verl_dft.objectives import TokenBatch, get_objective
from verl_dft.testing import make_batch, run

INF = math.inf


def ones(batch: TokenBatch) -> TokenBatch:
    """Every advantage 1."""
    return dataclasses.replace(batch, advantage=torch.ones_like(batch.advantage))


def at_rest(batch: TokenBatch) -> TokenBatch:
    """Every other policy is the policy itself."""
    logp = batch.logp.detach()
    same = {name: logp.clone() for name in ("ref_logp", "old_logp", "ema_logp", "behavior_logp")}
    return dataclasses.replace(batch, **same, ref_kl=torch.zeros_like(logp))


def all_self(batch: TokenBatch) -> TokenBatch:
    return dataclasses.replace(batch, origin=torch.full_like(batch.origin, 2))


def expert(batch: TokenBatch) -> TokenBatch:
    return dataclasses.replace(batch, origin=torch.zeros_like(batch.origin))


def unknown(batch: TokenBatch) -> TokenBatch:
    return dataclasses.replace(batch, behavior_logp=torch.full_like(batch.behavior_logp, math.nan))


def one_token(batch: TokenBatch) -> TokenBatch:
    """Each response has one trained token."""
    position = torch.arange(len(batch.seq)) % int((batch.seq == 0).sum())
    return dataclasses.replace(batch, mask=position == 3)


def sure(batch: TokenBatch) -> TokenBatch:
    """The model is certain of every token."""
    return dataclasses.replace(batch, logp=torch.zeros_like(batch.logp).requires_grad_())


def scale_entropy(batch: TokenBatch) -> TokenBatch:
    return dataclasses.replace(batch, entropy=torch.full_like(batch.entropy, 3.0))


def raised(batch: TokenBatch) -> TokenBatch:
    """Every token is likelier than it was, by at most a fifth."""
    return dataclasses.replace(batch, old_logp=batch.logp.detach() - 0.15)


class Limit(NamedTuple):
    name: str
    options: dict[str, Any]
    other: str
    other_options: dict[str, Any]
    on: tuple[Any, ...] = ()
    gradient_only: bool = False


LIMITS = {
    "dft(alpha=0) = sft": Limit("dft", {"alpha": 0.0}, "sft", {}),
    "dft(floor=1) = sft": Limit("dft", {"floor": 1.0}, "sft", {}),
    "dft(p=1) = sft": Limit("dft", {}, "sft", {}, (sure,)),
    "dft(sequence, alpha=0) = sft": Limit("dft", {"level": "sequence", "alpha": 0.0}, "sft", {}),
    "dft(sequence) = dft, one token": Limit("dft", {"level": "sequence"}, "dft", {}, (one_token,)),
    "dft(sequence, normalised) = dft, one token": Limit(
        "dft", {"level": "sequence", "length_normalized": True}, "dft", {}, (one_token,)
    ),
    "is_sft(behaviour=1) = dft": Limit("is_sft", {}, "dft", {}),
    "is_sft(all, unknown) = dft": Limit("is_sft", {"behavior": "all"}, "dft", {}, (unknown,)),
    "is_sft(all, expert rows) = dft": Limit("is_sft", {"behavior": "all"}, "dft", {}, (expert,)),
    "is_sft(all, just sampled) = sft": Limit("is_sft", {"behavior": "all"}, "sft", {}, (at_rest, all_self)),
    "is_sft(self, just sampled) = sft": Limit("is_sft", {"behavior": "self"}, "sft", {}, (at_rest, all_self)),
    "is_sft(clip=1) = dft": Limit("is_sft", {"clip": 1.0}, "dft", {}),
    "iw_sft(ref=theta) = sft": Limit("iw_sft", {}, "sft", {}, (at_rest,)),
    "iw_sft(token, ref=theta) = sft": Limit("iw_sft", {"level": "token"}, "sft", {}, (at_rest,)),
    "iw_sft(ema=ref) = sft": Limit("iw_sft", {"policy": "ema"}, "sft", {}, (at_rest,)),
    "iw_sft(temperature=0) = sft": Limit("iw_sft", {"temperature": 0.0}, "sft", {}),
    "iw_sft(clamp=1) = sft": Limit("iw_sft", {"clamp_min": 1.0, "clamp_max": 1.0}, "sft", {}),
    "iw_sft(token) = iw_sft(sequence), one token, same clamp": Limit(
        "iw_sft", {"level": "token", "clamp_min": 0.0, "clamp_max": INF}, "iw_sft", {"clamp_max": INF}, (one_token,)
    ),
    "iw_sft(token, no clamp) = is_sft(ref as behaviour)": Limit(
        "iw_sft",
        {"level": "token", "clamp_min": 0.0, "clamp_max": INF},
        "is_sft",
        {"behavior": "all"},
        (all_self, lambda b: dataclasses.replace(b, behavior_logp=b.ref_logp)),
    ),
    "asft(0) = dft": Limit("asft", {"kl_weight": 0.0}, "dft", {}),
    "asft(k3, 0) = dft": Limit("asft", {"kl_weight": 0.0, "kl": "k3"}, "dft", {}),
    "asft(sft, 0) = sft": Limit("asft", {"kl_weight": 0.0, "weight": "sft"}, "sft", {}),
    "asft(ref=theta) = dft": Limit("asft", {"kl_weight": 5.0}, "dft", {}, (at_rest,)),
    "asft(k3, ref=theta) = dft": Limit("asft", {"kl_weight": 5.0, "kl": "k3"}, "dft", {}, (at_rest,)),
    "asft(k3, sft, ref=theta) = sft": Limit("asft", {"kl": "k3", "weight": "sft"}, "sft", {}, (at_rest,)),
    "psft(one mini-batch) ~ sft": Limit("psft", {}, "sft", {}, (at_rest,), gradient_only=True),
    "psft(eps=0, one mini-batch) ~ sft": Limit(
        "psft", {"eps_low": 0.0, "eps_high": 0.0}, "sft", {}, (at_rest,), gradient_only=True
    ),
    "psft(A, one mini-batch) ~ gft(no_dcr)": Limit(
        "psft", {"use_advantage": True}, "gft", {"no_dcr": True}, (at_rest,), gradient_only=True
    ),
    "psft(A=1) = psft": Limit("psft", {"use_advantage": True}, "psft", {}, (ones,)),
    "psft(any eps_low) = psft": Limit("psft", {"eps_low": 0.0}, "psft", {"eps_low": 1.0}),
    "psft(eps=inf) = psft, in range": Limit("psft", {"eps_high": INF}, "psft", {}, (raised,)),
    "psft(eps=inf) ~ iw_sft(token, no clamp)": Limit(
        "psft",
        {"eps_high": INF},
        "iw_sft",
        {"level": "token", "clamp_min": 0.0, "clamp_max": INF},
        (lambda b: dataclasses.replace(b, old_logp=b.ref_logp),),
        gradient_only=True,
    ),
    "gft(tau=0, A=1) = sft": Limit("gft", {"tau": 0.0}, "sft", {}, (ones,)),
    "gft(tau>1, A=1) = dft": Limit("gft", {"tau": 1.01}, "dft", {}, (ones,)),
    "gft(sequence, tau>1, A=1) = dft(sequence)": Limit(
        "gft", {"tau": 1.01, "level": "sequence"}, "dft", {"level": "sequence"}, (ones,)
    ),
    "gft(sequence, normalised, tau>1, A=1) = dft(same)": Limit(
        "gft",
        {"tau": 1.01, "level": "sequence", "length_normalized": True},
        "dft",
        {"level": "sequence", "length_normalized": True},
        (ones,),
    ),
    "gft(sequence) = gft, one token": Limit("gft", {"level": "sequence"}, "gft", {}, (one_token,)),
    "gft(no_dcr) = gft(tau=0)": Limit("gft", {"no_dcr": True}, "gft", {"tau": 0.0}),
    "gft(no_gal) = gft(A=1)": Limit("gft", {"no_gal": True}, "gft", {}, (ones,)),
    "gft(no_gal, tau>1) = dft": Limit("gft", {"no_gal": True, "tau": 2.0}, "dft", {}),
    "gft(no_gal, no_dcr) = sft": Limit("gft", {"no_gal": True, "no_dcr": True}, "sft", {}),
    "gft(strict) = gft, no token at tau": Limit("gft", {"strict": True}, "gft", {}),
    "focal(gamma=0) = sft": Limit("focal", {"gamma": 0.0}, "sft", {}),
    "focal(gamma=0, stopped) = sft": Limit("focal", {"gamma": 0.0, "stop_gradient": True}, "sft", {}),
    "eaft(alpha=0) = sft": Limit("eaft", {"alpha": 0.0}, "sft", {}),
    "eaft(H=scale) = sft": Limit("eaft", {}, "sft", {}, (scale_entropy,)),
    "chord_mix(own rows) = psft(A, same clip)": Limit(
        "chord_mix", {}, "psft", {"use_advantage": True, "eps_high": 0.2}, (all_self,)
    ),
    "chord_mix(others' rows) = chord": Limit("chord_mix", {}, "chord", {}, (expert,)),
    "chord_mix(no phi, others' rows) = sft": Limit("chord_mix", {"phi": False}, "sft", {}, (expert,)),
    "luffy(own rows) = psft(A, same clip)": Limit(
        "luffy", {}, "psft", {"use_advantage": True, "eps_high": 0.2}, (all_self,)
    ),
    "luffy(no shaping, A=1, others' rows) ~ dft": Limit(
        "luffy", {"gamma": None}, "dft", {}, (ones, expert), gradient_only=True
    ),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limit(limit: str) -> None:
    name, options, other, other_options, changes, gradient_only = LIMITS[limit]
    for seed in range(2):
        batch = make_batch(num_seqs=4, seed=seed, dtype=torch.float64)
        for change in changes:
            batch = change(batch)
        loss, grad = run(get_objective(name, **options), batch)
        other_loss, other_grad = run(get_objective(other, **other_options), batch)
        torch.testing.assert_close(grad, other_grad, rtol=1e-9, atol=1e-12)
        assert grad.abs().sum() > 0
        if not gradient_only:
            torch.testing.assert_close(loss, other_loss, rtol=1e-9, atol=1e-12)


def test_the_lattice_is_not_trivial() -> None:
    """Away from the limits the methods differ pairwise, so a limit that holds says something."""
    batch = make_batch(num_seqs=4, dtype=torch.float64)
    names = ("sft", "dft", "iw_sft", "asft", "psft", "gft", "chord", "focal", "eaft", "luffy", "chord_mix")
    gradients = [run(get_objective(name), batch) for name in names]
    gradients.append(run(get_objective("is_sft", behavior="all"), batch))
    gradients.append(run(get_objective("asft", kl="k3"), batch))
    for i, (loss, grad) in enumerate(gradients):
        for other_loss, other_grad in gradients[:i]:
            assert not (torch.allclose(loss, other_loss) and torch.allclose(grad, other_grad))


def test_focal_and_dft_are_opposites() -> None:
    """At gamma = 1 with the weight held, focal's gradient and DFT's add up to SFT's."""
    batch = make_batch(dtype=torch.float64)
    focal = run(get_objective("focal", gamma=1.0, stop_gradient=True), batch)
    dft, sft = run(get_objective("dft"), batch), run(get_objective("sft"), batch)
    for a, b, total in zip(focal, dft, sft, strict=True):
        torch.testing.assert_close(a + b, total)


def test_chord_is_dft_times_the_opposite() -> None:
    """phi = p (1 - p): the product of DFT's weight and its mirror image's."""
    batch = make_batch(dtype=torch.float64)
    weights = [get_objective(name, **o)(batch).metrics["token_weight"] for name, o in
               (("dft", {}), ("focal", {"gamma": 1.0, "stop_gradient": True}), ("chord", {}))]  # fmt: skip
    torch.testing.assert_close(weights[0] * weights[1], weights[2])


def test_exempting_every_token_is_sft_and_none_is_dft() -> None:
    batch = make_batch(dtype=torch.float64)
    for level in ("token", "sequence"):
        objective = get_objective("dft", exempt_tokens=["added"], level=level)
        for exempt, other in ((True, get_objective("sft")), (False, get_objective("dft", level=level))):
            filled = dataclasses.replace(batch, exempt=torch.full_like(batch.mask, exempt))
            for a, b in zip(run(objective, filled), run(other, batch), strict=True):
                torch.testing.assert_close(a, b)
