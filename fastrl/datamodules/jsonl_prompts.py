"""Questions from JSON Lines files: one object a line, with a question and its reference answer.

Leaves out other formats, and multi-turn conversations.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from fastrl.datamodules.prompts import (
    HELD_OUT_ID_OFFSET,
    PromptSource,
    Question,
    QuestionSplits,
    split_disjoint,
)


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
        prompt_key: Key of the question in each object.
        answer_key: Key of the reference answer in each object.
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
        if not 0 <= held_out_fraction < 1:
            raise ValueError(
                f"held_out_fraction of JsonlPrompts must be in [0, 1), got {held_out_fraction}"
            )
        self.path = path
        self.held_out_path = held_out_path
        self.held_out_fraction = held_out_fraction
        self.prompt_key = prompt_key
        self.answer_key = answer_key
        self.seed = seed

    def load(self) -> QuestionSplits:
        """Read and split; ValueError names the file and the line of what is wrong."""
        questions = self._read(self.path, first_id=0)
        if self.held_out_path is not None:
            held_out = self._read(self.held_out_path, first_id=HELD_OUT_ID_OFFSET)
            return split_disjoint(questions, held_out, source=self.path)
        num_held_out = round(len(questions) * self.held_out_fraction)
        chosen = random.Random(f"held out/{self.seed}").sample(range(len(questions)), num_held_out)
        chosen_set = set(chosen)
        train = [q for index, q in enumerate(questions) if index not in chosen_set]
        return split_disjoint(train, [questions[index] for index in sorted(chosen)], self.path)

    def _read(self, path: str, first_id: int) -> list[Question]:
        if not Path(path).is_file():
            raise ValueError(f"data file {path} does not exist; expected a JSON Lines file")
        questions: list[Question] = []
        with Path(path).open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    record = _parse(line, f"{path}, line {number}")
                    prompt_id = first_id + len(questions)
                    questions.append(self._question(record, prompt_id, f"{path}, line {number}"))
        if not questions:
            raise ValueError(
                f"data file {path} is empty; expected one JSON object a line, with the keys "
                f"{self.prompt_key!r} and {self.answer_key!r}"
            )
        return questions

    def _question(self, record: dict[str, Any], prompt_id: int, place: str) -> Question:
        for name, key in (("prompt_key", self.prompt_key), ("answer_key", self.answer_key)):
            if key not in record:
                raise ValueError(
                    f"{place}: no key {key!r}, found {', '.join(map(repr, record)) or 'none'}; "
                    f"mend the line or set {name}"
                )
        text, answer = record[self.prompt_key], record[self.answer_key]
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{place}: {self.prompt_key!r} must be a non-empty string, got {text!r}"
            )
        if isinstance(answer, bool) or not isinstance(answer, str | int | float):
            raise ValueError(
                f"{place}: {self.answer_key!r} must be a string or a number, got {answer!r}"
            )
        used = (self.prompt_key, self.answer_key)
        metadata = {key: value for key, value in record.items() if key not in used}
        return Question(prompt_id=prompt_id, text=text, answer=str(answer), metadata=metadata)


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
