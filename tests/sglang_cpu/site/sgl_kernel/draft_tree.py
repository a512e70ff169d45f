"""The draft tree that a target forward verifies: ancestors, positions, children."""

import torch

_FULL_MASK = 0  # of [N, cached tokens + N] a request; else of [N, N], the cache being visible


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected_index,
    verified_seq_len,
    tree_mask,
    positions,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    topk,
    depth,
    draft_token_num,
    tree_mask_mode,
):
    """Fill mask, positions and links of each request's tree; node 0 is the root.

    Node i was candidate `selected_index[i - 1]`; candidate c was a child of the node that
    `parent_list[c // topk]` names, and of the root for c < topk.
    """
    num_nodes = draft_token_num
    taken = 0
    for request, length in enumerate(verified_seq_len.tolist()):
        parents = _parents(parent_list[request].tolist(), selected_index[request].tolist(), topk)
        rows = slice(request * num_nodes, (request + 1) * num_nodes)
        retrive_index[request] = torch.arange(rows.start, rows.stop)
        _link(parents, retrive_next_token[request], retrive_next_sibling[request])
        if int(tree_mask_mode) == _FULL_MASK:
            size = num_nodes * (length + num_nodes)
            mask = tree_mask[taken : taken + size].view(num_nodes, -1)[:, length:]
        else:
            size = num_nodes * num_nodes
            mask = tree_mask[taken : taken + size].view(num_nodes, -1)
        taken += size
        depths = _fill_mask(mask, parents)
        positions.view(-1)[rows] = length + torch.tensor(depths, dtype=positions.dtype)


def _parents(parent_list, selected, topk):
    """Parent of each node, -1 of the root and of orphans.

    A child that is certain is as likely as its parent, which may then not have been selected: as in
    SGLang's own kernel, such a node hangs on nothing and is never accepted.
    """
    node_of_candidate = {candidate: node for node, candidate in enumerate(selected, start=1)}
    parents = [-1]
    for candidate in selected:
        group = candidate // topk
        parents.append(0 if group == 0 else node_of_candidate.get(parent_list[group], -1))
    return parents


def _link(parents, next_token, next_sibling):
    """First child and next sibling of each node, in the nodes' order; -1: none."""
    next_token.fill_(-1)
    next_sibling.fill_(-1)
    for node in range(len(parents) - 1, 0, -1):
        if parents[node] == -1:
            continue
        next_sibling[node] = next_token[parents[node]]
        next_token[parents[node]] = node


def _fill_mask(mask_NN, parents):
    """Each node sees itself and its ancestors, however they are ordered; the depth of each."""
    mask_NN.fill_(False)
    depths = []
    for node in range(len(parents)):
        mask_NN[node, 0] = True
        depth, ancestor = 0, node
        while ancestor > 0:
            mask_NN[node, ancestor] = True
            depth, ancestor = depth + 1, parents[ancestor]
        depths.append(depth)
    return depths
