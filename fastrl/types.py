"""Records that cross folders: what goes into an engine, what comes out, what a policy trains on.

Leaves out behaviour: a record validates itself at construction and knows its own shapes, nothing
else.

Shape legend, used all over the project as suffixes of tensor names:
    B  rows (rollouts, or live requests of an engine)     T  token positions of a padded row
    N  nodes of a draft tree (the root included)          S  cache positions (keys) a query may see
    K  children or beam entries a draft step keeps        L  layers
    V  vocabulary                                         D  hidden size (of a head: d)
    H  attention heads
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Literal, Protocol

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


# No slots: jsonargparse reads the fields of a default value from its __dict__.
@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How a token is drawn from the policy's logits, and when a response ends."""

    temperature: float = 1.0
    """Divides the logits; 0 is greedy decoding."""
    top_k: int = 0
    """Keep only the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this; 1 keeps all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one; 0 drops none."""
    max_tokens: int = 256
    """Longest response, in tokens; a longer one is cut and ends with finish reason `length`."""
    stop: tuple[str, ...] = ()
    """Strings that end a response; the token that completes one is kept."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end a response besides the model's end-of-sequence tokens; kept."""
    ignore_eos: bool = False
    """Go on after end-of-sequence tokens (and stop tokens), up to max_tokens; for benchmarks."""

    def __post_init__(self) -> None:
        checks = (
            (
                0 <= self.temperature < math.inf,
                "temperature must be >= 0 (0 is greedy) and finite",
                self.temperature,
            ),
            ("" not in self.stop, "stop must not hold an empty string", self.stop),
            (self.top_k >= 0, "top_k must be >= 0 (0 keeps all tokens)", self.top_k),
            (0 < self.top_p <= 1, "top_p must be in (0, 1] (1 keeps all tokens)", self.top_p),
            (0 <= self.min_p < 1, "min_p must be in [0, 1) (0 drops no token)", self.min_p),
            (self.max_tokens >= 1, "max_tokens must be >= 1", self.max_tokens),
        )
        for is_valid, expectation, given in checks:
            if not is_valid:
                raise ValueError(f"sampling: {expectation}, got {given}")


_STRATEGY_SYNTAX = re.compile(r"(ngram_)?(\d+)_(\d+)_(\d+)")


@dataclass(frozen=True, slots=True, order=True)
class DraftStrategy:
    """Shape of a draft tree, written `depth_topk_verifytokens` (`8_4_48`), or `off`.

    With `ngram_` before it (`ngram_8_1_9`), the tree comes from tokens seen before rather than from
    the learned drafter (rollout/drafters/ngram.py).

    `depth` draft steps, each expanding the `topk` best nodes into their `topk` best children; of
    all nodes drafted, the `verify_tokens - 1` most likely and the root are verified in one target
    forward (EAGLE-2, arXiv 2406.16858; the counterparts of SGLang's num-steps, eagle-topk,
    num-draft-tokens).
    """

    depth: int
    """Draft steps a decode step; 0 is plain decoding."""
    topk: int
    """Children a node is expanded into, and nodes expanded a level."""
    verify_tokens: int
    """Nodes the target verifies in one forward, the root (the last sampled token) included."""
    drafter: Literal["learned", "ngram"] = "learned"
    """Who drafts."""

    def __post_init__(self) -> None:
        if self.depth == 0:
            if (self.topk, self.verify_tokens) != (0, 1):
                raise ValueError(f"depth 0 is plain decoding, written 'off', got {self._numbers()}")
            return
        if self.depth < 0 or self.topk < 1:
            raise ValueError(f"strategy depth and topk must be >= 1, got {self._numbers()}")
        if self.verify_tokens <= self.depth:
            raise ValueError(
                f"strategy verify_tokens must be > depth, so that root and a full-depth chain fit: "
                f"got {self._numbers()}; use at least {self.depth}_{self.topk}_{self.depth + 1}"
            )
        if self.verify_tokens > self.max_nodes:
            raise ValueError(
                f"strategy {self._numbers()}: a tree of depth {self.depth} and topk {self.topk} "
                f"has at most {self.max_nodes} nodes, root included; lower verify_tokens to that"
            )

    @property
    def max_nodes(self) -> int:
        """Most nodes of such a tree: root, topk at depth 1, topk * topk at each further depth."""
        return 1 + self.topk + max(self.depth - 1, 0) * self.topk * self.topk

    @property
    def is_off(self) -> bool:
        """Whether this is plain decoding."""
        return self.depth == 0

    @property
    def needs_learned_drafter(self) -> bool:
        """Whether a trained drafter drafts it: neither plain decoding nor n-grams."""
        return self.depth > 0 and self.drafter == "learned"

    @classmethod
    def parse(cls, text: str) -> DraftStrategy:
        """Read `8_4_48`, `ngram_8_1_9` or `off`; ValueError names the text and the syntax."""
        if text == "off":
            return OFF
        if not (match := _STRATEGY_SYNTAX.fullmatch(text)):
            raise ValueError(
                f"malformed strategy {text!r}: write depth_topk_verifytokens, as in '8_4_48', "
                f"the same after 'ngram_', or 'off'"
            )
        depth, topk, verify_tokens = map(int, match.groups()[1:])
        if depth == 0:
            raise ValueError(f"malformed strategy {text!r}: plain decoding is written 'off'")
        return cls(depth, topk, verify_tokens, "ngram" if match[1] else "learned")

    def _numbers(self) -> str:
        prefix = "ngram_" if self.drafter == "ngram" else ""
        return f"{prefix}{self.depth}_{self.topk}_{self.verify_tokens}"

    def __str__(self) -> str:
        return "off" if self.is_off else self._numbers()


OFF = DraftStrategy(0, 0, 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """One question, tokenized with the chat template, and what its reward needs."""

    prompt_id: int
    """Identity within the data set; seeds the randomness of its rollouts."""
    tokens: tuple[int, ...]
    """Token ids, ending where the response begins."""
    text: str
    """The question as the user wrote it (before the chat template)."""
    answer: str
    """Reference answer."""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    """Whatever else the reward function wants (picklable: rewards run in worker processes)."""


class FinishReason(StrEnum):
    """Why a response ended."""

    STOP = "stop"
    """An end-of-sequence token, a stop token or a stop string."""
    LENGTH = "length"
    """max_tokens, or the model's context, was reached."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Rollout:
    """One sampled response, with everything training and the laws need to know of its origin."""

    prompt: Prompt
    sample_index: int
    """Which of the prompt's samples this is, from 0."""
    tokens: tuple[int, ...]
    """Response tokens, the one that ended it included."""
    logprobs: tuple[float, ...]
    """Log-probability of each token under the distribution that sampled it (filters included)."""
    text: str
    """The response decoded, special tokens left out."""
    finish_reason: FinishReason
    policy_version: int
    """Version of the policy that sampled every token of it."""
    accept_lengths: tuple[int, ...] = ()
    """Tokens emitted by each decode step this rollout took part in; 1 each with speculation off."""
    num_verify_steps: int = 0
    """Decode steps with a draft tree among them."""
    hidden_states: Tensor | None = None
    """Target hidden states (after the final norm), [prompt + response - 1, D], where asked for:
    row t is of token t. Decoding never computes the last token's."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepStats:
    """What one decode step of an engine did: what a strategy selector learns from."""

    strategy: DraftStrategy
    batch_size: int
    """Live rows in the step."""
    context_tokens: int
    """Longest context among them, in tokens."""
    accept_lengths: tuple[int, ...]
    """Tokens emitted, by row; their sum is the step's output."""
    seconds: float
    """Wall time of drafting, verification and bookkeeping; prefills left out. Ends when the step's
    tokens are on the host: nothing is synchronized for it."""
    offered_by_rank: tuple[tuple[int, ...], ...] = ()
    """[depth][rank]: rows that accepted `depth` draft tokens and whose node there had a child of
    that rank in the tree (a node's children rank from 0, the most likely first)."""
    accepted_by_rank: tuple[tuple[int, ...], ...] = ()
    """[depth][rank]: rows among them that accepted this very child; at most one rank a row."""
    places: tuple[int, ...] = ()
    """By row, the tokens its response had before the step; empty, as are the next two, where the
    engine does not tell rows apart."""
    ranks_by_row: tuple[tuple[int, ...], ...] = ()
    """[row][depth]: rank of the child accepted there."""
    num_children_by_row: tuple[tuple[int, ...], ...] = ()
    """[row][depth]: children of the node at which `depth` draft tokens are accepted, as far as the
    row got and the strategy drafts."""
    referenced_rows: int = 0
    """Rows whose prompt has a whole response that n-grams can look things up in: a finished one of
    the same group, or one from when it was asked before."""

    @property
    def num_tokens(self) -> int:
        """Tokens emitted by the whole batch."""
        return sum(self.accept_lengths)


@dataclass(frozen=True, kw_only=True, slots=True)
class Span:
    """A stretch of a process's time, and what it was spent on."""

    name: str
    start_s: float
    """On `time.perf_counter`, which all processes of a machine share on Linux."""
    seconds: float

    @property
    def end_s(self) -> float:
        """On the same clock."""
        return self.start_s + self.seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineStats:
    """What one `generate` call did."""

    num_rollouts: int = 0
    num_tokens: int = 0
    """Response tokens."""
    num_prompt_tokens: int = 0
    """Prompt tokens prefilled (a group's shared prompt once)."""
    num_steps: int = 0
    """Decode steps (target forwards, prefills not counted)."""
    seconds: float = 0.0
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    """Host time inside drafting; on a GPU, launches only."""
    steps_by_strategy: Mapping[str, int] = field(default_factory=dict)
    row_steps: int = 0
    """Rows summed over decode steps with speculation on."""
    accepted_tokens: int = 0
    """Tokens emitted by those rows, the bonus token of each included."""
    offered_by_depth: tuple[int, ...] = ()
    """Rows and steps whose strategy has the learned drafter draft to depth d + 1 and whose tokens
    were accepted up to d (whether or not the pruned tree had a node below the accepted one)."""
    accepted_by_depth: tuple[int, ...] = ()
    """Those among them that accepted a draft token at depth d + 1."""
    ngram_offered_by_depth: tuple[int, ...] = ()
    """As offered_by_depth, of n-gram strategies (whether or not they found anything to draft)."""
    ngram_accepted_by_depth: tuple[int, ...] = ()
    """As accepted_by_depth, of n-gram strategies."""
    drafter_failures: tuple[str, ...] = ()
    """Learned drafters found bad during the call, or since the one before: which, and why."""
    spans: tuple[Span, ...] = ()
    """What followed what: `prefill`, or the strategy of a run of decode steps (`off`, `4_2_8`). By
    the host, which runs ahead of a GPU by up to a step; none from an SGLang that is not switched
    between strategies."""

    @property
    def accept_length(self) -> float:
        """Mean tokens emitted per row and speculative step, bonus token included; 1 with none."""
        return self.accepted_tokens / self.row_steps if self.row_steps else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Response tokens over wall seconds, prefill included."""
        return self.num_tokens / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RewardResult:
    """One scored response."""

    score: float
    failure: str | None = None
    """Why the reward function gave no score (`timeout`, `raised ValueError: …`, …), else None."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RolloutBatch:
    """What one RL step trains on: rollouts right-padded to a common length, scored."""

    tokens_BT: Tensor  # int64: prompt, response, padding
    attention_mask_BT: Tensor  # bool: prompt and response
    response_mask_BT: Tensor  # bool: tokens the policy sampled
    rollout_logprobs_BT: (
        Tensor  # float32: of the token at the same position, 0 outside the response
    )
    rewards_B: Tensor  # float32
    group_B: Tensor  # int64: rows of one prompt share a number, 0 … num_prompts - 1, in order
    is_truncated_B: Tensor  # bool: ended by length
    policy_version_B: Tensor  # int64: that sampled the row
    sampling: SamplingParams
    rl_step: int
    rollouts: tuple[Rollout, ...] = ()
    reward_results: tuple[RewardResult, ...] = ()
    stats: EngineStats = field(default_factory=EngineStats)
    timings: Mapping[str, float] = field(default_factory=dict)
    """Seconds by phase that the datamodule spent on this batch: `publish`, `rollout`, `reward`;
    in training `idle`, the wait for other ranks."""
    spans: tuple[Span, ...] = ()
    """The same phases but `idle`, and `health` if weights were checked, in order."""

    def to(self, device: torch.device | str) -> RolloutBatch:
        """The same batch with its tensors on `device`."""
        moved: dict[str, Any] = {
            f.name: value.to(device)
            for f in dataclasses.fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def __len__(self) -> int:
        return self.tokens_BT.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """A prompt and the response to it, of which a target's hidden states are wanted."""

    tokens_T: Tensor  # int64: prompt and response
    num_prompt_tokens: int

    def __len__(self) -> int:
        return self.tokens_T.shape[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceFeatures:
    """One sequence as a drafter trains on it: tokens and the target's hidden states, aligned."""

    tokens_T: Tensor  # int64: prompt and response
    hidden_TD: Tensor
    """After the target's final norm; then, side by side, the inputs of the layers that the drafter
    reads, if any. Row t was computed from tokens 0 … t."""
    num_prompt_tokens: int
    rl_step: int
    """RL step whose policy computed the hidden states."""

    def __len__(self) -> int:
        return self.tokens_T.shape[0]


class PolicySource(Protocol):
    """What datamodule and callbacks ask of the policy module, so that they need not import it."""

    policy: PreTrainedModel
    """The Hugging Face model under training."""
    rl_step: int
    """RL steps finished."""
    policy_version: int
    """Grows by one with every RL step that changed the weights."""
    is_updating: bool
    """Whether an update is under way, between whose ends the policy is of no version."""
    collect_features: bool
    """Set by whoever wants `take_features`: keep hidden states of the training forward."""
    feature_layers: tuple[int, ...]
    """Set likewise: layers whose inputs the features have besides."""

    def policy_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Named weights in Hugging Face names: the live parameters, not copies; DTensors where the
        policy is sharded."""
        ...

    def take_features(self) -> list[SequenceFeatures]:
        """Features of the last batch's sequences, detached and unpadded; empties the store."""
        ...

    def take_spans(self) -> tuple[Span, ...]:
        """Its updates since the last call."""
        ...
