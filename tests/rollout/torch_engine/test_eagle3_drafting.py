"""EAGLE-3 in the embedded engine: trees against its definition, tokens against plain decoding."""

from collections import deque

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import DraftStrategy, SamplingParams
from tests.rollout.tiny_models import VOCAB_SIZE, make_prompts
from tests.rollout.torch_engine.test_cache_after_acceptance import generation_of, requests_of
from tests.rollout.torch_engine.test_drafting import paths_of

GREEDY = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
TOKENS = tuple(range(0, VOCAB_SIZE, 2))


@pytest.fixture(scope="module", params=[TOKENS, None], ids=["few tokens", "all tokens"])
def drafter_folder(request, target_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("eagle3") / "drafter"
    Eagle3Drafter.for_target(target_model.config, seed=0, token_ids=request.param).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def engine(folders, drafter_folder, target_model):
    engine = TorchEngine(drafter_path=str(drafter_folder), max_batch_size=6, device="cpu")
    engine.start(str(folders[0]))
    engine.load_policy(target_model.named_parameters(), version=0)
    yield engine
    engine.close()


def naive_paths(drafter, model, tokens, strategy) -> set[tuple[int, ...]]:
    """Of the tree after `tokens`: full forwards without a cache, dictionaries, sorting."""
    all_states = model.model(torch.tensor([tokens[:-1]]), output_hidden_states=True).hidden_states
    features_TA = torch.cat([all_states[layer][0] for layer in drafter.feature_layers], dim=-1)
    pairs = list(zip(tokens[1:], drafter.fc(features_TA), strict=True))
    drafted = TOKENS if drafter.token_map_F is not None else tuple(range(VOCAB_SIZE))

    def predict(path_pairs):
        sequence = [*pairs, *path_pairs]
        embeddings = model.get_input_embeddings()(torch.tensor([[t for t, _ in sequence]]))
        hidden = torch.stack([h for _, h in sequence]).unsqueeze(0)
        length = len(sequence)
        causal = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
        return drafter(embeddings, hidden, torch.arange(length)[None], causal)[0, -1]

    beam, candidates = [(0.0, (), [], predict([]))], []
    for level in range(strategy.depth):
        children = []
        for score, path, path_pairs, hidden in beam:
            logprobs_F = drafter.lm_head(drafter.norm(hidden)).log_softmax(-1).tolist()
            by_token = sorted(zip(logprobs_F, drafted, strict=True), key=lambda pair: -pair[0])
            for logprob, token in by_token[: strategy.topk]:
                child_pairs = [*path_pairs, (token, hidden)]
                children.append((score + logprob, (*path, token), child_pairs))
        candidates += children
        best = sorted(children, key=lambda child: -child[0])[: strategy.topk]
        if level + 1 < strategy.depth:
            beam = [(score, path, kids, predict(kids)) for score, path, kids in best]
    ranked = sorted(candidates, key=lambda candidate: -candidate[0])
    return {path for _, path, _ in ranked[: strategy.verify_tokens - 1]}


@pytest.mark.parametrize("name", ["4_1_5", "3_3_12"])
@pytest.mark.parametrize(
    "history",
    [[], ["3_3_10"] * 3, ["off"] * 9, ["off", "4_1_5", "off", "off"], ["off"] * 80],
    ids=["after prefill", "speculating", "after off", "on and off", "after a long off"],
)
def test_drafted_trees_are_those_of_the_definition(
    engine, drafter_folder, target_model, name, history
):
    drafter = Eagle3Drafter.from_pretrained(drafter_folder)
    strategy = DraftStrategy.parse(name)
    generation = generation_of(engine, history or ["off"])
    generation._end._max_tokens = 110
    with torch.inference_mode():
        generation._admit(deque(requests_of(make_prompts(3))))
        for _ in history:
            generation._retire(generation._step())
        tree = generation._drafting.draft(generation._rows, strategy, SamplingParams())
        for row, request in enumerate(generation._rows.requests):
            tokens = [*request.prompt.tokens, *request.tokens]
            assert paths_of(tree, row) == naive_paths(drafter, target_model, tokens, strategy)


def test_tokens_and_hidden_states_are_those_of_plain_decoding(engine, target_model):
    found = {}
    for name in ("off", "4_1_5", "3_3_10"):
        engine.strategy_selector = FixedStrategy(name)
        rollouts = engine.generate(make_prompts(5), GREEDY, return_hidden_states=True)
        found[name] = [rollout.tokens for rollout in rollouts]
        for rollout in rollouts:
            tokens = torch.tensor([[*rollout.prompt.tokens, *rollout.tokens]])
            expected = target_model.model(tokens).last_hidden_state[0, :-1]
            torch.testing.assert_close(rollout.hidden_states, expected, rtol=1e-4, atol=1e-4)
    assert found["off"] == found["4_1_5"] == found["3_3_10"]


def test_published_weights_are_served_and_compared(engine, target_model, drafter_folder):
    """The LM head among them: it is the drafter's own."""
    other = Eagle3Drafter.from_pretrained(drafter_folder)
    with torch.no_grad():
        other.lm_head.weight.neg_()
    (difference,) = engine.compare_drafter(other.named_weights())
    assert difference.name == "lm_head.weight"
    engine.load_drafter(other.named_weights(), version=1)
    assert engine.compare_drafter(other.named_weights()) == []
    strategy = DraftStrategy.parse("3_1_4")
    generation = generation_of(engine, ["off"])
    with torch.inference_mode():
        generation._admit(deque(requests_of(make_prompts(2))))
        tree = generation._drafting.draft(generation._rows, strategy, SamplingParams())
        for row, request in enumerate(generation._rows.requests):
            tokens = [*request.prompt.tokens, *request.tokens]
            assert paths_of(tree, row) == naive_paths(other, target_model, tokens, strategy)
