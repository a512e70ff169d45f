"""Folders of drafters: reads the layouts they are published in, writes the one SGLang loads.

- SafeAILab/EAGLE: `pytorch_model.bin` with `fc`, one Llama layer `layers.0` without an input norm,
  and copies of the target's embedding; the config names `LlamaForCausalLM` or nothing, and may say
  with `bias` whether `fc` has one.
- SGLang: `model.safetensors` (or .bin) and the architecture `LlamaForCausalLMEagle`. SGLang puts
  `model.` before each name, so names must come without; it skips `lm_head`, always gives `fc` a
  bias, random where the file has none, takes `bias` for one of the attention, and fails on
  `tie_word_embeddings`, having the target's embedding and head take the place of both.

Which of them a folder has is told by its content: weights by name and shape, not file names; so is
an EAGLE-3 drafter, which SafeAILab publishes as `LlamaForCausalLM` too. What is read is what both
mean; weights keep their bits. Leaves out what an EAGLE-3 drafter's weights are (eagle3.py), and
drafters of several layers or with biases in the attention, and files in several parts: errors name
them.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

ARCHITECTURE = "LlamaForCausalLMEagle"
EAGLE3_ARCHITECTURE = "LlamaForCausalLMEagle3"
_COMMON_ARCHITECTURE = "LlamaForCausalLM"
_READ = {ARCHITECTURE, _COMMON_ARCHITECTURE}
_SAFETENSORS, _BIN = "model.safetensors", "pytorch_model.bin"
_SHARED_WITH_TARGET = ("embed_tokens", "lm_head")
_ROTARY_TABLE = "rotary_emb.inv_freq"
"""Saved by old transformers; follows from the configuration."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DrafterCheckpoint:
    """What a drafter's folder holds, whatever its layout."""

    config: LlamaConfig
    weights: dict[str, Tensor]
    """By `EagleDrafter.named_weights`' names, in the file's dtype; a missing `fc.bias` as zeros."""


# -- reading --------------------------------------------------------------------------------------


def read_checkpoint(folder: str | Path) -> DrafterCheckpoint:
    """Configuration and weights of an EAGLE drafter.

    Raises:
        FileNotFoundError: no such folder, or a file of it is missing.
        ValueError: no EAGLE drafter, or one of a kind that is not supported; a broken file.
    """
    folder = Path(folder)
    settings, file = _read_config(folder), _weights_file(folder)
    weights = _unprefixed(_read_weights(file), file)
    _check_names(weights, str(folder))
    _check_fc(weights["fc.weight"], settings.get("hidden_size"), str(folder))
    if settings.setdefault("num_hidden_layers", 1) != 1:
        raise ValueError(
            f"drafter checkpoint {folder} has num_hidden_layers {settings['num_hidden_layers']} in "
            f"config.json and one layer in {file.name}: which one is right?"
        )
    fc_has_bias = settings.pop("bias", None)  # to SGLang it would be one of the attention
    if "fc.bias" not in weights:
        if fc_has_bias:
            raise ValueError(
                f"drafter checkpoint {folder} has no fc.bias in {file.name}, but 'bias': "
                f"{fc_has_bias} in config.json: a part is missing; get the checkpoint anew, or, "
                f"if it was trained without one, set 'bias' to false"
            )
        weights["fc.bias"] = weights["fc.weight"].new_zeros(len(weights["fc.weight"]))
    settings["tie_word_embeddings"] = False  # it has neither
    return DrafterCheckpoint(config=LlamaConfig.from_dict(settings), weights=weights)


def is_eagle3_checkpoint(folder: str | Path) -> bool:
    """Whether a folder holds an EAGLE-3 drafter, by its architecture or, where that is one of other
    models too or missing, by its weights."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        return False
    architectures = read_settings(folder).get("architectures")
    if architectures in (None, [], [_COMMON_ARCHITECTURE]):
        return eagle3_sign(_weight_shapes(_weights_file(folder))) is not None
    return bool(architectures == [EAGLE3_ARCHITECTURE])


def check_sglang_reads(folder: str | Path) -> None:
    """Raise ValueError where SGLang would make something else of a drafter's folder than we do."""
    folder = Path(folder)
    is_eagle3 = is_eagle3_checkpoint(folder)
    settings = read_settings(folder) if is_eagle3 else _read_config(folder)
    faults = (
        [] if is_eagle3 else _eagle_faults(settings, list(_read_weights(_weights_file(folder))))
    )
    architecture = EAGLE3_ARCHITECTURE if is_eagle3 else ARCHITECTURE
    if settings.get("architectures") != [architecture]:
        faults.insert(
            0, f"architectures {settings.get('architectures')} instead of {[architecture]}"
        )
    if faults:
        raise ValueError(
            f"drafter checkpoint {folder} is not in the layout that SGLang loads: it has "
            f"{'; '.join(faults)}. Write it anew, and give the new folder: python "
            f"scripts/export_drafter.py --drafter {folder} --output FOLDER"
        )


def _eagle_faults(settings: Mapping[str, Any], names: Collection[str]) -> list[str]:
    faults = []
    if any(name.startswith("model.") for name in names):
        faults.append("names that start with 'model.'")
    if not any(name.endswith("fc.bias") for name in names):
        faults.append("no fc.bias, which SGLang would leave random")
    if settings.get("bias"):
        faults.append("'bias' in config.json, which SGLang takes for the attention's")
    if settings.get("tie_word_embeddings"):
        faults.append("'tie_word_embeddings' in config.json, on which SGLang fails")
    return faults


def _read_config(folder: Path) -> dict[str, Any]:
    """config.json of an EAGLE drafter of one Llama layer."""
    settings = read_settings(folder)
    check_architecture(settings.get("architectures"), str(folder))
    if settings.get("model_type") not in (None, "llama"):
        raise ValueError(
            f"drafter checkpoint {folder} has model_type {settings['model_type']!r}, expected "
            f"'llama': drafters are one Llama layer, whatever the family of their target"
        )
    return settings


def read_settings(folder: Path) -> dict[str, Any]:
    """config.json of a drafter of any kind."""
    file = folder / "config.json"
    if not file.is_file():
        raise FileNotFoundError(_no_file(folder, "config.json"))
    settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return settings


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All weights of a drafter of any kind; raises as `read_checkpoint` does."""
    return _read_weights(_weights_file(folder), lambda name: True)


def _weights_file(folder: Path) -> Path:
    for name in (_SAFETENSORS, _BIN):
        if (folder / name).is_file():
            return folder / name
    for name in (f"{_SAFETENSORS}.index.json", f"{_BIN}.index.json"):
        if (folder / name).is_file():
            raise ValueError(
                f"drafter checkpoint {folder} has its weights in several files ({name}), expected "
                f"{_SAFETENSORS} or {_BIN}: is it a drafter? If so, save them as one file"
            )
    raise FileNotFoundError(_no_file(folder, f"{_SAFETENSORS} or {_BIN}"))


def _no_file(folder: Path, name: str) -> str:
    return (
        f"drafter checkpoint {folder} has no {name}; expected a folder with config.json and "
        f"{_SAFETENSORS}, as EagleDrafter.save_pretrained writes, or {_BIN}; "
        f"scripts/make_drafter.py makes a fresh one for a model"
    )


def _read_weights(file: Path, is_read: Callable[[str], bool] | None = None) -> dict[str, Tensor]:
    """All but copies of the target's embedding and LM head, which are most of a file; or those of
    the names that are to be read."""
    is_read = is_read or _is_own
    with _reading(file):
        if file.name == _SAFETENSORS:
            with safe_open(file, framework="pt") as tensors:
                names = filter(is_read, tensors.keys())
                return {name: tensors.get_tensor(name) for name in names}
        given = torch.load(file, map_location="cpu", weights_only=True)
    if not isinstance(given, Mapping) or not all(isinstance(t, Tensor) for t in given.values()):
        raise ValueError(f"{file} holds {type(given).__name__}, expected tensors by name")
    return {name: tensor for name, tensor in given.items() if is_read(name)}


def _weight_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """By name, without the numbers."""
    with _reading(file):
        if file.name == _SAFETENSORS:
            with safe_open(file, framework="pt") as tensors:
                names = list(tensors.keys())
                return {name: tuple(tensors.get_slice(name).get_shape()) for name in names}
        given = torch.load(file, map_location="meta", weights_only=True)
    if not isinstance(given, Mapping):
        return {}
    return {name: tuple(t.shape) for name, t in given.items() if isinstance(t, Tensor)}


@contextmanager
def _reading(file: Path) -> Iterator[None]:
    """Raise ValueError for a file that is broken."""
    try:
        yield
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{file} cannot be read as weights ({reason}): is it complete?") from error


def _unprefixed(given: Mapping[str, Tensor], file: Path) -> dict[str, Tensor]:
    """By names without `model.`, and without what follows from the configuration."""
    weights: dict[str, Tensor] = {}
    for name, tensor in given.items():
        own = name.removeprefix("model.")
        if own in weights:
            raise ValueError(f"{file} has both {own} and model.{own}: which one is meant?")
        if not own.endswith(_ROTARY_TABLE):
            weights[own] = tensor
    return weights


# -- what is refused ------------------------------------------------------------------------------


def check_architecture(architectures: Collection[str] | None, source: str) -> None:
    """Raise ValueError for a name that no EAGLE drafter has; whose name is common to drafters and
    other models, or missing, is judged by its weights.

    EAGLE-3 has a message of its own because SGLang runs such a checkpoint under its EAGLE flag
    without a word, and next to nothing of what it drafts is accepted.
    """
    if any("Eagle3" in one for one in architectures or ()):
        raise _is_eagle3(source, f"architectures {architectures}")
    if architectures and not (len(architectures) == 1 and set(architectures) <= _READ):
        raise ValueError(
            f"drafter checkpoint {source} has architectures {architectures}, expected "
            f"['{ARCHITECTURE}']: is it a drafter?"
        )


def eagle3_sign(shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """What shows that weights are an EAGLE-3 drafter's; None for others."""
    names = {name.removeprefix("model."): shape for name, shape in shapes.items()}
    if any(name in ("d2t", "t2d") or name.startswith("midlayer.") for name in names):
        return "weights of its own kind: d2t, t2d or midlayer"
    shape = names.get("fc.weight", ())
    if len(shape) == 2 and shape[1] == 3 * shape[0]:
        return f"fc.weight {shape} over three hidden states"
    return None


def _check_names(weights: Mapping[str, Tensor], source: str) -> None:
    """Raise ValueError for weights of another kind of model."""
    if sign := eagle3_sign({name: tuple(tensor.shape) for name, tensor in weights.items()}):
        raise _is_eagle3(source, sign)
    if "fc.weight" not in weights:
        raise ValueError(
            f"drafter checkpoint {source} has no fc.weight, which joins embeddings and hidden "
            f"states in every EAGLE drafter: is it a drafter?"
        )
    layers = sorted({name.split(".")[1] for name in weights if name.startswith("layers.")})
    if layers != ["0"]:
        raise ValueError(
            f"drafter checkpoint {source} has the layers {layers}, expected ['0']: drafters of "
            f"several layers are not supported"
        )
    if biases := sorted(name for name in weights if name.endswith("_proj.bias")):
        raise ValueError(
            f"drafter checkpoint {source} has biases in its layer ({', '.join(biases)}), as "
            f"drafters of Qwen2 targets may have: such drafters are not supported; "
            f"scripts/make_drafter.py makes one without, for any target"
        )


def _check_fc(fc_weight: Tensor, hidden_size: int | None, source: str) -> None:
    """Raise ValueError unless it joins one embedding and one hidden state."""
    shape = tuple(fc_weight.shape)
    if len(shape) != 2 or shape[1] != 2 * shape[0] or shape[0] != hidden_size:
        raise ValueError(
            f"drafter checkpoint {source} has fc.weight of shape {shape} and hidden_size "
            f"{hidden_size} in config.json; expected (hidden_size, 2 * hidden_size), from the "
            f"embedding and the hidden state of a token"
        )


def _is_eagle3(source: str, sign: str) -> ValueError:
    return ValueError(
        f"drafter checkpoint {source} is an EAGLE-3 drafter ({sign}), which reads hidden states of "
        f"several layers and has a vocabulary of its own; expected an EAGLE drafter of "
        f"architecture {ARCHITECTURE}: load it as Eagle3Drafter, or by load_drafter"
    )


# -- writing --------------------------------------------------------------------------------------


def write_checkpoint(
    folder: str | Path,
    config: LlamaConfig,
    tensors: Mapping[str, Tensor],
    architecture: str = ARCHITECTURE,
) -> None:
    """`config.json` and `model.safetensors` in the layout that stock SGLang loads."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    save_file(weights, folder / _SAFETENSORS, metadata={"format": "pt"})
    settings = config.to_diff_dict() | {"architectures": [architecture], "model_type": "llama"}
    (folder / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


# -------------------------------------------------------------------------------------------------


def without_shared(
    named_tensors: Iterable[tuple[str, Tensor]],
) -> Iterator[tuple[str, Tensor]]:
    """Weights that are the drafter's own: without copies of the target's embedding and LM head."""
    for name, tensor in named_tensors:
        if _is_own(name):
            yield name, tensor


def _is_own(name: str) -> bool:
    return not name.removeprefix("model.").startswith(_SHARED_WITH_TARGET)
