"""The fine-tuning methods. A new one is a module in this package and a line in `METHODS`; README.md says what else it
needs."""

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
"""The class of each method, by its name: a method's module is imported only if it is used, as that takes long."""


def method_of(plan: Plan) -> Method:
    """The plan's method."""
    module, _, name = METHODS[plan.method].rpartition(".")
    method: Method = getattr(import_module(module), name)(plan)
    return method


__all__ = ["METHODS", "Method", "method_of"]
