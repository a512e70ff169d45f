"""RL steps as a Chrome trace, which https://ui.perfetto.dev and chrome://tracing open.

The file is in the JSON array form of the Trace Event Format, whose closing bracket may be missing:
a step is appended when it has ended, and a run that was killed leaves a file that can be read. A
rank is a process, its loop, engine and drafter are threads. Leaves out where spans come from.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from fastrl.callbacks.timeline_spans import RankStep, waits
from fastrl.types import Span

LANES = ("loop", "engine", "drafter")
_LONGEST_LINE = 1 << 16
"""In bytes, far beyond any that is written here."""


def append_step(path: Path, ranks: Sequence[RankStep], rl_step: int) -> None:
    """Write a step behind those that are there, or begin the file.

    Args:
        path: of the trace; its folder is made.
        ranks: all ranks' step, rank 0 first.
        rl_step: RL steps finished.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a+b") as file:
        is_new = _end_of_whole_lines(file) == 0
    with path.open("a", encoding="utf-8") as file:
        if is_new:
            file.write("[\n")
            file.writelines(_lines(_names(len(ranks))))
        file.writelines(_lines(events(ranks, rl_step)))


def events(ranks: Sequence[RankStep], rl_step: int) -> Iterator[dict[str, Any]]:
    """A complete event for each span, in microseconds since 1970."""
    for number, (rank, waiting) in enumerate(zip(ranks, waits(ranks), strict=True)):
        lanes = (rank.phases, (*rank.engine, *waiting), rank.drafter)
        for lane, spans in enumerate(lanes):
            for span in spans:
                yield {
                    "name": span.name,
                    "cat": LANES[lane],
                    "ph": "X",
                    "pid": number,
                    "tid": lane,
                    "ts": round(1e6 * (rank.clock_offset_s + span.start_s), 1),
                    "dur": round(1e6 * span.seconds, 1),
                    "args": {"rl_step": rl_step},
                }


def _end_of_whole_lines(file: BinaryIO) -> int:
    """Its size, after a line that a killed run has not finished is cut off: a trace that goes on
    behind one is not JSON."""
    size = file.seek(0, os.SEEK_END)
    start = max(size - _LONGEST_LINE, 0)
    file.seek(start)
    tail = file.read()
    whole = tail.rfind(b"\n") + 1
    if whole == len(tail):
        return size
    return file.truncate(start + whole)


def _names(num_ranks: int) -> Iterator[dict[str, Any]]:
    for number in range(num_ranks):
        yield {
            "name": "process_name",
            "ph": "M",
            "pid": number,
            "args": {"name": f"rank {number}"},
        }
        for lane, name in enumerate(LANES):
            yield {
                "name": "thread_name",
                "ph": "M",
                "pid": number,
                "tid": lane,
                "args": {"name": name},
            }


def _lines(records: Iterator[dict[str, Any]]) -> Iterator[str]:
    return (json.dumps(record, allow_nan=False) + ",\n" for record in records)


def read(path: Path) -> list[dict[str, Any]]:
    """The events of such a file, which may end in the middle of a line."""
    records = []
    for line in path.read_text(encoding="utf-8").splitlines()[1:]:
        try:
            records.append(json.loads(line.rstrip(",")))
        except json.JSONDecodeError:
            break  # the last one, of a run that was killed
    return records


def span_of(event: dict[str, Any]) -> Span:
    """Of a complete event."""
    return Span(name=event["name"], start_s=event["ts"] / 1e6, seconds=event["dur"] / 1e6)
