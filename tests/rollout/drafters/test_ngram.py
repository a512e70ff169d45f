"""N-gram drafts against a search over all texts without an index; hand-worked cases; padding."""

import random
from collections import Counter
from fractions import Fraction

import pytest

from fastrl.rollout.drafters.ngram import MAX_OCCURRENCES, ORDERS, SuffixIndex, TokenTree


class NaiveTexts:
    """Texts as lists, and the order in which their tokens came."""

    def __init__(self, prompt):
        self.texts = [list(prompt)]
        self.num_prompt = len(prompt)
        self.arrivals = [(0, offset) for offset in range(len(prompt))]

    def add_text(self):
        self.texts.append(self.texts[0][:])
        return len(self.texts) - 1

    def extend(self, text, tokens):
        for token in tokens:
            self.arrivals.append((text, len(self.texts[text])))
            self.texts[text].append(token)

    def occurrences(self, context):
        """Places after the context's longest n-gram that has any, newest first."""
        for order in ORDERS:
            found = [
                (text, offset)
                for text, offset in reversed(self.arrivals)
                if len(context) >= order <= offset
                and self.texts[text][offset - order : offset] == context[-order:]
            ]
            if found:
                return found[:MAX_OCCURRENCES]
        return []

    def children(self, text, path, places):
        """[(token, share of votes, places)], the best first."""
        going_on = [(t, o) for t, o in places if o < len(self.texts[t])]
        if not going_on:
            going_on = self.occurrences(self.texts[text] + list(path))
        tokens = [self.texts[t][o] for t, o in going_on]
        counts = Counter(tokens)
        own = {token for token, (t, _) in zip(tokens, going_on, strict=True) if t == text}
        ranked = sorted(counts, key=lambda token: (-counts[token], token not in own,
                                                   tokens.index(token)))  # fmt: skip
        return [
            (
                token,
                Fraction(counts[token], len(tokens)),
                [place for place, at in zip(going_on, tokens, strict=True) if at == token],
            )
            for token in ranked
        ]

    def all_nodes(self, text, depth, topk):
        """Score and rank of every path of at most `depth` tokens."""
        nodes = {}

        def grow(path, score, places):
            if len(path) == depth:
                return
            children = self.children(text, path, [(t, o + 1) for t, o in places])
            for rank, (token, share, voters) in enumerate(children[:topk]):
                nodes[(*path, token)] = (score * share, rank)
                grow((*path, token), score * share, voters)

        grow((), Fraction(1), [])
        return nodes


def grown(rng, vocab_size, num_tokens):
    """The same texts, indexed and naive: a prompt, responses that grow in turns and repeat much."""
    prompt = [rng.randrange(vocab_size) for _ in range(rng.randrange(1, 6))]
    index, naive = SuffixIndex(prompt), NaiveTexts(prompt)
    phrases = [[rng.randrange(vocab_size) for _ in range(rng.randrange(1, 25))] for _ in range(4)]
    for _ in range(4):
        assert index.add_text() == naive.add_text()
    while sum(map(len, naive.texts)) < num_tokens:
        text = rng.randrange(1, 5)
        tokens = rng.choice([*phrases, [rng.randrange(vocab_size)]])
        index.extend(text, tokens)
        naive.extend(text, tokens)
    return index, naive


def check_structure(tree, *, depth, topk):
    children = Counter()
    seen = set()
    assert (tree.parents[0], tree.depths[0], tree.ranks[0]) == (0, 0, 0)
    for node in range(1, len(tree)):
        parent = tree.parents[node]
        assert parent < node
        assert tree.depths[node] == tree.depths[parent] + 1 <= depth
        assert tree.ranks[node] == children[parent] < topk  # siblings in order of rank
        assert (parent, tree.tokens[node]) not in seen  # and of different tokens
        children[parent] += 1
        seen.add((parent, tree.tokens[node]))


@pytest.mark.parametrize("vocab_size", [2, 5, 40])
@pytest.mark.parametrize("seed", range(12))
def test_chains_are_those_of_a_search_without_index(seed, vocab_size):
    index, naive = grown(random.Random(seed), vocab_size, num_tokens=250)
    for text in range(5):
        tree = index.draft(text, depth=9, topk=1, num_nodes=10)
        path, places = (), []
        for _ in range(9):
            options = naive.children(text, path, [(t, o + 1) for t, o in places])
            if not options:
                break
            token, _, places = options[0]
            path = (*path, token)
        assert tree.path(len(tree) - 1) == path
        assert tree.tokens[0] == naive.texts[text][-1]


@pytest.mark.parametrize("vocab_size", [3, 12, 40])
@pytest.mark.parametrize("seed", range(12))
def test_trees_hold_the_most_likely_of_all_paths(seed, vocab_size):
    rng = random.Random(seed)
    index, naive = grown(rng, vocab_size, num_tokens=250)
    for text in range(5):
        depth, topk, num_nodes = rng.choice([(4, 3, 12), (3, 2, 7), (5, 2, 30), (1, 4, 5)])
        tree = index.draft(text, depth=depth, topk=topk, num_nodes=num_nodes)
        check_structure(tree, depth=depth, topk=topk)
        everything = naive.all_nodes(text, depth, topk)
        paths = [tree.path(node) for node in range(1, len(tree))]
        assert [everything[path][1] for path in paths] == tree.ranks[1:]
        best = sorted((score for score, _ in everything.values()), reverse=True)
        assert (
            sorted((everything[path][0] for path in paths), reverse=True) == (best[: num_nodes - 1])
        )


def index_of(prompt, *responses):
    index = SuffixIndex(prompt)
    for response in responses:
        index.extend(index.add_text(), response)
    return index


def chain_after(index, text, depth=4):
    tree = index.draft(text, depth=depth, topk=1, num_nodes=depth + 1)
    return list(tree.path(len(tree) - 1))


def test_a_text_unlike_all_before_it_drafts_nothing():
    index = index_of([1, 2, 3], [4, 5], [6, 7, 8])
    assert len(index.draft(2, depth=4, topk=2, num_nodes=8)) == 1
    assert len(SuffixIndex([5]).draft(0, depth=4, topk=1, num_nodes=5)) == 1


def test_a_longer_match_beats_more_frequent_shorter_ones():
    index = index_of([1, 2], [3, 9, 4, 3, 9, 4, 3, 9, 4, 8, 5, 9, 7], [8, 5, 9])
    assert chain_after(index, 2, depth=1) == [7]


def test_the_most_frequent_continuation_wins_then_the_own_then_the_newest():
    most_frequent = index_of([1], [5, 6], [5, 6], [5, 7], [5])
    assert chain_after(most_frequent, 4, depth=1) == [6]
    newest = index_of([1], [5, 6], [5, 7], [5])
    assert chain_after(newest, 3, depth=1) == [7]
    own = index_of([1], [8, 5, 6, 9, 5], [4, 5, 7])
    assert chain_after(own, 1, depth=1) == [6]


def test_the_prompt_is_drafted_from_and_belongs_to_every_response():
    index = index_of([4, 5, 6, 7], [1, 5])
    assert chain_after(index, 1) == [6, 7, 1, 5]  # past the prompt's end by looking up again
    assert chain_after(index, index.add_text()) == [1, 5, 6, 7]


def test_a_loop_is_drafted_around_though_its_last_turn_ends_at_once():
    assert chain_after(index_of([1], [3, 3]), 1, depth=6) == [3] * 6
    assert chain_after(index_of([1], [3, 4, 3, 4, 3]), 1, depth=5) == [4, 3, 4, 3, 4]


def test_only_the_newest_occurrences_vote():
    old, new = [[5, 6]] * 40, [[5, 7]] * 17
    assert chain_after(index_of([1], *old, [5]), 41, depth=1) == [6]
    assert chain_after(index_of([1], *old, *new, [5]), 58, depth=1) == [7]


def test_tokens_are_drafted_from_as_soon_as_they_come():
    index = SuffixIndex([1, 2])
    first, second = index.add_text(), index.add_text()
    index.extend(first, [7, 8])
    index.extend(second, [7])
    assert chain_after(index, second) == [8]
    index.extend(first, [9])
    assert chain_after(index, second) == [8, 9]
    assert (index.num_tokens(first), index.num_tokens(second)) == (3, 1)


@pytest.mark.parametrize(
    ("depth", "topk", "num_nodes"), [(4, 1, 5), (3, 2, 11), (3, 3, 22), (1, 4, 5), (6, 2, 20)]
)
@pytest.mark.parametrize("seed", range(5))
def test_padding_keeps_the_draft_and_the_rules_of_a_tree(seed, depth, topk, num_nodes):
    index, _ = grown(random.Random(seed), 6, num_tokens=80)
    for text in range(5):
        for num_drafted in (1, 2, num_nodes // 2 + 1):
            tree = index.draft(text, depth=depth, topk=topk, num_nodes=num_drafted)
            drafted = (tree.tokens[:], tree.parents[:], tree.ranks[:])
            size = len(tree)
            tree.pad(num_nodes, depth=depth, topk=topk)
            assert len(tree) == num_nodes
            check_structure(tree, depth=depth, topk=topk)
            assert (tree.tokens[:size], tree.parents[:size], tree.ranks[:size]) == drafted
            assert max(tree.tokens[size:], default=0) < max(topk, 2)


def test_a_padded_chain_is_a_chain():
    tree = TokenTree([9, 4], [0, 0], [0, 1], [0, 0])
    tree.pad(5, depth=4, topk=1)
    assert tree.parents == [0, 0, 1, 2, 3]
    assert tree.depths == [0, 1, 2, 3, 4]
