"""Draft trees from n-grams, for the live rows of one `generate` call.

Lists of host tokens go in, one transfer to the device comes out. An index is built when the first
n-gram strategy asks for a draft of a prompt's rows, and catches up whenever one is asked again:
while none is, nothing is spent. State goes by request, so rows may move without being watched.

Leaves out the index itself (drafters/ngram.py). Shape legend: fastrl/types.py.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from fastrl.rollout.drafters.ngram import SuffixIndex, TokenTree
from fastrl.rollout.drafters.response_store import ResponseStore
from fastrl.rollout.torch_engine.rows import LiveRows, Request
from fastrl.rollout.tree import DraftTree, ancestors, chain, root_only
from fastrl.types import DraftStrategy, Prompt


@dataclass(kw_only=True, slots=True)
class _Group:
    """A prompt's requests, finished ones included, and the index over their texts."""

    prompt: Prompt
    requests: list[Request] = field(default_factory=list)
    index: SuffixIndex | None = None
    texts: dict[int, int] = field(default_factory=dict)  # in the index, by the request's place
    has_whole_response: bool = False

    def catch_up(self, store: ResponseStore) -> SuffixIndex:
        """Index every token sampled since the last time; the store's responses first."""
        index = self.index
        if index is None:
            index = self.index = SuffixIndex(self.prompt.tokens)
            for response in store.responses(self.prompt.prompt_id):
                index.extend(index.add_text(), response)
        for request in self.requests:
            if request.place not in self.texts:
                self.texts[request.place] = index.add_text()
            text = self.texts[request.place]
            num_known = index.num_tokens(text)
            if num_known < len(request.tokens):
                index.extend(text, request.tokens[num_known:])
        return index

    def forget_index(self) -> None:
        """Give its memory back; it can be built again."""
        self.index = None
        self.texts.clear()


class NgramDrafting:
    """Drafts from the texts of each row's group; lives as long as one `generate` call.

    Args:
        store: responses that prompts got before.
        has_full_trees: Fill every tree up to the strategy's shape, whether or not there is anything
            to draft: what a step costs at most, for profiling.
    """

    def __init__(self, store: ResponseStore, *, has_full_trees: bool = False) -> None:
        self._store = store
        self._has_full_trees = has_full_trees
        self._groups: dict[int, _Group] = {}  # by the identity of the prompt, which they hold

    def admit(self, request: Request) -> None:
        """A request starts; its tokens are read from it as they come."""
        prompt = request.prompt
        if (group := self._groups.get(id(prompt))) is None:
            group = self._groups[id(prompt)] = _Group(prompt=prompt)
            group.has_whole_response = bool(self._store.responses(prompt.prompt_id))
        group.requests.append(request)

    def finish(self, request: Request) -> None:
        """A request ended: its response is whole."""
        self._groups[id(request.prompt)].has_whole_response = True

    def num_referenced(self, rows: LiveRows) -> int:
        """Live rows whose prompt has a whole response; see `StepStats.referenced_rows`."""
        groups = self._groups
        return sum(groups[id(request.prompt)].has_whole_response for request in rows.requests)

    def draft(self, rows: LiveRows, strategy: DraftStrategy) -> DraftTree:
        """A tree for each live row: as large as the largest, the others filled up; the root alone
        if no row has anything to draft."""
        live = {id(request.prompt) for request in rows.requests}
        for key, group in self._groups.items():
            if key in live:
                group.catch_up(self._store)
            elif group.index is not None:
                group.forget_index()
        trees = [self._draft_row(request, strategy) for request in rows.requests]
        num_nodes, depth = max(map(len, trees)), max(max(tree.depths) for tree in trees)
        if self._has_full_trees:
            num_nodes, depth = strategy.verify_tokens, strategy.depth
        if num_nodes == 1:
            return root_only(rows.last_tokens())
        for tree in trees:
            tree.pad(num_nodes, depth=depth, topk=strategy.topk)
        return _stack(trees, depth, strategy.topk, rows.tokens_BS.device)

    def _draft_row(self, request: Request, strategy: DraftStrategy) -> TokenTree:
        group = self._groups[id(request.prompt)]
        assert group.index is not None, "draft catches up every live group first"
        return group.index.draft(
            group.texts[request.place],
            depth=strategy.depth,
            topk=strategy.topk,
            num_nodes=strategy.verify_tokens,
        )


def _stack(trees: list[TokenTree], depth: int, topk: int, device: torch.device) -> DraftTree:
    """Equally large trees as tensors; one transfer."""
    if topk == 1:
        return chain(torch.tensor([tree.tokens for tree in trees]).to(device))
    lists = [[tree.tokens, tree.parents, tree.depths, tree.ranks] for tree in trees]
    tokens_BN, parents_BN, depths_BN, ranks_BN = torch.tensor(lists).to(device).unbind(1)
    return DraftTree(
        tokens_BN=tokens_BN,
        parents_BN=parents_BN,
        depths_BN=depths_BN,
        ranks_BN=ranks_BN,
        ancestors_BNN=ancestors(parents_BN, depth),
        depth=depth,
    )
