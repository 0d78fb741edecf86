"""Fixtures of the tests of data."""

import pytest

from tests.tiny_models import make_tiny_model
from trainers.data.chat import ChatTokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_dir(make_tiny_model(tmp_path_factory.mktemp("model")))
