"""When an engine's weights are checked, against what, and what a failure is called.

Ranks of a trainer look together, since they publish, sleep and wake together: after each look they
may be told what others found, so that all go the same way. Leaves out how (callbacks/health.py),
the checks themselves (weight_differences.py, canary.py), and what follows from a failure.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from transformers import PreTrainedModel

from fastrl.rollout.canary import canary_gap
from fastrl.rollout.engine import RolloutEngine, WeightEvents
from fastrl.rollout.weight_differences import WeightError, described

NamedTensors = Iterable[tuple[str, Tensor]]
Failure = str | None
"""What is wrong; None if nothing is."""


def _alone(failure: Failure) -> Failure:
    """Where there are no other ranks: this one's."""
    return failure


class WeightCheck:
    """Looks at an engine whenever its weights have been touched.

    Args:
        every_n_publications: of the policy, from one comparison of all its weights to the next.
        num_canaries: prompts answered after each publication of the policy; 0: none.
        canary_tolerance: largest mean difference of their log-probabilities, in nats.
        on_any_rank: given what this rank found, says what any has; all ranks call it together.
    """

    def __init__(
        self,
        every_n_publications: int,
        num_canaries: int,
        canary_tolerance: float,
        on_any_rank: Callable[[Failure], Failure] = _alone,
    ) -> None:
        self.every_n_publications = every_n_publications
        self.num_canaries = num_canaries
        self.canary_tolerance = canary_tolerance
        self._on_any_rank = on_any_rank
        self._seen_drafter = WeightEvents()
        self._seen_policy = WeightEvents()
        self._compared_at = 0  # publications of the policy when all its weights were last compared

    def drafter_failure(
        self, engine: RolloutEngine, published: Callable[[], NamedTensors]
    ) -> Failure:
        """Compare the drafter, if it was published or all weights came anew since the last time;
        how it differs, None if it does not.

        Args:
            engine: to look at.
            published: the drafter's weights, as they should be.
        """
        now, seen = engine.weight_events, self._seen_drafter
        self._seen_drafter = now
        is_untouched = (now.wakes, now.drafter_loads) == (seen.wakes, seen.drafter_loads)
        if engine.drafter_path is None or is_untouched:
            return None
        failure = None
        if differences := engine.compare_drafter(published()):
            name = f"drafter version {engine.drafter_version}"
            if engine.drafter_version == -1:
                name = f"the drafter of {engine.drafter_path}"
            failure = f"the engine does not serve {name} as published: {described(differences)}"
        return self._on_any_rank(failure)

    def check_policy(
        self, engine: RolloutEngine, policy: PreTrainedModel, published: Callable[[], NamedTensors]
    ) -> float | None:
        """Compare the policy, where that is due, and have the canaries answered, if it was
        published since the last time; their gap in nats, None if there was none.

        Args:
            engine: to look at.
            policy: reads the canaries' answers.
            published: its weights, as `load_policy` was given them.

        Raises WeightError naming the weights that differ, or the gap beyond the tolerance.
        """
        now, seen = engine.weight_events, self._seen_policy
        if (now.wakes, now.policy_loads) == (seen.wakes, seen.policy_loads):
            return None
        is_due = now.policy_loads - self._compared_at >= self.every_n_publications
        if now.wakes != seen.wakes or is_due:
            differences = engine.compare_policy(published())
            self._raise_any(
                f"the engine does not serve policy version {engine.policy_version} as published: "
                f"{described(differences)}. Its rollouts would be of another policy"
                if differences
                else None
            )
            self._compared_at = now.policy_loads
        gap = None
        if self.num_canaries:
            gap = canary_gap(engine, policy, self.num_canaries)
            self._raise_any(
                None
                if gap <= self.canary_tolerance
                else f"the engine does not compute what policy version {engine.policy_version} "
                f"does: log-probabilities of canary tokens differ by {gap:.3g} nats on average, "
                f"more than canary_tolerance {self.canary_tolerance:g}. Are all weights served as "
                f"published (every_n_publications: 1 compares them each time), and is the engine's "
                f"dtype wide enough?"
            )
        self._seen_policy = now
        return gap

    def _raise_any(self, failure: Failure) -> None:
        if (found := self._on_any_rank(failure)) is not None:
            raise WeightError(found)
