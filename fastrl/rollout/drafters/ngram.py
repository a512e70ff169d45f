"""Drafts without a model: what followed the same n-gram in texts that share a prompt.

An index holds the texts of one prompt: its responses of an earlier call, its other responses under
way, and the row's own. A row is looked up by the longest of its last 16, 8, 4, 2 or 1 tokens that
occurred before; the newest 32 of these occurrences vote for the token to come, and those that were
right go on voting for the next one, deeper in the tree. Once all of them have reached the end of
their text, the drafted path itself is looked up. Ties go to the row's own text, then to the most
recent occurrence; an index is filled oldest texts first, so that responses of an older policy come
last and fall out of the 32 first.

Pure and on the host. An emitted token costs five dictionary look-ups, whatever the texts' length; a
draft costs a few per node. Leaves out which texts there are (torch_engine/ngram_drafting.py).

Sources: prompt lookup decoding (Saxena, 2023) for the look-up; SuffixDecoding (Oliaro et al.,
NeurIPS 2025, arXiv 2411.04975) for trees ranked by counts over earlier responses. Chained hash
tables in place of its suffix tree, as in LZ77 compressors: constant time a token and little memory.
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence
from dataclasses import dataclass

ORDERS = (16, 8, 4, 2, 1)
"""Lengths of the n-grams that are looked up, longest first."""

MAX_OCCURRENCES = 32
"""Newest occurrences that vote."""

_TEXT_SHIFT = 32  # a place is (text << 32) + offset: one machine word in an array
_OFFSET_MASK = (1 << _TEXT_SHIFT) - 1


@dataclass(frozen=True, slots=True)
class TokenTree:
    """A draft tree of one row, as lists over its nodes; the root first, parents before children."""

    tokens: list[int]
    parents: list[int]
    depths: list[int]
    ranks: list[int]

    def __len__(self) -> int:
        return len(self.tokens)

    def add(self, token: int, parent: int, rank: int) -> int:
        """A new node; its number."""
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        self.ranks.append(rank)
        return len(self.tokens) - 1

    def path(self, node: int) -> tuple[int, ...]:
        """Tokens from below the root down to a node."""
        path: list[int] = []
        while node:
            path.append(self.tokens[node])
            node = self.parents[node]
        return tuple(reversed(path))

    def pad(self, num_nodes: int, *, depth: int, topk: int) -> None:
        """Fill up with arbitrary nodes, breadth first: at most `topk` children each, to `depth`.

        A chain (topk 1) stays one. A padding node may be accepted, if the target happens to sample
        its token: it is a draft like any other, only a blind one.
        """
        children: list[set[int]] = [set() for _ in self.tokens]
        for token, parent in zip(self.tokens[1:], self.parents[1:], strict=True):
            children[parent].add(token)
        parent = 0
        while len(self) < num_nodes:
            taken = children[parent]
            if len(taken) == topk or self.depths[parent] == depth:
                parent += 1
                continue
            token = next(token for token in range(topk) if token not in taken)
            self.add(token, parent, rank=len(taken))
            taken.add(token)
            children.append(set())


class SuffixIndex:
    """The texts that share a prompt, and where each of their n-grams is followed by what.

    Args:
        prompt: its tokens; text 0, before every other text.
    """

    def __init__(self, prompt: Sequence[int]) -> None:
        self._texts: list[list[int]] = [[]]
        self._num_prompt = len(prompt)
        # Occurrences are numbered as they come. A token's n-grams before it are one occurrence each
        # of ORDERS; `_newest` leads from an n-gram (by its hash: a collision costs a wrong draft at
        # worst) to its newest one, `_older` from there to the one before, or -1.
        self._places = array("q")
        self._newest: list[dict[int, int]] = [{} for _ in ORDERS]
        self._older = [array("i") for _ in ORDERS]
        self.extend(0, prompt)

    def add_text(self) -> int:
        """Start a response; its number."""
        self._texts.append(self._texts[0][: self._num_prompt])
        return len(self._texts) - 1

    def num_tokens(self, text: int) -> int:
        """Tokens of a response so far."""
        return len(self._texts[text]) - self._num_prompt

    def extend(self, text: int, tokens: Sequence[int]) -> None:
        """Append tokens to a text; they can be drafted from then on, by every text."""
        sequence = self._texts[text]
        tables = tuple(zip(ORDERS, self._newest, self._older, strict=True))
        for token in tokens:
            occurrence = len(self._places)
            offset = len(sequence)
            self._places.append((text << _TEXT_SHIFT) + offset)
            tail = tuple(sequence[-ORDERS[0] :])
            for order, newest, older in tables:
                if order > offset:
                    older.append(-1)
                    continue
                key = hash(tail[-order:])
                older.append(newest.get(key, -1))
                newest[key] = occurrence
            sequence.append(token)

    def draft(self, text: int, *, depth: int, topk: int, num_nodes: int) -> TokenTree:
        """The tree below a text's last token: `num_nodes` or fewer, the root alone if it is new.

        Grown best first by estimated probability, the share of its occurrences' votes that each
        token of a path got, multiplied along it.

        Args:
            text: not empty.
            depth: most levels below the root.
            topk: most children of a node.
            num_nodes: most nodes, the root included.
        """
        sequence = self._texts[text]
        tree = TokenTree([sequence[-1]], [0], [0], [0])
        frontier: list[tuple[float, int, int, int, int, list[int]]] = []
        num_pushed = 0

        def push_children(parent: int, score: float, places: list[int]) -> None:
            nonlocal num_pushed
            votes = self._votes(places) or self._votes(self._lookup(sequence, tree.path(parent)))
            total = sum(map(len, votes.values()))
            # Newest first already; the sort is stable.
            ranked = sorted(votes.items(), key=lambda vote: self._order_key(vote[1], text))
            for rank, (token, voters) in enumerate(ranked[:topk]):
                share = score * len(voters) / total
                # Of equal scores, the one pushed first: siblings by rank, shallow nodes first.
                heapq.heappush(frontier, (-share, num_pushed, parent, rank, token, voters))
                num_pushed += 1

        push_children(0, 1.0, [])
        while frontier and len(tree) < num_nodes:
            score, _, parent, rank, token, voters = heapq.heappop(frontier)
            node = tree.add(token, parent, rank)
            if tree.depths[node] < depth:
                push_children(node, -score, [place + 1 for place in voters])
        return tree

    def _lookup(self, sequence: list[int], path: tuple[int, ...]) -> list[int]:
        """Places right after the longest n-gram that ends a text and a drafted path, newest
        first."""
        tail = (*sequence[-ORDERS[0] :], *path)
        for order, newest, older in zip(ORDERS, self._newest, self._older, strict=True):
            if order > len(tail):
                continue
            occurrence = newest.get(hash(tail[-order:]), -1)
            if occurrence >= 0:
                places: list[int] = []
                while occurrence >= 0 and len(places) < MAX_OCCURRENCES:
                    places.append(self._places[occurrence])
                    occurrence = older[occurrence]
                return places
        return []

    def _votes(self, places: list[int]) -> dict[int, list[int]]:
        """Places by the token that stands there; those at the end of their text abstain."""
        votes: dict[int, list[int]] = {}
        texts = self._texts
        for place in places:
            sequence, offset = texts[place >> _TEXT_SHIFT], place & _OFFSET_MASK
            if offset < len(sequence):
                votes.setdefault(sequence[offset], []).append(place)
        return votes

    @staticmethod
    def _order_key(voters: list[int], text: int) -> tuple[int, bool]:
        """Most votes first, then those of the text's own."""
        return -len(voters), all(place >> _TEXT_SHIFT != text for place in voters)
