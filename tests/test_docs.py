"""What docs/config.md names exists: options, by their classes' signatures; no key is missing."""

from __future__ import annotations

import inspect
import re
from inspect import isclass
from pathlib import Path

import pytest
from lightning.pytorch import callbacks as lightning_callbacks
from lightning.pytorch import trainer as lightning_trainer

from fastrl import callbacks, datamodules, modules, types
from fastrl.callbacks import feature_buffer
from fastrl.modules import optimization
from fastrl.rollout import bandit, sglang_engine, torch_engine
from fastrl.rollout.drafters import loss

ROOT = Path(__file__).parents[1]
CONFIG_PAGE = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
MENTIONS = sorted(set(re.findall(r"`([A-Z]\w*)\.(\w+)`", CONFIG_PAGE)))

MODULES = (
    *(lightning_callbacks, lightning_trainer, callbacks, datamodules, modules, types),
    *(bandit, feature_buffer, loss, optimization, sglang_engine, torch_engine),
)

ORIGINAL_KEYS = {
    "speculative": "enable spec_strategy bs_threshold",
    "speculative.eagle": "spec_model_path spec_steps spec_topk spec_verify_tokens tune_algorithm "
    "mab_configs mab_bs_threshold",
    "speculative.train": "enable_drafter_training training_interval_steps batch_size_per_gpu "
    "max_seq_len max_epochs checkpoint_path min_workers_for_training "
    "collect_hidden_states_from_sgl buffer_max_samples data_buffer_max_size eagle_model_path "
    "enable_step_barrier ulysses_sequence_parallel_size vloss_weight ploss_weight "
    "data_augment_std",
    "speculative.train.optim": "lr lr_warmup_steps min_lr_ratio warmup_style weight_decay "
    "total_training_steps num_cycles lr_warmup_steps_ratio",
}
"""Every key of the original's YAML, and those that only its code reads."""
ORIGINAL_FLAGS = (
    "--speculative-eagle-mab-algorithm",
    "--speculative-eagle-mab-configs",
    "--speculative-mab-window-size",
    "--speculative-mab-bs-threshold",
    "--apdative-speculative-batch_size-threshold",
)


def classes_by_name() -> dict[str, type]:
    """What the configuration is made of."""
    return {
        name: value for module in MODULES for name, value in inspect.getmembers(module, isclass)
    }


def options_of(class_: type) -> set[str]:
    """Arguments of the constructor, and of the bases' that it hands `**kwargs` on to."""
    options: set[str] = set()
    for base in class_.__mro__:
        parameters = inspect.signature(base).parameters
        options |= parameters.keys()
        if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
            break
    return options


def test_the_page_names_options() -> None:
    assert len(MENTIONS) > 40
    assert ("DrafterTraining", "max_step_share") in MENTIONS


@pytest.mark.parametrize(("class_name", "option"), MENTIONS)
def test_an_option_named_in_the_docs_exists(class_name: str, option: str) -> None:
    classes = classes_by_name()
    assert class_name in classes, f"docs/config.md names the class {class_name}"
    assert option in options_of(classes[class_name])


@pytest.mark.parametrize(
    ("section", "key"),
    [(section, key) for section, keys in ORIGINAL_KEYS.items() for key in keys.split()],
)
def test_every_key_of_the_original_is_in_the_table(section: str, key: str) -> None:
    """In the first column, in full or after a key of its section in the same row."""
    first_columns = [line.split("|")[1] for line in CONFIG_PAGE.splitlines() if line[:1] == "|"]
    assert any(f"`{section}." in cell and re.search(rf"[`.]{key}`", cell) for cell in first_columns)


@pytest.mark.parametrize("flag", ORIGINAL_FLAGS)
def test_every_flag_of_the_originals_engine_is_in_the_table(flag: str) -> None:
    assert f"`{flag}`" in CONFIG_PAGE


def test_files_named_in_the_docs_exist() -> None:
    names = set(re.findall(r"configs/\w+\.yaml", CONFIG_PAGE))
    assert names
    assert all((ROOT / name).is_file() for name in names)
