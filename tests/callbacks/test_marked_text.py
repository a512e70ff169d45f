"""Which tokens were drafts, text cut between whole characters, and what TensorBoard makes of it."""

from __future__ import annotations

import html
import re

import pytest
from tensorboard.plugin_util import markdown_to_safe_html
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from fastrl.callbacks.marked_text import escape, is_draft, marked_html, paragraph, text_pieces
from fastrl.types import FinishReason, Prompt, Rollout

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
TEXT = "Grüße: 日本語 😀👩‍👩‍👧, 1 + 1 = 2.\n  done"


def byte_level() -> PreTrainedTokenizerFast:
    """A token a byte, as in GPT-2's alphabet, and one for the words of chat."""
    vocabulary = {symbol: number for number, symbol in enumerate(BYTES)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    return tokenizer


def sentencepiece_like() -> PreTrainedTokenizerFast:
    """Llama 2's way: a blank is part of the word after it, and unknown characters fall to bytes."""
    words = ["<unk>", "▁", "▁Hello", "▁world", "▁", "!", "H", "e", "l", "o"]
    vocabulary = {word: number for number, word in enumerate(dict.fromkeys(words))}
    vocabulary |= {f"<0x{byte:02X}>": len(vocabulary) + byte for byte in range(256)}
    backend = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend)


def rollout(tokens: list[int], accept_lengths: tuple[int, ...]) -> Rollout:
    return Rollout(
        prompt=Prompt(prompt_id=0, tokens=(0,), text="?", answer=""),
        sample_index=0,
        tokens=tuple(tokens),
        logprobs=(0.0,) * len(tokens),
        text="",
        finish_reason=FinishReason.STOP,
        policy_version=0,
        accept_lengths=accept_lengths,
    )


def shown(markdown: str) -> list[tuple[bool, str]]:
    """What TensorBoard shows: (bold, text), neighbours of the same kind joined."""
    page = re.sub(r"</?(?:p|em)>\n*", "", markdown_to_safe_html(markdown)).replace("<br>", "\n")
    parts = re.split(r"(</?strong>)", page)
    result, bold = [], False
    for part in parts:
        if part in ("<strong>", "</strong>"):
            bold = part == "<strong>"
        elif part:
            result.append((bold, html.unescape(part).replace("\xa0", " ")))
    return result


def test_each_decode_step_ends_with_the_policys_own_token() -> None:
    flags = is_draft(rollout([0] * 8, (3, 1, 1, 2)))
    assert "".join("d" if flag else "." for flag in flags) == "." + "dd." + "." + "." + "d."


def test_a_response_of_one_token_and_unknown_accept_lengths_have_no_drafts() -> None:
    assert is_draft(rollout([5], ())) == [False]
    assert is_draft(rollout([5, 6, 7], ())) == [False] * 3


def test_accept_lengths_that_do_not_add_up_are_an_error() -> None:
    with pytest.raises(AssertionError, match=r"has 3 tokens, but .* emitted 4"):
        is_draft(rollout([5, 6, 7], (3,)))


def test_byte_level_pieces_are_whole_characters_and_add_up() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode(TEXT)
    assert len(tokens) == len(TEXT.encode())
    pieces = list(text_pieces(tokenizer, tokens))
    assert [piece.text for piece in pieces] == list(TEXT)
    assert [piece.num_tokens for piece in pieces] == [len(char.encode()) for char in TEXT]


def test_pieces_keep_blanks_that_a_token_alone_would_lose() -> None:
    tokenizer = sentencepiece_like()
    names = ["▁Hello", "▁world", "▁Hello", "<0xE6>", "<0x97>", "<0xA5>", "!"]
    tokens = tokenizer.convert_tokens_to_ids(names)
    pieces = [(piece.text, piece.num_tokens) for piece in text_pieces(tokenizer, tokens)]
    assert pieces == [("Hello", 1), (" world", 1), (" Hello", 1), ("日", 3), ("!", 1)]


def test_bytes_that_are_no_text_are_shown_as_such_and_every_token_counts_once() -> None:
    tokenizer = byte_level()
    letter, broken = tokenizer.encode("a")[0], tokenizer.encode("é")[0]
    tokens = [letter, *[broken] * 11, letter, letter]
    pieces = list(text_pieces(tokenizer, tokens))
    assert sum(piece.num_tokens for piece in pieces) == len(tokens)
    assert max(piece.num_tokens for piece in pieces) <= 4
    text = "".join(piece.text for piece in pieces)
    assert re.fullmatch("a�{11}aa", text)


def test_special_tokens_are_shown() -> None:
    tokenizer = byte_level()
    tokens = [*tokenizer.encode("ok"), tokenizer.eos_token_id]
    assert [piece.text for piece in text_pieces(tokenizer, tokens)] == ["o", "k", "<|im_end|>"]


def test_drafts_are_bold_and_a_character_that_is_partly_one_is_not() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("abcdé")
    assert len(tokens) == 6
    page = marked_html(tokenizer, rollout(tokens, (3, 2)), max_tokens=99)
    assert shown(page) == [(False, "a"), (True, "bc"), (False, "dé")]


@pytest.mark.parametrize(
    "text",
    [
        "# no *heading*, **no** _emphasis_, `no` code, ~~no~~ [no](link) ![no](image)",
        "1. no\n2. list\n\n- none\n\n    no code block\n\n> no quote\n\n---",
        "| no | table |\n|----|-------|\n| 1  | 2     |",
        "<script>alert(1)</script> <b>&amp; &lt;</b> </p></strong> a < b && c > d",
        "<think>\n 1 + 1\n</think>\n\n<answer>2</answer>",
        "```python\nprint('*')\n```\n$x_1 * y_1$ \\(a\\) \\* https://example.org <http://x.org>",
        "blanks:   three,  two\n  indented",
    ],
)
def test_tensorboard_shows_the_text_as_it_is(text: str) -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode(text)
    alternating = rollout(tokens, (2,) * ((len(tokens) - 1) // 2) + (1,) * ((len(tokens) - 1) % 2))
    marked = shown(marked_html(tokenizer, alternating, max_tokens=10_000))
    assert "".join(part for _, part in marked) == text
    assert "".join(part for bold, part in marked if bold) == text[1 : len(text) - 1 : 2]
    assert shown(paragraph(escape(text))) == [(False, text)]


def test_tabs_are_shown_as_blanks() -> None:
    assert shown(paragraph(escape("\tif x:"))) == [(False, "    if x:")]


def test_a_long_response_shows_its_two_ends() -> None:
    tokenizer = byte_level()
    tokens = tokenizer.encode("abcdefghij")
    page = marked_html(tokenizer, rollout(tokens, (9,)), max_tokens=5)
    assert shown(page) == [(False, "a"), (True, "bc"), (False, "… 5 tokens …"), (True, "i"),
                           (False, "j")]  # fmt: skip
