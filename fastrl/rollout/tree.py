"""Draft trees: candidates grown level by level, the best of them kept, as masks and parents.

A tree is deterministic: a set of nodes, each a token after its parent's. Node 0, the root, is the
last sampled token, which the target has not seen yet. Nodes stand in an order in which parents come
before children, and siblings carry different tokens; acceptance relies on both.

Leaves out the drafter (torch_engine/drafting.py) and acceptance (accept.py).
Source: EAGLE-2 (Li et al., EMNLP 2024, arXiv 2406.16858): expansion of the best nodes by cumulative
draft probability, then re-ranking of all candidates. Shape legend: fastrl/types.py; C candidates.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class DraftTree:
    """One tree a row, all of the same number of nodes."""

    tokens_BN: Tensor  # int64; node 0 is the last sampled token
    parents_BN: Tensor  # int64: node index of the parent, less than the node's own; the root's is 0
    depths_BN: Tensor  # int64: 0 for the root
    ranks_BN: Tensor  # int64: place among its siblings, the most likely being 0; the root's is 0
    ancestors_BNN: Tensor  # bool: [b, i, j] is whether j is i or an ancestor of i
    depth: int
    """Most levels below the root that any node may have."""
    is_chain: bool = False
    """Whether each node is the only child of the one before it: what follows is simpler then."""

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return self.tokens_BN.shape[1]


def root_only(root_tokens_B: Tensor) -> DraftTree:
    """The tree of plain decoding: nothing but the last sampled token."""
    return chain(root_tokens_B.unsqueeze(1))


def chain(tokens_BN: Tensor) -> DraftTree:
    """The tree in which each token is the only child of the one before it, the root first."""
    num_rows, num_nodes = tokens_BN.shape
    nodes_1N, parents_1N, ranks_1N, ancestors_1NN = _chain_shape(num_nodes, tokens_BN.device)
    return DraftTree(
        tokens_BN=tokens_BN,
        parents_BN=parents_1N.expand(num_rows, -1),
        depths_BN=nodes_1N.expand(num_rows, -1),
        ranks_BN=ranks_1N.expand(num_rows, -1),
        ancestors_BNN=ancestors_1NN.expand(num_rows, -1, -1),
        depth=num_nodes - 1,
        is_chain=True,
    )


@functools.lru_cache(maxsize=64)
def _chain_shape(num_nodes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Depths, parents, ranks and ancestors of a chain's nodes, for one row."""
    with torch.inference_mode(False):
        nodes_1N = torch.arange(num_nodes, device=device).unsqueeze(0)
        ancestors_1NN = torch.ones(1, num_nodes, num_nodes, dtype=torch.bool, device=device).tril()
        return nodes_1N, (nodes_1N - 1).clamp_min(0), torch.zeros_like(nodes_1N), ancestors_1NN


class TreeBuilder:
    """Grows candidates level by level: the caller drafts, this keeps the books.

    Call `expand` with the draft's log-probabilities below the current beam, `depth` times; in
    between, `beam_*` say which nodes to draft from next. `build` keeps the most likely nodes.
    Candidates are numbered as they come, the root being 0.

    Args:
        root_tokens_B: int64, the last sampled tokens.
        topk: children a node is expanded into, and nodes expanded a level.
    """

    def __init__(self, root_tokens_B: Tensor, topk: int) -> None:
        self._topk = topk
        self.beam_tokens_BK = root_tokens_B.unsqueeze(1)
        """Nodes to draft from next."""
        self.beam_parents_BK = torch.zeros_like(self.beam_tokens_BK)
        """Which entry of the previous beam each came from."""
        self._beam_candidates_BK = self.beam_parents_BK
        self._beam_scores_BK = self.beam_parents_BK.float()
        self._num_candidates = 1
        self._tokens = [self.beam_tokens_BK]
        self._scores = [self._beam_scores_BK]
        self._parents = [self.beam_parents_BK]

    def expand(
        self, logprobs_BKF: Tensor, tokens_of: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """Add the topk children of every beam node; the topk best of them become the beam.

        Args:
            logprobs_BKF: of the draft vocabulary's tokens.
            tokens_of: gives the target's token ids of places in the draft vocabulary; None where
                they are the same.
        """
        child_logprobs_BKK, child_tokens_BKK = logprobs_BKF.topk(self._topk, dim=-1)
        if tokens_of is not None:
            child_tokens_BKK = tokens_of(child_tokens_BKK)
        # A drafter gone bad must cost speed alone: sorted as a number, NaN would come first.
        child_logprobs_BKK = child_logprobs_BKK.nan_to_num(nan=-math.inf, neginf=-math.inf)
        scores_BC = (self._beam_scores_BK.unsqueeze(-1) + child_logprobs_BKK).flatten(1)
        tokens_BC = child_tokens_BKK.flatten(1)
        self._tokens.append(tokens_BC)
        self._scores.append(scores_BC)
        parents_BKK = self._beam_candidates_BK.unsqueeze(-1).expand_as(child_tokens_BKK)
        self._parents.append(parents_BKK.flatten(1))

        self._beam_scores_BK, best_BK = scores_BC.topk(self._topk, dim=-1)
        self._beam_candidates_BK = best_BK + self._num_candidates
        self._num_candidates += tokens_BC.shape[1]
        self.beam_tokens_BK = tokens_BC.gather(1, best_BK)
        self.beam_parents_BK = best_BK // self._topk

    def build(self, num_nodes: int) -> DraftTree:
        """The tree of the root and the `num_nodes - 1` other candidates of highest cumulative
        score.

        A child scores at most its parent, and ties go to the earlier candidate: no node is chosen
        without its ancestors.
        """
        depth = len(self._scores) - 1
        scores_BC = torch.cat(self._scores, dim=1)
        ranked_BC = scores_BC.sort(dim=-1, descending=True, stable=True).indices
        chosen_BN = ranked_BC[:, :num_nodes].sort(dim=-1).values
        nodes_1N, depths_C, ranks_C = _candidate_tables(
            self._topk, depth, num_nodes, scores_BC.device
        )
        node_of_BC = torch.zeros_like(ranked_BC)
        node_of_BC.scatter_(1, chosen_BN, nodes_1N.expand_as(chosen_BN))
        parents_BN = node_of_BC.gather(1, torch.cat(self._parents, dim=1).gather(1, chosen_BN))
        return DraftTree(
            tokens_BN=torch.cat(self._tokens, dim=1).gather(1, chosen_BN),
            parents_BN=parents_BN,
            depths_BN=depths_C.take(chosen_BN),
            ranks_BN=ranks_C.take(chosen_BN),
            ancestors_BNN=ancestors(parents_BN, depth),
            depth=depth,
        )


@functools.lru_cache(maxsize=64)
def _candidate_tables(
    topk: int, depth: int, num_nodes: int, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Node numbers [1, N]; depth and place among its siblings of every candidate, [C].

    Every level lists its nodes' topk children node by node, in order of likelihood.
    """
    with torch.inference_mode(False):
        level_sizes = torch.tensor([1, topk, *[topk * topk] * (depth - 1)])
        depths_C = torch.arange(depth + 1).repeat_interleave(level_sizes)
        ranks_C = (torch.arange(len(depths_C)) - 1).clamp_min(0) % topk
        nodes_1N = torch.arange(num_nodes).unsqueeze(0)
        return nodes_1N.to(device), depths_C.to(device), ranks_C.to(device)


def ancestors(parents_BN: Tensor, depth: int) -> Tensor:
    """[B, N, N] bool: whether node j is node i or one of its ancestors, by pointer doubling."""
    num_nodes = parents_BN.shape[1]
    reached_BNN = torch.eye(num_nodes, dtype=torch.bool, device=parents_BN.device)
    reached_BNN = reached_BNN.expand(len(parents_BN), -1, -1)
    jump_BN = parents_BN  # 2 ** i generations up
    covered = 1
    while covered <= depth:
        jump_BNN = jump_BN.unsqueeze(-1).expand(-1, -1, num_nodes)
        reached_BNN = reached_BNN | reached_BNN.gather(1, jump_BNN)
        jump_BN = jump_BN.gather(1, jump_BN)
        covered *= 2
    return reached_BNN
