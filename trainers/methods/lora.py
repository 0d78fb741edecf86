"""LoRA: trains low-rank adapters of frozen linear layers. A checkpoint has the adapter, and the merged model."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchtune.modules import TransformerDecoder
from torchtune.modules.peft import LoRALinear

from trainers.methods.method import Method
from trainers.models.adapters import load_peft_adapter, merge_lora, save_peft_adapter
from trainers.models.architecture import Architecture
from trainers.models.decoder import MakeLinear, plain_linear
from trainers.models.export_files import copy_tokenizer
from trainers.models.layout import adapts
from trainers.models.names import base_name
from trainers.models.weights import load_weights
from trainers.planning.plan import LoraSpec, Plan
from trainers.training.checkpoint import reading
from trainers.training.export import export_model

ADAPTER_SUFFIXES = (".lora_a.weight", ".lora_b.weight")


class LeanLoRALinear(LoRALinear):  # type: ignore[misc]  # torchtune ships no types
    """torchtune's LoRALinear, but the product with B, its scaling and the addition to the base layer's output are one
    operation instead of three."""

    def forward(self, x: Tensor) -> Tensor:
        out = functional.linear(x, self.weight, self.bias)
        low = self.lora_a(self.dropout(x))
        scaled: Tensor = torch.addmm(
            out.flatten(0, -2), low.flatten(0, -2), self.lora_b.weight.t(), alpha=self.alpha / self.rank
        )
        return scaled if out.ndim == 2 else scaled.view_as(out)  # FSDP warns of a unit that returns a view


def lora_linear(spec: LoraSpec) -> MakeLinear:
    """Makes a decoder's linear layers, with adapters where `spec` asks for them."""

    def make(name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        if not adapts(spec, name):
            return plain_linear(name, inputs, outputs, bias=bias)
        return LeanLoRALinear(inputs, outputs, rank=spec.rank, alpha=spec.alpha, dropout=spec.dropout, use_bias=bias)

    return make


class Lora(Method):
    keeps_base = True

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        assert plan.lora is not None  # noqa: S101  -- as every plan of this method has it
        self.spec = plan.lora

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> nn.Module:
        return lora_linear(self.spec)(name, inputs, outputs, bias=bias)

    def trains(self, name: str) -> bool:
        return name.endswith(ADAPTER_SUFFIXES)

    def weights(
        self,
        decoder: TransformerDecoder,
        arch: Architecture,
        model_dir: Path,
        resume_from: Path | None,
        dtype: torch.dtype,
    ) -> dict[str, Tensor]:
        base = load_weights(model_dir, arch)
        if resume_from is None:
            return base | initial_adapter(decoder, self.plan.seed, dtype)
        with reading(resume_from / "adapter"):
            return base | load_peft_adapter(resume_from / "adapter", arch, self.spec)

    def save(self, directory: Path, trained: Mapping[str, Tensor], arch: Architecture, model_dir: Path) -> None:
        base, revision = base_name(self.plan.model)
        save_peft_adapter(trained, arch, self.spec, base, directory / "adapter", revision)
        stored = load_weights(model_dir, arch)
        merged = merge_lora(self.base(stored), trained, self.spec, stored)
        of_stored_type = {name: value.to(stored[name].dtype) for name, value in merged.items()}
        export_model(of_stored_type, arch, model_dir, directory / "merged")
        copy_tokenizer(directory / "merged", directory / "adapter")

    def base(self, stored: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The frozen parameters that the adapter was trained with. `stored` are those in the model's files."""
        return stored


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The LoRA parameters of a model by name; empty for a model without adapters."""
    return {name: p for name, p in model.named_parameters() if name.endswith(ADAPTER_SUFFIXES)}


def initial_adapter(model: nn.Module, seed: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The initial value of every adapter parameter, whole and on the CPU, wherever `model` is (on meta, sharded).

    As in LoRALinear, A is Kaiming-uniform with a = sqrt(5), i.e. uniform within 1 / sqrt(inputs), and B is zero, so
    that training starts at the base model. The values depend only on `seed` and the model's shapes: they are the same
    on any device and for any number of workers.
    """
    generator = torch.Generator().manual_seed(seed)
    return {
        name: _initial_a(parameter.shape, generator).to(dtype)
        if name.endswith(".lora_a.weight")
        else torch.zeros(parameter.shape, dtype=dtype, device="cpu")
        for name, parameter in adapter_parameters(model).items()
    }


def _initial_a(shape: torch.Size, generator: torch.Generator) -> Tensor:
    bound = shape[1] ** -0.5
    return torch.empty(shape, dtype=torch.float32, device="cpu").uniform_(-bound, bound, generator=generator)
