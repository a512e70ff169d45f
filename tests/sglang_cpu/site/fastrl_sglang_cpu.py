"""SGLang loads this by its entry point, in each of its processes, and runs `activate`."""

import torch


def activate():
    """Let SGLang do on any CPU what it does on a GPU, as far as the tests need it."""
    _accept_any_cpu()
    _verify_by_sampling()
    _allow_seeded_sampling()
    torch.cuda.synchronize = lambda device=None: None  # its checksums wait for a GPU


def _accept_any_cpu():
    """Its one CPU backend that speculates wants AMX, whose two kernels have stand-ins."""
    from sglang.srt import runtime_context

    runtime_context.override_platform(has_amx=True).__enter__()


def _verify_by_sampling():
    """On a CPU it takes the target's best token whatever the temperature."""
    from sglang.srt.speculative import eagle_utils

    eagle_utils._verify_uses_greedy = lambda *, is_all_greedy, **_: is_all_greedy


def _allow_seeded_sampling():
    """Seeds come with deterministic inference, which knows GPU backends only; float32 on a CPU
    needs no kernels of its own for that."""
    from sglang.srt import batch_invariant_ops
    from sglang.srt.arg_groups import choices

    choices.DETERMINISTIC_ATTENTION_BACKEND_CHOICES.append("intel_amx")
    batch_invariant_ops.enable_batch_invariant_mode = lambda: None
