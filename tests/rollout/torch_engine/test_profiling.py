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
        self.max_batch_size = 0

    def cost_queries(self, max_batch_size: int) -> list[CostQuery]:
        assert not self.recorded  # before any rollout
        self.max_batch_size = max_batch_size
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
    rollouts = engine.generate(make_prompts(2), sampling)
    assert selector.max_batch_size == 6
    off, tree = selector.costs.values()
    assert 0 < off < tree
    # Profiling leaves no trace in rollouts, statistics or what the selector records.
    assert [r.tokens for r in rollouts] == expected
    assert engine.stats().num_rollouts == 2
    assert len(selector.recorded) == engine.stats().num_steps
