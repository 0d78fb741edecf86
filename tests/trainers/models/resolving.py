"""Model names that can't be resolved."""

import pytest

from trainers.errors import JobProblem
from trainers.models.resolve import resolve_model
from trainers.settings import Settings


def failure(model: str, settings: Settings) -> JobProblem:
    with pytest.raises(JobProblem) as caught:
        resolve_model(model, settings, lambda _: None)
    return caught.value
