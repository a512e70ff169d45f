"""Shows a few of a step's responses in TensorBoard's text tab, accepted draft tokens in bold.

The longest and the shortest are among them. Of rank 0's rollouts. Leaves out all other responses
(rollout_dump.py). Always on: FastRLCLI adds it unless one is configured; without a
TensorBoardLogger it does nothing.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from torch.utils.tensorboard.summary import text
from transformers import PreTrainedTokenizerBase

from fastrl.callbacks.marked_text import escape, marked_html, paragraph
from fastrl.callbacks.step_summaries import log_step_summary
from fastrl.callbacks.tensorboard import tensorboard_writers
from fastrl.types import PolicySource, RewardResult, Rollout, RolloutBatch

TAG = "rollout/samples"


class _TokenizerSource(Protocol):
    """What this callback asks of the datamodule."""

    tokenizer: PreTrainedTokenizerBase


class TextSamples(Callback):
    """Shows prompts, responses and rewards. Stateless.

    Args:
        every_n_steps: RL steps from one showing to the next, from the first step on.
        num_samples: Responses shown of a step.
        max_tokens: Most tokens shown of a response; of a longer one, its beginning and its end.
    """

    def __init__(
        self, every_n_steps: int = 10, num_samples: int = 4, max_tokens: int = 1024
    ) -> None:
        for name, value, least in (
            ("every_n_steps", every_n_steps, 1),
            ("num_samples", num_samples, 2),
            ("max_tokens", max_tokens, 2),
        ):
            if value < least:
                raise ValueError(f"TextSamples: {name} must be >= {least}, got {value}")
        self.every_n_steps = every_n_steps
        self.num_samples = num_samples
        self.max_tokens = max_tokens

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: RolloutBatch,
        batch_idx: int,
    ) -> None:
        """Write the step's samples, if they are due."""
        rl_step = cast(PolicySource, pl_module).rl_step
        if (rl_step - 1) % self.every_n_steps or not batch.rollouts:
            return
        if not tensorboard_writers(trainer):
            return
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        tokenizer = cast(_TokenizerSource, datamodule).tokenizer
        samples = "\n\n<hr>\n\n".join(
            self._sample(tokenizer, batch.rollouts[row], batch.reward_results[row])
            for row in chosen_rows(batch, self.num_samples)
        )
        summary = text(TAG, samples)  # type: ignore[no-untyped-call]
        log_step_summary(trainer, summary, rl_step)

    def _sample(
        self, tokenizer: PreTrainedTokenizerBase, rollout: Rollout, result: RewardResult
    ) -> str:
        prompt = f"<blockquote>{escape(rollout.prompt.text)}</blockquote>"
        response = marked_html(tokenizer, rollout, max_tokens=self.max_tokens)
        return "\n\n".join(
            (paragraph(f"<em>{escape(headline(rollout, result))}</em>"), prompt, response)
        )


def headline(rollout: Rollout, result: RewardResult) -> str:
    """What is known of a response, on a line."""
    failure = f" ({result.failure})" if result.failure is not None else ""
    return (
        f"reward {result.score:g}{failure}, {len(rollout.tokens)} tokens in "
        f"{len(rollout.accept_lengths)} decode steps, ended by {rollout.finish_reason.value}; "
        f"prompt {rollout.prompt.prompt_id}, sample {rollout.sample_index}"
    )


def chosen_rows(batch: RolloutBatch, num_samples: int) -> list[int]:
    """The longest response, the shortest, and others evenly from the whole batch."""
    lengths = [len(rollout.tokens) for rollout in batch.rollouts]
    rows = range(len(lengths))
    evenly = range(0, len(lengths), max(len(lengths) // num_samples, 1))
    candidates = (max(rows, key=lengths.__getitem__), min(rows, key=lengths.__getitem__), *evenly)
    return list(dict.fromkeys(candidates))[:num_samples]
