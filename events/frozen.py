"""Cheap copies of frozen pydantic models. The fold makes about three for each event."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

M = TypeVar("M", bound=BaseModel)


def changed(model: M, update: Mapping[str, Any]) -> M:
    """`model.model_copy(update=update)` for a model without extra fields and private attributes, at a fifth of the
    cost. The values of `update` are not validated."""
    copy = model.__class__.__new__(model.__class__)
    set_attribute = object.__setattr__  # the models are frozen
    set_attribute(copy, "__dict__", {**model.__dict__, **update})
    known = model.__pydantic_fields_set__
    set_attribute(copy, "__pydantic_fields_set__", known if update.keys() <= known else known | update.keys())
    set_attribute(copy, "__pydantic_extra__", None)
    set_attribute(copy, "__pydantic_private__", None)
    return copy
