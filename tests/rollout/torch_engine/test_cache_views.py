"""What each view's queries see, against walking the tree node by node."""

import random

import pytest
import torch

from fastrl.rollout.torch_engine.cache_views import CausalView, DraftWindow, TreeView
from fastrl.rollout.torch_engine.kv_cache import KVCache
from tests.rollout.trees import random_tree

BASES = [3, 0, 7]
COLUMNS = 64


def make_cache(num_rows: int = len(BASES)) -> KVCache:
    cache = KVCache(
        num_layers=1,
        num_kv_heads=1,
        head_dim=2,
        num_rows=num_rows,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    cache.reserve(COLUMNS, 0)
    return cache


def seen(mask: torch.Tensor | None, row: int, query: int) -> set[int]:
    assert mask is not None
    assert set(mask.unique().tolist()) <= {0.0, torch.finfo(torch.float32).min}
    return set((mask[row, 0, query] == 0).nonzero().flatten().tolist())


@pytest.mark.parametrize("window", [None, 4])
def test_a_causal_query_sees_everything_up_to_itself(window):
    view = CausalView(
        make_cache(), base_B=torch.tensor(BASES), longest_base=max(BASES), num_tokens=5
    )
    mask = view.additive_mask(window, torch.float32)
    for row, base in enumerate(BASES):
        for query in range(5):
            oldest = 0 if window is None else max(0, base + query + 1 - window)
            assert seen(mask, row, query) == set(range(oldest, base + query + 1))
    expected = [[row * COLUMNS + base + query for query in range(5)] for row, base in
                enumerate(BASES)]  # fmt: skip
    assert view.places_BT.tolist() == expected


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("seed", range(5))
def test_a_tree_s_node_sees_its_row_and_its_own_path(seed, window):
    rng = random.Random(seed)
    trees = [random_tree(rng, 8, 50) for _ in BASES]
    ancestors_BNN = torch.cat([tree.ancestors_BNN for tree in trees])
    depths_BN = torch.cat([tree.depths_BN for tree in trees])
    view = TreeView(
        make_cache(),
        base_B=torch.tensor(BASES),
        longest_base=max(BASES),
        ancestors_BNN=ancestors_BNN,
        positions_BN=torch.tensor(BASES).unsqueeze(1) + depths_BN,
    )
    mask = view.additive_mask(window, torch.float32)
    for row, (base, tree) in enumerate(zip(BASES, trees, strict=True)):
        for node in range(8):
            position = base + int(tree.depths_BN[0, node])
            oldest = 0 if window is None else position + 1 - window
            path, walker = {node}, node
            while walker:
                walker = int(tree.parents_BN[0, walker])
                path.add(walker)
            expected = {column for column in range(base) if column >= oldest} | {
                base + n for n in path if base + int(tree.depths_BN[0, n]) >= oldest
            }
            assert seen(mask, row, node) == expected


@pytest.mark.parametrize("beam", [1, 2, 3])
def test_a_growing_tree_s_node_sees_its_row_and_its_own_path(beam):
    rng = random.Random(beam)
    cache = make_cache()
    view = DraftWindow(
        cache, base_B=torch.tensor(BASES), longest_base=max(BASES), num_levels=4, beam=beam
    )
    paths = [[set[int]() for _ in range(beam)] for _ in BASES]  # window columns, by row and node
    for level in range(4):
        parents = [[rng.randrange(beam) for _ in range(beam)] for _ in BASES]
        view.add_level(None if beam == 1 else torch.tensor(parents))
        paths = [
            [
                (set() if level == 0 else paths[row][parents[row][k]]) | {level * beam + k}
                for k in range(beam)
            ]
            for row in range(len(BASES))
        ]
        mask = view.additive_mask(None, torch.float32)
        ones = torch.full((len(BASES), 1, beam, 2), float(level + 1))
        keys, _ = view.update(0, ones, ones)
        assert keys.shape[2] == max(BASES) + (level + 1) * beam
        for row, base in enumerate(BASES):
            for k in range(beam):
                expected = set(range(base)) | {base + column for column in paths[row][k]}
                assert seen(mask, row, k) == expected
                assert keys[row, 0, base + level * beam + k, 0] == level + 1


def test_a_lone_chain_needs_no_mask():
    cache = make_cache(1)
    window = DraftWindow(cache, base_B=torch.tensor([5]), longest_base=5, num_levels=2, beam=1)
    for level in range(2):
        window.add_level(None)
        assert window.additive_mask(None, torch.float32) is None
        keys, _ = window.update(0, torch.ones(1, 1, 1, 2), torch.ones(1, 1, 1, 2))
        assert keys.shape[2] == 6 + level
    step = CausalView(cache, base_B=torch.tensor([5]), longest_base=5, num_tokens=1)
    assert step.additive_mask(None, torch.float32) is None
