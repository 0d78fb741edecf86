"""QLoRA: LoRA on frozen layers that are held in 4 bits (https://arxiv.org/abs/2305.14314).

As in torchtune, all linear layers of the attention and feed-forward blocks, adapted or not, are quantised from the
dtype of training to NF4 with 8-bit scales. Embedding, norms, biases and head are not quantised.
"""

from collections.abc import Mapping

from torch import Tensor
from torchao.dtypes.nf4tensor import to_nf4

from trainers.methods.lora import Lora
from trainers.planning.plan import Plan


class Qlora(Lora):
    shards = False

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._quantised: dict[str, Tensor] = {}

    def placed(self, name: str, value: Tensor) -> Tensor:
        if not is_quantised(name):
            return value
        self._quantised[name] = to_nf4(value)
        return self._quantised[name]

    def base(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights that the layers compute with: their 4-bit weights dequantised, on the CPU, in the dtype of
        training (`trainers.planning.memory` counts them so). The numbers are the same on every device."""
        held = {name: weight.to("cpu") for name, weight in self._quantised.items()}
        return {**stored, **{name: weight.get_original_weight() for name, weight in held.items()}}  # type: ignore[attr-defined]


def is_quantised(name: str) -> bool:
    """Whether the decoder's parameter `name` is quantised: `layers.0.attn.q_proj.weight` is, its bias and adapter
    aren't."""
    *_, block, _, kind = ("", "", *name.split("."))
    return block in ("attn", "mlp") and kind == "weight"
