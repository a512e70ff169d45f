"""The drafter's data in a real Trainer: order, shares, rows, the cache, and what is generated.

The target is the quickstart's policy; a step takes rows and trains nothing.
"""

from __future__ import annotations

import itertools
import json
import logging
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning import LightningModule
from transformers import AutoTokenizer, PreTrainedModel

from fastrl.datamodules import (
    FeatureDataModule,
    JsonlPrompts,
    MixedPrompts,
    ReasoningGymPrompts,
)
from fastrl.datamodules.rows import RowStream
from fastrl.datamodules.shard_order import ShardOrder, rank_share, row_length
from fastrl.modules.loading import load_causal_lm
from fastrl.rollout.drafters.held_out import HeldOutRow
from fastrl.rollout.drafters.packing import PackedFeatures, fold_segments, pack_sequences
from fastrl.rollout.torch_engine import TorchEngine
from fastrl.types import SamplingParams, SequenceFeatures
from tests.warmup_runs import POLICY, make_data, make_trainer, write_responses


class Collector(LightningModule):
    """Keeps the rows it is given; counts the target's forwards."""

    feature_layers: tuple[int, ...] = ()

    def __init__(self, target: PreTrainedModel) -> None:
        super().__init__()
        self._target = (target,)
        self.automatic_optimization = False
        self.rl_step = 0
        self.rows: list[PackedFeatures] = []
        self.held_out: list[PackedFeatures] = []
        self.held_out_rows: list[HeldOutRow] = []
        self.num_forwards = 0

    @property
    def target(self) -> PreTrainedModel:
        return self._target[0]

    def training_step(self, batch: PackedFeatures, batch_idx: int) -> None:
        self.rows.append(batch)
        self.rl_step += 1

    def validation_step(self, batch: list[HeldOutRow], batch_idx: int) -> None:
        self.held_out_rows += batch
        self.held_out += [row.packed for row in batch]

    def configure_optimizers(self) -> None:
        return None


def collect(
    folder: Path,
    data: FeatureDataModule,
    target: PreTrainedModel | None = None,
    precision: str = "32-true",
) -> Collector:
    module = Collector(target or load_causal_lm(POLICY).eval())

    def count(*_: Any) -> None:
        module.num_forwards += 1

    handle = module.target.base_model.register_forward_hook(count)
    trainer = make_trainer(folder, has_checkpoints=False, precision=precision)
    trainer.fit(module, datamodule=data)
    handle.remove()
    return module


def assert_same_rows(one: list[PackedFeatures], other: list[PackedFeatures]) -> None:
    assert len(one) == len(other) > 0
    for a, b in zip(one, other, strict=True):
        for name in PackedFeatures.__slots__:
            assert torch.equal(getattr(a, name), getattr(b, name)), name


def segments(row: PackedFeatures) -> list[tuple[int, ...]]:
    """Next tokens of each segment."""
    return [
        tuple(row.next_tokens_BT[row.segment_BT == number].tolist())
        for number in range(int(row.segment_BT.max()) + 1)
    ]


# ---- order and shares


def walk(order: ShardOrder, num: int, start: int = 0) -> list[tuple[int, int]]:
    """(shard, sequence) one by one, each found from its position alone."""
    taken = []
    for position in range(start, start + num):
        shard, members, after = order.at(position)
        assert after == position + len(members)
        taken.append((shard, members[0]))
    return taken


def test_a_pass_takes_every_sequence_once_and_the_next_in_another_order() -> None:
    order = ShardOrder(sizes=(4, 4, 3), seed=5)
    first, second = walk(order, 11), walk(order, 11, start=11)
    everything = {
        (shard, member) for shard, size in enumerate(order.sizes) for member in range(size)
    }
    assert set(first) == set(second) == everything
    assert first != second
    assert walk(order, 22) == [*first, *second]
    assert walk(ShardOrder(sizes=(4, 4, 3), seed=6), 11) != first
    for of_pass in (first, second):  # a shard is gone through before the next
        assert len(list(itertools.groupby(of_pass, key=lambda item: item[0]))) == 3


@pytest.mark.parametrize(("num_items", "world_size"), [(10, 1), (10, 3), (7, 7)])
def test_ranks_share_all_prompts_evenly_and_without_overlap(
    num_items: int, world_size: int
) -> None:
    shares = [rank_share(num_items, 3, rank, world_size) for rank in range(world_size)]
    assert sorted(itertools.chain(*shares)) == list(range(num_items))
    sizes = [len(share) for share in shares]
    assert max(sizes) - min(sizes) <= 1
    assert shares == [rank_share(num_items, 3, rank, world_size) for rank in range(world_size)]


def test_fewer_prompts_than_ranks_are_refused() -> None:
    with pytest.raises(ValueError, match="2 prompts are too few for 3 ranks"):
        rank_share(2, 0, 0, 3)


def test_a_rank_of_several_takes_its_share_of_prompts_and_a_cache_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for rank in range(2):
        data = make_data(tmp_path, cache_folder=str(tmp_path / "cache"))
        monkeypatch.setattr(data, "_place", lambda rank=rank: (rank, 2))
        collect(tmp_path, data)
        texts.append({p.text for shard in data._shards["train"] for p in shard})
    assert len(texts[0] | texts[1]) == 15
    assert not texts[0] & texts[1]
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["rank-0-of-2", "rank-1-of-2"]


# ---- rows


def test_rows_hold_what_fits_and_one_sequence_at_least() -> None:
    lengths = (12, 7, 5, 40, 3)

    def features(length: int) -> SequenceFeatures:
        return SequenceFeatures(
            tokens_T=torch.zeros(length, dtype=torch.int64),
            hidden_TD=torch.zeros(length, 2),
            num_prompt_tokens=1,
            rl_step=0,
        )

    given = [features(length) for length in lengths]
    assert row_length(given, 17) == 2  # 10 + 5 pairs, then 3
    assert row_length(given, 18) == 3
    assert row_length(given[3:], 18) == 1
    assert row_length(given[4:], 18) == 1


def test_rows_of_a_pass_hold_every_sequence_once_within_the_budget(tmp_path: Path) -> None:
    module = collect(tmp_path, make_data(tmp_path, num_steps=12))
    seen = Counter(itertools.chain.from_iterable(map(segments, module.rows)))
    assert len(seen) == 15
    assert max(seen.values()) - min(seen.values()) <= 1
    assert all(int((row.segment_BT >= 0).sum()) <= 100 for row in module.rows)
    held_out = Counter(itertools.chain.from_iterable(map(segments, module.held_out)))
    assert len(held_out) == 5
    assert not held_out.keys() & seen.keys()


def test_given_responses_are_tokenized_ended_and_cut(tmp_path: Path) -> None:
    data = make_data(tmp_path, sampling=SamplingParams(max_tokens=9))
    collect(tmp_path, data)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    lines = [json.loads(line) for line in (tmp_path / "responses.jsonl").read_text().splitlines()]
    responses = {line["prompt"]: line["response"] for line in lines}
    is_cut = set()
    for prompt in data._prompts["train"]:
        sequence = data._maker.given(prompt)
        assert tuple(sequence.tokens_T[: sequence.num_prompt_tokens].tolist()) == prompt.tokens
        response = sequence.tokens_T[sequence.num_prompt_tokens :].tolist()
        whole = [
            *tokenizer(responses[prompt.text], add_special_tokens=False)["input_ids"],
            tokenizer.eos_token_id,
        ]
        assert response == whole[:9]
        is_cut.add(len(whole) > 9)
    assert True in is_cut


def test_the_same_seed_gives_the_same_rows_and_another_one_others(tmp_path: Path) -> None:
    first, again, other = (
        collect(tmp_path, make_data(tmp_path, seed=seed)).rows for seed in (1, 1, 2)
    )
    assert_same_rows(first, again)
    assert [segments(row) for row in first] != [segments(row) for row in other]


def test_rows_are_those_packed_from_an_unpadded_forward_of_each_sequence(tmp_path: Path) -> None:
    data = make_data(tmp_path, num_steps=1)
    module = collect(tmp_path, data)
    (row,) = module.rows
    by_next_tokens = {}
    for prompt in data._prompts["train"]:
        sequence = data._maker.given(prompt)
        with torch.no_grad():
            output = module.target(sequence.tokens_T.unsqueeze(0), output_hidden_states=True)
        by_next_tokens[tuple(sequence.tokens_T[1:-1].tolist())] = SequenceFeatures(
            tokens_T=sequence.tokens_T,
            hidden_TD=output.hidden_states[-1][0],
            num_prompt_tokens=sequence.num_prompt_tokens,
            rl_step=0,
        )
    # Segments keep their numbers when a row is folded.
    expected = fold_segments(
        pack_sequences([by_next_tokens[one] for one in segments(row)], max_pairs=100)
    )
    for name in ("next_tokens_BT", "position_ids_BT", "segment_BT", "loss_mask_BT"):
        assert torch.equal(getattr(row, name), getattr(expected, name)), name
    for name in ("hidden_BTD", "target_hidden_BTD"):
        torch.testing.assert_close(
            getattr(row, name), getattr(expected, name), rtol=1e-4, atol=1e-4
        )


def test_of_an_empty_response_its_end_is_learnt(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps({"prompt": f"{n} =", "response": ""}) + "\n" for n in "12"))
    prompts = JsonlPrompts(str(path), held_out_fraction=0, answer_key="response")
    data = make_data(tmp_path, prompts=prompts, sampling=SamplingParams(max_tokens=1))
    rows = collect(tmp_path, data).rows
    assert [int(row.loss_mask_BT.sum()) for row in rows] == [2] * 6


# ---- generated responses


def generated_data(**changes: Any) -> FeatureDataModule:
    prompts = ReasoningGymPrompts(
        task="chain_sum",
        config={"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 1},
        num_train=6,
        num_held_out=2,
    )
    options: dict[str, Any] = {
        "model_path": POLICY,
        "prompts": prompts,
        "num_steps": 8,
        "engine": TorchEngine(max_batch_size=8),
        "num_samples": 2,
        "sampling": SamplingParams(max_tokens=40),
        "tokens_per_step": 200,
        "prompts_per_shard": 4,
    }
    return FeatureDataModule(**(options | changes))


def test_generated_responses_are_the_engines_own_at_that_sampling(tmp_path: Path) -> None:
    data = generated_data()
    module = collect(tmp_path, data)
    engine = TorchEngine(max_batch_size=8)
    engine.start(POLICY)
    engine.load_policy(module.target.named_parameters(), 0)
    rollouts = engine.generate(
        data._prompts["train"], SamplingParams(max_tokens=40), num_samples=2, seed=0
    )
    engine.close()
    expected = {rollout.prompt.tokens + rollout.tokens for rollout in rollouts}
    seen = set(itertools.chain.from_iterable(map(segments, module.rows)))
    assert seen == {sequence[1:-1] for sequence in expected if len(sequence) > 2}


@pytest.mark.parametrize("has_cache", [False, True])
def test_held_out_rows_know_their_sequences_and_tasks(tmp_path: Path, has_cache: bool) -> None:
    """Of several samples a prompt, in shards of both tasks; a cache keeps no names."""
    tasks = {"chain_sum": 3, "basic_arithmetic": 2}
    data = generated_data(
        prompts=MixedPrompts(
            [ReasoningGymPrompts(task=t, num_train=2, num_held_out=n) for t, n in tasks.items()]
        ),
        sampling=SamplingParams(max_tokens=5),
        cache_folder=str(tmp_path / "cache") if has_cache else None,
        tokens_per_step=150,
    )
    if has_cache:
        collect(tmp_path, data)
    module = collect(tmp_path, data)
    assert data.held_out_tasks == ("basic_arithmetic", "chain_sum")
    task_of = {prompt.tokens: prompt.metadata["task"] for prompt in data._prompts["held_out"]}
    counts = Counter[str]()
    for row in module.held_out_rows:
        assert [tuple(one.tokens_T[1:-1].tolist()) for one in row.sequences] == segments(row.packed)
        for sequence, task in zip(row.sequences, row.tasks, strict=True):
            prompt = tuple(sequence.tokens_T[: sequence.num_prompt_tokens].tolist())
            assert task == task_of[prompt]
            counts[task] += 1
    assert counts == {task: 2 * number for task, number in tasks.items()}
    assert len(module.held_out_rows) > 2


# ---- the cache


def test_a_cache_hit_equals_what_is_made_on_the_fly_and_asks_neither_engine_nor_target(
    tmp_path: Path,
) -> None:
    folder = str(tmp_path / "cache")
    on_the_fly = collect(tmp_path, generated_data())
    filling = collect(tmp_path, generated_data(cache_folder=folder))
    engine = TorchEngine(max_batch_size=8)
    hit = collect(tmp_path, generated_data(cache_folder=folder, engine=engine))
    for other in (filling, hit):
        assert_same_rows(on_the_fly.rows, other.rows)
        assert_same_rows(on_the_fly.held_out, other.held_out)
    assert hit.num_forwards == 0
    assert engine.policy_version == -1
    assert filling.num_forwards > 0


def test_rows_of_another_size_are_packed_from_the_same_cache(tmp_path: Path) -> None:
    options = {"cache_folder": str(tmp_path / "cache"), "num_steps": 12}
    collect(tmp_path, make_data(tmp_path, **options))
    other = collect(tmp_path, make_data(tmp_path, tokens_per_step=30, **options))
    assert other.num_forwards == 0
    assert all(int((row.segment_BT >= 0).sum()) <= 30 for row in other.rows)


def test_beyond_the_bound_the_target_runs_again_and_the_engine_does_not(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    on_the_fly = collect(tmp_path, generated_data())
    size = 100_000
    options = {"cache_folder": str(folder), "cache_gib": size / 2**30}
    collect(tmp_path, generated_data(**options))
    assert 0 < sum(path.stat().st_size for path in folder.rglob("*.*")) <= size
    engine = TorchEngine(max_batch_size=8)
    again = collect(tmp_path, generated_data(engine=engine, **options))
    assert_same_rows(on_the_fly.rows, again.rows)
    assert again.num_forwards > 0
    assert engine.policy_version == -1


def test_a_raised_bound_is_filled_with_what_was_left_out(tmp_path: Path) -> None:
    """By the next run; the one after that needs no forward."""
    folder = str(tmp_path / "cache")
    collect(tmp_path, generated_data(cache_folder=folder, cache_gib=100_000 / 2**30))
    filling, hit = (collect(tmp_path, generated_data(cache_folder=folder)) for _ in range(2))
    assert filling.num_forwards > 0
    assert hit.num_forwards == 0
    assert_same_rows(filling.rows, hit.rows)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "another target", "another tokenizer"])
def test_a_damaged_or_foreign_cache_is_made_anew_and_never_trained_on(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "cache"
    clean = collect(tmp_path, make_data(tmp_path))
    changes: dict[str, Any] = {"cache_folder": str(folder)}
    if damage == "another target":
        other = load_causal_lm(POLICY).eval()
        with torch.no_grad():
            other.model.layers[0].mlp.down_proj.weight[0, 0] += 1
        collect(tmp_path, make_data(tmp_path, **changes), other)
    elif damage == "another tokenizer":
        model = tmp_path / "model"
        shutil.copytree(POLICY, model)
        template = model / "chat_template.jinja"
        template.write_text(template.read_text() + " ")
        collect(tmp_path, make_data(tmp_path, model_path=str(model), **changes))
    else:
        collect(tmp_path, make_data(tmp_path, **changes))
    files = list(folder.rglob("*.safetensors"))
    assert len(files) == 6
    for path in files:
        content = bytearray(path.read_bytes())
        if damage == "flipped":
            content[-5] ^= 1
        if damage == "truncated":
            content = content[:-1]
        path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        rebuilt = collect(tmp_path, make_data(tmp_path, **changes))
    reasons = {
        "flipped": "do not match their SHA-256",
        "truncated": "truncated or damaged",
        "another target": "made with another target",
        "another tokenizer": "tokenizer\n",
    }
    assert caplog.text.count(reasons[damage]) >= 4, caplog.text
    assert_same_rows(clean.rows, rebuilt.rows)
    assert_same_rows(clean.held_out, rebuilt.held_out)
    assert rebuilt.num_forwards > 0
    hit = collect(tmp_path, make_data(tmp_path, **changes))
    assert_same_rows(clean.rows, hit.rows)
    assert hit.num_forwards == 0


def test_other_responses_or_sampling_make_another_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    changes = {"cache_folder": str(tmp_path / "cache")}
    collect(tmp_path, make_data(tmp_path, **changes))
    path = write_responses(tmp_path)
    path.write_text(path.read_text().replace("Work", "Guess"))
    prompts = JsonlPrompts(str(path), held_out_fraction=0.25, answer_key="response")
    with caplog.at_level(logging.WARNING):
        collect(tmp_path, make_data(tmp_path, prompts=prompts, **changes))
        collect(
            tmp_path,
            make_data(tmp_path, prompts=prompts, sampling=SamplingParams(max_tokens=5), **changes),
        )
    assert "made with another prompts" in caplog.text
    assert "made with another sampling" in caplog.text


def test_rows_made_ahead_are_the_same_and_never_need_the_target(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor the engine; where features have to be made for a row, it is made when asked for."""
    options = {"cache_folder": str(tmp_path / "cache"), "num_steps": 12}
    made_in: list[threading.Thread] = []
    num_ahead = 0
    make = FeatureDataModule._features
    row_ahead = RowStream._row_ahead

    def features(self: FeatureDataModule, split: str, shard: int) -> list[SequenceFeatures]:
        made_in.append(threading.current_thread())
        return make(self, split, shard)

    def ahead(self: RowStream, position: int) -> Any:
        nonlocal num_ahead
        row = row_ahead(self, position)
        num_ahead += row is not None
        return row

    monkeypatch.setattr(FeatureDataModule, "_features", features)
    monkeypatch.setattr(RowStream, "_row_ahead", ahead)
    first = collect(tmp_path, make_data(tmp_path, **options))
    assert 0 < num_ahead < 12
    again = collect(tmp_path, make_data(tmp_path, **options))
    assert set(made_in) == {threading.main_thread()}
    monkeypatch.setattr(RowStream, "_row_ahead", lambda self, position: None)
    one_by_one = collect(tmp_path, make_data(tmp_path, **options))
    assert_same_rows(first.rows, again.rows)
    assert_same_rows(first.rows, one_by_one.rows)


def test_hidden_states_of_autocast_are_kept_in_bfloat16(tmp_path: Path) -> None:
    """Rounded: what an LM head under autocast reads all the same."""
    exact = collect(tmp_path, make_data(tmp_path, num_steps=2))
    options: dict[str, Any] = {"cache_folder": str(tmp_path / "cache"), "num_steps": 2}
    made, read = (
        collect(tmp_path, make_data(tmp_path, **options), precision="bf16-mixed") for _ in range(2)
    )
    assert_same_rows(made.rows, read.rows)
    assert read.num_forwards == 0
    for row, one in zip(made.rows, exact.rows, strict=True):
        for name in ("hidden_BTD", "target_hidden_BTD"):
            rounded, expected = getattr(row, name), getattr(one, name)
            assert rounded.dtype == torch.bfloat16
            assert (rounded.float() - expected).norm() < 0.05 * expected.norm()


# ---- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_steps": 0}, "num_steps must be >= 1, got 0"),
        ({"tokens_per_step": 0}, "tokens_per_step must be >= 1"),
        ({"cache_gib": 0.0}, "set data.cache_folder to null"),
        ({"num_samples": 2}, "a given response is one"),
    ],
)
def test_unusable_options_are_refused(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make_data(tmp_path, **options)
