"""What co-training over several ranks needs of them all: seeds, figures, and one drafter.

Idle time is each rank's own matter; here are the two moments at which ranks meet. At the end of
each RL step's update, when they are together anyway, one small collective brings the figures of
their idle time to all. When a publication is due, another says who has trained, and the drafters
are averaged (fastrl/rollout/drafters/averaging.py). Both take place whatever any rank did before.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist

from fastrl.rollout.drafters.averaging import gather_numbers
from fastrl.rollout.rank_board import IdleTime
from fastrl.rollout.sampling import request_key


@dataclass(kw_only=True, slots=True)
class IdleWork:
    """What this rank did in its idle time since the RL step before."""

    seconds: float = 0.0
    num_steps: int = 0
    """Optimizer steps."""


def seed_of_rank(run_seed: int, rank: int) -> int:
    """Of draws that ranks must not make alike; rank 0's is the run's."""
    return run_seed if rank == 0 else request_key(run_seed, rank, 0, 0)


def several_ranks() -> bool:
    """Whether this process has others to meet."""
    return dist.is_initialized() and dist.get_world_size() > 1


def idle_metrics(work: IdleWork, idle: IdleTime | None, device: torch.device) -> dict[str, float]:
    """Figures of all ranks' idle time, alike on all; none in a run of one. All ranks call this
    together.

    Args:
        work: of this rank.
        idle: of this rank in the RL step's rollouts; None if it had none.
        device: of the default process group's tensors.
    """
    if not several_ranks():
        return {}
    seconds, overrun_s = (idle.seconds, idle.overrun_s) if idle is not None else (0.0, 0.0)
    own = [seconds, overrun_s, work.seconds, float(work.num_steps)]
    idle_R, overrun_R, worked_R, steps_R = gather_numbers(own, device).unbind(1)
    total = idle_R.sum().item()
    return {
        "drafter/idle_steps": steps_R.sum().item(),
        "drafter/idle_share_used": worked_R.sum().item() / total if total else 0.0,
        "time/idle_all_ranks": total,
        "time/idle_overrun": overrun_R.max().item(),
    }
