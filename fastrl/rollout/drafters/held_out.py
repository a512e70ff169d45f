"""What held-out responses say of a drafter: top-k accuracy, accept lengths, agreement by depth.

At each place of a response where decoding may ask the drafter, chains run along the true tokens
(chain.py, token_ranks.py). Had a decode step begun there with a chain of its likeliest tokens, it
would have emitted

    accept_length = min(1 + drafts accepted before the first that is not, tokens left)

tokens, a draft being accepted if it is the token that the response has: of a chain that is exact,
however the response was sampled. With "among the k likeliest" for "the likeliest" it is the most
that any tree of that width can yield. A mean counts every place once, while decoding skips the
places of drafts it accepted, and so is in easy passages less often.

The place of a response token is its number from 0; that at 0 is the prefill's, so nobody drafts it,
and it is in agreement alone, which is the loss's. All is sums, so ranks add theirs. Leaves out
trees as they are served (scripts/eval_drafter.py). Shape legend: fastrl/types.py; M counts chains
of depth 1, S the sequences of a row, G the groups of places, K is that of top-k.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fastrl.rollout.drafters.agreement import DepthAgreement, agreement_of_depths
from fastrl.rollout.drafters.chain import chain_depths
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.packing import PackedFeatures
from fastrl.rollout.drafters.token_ranks import ranks_by_depth
from fastrl.types import TokenSequence

MAX_DEPTH = 6
KS = (1, 2, 4, 8)
PLACES = {"1-15": (1, 15), "16-63": (16, 63), "64-255": (64, 255), "256_up": (256, 2**62)}
"""First and last place of each range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutRow:
    """A packed row of responses that are not trained on, and what they are."""

    packed: PackedFeatures
    sequences: tuple[TokenSequence, ...]
    """One a segment."""
    tasks: tuple[str, ...]
    """Theirs."""

    def __post_init__(self) -> None:
        num_segments = int(self.packed.segment_BT.max()) + 1
        assert num_segments == len(self.sequences) == len(self.tasks), (
            f"{num_segments} segments of {len(self.sequences)} sequences, {len(self.tasks)} tasks"
        )

    def to(self, device: torch.device | str, dtype: torch.dtype | None = None) -> HeldOutRow:
        """The same row on `device`, its hidden states as `dtype` if one is given."""
        return HeldOutRow(
            packed=self.packed.to(device, dtype),
            sequences=tuple(
                TokenSequence(
                    tokens_T=one.tokens_T.to(device), num_prompt_tokens=one.num_prompt_tokens
                )
                for one in self.sequences
            ),
            tasks=self.tasks,
        )


# -- of a row -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class PlaceFigures:
    """At every place of a row where decoding may ask the drafter; M counts those."""

    sequence_M: Tensor  # int64: which of the row's
    place_M: Tensor  # int64, from 1
    ranks_MN: Tensor  # int64 [M, MAX_DEPTH]: of the response's tokens by depth, see `token_ranks`
    is_drafted_MN: Tensor  # bool: the response is long enough for that depth
    accept_lengths_MK: Tensor  # int64, by k of `KS`


@torch.no_grad()
def place_figures(
    drafter: EagleDrafter, embedding_VD: Tensor, lm_head_VD: Tensor, row: HeldOutRow
) -> tuple[PlaceFigures, list[DepthAgreement]]:
    """From one pass of the drafter over a row on its device: the places, and `agreement_by_depth`.

    Args:
        drafter: of the target whose hidden states are packed.
        embedding_VD: the target's.
        lm_head_VD: the target's.
        row: hidden states of the drafter's dtype.
    """
    packed, device = row.packed, embedding_VD.device
    depths = list(chain_depths(drafter, embedding_VD, packed, max_depth=MAX_DEPTH))
    sequence_M = packed.segment_BT[packed.loss_mask_BT]
    index_M = packed.position_ids_BT[packed.loss_mask_BT] + 2
    tokens_ST = pad_sequence([one.tokens_T for one in row.sequences], batch_first=True)
    num_tokens_S = torch.tensor([len(one) for one in row.sequences], device=device)
    num_prompt_S = torch.tensor([one.num_prompt_tokens for one in row.sequences], device=device)
    ranks = ranks_by_depth(drafter, lm_head_VD, depths, tokens_ST[sequence_M, index_M])
    ranks_MN = torch.zeros(len(index_M), MAX_DEPTH, dtype=torch.int64, device=device)
    is_drafted_MN = torch.zeros_like(ranks_MN, dtype=torch.bool)
    for shift, (chains, of_depth) in enumerate(zip(depths, ranks, strict=True)):
        start = chains.target_index_M - shift  # a segment's chains follow one another
        ranks_MN[start, shift] = of_depth
        is_drafted_MN[start, shift] = True
    place_M = index_M - num_prompt_S[sequence_M]
    num_left_M = num_tokens_S[sequence_M] - index_M
    is_asked_M = place_M > 0
    lengths = [
        torch.minimum(1 + ((ranks_MN < k) & is_drafted_MN).cumprod(1).sum(1), num_left_M)
        for k in KS
    ]
    places = PlaceFigures(
        sequence_M=sequence_M[is_asked_M],
        place_M=place_M[is_asked_M],
        ranks_MN=ranks_MN[is_asked_M],
        is_drafted_MN=is_drafted_MN[is_asked_M],
        accept_lengths_MK=torch.stack(lengths, 1)[is_asked_M],
    )
    return places, agreement_of_depths(drafter, lm_head_VD, depths)


# -- of all rows ----------------------------------------------------------------------------------


class HeldOutSums:
    """Adds up rows, and ranks.

    Args:
        tasks: names of all, on all ranks in the same order.
        device: of the rows.
    """

    def __init__(self, tasks: Sequence[str], device: torch.device) -> None:
        self._tasks = tuple(tasks)
        num_groups = 1 + len(tasks) + len(PLACES)
        zeros = torch.zeros((), dtype=torch.float64, device=device)
        self._agreement_3N = zeros.new_zeros(3, MAX_DEPTH)
        self._drafted_N = zeros.new_zeros(MAX_DEPTH)
        self._hits_KN = zeros.new_zeros(len(KS), MAX_DEPTH)
        self._places_G = zeros.new_zeros(num_groups)  # all, each task's, each range's
        self._lengths_GK = zeros.new_zeros(num_groups, len(KS))

    def add(
        self, places: PlaceFigures, agreements: Sequence[DepthAgreement], tasks: Sequence[str]
    ) -> None:
        """A row; `tasks` are those of its sequences."""
        for depth, at_depth in enumerate(agreements):
            sums = (1.0, at_depth.cross_entropy, at_depth.top1_acceptance)
            self._agreement_3N[:, depth] += at_depth.num_chains * self._agreement_3N.new_tensor(
                sums
            )
        self._drafted_N += places.is_drafted_MN.sum(0)
        for number, k in enumerate(KS):
            self._hits_KN[number] += ((places.ranks_MN < k) & places.is_drafted_MN).sum(0)
        task_M = self._places_G.new_tensor([self._tasks.index(task) for task in tasks])[
            places.sequence_M
        ]
        is_of_group_GM = torch.stack(
            [
                torch.ones_like(task_M, dtype=torch.bool),
                *(task_M == number for number in range(len(self._tasks))),
                *((places.place_M >= a) & (places.place_M <= b) for a, b in PLACES.values()),
            ]
        ).to(self._lengths_GK.dtype)
        self._places_G += is_of_group_GM.sum(1)
        self._lengths_GK += is_of_group_GM @ places.accept_lengths_MK.to(self._lengths_GK.dtype)

    def reduce(self, add_ranks: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those over all ranks; each has to call it."""
        parts = (
            *(self._agreement_3N, self._drafted_N, self._hits_KN),
            *(self._places_G, self._lengths_GK),
        )
        total = add_ranks(torch.cat([part.flatten() for part in parts]))
        for part, summed in zip(
            parts, torch.split(total, [part.numel() for part in parts]), strict=True
        ):
            part.copy_(summed.view_as(part))

    def figures(self) -> dict[str, float]:
        """Means by name, as in docs/metrics.md; none where nothing was counted."""
        values: dict[str, float] = {}
        for depth, (num_chains, cross_entropy, acceptance) in enumerate(
            self._agreement_3N.T.tolist(), start=1
        ):
            if num_chains:
                values[f"loss_depth_{depth}"] = cross_entropy / num_chains
                values[f"acceptance_depth_{depth}"] = acceptance / num_chains
        for depth, (drafted, *hits) in enumerate(
            torch.cat((self._drafted_N[None], self._hits_KN)).T.tolist(), start=1
        ):
            for k, num_hits in zip(KS, hits, strict=True):
                if drafted:
                    values[f"top{k}_accuracy_depth_{depth}"] = num_hits / drafted
        return values | self._accept_lengths()

    def _accept_lengths(self) -> dict[str, float]:
        """By k; by task and by range of places of the likeliest token alone."""
        means_GK = (self._lengths_GK / self._places_G[:, None]).tolist()
        names = [
            *(f"task_{task}" for task in self._tasks),
            *(f"place_{places}" for places in PLACES),
        ]
        values = {f"top{k}": mean for k, mean in zip(KS, means_GK[0], strict=True)}
        values |= {name: means[0] for name, means in zip(names, means_GK[1:], strict=True)}
        return {
            f"accept_length_{name}": mean for name, mean in values.items() if not math.isnan(mean)
        }
