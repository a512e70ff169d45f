"""When an engine's weights are checked, against what, and what a failure is called.

Leaves out the checks themselves (weight_differences.py, canary.py), and what follows from a failure
(callbacks/health.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor
from transformers import PreTrainedModel

from fastrl.rollout.canary import canary_gap
from fastrl.rollout.engine import RolloutEngine, WeightEvents
from fastrl.rollout.weight_differences import WeightError, described

NamedTensors = Iterable[tuple[str, Tensor]]


class WeightCheck:
    """Looks at an engine whenever its weights have been touched.

    Args:
        every_n_publications: of the policy, from one comparison of all its weights to the next.
        num_canaries: prompts answered after each publication of the policy; 0: none.
        canary_tolerance: largest mean difference of their log-probabilities, in nats.
    """

    def __init__(
        self, every_n_publications: int, num_canaries: int, canary_tolerance: float
    ) -> None:
        self.every_n_publications = every_n_publications
        self.num_canaries = num_canaries
        self.canary_tolerance = canary_tolerance
        self._seen_drafter = WeightEvents()
        self._seen_policy = WeightEvents()
        self._compared_at = 0  # publications of the policy when all its weights were last compared

    def drafter_failure(
        self, engine: RolloutEngine, published: Callable[[], NamedTensors]
    ) -> str | None:
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
        differences = engine.compare_drafter(published())
        if not differences:
            return None
        name = f"drafter version {engine.drafter_version}"
        if engine.drafter_version == -1:
            name = f"the drafter of {engine.drafter_path}"
        return f"the engine does not serve {name} as published: {described(differences)}"

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
            if differences := engine.compare_policy(published()):
                raise WeightError(
                    f"the engine does not serve policy version {engine.policy_version} as "
                    f"published: {described(differences)}. Its rollouts would be of another policy"
                )
            self._compared_at = now.policy_loads
        gap = canary_gap(engine, policy, self.num_canaries) if self.num_canaries else None
        if gap is not None and not gap <= self.canary_tolerance:
            raise WeightError(
                f"the engine does not compute what policy version {engine.policy_version} does: "
                f"log-probabilities of canary tokens differ by {gap:.3g} nats on average, more "
                f"than canary_tolerance {self.canary_tolerance:g}. Are all weights served as "
                f"published (every_n_publications: 1 compares them each time), and is the engine's "
                f"dtype wide enough?"
            )
        self._seen_policy = now
        return gap
