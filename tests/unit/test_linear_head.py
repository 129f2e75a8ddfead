"""Log-probs from hidden states without the logits: values, gradients, memory; and where a micro-batch's targets are."""

from typing import Any

import pytest
import torch
from tensordict import TensorDict
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from verl.utils import tensordict_utils as tu

from verl_dft.training.linear_head import Targets, keep_bytes
from verl_dft.training.linear_logp import KEEP_ALL, KEEP_BYTES, linear_logp

KEEP_NONE = 0


def case(m: int = 9, d: int = 6, vocab: int = 37, dtype: torch.dtype = torch.float64, bias: bool = False):
    """hidden, weight, bias, labels; logits have a standard deviation of 3."""
    generator = torch.Generator().manual_seed(m + vocab)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    made = [randn(m, d), randn(vocab, d) * 3 / d**0.5, randn(vocab) if bias else None]
    labels = torch.randint(vocab, (m,), generator=generator)
    return *(None if x is None else x.to(dtype).requires_grad_() for x in made), labels


def dense(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, labels: torch.Tensor):
    logits = hidden @ weight.T + (0 if bias is None else bias)
    log_p = logits.log_softmax(-1)
    return log_p.gather(-1, labels[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1), logits


def exactly(*tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Leaves in float64 with the same values."""
    return [None if x is None else x.detach().double().requires_grad_() for x in tensors]


def total(logp: torch.Tensor, entropy: torch.Tensor | None) -> torch.Tensor:
    """A scalar with a different slope in every value, zero and negative ones among them."""
    slopes = torch.linspace(-1, 1, len(logp), dtype=logp.dtype)
    return (logp * slopes).sum() + (0 if entropy is None else (entropy * slopes.flip(0)).sum())


@pytest.mark.parametrize("keep", [KEEP_ALL, KEEP_NONE, 3 * 9 * 8 * 5], ids=["keep", "recompute", "keep-some"])
@pytest.mark.parametrize("elements", [1, 9 * 5, 9 * 36, 10**6])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_equals_the_dense_computation(bias: bool, with_entropy: bool, elements: int, keep: int) -> None:
    """In float64, for slices of 1, 5, 36 columns (one is left over) and for all 37 at once."""
    *leaves, labels = case(bias=bias)
    logp, entropy = linear_logp(*leaves, labels, with_entropy=with_entropy, slice_elements=elements, keep_bytes=keep)
    total(logp, entropy).backward()
    copies = exactly(*leaves)
    expected, expected_entropy, _ = dense(*copies, labels)
    total(expected, expected_entropy if with_entropy else None).backward()
    assert torch.allclose(logp, expected, rtol=1e-12)
    assert entropy is None if not with_entropy else torch.allclose(entropy, expected_entropy, rtol=1e-12)
    for leaf, copy in zip(leaves, copies, strict=True):
        assert (leaf is None and copy is None) or torch.allclose(leaf.grad, copy.grad, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize(("vocab", "d", "m"), [(512, 64, 300), (152_064, 32, 24)])
@pytest.mark.parametrize("keep", [KEEP_ALL, KEEP_NONE], ids=["keep", "recompute"])
def test_float32_against_float64(vocab: int, d: int, m: int, keep: int) -> None:
    """2e-6 * (1 + |logp|) from the hidden states on, which is the matrix product's rounding; gradients to 1e-5."""
    hidden, weight, _, labels = case(m, d, vocab, torch.float32)
    logp, entropy = linear_logp(hidden, weight, None, labels, with_entropy=True, keep_bytes=keep)
    total(logp, entropy).backward()
    exact_hidden, exact_weight = exactly(hidden, weight)
    expected, expected_entropy, _ = dense(exact_hidden, exact_weight, None, labels)
    total(expected, expected_entropy).backward()
    assert logp.dtype == torch.float32
    assert ((logp - expected).abs() / (1 + expected.abs())).max() < 2e-6
    assert (entropy - expected_entropy).abs().max() < 1e-5
    for got, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert (got.grad - exact.grad).norm() < 1e-5 * exact.grad.norm()


@pytest.mark.parametrize(("vocab", "d", "m"), [(512, 64, 300), (152_064, 32, 24)])
@pytest.mark.parametrize("keep", [KEEP_ALL, KEEP_NONE], ids=["keep", "recompute"])
def test_bf16_against_float64(vocab: int, d: int, m: int, keep: int) -> None:
    """The layer rounds its logits to bf16: 2 * 2^-8 * max|logit|, and no more than that; gradients to 1%."""
    hidden, weight, _, labels = case(m, d, vocab, torch.bfloat16)
    logp, _ = linear_logp(hidden, weight, None, labels, keep_bytes=keep)
    total(logp, None).backward()
    exact_hidden, exact_weight = exactly(hidden, weight)
    expected, _, logits = dense(exact_hidden, exact_weight, None, labels)
    total(expected, None).backward()
    assert logp.dtype == torch.float32
    assert (logp - expected).abs().max() < 2 * 2**-8 * logits.abs().max()
    # from the logits that the layer itself would return the error is float32's, but for values at a rounding boundary
    log_p = torch.nn.functional.linear(hidden, weight).detach().double().log_softmax(-1)
    close = (logp - log_p.gather(-1, labels[:, None])[:, 0]).abs() < 1e-5
    assert close.float().mean() > 0.8
    for got, exact in ((hidden, exact_hidden), (weight, exact_weight)):
        assert (got.grad.double() - exact.grad).norm() < 1e-2 * exact.grad.norm()


def test_under_autocast_the_product_is_autocasts() -> None:
    hidden, weight, bias, labels = case(dtype=torch.float32, bias=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logp, entropy = linear_logp(hidden, weight, bias, labels, with_entropy=True)
        logits = torch.nn.functional.linear(hidden, weight, bias)
    total(logp, entropy).backward()
    expected = logits.detach().double().log_softmax(-1).gather(-1, labels[:, None])[:, 0]
    assert logits.dtype == torch.bfloat16 and (logp - expected).abs().max() < 1e-5
    assert hidden.grad.dtype == weight.grad.dtype == torch.float32


@pytest.mark.parametrize("offset", [-300.0, 300.0])
def test_a_common_offset_changes_nothing(offset: float) -> None:
    hidden, weight, _, labels = case(dtype=torch.float32)
    shifted, _ = linear_logp(hidden, weight, torch.full((37,), offset), labels, slice_elements=9 * 5)
    logp, _ = linear_logp(hidden, weight, None, labels)
    assert torch.allclose(shifted, logp, atol=1e-4)


def test_gradients_add_up_in_float32() -> None:
    """512 slices of one column: sums in bf16 would be off by more than its inputs' rounding."""
    hidden, weight, _, labels = case(8, 64, 512, torch.bfloat16)
    total(*linear_logp(hidden, weight, None, labels, slice_elements=8)).backward()
    copy, _ = exactly(hidden, weight)
    total(dense(copy, weight.detach().double(), None, labels)[0], None).backward()
    assert (hidden.grad - copy.grad).norm() < 6e-3 * copy.grad.norm()


@pytest.mark.parametrize("keep", [KEEP_ALL, KEEP_NONE], ids=["keep", "recompute"])
def test_the_backward_pass_can_be_run_again(keep: int) -> None:
    hidden, weight, _, labels = case()
    value = total(*linear_logp(hidden, weight, None, labels, keep_bytes=keep))
    value.backward(retain_graph=True)
    once = hidden.grad.clone(), weight.grad.clone()
    value.backward()
    assert torch.equal(hidden.grad, 2 * once[0]) and torch.equal(weight.grad, 2 * once[1])


def test_a_frozen_weight_gets_no_gradient_and_costs_none() -> None:
    hidden, weight, _, labels = case()
    frozen = weight.detach()
    with Memory() as seen:
        total(*linear_logp(hidden, frozen, None, labels, slice_elements=9 * 5)).backward()
    assert seen.elements < frozen.numel()
    copy, _ = exactly(hidden, weight)
    total(dense(copy, frozen, None, labels)[0], None).backward()
    assert frozen.grad is None and torch.allclose(hidden.grad, copy.grad)


def test_no_rows() -> None:
    """A micro-batch without a trained token still takes part in the backward pass, as FSDP's collectives demand."""
    _, weight, _, _ = case()
    hidden = torch.zeros(0, 6, dtype=torch.float64, requires_grad=True)
    logp, entropy = linear_logp(hidden, weight, None, torch.zeros(0, dtype=torch.int64), with_entropy=True)
    assert logp.shape == entropy.shape == (0,)
    (logp.sum() + entropy.sum()).backward()
    assert hidden.grad.shape == (0, 6) and weight.grad.shape == weight.shape and (weight.grad == 0).all()


@pytest.mark.parametrize("elements", [1, 10**6])
def test_tokens_that_are_ruled_out(elements: int) -> None:
    """A bias of -inf: probability and gradient 0, also where the first slice holds nothing else."""
    hidden, weight, bias, labels = case(bias=True)
    with torch.no_grad():
        bias[:4] = -torch.inf
    labels = labels.clamp(min=4)
    logp, entropy = linear_logp(hidden, weight, bias, labels, with_entropy=True, slice_elements=elements)
    total(logp, entropy).backward()
    copies = exactly(hidden, weight, bias)
    expected, expected_entropy, _ = dense(copies[0], copies[1][4:], copies[2][4:], labels - 4)
    total(expected, expected_entropy).backward()
    assert torch.allclose(logp, expected) and torch.allclose(entropy, expected_entropy)
    assert torch.allclose(hidden.grad, copies[0].grad) and torch.allclose(weight.grad, copies[1].grad)


class Memory(TorchDispatchMode):
    """Notes the most elements of one storage that an operation made, and the most bytes of all that were alive."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = self.bytes = 0
        self.alive: dict[StorageWeakRef, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        given = {
            leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)
        }
        result = func(*args, **(kwargs or {}))
        self.alive = {ref: size for ref, size in self.alive.items() if not ref.expired()}
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage()._cdata not in given:
                storage = leaf.untyped_storage()
                self.elements = max(self.elements, storage.nbytes() // leaf.element_size())
                self.alive[StorageWeakRef(storage)] = storage.nbytes()
        self.bytes = max(self.bytes, sum(self.alive.values()))
        return result


@pytest.mark.parametrize("with_entropy", [False, True])
def test_logits_are_never_all_there(with_entropy: bool) -> None:
    """Neither in the forward nor in the backward pass; the largest tensor is a slice or the weight's gradient."""
    m, vocab, d, elements = 64, 20_000, 8, 2**16
    hidden, weight, _, labels = case(m, d, vocab, torch.float32)
    with Memory() as seen:
        logits = hidden @ weight.T
        assert seen.elements == m * vocab, "the mode sees what it should"
        del logits
        seen.elements = 0
        logp, entropy = linear_logp(
            hidden, weight, None, labels, with_entropy=with_entropy, slice_elements=elements, keep_bytes=0
        )
        total(logp, entropy).backward()
    assert seen.elements == max(elements // m * m, vocab * d) < m * vocab / 7


def test_without_a_backward_pass_nothing_is_kept() -> None:
    m, vocab, elements = 64, 20_000, 2**16
    hidden, weight, _, labels = case(m, 8, vocab, torch.float32)
    with Memory() as seen, torch.no_grad():
        linear_logp(hidden, weight, None, labels, slice_elements=elements)
    assert seen.bytes < 4 * 4 * elements < 4 * m * vocab / 4


@pytest.mark.parametrize("keep", [0, 2**20, KEEP_ALL])
def test_what_is_kept_for_the_backward_pass_has_a_limit(keep: int) -> None:
    m, vocab, d, elements = 64, 20_000, 8, 2**16
    hidden, weight, _, labels = case(m, d, vocab, torch.float32)
    saved: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        logp, _ = linear_logp(hidden, weight, None, labels, slice_elements=elements, keep_bytes=keep)
    inputs = sum(x.untyped_storage().nbytes() for x in (hidden, weight, labels))
    kept = sum(saved.values()) - inputs - 2 * 4 * m  # and two numbers a row
    assert (
        kept
        == {0: 0, 2**20: 2**20 // (4 * elements // m * m) * (4 * (elements // m) * m), KEEP_ALL: 4 * m * vocab}[keep]
    )
    with torch.no_grad():
        assert torch.equal(logp, linear_logp(hidden, weight, None, labels, slice_elements=elements, keep_bytes=keep)[0])


def micro_batch(lengths: list[int], packed: bool) -> TensorDict:
    ids = [torch.arange(length) + 100 * row for row, length in enumerate(lengths)]
    masks = [(torch.arange(length) % 3 > 0).long() for length in lengths]
    columns = {"input_ids": ids, "loss_mask": masks}
    nested = {name: torch.nested.as_nested_tensor(value, layout=torch.jagged) for name, value in columns.items()}
    return tu.get_tensordict(nested, {"use_remove_padding": packed})


@pytest.mark.parametrize("packed", [False, True])
def test_targets_are_where_their_tokens_are_predicted(packed: bool) -> None:
    lengths = [5, 1, 8, 2]
    data = micro_batch(lengths, packed)
    shape = torch.Size([1, 16] if packed else [4, 8])
    rows, labels = Targets.of(data, with_entropy=False).rows(shape, torch.device("cpu"))
    found = {}
    for row, length in enumerate(lengths):
        for t in range(1, length):
            if t % 3 > 0:
                at = sum(lengths[:row]) + t - 1 if packed else row * 8 + t - 1
                found[at] = t + 100 * row
    assert dict(zip(rows.tolist(), labels.tolist(), strict=True)) == found


def test_hidden_states_of_another_shape_are_refused() -> None:
    for packed, shape in ((True, [1, 15]), (False, [4, 9])):
        targets = Targets.of(micro_batch([5, 1, 8, 2], packed), with_entropy=False)
        with pytest.raises(AssertionError):
            targets.rows(torch.Size(shape), torch.device("cpu"))


def test_auto_computes_twice_only_where_that_saves_time() -> None:
    for mode, trained in (("auto", 80), ("chunked", 80), ("chunked", 100)):
        assert keep_bytes(mode, trained, 100) == KEEP_BYTES
    assert keep_bytes("auto", 81, 100) == KEEP_ALL
