"""Trees drafted from the cache, against EAGLE-2 drafted without one, a node at a time."""

from collections import deque

import pytest
import torch

from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.types import DraftStrategy, SamplingParams
from tests.rollout.tiny_models import VOCAB_SIZE, make_prompts
from tests.rollout.torch_engine.test_cache_after_acceptance import generation_of, requests_of


def naive_paths(drafter, model, tokens, strategy, temperature) -> set[tuple[int, ...]]:
    """Paths of the tree after `tokens`: full forwards without a cache, dictionaries, sorting."""
    ids = torch.tensor([tokens])
    hidden_TD = model.model(ids[:, :-1]).last_hidden_state[0]
    pairs = [(token, hidden_TD[t]) for t, token in enumerate(tokens[1:])]

    def predict(path_pairs):
        sequence = [*pairs, *path_pairs]
        embeddings = model.get_input_embeddings()(torch.tensor([[t for t, _ in sequence]]))
        hidden = torch.stack([h for _, h in sequence]).unsqueeze(0)
        length = len(sequence)
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        return drafter(embeddings, hidden, torch.arange(length)[None], causal)[0, -1]

    beam = [(0.0, (), [], predict([]))]  # score, path, pairs below the root, predicted hidden state
    candidates = []
    for level in range(strategy.depth):
        children = []
        for score, path, path_pairs, hidden in beam:
            logprobs = (model.lm_head(hidden) / temperature).log_softmax(-1)
            order = sorted(range(VOCAB_SIZE), key=lambda t, lp=logprobs: -lp[t].item())
            for token in order[: strategy.topk]:
                child_pairs = [*path_pairs, (token, hidden)]
                children.append((score + logprobs[token].item(), (*path, token), child_pairs))
        candidates += children
        best = sorted(children, key=lambda child: -child[0])[: strategy.topk]
        if level + 1 < strategy.depth:
            beam = [(score, path, kids, predict(kids)) for score, path, kids in best]
    ranked = sorted(candidates, key=lambda candidate: -candidate[0])
    return {path for _, path, _ in ranked[: strategy.verify_tokens - 1]}


def paths_of(tree, row):
    paths = [()]
    for node in range(1, tree.num_nodes):
        paths.append((*paths[tree.parents_BN[row, node]], int(tree.tokens_BN[row, node])))
    return set(paths[1:])


def assert_trees_are_naive(generation, drafter, model, strategy, sampling):
    tree = generation._drafting.draft(generation._rows, strategy, sampling)
    for row, request in enumerate(generation._rows.requests):
        tokens = [*request.prompt.tokens, *request.tokens]
        expected = naive_paths(drafter, model, tokens, strategy, sampling.temperature or 1.0)
        assert paths_of(tree, row) == expected
        assert tree.tokens_BN[row, 0] == tokens[-1]


@pytest.mark.parametrize("strategy", ["1_3_4", "4_1_5", "3_3_12", "4_2_10"])
@pytest.mark.parametrize(
    "history",
    [[], ["3_3_10"] * 3, ["off"] * 9, ["off", "off", "4_1_5", "off", "off", "off"], ["off"] * 80],
    ids=["after prefill", "speculating", "after off", "on and off", "after a long off"],
)
def test_drafted_trees_are_those_of_the_cacheless_drafter(
    engine, folders, target_model, strategy, history
):
    drafter = EagleDrafter.from_pretrained(folders[1])
    sampling = SamplingParams(max_tokens=110, temperature=0.7, ignore_eos=True)
    generation = generation_of(engine, history or ["off"])
    generation._end._max_tokens = 110
    with torch.inference_mode():
        generation._admit(deque(requests_of(make_prompts(3))))
        for _ in history:
            generation._retire(generation._step())
        assert len(generation._rows) == 3
        strategy = DraftStrategy.parse(strategy)
        assert_trees_are_naive(generation, drafter, target_model, strategy, sampling)


def test_rows_that_moved_or_started_late_draft_the_same_trees(engine, folders, target_model):
    """Finished rows leave, later ones take their places, with their caches."""
    drafter = EagleDrafter.from_pretrained(folders[1])
    generation = generation_of(engine, ["3_3_10", "off", "off", "off"])
    queue = deque(requests_of(make_prompts(5, shortest=3), 3))
    checked = num_steps = 0
    generation._end._stop_ids = frozenset(range(0, VOCAB_SIZE, 6))
    with torch.inference_mode():
        while queue or generation._rows.requests:
            generation._admit(queue)
            if not generation._rows.requests:
                continue
            if num_steps % 4 == 3:  # so that rows move while the drafter lags behind them
                strategy = DraftStrategy.parse("2_3_7")
                assert_trees_are_naive(
                    generation, drafter, target_model, strategy, SamplingParams()
                )
                checked += len(generation._rows)
            generation._retire(generation._step())
            num_steps += 1
    assert checked > 8


def test_drafting_ranks_by_the_sampling_temperature(engine, folders, target_model):
    """A sharp distribution makes deep trees, a flat one wide trees."""
    drafter = EagleDrafter.from_pretrained(folders[1])
    generation = generation_of(engine, ["off"])
    strategy = DraftStrategy.parse("4_3_9")
    with torch.inference_mode():
        generation._admit(deque(requests_of(make_prompts(6))))
        sampling = SamplingParams(temperature=20.0)
        assert_trees_are_naive(generation, drafter, target_model, strategy, sampling)
        ours, plain = (
            generation._drafting.draft(generation._rows, strategy, sampling)
            for sampling in (sampling, SamplingParams())
        )
    assert ours.depths_BN.sum() < plain.depths_BN.sum()


def test_filters_do_not_matter_to_drafting_and_greedy_ranks_as_temperature_1(engine):
    generation = generation_of(engine, ["off"])
    strategy = DraftStrategy.parse("3_3_8")
    with torch.inference_mode():
        generation._admit(deque(requests_of(make_prompts(3))))
        plain = generation._drafting.draft(generation._rows, strategy, SamplingParams())
        greedy = generation._drafting.draft(
            generation._rows, strategy, SamplingParams(temperature=0.0, top_k=1)
        )
    assert torch.equal(plain.tokens_BN, greedy.tokens_BN)
