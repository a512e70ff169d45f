"""The data module in a real Trainer, over a fake engine: lag, order, resume, ranks, the end."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from fastrl.datamodules.prompts import HELD_OUT_ID_OFFSET
from fastrl.datamodules.rollouts import RolloutDataModule
from fastrl.rollout.engine import RolloutEngine
from fastrl.types import RolloutBatch, SamplingParams
from tests.datamodules.fakes import FakeEngine, FakePolicy, FixedPrompts, LengthReward


def make_data(model_folder: str, **changes: Any) -> RolloutDataModule:
    arguments: dict[str, Any] = {
        "model_path": model_folder,
        "prompts": FixedPrompts(),
        "engine": FakeEngine(),
        "reward": LengthReward(),
        "num_steps": 4,
        "prompts_per_step": 3,
        "group_size": 2,
        "reward_workers": 1,
    }
    return RolloutDataModule(**(arguments | changes))


def make_trainer(folder: Path, **changes: Any) -> pl.Trainer:
    arguments: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 1,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "num_sanity_val_steps": 0,
        "limit_val_batches": 0,
        "default_root_dir": folder,
    }
    return pl.Trainer(**(arguments | changes))


def prompt_ids(batches: list[RolloutBatch]) -> list[list[int]]:
    """Of each batch, the prompts in order, once each."""
    return [
        list(dict.fromkeys(rollout.prompt.prompt_id for rollout in batch.rollouts))
        for batch in batches
    ]


def test_the_fake_engine_keeps_the_contract() -> None:
    assert isinstance(FakeEngine(), RolloutEngine)


def test_lag_is_zero(model_folder: str, tmp_path: Path) -> None:
    data, policy = make_data(model_folder, num_steps=3), FakePolicy()
    make_trainer(tmp_path, max_epochs=2).fit(policy, datamodule=data)
    assert policy.lags == [0] * 6
    assert [batch.rl_step for batch in policy.train_batches] == [0, 1, 2, 3, 4, 5]


def test_between_publication_and_generation_there_is_time_to_look(
    model_folder: str, tmp_path: Path
) -> None:
    data, policy = make_data(model_folder, num_steps=3), FakePolicy()
    engine = data.engine
    assert isinstance(engine, FakeEngine)
    seen: list[tuple[int, int]] = []
    data.on_published = lambda: seen.append((engine.policy_version, len(engine.calls)))
    make_trainer(tmp_path).fit(policy, datamodule=data)
    assert seen == [(0, 0), (1, 1), (2, 2)]


class Unsized(IterableDataset[RolloutBatch]):
    """The same stream with its length hidden."""

    def __init__(self, stream: IterableDataset[RolloutBatch]) -> None:
        self.stream = stream

    def __iter__(self) -> Iterator[RolloutBatch]:
        return iter(self.stream)


def test_without_a_length_lightning_would_prefetch_and_the_lag_be_one(
    model_folder: str, tmp_path: Path
) -> None:
    class UnsizedData(RolloutDataModule):
        def train_dataloader(self) -> Any:
            return DataLoader(Unsized(super().train_dataloader().dataset), batch_size=None)

    data = UnsizedData(**vars_of(make_data(model_folder)))
    policy = FakePolicy()
    make_trainer(tmp_path).fit(policy, datamodule=data)
    assert policy.lags == [0, 1, 1, 1]


def vars_of(data: RolloutDataModule) -> dict[str, Any]:
    """Constructor arguments that make the same data module."""
    names = ("model_path", "prompts", "num_steps", "prompts_per_step", "group_size")
    return {name: vars(data)[name] for name in names} | {
        "engine": FakeEngine(),
        "reward": LengthReward(),
    }


def test_the_policy_is_published_once_a_version(model_folder: str, tmp_path: Path) -> None:
    engine = FakeEngine()
    data, policy = make_data(model_folder, engine=engine), FakePolicy()
    make_trainer(tmp_path, limit_val_batches=1.0, val_check_interval=2).fit(policy, datamodule=data)
    # 4 RL steps; a validation after the second and the fourth, whose version the third step shares.
    assert [call.policy_version for call in engine.calls] == [0, 1, 2, 2, 3, 4]
    assert (engine.num_starts, engine.num_loads) == (1, 5)


def test_a_callback_can_start_the_engine_before_the_first_rollout(
    model_folder: str, tmp_path: Path
) -> None:
    class StartsIt(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            data.ensure_started()
            data.ensure_started()
            assert engine.is_open

    engine = FakeEngine()
    data, policy = make_data(model_folder, engine=engine), FakePolicy()
    make_trainer(tmp_path, callbacks=[StartsIt()]).fit(policy, datamodule=data)
    assert (engine.num_starts, engine.num_loads, policy.lags) == (1, 4, [0] * 4)


def test_a_batch_holds_groups_rewards_and_seconds(model_folder: str, tmp_path: Path) -> None:
    data, policy = make_data(model_folder, num_steps=1, seed=5), FakePolicy()
    make_trainer(tmp_path).fit(policy, datamodule=data)
    (batch,) = policy.train_batches
    assert batch.group_B.tolist() == [0, 0, 1, 1, 2, 2]
    assert batch.rewards_B.tolist() == [len(rollout.text) for rollout in batch.rollouts]
    assert [rollout.sample_index for rollout in batch.rollouts] == [0, 1] * 3
    assert set(batch.timings) == {"publish", "rollout", "reward", "idle"}
    assert all(seconds >= 0 for seconds in batch.timings.values())
    assert batch.stats.num_rollouts == 6
    assert data.engine.calls[0].seed == 5


def test_prompts_are_templated_with_the_system_message(model_folder: str, tmp_path: Path) -> None:
    data, policy = make_data(model_folder, num_steps=1, system_prompt="Think."), FakePolicy()
    make_trainer(tmp_path).fit(policy, datamodule=data)
    (batch,) = policy.train_batches
    for row, rollout in enumerate(batch.rollouts):
        expected = f"^Think.>{rollout.prompt.text}="
        ids = batch.tokens_BT[row, : len(expected)].tolist()
        assert "".join(map(chr, ids)) == expected
        assert not batch.response_mask_BT[row, : len(expected)].any()
        assert batch.response_mask_BT[row, len(expected)]


@pytest.mark.parametrize("world_size", [2, 3])
def test_the_prompts_of_a_step_do_not_depend_on_the_number_of_ranks(
    model_folder: str, tmp_path: Path, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def steps_of(rank: int, num_ranks: int) -> list[list[int]]:
        data, policy = make_data(model_folder, prompts_per_step=6, num_steps=5), FakePolicy()
        place = property(lambda _: {"rank": rank, "num_replicas": num_ranks})
        with monkeypatch.context() as patch:
            patch.setattr(pl.Trainer, "distributed_sampler_kwargs", place)
            make_trainer(tmp_path).fit(policy, datamodule=data)
        return prompt_ids(policy.train_batches)

    alone = steps_of(0, 1)
    ranks = [steps_of(rank, world_size) for rank in range(world_size)]
    assert all(len(ids) == 6 // world_size for steps in ranks for ids in steps)
    dealt = [zip(*step, strict=True) for step in zip(*ranks, strict=True)]
    assert [list(chain(*rounds)) for rounds in dealt] == alone


def test_prompts_per_step_must_divide_among_the_ranks(
    model_folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = property(lambda _: {"rank": 0, "num_replicas": 2})
    monkeypatch.setattr(pl.Trainer, "distributed_sampler_kwargs", place)
    with pytest.raises(ValueError, match="prompts_per_step 3 must be a multiple of the 2"):
        make_trainer(tmp_path).fit(FakePolicy(), datamodule=make_data(model_folder))


@pytest.mark.parametrize(
    ("num_held_out", "world_size"), [(5, 1), (25, 1), (25, 2), (7, 3), (12, 4)]
)
def test_ranks_share_all_held_out_prompts_in_equally_many_batches(
    model_folder: str, num_held_out: int, world_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    shares = []
    for rank in range(world_size):
        data = make_data(model_folder, prompts=FixedPrompts(num_held_out=num_held_out))
        data.setup("validate")
        monkeypatch.setattr(data, "_rank_and_world_size", lambda rank=rank: (rank, world_size))
        shares.append(data._held_out_batches())
    assert len({len(batches) for batches in shares}) == 1
    assert all(batch for batches in shares for batch in batches)
    seen = [prompt.prompt_id for batches in shares for batch in batches for prompt in batch]
    assert sorted(seen) == [HELD_OUT_ID_OFFSET + index for index in range(num_held_out)]


@pytest.mark.parametrize("num_steps_done", [1, 2, 3, 5])
def test_a_resumed_run_takes_the_prompts_the_unbroken_one_took(
    model_folder: str, tmp_path: Path, num_steps_done: int
) -> None:
    unbroken = FakePolicy()
    make_trainer(tmp_path).fit(unbroken, datamodule=make_data(model_folder, num_steps=7))

    class SaveAt(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            if module.rl_step == num_steps_done:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    trainer = make_trainer(tmp_path, callbacks=[SaveAt()])
    trainer.fit(FakePolicy(), datamodule=make_data(model_folder, num_steps=7))
    resumed, engine = FakePolicy(), FakeEngine()
    make_trainer(tmp_path).fit(
        resumed,
        datamodule=make_data(model_folder, num_steps=7, engine=engine),
        ckpt_path=tmp_path / "mid.ckpt",
    )
    rest = unbroken.train_batches[num_steps_done:]
    assert prompt_ids(resumed.train_batches) == prompt_ids(rest)
    for again, first in zip(resumed.train_batches, rest, strict=True):
        assert torch.equal(again.tokens_BT, first.tokens_BT)
    # The engine took its old version, and was given the weights all the same.
    assert engine.resumed_from == {"policy_version": num_steps_done - 1}
    assert engine.calls[0].policy_version == num_steps_done


def test_a_checkpoint_of_an_interrupted_step_repeats_the_step(
    model_folder: str, tmp_path: Path
) -> None:
    unbroken = FakePolicy()
    make_trainer(tmp_path).fit(unbroken, datamodule=make_data(model_folder))

    class SaveOnException(pl.Callback):
        def on_exception(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "interrupted.ckpt")

    engine = FakeEngine()
    data = make_data(model_folder, engine=engine)
    with pytest.raises(SystemExit):
        make_trainer(tmp_path, callbacks=[SaveOnException()]).fit(
            FakePolicy(fail_at_step=2), datamodule=data
        )
    assert not engine.is_open
    assert data.rewards._pool is None
    resumed = FakePolicy()
    make_trainer(tmp_path).fit(
        resumed, datamodule=make_data(model_folder), ckpt_path=tmp_path / "interrupted.ckpt"
    )
    assert prompt_ids(resumed.train_batches) == prompt_ids(unbroken.train_batches[2:])


def test_a_checkpoint_of_a_run_with_another_drafter_is_refused(
    model_folder: str, tmp_path: Path
) -> None:
    def data_with(hidden_size: int | None) -> RolloutDataModule:
        engine = FakeEngine()
        if hidden_size is not None:
            folder = tmp_path / f"drafter_{hidden_size}"
            folder.mkdir(exist_ok=True)
            (folder / "config.json").write_text(json.dumps({"hidden_size": hidden_size}))
            engine.drafter_path = str(folder)
        return make_data(model_folder, engine=engine)

    state = {"position": 3, "engine": None, "drafter": {"hidden_size": 16}}
    with pytest.raises(ValueError, match="another drafter: hidden_size 16 instead of 32"):
        data_with(32).load_state_dict(state)
    data_with(16).load_state_dict(state)
    data_with(None).load_state_dict(state)  # the rollouts are the same without one


def test_validation_repeats_its_prompts_and_randomness_and_moves_no_cursor(
    model_folder: str, tmp_path: Path
) -> None:
    plain, validated = FakePolicy(), FakePolicy()
    make_trainer(tmp_path).fit(plain, datamodule=make_data(model_folder))
    greedy = SamplingParams(temperature=0)
    data = make_data(model_folder, val_sampling=greedy, val_num_samples=3)
    trainer = make_trainer(
        tmp_path, limit_val_batches=1.0, val_check_interval=1, num_sanity_val_steps=1
    )
    trainer.fit(validated, datamodule=data)
    assert prompt_ids(plain.train_batches) == prompt_ids(validated.train_batches)
    # 5 held-out prompts of 3 samples, at 6 rollouts a batch: 1 + 2 + 2 prompts.
    batches = validated.val_batches[1:]  # The first is the sanity check's.
    assert [len(batch) for batch in batches] == [3, 6, 6] * 4
    rounds = [batches[start : start + 3] for start in range(0, 12, 3)]
    for later in rounds[1:]:
        for again, first in zip(later, rounds[0], strict=True):
            assert torch.equal(again.tokens_BT, first.tokens_BT)
    assert list(chain(*prompt_ids(rounds[0]))) == [HELD_OUT_ID_OFFSET + i for i in range(5)]
    assert all(batch.sampling == greedy for batch in batches)


def test_test_and_predict_serve_the_held_out_prompts(model_folder: str, tmp_path: Path) -> None:
    policy, engine = FakePolicy(), FakeEngine()
    trainer = make_trainer(tmp_path)
    data = make_data(model_folder, engine=engine)
    trainer.test(policy, datamodule=data, verbose=False)
    assert [len(batch) for batch in policy.val_batches] == [5]
    assert not engine.is_open
    rewards = trainer.predict(policy, datamodule=data)
    assert rewards is not None
    assert torch.equal(torch.cat(rewards), policy.val_batches[0].rewards_B)
    assert engine.num_starts == 2


def test_no_held_out_prompts_means_no_validation(model_folder: str, tmp_path: Path) -> None:
    policy = FakePolicy()
    data = make_data(model_folder, prompts=FixedPrompts(num_held_out=0))
    make_trainer(tmp_path, limit_val_batches=1.0).fit(policy, datamodule=data)
    assert len(policy.train_batches) == 4
    assert policy.val_batches == []


def test_prompts_that_leave_no_room_in_the_context_are_left_out(
    model_folder: str, tmp_path: Path
) -> None:
    # Templates add 2 tokens and the system message 59: of 64, `n10` and longer leave no room.
    prompts = FixedPrompts(num_train=100)
    system_prompt = "s" * 58
    data = make_data(model_folder, prompts=prompts, system_prompt=system_prompt)
    data.setup("fit")
    assert [prompt.text for prompt in data._train_prompts] == [f"n{i}" for i in range(10)]
    with pytest.raises(ValueError, match="all 5 held-out prompts are longer than 63 tokens"):
        make_data(model_folder, prompts=prompts, system_prompt="s" * 64).setup("fit")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "num_steps must be >= 1, got 0; set data.num_steps"),
        ({"prompts_per_step": 0}, "prompts_per_step must be >= 1, got 0"),
        ({"group_size": -1}, "group_size must be >= 1, got -1"),
        ({"val_num_samples": 0}, "val_num_samples must be >= 1, got 0"),
        ({"reward_workers": 0}, "reward_workers must be >= 1, got 0"),
        ({"reward_timeout_s": 0.0}, "reward_timeout_s must be a positive number, got 0.0"),
        ({"sampling": SamplingParams(temperature=0)}, "temperature must be > 0 for training"),
    ],
)
def test_bad_settings_are_refused_at_construction(
    model_folder: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        make_data(model_folder, **changes)


def test_more_prompts_a_step_than_there_are_is_an_error_at_setup(model_folder: str) -> None:
    with pytest.raises(ValueError, match="prompts_per_step 11 exceeds the 10 training prompts"):
        make_data(model_folder, prompts_per_step=11).setup("fit")


def test_a_missing_model_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cannot load a tokenizer from '.*nowhere'"):
        make_data(str(tmp_path / "nowhere")).setup("fit")
