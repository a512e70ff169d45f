"""Cost queries: a selector hears what its steps take before the first rollout, and only once."""

from fastrl.rollout.engine import CostQuery
from fastrl.types import OFF, DraftStrategy, SamplingParams
from tests.rollout.tiny_models import make_prompts
from tests.rollout.torch_engine.fakes import CyclingSelector

TREE = DraftStrategy.parse("3_3_10")


class Asking(CyclingSelector):
    """Asks for two costs until it has them."""

    def __init__(self) -> None:
        super().__init__(["off"])
        self.strategies.append(TREE)
        self.costs: dict[CostQuery, float] = {}
        self.asked_for = (0, 0)

    def cost_queries(self, max_batch_size: int, max_context: int) -> list[CostQuery]:
        assert not self.recorded  # before any rollout
        self.asked_for = (max_batch_size, max_context)
        return [
            CostQuery(strategy=strategy, batch_size=batch_size, context_tokens=context_tokens)
            for strategy, batch_size, context_tokens in ((OFF, 1, 5), (TREE, 6, 10_000))
        ]

    def record_cost(self, query: CostQuery, seconds: float) -> None:
        self.costs[query] = seconds


def test_costs_are_measured_before_the_first_rollout(engine):
    sampling = SamplingParams(max_tokens=5, ignore_eos=True)
    expected = [r.tokens for r in engine.generate(make_prompts(2), sampling)]
    selector = engine.strategy_selector = Asking()
    prompts = make_prompts(2)
    rollouts = engine.generate(prompts, sampling)
    assert selector.asked_for == (6, max(len(prompt.tokens) for prompt in prompts) + 5)
    (first, off), (second, tree) = selector.costs.items()
    assert 0 < off < tree
    # A context that the model cannot hold was cut to what leaves room for the steps.
    assert first.context_tokens == 5
    assert 10 < second.context_tokens <= 128 - 6 * 4
    # Profiling leaves no trace in memory, rollouts, statistics or what the selector records.
    assert engine._loaded.cache.num_columns < second.context_tokens
    assert [r.tokens for r in rollouts] == expected
    assert engine.stats().num_rollouts == 2
    assert len(selector.recorded) == engine.stats().num_steps
