"""The drafter's loss against a naive reference that takes one pair of one sequence at a time."""

import copy
import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig

from fastrl.rollout.drafters import distribution_loss
from fastrl.rollout.drafters.chain import chain_depths
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.loss import EagleLoss, LossSettings, eagle_loss
from fastrl.rollout.drafters.packing import fold_segments, pack_sequences
from fastrl.types import SequenceFeatures
from tests.rollout.drafters.conftest import HIDDEN_SIZE, VOCAB_SIZE, random_sequences
from tests.rollout.drafters.naive_chains import naive_chains


@pytest.fixture
def sequences() -> list[SequenceFeatures]:
    return random_sequences((7, 3), (3, 1), (10, 6), (5, 2))


def naive_losses(
    drafter: EagleDrafter,
    embedding_VD: Tensor,
    lm_head_VD: Tensor,
    sequences: list[SequenceFeatures],
) -> dict[str, Tensor]:
    """Each response token's prediction from its own prefix, unpacked and without a mask.

    Token `place` is predicted by the last output over tokens 1 … place-1, hidden 0 … place-2.
    """
    smooth_l1s, cross_entropies, agreements, acceptances = [], [], [], []
    for features in sequences:
        tokens, hidden = features.tokens_T, features.hidden_TD
        for place in range(max(features.num_prompt_tokens, 2), len(tokens)):
            predicted = drafter(
                embedding_VD[tokens[1:place]][None],
                hidden[: place - 1][None],
                torch.arange(place - 1)[None],
            )[0, -1]
            for difference in predicted - hidden[place - 1]:
                is_small = abs(difference) < 1
                smooth_l1s.append(difference**2 / 2 if is_small else abs(difference) - 0.5)
            target_logits = [float(row @ hidden[place - 1]) for row in lm_head_VD.detach()]
            normalizer = sum(math.exp(logit) for logit in target_logits)
            target_probs = [math.exp(logit) / normalizer for logit in target_logits]
            draft_logits = [row @ predicted for row in lm_head_VD.detach()]
            log_normalizer = sum(logit.exp() for logit in draft_logits).log()
            cross_entropies.append(
                -sum(
                    p * (logit - log_normalizer)
                    for p, logit in zip(target_probs, draft_logits, strict=True)
                )
            )
            draft_best = max(range(VOCAB_SIZE), key=lambda token: draft_logits[token].item())
            agreements.append(float(target_probs[draft_best] == max(target_probs)))
            acceptances.append(target_probs[draft_best])
    return {
        "hidden": torch.stack(smooth_l1s).mean(),
        "cross_entropy": torch.stack(cross_entropies).mean(),
        "top1_agreement": torch.tensor(agreements).mean(),
        "top1_acceptance": torch.tensor(acceptances).mean(),
    }


def gradients(drafter: EagleDrafter, loss: Tensor) -> dict[str, Tensor]:
    drafter.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in drafter.named_parameters()}


def packed_loss(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    **options: int,
) -> EagleLoss:
    packed = pack_sequences(sequences, max_pairs=1000)
    return eagle_loss(drafter, *shared_weights, packed, hidden_loss_weight=0.3, **options)


@pytest.mark.parametrize("max_chunk_logits", [2**24, 3 * VOCAB_SIZE, 1])
def test_packed_loss_and_gradients_equal_the_one_pair_at_a_time_reference(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    max_chunk_logits: int,
) -> None:
    naive = naive_losses(drafter, *shared_weights, sequences)
    naive_gradients = gradients(drafter, naive["cross_entropy"] + 0.3 * naive["hidden"])
    result = packed_loss(drafter, shared_weights, sequences, max_chunk_logits=max_chunk_logits)
    for name, expected in naive.items():
        torch.testing.assert_close(getattr(result, name), expected.detach(), msg=name)
    expected_loss = (naive["cross_entropy"] + 0.3 * naive["hidden"]).detach()
    torch.testing.assert_close(result.loss.detach(), expected_loss)
    for name, gradient in gradients(drafter, result.loss).items():
        torch.testing.assert_close(gradient, naive_gradients[name], rtol=1e-4, atol=1e-5)


def naive_loss(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    num_depths: int,
) -> Tensor:
    """Chain by chain in float64: each depth's mean, the next counting 0.8 times as much."""
    embedding_VD, lm_head_VD = (weight.detach().double() for weight in shared_weights)
    total, total_weight = torch.zeros((), dtype=torch.float64), 0.0
    for depth in range(1, num_depths + 1):
        losses = []
        for predicted, target in naive_chains(drafter, embedding_VD, sequences, depth):
            distance = (predicted - target).abs()
            smooth_l1 = torch.where(distance < 1, distance**2 / 2, distance - 0.5).mean()
            target_V = (lm_head_VD @ target).softmax(0)
            cross_entropy = -(target_V * (lm_head_VD @ predicted).log_softmax(0)).sum()
            losses.append(cross_entropy + 0.3 * smooth_l1)
        total = total + 0.8 ** (depth - 1) * sum(losses) / len(losses)
        total_weight += 0.8 ** (depth - 1)
    return total / total_weight


@pytest.mark.parametrize("is_folded", [False, True])
@pytest.mark.parametrize("max_chunk_logits", [2**24, 3 * VOCAB_SIZE])
@pytest.mark.parametrize("num_depths", [1, 2, 4])
def test_loss_over_depths_and_its_gradients_equal_the_one_chain_at_a_time_reference(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    num_depths: int,
    max_chunk_logits: int,
    is_folded: bool,
) -> None:
    """In float64: several depths amplify float32's rounding."""
    drafter, embedding_VD, lm_head_VD = in_float64(drafter, shared_weights)
    sequences = [dataclasses.replace(f, hidden_TD=f.hidden_TD.double()) for f in sequences]
    expected = naive_loss(drafter, shared_weights, sequences, num_depths)
    expected_gradients = gradients(drafter, expected)
    packed = pack_sequences(sequences, max_pairs=1000)
    result = eagle_loss(
        drafter,
        embedding_VD,
        lm_head_VD,
        fold_segments(packed) if is_folded else packed,
        hidden_loss_weight=0.3,
        num_depths=num_depths,
        max_chunk_logits=max_chunk_logits,
    )
    torch.testing.assert_close(result.loss, expected, rtol=1e-6, atol=0)  # norms are in float32
    for name, gradient in gradients(drafter, result.loss).items():
        tolerance = 1e-5 * gradient.abs().max().item()
        torch.testing.assert_close(gradient, expected_gradients[name], rtol=0, atol=tolerance)


def in_float64(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> tuple[EagleDrafter, Tensor, Tensor]:
    embedding_VD, lm_head_VD = (weight.detach().double() for weight in shared_weights)
    return copy.deepcopy(drafter).double(), embedding_VD, lm_head_VD


def test_the_parts_are_those_of_depth_1_however_many_are_trained(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    one = packed_loss(drafter, shared_weights, sequences)
    three = packed_loss(drafter, shared_weights, sequences, num_depths=3)
    for name in ("hidden", "cross_entropy", "top1_agreement", "top1_acceptance"):
        assert torch.equal(getattr(one, name), getattr(three, name)), name
    assert one.loss != three.loss


def test_depths_that_no_chain_reaches_do_not_count(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    """Two response tokens make two depths, whatever is asked for."""
    sequences = random_sequences((6, 4))
    two, nine = (packed_loss(drafter, shared_weights, sequences, num_depths=n).loss for n in (2, 9))
    assert torch.equal(two, nine)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_depths": 0}, "num_depths must be >= 1, got 0"),
        ({"hidden_weight": -0.1}, "hidden_weight must be >= 0 and finite, got -0.1"),
        ({"hidden_weight": math.inf}, "hidden_weight must be >= 0 and finite, got inf"),
    ],
)
def test_bad_settings_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LossSettings(**options)


def test_a_drafter_that_reproduces_the_target_reaches_its_entropy(
    shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    """Feed it the targets as predictions: SmoothL1 is 0, agreement 1, cross-entropy the entropy."""
    packed = pack_sequences(sequences, max_pairs=1000)

    class PerfectDrafter(EagleDrafter):
        def forward(self, *args: object, **kwargs: object) -> Tensor:
            return packed.target_hidden_BTD

    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=HIDDEN_SIZE,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    result = eagle_loss(PerfectDrafter(config), *shared_weights, packed, hidden_loss_weight=1.0)
    targets_MD = packed.target_hidden_BTD[packed.loss_mask_BT]
    probs = (targets_MD @ shared_weights[1].detach().T).softmax(-1)
    assert result.hidden.item() == 0
    assert result.top1_agreement.item() == 1
    entropy = torch.distributions.Categorical(probs).entropy().mean()
    torch.testing.assert_close(result.cross_entropy, entropy)
    torch.testing.assert_close(result.top1_acceptance, probs.amax(-1).mean())


def test_embedding_and_lm_head_get_no_gradient(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    for max_chunk_logits in (2**24, VOCAB_SIZE):
        packed_loss(
            drafter, shared_weights, sequences, max_chunk_logits=max_chunk_logits
        ).loss.backward()
    assert all(weight.grad is None for weight in shared_weights)
    assert all(parameter.grad.abs().sum() > 0 for parameter in drafter.parameters())


def test_no_logits_are_kept_for_backward_or_held_beyond_a_chunk(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    saved: list[tuple[int, ...]] = []

    def record(tensor: Tensor) -> Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor),
        LogitRows() as held,
    ):
        packed_loss(drafter, shared_weights, sequences, max_chunk_logits=3 * VOCAB_SIZE)
    assert saved
    assert not [shape for shape in saved if shape[-1:] == (VOCAB_SIZE,)]
    assert max(held.num_rows) == 3


class LogitRows(TorchDispatchMode):
    """Rows of all that is computed over the vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.num_rows: list[int] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        is_head = function is torch.ops.aten.t.default  # transposed
        if isinstance(result, Tensor) and result.shape[1:] == (VOCAB_SIZE,) and not is_head:
            self.num_rows.append(result.shape[0])
        return result


@pytest.mark.parametrize("is_trimmed", [False, True])
def test_the_target_is_computed_once_for_all_depths(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    monkeypatch: pytest.MonkeyPatch,
    is_trimmed: bool,
) -> None:
    if is_trimmed:
        drafter.trim_vocabulary((1, 4, 6))
    num_rows: list[int] = []

    def counted(hidden_MD: Tensor, head_FD: Tensor) -> Tensor:
        if len(head_FD) == VOCAB_SIZE:
            num_rows.append(len(hidden_MD))
        return linear(hidden_MD, head_FD)

    monkeypatch.setattr(distribution_loss, "linear", counted)
    num_chains = [4 + 1 + 4 + 3, 3 + 3 + 2, 2 + 2 + 1]  # that reach each depth
    packed_loss(drafter, shared_weights, sequences, num_depths=3).loss.backward()
    assert num_rows == [num_chains[0], *([] if is_trimmed else num_chains)]


@pytest.mark.parametrize("needs_head", [False, True])
@pytest.mark.parametrize("chunk", [2, 100])
def test_the_gradient_of_one_pass_is_that_of_finite_differences(
    drafter: EagleDrafter,
    shared_weights: tuple[Tensor, Tensor],
    sequences: list[SequenceFeatures],
    chunk: int,
    needs_head: bool,
) -> None:
    exact, embedding_VD, lm_head_VD = in_float64(drafter, shared_weights)
    given = [dataclasses.replace(f, hidden_TD=f.hidden_TD.double()) for f in sequences]
    packed = pack_sequences(given, max_pairs=1000)
    depths = list(chain_depths(exact, embedding_VD, packed, max_depth=3))
    head_FD = lm_head_VD.flip(0).clone().requires_grad_(needs_head)
    task = distribution_loss._Task(
        target_MD=depths[0].target_MD,
        lm_head_VD=lm_head_VD,
        token_map_F=None,
        index_by_depth=tuple(chains.target_index_M for chains in depths),
        weights=(0.7, 1.3, 0.2),
        top_k=3,
        top_k_weight=2.0,
        chunk=chunk,
    )
    predicted = [chains.predicted_MD.detach().requires_grad_() for chains in depths]
    assert torch.autograd.gradcheck(
        lambda head, *p: distribution_loss._OnePass.apply(task, head, *p)[0], (head_FD, *predicted)
    )


def test_products_run_in_autocasts_dtype_and_losses_in_float32(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor], sequences: list[SequenceFeatures]
) -> None:
    exact = packed_loss(drafter, shared_weights, sequences)
    exact_gradients = gradients(drafter, exact.loss)
    with torch.autocast("cpu", torch.bfloat16), ProductTypes() as products:
        rounded = packed_loss(drafter, shared_weights, sequences)
    assert products.dtypes == {torch.bfloat16}
    for name in ("loss", "hidden", "cross_entropy", "top1_acceptance"):
        value = getattr(rounded, name)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, getattr(exact, name), rtol=0.05, atol=0.05)
    for name, gradient in gradients(drafter, rounded.loss).items():
        expected = exact_gradients[name]
        assert torch.cosine_similarity(gradient.flatten(), expected.flatten(), dim=0) > 0.98


class ProductTypes(TorchDispatchMode):
    """Of matrix products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
            self.dtypes.add(result.dtype)
        return result


def test_an_empty_loss_mask_is_refused(
    drafter: EagleDrafter, shared_weights: tuple[Tensor, Tensor]
) -> None:
    prompt_only = SequenceFeatures(
        tokens_T=torch.arange(5),
        hidden_TD=torch.zeros(5, HIDDEN_SIZE),
        num_prompt_tokens=5,
        rl_step=0,
    )
    with pytest.raises(ValueError, match="no response token"):
        packed_loss(drafter, shared_weights, [prompt_only])
