"""Which nodes of a draft tree are accepted, greedily or by sampling from the target."""

import torch


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Descend as long as a child is the target's best token, and emit that token at the end."""
    best = target_predict.flatten().tolist()
    for request, tree in enumerate(
        _trees(candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    ):
        node = 0
        path = [0]
        while len(path) < accept_index.shape[1]:
            wanted = best[tree.place(node)]
            child = next((one for one in tree.children(node) if tree.tokens[one] == wanted), None)
            if child is None:
                break
            path.append(child)
            node = child
        _write_path(predicts, accept_index, accept_token_num, request, tree, path)
        predicts[tree.place(node)] = best[tree.place(node)]


def tree_speculative_sampling_target_only(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    uniform_samples,
    uniform_samples_for_final_sampling,
    target_probs,
    draft_probs,
    threshold_single=1.0,
    threshold_acc=1.0,
    deterministic=True,
):
    """Sample a child by the target's probabilities, descend; where none is hit, sample among the
    other tokens and stop.

    One uniform decides among a node's children by inverse CDF, so a child is accepted with the
    target's own probability; SGLang's thresholds, which change the distribution, are refused.
    """
    if threshold_single != 1 or threshold_acc != 1:
        raise NotImplementedError("tests/sglang_cpu verifies without acceptance thresholds")
    num_nodes = candidates.shape[1]
    uniforms = uniform_samples.view(-1, num_nodes).tolist()
    final_uniforms = uniform_samples_for_final_sampling.flatten().tolist()
    for request, tree in enumerate(
        _trees(candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    ):
        node = 0
        path = [0]
        left_V = target_probs[request, 0].double().clone()
        while len(path) < accept_index.shape[1]:
            mass = 0.0
            for child in tree.children(node):
                mass += float(target_probs[request, node, tree.tokens[child]])
                if uniforms[request][node] < mass:
                    break
                left_V[tree.tokens[child]] = 0
            else:
                break
            path.append(child)
            node = child
            left_V = target_probs[request, node].double().clone()
        _write_path(predicts, accept_index, accept_token_num, request, tree, path)
        cumulative_V = left_V.cumsum(0)
        threshold = final_uniforms[request] * cumulative_V[-1]
        predicts[tree.place(node)] = int(torch.searchsorted(cumulative_V, threshold, right=True))


def top_k_renorm_prob(probs_BV, top_k):
    """Only the k most likely tokens, renormalized."""
    ordered, order = probs_BV.sort(-1, descending=True)
    rank = torch.arange(probs_BV.shape[-1])
    return _renormalized(ordered.masked_fill(rank >= _a_row_each(top_k), 0), order)


def top_p_renorm_prob(probs_BV, top_p):
    """Only the most likely tokens that together reach p, renormalized."""
    ordered, order = probs_BV.sort(-1, descending=True)
    mass_before = ordered.cumsum(-1) - ordered
    return _renormalized(ordered.masked_fill(mass_before >= _a_row_each(top_p), 0), order)


class _Tree:
    """One request's nodes; `place` is a node's row among all requests' nodes."""

    def __init__(self, tokens, places, first_child, next_sibling):
        self.tokens = tokens
        self._places, self._first_child, self._next_sibling = places, first_child, next_sibling

    def place(self, node):
        return self._places[node]

    def children(self, node):
        child = self._first_child[node]
        while child != -1:
            yield child
            child = self._next_sibling[child]


def _trees(*columns_BN):
    for columns in zip(*(column.tolist() for column in columns_BN), strict=True):
        yield _Tree(*columns)


def _write_path(predicts, accept_index, accept_token_num, request, tree, path):
    """Accepted nodes by place, and at each but the last the token of the next."""
    accept_token_num[request] = len(path) - 1
    for depth, node in enumerate(path):
        accept_index[request, depth] = tree.place(node)
        if depth > 0:
            predicts[tree.place(path[depth - 1])] = tree.tokens[node]


def _a_row_each(values):
    return values.reshape(-1, 1)


def _renormalized(ordered, order):
    kept = torch.zeros_like(ordered).scatter_(-1, order, ordered)
    return kept / kept.sum(-1, keepdim=True)
