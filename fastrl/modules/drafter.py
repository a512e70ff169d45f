"""DrafterModule: the warm-up of an EAGLE or EAGLE-3 drafter for a target that stays as it is.

One batch is one packed row of the target's hidden states (datamodules/features.py), and one
optimizer step on the loss that co-training takes (rollout/drafters/training.py). Held-out rows show
what is accepted of drafts (rollout/drafters/held_out.py). The drafter's folder is written at every
checkpoint and at the end, whole or not at all.

The target is no submodule: it is never trained, nor in checkpoints, nor in the folder; its
embedding and LM head are read where it holds them. A step here is counted as an RL step is
elsewhere. Leaves out where features come from, and drafters sharded over ranks (DDP keeps one
each). Shape legend: fastrl/types.py.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from lightning import LightningModule
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fastrl.model_files import resolve_model
from fastrl.modules import checkpoint_header
from fastrl.modules.loading import check_model_folder, load_causal_lm
from fastrl.modules.optimization import OptimizerSettings, clip_gradients, count_rl_steps
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.drafters.held_out import HeldOutRow, HeldOutSums, place_figures
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.loss import LossSettings
from fastrl.rollout.drafters.packing import PackedFeatures
from fastrl.rollout.drafters.training import (
    BETAS,
    LOSS_NAMES,
    loss_values,
    row_loss,
    shared_weights,
)
from fastrl.rollout.drafters.vocabulary import most_counted
from fastrl.rollout.end_of_sequence import eos_token_ids


@runtime_checkable
class _WarmUpData(Protocol):
    """What is asked of a FeatureDataModule, besides batches."""

    tokenizer: PreTrainedTokenizerBase
    """The target's."""

    @property
    def held_out_tasks(self) -> tuple[str, ...]:
        """Of all ranks' held-out rows."""
        ...

    def response_token_counts(self) -> dict[int, int]:
        """Of all ranks' responses: what a draft vocabulary is chosen by."""
        ...


class DrafterModule(LightningModule):
    """Trains a drafter on a frozen target's hidden states.

    Args:
        model_path: Hugging Face folder of the target; or a `.gguf` file, or `package:NAME` for the
            GGUF file in a Python package.
        output: Folder that the drafter is written to, for an engine's `drafter_path`; a new run
            refuses one that holds a drafter.
        drafter_path: Folder of the drafter to start from, of any kind; null: a new one, of random
            weights.
        kind: Of a new drafter.
        draft_vocab_size: Tokens that a new drafter drafts: those that come most often in the first
            responses it is trained on, and those that end one; null: all. A multiple of 64 suits
            GPUs.
        optimizer: AdamW, its learning rate over optimizer steps ("RL steps" there), gradient
            clipping.
        loss: How many depths of a draft are trained, and the weight of hidden states.
        seed: Of the weights of a new drafter.
    """

    drafter: EagleDrafter
    """Under training, float32."""

    def __init__(
        self,
        model_path: str,
        output: str,
        drafter_path: str | None = None,
        kind: Literal["eagle", "eagle3"] = "eagle",
        draft_vocab_size: int | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(lr=1e-4, schedule="cosine"),  # noqa: B008
        loss: LossSettings = LossSettings(),  # noqa: B008  (frozen)
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.model_path = resolve_model(model_path)
        check_model_folder(self.model_path)
        self.output = Path(output)
        self.drafter_path = drafter_path
        self.kind = kind
        if draft_vocab_size is not None and (drafter_path is not None or draft_vocab_size < 1):
            raise ValueError(
                f"draft_vocab_size {draft_vocab_size} with drafter_path {drafter_path}: expected a "
                f"positive size, of a new drafter; scripts/trim_vocabulary.py trims one that there "
                f"is, for drafter_path alone"
            )
        self.draft_vocab_size = draft_vocab_size
        self._is_vocabulary_due = draft_vocab_size is not None
        self.optimizer_settings = optimizer
        self.loss_settings = loss
        self.seed = seed
        self.automatic_optimization = False
        self.rl_step = 0
        self.is_updating = False
        self._own_scheduler: LambdaLR | None = None
        self._target: tuple[PreTrainedModel, ...] = ()  # in a tuple, so that it is no submodule
        self._held_out = HeldOutSums((), torch.device("cpu"))  # anew for each validation

    # ---- models ----------------------------------------------------------------------------------

    @property
    def target(self) -> PreTrainedModel:
        """The frozen model that is drafted for, loaded in `configure_model`."""
        assert self._target, "configure_model has not run: no target is loaded"
        return self._target[0]

    @property
    def feature_layers(self) -> tuple[int, ...]:
        """Layers of the target whose inputs the drafter reads."""
        return self.drafter.feature_layers

    def configure_model(self) -> None:
        """Load the target, and the drafter or a new one."""
        if self._target:
            return
        target = load_causal_lm(self.model_path).requires_grad_(False).train(False)
        shared_weights(target)
        if self.drafter_path is None:
            drafter_class = Eagle3Drafter if self.kind == "eagle3" else EagleDrafter
            size = self.draft_vocab_size
            self.drafter = drafter_class.for_target(
                target.config,
                seed=self.seed,
                token_ids=None if size is None else range(size),  # until they are counted
            )
            self._start_head(target)
        else:
            self.drafter = load_drafter(self.drafter_path, target.config)
        self.drafter.to(torch.float32)
        self._target = (target,)

    def _start_head(self, target: PreTrainedModel) -> None:
        norm = target.base_model.get_submodule("norm")
        self.drafter.start_head(shared_weights(target)[1], cast(Tensor, norm.weight))

    def _choose_vocabulary(self) -> None:
        """Once, of a new run: a resumed one has its own. All ranks choose the same."""
        if not self._is_vocabulary_due:
            return
        assert self.draft_vocab_size is not None
        data = self._data("draft_vocab_size counts its responses")
        counts = data.response_token_counts()
        chosen = most_counted(
            counts,
            vocab_size=self.drafter.config.vocab_size,
            size=self.draft_vocab_size,
            always=eos_token_ids(self.model_path, self.target.config, data.tokenizer),
        )
        self.drafter.reassign_vocabulary(chosen.token_ids, "a new drafter")
        self._start_head(self.target)
        self._is_vocabulary_due = False
        rank_zero_info(
            f"the draft vocabulary is {self.draft_vocab_size} of "
            f"{self.drafter.config.vocab_size} tokens, {chosen.coverage:.2%} of the "
            f"{sum(counts.values())} that were counted"
        )

    def _data(self, reason: str) -> _WarmUpData:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(data, _WarmUpData):
            raise ValueError(
                f"expected a FeatureDataModule, for {reason}, got {type(data).__name__}; pass one "
                f"as the Trainer's datamodule"
            )
        return data

    def on_fit_start(self) -> None:
        """Check strategy, precision and the output folder, before anything is generated."""
        if isinstance(self.trainer.strategy, FSDPStrategy | ModelParallelStrategy):
            raise ValueError(
                f"a drafter of one layer is not sharded, got trainer.strategy "
                f"{type(self.trainer.strategy).__name__}; use ddp, or auto"
            )
        if self.trainer.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(
                f"a drafter's weights must be float32 and its loss unscaled, got trainer.precision "
                f"{self.trainer.precision}; use 32-true or bf16-mixed"
            )
        if self.rl_step == 0 and (self.output / "config.json").exists():
            raise ValueError(
                f"model.output: {self.output} holds a drafter already, which this run would write "
                f"over; give another folder, or remove it"
            )
        self._bring_target()
        self._choose_vocabulary()

    def on_validation_start(self) -> None:
        """The target goes where the drafter is; nothing is counted yet."""
        self._bring_target()
        self._choose_vocabulary()
        tasks = self._data("held-out figures are by task").held_out_tasks
        self._held_out = HeldOutSums(tasks, self.device)

    def _bring_target(self) -> None:
        cast(torch.nn.Module, self.target).to(self.device)

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Named weights under training: what is checked to be finite before a checkpoint."""
        yield from self.drafter.named_weights()

    # ---- training --------------------------------------------------------------------------------

    def configure_optimizers(self) -> Any:
        """AdamW as in co-training, and a schedule over optimizer steps."""
        num_steps = float("inf")
        if self.optimizer_settings.schedule != "constant":
            num_steps = count_rl_steps(self.trainer, 1)
        optimizer, scheduler = self.optimizer_settings.build(
            self.drafter.parameters(), num_steps, betas=BETAS
        )
        self._own_scheduler = scheduler
        return [optimizer], [scheduler]

    def on_train_start(self) -> None:
        """A resumed run goes on under its own learning rate, weight decay and schedule."""
        assert self._own_scheduler is not None, "configure_optimizers has not run"
        self.optimizer_settings.apply_to(self._own_scheduler)

    def training_step(self, batch: PackedFeatures, batch_idx: int) -> None:
        """One optimizer step on one packed row."""
        optimizer = cast(LightningOptimizer, self.optimizers())
        scheduler = cast(LambdaLR, self.lr_schedulers())
        result = row_loss(self.drafter, self.target, batch, self.loss_settings)
        self.is_updating = True
        optimizer.zero_grad()
        self.manual_backward(result.loss)
        grad_norm = clip_gradients(
            self.drafter,
            self.optimizer_settings.max_grad_norm,
            loss=result.loss.detach(),
            rl_step=self.rl_step,
        )
        optimizer.step()
        lr = scheduler.get_last_lr()[0]
        scheduler.step()
        self.rl_step += 1
        self.is_updating = False
        losses: dict[str, float] = dict(zip(LOSS_NAMES, loss_values(result), strict=True))
        self._log_step(batch, losses | {"grad_norm": grad_norm.item(), "lr": float(lr)})

    def _log_step(self, batch: PackedFeatures, values: dict[str, float]) -> None:
        counts = {"num_pairs": batch.loss_mask_BT.sum(), "num_cut": batch.num_cut}
        values |= dict(zip(counts, torch.stack(list(counts.values())).tolist(), strict=True))
        scalars = {f"warmup/{name}": float(value) for name, value in values.items()}
        self.log_dict(
            {"step": float(self.rl_step), **scalars},
            on_step=True,
            on_epoch=False,
            batch_size=1,
        )
        shown = {"loss": values["loss"], "top1": values["top1_acceptance"]}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)

    # ---- evaluation ------------------------------------------------------------------------------

    def validation_step(self, batch: Sequence[HeldOutRow], batch_idx: int) -> None:
        """Sum up what held-out rows say of the drafter."""
        for row in batch:
            places, agreements = place_figures(
                self.drafter, *shared_weights(self.target), row.to(self.device, torch.float32)
            )
            self._held_out.add(places, agreements, row.tasks)

    def on_validation_epoch_end(self) -> None:
        """Means over all held-out tokens of all ranks; none of what no token was counted for."""
        strategy = self.trainer.strategy
        self._held_out.reduce(lambda sums: cast(Tensor, strategy.reduce(sums, reduce_op="sum")))
        figures = self._held_out.figures()
        values = {f"warmup/held_out_{name}": figure for name, figure in figures.items()}
        values["step"] = float(self.rl_step)
        self.log_dict(values, on_step=False, on_epoch=True, batch_size=1)
        if self.trainer.sanity_checking and self.rl_step == 0:  # which Lightning does not log
            for logger in self.trainer.loggers:
                logger.log_metrics(values, step=0)

    # ---- checkpoint and output -------------------------------------------------------------------

    def on_train_end(self) -> None:
        """Write the drafter, whether or not there are checkpoints."""
        self._write_drafter()
        rank_zero_info(f"the drafter is in {self.output}, for an engine's drafter_path")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the counter, and what the drafter is for; write the drafter."""
        checkpoint[checkpoint_header.KEY] = checkpoint_header.make_header(
            type(self), self.target.config
        )
        checkpoint["rl_step"] = self.rl_step
        checkpoint["drafter_reads"] = self.drafter.what_it_reads()
        self._write_drafter()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse another run's checkpoint, before its weights are loaded; restore the counter."""
        is_resume = self.trainer.state.fn == TrainerFn.FITTING
        checkpoint_header.check_header(
            checkpoint, type(self), self.target.config, is_resume=is_resume
        )
        reads = checkpoint["drafter_reads"]
        token_map_F = reads["token_map"]
        is_of_this_size = token_map_F is not None and len(token_map_F) == self.draft_vocab_size
        if self._is_vocabulary_due and is_of_this_size:
            self.drafter.reassign_vocabulary(token_map_F, "the resumed checkpoint")
            self._is_vocabulary_due = False
        self.drafter.check_reads_the_same(reads)
        self.rl_step = checkpoint["rl_step"]

    def _write_drafter(self) -> None:
        """Each file is replaced whole."""
        if not self.trainer.is_global_zero or self.trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        self.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=self.output, prefix=".writing-") as scratch:
            self.drafter.save_pretrained(scratch)
            for path in sorted(Path(scratch).iterdir(), reverse=True):  # the configuration last
                os.replace(path, self.output / path.name)
