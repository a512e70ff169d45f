"""Questions from JSON Lines files: one object a line, with a question and its reference answer.

Needs no library; leaves out other formats (dataset_prompts.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fastrl.datamodules.prompts import (
    HELD_OUT_ID_OFFSET,
    PromptSource,
    Question,
    QuestionSplits,
    check_held_out_fraction,
    hold_out_share,
    split_disjoint,
)
from fastrl.datamodules.question_fields import QuestionFields


class JsonlPrompts(PromptSource):
    """Questions of a JSON Lines file, the held-out ones from a second file or from a share of the
    first.

    A question's other keys are handed to the reward function as `Prompt.metadata`.

    Args:
        path: File of training questions, one JSON object a line.
        held_out_path: File of held-out questions; without one, `held_out_fraction` of `path` is
            held out.
        held_out_fraction: Share of the questions in `path` to hold out, chosen by `seed`, in [0,
            1).
        prompt_key: Key of the question in each object, or a dotted path to it: a string, or chat
            messages (role and content) that end with the user's.
        answer_key: Key of the reference answer in each object, or a dotted path to it.
        seed: Seeds the choice of the questions held out.
    """

    def __init__(
        self,
        path: str,
        held_out_path: str | None = None,
        held_out_fraction: float = 0.1,
        prompt_key: str = "prompt",
        answer_key: str = "answer",
        seed: int = 0,
    ) -> None:
        check_held_out_fraction(held_out_fraction, type(self).__name__)
        self.path = path
        self.held_out_path = held_out_path
        self.held_out_fraction = held_out_fraction
        self.fields = QuestionFields(prompt_key=prompt_key, answer_key=answer_key)
        self.seed = seed

    def load(self) -> QuestionSplits:
        """Read and split; ValueError names the file and the line of what is wrong."""
        questions = self._read(self.path, first_id=0)
        if self.held_out_path is not None:
            held_out = self._read(self.held_out_path, first_id=HELD_OUT_ID_OFFSET)
            return split_disjoint(questions, held_out, source=self.path)
        return hold_out_share(questions, self.held_out_fraction, self.seed, source=self.path)

    def _read(self, path: str, first_id: int) -> list[Question]:
        if not Path(path).is_file():
            raise ValueError(f"data file {path} does not exist; expected a JSON Lines file")
        questions: list[Question] = []
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    place = f"{path}, line {number}"
                    prompt_id = first_id + len(questions)
                    questions.append(self.fields.read(_parse(line, place), prompt_id, place))
        if not questions:
            raise ValueError(
                f"data file {path} is empty; expected one JSON object a line, with the keys "
                f"{self.fields.prompt_key!r} and {self.fields.answer_key!r}"
            )
        return questions


def _parse(line: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{place}: not UTF-8 text ({error.reason})") from error
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{place}, column {error.colno}: malformed JSON ({error.msg}); expected one object a "
            f"line"
        ) from error
    if not isinstance(record, dict):
        raise ValueError(f"{place}: expected a JSON object, got {type(record).__name__}")
    return record
