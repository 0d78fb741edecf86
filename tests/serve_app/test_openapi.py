"""/openapi.json and its page."""

import json
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from events.config import Config
from serve_app import reference
from trainers.data.rows import parse_row

CONTRACT = yaml.safe_load((Path(__file__).parent / "fine_tuning_api.yaml").read_text())
# Prose, which isn't compared. What OpenAPI 3.0 and 3.1 express differently is compared by meaning, and so are narrower
# types.
PROSE = {"description", "summary", "title", "info", "openapi"}


@pytest.fixture(scope="module")
def served(http: httpx.Client) -> dict[str, Any]:
    document: dict[str, Any] = http.get("/openapi.json").json()
    return document


def missing(wanted: Any, got: Any, served: dict[str, Any], path: str = "") -> list[str]:
    """Paths in the contract that the served document doesn't have with the same meaning."""
    if isinstance(wanted, dict):
        got = resolved(got, served)
        if not isinstance(got, dict):
            return [path]
        wanted = resolved(wanted, CONTRACT) if "$ref" in wanted else wanted
        return [
            problem
            for key, value in wanted.items()
            if key not in PROSE or isinstance(value, dict)
            for problem in missing(value, got.get(key, ABSENT), served, f"{path}/{key}")
        ]
    if isinstance(wanted, list):
        if not isinstance(got, list):
            return [path]
        return [f"{path}/{item}" for item in wanted if not any(not missing(item, other, served) for other in got)]
    return [] if wanted == got else [path]


ABSENT = object()


def resolved(schema: Any, document: dict[str, Any]) -> Any:
    """`schema` with its reference followed, and without the null it may also be."""
    if isinstance(schema, dict) and "$ref" in schema:
        target: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            target = target[part]
        return target | {key: value for key, value in schema.items() if key != "$ref"}
    if isinstance(schema, dict) and "anyOf" in schema:
        others = [inner for inner in schema["anyOf"] if inner != {"type": "null"}]
        if len(others) == 1:
            rest = {key: value for key, value in schema.items() if key != "anyOf"}
            return resolved(others[0], document) | rest
    return schema


def test_everything_of_the_contract_is_served(served: dict[str, Any]) -> None:
    assert missing(CONTRACT, served, served) == []


def test_the_comparison_notices_what_is_missing(served: dict[str, Any]) -> None:
    wanted = {"components": {"schemas": {"Config": {"properties": {"model": {"type": "integer"}, "x": {}}}}}}
    assert missing(wanted, served, served) == [
        "/components/schemas/Config/properties/model/type",
        "/components/schemas/Config/properties/x",
    ]


def test_every_operation_parameter_and_field_is_described(served: dict[str, Any]) -> None:
    undescribed = []
    for path, methods in served["paths"].items():
        for operation in methods.values():
            undescribed += [path] if not operation.get("description") else []
            undescribed += [f"{path} {p['name']}" for p in operation.get("parameters", []) if not p.get("description")]
    for name in (
        "Config",
        "FineTuningOptions",
        "FullFineTuneOptions",
        "LoraFineTuneOptions",
        "DiskLogger",
        "WandBLogger",
    ):
        properties = served["components"]["schemas"][name]["properties"].items()
        undescribed += [f"{name}.{field}" for field, schema in properties if not schema.get("description")]
    assert set(undescribed) <= {"Config.fine_tuning_options"}


def test_the_statuses_of_an_operation_are_those_it_may_answer_with(served: dict[str, Any]) -> None:
    for path, methods in served["paths"].items():
        for method, operation in methods.items():
            assert ("403" in operation["responses"]) == (method != "get"), path  # for a page of another site
            assert "421" in operation["responses"], path  # for a request to another host
            assert not (path.startswith("/v1/") and "422" in operation["responses"]), path  # it is a 400 there


def test_every_field_of_a_request_says_its_default_or_is_required(served: dict[str, Any]) -> None:
    for name in ("FineTuningOptions", "FullFineTuneOptions", "LoraFineTuneOptions", "DiskLogger", "WandBLogger"):
        schema = served["components"]["schemas"][name]
        for field, described in schema["properties"].items():
            documented = "default" in described or re.search(
                "default|left out", described["description"], re.IGNORECASE
            )
            assert documented or described["type"] == "object", f"{name}.{field}"


def test_the_page_shows_every_route_and_schema_and_loads_nothing(http: httpx.Client, served: dict[str, Any]) -> None:
    page = http.get("/docs").text
    for path in served["paths"]:
        assert f"<code>{path}</code>" in page
    for name in served["components"]["schemas"]:
        assert f'id="{name}"' in page
    assert not re.search(r"<script|<link|<img|@import|url\(|src=", page)
    links = set(re.findall(r'href="([^"]*)"', page))
    assert {link for link in links if not link.startswith("#")} == {"openapi.json"}
    targets = set(re.findall(r' id="([^"]*)"', page))
    assert {link[1:] for link in links if link.startswith("#")} <= targets
    assert len(targets) == page.count(" id=")
    assert "`" not in page  # code is set as code


def test_others_are_answered_while_the_page_is_made(http: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def page(_document: dict[str, Any], _base_url: str) -> str:
        begun.set()
        assert go_on.wait(30)
        return "the page"

    monkeypatch.setattr(reference, "page", page)
    with ThreadPoolExecutor(1) as threads:
        asked = threads.submit(http.get, "/docs", headers={"Host": "127.0.0.2"})  # whose page nobody has asked for
        assert begun.wait(30)
        try:
            assert http.get("/healthz", timeout=10).status_code == 200
        finally:
            go_on.set()
        assert asked.result().text == "the page"


def test_the_example_of_a_row_is_one_that_can_be_trained_on(served: dict[str, Any]) -> None:
    (example,) = served["components"]["schemas"]["TrainingDataItem"]["examples"]
    assert parse_row(json.dumps(example).encode()).keep_loss == (False, False, True)


def test_the_example_of_a_config_is_one(served: dict[str, Any]) -> None:
    (example,) = served["components"]["schemas"]["Config"]["examples"]
    assert Config.model_validate(example).model_dump(mode="json", exclude_unset=True) == example


def test_building_the_api_brings_in_no_torch() -> None:
    script = (
        "import sys\n"
        "from types import SimpleNamespace\n"
        "from serve_app.api import build_api\n"
        "from trainers.settings import Settings\n"
        "build_api(SimpleNamespace(settings=Settings()), object()).openapi()\n"
        "found = {'torch', 'torchtune', 'ray.train'} & sys.modules.keys()\n"
        "assert not found, found\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
