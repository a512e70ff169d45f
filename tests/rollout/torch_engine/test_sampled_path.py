"""The walk that samples on its way gives what sampling after every node gives, to the bit."""

import random

import pytest
import torch

from fastrl.rollout.torch_engine import sampled_path
from fastrl.rollout.tree import DraftTree, chain
from fastrl.types import SamplingParams
from tests.rollout.trees import random_tree

VOCAB_SIZE = 3
SAMPLINGS = [
    SamplingParams(),
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.7, top_p=0.9, top_k=2),
]


def random_trees(num_rows: int, num_nodes: int, *, is_chain: bool) -> DraftTree:
    """One a row."""
    rng = random.Random(0)
    if is_chain:
        return chain(torch.randint(VOCAB_SIZE, (num_rows, num_nodes)))
    trees = [random_tree(rng, num_nodes, VOCAB_SIZE) for _ in range(num_rows)]
    names = ("tokens_BN", "parents_BN", "depths_BN", "ranks_BN", "ancestors_BNN")
    return DraftTree(
        **{name: torch.cat([getattr(tree, name) for tree in trees]) for name in names},
        depth=max(tree.depth for tree in trees),
    )


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=str)
@pytest.mark.parametrize("is_chain", [False, True], ids=["tree", "chain"])
@pytest.mark.parametrize("few_numbers", [0, 3 * VOCAB_SIZE], ids=["row by row", "3 rows at once"])
def test_sampling_on_the_way_accepts_what_sampling_after_every_node_does(
    monkeypatch, few_numbers, is_chain, sampling
):
    torch.manual_seed(0)
    num_rows, num_nodes = 40, 7
    tree = random_trees(num_rows, num_nodes, is_chain=is_chain)
    logits_BNV = 2 * torch.randn(num_rows, num_nodes, VOCAB_SIZE)
    uniforms_BN = torch.rand(num_rows, num_nodes, dtype=torch.float64)
    expected, expected_logprobs_BP = sampled_path.sample_path(
        tree, logits_BNV, uniforms_BN, sampling
    )
    monkeypatch.setattr(sampled_path, "_FEW_NUMBERS", few_numbers)
    found, logprobs_BP = sampled_path.sample_path(tree, logits_BNV, uniforms_BN, sampling)
    assert torch.equal(found.num_accepted_B, expected.num_accepted_B)
    assert found.num_accepted_B.max() >= 2
    for row, accepted in enumerate(found.num_accepted_B.tolist()):
        places = slice(0, accepted + 1)
        for name in ("path_BP", "emitted_BP", "ranks_BP", "num_children_BP"):
            ours, theirs = getattr(found, name), getattr(expected, name)
            assert torch.equal(ours[row, places], theirs[row, places]), name
        assert torch.equal(logprobs_BP[row, places], expected_logprobs_BP[row, places])


def test_nothing_is_sampled_off_the_path(monkeypatch):
    """Logits that are not numbers, after nodes that the walk does not reach, are not looked at."""
    monkeypatch.setattr(sampled_path, "_FEW_NUMBERS", 0)
    tree = chain(torch.tensor([[0, 1, 0, 0]]))
    logits_BNV = torch.full((1, 4, VOCAB_SIZE), torch.nan)
    logits_BNV[0, 0] = torch.eye(VOCAB_SIZE)[1]
    logits_BNV[0, 1] = torch.eye(VOCAB_SIZE)[2]
    uniforms_BN = torch.zeros(1, 4, dtype=torch.float64)
    found, logprobs_BP = sampled_path.sample_path(
        tree, logits_BNV, uniforms_BN, SamplingParams(temperature=0.0)
    )
    assert found.num_accepted_B.tolist() == [1]
    assert found.emitted_BP[0, :2].tolist() == [1, 2]
    assert logprobs_BP[0, :2].tolist() == [0.0, 0.0]
