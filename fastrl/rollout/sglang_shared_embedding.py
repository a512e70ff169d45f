"""Has SGLang's drafter share the policy's embedding and LM head before the cache is sized.

SGLang builds an EAGLE drafter with an embedding and an LM head of its own, takes for the cache what
memory is left, and only then puts the policy's in their place: too late for the cache. For
Qwen2.5-7B these are 2 * 152064 * 3584 numbers, 2.2 GB, the keys and values of some 37,000 tokens.
Here they are shared first.

Called in SGLang's scheduler, by FastRL's plugin. Leaves out trimmed draft vocabularies, whose head
is the drafter's own.
"""

from __future__ import annotations

from typing import Any

_SHARED = ("model.embed_tokens.weight", "lm_head.weight")


def register() -> None:
    """Have it done in every scheduler that this process starts; a plugin of SGLang's calls it."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(
        "sglang.srt.managers.scheduler.Scheduler.init_memory_pools",
        _share_before_pools,
        HookType.BEFORE,
    )


def own_embedding_bytes(eagle_worker: Any) -> dict[str, int]:
    """Of an embedding and LM head that the drafter holds beside the policy's, by name.

    Args:
        eagle_worker: SGLang's `EAGLEWorkerV2`, its models loaded.
    """
    target = eagle_worker.target_worker.model_runner.model
    drafter = eagle_worker._draft_worker.draft_runner.model
    policys = {parameter.data_ptr() for parameter in target.parameters()}
    return {
        name: parameter.nbytes
        for name, parameter in drafter.named_parameters(remove_duplicate=False)
        if name in _SHARED and parameter.data_ptr() not in policys
    }


def _share_before_pools(scheduler: Any) -> None:
    from sglang.srt.speculative.eagle_worker_v2 import EAGLEWorkerV2

    worker = scheduler.draft_worker
    if not isinstance(worker, EAGLEWorkerV2) or scheduler.spec_algorithm.is_eagle3():
        return
    drafting = worker._draft_worker
    drafting.init_token_map()
    if drafting.hot_token_id is not None:
        return
    drafting.init_lm_head()  # SGLang does it again after the cache is sized, to no effect
    if own := own_embedding_bytes(worker):
        raise RuntimeError(
            f"SGLang's drafter keeps weights of its own beside the policy's, which its cache would "
            f"be smaller by: {own} bytes. Its architecture does not share them: use an EAGLE "
            f"drafter, or TorchEngine"
        )
