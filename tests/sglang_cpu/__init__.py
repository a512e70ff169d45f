"""Stock SGLang on a machine without a GPU, for tests: unchanged, but for kernels and imports.

`site/` goes on the PYTHONPATH of the engine's processes, and of no other. It holds pure PyTorch
versions of the CPU kernels that SGLang calls (`sgl_kernel`: the package index has no CPU build),
`triton` and `torchvision` that can be imported and nothing else, and a plugin that SGLang loads by
itself (`fastrl_sglang_cpu.py`). The requirements say what to install. All is written for clarity,
not for speed: tiny models only.

The layouts are those of SGLang 0.5.21; 0.5.20 and 0.5.19 run too, and are not run by .ci/run. Older
ones do not speculate on a CPU. Shape legend: fastrl/types.py; P places in a request's row
of the token pool.
"""

import os
from pathlib import Path

_SITE = Path(__file__).parent / "site"


def environment() -> dict[str, str]:
    """Variables under which a process that starts SGLang finds all this."""
    inherited = [os.environ["PYTHONPATH"]] if "PYTHONPATH" in os.environ else []
    return {
        "PYTHONPATH": os.pathsep.join([str(_SITE), *inherited]),
        "SGLANG_USE_CPU_ENGINE": "1",
        "TORCHDYNAMO_DISABLE": "1",  # compiling takes longer than the tests
        "OMP_NUM_THREADS": "1",
    }
