"""`fastrl fit|validate|test|predict`: LightningCLI in subclass mode: everything is a `class_path`.

A new algorithm, engine, drafter, reward or callback needs no registration: name its class in the
YAML. The help of an option is the docstring of its field or argument. Unknown keys are errors. What
belongs to every run (metrics, samples, progress bar, summary, checkpoints) is added here and takes
no keys.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import sys
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import set_loader, set_parsing_settings
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI
from lightning.pytorch.plugins import CheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import SIGTERMException

from fastrl.callbacks import (
    RandomState,
    RolloutHistograms,
    RolloutMetrics,
    RolloutProgressBar,
    RunSummary,
    StepCheckpoint,
    TextSamples,
)
from fastrl.callbacks.stop_signals import Terminated
from fastrl.checkpoint_io import AtomicCheckpointIO, check_intact
from fastrl.config_loader import load_yaml
from fastrl.datamodules import FeatureDataModule, RolloutDataModule
from fastrl.last_run import find_last_run
from fastrl.modules import DrafterModule, PolicyModule

PREDICTIONS_FILE = "predictions.jsonl"
_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_EXIT_TERMINATED = 143  # 128 + SIGTERM
_LAST = "last"
_DEFAULT_SEED = 0
_DEBUG_HINT = "(for the traceback, set JSONARGPARSE_DEBUG=true)"

_TRAINER_DEFAULTS = {
    "log_every_n_steps": 1,
    "max_epochs": 1,
    # All of the validation before the first step, as the baseline that a run is measured against.
    "num_sanity_val_steps": -1,
}
_TRAINER_FIXED = {
    # The datamodule shares its prompts out over the ranks itself.
    "use_distributed_sampler": False,
    # The engine starts during validation, and its tensors must not be tied to inference mode.
    "inference_mode": False,
}
_TRAINER_UNUSABLE = {
    # The policy optimizes manually, and Trainer refuses these then; it has its own counterparts.
    *("accumulate_grad_batches", "gradient_clip_val", "gradient_clip_algorithm"),
    # Forbids callbacks and loggers.
    "barebones",
    # Of no effect, or wrong, for batches that are generated.
    *("overfit_batches", "reload_dataloaders_every_n_epochs"),
    # Only hold up early stopping, and min_steps in optimizer steps.
    *("min_epochs", "min_steps"),
    # Of no effect on a causal LM, without a cloud service, on modules that keep no hparams.
    *("sync_batchnorm", "benchmark", "model_registry", "enable_autolog_hparams"),
}


class FastRLCLI(LightningCLI):
    """Parses, instantiates and runs.

    Args:
        args: command line as a list, or a configuration as a dict; the process's own if not given.
        run: whether to take a subcommand and run it; if not, model, data and trainer are only made.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        set_loader("yaml", load_yaml, exceptions=(yaml.YAMLError,))
        super().__init__(
            model_class=LightningModule,  # which ones: add_core_arguments_to_parser
            datamodule_class=LightningDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=_DEFAULT_SEED,
            auto_configure_optimizers=False,
            parser_kwargs={
                "prog": "fastrl",
                "description": "Reinforcement learning of LLMs.",
                "allow_abbrev": False,
            },
            args=args,
            run=run,
        )

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """As Lightning does, but without the Trainer options that cannot be used here."""
        parser.add_class_arguments(
            Trainer,
            "trainer",
            fail_untyped=False,
            instantiate=False,
            sub_configs=True,
            skip={*_TRAINER_UNUSABLE, *_TRAINER_FIXED},
        )
        parser.set_defaults({f"trainer.{key}": v for key, v in _TRAINER_DEFAULTS.items()})
        for classes, key in (
            ((PolicyModule, DrafterModule), "model"),
            ((RolloutDataModule, FeatureDataModule), "data"),
        ):
            parser.add_subclass_arguments(classes, key, fail_untyped=False, required=True)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's; checkpoints hold plain values, so that `weights_only` has one answer."""
        return {
            name: {*skipped, "weights_only"} for name, skipped in LightningCLI.subcommands().items()
        }

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """One model for engine, tokenizer and policy; one seed for prompts' order and tokens."""
        parser.link_arguments("model.init_args.model_path", "data.init_args.model_path")
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Lightning would read hyperparameters from it, before anyone has looked at the file."""

    def instantiate_classes(self) -> None:
        """A value that a class refuses is the user's mistake: its message says all there is."""
        with self._plain_refusals(of_any_class=True):
            super().instantiate_classes()
            self._check_data()
            if isinstance(self.model, PolicyModule):
                self._check_group_size()

    def _run_subcommand(self, subcommand: str) -> None:
        """What our own code refuses once the trainer runs (a data file's line, say) is as plain."""
        with self._plain_refusals(of_any_class=False):
            path = self.config_init[subcommand].ckpt_path
            if isinstance(self.trainer.strategy, ModelParallelStrategy) and path is not None:
                self._check_intact(Path(path))
            super()._run_subcommand(subcommand)

    def _check_intact(self, checkpoint: Path) -> None:
        """Lightning reads that of a sharded policy without our CheckpointIO."""
        if self.trainer.is_global_zero:
            check_intact(checkpoint)

    @contextlib.contextmanager
    def _plain_refusals(self, *, of_any_class: bool) -> Iterator[None]:
        """Turn refusals into their message; errors that may be bugs keep their traceback.

        While classes are made, any class may refuse its arguments; later, fastrl's code alone.
        Numbers that are no longer finite end a run as plainly, with status 1.
        """
        try:
            yield
        except (ValueError, FileNotFoundError) as error:
            refusal = _refusal(error)
            is_refusal = of_any_class or _raising_module(refusal).startswith("fastrl")
            if not is_refusal or os.environ.get("JSONARGPARSE_DEBUG") == "true":
                raise
            self.parser.exit(2, f"error: {refusal}\n{_DEBUG_HINT}\n")
        except FloatingPointError as error:
            if os.environ.get("JSONARGPARSE_DEBUG") == "true":
                raise
            self.parser.exit(1, f"error: {error}\n{_DEBUG_HINT}\n")

    def _check_data(self) -> None:
        """A policy trains on rollouts of itself, a drafter on features of its target."""
        is_drafter = isinstance(self.model, DrafterModule)
        if is_drafter != isinstance(self.datamodule, FeatureDataModule):
            expected = FeatureDataModule if is_drafter else RolloutDataModule
            raise ValueError(
                f"{type(self.model).__name__} does not train on what "
                f"{type(self.datamodule).__name__} yields; set data.class_path to "
                f"fastrl.datamodules.{expected.__name__}"
            )

    def _check_group_size(self) -> None:
        """Before anything is generated; the algorithm would find out after the first rollouts."""
        least, given = self.model.min_group_size, self.datamodule.group_size
        if given < least:
            raise ValueError(
                f"group_size must be >= {least} to form a baseline for "
                f"{type(self.model).__name__}, got {given}; set data.group_size, or use "
                f"fastrl.modules.Reinforce with baseline: batch_mean"
            )

    def predict(self, **kwargs: Any) -> None:
        """Lightning's, with the responses in `predictions.jsonl` in the run folder, a line each."""
        batches: Any = self.trainer.predict(**kwargs)
        path = Path(self.trainer.log_dir or self.trainer.default_root_dir) / PREDICTIONS_FILE
        if self.trainer.is_global_zero:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", encoding="utf-8") as file:
                for response in itertools.chain.from_iterable(batches):
                    file.write(json.dumps(dataclasses.asdict(response)) + "\n")
            print(f"responses in {path}")

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the callbacks of every run behind the configured ones."""
        config = self._get(self.config_init, "trainer")
        callbacks = _callbacks_of_every_run(
            config.callbacks or [],
            config.enable_progress_bar,
            is_drafter=isinstance(self.model, DrafterModule),
        )
        has_own = any(isinstance(callback, Checkpoint) for callback in config.callbacks or [])
        if config.enable_checkpointing is not False and not has_own:
            callbacks.append(StepCheckpoint())
        self.trainer_defaults = {"callbacks": callbacks}
        given = {
            **_TRAINER_FIXED,
            "plugins": _with_checkpoint_io(config.plugins),
            **self._settings_of_last_run(config),
            **kwargs,
        }
        return super().instantiate_trainer(**given)

    def _settings_of_last_run(self, trainer_config: Any) -> dict[str, Any]:
        """Make `--ckpt_path last` a path; a resumed run goes on logging where it did."""
        if self.subcommand is None or self.config_init[self.subcommand].ckpt_path != _LAST:
            return {}
        given = self.config_init[self.subcommand]
        root = trainer_config.default_root_dir or Path.cwd()
        if (run := find_last_run(root, trainer_config.logger)) is None:
            if self.subcommand != "fit":
                raise ValueError(
                    f"--ckpt_path last: no run in {root} has a checkpoint; give the path of one, "
                    f"or the trainer.default_root_dir of the run"
                )
            # So that one command starts a run and, sent again by a scheduler, goes on with it.
            rank_zero_info(f"--ckpt_path last: no run in {root} has a checkpoint, a new one begins")
            given.ckpt_path = None
            return {}
        given.ckpt_path = str(run.checkpoint)
        is_default = trainer_config.logger is None or trainer_config.logger is True
        return {"logger": run.logger()} if self.subcommand == "fit" and is_default else {}


def _callbacks_of_every_run(
    configured: list[Callback], enable_progress_bar: bool | None, *, is_drafter: bool
) -> list[Callback]:
    """Metrics first, as the bar shows them; the summary last, as its table comes after the bar.

    A drafter's warm-up has no rollouts to show.
    """
    has_own_bar = any(isinstance(callback, ProgressBar) for callback in configured)
    shows_bar = enable_progress_bar is not False and not has_own_bar
    if is_drafter:
        return [*([RolloutProgressBar("warm-up step")] if shows_bar else []), RandomState()]
    has_own_samples = any(isinstance(callback, TextSamples) for callback in configured)
    return [
        RolloutMetrics(),
        RolloutHistograms(),
        *([] if has_own_samples else [TextSamples()]),
        *([RolloutProgressBar()] if shows_bar else []),
        RandomState(),
        RunSummary(),
    ]


def _with_checkpoint_io(configured: Any) -> list[Any]:
    """trainer.plugins, with whole and checked checkpoint files unless it has its own way."""
    plugins = configured if isinstance(configured, list) else [configured] if configured else []
    has_own = any(isinstance(plugin, CheckpointIO) for plugin in plugins)
    return plugins if has_own else [*plugins, AtomicCheckpointIO()]


def _refusal(error: BaseException) -> BaseException:
    """The error that a class raised, out of those that jsonargparse wrapped around it."""
    while error.__cause__ is not None and _raising_module(error).startswith("jsonargparse"):
        error = error.__cause__
    return error


def _raising_module(error: BaseException) -> str:
    *_, (frame, _line) = traceback.walk_tb(error.__traceback__)
    return str(frame.f_globals["__name__"])


def main(args: ArgsType = None) -> None:
    """The console script.

    Exits with 0, 2 for an unusable configuration, 130 for Ctrl-C, 143 for SIGTERM, else 1.
    """
    try:
        FastRLCLI(args)
    except KeyboardInterrupt:
        sys.exit(_EXIT_INTERRUPTED)
    except SystemExit as exit_:
        # Once the trainer runs, Lightning takes the interrupt, shuts down, and exits with 1.
        stop = exit_.__context__
        if isinstance(stop, Terminated) or isinstance(exit_, SIGTERMException):
            sys.exit(_EXIT_TERMINATED)
        if isinstance(stop, KeyboardInterrupt):
            sys.exit(_EXIT_INTERRUPTED)
        raise
