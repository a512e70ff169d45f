"""How a policy is spread over ranks, as an option. Leaves out how many ranks: trainer.strategy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


# No slots: jsonargparse reads the fields of a default value from its __dict__.
@dataclass(frozen=True, kw_only=True)
class ShardingSettings:
    """Memory against time. All but activation_checkpointing is of ModelParallelStrategy (FSDP2),
    which keeps float32 weights and computes in what trainer.precision says."""

    activation_checkpointing: bool = False
    """Keep only the inputs of the policy's decoder layers, and compute each layer a second time in
    the backward; under any trainer.strategy."""
    cpu_offload: bool = False
    """Keep weights, gradients and the optimizer's state in the host's memory, and step there."""
    reshard_after_forward: bool = True
    """Free a layer's whole weights after its forward and gather them again for its backward; false
    keeps them until then, which is faster and takes the memory of the whole policy."""
    reduce_dtype: Literal["float32", "bfloat16"] = "float32"
    """In which gradients are summed over ranks; bfloat16 halves what is sent, and rounds."""

    def check_unsharded(self) -> None:
        """Raise ValueError if an option is set that has no effect without shards."""
        default = ShardingSettings(activation_checkpointing=self.activation_checkpointing)
        ignored = [
            f"{name} {value}"
            for name, value in vars(self).items()
            if value != getattr(default, name)
        ]
        if ignored:
            raise ValueError(
                f"model.sharding: {', '.join(ignored)} has no effect on a policy that is whole on "
                f"each GPU; set trainer.strategy to "
                f"lightning.pytorch.strategies.ModelParallelStrategy, or leave it out"
            )
