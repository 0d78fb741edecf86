"""Which names of models are taken, and for what."""

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id
from hypothesis import assume, given
from hypothesis import strategies as st

from trainers.errors import UserError
from trainers.models.names import classify_model


@given(st.lists(st.sampled_from(["a", "B7", "-", ".", "_", ".git", "/", "x" * 94]), min_size=1, max_size=7))
def test_what_is_taken_for_a_hub_id_is_what_huggingface_hub_takes_for_one(pieces: list[str]) -> None:
    model = "".join(pieces)
    assume(not model.startswith(("/", ".")) and model.count("/") == 1)
    try:
        validate_repo_id(model)
    except HFValidationError:
        with pytest.raises(UserError):
            classify_model(model)
    else:
        assert classify_model(model) == "hub"


def test_a_refused_hub_id_learns_the_rule() -> None:
    for model in ("org/my--model", "org/model.git", "org/a..b", f"org/{'b' * 97}"):
        with pytest.raises(UserError, match="1 to 96 letters, digits"):
            classify_model(model)


@pytest.mark.parametrize(
    "model", ["ft:m:tunewright::01M8PHHNMXECB6W84RB2F7J84V", "ft:m:tunewright:a/b:01:ckpt-step-8", "ftckpt_01-5"]
)
def test_the_name_of_a_tuned_model_is_refused_and_the_error_says_that_the_api_takes_it(model: str) -> None:
    with pytest.raises(UserError, match="only in requests to the API, exactly as GET /v1/models"):
        classify_model(model)
