"""The live rows of the engine's batch: one row a rollout under way, the first rows of every tensor.

Device state (tokens, lengths, randomness, hidden states) and host state (`Request`) side by side,
moved together when a row ends. A row of `length` cached tokens holds `length + 1` tokens: the last
sampled one has no cache entry yet. Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastrl.rollout.sampling import position_uniforms
from fastrl.types import Prompt


@dataclass(kw_only=True, slots=True)
class Request:
    """One rollout to generate, and what has been generated of it."""

    prompt: Prompt
    sample_index: int
    place: int
    """Where its rollout goes in the result."""
    key: int
    """Of its random stream."""
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    accept_lengths: list[int] = field(default_factory=list)
    num_verify_steps: int = 0

    @property
    def cached_length(self) -> int:
        """Tokens with a cache entry: all but the last sampled."""
        return len(self.prompt.tokens) + len(self.tokens) - 1


class LiveRows:
    """State of up to `num_rows` rollouts; the live ones are rows 0 … len(requests) - 1.

    Args:
        num_rows: most live rollouts.
        hidden_size: of the hidden states kept; 0 keeps none.
        dtype: of the hidden states.
        device: of all tensors.
    """

    def __init__(
        self, num_rows: int, hidden_size: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.num_rows = num_rows
        self.keeps_hidden = hidden_size > 0
        self.requests: list[Request] = []
        self.lengths_B = torch.zeros(num_rows, dtype=torch.int64, device=device)
        self.prompt_lengths_B = torch.zeros_like(self.lengths_B)
        self.keys_B = torch.zeros_like(self.lengths_B)
        self.tokens_BS = torch.zeros(num_rows, 0, dtype=torch.int64, device=device)
        self.uniforms_BS = torch.zeros(num_rows, 0, dtype=torch.float64, device=device)
        """Randomness of the token in the same column."""
        self.hidden_BSD = torch.zeros(num_rows, 0, hidden_size, dtype=dtype, device=device)
        self.row_numbers_B = torch.arange(num_rows, device=device)

    def __len__(self) -> int:
        return len(self.requests)

    @property
    def longest(self) -> int:
        """Most cached tokens of a live row."""
        return max(request.cached_length for request in self.requests)

    def reserve(self, num_columns: int) -> None:
        """Make room for rows of `num_columns` tokens."""
        missing = num_columns - self.tokens_BS.shape[1]
        if missing <= 0:
            return
        missing = max(missing, self.tokens_BS.shape[1] // 2, 64)
        self.tokens_BS = torch.nn.functional.pad(self.tokens_BS, (0, missing))
        self.uniforms_BS = self._uniforms(self.keys_B, self.prompt_lengths_B)
        if self.keeps_hidden:
            self.hidden_BSD = torch.nn.functional.pad(self.hidden_BSD, (0, 0, 0, missing))

    def _uniforms(self, keys_B: Tensor, prompt_lengths_B: Tensor) -> Tensor:
        """[B, S] of rows with these keys; meaningless in the columns of prompts."""
        columns_S = torch.arange(self.tokens_BS.shape[1], device=keys_B.device)
        return position_uniforms(keys_B.unsqueeze(1), columns_S - prompt_lengths_B.unsqueeze(1))

    def last_tokens(self) -> Tensor:
        """[B] the last sampled token of each live row."""
        count = len(self)
        return self.tokens_BS[self.row_numbers_B[:count], self.lengths_B[:count]]

    def admit(self, request: Request, prompt_hidden_TD: Tensor, first_token: Tensor) -> int:
        """Add a row whose prompt is cached and whose first token is sampled; its number."""
        row, prompt_length = len(self), len(request.prompt.tokens)
        self.requests.append(request)
        self.tokens_BS[row, :prompt_length] = torch.tensor(request.prompt.tokens)
        self.tokens_BS[row, prompt_length] = first_token
        self.lengths_B[row] = prompt_length
        self.prompt_lengths_B[row] = prompt_length
        self.keys_B[row] = request.key
        this_row = slice(row, row + 1)
        self.uniforms_BS[row] = self._uniforms(
            self.keys_B[this_row], self.prompt_lengths_B[this_row]
        )[0]
        if self.keeps_hidden:
            self.hidden_BSD[row, :prompt_length] = prompt_hidden_TD
        return row

    def append(self, emitted_BP: Tensor, num_emitted_B: Tensor, path_hidden_BPD: Tensor) -> None:
        """Add the emitted tokens of a step, and the hidden states of the nodes they follow.

        Entries past `num_emitted_B` are written too, and overwritten by the next step.
        """
        count, num_places = emitted_BP.shape
        steps_P = torch.arange(num_places, device=emitted_BP.device)
        columns_BP = self.lengths_B[:count, None] + steps_P
        rows_B1 = self.row_numbers_B[:count, None]
        self.tokens_BS[rows_B1, columns_BP + 1] = emitted_BP
        if self.keeps_hidden:
            self.hidden_BSD[rows_B1, columns_BP] = path_hidden_BPD
        self.lengths_B[:count] += num_emitted_B

    def move(self, source: int, target: int) -> None:
        """Overwrite a row that ended with the last live one."""
        for tensor in (
            self.lengths_B,
            self.prompt_lengths_B,
            self.keys_B,
            self.tokens_BS,
            self.uniforms_BS,
        ):
            tensor[target] = tensor[source]
        if self.keeps_hidden:
            self.hidden_BSD[target] = self.hidden_BSD[source]
        self.requests[target] = self.requests[source]
