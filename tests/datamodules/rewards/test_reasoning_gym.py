"""A reasoning-gym task judges its own questions, under its own settings."""

from __future__ import annotations

from typing import Any

import pytest

from fastrl.datamodules.reasoning_gym_prompts import ReasoningGymPrompts
from fastrl.datamodules.rewards import ReasoningGymReward, RewardPool
from fastrl.types import Prompt, RewardResult


def first_prompt(task: str, config: dict[str, Any] | None = None) -> Prompt:
    question = ReasoningGymPrompts(task, config, num_train=1, num_held_out=0).load().train[0]
    return Prompt(
        prompt_id=0,
        tokens=(1,),
        text=question.text,
        answer=question.answer,
        metadata=question.metadata,
    )


def test_the_task_accepts_other_forms_of_its_answer() -> None:
    prompt = first_prompt("chain_sum")
    assert ReasoningGymReward().score(f"<answer>{prompt.answer}.00</answer>", prompt) == 1


def test_a_task_without_a_reference_answer_still_judges() -> None:
    prompt = first_prompt("graph_color", {"min_num_vertices": 3, "max_num_vertices": 3})
    assert prompt.answer == ""
    three_colors = '<answer>{"0": 1, "1": 2, "2": 3}</answer>'
    assert ReasoningGymReward().score(three_colors, prompt) == 1


def test_it_scores_in_worker_processes() -> None:
    prompt = first_prompt("leg_counting")
    pool = RewardPool(ReasoningGymReward(), num_workers=1, timeout_s=30)
    texts = [f"<answer>{prompt.answer}</answer>", "nothing"]
    assert pool.score(texts, [prompt, prompt]) == [RewardResult(score=1.0), RewardResult(score=0.0)]
    pool.close()


def test_a_prompt_of_another_source_is_named() -> None:
    prompt = Prompt(prompt_id=3, tokens=(1,), text="?", answer="!", metadata={"level": 1})
    with pytest.raises(ValueError, match=r"prompt 3 carries no reasoning-gym entry .*\['level'\]"):
        ReasoningGymReward().score("<answer>1</answer>", prompt)
