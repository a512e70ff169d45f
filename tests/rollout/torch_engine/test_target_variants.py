"""Targets of other shapes than most tests': tied and untied LM heads, scaled rotary embeddings.

For each of them and either kind of drafter, drafted trees are those of the drafter's definition,
and speculation gives the rollouts of transformers' own model, one token at a time.
"""

from collections import deque

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import DraftStrategy, SamplingParams
from tests.rollout.tiny_models import make_prompts, make_target
from tests.rollout.torch_engine import test_drafting, test_eagle3_drafting
from tests.rollout.torch_engine.test_cache_after_acceptance import generation_of, requests_of
from tests.rollout.torch_engine.test_drafting import paths_of
from tests.rollout.torch_engine.test_lossless import assert_equal_to, generate, naive_rollout

SAMPLING = SamplingParams(max_tokens=24)
STRATEGIES = ("4_1_5", "3_3_12")
ROTARY = {
    "llama3": {
        "rope_type": "llama3",
        "rope_theta": 10_000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
    "yarn": {
        "rope_type": "yarn",
        "rope_theta": 10_000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    },
    "linear": {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0},
}
VARIANTS = {
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3 untied": ("qwen3", {"tie_word_embeddings": False}),
    **{f"llama {name}": ("llama", {"rope_parameters": rope}) for name, rope in ROTARY.items()},
}


@pytest.fixture(scope="module", params=VARIANTS)
def target(request, tmp_path_factory):
    """Its folder, the model as transformers runs it, and that model's rollouts."""
    folder = tmp_path_factory.mktemp("target")
    family, changes = VARIANTS[request.param]
    model = make_target(folder, family, **changes)
    model.set_attn_implementation("eager")
    references = [
        naive_rollout(model, prompt, SAMPLING, seed=7, rl_step=3, sample_index=sample)
        for prompt in make_prompts(2)
        for sample in range(3)
    ]
    return folder, model, references


@pytest.fixture(params=[EagleDrafter, Eagle3Drafter], ids=["eagle", "eagle3"])
def drafter(request, target):
    return request.param.for_target(target[1].config, seed=0)


@pytest.fixture
def engine(target, drafter, tmp_path):
    folder, model, _ = target
    drafter.save_pretrained(tmp_path)
    engine = TorchEngine(drafter_path=str(tmp_path), max_batch_size=4, device="cpu")
    engine.start(str(folder))
    engine.load_policy(model.named_parameters(), version=0)
    yield engine
    engine.close()


def test_drafted_trees_are_those_of_the_definition(engine, drafter, target):
    _, model, _ = target

    def naive_paths(tokens: list[int], strategy: DraftStrategy) -> set[tuple[int, ...]]:
        if isinstance(drafter, Eagle3Drafter):
            return test_eagle3_drafting.naive_paths(drafter, model, tokens, strategy)
        return test_drafting.naive_paths(drafter, model, tokens, strategy, temperature=1.0)

    generation = generation_of(engine, ["3_3_10", "off"])
    with torch.inference_mode():
        generation._admit(deque(requests_of(make_prompts(2))))
        for _ in range(4):
            generation._retire(generation._step())
        for name in STRATEGIES:
            strategy = DraftStrategy.parse(name)
            tree = generation._drafting.draft(generation._rows, strategy, SAMPLING)
            for row, request in enumerate(generation._rows.requests):
                tokens = [*request.prompt.tokens, *request.tokens]
                assert paths_of(tree, row) == naive_paths(tokens, strategy)


def test_speculation_gives_the_naive_rollouts(engine, target):
    _, _, references = target
    assert max(len(tokens) for tokens, _ in references) > 12
    for name in ("off", *STRATEGIES):
        engine.strategy_selector = FixedStrategy(name)
        assert_equal_to(generate(engine, SAMPLING, count=2), references)
