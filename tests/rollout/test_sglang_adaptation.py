"""Real SGLang on the CPU with FastRL's plugin: strategies that change before every decode batch.

The kernels are stand-ins (tests/sglang_cpu); what switches, reads and counts is what runs on a GPU.
"""

import itertools

import pytest
import torch

from fastrl.rollout.bandit import FixedStrategy
from fastrl.rollout.model_bandit import ModelBased
from fastrl.types import DraftStrategy, SamplingParams, StepStats
from tests.rollout.tiny_models import make_prompts
from tests.rollout.test_sglang_engine import (
    GREEDY,
    chi_square_p_value,
    echoing_drafter,
    joint_distribution,
)

pytestmark = pytest.mark.sglang

POOL = ("3_1_4", "3_4_8", "5_2_12", "1_1_2")


class InTurns:
    """Every strategy of the pool and plain decoding, one after the other, and notes every step."""

    def __init__(self, order=("off", *POOL)):
        self.strategies = tuple(DraftStrategy.parse(text) for text in order)
        self._next = itertools.cycle(self.strategies)

    def select(self, batch_size, context_tokens, referenced_rows=0):
        return next(self._next)

    def record(self, stats: StepStats) -> None: ...

    def exclude(self, strategies) -> None: ...

    def cost_queries(self, max_batch_size, max_context):
        return ()

    def record_cost(self, query, seconds) -> None: ...


@pytest.fixture(scope="module")
def switching(start_sglang, target_model):
    """SGLang prepared for the pool, with a drafter that is often right."""
    engine = start_sglang(InTurns(), hidden_states=True)
    engine.load_policy(target_model.named_parameters(), version=0)
    engine.load_drafter(echoing_drafter(target_model).items(), version=0)
    return engine


def test_greedy_tokens_are_those_of_plain_decoding_while_switching_every_batch(switching, engine):
    prompts = make_prompts(6)
    switching.strategy_selector = InTurns()
    rollouts = switching.generate(prompts, GREEDY)
    expected = engine.generate(prompts, GREEDY)
    assert [rollout.tokens for rollout in rollouts] == [rollout.tokens for rollout in expected]
    stats = switching.stats()
    assert set(stats.steps_by_strategy) == {"off", *POOL}
    assert stats.accepted_by_depth[0] > 20  # else nothing was put to the test
