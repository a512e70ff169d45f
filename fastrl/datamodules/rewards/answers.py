"""Finding the answer inside a response. Pure."""

from __future__ import annotations

import re

TAGGED_ANSWER = r"<answer>(.*?)</answer>"


def compile_answer_pattern(answer_pattern: str) -> re.Pattern[str]:
    """Compile a pattern whose one group is the answer; `.` matches newlines as well.

    Raises ValueError naming the pattern if it is malformed or has another number of groups.
    """
    try:
        pattern = re.compile(answer_pattern, re.DOTALL)
    except re.error as error:
        raise ValueError(
            f"answer_pattern {answer_pattern!r} is not a regular expression: {error}"
        ) from error
    if pattern.groups != 1:
        raise ValueError(
            f"answer_pattern {answer_pattern!r} must have exactly one group, the answer, as in "
            f"{TAGGED_ANSWER!r}; it has {pattern.groups}"
        )
    return pattern


def extract_answer(pattern: re.Pattern[str], text: str) -> str | None:
    """The last match's answer, stripped of blanks; None without a match."""
    answers = pattern.findall(text)
    return answers[-1].strip() if answers else None
