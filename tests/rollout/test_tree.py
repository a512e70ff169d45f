"""Trees grown by the builder, against a naive EAGLE-2 that enumerates every path."""

import random

import pytest
import torch

from fastrl.rollout.tree import TreeBuilder, ancestors, root_only
from tests.rollout.trees import random_tree

VOCAB_SIZE = 7


class RandomDraft:
    """A drafter by table: log-probabilities that depend on the path below the root."""

    def __init__(self, seed: int) -> None:
        self._seed = seed

    def logprobs(self, path: tuple[int, ...]) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((self._seed, path)) % 2**63)
        return torch.randn(VOCAB_SIZE, generator=generator).mul(2).log_softmax(-1)


def naive_tree(draft: RandomDraft, depth: int, topk: int, num_nodes: int) -> set[tuple[int, ...]]:
    """Paths of the chosen nodes, with dictionaries and sorting, a node at a time."""
    beam: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    candidates: list[tuple[float, tuple[int, ...]]] = []
    for _ in range(depth):
        level = []
        for score, path in beam:
            logprobs = draft.logprobs(path)
            best = sorted(range(VOCAB_SIZE), key=lambda t, lp=logprobs: -lp[t].item())[:topk]
            level += [(score + logprobs[token].item(), (*path, token)) for token in best]
        candidates += level
        beam = sorted(level, key=lambda entry: -entry[0])[:topk]
    chosen = sorted(candidates, key=lambda entry: -entry[0])[: num_nodes - 1]
    return {path for _, path in chosen}


def grown_tree(drafts: list[RandomDraft], depth: int, topk: int, num_nodes: int):
    roots = torch.arange(len(drafts)) + 100
    builder = TreeBuilder(roots, topk)
    beam_paths: list[list[tuple[int, ...]]] = [[()] for _ in drafts]
    for level in range(depth):
        if level:
            beam_paths = [
                [(*paths[parent], token) for parent, token in zip(parents, tokens, strict=True)]
                for paths, parents, tokens in zip(
                    beam_paths,
                    builder.beam_parents_BK.tolist(),
                    builder.beam_tokens_BK.tolist(),
                    strict=True,
                )
            ]
        logprobs = [
            torch.stack([draft.logprobs(path) for path in paths])
            for draft, paths in zip(drafts, beam_paths, strict=True)
        ]
        builder.expand(torch.stack(logprobs))
    return builder.build(num_nodes)


def paths_of(tree, row: int) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = [()]
    for node in range(1, tree.num_nodes):
        parent = int(tree.parents_BN[row, node])
        assert parent < node
        paths.append((*paths[parent], int(tree.tokens_BN[row, node])))
    return paths


@pytest.mark.parametrize(
    ("depth", "topk", "num_nodes"),
    [(1, 1, 2), (3, 1, 4), (1, 5, 4), (2, 3, 7), (4, 2, 8), (5, 4, 30), (3, 7, 60), (2, 2, 7)],
)
def test_the_tree_holds_the_most_likely_nodes(depth, topk, num_nodes):
    drafts = [RandomDraft(seed) for seed in range(5)]
    tree = grown_tree(drafts, depth, topk, num_nodes)
    assert tree.num_nodes == num_nodes
    assert tree.tokens_BN[:, 0].tolist() == [100, 101, 102, 103, 104]
    for row, draft in enumerate(drafts):
        paths = paths_of(tree, row)
        assert set(paths[1:]) == naive_tree(draft, depth, topk, num_nodes)
        assert len(set(paths)) == num_nodes  # siblings differ
        assert [len(path) for path in paths] == tree.depths_BN[row].tolist()
        for path, rank in zip(paths[1:], tree.ranks_BN[row, 1:].tolist(), strict=True):
            logprobs = draft.logprobs(path[:-1])
            assert rank == (logprobs > logprobs[path[-1]]).sum()


@pytest.mark.parametrize("seed", range(10))
def test_ancestor_masks_are_those_of_walking_parents(seed):
    rng = random.Random(seed)
    tree = random_tree(rng, rng.randint(1, 40), 50)
    assert torch.equal(ancestors(tree.parents_BN, tree.depth), tree.ancestors_BNN)


def test_a_certain_draft_keeps_parents_before_children():
    """With log-probability 0 a child ties with its parent; the chain must still be whole."""
    builder = TreeBuilder(torch.tensor([0]), topk=2)
    certain = torch.full((VOCAB_SIZE,), -torch.inf)
    certain[3] = 0.0
    for level in range(4):
        builder.expand(certain.expand(1, 1 if level == 0 else 2, -1))
    tree = builder.build(5)
    assert paths_of(tree, 0)[-1] == (3, 3, 3, 3)
    assert tree.depths_BN.tolist() == [[0, 1, 2, 3, 4]]


@pytest.mark.parametrize("bad_level", [0, 1, 2])
def test_a_draft_that_is_no_number_still_gives_a_tree(bad_level):
    """Parents before children, siblings different: what acceptance relies on."""
    builder = TreeBuilder(torch.tensor([0]), topk=3)
    for level in range(3):
        logprobs = torch.randn(1, 1 if level == 0 else 3, VOCAB_SIZE).log_softmax(-1)
        builder.expand(logprobs.fill_(torch.nan) if level == bad_level else logprobs)
    tree = builder.build(12)
    paths = paths_of(tree, 0)
    assert len(set(paths)) == 12
    assert [len(path) for path in paths] == tree.depths_BN[0].tolist()


def test_plain_decoding_is_the_tree_of_one_node():
    tree = root_only(torch.tensor([5, 6]))
    assert (tree.num_nodes, tree.depth) == (1, 0)
    assert tree.tokens_BN.tolist() == [[5], [6]]
    assert tree.ancestors_BNN.tolist() == [[[True]], [[True]]]
