"""The ways a model can be fine-tuned. A new one is a file beside this one and a line in `METHODS`."""

from trainers.methods.dora import Dora
from trainers.methods.full import Full
from trainers.methods.lora import Lora
from trainers.methods.method import Method
from trainers.methods.qat import Qat
from trainers.methods.qlora import Qlora
from trainers.plan import Plan

METHODS: dict[str, type[Method]] = {
    "full": Full,
    "lora": Lora,
    "dora": Dora,
    "qlora": Qlora,
    "qat": Qat,
}


def method_of(plan: Plan) -> Method:
    return METHODS[plan.method](plan)


__all__ = ["METHODS", "Method", "method_of"]
