"""The components that a job may name with `_component_`, and the arguments of each.

torchtune's `config.instantiate` calls any Python function that a config names. Here a component is used only if its
exact name is in `COMPONENTS`, with the arguments listed there, which are checked.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from types import MappingProxyType
from typing import Any

from trainers.planning.values import Check, boolean, integer, nullable, number, pair

_fraction = number(0, 1, below=True)


@dataclass(frozen=True)
class Component:
    """`arguments`: those a job may set. `computed`: those the recipe sets, each with the reason why a job can't."""

    section: str
    arguments: Mapping[str, Check]
    computed: Mapping[str, str] = field(default_factory=dict)


_ADAM: dict[str, Check] = {
    "betas": pair(_fraction),
    "eps": number(0, above=True),  # with 0, weights whose gradient is zero become NaN, as an adapter's A in step 1
    "weight_decay": number(0),
    "amsgrad": boolean,
    "maximize": boolean,
    "foreach": nullable(boolean),
    "fused": nullable(boolean),
}
# torchao's accept `amsgrad`, too, but can't compute it on a compressed state.
_COMPRESSED_ADAM: dict[str, Check] = {name: _ADAM[name] for name in ("betas", "eps", "weight_decay")}
_SGD: dict[str, Check] = {
    "momentum": number(0, 1, below=True),
    "dampening": number(0, 1),
    "weight_decay": number(0),
    "nesterov": boolean,
    "maximize": boolean,
    "foreach": nullable(boolean),
    "fused": nullable(boolean),
}
_FROM_THE_RUN = {
    "num_training_steps": "it follows from the data and the number of epochs",
    "last_epoch": "it follows from the checkpoint a job resumes from",
}
_MASKED = "the loss mask (keep_loss) decides which tokens count"
_DTYPE = "it is the type that dtype names"
_SUMMED = "losses are always summed over a step's trained tokens and divided by their number"

DPO_LOSS = "torchtune.rlhf.loss.DPOLoss"

COMPONENTS: Mapping[str, Component] = MappingProxyType(
    {
        "torch.optim.AdamW": Component("optimizer", _ADAM),
        "torch.optim.Adam": Component("optimizer", _ADAM),
        "torch.optim.SGD": Component("optimizer", _SGD),
        "torchao.optim.AdamW8bit": Component("optimizer", _COMPRESSED_ADAM),
        "torchao.optim.AdamW4bit": Component("optimizer", _COMPRESSED_ADAM),
        "torchao.optim.AdamWFp8": Component("optimizer", _COMPRESSED_ADAM),
        "bitsandbytes.optim.AdamW8bit": Component("optimizer", _COMPRESSED_ADAM),
        "bitsandbytes.optim.PagedAdamW8bit": Component("optimizer", _COMPRESSED_ADAM),
        "bitsandbytes.optim.PagedAdamW": Component("optimizer", _COMPRESSED_ADAM),
        "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup": Component(
            "lr_scheduler",
            {"num_warmup_steps": integer(0, 10**9), "num_cycles": number(0, 1000, above=True)},
            _FROM_THE_RUN,
        ),
        # Names in the API, not import paths: the functions are in trainers.training.optimization.
        "trainers.optimization.get_linear_schedule_with_warmup": Component(
            "lr_scheduler", {"num_warmup_steps": integer(0, 10**9)}, _FROM_THE_RUN
        ),
        "trainers.optimization.get_constant_schedule_with_warmup": Component(
            "lr_scheduler", {"num_warmup_steps": integer(0, 10**9)}, _FROM_THE_RUN
        ),
        "torchtune.modules.loss.CEWithChunkedOutputLoss": Component(
            "loss", {"num_output_chunks": integer(1, 1024)}, {"ignore_index": _MASKED}
        ),
        "torch.nn.CrossEntropyLoss": Component(
            "loss",
            {"label_smoothing": number(0, 1)},
            {"ignore_index": _MASKED, "reduction": _SUMMED, "size_average": _SUMMED, "reduce": _SUMMED},
        ),
        DPO_LOSS: Component("loss", {"beta": number(0, above=True), "label_smoothing": number(0, 0.5)}),
        "torchtune.training.quantization.Int8DynActInt4WeightQATQuantizer": Component(
            "quantizer",
            {"groupsize": integer(2, 65_536)},  # torchao can't round groups of one weight
            {
                "padding_allowed": "a layer that groupsize doesn't divide is refused, not padded",
                "precision": _DTYPE,
                "scales_precision": "scales are float32",
            },
        ),
    }
)
DEFAULTS: Mapping[str, str] = MappingProxyType(
    {
        "optimizer": "torch.optim.AdamW",
        "lr_scheduler": "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
        "loss": "torchtune.modules.loss.CEWithChunkedOutputLoss",
    }
)
"""The component of each section that has one by default."""
SECTIONS = tuple(dict.fromkeys(component.section for component in COMPONENTS.values()))
OPTIONAL = frozenset({"lr_scheduler", "quantizer"})
"""Sections that may be null."""


def allowed(section: str) -> list[str]:
    """The names of the components for `section`."""
    return [name for name, component in COMPONENTS.items() if component.section == section]


def missing_package(component: str) -> str | None:
    """The package of a component if it isn't installed here, else None."""
    package = component.partition(".")[0]
    return None if find_spec(package) else package


def shardable(optimizer: str) -> bool:
    """Whether an optimizer's state can be sharded over workers together with the parameters."""
    return optimizer.startswith("torch.")


def conflicts(component: str, kwargs: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Arguments that are valid by themselves but that the component doesn't accept together, each with a message."""
    found = []
    if kwargs.get("foreach") and kwargs.get("fused"):
        found.append(("fused", "can't be true together with foreach"))
    if component == "torch.optim.SGD" and kwargs.get("nesterov"):
        if not kwargs.get("momentum"):
            found.append(("nesterov", "needs a momentum greater than 0"))
        if kwargs.get("dampening"):
            found.append(("nesterov", "needs a dampening of 0"))
    return found
