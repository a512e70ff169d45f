"""What training the drafter in idle time yields, and what it costs: nothing, if it is right.

RL steps on several processes, each two in a row with the same lengths of responses: one with idle
training, one without, in turn which comes first. Lengths are drawn from a lognormal distribution
with a long tail. Processes, Trainer (DDP over gloo), policy update, board of ranks, its store,
co-training and publications are real. Generation alone is not: it is a sleep as long as the
longest of the rank's responses, as if it ran on a device of the rank's own; on a machine with
fewer cores than ranks it would fight with training for them. Responses are random tokens.

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=4294967296 MALLOC_TOP_PAD_=268435456 \\
        python scripts/bench_idle.py --seconds_per_token 0.04 --num_pairs 8 --json bench_idle.json

With glibc's own settings memory that training has given back costs the update after it some time.
Leaves out how much better the drafter becomes.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import socket
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonargparse
import torch
import torch.distributed as dist
from bench_inputs import print_machine
from lightning.pytorch import Callback, LightningModule, Trainer
from rollout_figures import ratio_and_spread
from torch.multiprocessing import spawn

from fastrl.callbacks import DrafterTraining
from fastrl.datamodules import ExactMatchReward, ReasoningGymPrompts, RolloutDataModule
from fastrl.modules import GRPO, OptimizerSettings
from fastrl.rollout.rank_board import RankBoard
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import FinishReason, Prompt, Rollout, RolloutBatch, SamplingParams

MODELS = Path(__file__).parents[1] / "models" / "quickstart"


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What to compare."""

    policy: str = str(MODELS / "policy")
    """Folder of the policy."""
    drafter: str = str(MODELS / "drafter")
    """Folder of its drafter."""
    num_ranks: int = 4
    """Processes."""
    num_pairs: int = 12
    """Pairs of RL steps that count, after one that does not."""
    responses_per_rank: int = 4
    """Of an RL step; even."""
    median_tokens: int = 16
    """Of a response."""
    longest_tokens: int = 320
    """Of a response; longer ones are cut."""
    spread: float = 1.2
    """Standard deviation of the logarithm of a length."""
    seconds_per_token: float = 0.015
    """Of generation."""
    tokens_per_step: int = 512
    """Pairs of one optimizer step of the drafter, the micro-step."""
    publish_every_n_steps: int = 4
    """RL steps between averages of the drafters."""
    num_polls: int = 2000
    """Of the board, to time one."""
    seed: int = 0
    """Of lengths and tokens."""
    json: Path | None = None
    """File for the figures and every RL step; none where left out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """An RL step, over all ranks."""

    pair: int
    trains: bool
    """Whether idle time was used."""
    seconds: float
    """Rollouts, idle time and update; co-training at the batch's end and publications left out."""
    rollout_s: float
    """From the begin of generation until all ranks go on, on rank 0."""
    idle_s: float
    """Of all ranks together."""
    used_share: float
    """Of it, spent training."""
    num_steps: int
    """Optimizer steps of the drafter in idle time, of all ranks."""
    overrun_s: float
    """From the last rank's end to when all were back: the worst rank's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Figures:
    """What was measured: medians, and in `spread` first and third quartiles."""

    longest_over_median: float
    """Of the lengths drawn."""
    idle_share: float
    """Idle time of all ranks over the RL steps' time on all ranks, with training."""
    used_share: float
    used_spread: tuple[float, float]
    step_ratio: float
    """RL step's time with idle training over that without, pair by pair."""
    step_spread: tuple[float, float]
    rollout_ratio: float
    """The same of the time until all ranks go on, the update left out."""
    rollout_spread: tuple[float, float]
    micro_step_s: float
    overrun_s: float
    worst_overrun_s: float
    overrun_off_s: float
    """Of ranks that only wait."""
    drafter_steps: int
    """In idle time, over the run."""
    poll_s: float
    """One question to the board."""


def lengths_of(bench: Bench, pair: int, rank: int) -> list[int]:
    """Tokens of a rank's responses: the same in both RL steps of a pair."""
    generator = torch.Generator().manual_seed(hash((bench.seed, pair, rank)) % 2**63)
    deviations = torch.randn(bench.responses_per_rank, generator=generator).tolist()
    drawn = (round(bench.median_tokens * math.exp(bench.spread * one)) for one in deviations)
    return [min(max(one, 2), bench.longest_tokens) for one in drawn]


def trains_in(rl_step: int) -> bool:
    """Each pair has one of either, the second of every other pair comes first."""
    return rl_step % 4 in (0, 3)


class SleepingEngine(TorchEngine):
    """Random responses of drawn lengths, after a sleep as long as the longest."""

    def __init__(self, bench: Bench) -> None:
        super().__init__(drafter_path=bench.drafter)
        self._bench = bench

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        num_samples: int = 1,
        seed: int = 0,
        rl_step: int = 0,
        return_hidden_states: bool = False,
    ) -> list[Rollout]:
        """As many responses as are asked for."""
        rank, pair = dist.get_rank() if dist.is_initialized() else 0, rl_step // 2
        lengths = lengths_of(self._bench, pair, rank)
        time.sleep(max(lengths) * self._bench.seconds_per_token)
        generator = torch.Generator().manual_seed(pair)
        places = [(prompt, sample) for prompt in prompts for sample in range(num_samples)]
        return [
            Rollout(
                prompt=prompt,
                sample_index=sample,
                tokens=tuple(torch.randint(10, (length,), generator=generator).tolist()),
                logprobs=(-2.3,) * length,
                text="",
                finish_reason=FinishReason.STOP,
                policy_version=self.policy_version,
            )
            for (prompt, sample), length in zip(places, lengths, strict=True)
        ]


class Before(Callback):
    """Stops the watch before co-training has the RL step."""

    seconds = 0.0
    started = 0.0

    def on_train_batch_end(self, *_: Any) -> None:
        """The update is over."""
        self.seconds = time.perf_counter() - self.started


class After(Callback):
    """Says for each RL step whether idle time is used, and keeps what was measured."""

    def __init__(self, before: Before, folder: str, num_polls: int) -> None:
        self._before = before
        self._folder = folder
        self._num_polls = num_polls
        self._hook: Any = None
        self._steps: list[Step] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Co-training has put its hook in place."""
        self._hook = trainer.datamodule.on_idle  # type: ignore[attr-defined]
        self._begin(trainer, 0)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Keep the step, begin the next."""
        metrics = trainer.callback_metrics
        rl_step = int(pl_module.rl_step) - 1  # type: ignore[arg-type]
        self._steps.append(
            Step(
                pair=rl_step // 2,
                trains=trains_in(rl_step),
                seconds=self._before.seconds,
                rollout_s=sum(batch.timings[name] for name in ("rollout", "reward", "idle")),
                idle_s=float(metrics["time/idle_all_ranks"]),
                used_share=float(metrics["drafter/idle_share_used"]),
                num_steps=int(metrics["drafter/idle_steps"]),
                overrun_s=float(metrics["time/idle_overrun"]),
            )
        )
        self._begin(trainer, rl_step + 1)

    def _begin(self, trainer: Trainer, rl_step: int) -> None:
        trainer.datamodule.on_idle = self._hook if trains_in(rl_step) else None  # type: ignore[attr-defined]
        trainer.strategy.barrier()
        self._before.started = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Time polls, of all ranks at once; write what rank 0 saw."""
        board = RankBoard.join(60.0)
        board.begin()
        trainer.strategy.barrier()
        started = time.perf_counter()
        for _ in range(self._num_polls):
            board.others_generate()
        poll_s = (time.perf_counter() - started) / self._num_polls
        if trainer.is_global_zero:
            result = {"steps": [asdict(step) for step in self._steps], "poll_s": poll_s}
            (Path(self._folder) / "steps.json").write_text(json.dumps(result))


def run_rank(rank: int, bench: Bench, folder: str, port: int) -> None:
    """One process, started as by torchrun."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(bench.num_ranks),
        "LOCAL_WORLD_SIZE": str(bench.num_ranks),
        "TORCHELASTIC_RUN_ID": "bench_idle",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
    }
    torch.set_num_threads(1)
    before = Before()
    training = DrafterTraining(
        steps_per_batch=0,
        tokens_per_step=bench.tokens_per_step,
        publish_every_n_steps=bench.publish_every_n_steps,
        when=("idle",),
    )
    trainer = Trainer(
        accelerator="cpu",
        strategy="ddp",
        devices=bench.num_ranks,
        max_epochs=1,
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[before, training, After(before, folder, bench.num_polls)],
    )
    data = RolloutDataModule(
        model_path=bench.policy,
        prompts=ReasoningGymPrompts(task="chain_sum", num_held_out=0),
        engine=SleepingEngine(bench),
        reward=ExactMatchReward(),
        num_steps=2 * (bench.num_pairs + 1),
        prompts_per_step=bench.num_ranks * bench.responses_per_rank // 2,
        group_size=2,
        sampling=SamplingParams(max_tokens=bench.longest_tokens),
        reward_workers=1,
        rank_timeout_s=600.0,
        seed=bench.seed,
    )
    trainer.fit(GRPO(model_path=bench.policy, optimizer=OptimizerSettings(lr=0.0)), datamodule=data)


def measure(bench: Bench, folder: str) -> tuple[list[Step], float]:
    """RL steps, and the seconds of a poll."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    spawn(run_rank, (bench, folder, port), nprocs=bench.num_ranks)
    result = json.loads((Path(folder) / "steps.json").read_text())
    return [Step(**step) for step in result["steps"]], result["poll_s"]


def figures_of(bench: Bench, steps: Sequence[Step], poll_s: float) -> Figures:
    """Without the first pair, in which there is nothing to learn from yet."""
    on = [step for step in steps if step.trains and step.pair > 0]
    off = [step for step in steps if not step.trains and step.pair > 0]
    pairs = range(1, bench.num_pairs + 1)
    drawn = (lengths_of(bench, pair, rank) for pair in pairs for rank in range(bench.num_ranks))
    lengths = [length for of_rank in drawn for length in of_rank]
    ratio, spread = ratio_and_spread([one.seconds for one in on], [one.seconds for one in off])
    rollout_ratio, rollout_spread = ratio_and_spread(
        [one.rollout_s for one in on], [one.rollout_s for one in off]
    )
    used, used_spread = ratio_and_spread([one.used_share for one in on], [1.0] * len(on))
    trained_s = sum(one.used_share * one.idle_s for one in on)
    num_steps = sum(one.num_steps for one in on)
    return Figures(
        longest_over_median=max(lengths) / statistics.median(lengths),
        idle_share=sum(one.idle_s for one in on)
        / (bench.num_ranks * sum(one.seconds for one in on)),
        used_share=used,
        used_spread=used_spread,
        step_ratio=ratio,
        step_spread=spread,
        rollout_ratio=rollout_ratio,
        rollout_spread=rollout_spread,
        micro_step_s=trained_s / num_steps if num_steps else math.nan,
        overrun_s=statistics.median(one.overrun_s for one in on),
        worst_overrun_s=max(one.overrun_s for one in on),
        overrun_off_s=statistics.median(one.overrun_s for one in off),
        drafter_steps=num_steps,
        poll_s=poll_s,
    )


def run(bench: Bench) -> Figures:
    """Measure, print, and write JSON."""
    print_machine("cpu", f"float32, {bench.num_ranks} ranks with a thread each")
    print("generation is a sleep of the drawn length; training, ranks and their board are real")
    with TemporaryDirectory() as folder:
        steps, poll_s = measure(bench, folder)
    figures = figures_of(bench, steps, poll_s)
    low, high = figures.used_spread
    rollout, step = figures.rollout_spread, figures.step_spread
    print(
        f"lengths: longest over median {figures.longest_over_median:.0f}; idle "
        f"{figures.idle_share:.0%} of all ranks' time\n"
        f"spent training: {figures.used_share:.1%} of idle time [{low:.1%}, {high:.1%}], "
        f"{figures.drafter_steps} optimizer steps in {bench.num_pairs} RL steps\n"
        f"with idle training over without: rollouts {figures.rollout_ratio:.4f} "
        f"[{rollout[0]:.4f}, {rollout[1]:.4f}], RL step {figures.step_ratio:.4f} "
        f"[{step[0]:.4f}, {step[1]:.4f}]\n"
        f"back after the last rank's end: {figures.overrun_s * 1e3:.1f} ms, at worst "
        f"{figures.worst_overrun_s * 1e3:.1f} ms; a micro-step takes "
        f"{figures.micro_step_s * 1e3:.1f} ms; without training {figures.overrun_off_s * 1e3:.1f} "
        f"ms\na poll of the board: {figures.poll_s * 1e6:.0f} µs"
    )
    if bench.json is not None:
        written = {
            "bench": {name: str(value) for name, value in asdict(bench).items()},
            "figures": dataclasses.asdict(figures),
            "steps": [asdict(step) for step in steps],
        }
        bench.json.write_text(json.dumps(written, indent=1) + "\n")
    return figures


def main() -> None:
    """As the command line says."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    bench: Bench = jsonargparse.auto_cli(Bench, as_positional=False)
    run(bench)


if __name__ == "__main__":
    main()
