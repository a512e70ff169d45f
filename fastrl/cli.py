"""`fastrl fit|validate|test|predict`: LightningCLI in subclass mode: everything is a `class_path`.

A new algorithm, engine, drafter, reward or callback needs no registration: name its class in the
YAML. The help of an option is the docstring of its field or argument. Unknown keys are errors. What
belongs to every run (metrics, progress bar, summary) is added here and takes no keys.
"""

from __future__ import annotations

import sys
from typing import Any

from jsonargparse import set_parsing_settings
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI

from fastrl.callbacks import RolloutMetrics, RolloutProgressBar, RunSummary
from fastrl.datamodules import RolloutDataModule
from fastrl.modules import PolicyModule

_EXIT_INTERRUPTED = 130  # 128 + SIGINT, as shells count
_DEFAULT_SEED = 0

_TRAINER_DEFAULTS = {
    "log_every_n_steps": 1,
    "max_epochs": 1,
    # All of the validation before the first step, as the baseline that a run is measured against.
    "num_sanity_val_steps": -1,
    # The datamodule shards its prompts itself.
    "use_distributed_sampler": False,
}


class FastRLCLI(LightningCLI):
    """Parses, instantiates and runs.

    Args:
        args: command line as a list, or a configuration as a dict; the process's own if not given.
        run: whether to take a subcommand and run it; if not, model, data and trainer are only made.
    """

    def __init__(self, args: ArgsType = None, run: bool = True) -> None:
        set_parsing_settings(docstring_parse_attribute_docstrings=True)
        super().__init__(
            model_class=PolicyModule,
            datamodule_class=RolloutDataModule,
            subclass_mode_model=True,
            subclass_mode_data=True,
            save_config_kwargs={"overwrite": True},
            trainer_defaults=_TRAINER_DEFAULTS,
            seed_everything_default=_DEFAULT_SEED,
            auto_configure_optimizers=False,
            parser_kwargs={"description": "Reinforcement learning of reasoning LLMs."},
            args=args,
            run=run,
        )

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The engine, the prompts' tokenizer and the policy are of one model."""
        parser.link_arguments("model.init_args.model_path", "data.init_args.model_path")

    def instantiate_classes(self) -> None:
        """A value that a class refuses is the user's: only the message, as for a wrong type."""
        try:
            super().instantiate_classes()
        except (ValueError, FileNotFoundError) as error:
            self._parser(self.subcommand).error(str(error), error)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The trainer, with the callbacks of every run behind the configured ones."""
        config = self._get(self.config_init, "trainer")
        callbacks = _callbacks_of_every_run(config.callbacks or [], config.enable_progress_bar)
        self.trainer_defaults = {**self.trainer_defaults, "callbacks": callbacks}
        return super().instantiate_trainer(**kwargs)


def _callbacks_of_every_run(
    configured: list[Callback], enable_progress_bar: bool | None
) -> list[Callback]:
    """Metrics first, as the bar shows them; the summary last, as its table comes after the bar."""
    has_own_bar = any(isinstance(callback, ProgressBar) for callback in configured)
    shows_bar = enable_progress_bar is not False and not has_own_bar
    return [RolloutMetrics(), *([RolloutProgressBar()] if shows_bar else []), RunSummary()]


def main(args: ArgsType = None) -> None:
    """The console script. Exits with 0, 2 for an unusable configuration, 130 for Ctrl-C, else 1."""
    try:
        FastRLCLI(args)
    except KeyboardInterrupt:
        sys.exit(_EXIT_INTERRUPTED)
    except SystemExit as exit_:
        # Once the trainer runs, Lightning takes the interrupt, shuts down, and exits with 1.
        if isinstance(exit_.__context__, KeyboardInterrupt):
            sys.exit(_EXIT_INTERRUPTED)
        raise
