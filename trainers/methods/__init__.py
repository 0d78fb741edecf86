"""The ways a model can be fine-tuned. A new one is a file beside this one and a line in `METHODS`;
README.md says where else it is known."""

from importlib import import_module

from trainers.methods.method import Method
from trainers.planning.plan import MethodName, Plan

METHODS: dict[MethodName, str] = {
    "full": "trainers.methods.full.Full",
    "lora": "trainers.methods.lora.Lora",
    "dora": "trainers.methods.dora.Dora",
    "qlora": "trainers.methods.qlora.Qlora",
    "qat": "trainers.methods.qat.Qat",
}
"""By name, as what one of them needs takes long to import."""


def method_of(plan: Plan) -> Method:
    module, _, name = METHODS[plan.method].rpartition(".")
    method: Method = getattr(import_module(module), name)(plan)
    return method


__all__ = ["METHODS", "Method", "method_of"]
