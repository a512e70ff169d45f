"""Any reasoning-gym task by name: reproducible, disjoint splits, bad names and settings named."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from fastrl.datamodules.prompts import HELD_OUT_ID_OFFSET
from fastrl.datamodules.reasoning_gym_prompts import ReasoningGymPrompts
from fastrl.datamodules.rewards import ReasoningGymReward
from fastrl.types import Prompt

TASKS: list[tuple[str, dict[str, Any]]] = [
    ("chain_sum", {"max_terms": 3}),
    ("leg_counting", {}),
    ("spell_backward", {"max_word_len": 5}),
    ("basic_arithmetic", {}),
    ("number_sorting", {}),
    ("knights_knaves", {}),
    ("countdown", {}),
]


@pytest.mark.parametrize(("task", "config"), TASKS)
def test_a_task_by_name_gives_questions_whose_own_answers_its_reward_accepts(
    task: str, config: dict[str, Any]
) -> None:
    splits = ReasoningGymPrompts(task, config, num_train=8, num_held_out=4).load()
    assert len(splits.train) + splits.num_duplicates == 8
    reward = ReasoningGymReward()
    for question in (*splits.train, *splits.held_out):
        prompt = Prompt(
            prompt_id=question.prompt_id,
            tokens=(1,),
            text=question.text,
            answer=question.answer,
            metadata=pickle.loads(pickle.dumps(question.metadata)),
        )
        assert reward.score(f"So <answer>{question.answer}</answer>", prompt) == 1
        assert reward.score(f"So {question.answer}", prompt) == 0
        assert reward.score("<answer>no such thing</answer>", prompt) < 1


def test_settings_reach_the_task() -> None:
    config = {"min_terms": 3, "max_terms": 3, "min_digits": 2, "max_digits": 2}
    splits = ReasoningGymPrompts("chain_sum", config, num_train=20, num_held_out=0).load()
    for question in splits.train:
        numbers = [word for word in question.text.split() if word.isdigit()]
        assert [len(number) for number in numbers] == [2, 2, 2]


def test_the_same_seed_gives_the_same_questions_and_another_seed_others() -> None:
    def texts(seed: int) -> list[str]:
        splits = ReasoningGymPrompts("chain_sum", num_train=20, num_held_out=20, seed=seed).load()
        return [question.text for question in (*splits.train, *splits.held_out)]

    assert texts(0) == texts(0)
    assert not set(texts(0)) & set(texts(100))


def test_no_question_is_both_held_out_and_trained_on() -> None:
    # One-digit sums of two terms: 200 different questions, so that the splits are sure to collide.
    config = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    splits = ReasoningGymPrompts("chain_sum", config, num_train=300, num_held_out=30).load()
    train = {question.text for question in splits.train}
    held_out = {question.text for question in splits.held_out}
    assert not train & held_out
    assert splits.num_duplicates > 0
    assert len(splits.train) == 300 - splits.num_duplicates
    assert len(splits.held_out) == 30


def test_held_out_questions_stay_the_same_when_more_are_trained_on() -> None:
    few = ReasoningGymPrompts("leg_counting", num_train=5, num_held_out=5).load()
    many = ReasoningGymPrompts("leg_counting", num_train=50, num_held_out=5).load()
    assert few.held_out == many.held_out
    assert few.train == many.train[:5]


def test_prompt_ids_are_places_in_the_data_set_and_the_splits_share_none() -> None:
    splits = ReasoningGymPrompts("leg_counting", num_train=5, num_held_out=3).load()
    assert [question.prompt_id for question in splits.train] == [0, 1, 2, 3, 4]
    assert [q.prompt_id - HELD_OUT_ID_OFFSET for q in splits.held_out] == [0, 1, 2]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"task": "chain_sums"},
            "unknown reasoning-gym task 'chain_sums', did you mean 'chain_sum'",
        ),
        ({"task": "qqqqqq"}, "unknown reasoning-gym task 'qqqqqq'; there are"),
        ({"config": {"max_term": 3}}, "has no setting 'max_term', did you mean 'max_terms'"),
        ({"config": {"max_terms": 1}}, "refuses its config .*: max_terms must be >= min_terms"),
        ({"config": {"size": 5}}, "must not set 'size'; set num_train"),
        ({"num_train": 0}, "num_train of ReasoningGymPrompts must be >= 1, got 0"),
        ({"num_held_out": -1}, "num_held_out of ReasoningGymPrompts must be >= 0, got -1"),
        ({"seed": -1}, "seed of ReasoningGymPrompts must be >= 0"),
    ],
)
def test_bad_arguments_are_named_with_the_cure(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReasoningGymPrompts(**({"task": "chain_sum"} | arguments))
