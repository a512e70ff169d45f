"""What SGLang's engine is given to run tiny models on a CPU."""

from typing import Any


def sglang_options(drafter_path: str, /, **options: Any) -> dict[str, Any]:
    """Of `SGLangEngine`; `options` take precedence, and `server_args` among them are added."""
    settings: dict[str, Any] = {
        "drafter_path": drafter_path,
        "dtype": "float32",
        "device": "cpu",
        "max_batch_size": 64,
        "mem_fraction_static": 0.1,
        "attention_backend": "intel_amx",
        "start_timeout_s": 120,
        "generate_timeout_s": 120,
    } | options
    settings["server_args"] = {
        "disable_cuda_graph": True,
        "max_total_tokens": 16384,
        "skip_server_warmup": True,
        "sleep_on_idle": True,  # engines wait side by side, and would spin
    } | options.get("server_args", {})
    return settings
