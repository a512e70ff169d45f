"""Random draft trees for tests, made without the code under test."""

import random

import torch

from fastrl.rollout.tree import DraftTree


def tree_of(tokens: list[int], parents: list[int]) -> DraftTree:
    """One tree from its nodes; node 0 is the root. Masks by walking parents, one node at a time."""
    num_nodes = len(tokens)
    depths = [0] * num_nodes
    ancestors = torch.zeros(1, num_nodes, num_nodes, dtype=torch.bool)
    for node in range(num_nodes):
        walker = node
        ancestors[0, node, node] = True
        while walker != 0:
            walker = parents[walker]
            depths[node] += 1
            ancestors[0, node, walker] = True
    return DraftTree(
        tokens_BN=torch.tensor([tokens]),
        parents_BN=torch.tensor([parents]),
        depths_BN=torch.tensor([depths]),
        ranks_BN=torch.tensor(
            [[0, *(parents[1:node].count(parents[node]) for node in range(1, num_nodes))]]
        ),
        ancestors_BNN=ancestors,
        depth=max(depths),
    )


def random_tree(rng: random.Random, num_nodes: int, vocab_size: int) -> DraftTree:
    """Any tree whose siblings differ and whose parents come before their children."""
    tokens, parents = [rng.randrange(vocab_size)], [0]
    while len(tokens) < num_nodes:
        parent, token = rng.randrange(len(tokens)), rng.randrange(vocab_size)
        siblings = {tokens[n] for n in range(1, len(tokens)) if parents[n] == parent}
        if token not in siblings:
            tokens.append(token)
            parents.append(parent)
    return tree_of(tokens, parents)
