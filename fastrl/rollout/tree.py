"""Draft trees: candidates grown level by level, the best of them kept, as masks and parents.

A tree is deterministic: a set of nodes, each a token after its parent's. Node 0, the root, is the
last sampled token, which the target has not seen yet. Nodes stand in an order in which parents come
before children, and siblings carry different tokens; acceptance relies on both.

Leaves out the drafter (torch_engine/drafting.py) and acceptance (accept.py).
Source: EAGLE-2 (Li et al., EMNLP 2024, arXiv 2406.16858): expansion of the best nodes by cumulative
draft probability, then re-ranking of all candidates. Shape legend: fastrl/types.py; C candidates.
"""

from __future__ import annotations

import math
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

    @property
    def num_nodes(self) -> int:
        """N, the root included."""
        return self.tokens_BN.shape[1]


def root_only(root_tokens_B: Tensor) -> DraftTree:
    """The tree of plain decoding: nothing but the last sampled token."""
    zeros = torch.zeros_like(root_tokens_B).unsqueeze(1)
    return DraftTree(
        tokens_BN=root_tokens_B.unsqueeze(1),
        parents_BN=zeros,
        depths_BN=zeros,
        ranks_BN=zeros,
        ancestors_BNN=torch.ones_like(zeros, dtype=torch.bool).unsqueeze(2),
        depth=0,
    )


class TreeBuilder:
    """Grows candidates level by level: the caller drafts, this keeps the books.

    Call `expand` with the draft's log-probabilities below the current beam, `depth` times; in
    between, `beam_*` say which nodes to draft from next. `build` keeps the most likely nodes.

    Args:
        root_tokens_B: int64, the last sampled tokens.
        topk: children a node is expanded into, and nodes expanded a level.
    """

    def __init__(self, root_tokens_B: Tensor, topk: int) -> None:
        self._root_tokens_B = root_tokens_B
        self._topk = topk
        self._tokens: list[Tensor] = []
        self._scores: list[Tensor] = []
        self._parents: list[Tensor] = []
        self._level_sizes: list[int] = []
        root = torch.zeros_like(root_tokens_B).unsqueeze(1)
        self._beam_candidates_BK = root - 1  # candidate numbers; -1 is the root
        self._beam_scores_BK = root.float()
        self.beam_tokens_BK = root_tokens_B.unsqueeze(1)
        """Nodes to draft from next."""
        self.beam_parents_BK = root
        """Which entry of the previous beam each came from."""

    def expand(self, logprobs_BKV: Tensor) -> None:
        """Add the topk children of every beam node; the topk best of them become the beam."""
        # A drafter gone bad must cost speed alone: sorted as a number, NaN would come first.
        logprobs_BKV = logprobs_BKV.nan_to_num(nan=-math.inf, neginf=-math.inf)
        child_logprobs_BKK, child_tokens_BKK = logprobs_BKV.topk(self._topk, dim=-1)
        scores_BC = (self._beam_scores_BK.unsqueeze(-1) + child_logprobs_BKK).flatten(1)
        tokens_BC = child_tokens_BKK.flatten(1)
        first_candidate = sum(self._level_sizes)
        self._tokens.append(tokens_BC)
        self._scores.append(scores_BC)
        self._parents.append(self._beam_candidates_BK.repeat_interleave(self._topk, dim=1))
        self._level_sizes.append(tokens_BC.shape[1])

        self._beam_scores_BK, best_BK = scores_BC.topk(self._topk, dim=-1)
        self._beam_candidates_BK = best_BK + first_candidate
        self.beam_tokens_BK = tokens_BC.gather(1, best_BK)
        self.beam_parents_BK = best_BK // self._topk

    def build(self, num_nodes: int) -> DraftTree:
        """The tree of the root and the `num_nodes - 1` candidates of highest cumulative score.

        A child scores at most its parent, and ties go to the earlier candidate: no node is chosen
        without its ancestors.
        """
        scores_BC = torch.cat(self._scores, dim=1)
        num_chosen = num_nodes - 1
        if num_chosen < scores_BC.shape[1]:
            ranked_BC = scores_BC.sort(dim=-1, descending=True, stable=True).indices
            chosen_BC = ranked_BC[:, :num_chosen].sort(dim=-1).values
        else:
            chosen_BC = torch.arange(num_chosen, device=scores_BC.device).expand(len(scores_BC), -1)
        parents_BN = self._node_parents(chosen_BC, scores_BC.shape[1])
        level_C = torch.repeat_interleave(
            torch.arange(1, len(self._level_sizes) + 1), torch.tensor(self._level_sizes)
        ).to(chosen_BC.device)
        root_BN = torch.zeros_like(parents_BN[:, :1])
        drafted_BC = torch.cat(self._tokens, dim=1).gather(1, chosen_BC)
        depth = len(self._level_sizes)
        return DraftTree(
            tokens_BN=torch.cat((self._root_tokens_B.unsqueeze(1), drafted_BC), dim=1),
            parents_BN=parents_BN,
            depths_BN=torch.cat((root_BN, level_C[chosen_BC]), dim=1),
            # Every level lists its nodes' topk children node by node, in order of likelihood.
            ranks_BN=torch.cat((root_BN, chosen_BC % self._topk), dim=1),
            ancestors_BNN=ancestors(parents_BN, depth),
            depth=depth,
        )

    def _node_parents(self, chosen_BC: Tensor, num_candidates: int) -> Tensor:
        """Parents as node numbers: the root is 0, the i-th chosen candidate i + 1."""
        num_rows, num_chosen = chosen_BC.shape
        node_of_candidate = chosen_BC.new_zeros(num_rows, num_candidates + 1)  # column 0: the root
        nodes = torch.arange(1, num_chosen + 1, device=chosen_BC.device).expand(num_rows, -1)
        node_of_candidate.scatter_(1, chosen_BC + 1, nodes)
        parents_BC = torch.cat(self._parents, dim=1).gather(1, chosen_BC)
        parents_BC = node_of_candidate.gather(1, parents_BC + 1)
        return torch.cat((torch.zeros_like(parents_BC[:, :1]), parents_BC), dim=1)


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
