"""The config as the user sends it: what is taken, and what is refused."""

from typing import Any

import pytest
from pydantic import ValidationError

from events.config import Config, FullFineTuneOptions, LoraFineTuneOptions, WandBLogger

BASE: dict[str, Any] = {"model": "smol", "data": "file:///d.jsonl"}


def options(custom: dict[str, Any]) -> dict[str, Any]:
    return {**BASE, "fine_tuning_options": {"custom_training_options": custom}}


def test_an_option_sent_as_null_takes_its_default() -> None:
    sent = {
        **BASE,
        "validation_data": None,
        "overrides": None,
        "logger": None,
        "fine_tuning_options": {
            "lr": None,
            "n_epochs": None,
            "custom_training_options": {"finetuning_type": None, "lora_rank": 4, "fsdp_cpu_offload": None},
        },
    }
    del sent["fine_tuning_options"]["custom_training_options"]["fsdp_cpu_offload"]
    config = Config.model_validate(sent)
    assert config.fine_tuning_options.n_epochs == 1
    assert config.fine_tuning_options.custom_training_options == LoraFineTuneOptions(lora_rank=4)
    assert config.logger == Config.model_validate(BASE).logger


def test_nulls_inside_metadata_and_extras_are_the_users_and_stay() -> None:
    metadata, extras = (
        {"a": None, "b": [None, {"c": None}]},
        {"lr_scheduler": None, "optimizer": {"weight_decay": None}},
    )
    config = Config.model_validate({**BASE, "metadata": metadata, "fine_tuning_options": {"extras": extras}})
    assert (config.metadata, config.fine_tuning_options.extras) == (metadata, extras)


@pytest.mark.parametrize("field", ["model", "data"])
@pytest.mark.parametrize("how", ["absent", "null"])
def test_model_and_data_are_required(field: str, how: str) -> None:
    sent = {name: value for name, value in BASE.items() if name != field}
    with pytest.raises(ValidationError, match=rf"{field}\n  Field required"):
        Config.model_validate(sent if how == "absent" else {**sent, field: None})


@pytest.mark.parametrize("value", [1, None])
def test_an_unknown_field_is_refused_by_name(value: int | None) -> None:
    with pytest.raises(ValidationError, match=r"learning_rate\n  Extra inputs are not permitted"):
        Config.model_validate({**BASE, "learning_rate": value})


@pytest.mark.parametrize(
    ("custom", "kind"),
    [
        ({"finetuning_type": "full"}, FullFineTuneOptions),
        ({"finetuning_type": "FullFineTuneOptions"}, FullFineTuneOptions),
        ({"finetuning_type": "lora"}, LoraFineTuneOptions),
        ({"finetuning_type": "LoraFineTuneOptions", "lora_rank": 4}, LoraFineTuneOptions),
        ({"lora_rank": 4}, LoraFineTuneOptions),
        ({"fsdp_cpu_offload": False}, FullFineTuneOptions),
        ({"fsdp_cpu_offload": False, "finetuning_type": None}, FullFineTuneOptions),
    ],
)
def test_the_tag_or_else_the_fields_tell_full_from_lora(custom: dict[str, Any], kind: type) -> None:
    assert type(Config.model_validate(options(custom)).fine_tuning_options.custom_training_options) is kind


@pytest.mark.parametrize(
    "custom",
    [{}, {"finetuning_type": None}, {"finetuning_type": "qlora"}, {"finetuning_type": 1}, "full", []],
)
def test_where_nothing_tells_full_from_lora_it_is_an_error_that_says_so(custom: Any) -> None:
    with pytest.raises(ValidationError, match="set finetuning_type to 'full' or 'lora'"):
        Config.model_validate(options(custom))


def test_a_field_that_neither_has_is_refused_by_its_name() -> None:
    with pytest.raises(ValidationError, match=r"custom_training_options\.LoraFineTuneOptions\.x\n"):
        Config.model_validate(options({"x": 1}))


def test_the_fields_tell_the_loggers_apart() -> None:
    assert Config.model_validate({**BASE, "logger": {"project": "p"}}).logger == WandBLogger(project="p")
    with pytest.raises(ValidationError, match="set log_type to 'disk' or 'wandb'"):
        Config.model_validate({**BASE, "logger": {}})


def test_all_errors_are_reported_at_once() -> None:
    sent = {"data": 7, "fine_tuning_options": {"n_epochs": 0, "lr": "2e-5", "seed": True}, "typo": 1}
    with pytest.raises(ValidationError) as refused:
        Config.model_validate(sent)
    places = {".".join(map(str, error["loc"])) for error in refused.value.errors()}
    options_places = {f"fine_tuning_options.{name}" for name in ("n_epochs", "lr", "seed")}
    assert places == options_places | {"model", "data", "typo"}


def nested(depth: int) -> dict[str, Any]:
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("metadata", "reason"),
    [
        ({"a": float("nan")}, "nan is not JSON"),
        ({"a": [float("inf")]}, "inf is not JSON"),
        ({"a": "\ud800"}, "surrogate"),
        ({"\udfff": 1}, "surrogate"),
        (nested(100), "nested deeper than 64"),
    ],
)
def test_what_could_not_be_stored_and_echoed_is_refused(metadata: dict[str, Any], reason: str) -> None:
    with pytest.raises(ValidationError, match=reason):
        Config.model_validate({**BASE, "metadata": metadata})


def test_the_schema_has_no_nulls_so_that_it_is_the_contract() -> None:
    schema = Config.model_json_schema()
    assert schema["required"] == ["model", "data"]
    assert "null" not in str(schema)
