"""The quickstart's task, reasoning-gym's chain_sum, as its models see it: tokenizer and examples.

A response works (`Work: 3 + 7 = 10<answer>10</answer>`) or guesses (`Guess:<answer>4</answer>`);
its first token tells which. Leaves out models and training (make_quickstart_models.py).
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from reasoning_gym.dataset import ProceduralDataset
from reasoning_gym.factory import create_dataset
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

Entry = dict[str, Any]
"""A reasoning-gym item: question, answer and metadata."""
PAD, BOS, EOS, UNKNOWN = "<pad>", "<s>", "</s>", "<unk>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, SYSTEM, USER, ASSISTANT)
ANSWER_OPEN, ANSWER_CLOSE = "<answer>", "</answer>"
WORDS = (
    *(
        "State",
        " the",
        " final",
        " answer",
        " to",
        " following",
        " arithmetic",
        " problem",
        ":",
        ",",
    ),
    *("Work", "Guess", " Check", " +", " -", " =", *(f" {digit}" for digit in range(10))),
    *(ANSWER_OPEN, ANSWER_CLOSE),
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
MIN_TERMS, MAX_TERMS = 2, 6
HELD_OUT_SEED = 900_000_000
"""reasoning-gym seeds item i with `seed + i`: data sets whose seeds are close share their items."""
_DRAWN_WORK_SHARE = 0.75


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Printable ASCII by the character, the task's words whole, answer tags visible in text."""
    characters = ["\n", *(chr(code) for code in range(32, 127))]
    pieces = [*WORDS, *(c for c in characters if c not in WORDS)]
    # With one score a piece, the best segmentation is the shortest.
    vocab = [(token, 0.0) for token in SPECIAL_TOKENS] + [(piece, -1.0) for piece in pieces]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=SPECIAL_TOKENS.index(UNKNOWN)))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(
        Regex(r"</?answer>| ?\w+| ?[^\w\s]|\s"), "isolated"
    )
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        additional_special_tokens=[SYSTEM, USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def prompt_tokens(tokenizer: PreTrainedTokenizerFast, question: str) -> list[int]:
    """The question as one user message, up to where the response begins."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True
    )
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def reduction(expression: str) -> str:
    """`4 - 1 + 7` -> ` 4 - 1 = 3, 3 + 7: 3 + 7 = 10`.

    Each step writes its sum next to its result, then what remains, for the next step to copy from:
    that keeps every token within reach of a very small model.
    """
    total, *rest = expression.split()
    text = ""
    while rest:
        operator, term, *rest = rest
        before, total = total, str(int(total) + int(term) * (1 if operator == "+" else -1))
        text += f" {before} {operator} {term} = {total}"
        if rest:
            text += f", {' '.join((total, *rest))}:"
    return text


def worked_response(expression: str, answer: str, num_checks: int) -> str:
    """The reduction, written again `num_checks` times, and the answer."""
    working = reduction(expression)
    return f"Work:{working}{f' Check:{working}' * num_checks}{ANSWER_OPEN}{answer}{ANSWER_CLOSE}"


def guessed_response(expression: str) -> str:
    """The last term as the answer, which it seldom is.

    A guess leaves nothing to chance, so that reinforcement learning has nothing to unlearn but the
    habit: to push random digits down would upset the arithmetic of worked responses.
    """
    return f"Guess:{ANSWER_OPEN}{expression.split()[-1]}{ANSWER_CLOSE}"


def chain_sum(size: int, seed: int) -> ProceduralDataset:
    """The quickstart's task: up to six one-digit terms, added and subtracted."""
    return create_dataset(
        "chain_sum",
        size=size,
        seed=seed,
        min_terms=MIN_TERMS,
        max_terms=MAX_TERMS,
        min_digits=1,
        max_digits=1,
    )


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """How the ways of answering are mixed in training."""

    work_share: float = 0.27
    """Probability with which the policy learns to work rather than guess."""
    check_share: float = 0.35
    """Probability of each further check of the working; their number is geometric."""
    max_response: int = 250
    """Longest response in tokens; checks that do not fit are left out."""


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and a response to imitate."""

    tokens: list[int]
    num_prompt: int
    first_weight: float
    """Weight of the response's first token: corrects the share of worked examples drawn."""


def examples(
    mixture: Mixture, tokenizer: PreTrainedTokenizerFast, rng: random.Random
) -> Iterator[Example]:
    """Endless training examples.

    Three in four are worked, for they are the ones that teach; the weight on the first token, which
    decides between working and guessing, makes the policy choose to work with `mixture.work_share`.
    """
    while True:
        entry = chain_sum(1, rng.randrange(HELD_OUT_SEED))[0]
        prompt = prompt_tokens(tokenizer, entry["question"])
        if rng.random() < _DRAWN_WORK_SHARE:
            response = _worked_tokens(mixture, tokenizer, entry, rng)
            weight = mixture.work_share / _DRAWN_WORK_SHARE
        else:
            response = _encode(tokenizer, guessed_response(entry["metadata"]["expression"]))
            weight = (1 - mixture.work_share) / (1 - _DRAWN_WORK_SHARE)
        yield Example(prompt + response, len(prompt), weight)


def _worked_tokens(
    mixture: Mixture, tokenizer: PreTrainedTokenizerFast, entry: Entry, rng: random.Random
) -> list[int]:
    """A worked response with a geometric number of checks, as many as fit."""
    num_checks = 0
    while rng.random() < mixture.check_share:
        num_checks += 1
    while True:
        expression, answer = entry["metadata"]["expression"], entry["answer"]
        tokens = _encode(tokenizer, worked_response(expression, answer, num_checks))
        if len(tokens) <= mixture.max_response or num_checks == 0:
            return tokens
        num_checks -= 1


def _encode(tokenizer: PreTrainedTokenizerFast, response: str) -> list[int]:
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
