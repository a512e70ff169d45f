"""Which nodes of a draft tree the target's own samples confirm.

At each node the target's token has been sampled; if it is one of the node's children, the walk goes
on there, else it is emitted and the walk ends. The emitted tokens are exactly those that sampling
without a draft would give, because every one of them was sampled from the target's distribution
given the tokens before it: no draft probability enters, and no residual distribution is needed.

Pure. `accept` walks all rows at once, without a loop over depth; `walk` goes level by level, and
asks for a sample only where it comes by. Shape legend: fastrl/types.py; P path places; R rows that
go on.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from fastrl.rollout.tree import DraftTree


@dataclass(frozen=True, kw_only=True, slots=True)
class Acceptance:
    """The accepted path of each row's tree. P is the tree's depth + 1."""

    num_accepted_B: Tensor  # int64: draft tokens accepted; num_accepted + 1 tokens are emitted
    path_BP: Tensor  # int64: nodes from the root down; arbitrary after the first num_accepted + 1
    emitted_BP: Tensor  # int64: the token sampled at each of them; arbitrary after the same
    ranks_BP: Tensor  # int64: the path's nodes' places among their siblings; arbitrary likewise
    num_children_BP: Tensor  # int64: children that each of them has in the tree; likewise


def accept(tree: DraftTree, sampled_BN: Tensor) -> Acceptance:
    """Walk each tree along the target's samples.

    Args:
        tree: parents before children, siblings with different tokens.
        sampled_BN: int64, the target's token after each node, had the node been accepted.
    """
    if tree.num_nodes == 1:
        zeros_BN = torch.zeros_like(sampled_BN)
        return Acceptance(
            num_accepted_B=zeros_BN[:, 0],
            path_BP=zeros_BN,
            emitted_BP=sampled_BN,
            ranks_BP=zeros_BN,
            num_children_BP=zeros_BN,
        )
    if tree.is_chain:
        return _accept_chain(tree, sampled_BN)
    confirmed_BN = sampled_BN.gather(1, tree.parents_BN) == tree.tokens_BN
    confirmed_BN[:, 0] = True
    accepted_BN = (confirmed_BN.unsqueeze(1) | ~tree.ancestors_BNN).all(-1)
    # The accepted nodes form one path, and node order is depth order along it.
    path_BP = accepted_BN.byte().sort(dim=-1, descending=True, stable=True).indices
    path_BP = path_BP[:, : tree.depth + 1]
    return _along(tree, accepted_BN.sum(-1) - 1, path_BP, sampled_BN.gather(1, path_BP))


def walk(tree: DraftTree, sample_after: Callable[[Tensor, Tensor], Tensor]) -> Acceptance:
    """As `accept`, sampling after the accepted nodes alone; waits for the device at each level.

    Args:
        tree: as `accept` takes it.
        sample_after: the target's tokens, [R] int64, after one node each of some rows, both [R].
    """
    num_rows = len(tree.tokens_BN)
    path_BP = tree.tokens_BN.new_zeros(num_rows, tree.depth + 1)
    emitted_BP, num_accepted_B = torch.zeros_like(path_BP), path_BP.new_zeros(num_rows)
    rows_R = torch.arange(num_rows, device=path_BP.device)
    nodes_R = torch.zeros_like(rows_R)
    for place in range(tree.depth + 1):
        tokens_R = sample_after(rows_R, nodes_R)
        path_BP[rows_R, place] = nodes_R
        emitted_BP[rows_R, place] = tokens_R
        is_next_RN = tree.parents_BN[rows_R] == nodes_R.unsqueeze(1)
        is_next_RN &= tree.tokens_BN[rows_R] == tokens_R.unsqueeze(1)
        is_next_RN[:, 0] = False  # the root has no parent but itself
        goes_on_R, next_R = is_next_RN.max(-1)
        rows_R, nodes_R = rows_R[goes_on_R], next_R[goes_on_R]
        if not len(rows_R):
            break
        num_accepted_B[rows_R] += 1
    return _along(tree, num_accepted_B, path_BP, emitted_BP)


def _along(
    tree: DraftTree, num_accepted_B: Tensor, path_BP: Tensor, emitted_BP: Tensor
) -> Acceptance:
    """With what the tree says of the path's nodes."""
    parents_BC = tree.parents_BN[:, 1:]
    num_children_BN = torch.zeros_like(tree.tokens_BN)
    num_children_BN.scatter_add_(1, parents_BC, torch.ones_like(parents_BC))
    return Acceptance(
        num_accepted_B=num_accepted_B,
        path_BP=path_BP,
        emitted_BP=emitted_BP,
        ranks_BP=tree.ranks_BN.gather(1, path_BP),
        num_children_BP=num_children_BN.gather(1, path_BP),
    )


def _accept_chain(tree: DraftTree, sampled_BN: Tensor) -> Acceptance:
    confirmed_BC = sampled_BN[:, :-1] == tree.tokens_BN[:, 1:]
    nodes_BN = tree.depths_BN
    return Acceptance(
        num_accepted_B=confirmed_BC.cumprod(-1).sum(-1),
        path_BP=nodes_BN,
        emitted_BP=sampled_BN,
        ranks_BP=tree.ranks_BN,
        num_children_BP=(nodes_BN != tree.depth).long(),
    )
