"""Acceptance is lossless: shown by enumerating every outcome of small trees, exactly.

Every node's sample is drawn from the target's distribution given the node's path. Over all
combinations of samples, the emitted sequence must have the probability that sampling token by token
would give it: the product of the target's conditionals along it. No randomness, no tolerance beyond
float64.
"""

import itertools
import random
from collections import defaultdict

import pytest
import torch

from fastrl.rollout.accept import accept
from fastrl.rollout.sampling import log_distribution
from fastrl.rollout.tree import DraftTree, root_only
from fastrl.types import SamplingParams
from tests.rollout.trees import random_tree, tree_of

SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.5),
    SamplingParams(temperature=2.0),
    SamplingParams(top_k=2),
    SamplingParams(temperature=0.8, top_p=0.8),
    SamplingParams(min_p=0.3),
    SamplingParams(temperature=0.0),
]


def path_to(tree: DraftTree, node: int) -> tuple[int, ...]:
    """Tokens from below the root down to the node."""
    path: list[int] = []
    while node != 0:
        path.append(int(tree.tokens_BN[0, node]))
        node = int(tree.parents_BN[0, node])
    return tuple(reversed(path))


class RandomTarget:
    """A target model: one random conditional distribution for each path of tokens."""

    def __init__(self, seed: int, vocab_size: int, sampling: SamplingParams) -> None:
        self._seed, self._vocab_size, self._sampling = seed, vocab_size, sampling

    def probs(self, path: tuple[int, ...]) -> list[float]:
        generator = torch.Generator().manual_seed(hash((self._seed, path)) % 2**63)
        logits = 2 * torch.randn(self._vocab_size, generator=generator)
        probs = log_distribution(logits, self._sampling).exp().double()
        return (probs / probs.sum()).tolist()


def emitted_distribution(tree: DraftTree, target: RandomTarget, vocab_size: int):
    """Exact probability of each emitted sequence, over all combinations of node samples."""
    node_probs = [target.probs(path_to(tree, node)) for node in range(tree.num_nodes)]
    outcomes = list(itertools.product(range(vocab_size), repeat=tree.num_nodes))
    batch = DraftTree(
        **{
            name: getattr(tree, name).expand(len(outcomes), *getattr(tree, name).shape[1:])
            for name in ("tokens_BN", "parents_BN", "depths_BN", "ranks_BN", "ancestors_BNN")
        },
        depth=tree.depth,
    )
    result = accept(batch, torch.tensor(outcomes))
    distribution: dict[tuple[int, ...], float] = defaultdict(float)
    for samples, accepted, emitted in zip(
        outcomes, result.num_accepted_B.tolist(), result.emitted_BP.tolist(), strict=True
    ):
        probability = 1.0
        for node, token in enumerate(samples):
            probability *= node_probs[node][token]
        distribution[tuple(emitted[: accepted + 1])] += probability
    return distribution


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("seed", range(12))
def test_emitted_tokens_follow_the_target_distribution_exactly(seed, sampling):
    rng = random.Random(seed)
    vocab_size, num_nodes = rng.choice([(2, 7), (3, 5), (4, 4), (3, 6)])
    tree = random_tree(rng, num_nodes, vocab_size)
    target = RandomTarget(seed, vocab_size, sampling)
    distribution = emitted_distribution(tree, target, vocab_size)
    assert sum(distribution.values()) == pytest.approx(1.0, abs=1e-12)
    for sequence, probability in distribution.items():
        expected = 1.0
        for place, token in enumerate(sequence):
            expected *= target.probs(sequence[:place])[token]
        assert probability == pytest.approx(expected, abs=1e-12)


def test_emitted_sequences_end_where_the_tree_does():
    """Every emitted sequence is a path of the tree and one token that leaves it."""
    rng = random.Random(0)
    tree = random_tree(rng, 6, 3)
    paths = {path_to(tree, node) for node in range(tree.num_nodes)}
    distribution = emitted_distribution(tree, RandomTarget(0, 3, SamplingParams()), 3)
    for sequence in distribution:
        assert sequence[:-1] in paths
        assert sequence not in paths


def test_a_walk_by_hand():
    #        root 9
    #       /      \
    #    1: 4      2: 5
    #    /   \        \
    # 3: 6   4: 7     5: 6
    tree = tree_of([9, 4, 5, 6, 7, 6], [0, 0, 0, 1, 1, 2])
    samples = torch.tensor([[4, 7, 6, 1, 2, 3]])  # after root: 4; after node 1: 7; after node 4: 2
    result = accept(tree, samples)
    assert result.num_accepted_B.tolist() == [2]
    assert result.path_BP.tolist() == [[0, 1, 4]]
    assert result.emitted_BP.tolist() == [[4, 7, 2]]
    assert result.ranks_BP.tolist() == [[0, 0, 1]]
    assert result.num_children_BP.tolist() == [[2, 2, 0]]


def test_a_confirmed_node_below_a_rejected_one_is_not_accepted():
    tree = tree_of([9, 4, 6], [0, 0, 1])
    result = accept(tree, torch.tensor([[5, 6, 1]]))  # the root samples 5: node 1 is rejected
    assert result.num_accepted_B.tolist() == [0]
    assert result.emitted_BP[0, 0].item() == 5


def test_the_tree_of_one_node_emits_its_sample():
    result = accept(root_only(torch.tensor([3, 4])), torch.tensor([[7], [8]]))
    assert result.num_accepted_B.tolist() == [0, 0]
    assert result.emitted_BP.tolist() == [[7], [8]]
