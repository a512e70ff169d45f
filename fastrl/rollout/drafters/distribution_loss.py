"""A drafter's cross-entropy against the target's distributions and its gradient, in one pass.

    wanted_f = target_probs_f * (1 + top_k_weight * [f is among the target's top_k])
    loss     = sum over chains of weight * -sum_f wanted_f * log draft_probs_f
    gradient with respect to draft logits = weight * (sum(wanted) * draft_probs - wanted)

Logits of a row over a large vocabulary are most of a step's memory and time. So the target's are
computed once a place, for all depths; and places are taken in chunks, of which hidden states'
gradients are kept in place of logits, so that backward computes none anew. Products with LM heads
run in autocast's dtype, or else the head's; all else in float32.

Sources: fused linear cross-entropy as in Liger-Kernel (Hsu et al., 2024, arXiv 2410.10989); the
top-k term is HASS's (Zhang et al., 2024, arXiv 2408.15766), whose probabilities keep their values.
Leaves out weights of depths (loss.py). Shape legend: fastrl/types.py; M counts chains, m places of
a chunk, F tokens of the draft vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from fastrl.rollout.drafters.chain import ChainDepth
from fastrl.rollout.drafters.eagle import EagleDrafter

_CPU_CHUNK_LOGITS = 2**24
"""64 MiB in float32."""
_CUDA_SHARE = 256
"""A chunk's logits in float32 take this fraction of a GPU's memory; about five like them live."""


def default_chunk_logits(device: torch.device) -> int:
    """Places × vocabulary that are held at a time; a function of the device alone, on which
    rounding depends."""
    if device.type != "cuda":
        return _CPU_CHUNK_LOGITS
    return int(torch.cuda.get_device_properties(device).total_memory) // (4 * _CUDA_SHARE)


@dataclass(frozen=True, kw_only=True, slots=True)
class DistributionLoss:
    """Over all depths."""

    loss: Tensor  # weighted sum, a float32 scalar; the only one that carries a gradient
    sums_N3: Tensor  # by depth: cross-entropy, top-1 agreement and top-1 acceptance, over chains


@dataclass(frozen=True, kw_only=True, slots=True)
class _Task:
    """What one pass is a function of, besides what it is differentiated by."""

    target_MD: Tensor  # of depth 1's chains, which are those of all depths
    lm_head_VD: Tensor
    token_map_F: Tensor | None
    index_by_depth: tuple[Tensor, ...]  # [M] each: rows of `target_MD`, ascending
    weights: tuple[float, ...]
    top_k: int
    top_k_weight: float
    chunk: int


def distribution_loss(
    drafter: EagleDrafter,
    depths: Sequence[ChainDepth],
    lm_head_VD: Tensor,
    *,
    weights: Sequence[float],
    top_k: int = 0,
    top_k_weight: float = 0.0,
    max_chunk_logits: int | None = None,
) -> DistributionLoss:
    """Loss of a drafter's predictions along chains; the target is a constant.

    Args:
        drafter: whose vocabulary and LM head it is.
        depths: of a row, from the first on.
        lm_head_VD: the target's LM head.
        weights: of a chain at each depth.
        top_k: the target's most likely tokens that count more; 0: none does.
        top_k_weight: by how much.
        max_chunk_logits: places × vocabulary held in memory at a time; None: as suits the device.
    """
    max_chunk_logits = max_chunk_logits or default_chunk_logits(lm_head_VD.device)
    task = _Task(
        target_MD=depths[0].target_MD.detach(),
        lm_head_VD=lm_head_VD.detach(),
        token_map_F=drafter.token_map_F,
        index_by_depth=tuple(chains.target_index_M for chains in depths),
        weights=tuple(weights),
        top_k=min(top_k, lm_head_VD.shape[0]) if top_k_weight else 0,
        top_k_weight=top_k_weight,
        chunk=max(max_chunk_logits // lm_head_VD.shape[0], 1),
    )
    predicted = [drafter.head_input(chains.predicted_MD) for chains in depths]
    draft_head_FD = drafter.draft_head(task.lm_head_VD)
    if torch.is_grad_enabled():
        loss, sums_N3 = _OnePass.apply(task, draft_head_FD, *predicted)  # type: ignore[no-untyped-call]
        return DistributionLoss(loss=loss, sums_N3=sums_N3)
    result = _one_pass(task, draft_head_FD, predicted)
    return DistributionLoss(loss=result.loss, sums_N3=result.sums_N3)


class _OnePass(torch.autograd.Function):
    """Forward computes the gradients too; backward scales them."""

    @staticmethod
    def forward(
        ctx: Any, task: _Task, draft_head_FD: Tensor, *predicted: Tensor
    ) -> tuple[Tensor, Tensor]:
        _, needs_head, *needs_predicted = ctx.needs_input_grad
        result = _one_pass(
            task,
            draft_head_FD,
            predicted,
            with_hidden_gradients=any(needs_predicted),
            with_head_gradient=needs_head,
        )
        ctx.save_for_backward(result.head_gradient_FD, *result.hidden_gradients)
        ctx.mark_non_differentiable(result.sums_N3)
        return result.loss, result.sums_N3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        head_gradient_FD, *hidden_gradients = ctx.saved_tensors
        of_head = None if head_gradient_FD is None else head_gradient_FD * grad_loss
        of_hidden = [grad_loss.to(one.dtype) * one for one in hidden_gradients]
        return None, of_head, *(of_hidden or [None] * (len(ctx.needs_input_grad) - 2))


# -- the pass -------------------------------------------------------------------------------------


@dataclass(kw_only=True, slots=True)
class _Result:
    """What a pass sums up, chunk by chunk."""

    loss: Tensor
    sums_N3: Tensor
    hidden_gradients: list[Tensor]
    """[M, D] by depth; empty where none is asked for."""
    head_gradient_FD: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class _TargetChunk:
    """The target at some places."""

    probs_mF: Tensor  # of the tokens that can be drafted
    wanted_mF: Tensor  # the same with top-k tokens counting more
    total_m: Tensor  # sum of `wanted_mF`
    best_m: Tensor  # int64: the most likely token of all


def _one_pass(
    task: _Task,
    draft_head_FD: Tensor,
    predicted: Sequence[Tensor],
    *,
    with_hidden_gradients: bool = False,
    with_head_gradient: bool = False,
) -> _Result:
    with torch.no_grad():
        float_type = statistics_dtype(draft_head_FD)
        lm_head_VD, head_FD = (
            head.to(_product_dtype(head)) for head in (task.lm_head_VD, draft_head_FD)
        )
        result = _Result(
            loss=head_FD.new_zeros((), dtype=float_type),
            sums_N3=head_FD.new_zeros((len(predicted), 3), dtype=float_type),
            hidden_gradients=[torch.empty_like(p) for p in predicted if with_hidden_gradients],
            head_gradient_FD=torch.zeros_like(draft_head_FD) if with_head_gradient else None,
        )
        for places, bounds in _chunks(task):
            target = _target_chunk(task, task.target_MD[places], lm_head_VD)
            for depth, chains in enumerate(bounds):
                index_M = task.index_by_depth[depth][chains] - places.start
                if len(index_M):
                    _add_depth(
                        task, result, target, head_FD, depth, chains, index_M, predicted[depth]
                    )
        return result


def _chunks(task: _Task) -> list[tuple[slice, list[slice]]]:
    """Places, and for each depth the chains that have their targets there."""
    num_places = len(task.target_MD)
    if num_places <= task.chunk:
        whole = [slice(0, len(index_M)) for index_M in task.index_by_depth]
        return [(slice(0, num_places), whole)]
    edges = [*range(0, num_places, task.chunk), num_places]
    edges_E = torch.tensor(edges, device=task.target_MD.device)
    bounds = torch.stack([torch.searchsorted(i, edges_E) for i in task.index_by_depth]).tolist()
    by_depth = [[slice(a, b) for a, b in itertools.pairwise(one)] for one in bounds]
    chains = [list(of_chunk) for of_chunk in zip(*by_depth, strict=True)]
    places = [slice(a, b) for a, b in itertools.pairwise(edges)]
    return list(zip(places, chains, strict=True))


def _target_chunk(task: _Task, target_mD: Tensor, lm_head_VD: Tensor) -> _TargetChunk:
    logits_mV = linear(target_mD.to(lm_head_VD.dtype), lm_head_VD)
    wanted_mV = probs_mV = logits_mV.to(statistics_dtype(logits_mV)).softmax(-1)
    if task.top_k:
        top_mK, tokens_mK = probs_mV.topk(task.top_k, dim=-1)
        wanted_mV = probs_mV.scatter(-1, tokens_mK, top_mK * (1 + task.top_k_weight))
    probs_mF, wanted_mF = _draftable(probs_mV, task), _draftable(wanted_mV, task)
    return _TargetChunk(
        probs_mF=probs_mF,
        wanted_mF=wanted_mF if task.top_k else probs_mF,
        total_m=wanted_mF.sum(-1),
        best_m=probs_mV.argmax(-1),
    )


def _draftable(values_mV: Tensor, task: _Task) -> Tensor:
    return values_mV if task.token_map_F is None else values_mV.index_select(-1, task.token_map_F)


def _add_depth(
    task: _Task,
    result: _Result,
    target: _TargetChunk,
    head_FD: Tensor,
    depth: int,
    chains: slice,
    index_M: Tensor,
    predicted_MD: Tensor,
) -> None:
    """Sum up the chains of a depth whose targets are in a chunk, and keep their gradients."""
    predicted = predicted_MD[chains].to(head_FD.dtype)
    weight = task.weights[depth]
    if len(index_M) == len(target.best_m):  # ascending: these are all
        probs, wanted = target.probs_mF, target.wanted_mF
    else:
        probs = target.probs_mF[index_M]
        wanted = target.wanted_mF[index_M] if task.top_k else probs
    logits_MF = linear(predicted, head_FD)
    logprobs_MF = logits_MF.to(statistics_dtype(logits_MF)).log_softmax(-1)
    best_M = logprobs_MF.argmax(-1)
    cross_entropy = -torch.sum(probs * logprobs_MF)
    wanted_loss = -torch.sum(wanted * logprobs_MF) if task.top_k else cross_entropy
    best_token_M = best_M if task.token_map_F is None else task.token_map_F[best_M]
    is_agreed_M = best_token_M == target.best_m[index_M]
    acceptance_M = probs.gather(-1, best_M.unsqueeze(-1))
    result.loss += weight * wanted_loss
    result.sums_N3[depth] += torch.stack((cross_entropy, is_agreed_M.sum(), acceptance_M.sum()))
    if not result.hidden_gradients and result.head_gradient_FD is None:
        return
    total_M1 = target.total_m[index_M].unsqueeze(-1)
    gradient_MF = logprobs_MF.exp_().mul_(weight * total_M1).sub_(wanted, alpha=weight)
    gradient_MF = gradient_MF.to(head_FD.dtype)
    if result.hidden_gradients:
        result.hidden_gradients[depth][chains] = (gradient_MF @ head_FD).to(predicted_MD.dtype)
    if result.head_gradient_FD is not None:
        result.head_gradient_FD += gradient_MF.T @ predicted


def _product_dtype(tensor: Tensor) -> torch.dtype:
    """Of products with it: autocast's, if there is one."""
    device = tensor.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else tensor.dtype


def statistics_dtype(tensor: Tensor) -> torch.dtype:
    """In which losses of it are computed: float32, or wider."""
    return torch.promote_types(tensor.dtype, torch.float32)
