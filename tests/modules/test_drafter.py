"""Warm-up in a real Trainer: co-training's loss and gradients, resume, what it writes and gains.

The target is the quickstart's policy, or co-training's test policy.
"""

from __future__ import annotations

import functools
import json
import logging
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import Callback, LightningModule, Trainer
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, LlamaConfig

from fastrl.callbacks.drafter_training import DrafterTraining
from fastrl.callbacks.feature_buffer import BufferSettings, FeatureBuffer
from fastrl.datamodules import FeatureDataModule, JsonlPrompts, ReasoningGymPrompts
from fastrl.modules import DrafterModule, OptimizerSettings
from fastrl.modules.loading import load_causal_lm
from fastrl.rollout.drafters.eagle import EagleDrafter
from fastrl.rollout.drafters.eagle3 import Eagle3Drafter
from fastrl.rollout.drafters.loading import load_drafter
from fastrl.rollout.drafters.loss import LossSettings
from fastrl.rollout.drafters.packing import PackedFeatures, fold_segments, pack_sequences
from fastrl.rollout.drafters.target_features import sequence_features
from fastrl.rollout.drafters.training import LOSS_NAMES
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams, SequenceFeatures, TokenSequence
from tests.callbacks import test_drafter_training
from tests.callbacks.test_drafter_training import CONFIG, FakePolicyModule
from tests.callbacks.test_drafter_training import fit as fit_with_policy
from tests.recording_logger import RecordingLogger
from tests.warmup_runs import (
    MODELS,
    POLICY,
    make_data,
    make_module,
    make_trainer,
    write_responses,
)

TOKENS_PER_STEP = 25
SETTINGS = LossSettings(num_depths=3, hidden_weight=2.5)


# ---- one loss


class Draws(FeatureBuffer):
    """Keeps what is drawn."""

    drawn: list[SequenceFeatures]

    def sample(self, generator: torch.Generator, max_pairs: int) -> list[SequenceFeatures]:
        self.drawn = super().sample(generator, max_pairs)
        return self.drawn


def co_trained(folder: Path) -> tuple[DrafterTraining, dict[str, float], list[SequenceFeatures]]:
    """One optimizer step of co-training, in an RL run whose policy does not change."""
    callback = DrafterTraining(
        learning_rate=1e-2, steps_per_batch=1, tokens_per_step=TOKENS_PER_STEP, loss=SETTINGS
    )
    callback.buffer = Draws(BufferSettings())
    logger = RecordingLogger(folder)
    fit_with_policy(callback, str(folder / "start"), 1, policy_learning_rate=0.0, logger=logger)
    logged = {name: value for _, metrics in logger.logged for name, value in metrics.items()}
    return callback, logged, callback.buffer.drawn


def warmed_up(folder: Path, row: PackedFeatures) -> tuple[DrafterModule, dict[str, float]]:
    """One optimizer step of warm-up on that row."""
    module = DrafterModule(
        str(folder / "policy"),
        output=str(folder / "output"),
        drafter_path=str(folder / "start"),
        optimizer=OptimizerSettings(lr=1e-2),
        loss=SETTINGS,
    )
    logger = RecordingLogger(folder)
    trainer = make_trainer(folder, has_checkpoints=False, logger=logger)
    trainer.fit(module, train_dataloaders=torch.utils.data.DataLoader([row], batch_size=None))
    logged = {name: value for _, metrics in logger.logged for name, value in metrics.items()}
    return module, logged


DEEPER = LlamaConfig.from_dict(CONFIG.to_dict() | {"num_hidden_layers": 3})
"""With inner layers, whose inputs EAGLE-3 reads."""
KINDS = {
    "eagle": functools.partial(EagleDrafter.for_target, DEEPER),
    "trimmed eagle": functools.partial(EagleDrafter.for_target, DEEPER, token_ids=range(1, 9)),
    "eagle3": functools.partial(Eagle3Drafter.for_target, DEEPER),
    "trimmed eagle3": functools.partial(Eagle3Drafter.for_target, DEEPER, token_ids=range(1, 9)),
}


@pytest.mark.parametrize("kind", KINDS)
def test_warm_up_and_co_training_have_the_same_loss_and_gradients_on_the_same_batch(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(test_drafter_training, "CONFIG", DEEPER)
    start = KINDS[kind](seed=5)
    start.save_pretrained(tmp_path / "start")
    FakePolicyModule(0.0).policy.save_pretrained(tmp_path / "policy")
    callback, co_logged, drawn = co_trained(tmp_path)
    assert len(drawn) > 1
    target = load_causal_lm(str(tmp_path / "policy")).eval()
    features = sequence_features(
        target,
        [TokenSequence(tokens_T=f.tokens_T, num_prompt_tokens=f.num_prompt_tokens) for f in drawn],
        max_tokens=1000,
        layers=start.feature_layers,
    )
    for ours, theirs in zip(features, drawn, strict=True):
        torch.testing.assert_close(ours.hidden_TD, theirs.hidden_TD)
    row = fold_segments(pack_sequences(drawn, TOKENS_PER_STEP, CONFIG.hidden_size))
    module, logged = warmed_up(tmp_path, row)
    for name in LOSS_NAMES:
        assert logged[f"warmup/{name}"] == pytest.approx(co_logged[f"drafter/{name}"], rel=1e-6)
    co_drafter = callback._learner().drafter
    for (name, ours), (_, theirs) in zip(
        module.drafter.named_parameters(), co_drafter.named_parameters(), strict=True
    ):
        assert ours.grad is not None
        assert ours.grad.abs().sum() > 0, name
        assert torch.equal(ours.grad, theirs.grad), name
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7, msg=name)


def test_the_optimizer_is_that_of_co_training(tmp_path: Path) -> None:
    EagleDrafter.for_target(CONFIG, seed=5).save_pretrained(tmp_path / "start")
    FakePolicyModule(0.0).policy.save_pretrained(tmp_path / "policy")
    callback, _, drawn = co_trained(tmp_path)
    module, _ = warmed_up(tmp_path, pack_sequences(drawn, TOKENS_PER_STEP))
    (ours,) = module.trainer.optimizers[0].param_groups
    (theirs,) = callback._learner().optimizer.param_groups
    for name in ("lr", "betas", "eps", "weight_decay", "amsgrad"):
        assert ours[name] == theirs[name], name
    assert type(module.trainer.optimizers[0]) is type(callback._learner().optimizer)


# ---- a run


def fit(
    folder: Path,
    *,
    ckpt_path: Path | None = None,
    callbacks: tuple[Callback, ...] = (),
    module_options: dict[str, Any] | None = None,
    trainer_options: dict[str, Any] | None = None,
    **data_options: Any,
) -> DrafterModule:
    module = make_module(folder, **(module_options or {}))
    trainer = make_trainer(folder, callbacks, **(trainer_options or {}))
    trainer.fit(
        module,
        datamodule=make_data(folder, **data_options),
        ckpt_path=ckpt_path,
        weights_only=True if ckpt_path else None,
    )
    return module


class KeepCheckpoint(Callback):
    """Copies the checkpoint of a step, and the folder written with it."""

    def __init__(self, step: int, folder: Path) -> None:
        self.step = step
        self.folder = folder

    def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
        if module.rl_step == self.step:
            root = Path(trainer.default_root_dir)
            shutil.copy(root / "checkpoints" / "last.ckpt", self.folder / "kept.ckpt")
            shutil.copytree(root / "drafter", self.folder / "kept")


def weights(drafter: EagleDrafter) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in drafter.named_weights()}


@pytest.mark.parametrize("has_cache", [False, True])
def test_a_resumed_run_ends_with_the_same_weights_to_the_bit(
    tmp_path: Path, has_cache: bool
) -> None:
    options = {"cache_folder": str(tmp_path / "cache")} if has_cache else {}
    whole = fit(tmp_path, callbacks=(KeepCheckpoint(2, tmp_path),), **options)
    resumed = fit(tmp_path, ckpt_path=tmp_path / "kept.ckpt", **options)
    assert whole.rl_step == resumed.rl_step == 6
    for name, weight in weights(whole.drafter).items():
        assert torch.equal(weight, weights(resumed.drafter)[name]), name
    between = load_file(tmp_path / "kept" / "model.safetensors")
    assert any(not torch.equal(between[name], w) for name, w in weights(whole.drafter).items())


def test_only_the_drafter_is_trained_saved_and_written(tmp_path: Path) -> None:
    before = {name: w.clone() for name, w in load_causal_lm(POLICY).named_parameters()}
    module = fit(tmp_path)
    for name, weight in module.target.named_parameters():
        assert torch.equal(weight, before[name]), name
        assert weight.grad is None
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    names = {f"drafter.{name}" for name in weights(module.drafter)}
    assert set(checkpoint["state_dict"]) == names
    written = load_file(tmp_path / "drafter" / "model.safetensors")
    assert set(written) == set(weights(module.drafter))
    assert sorted(path.name for path in (tmp_path / "drafter").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    loaded = EagleDrafter.from_pretrained(tmp_path / "drafter", module.target.config)
    for name, weight in weights(module.drafter).items():
        assert torch.equal(weight, weights(loaded)[name]), name


def test_the_drafter_is_written_without_checkpoints_too(tmp_path: Path) -> None:
    module = fit(tmp_path, trainer_options={"has_checkpoints": False})
    written = load_file(tmp_path / "drafter" / "model.safetensors")
    for name, weight in weights(module.drafter).items():
        assert torch.equal(weight, written[name]), name


def test_a_new_drafter_is_of_its_seed(tmp_path: Path) -> None:
    made = []
    for seed in (3, 3, 4):
        module = make_module(tmp_path, drafter_path=None, seed=seed)
        module.configure_model()
        made.append(weights(module.drafter)["fc.weight"])
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_schedule_warms_up_and_falls_to_0_with_the_run(tmp_path: Path) -> None:
    logger = RecordingLogger(tmp_path)
    fit(tmp_path, trainer_options={"logger": logger})
    rates = [m["warmup/lr"] for _, m in logger.logged if "warmup/lr" in m]
    settings = OptimizerSettings(lr=3e-3, schedule="cosine", warmup_steps=2)
    assert rates == pytest.approx([3e-3 * settings.lr_factor(step, 6) for step in range(6)])
    assert rates[0] < rates[1] > rates[-1] > 0


def test_the_start_drafters_figures_are_logged_at_step_0(tmp_path: Path) -> None:
    logger = RecordingLogger(tmp_path)
    fit(tmp_path, num_steps=2, trainer_options={"logger": logger, "num_sanity_val_steps": -1})
    start = held_out(tmp_path)
    by_step = {step: m for step, m in logger.logged if "warmup/held_out_loss_depth_1" in m}
    assert {name: by_step[0][name] for name in start} == pytest.approx(start)
    assert by_step[2]["warmup/held_out_loss_depth_1"] < start["warmup/held_out_loss_depth_1"]


def test_sequences_that_are_cut_to_a_row_are_counted_and_told_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    logger = RecordingLogger(tmp_path)
    with caplog.at_level(logging.WARNING):
        fit(tmp_path, num_steps=12, tokens_per_step=20, trainer_options={"logger": logger})
    counts = [m["warmup/num_cut"] for _, m in logger.logged if "warmup/num_cut" in m]
    assert set(counts) == {0, 1}
    assert caplog.text.count("are cut to their latest 20 pairs") == 1


# ---- evaluation


def held_out(folder: Path, **data_options: Any) -> dict[str, float]:
    (folder / "validate").mkdir(exist_ok=True)
    trainer = make_trainer(folder / "validate", has_checkpoints=False)
    (metrics,) = trainer.validate(make_module(folder), datamodule=make_data(folder, **data_options))
    return {name: value for name, value in metrics.items() if name != "step"}


def test_held_out_figures_do_not_depend_on_rows_and_shards(tmp_path: Path) -> None:
    first = held_out(tmp_path)
    assert {
        f"warmup/held_out_{what}_depth_{d}" for what in ("loss", "acceptance") for d in (1, 6)
    } <= (set(first))
    other = held_out(tmp_path, tokens_per_step=1000, prompts_per_shard=2)
    assert other == pytest.approx(first, rel=1e-5)


def test_held_out_accept_lengths_are_by_task(tmp_path: Path) -> None:
    """Equal to those of a run over each task's prompts alone."""
    lines = [json.loads(line) for line in write_responses(tmp_path).read_text().splitlines()]
    (tmp_path / "train.jsonl").write_text(json.dumps({"prompt": "1 =", "response": "1"}))
    length = "warmup/held_out_accept_length"
    found = {}
    for name, numbers in {
        "both": range(0, 20),
        "even": range(0, 20, 2),
        "odd": range(1, 20, 2),
    }.items():
        named = [lines[number] | {"task": ("even", "odd")[number % 2]} for number in numbers]
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(line) + "\n" for line in named))
        prompts = JsonlPrompts(str(tmp_path / "train.jsonl"), str(path), answer_key="response")
        found[name] = held_out(tmp_path, prompts=prompts, prompts_per_shard=3)
    for task in ("even", "odd"):
        assert found[task][f"{length}_task_{task}"] == found[task][f"{length}_top1"]
        both = found["both"][f"{length}_task_{task}"]
        assert both == pytest.approx(found[task][f"{length}_top1"], rel=1e-6)
    assert found["both"][f"{length}_task_even"] != found["both"][f"{length}_task_odd"]
    assert {name for name in found["even"] if "_task_" in name} == {f"{length}_task_even"}
    assert {name for name in held_out(tmp_path) if "_task_" in name} == {f"{length}_task_unnamed"}


def test_validation_wants_data_that_name_tasks(tmp_path: Path) -> None:
    rows = torch.utils.data.DataLoader([[]], batch_size=None)
    trainer = make_trainer(tmp_path, has_checkpoints=False)
    with pytest.raises(ValueError, match="expected a FeatureDataModule, for held-out figures"):
        trainer.validate(make_module(tmp_path), dataloaders=rows)


def test_a_short_warm_up_improves_held_out_figures_and_the_accept_length(tmp_path: Path) -> None:
    """On sums that the policy works out; the start is the quickstart's drafter."""
    config = {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1}
    prompts = ReasoningGymPrompts(task="chain_sum", config=config, num_train=64, num_held_out=16)
    data_options = {
        "prompts": prompts,
        "engine": TorchEngine(max_batch_size=64),
        "num_samples": 2,
        "sampling": SamplingParams(max_tokens=128),
        "tokens_per_step": 512,
        "prompts_per_shard": 32,
    }
    before = held_out(tmp_path, **data_options)
    module = fit(
        tmp_path,
        num_steps=40,
        module_options={"optimizer": OptimizerSettings(lr=6e-3, warmup_steps=4)},
        trainer_options={"has_checkpoints": False},
        **data_options,
    )
    (after,) = make_trainer(tmp_path / "validate", has_checkpoints=False).validate(
        module, datamodule=make_data(tmp_path, **data_options)
    )
    for depth in (1, 2, 3):
        loss, acceptance = (
            f"warmup/held_out_{what}_depth_{depth}" for what in ("loss", "acceptance")
        )
        assert after[loss] < before[loss]
        assert after[acceptance] > before[acceptance] + 0.05
    start = accept_length(MODELS / "drafter", prompts, module)
    end = accept_length(tmp_path / "drafter", prompts, module)
    assert end > start + 0.2


def test_a_new_eagle_3_drafter_is_warmed_up_and_served(tmp_path: Path) -> None:
    """From random weights, on the same sums."""
    config = {"min_terms": 2, "max_terms": 6, "min_digits": 1, "max_digits": 1}
    prompts = ReasoningGymPrompts(task="chain_sum", config=config, num_train=64, num_held_out=16)
    module = fit(
        tmp_path,
        num_steps=40,
        module_options={
            "kind": "eagle3",
            "drafter_path": None,
            "optimizer": OptimizerSettings(lr=6e-3, warmup_steps=4),
            "loss": LossSettings(num_depths=3),
        },
        trainer_options={"has_checkpoints": False},
        prompts=prompts,
        engine=TorchEngine(max_batch_size=64),
        num_samples=2,
        sampling=SamplingParams(max_tokens=128),
        tokens_per_step=512,
        prompts_per_shard=32,
        cache_folder=str(tmp_path / "features"),
    )
    assert isinstance(module.drafter, Eagle3Drafter)
    assert module.feature_layers
    assert accept_length(tmp_path / "drafter", prompts, module) > 1.4


def accept_length(folder: Path, prompts: ReasoningGymPrompts, module: DrafterModule) -> float:
    """On held-out prompts, as the embedded engine serves it."""
    data = make_data(folder.parent, prompts=prompts)
    data.trainer = make_trainer(folder.parent, has_checkpoints=False)
    data.setup("fit")
    engine = TorchEngine(drafter_path=str(folder), strategy="4_2_8")
    engine.start(POLICY)
    engine.load_policy(module.target.named_parameters(), 0)
    engine.generate(data._prompts["held_out"], SamplingParams(max_tokens=128), num_samples=4)
    length = engine.stats().accept_length
    engine.close()
    return length


# ---- the draft vocabulary

VOCABULARY = {"drafter_path": None, "draft_vocab_size": 24}


def most_frequent(data: FeatureDataModule, size: int) -> list[int]:
    """By definition, of given responses."""
    counts = Counter[int]()
    for prompt in data._prompts["train"]:
        sequence = data._maker.given(prompt)
        counts.update(sequence.tokens_T[sequence.num_prompt_tokens :].tolist())
    eos = AutoConfig.from_pretrained(POLICY).eos_token_id
    ranked = sorted(range(data.tokenizer.vocab_size), key=lambda t: (t != eos, -counts[t], t))
    return sorted(ranked[:size])


@pytest.mark.parametrize("kind", ["eagle", "eagle3"])
def test_a_new_drafter_drafts_the_tokens_that_come_most_often_in_its_data(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a resumed run takes the checkpoint's vocabulary, counting nothing."""
    options = VOCABULARY | {"kind": kind}
    whole = fit(tmp_path, callbacks=(KeepCheckpoint(2, tmp_path),), module_options=options)
    expected = most_frequent(whole.trainer.datamodule, 24)
    assert whole.drafter.token_map_F.tolist() == expected
    written = load_drafter(tmp_path / "drafter", whole.target.config)
    assert written.token_map_F.tolist() == expected
    if isinstance(whole.drafter, Eagle3Drafter):
        assert len(whole.drafter.lm_head.weight) == 24
    monkeypatch.setattr(
        FeatureDataModule, "response_token_counts", lambda self: pytest.fail("it counts again")
    )
    resumed = fit(tmp_path, ckpt_path=tmp_path / "kept.ckpt", module_options=options)
    assert resumed.drafter.token_map_F.tolist() == expected
    for name, weight in weights(whole.drafter).items():
        assert torch.equal(weight, weights(resumed.drafter)[name]), name


def test_a_new_eagle_3_drafter_begins_with_the_targets_head_and_norm(tmp_path: Path) -> None:
    options = VOCABULARY | {"kind": "eagle3", "optimizer": OptimizerSettings(lr=0.0)}
    module = fit(tmp_path, num_steps=1, module_options=options)
    assert isinstance(module.drafter, Eagle3Drafter)
    head_VD = module.target.get_output_embeddings().weight
    assert torch.equal(module.drafter.lm_head.weight, head_VD[module.drafter.token_map_F])
    assert torch.equal(module.drafter.norm.weight, module.target.model.norm.weight)


def test_responses_that_were_generated_to_be_counted_are_those_trained_on(tmp_path: Path) -> None:
    num_generated = 0

    class Engine(TorchEngine):
        def generate(self, prompts: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal num_generated
            num_generated += len(prompts)
            return super().generate(prompts, *args, **kwargs)

    config = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1}
    prompts = ReasoningGymPrompts(task="chain_sum", config=config, num_train=8, num_held_out=2)
    options: dict[str, Any] = {
        "prompts": prompts,
        "engine": Engine(max_batch_size=8),
        "sampling": SamplingParams(max_tokens=8),
    }
    module = fit(tmp_path, module_options=VOCABULARY, **options)
    assert num_generated == 8 + 2
    drafted = set(module.drafter.token_map_F.tolist())
    row = module.trainer.datamodule._training_row()
    assert len(drafted & set(row.next_tokens_BT[row.loss_mask_BT].tolist())) > 0
    fewer = fit(tmp_path / "b", module_options=VOCABULARY | {"draft_vocab_size": 4}, **options)
    assert fewer.drafter.num_drafted == 4


@pytest.mark.parametrize(
    "options",
    [
        {"draft_vocab_size": 24},
        {"drafter_path": None, "draft_vocab_size": 0},
    ],
)
def test_a_vocabulary_of_a_drafter_that_there_is_or_of_no_token_is_refused(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="expected a positive size, of a new drafter"):
        make_module(tmp_path, **options)


def test_a_run_is_not_resumed_with_a_vocabulary_of_another_size(tmp_path: Path) -> None:
    fit(tmp_path, num_steps=1, module_options=VOCABULARY)
    with pytest.raises(ValueError, match="resume with the drafter that the run began with"):
        fit(
            tmp_path,
            ckpt_path=tmp_path / "checkpoints" / "last.ckpt",
            module_options=VOCABULARY | {"draft_vocab_size": 12},
        )


# ---- refusals


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_precisions_in_which_weights_are_not_float32_are_refused(
    tmp_path: Path, precision: str
) -> None:
    with pytest.raises(ValueError, match="use 32-true or bf16-mixed"):
        fit(tmp_path, trainer_options={"precision": precision, "has_checkpoints": False})


def test_bfloat16_autocast_trains_float32_weights(tmp_path: Path) -> None:
    module = fit(tmp_path, num_steps=2, trainer_options={"precision": "bf16-mixed"})
    assert {weight.dtype for weight in weights(module.drafter).values()} == {torch.float32}


def test_a_new_run_does_not_write_over_a_drafter(tmp_path: Path) -> None:
    fit(tmp_path, num_steps=1)
    with pytest.raises(ValueError, match="holds a drafter already"):
        fit(tmp_path, num_steps=1)


def test_a_drafter_of_another_target_is_refused(tmp_path: Path) -> None:
    EagleDrafter.for_target(CONFIG, seed=5).save_pretrained(tmp_path / "other")
    module = make_module(tmp_path, drafter_path=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="hidden_size 16, but the policy's is 64"):
        module.configure_model()


def test_a_checkpoint_of_another_target_is_refused(tmp_path: Path) -> None:
    fit(tmp_path, num_steps=1)
    path = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["fastrl"]["policy"]["num_hidden_layers"] = 3
    torch.save(checkpoint, tmp_path / "other.ckpt")
    module = make_module(tmp_path)
    trainer = make_trainer(tmp_path, plugins=[])
    with pytest.raises(ValueError, match="the checkpoint is of another model"):
        trainer.fit(
            module,
            datamodule=make_data(tmp_path),
            ckpt_path=tmp_path / "other.ckpt",
            weights_only=True,
        )


def test_losses_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    class Poison(Callback):
        def on_train_batch_start(self, trainer: Trainer, module: LightningModule, *_: Any) -> None:
            with torch.no_grad():
                next(module.drafter.parameters())[0] = torch.nan

    with pytest.raises(FloatingPointError, match="non-finite weights"):
        fit(tmp_path, callbacks=(Poison(),))
