"""A response as HTML in which what a drafter proposed and the policy accepted stands out. Pure.

It is for TensorBoard's text tab, which takes Markdown and keeps few tags and no styles: drafts are
bold, and every paragraph is an HTML block, in which Markdown changes nothing.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from fastrl.types import Rollout

_REPLACEMENT = "�"  # what bytes that are no whole character decode to
_MOST_TOKENS_OF_A_CHARACTER = 4  # UTF-8 takes up to four bytes, and a token holds one at least


@dataclass(frozen=True, kw_only=True, slots=True)
class Piece:
    """A stretch of text that whole tokens make up."""

    text: str
    num_tokens: int


def is_draft(rollout: Rollout) -> list[bool]:
    """Of each response token: whether it was a draft that the policy accepted.

    The first comes from the prefill; each decode step emits accepted drafts and then one token of
    the policy's own. Where the response ended within a step, its last token is counted as the
    policy's own, whichever it was. All false where the engine tells no accept lengths.
    """
    if not rollout.accept_lengths:
        return [False] * len(rollout.tokens)
    flags = [False]
    for length in rollout.accept_lengths:
        flags += [True] * (length - 1) + [False]
    assert len(flags) == len(rollout.tokens), (
        f"sample {rollout.sample_index} of prompt {rollout.prompt.prompt_id} has "
        f"{len(rollout.tokens)} tokens, but decode steps and prefill emitted {len(flags)}"
    )
    return flags


def text_pieces(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int]) -> Iterator[Piece]:
    """The text of tokens, special ones included, in the smallest pieces that decode on their own.

    A character of several byte-level tokens is not torn. A piece is what a token adds to the text
    of those before it, since some tokenizers decode it otherwise at the start of a text.
    """

    def decode(start: int, end: int) -> str:
        return str(
            tokenizer.decode(
                list(tokens[start:end]),
                skip_special_tokens=False,
                clean_up_tokenization_spaces=False,
            )
        )

    start = settled = 0  # of the piece before, and of the piece under way
    before = ""
    for end in range(1, len(tokens) + 1):
        text = decode(start, end)
        is_torn = text.endswith(_REPLACEMENT) and end - settled < _MOST_TOKENS_OF_A_CHARACTER
        if end < len(tokens) and (is_torn or len(text) <= len(before)):
            continue
        yield Piece(text=text[len(before) :], num_tokens=end - settled)
        start, settled = settled, end
        before = decode(start, settled)


def marked_html(tokenizer: PreTrainedTokenizerBase, rollout: Rollout, *, max_tokens: int) -> str:
    """The response as a paragraph, accepted drafts bold; of a long one, its two ends.

    A piece of several tokens is bold if all of them are drafts.
    """
    flags = is_draft(rollout)
    if len(flags) <= max_tokens:
        return paragraph(_marked(tokenizer, rollout.tokens, flags))
    head, tail = max_tokens - max_tokens // 2, max_tokens // 2
    num_left_out = len(flags) - head - tail
    return "\n\n".join(
        (
            paragraph(_marked(tokenizer, rollout.tokens[:head], flags[:head])),
            paragraph(f"<em>… {num_left_out} tokens …</em>"),
            paragraph(_marked(tokenizer, rollout.tokens[-tail:], flags[-tail:])),
        )
    )


def _marked(
    tokenizer: PreTrainedTokenizerBase, tokens: Sequence[int], flags: Sequence[bool]
) -> str:
    marked: list[tuple[bool, str]] = []
    position = 0
    for piece in text_pieces(tokenizer, tokens):
        end = position + piece.num_tokens
        marked.append((all(flags[position:end]), piece.text))
        position = end
    runs = (
        (bold, escape("".join(text for _, text in run)))
        for bold, run in groupby(marked, key=lambda pair: pair[0])
    )
    return "".join(f"<strong>{text}</strong>" if bold else text for bold, text in runs)


def escape(text: str) -> str:
    """Any text as HTML that shows it, on one line of source: lines break, blanks stay."""
    return (
        html.escape(text.expandtabs(4), quote=False)
        .replace("  ", "&nbsp; ")
        .replace("\r\n", "\n")
        .replace("\r", "\n")
        .replace("\n", "<br>")
    )


def paragraph(content: str) -> str:
    """An HTML block, which Markdown leaves alone."""
    return f"<p>{content}</p>"
