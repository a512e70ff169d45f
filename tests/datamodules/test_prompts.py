"""The order of prompts, its cursor, and the separation of training from held-out questions."""

from __future__ import annotations

from itertools import chain

import pytest

from fastrl.datamodules.prompts import (
    PromptCursor,
    PromptOrder,
    Question,
    even_slices,
    split_disjoint,
)


def question(text: str, prompt_id: int = 0) -> Question:
    return Question(prompt_id=prompt_id, text=text, answer="")


def take_steps(
    order: PromptOrder, count: int, num_steps: int, position: int = 0
) -> list[list[int]]:
    steps = []
    for _ in range(num_steps):
        indices, position = order.take(position, count)
        steps.append(indices)
    return steps


def test_each_pass_is_another_permutation_of_all_prompts() -> None:
    order = PromptOrder(num_prompts=12, seed=3)
    steps = take_steps(order, count=4, num_steps=9)
    passes = [list(chain(*steps[start : start + 3])) for start in (0, 3, 6)]
    assert all(sorted(indices) == list(range(12)) for indices in passes)
    assert passes[0] != passes[1] != passes[2]


def test_no_step_takes_a_prompt_twice_when_a_pass_does_not_divide() -> None:
    steps = take_steps(PromptOrder(num_prompts=10, seed=0), count=4, num_steps=100)
    assert all(len(set(indices)) == 4 for indices in steps)
    # What a pass leaves out is random: every prompt is taken about 40 times.
    counts = [sum(indices.count(prompt) for indices in steps) for prompt in range(10)]
    assert sum(counts) == 400
    assert all(25 <= count <= 50 for count in counts)


def test_the_order_is_a_function_of_the_seed_and_the_position() -> None:
    steps = take_steps(PromptOrder(num_prompts=10, seed=0), count=3, num_steps=20)
    _, position = PromptOrder(num_prompts=10, seed=0).take(0, 3)
    again = take_steps(PromptOrder(num_prompts=10, seed=0), 3, 19, position)
    assert again == steps[1:]
    assert take_steps(PromptOrder(num_prompts=10, seed=1), 3, 20) != steps


def test_the_order_of_a_seed_never_changes_between_versions() -> None:
    # Golden: a change would make runs of one seed incomparable and resumed ones repeat prompts.
    assert take_steps(PromptOrder(num_prompts=6, seed=0), count=3, num_steps=4) == GOLDEN_STEPS


GOLDEN_STEPS = [[5, 1, 3], [2, 4, 0], [0, 5, 4], [2, 3, 1]]


def test_taking_more_than_there_are_is_an_error() -> None:
    with pytest.raises(ValueError, match="prompts_per_step 4 exceeds the 3 training prompts"):
        PromptOrder(num_prompts=3, seed=0).take(0, 4)


def test_the_cursor_moves_only_once_the_step_that_took_prompts_is_finished() -> None:
    cursor = PromptCursor()
    assert cursor.at(rl_step=0) == 0
    cursor.taken(rl_step=0, position_after=4)
    assert cursor.at(rl_step=0) == 0
    assert cursor.at(rl_step=1) == 4
    assert cursor.at(rl_step=1) == 4
    cursor.taken(rl_step=1, position_after=8)
    assert cursor.at(rl_step=1) == 4
    assert cursor.at(rl_step=2) == 8


def test_a_restored_cursor_starts_at_its_position_whatever_the_step() -> None:
    assert PromptCursor(40).at(rl_step=10) == 40


def test_training_questions_that_are_held_out_are_dropped_and_counted(
    caplog: pytest.LogCaptureFixture,
) -> None:
    train = [question("a", 0), question("b", 1), question("a", 2), question("c", 3)]
    held_out = [question("a", 100), question("d", 101)]
    splits = split_disjoint(train, held_out, "test data")
    assert [(q.text, q.prompt_id) for q in splits.train] == [("b", 1), ("c", 3)]
    assert splits.held_out == tuple(held_out)
    assert splits.num_duplicates == 2
    assert "test data: dropped 2 of 4 training questions" in caplog.text


def test_the_same_words_in_another_conversation_are_another_question() -> None:
    def asked(prompt_id: int, *context: tuple[str, str]) -> Question:
        return Question(prompt_id=prompt_id, text="Go on.", answer="", context=context)

    train = [asked(0, ("user", "a")), asked(1, ("user", "b"))]
    splits = split_disjoint(train, [asked(100, ("user", "b"))], "test data")
    assert [q.prompt_id for q in splits.train] == [0]


def test_nothing_left_to_train_on_is_an_error() -> None:
    with pytest.raises(ValueError, match="test data: none of its 1 training questions is left"):
        split_disjoint([question("a")], [question("a")], "test data")


@pytest.mark.parametrize(("length", "num_slices"), [(10, 3), (3, 3), (7, 2), (100, 7), (0, 2)])
def test_even_slices_cover_everything_in_order_and_differ_by_one(
    length: int, num_slices: int
) -> None:
    parts = [list(range(length))[part] for part in even_slices(length, num_slices)]
    assert list(chain(*parts)) == list(range(length))
    assert len(parts) == num_slices
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
