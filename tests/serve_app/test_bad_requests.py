"""Bad input: a clear error in the one envelope, nothing recorded, never a 500."""

import json
import socket
import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from tests.serve_app.live_server import Server
from tests.tiny_models import make_tiny_model
from trainers.errors import ConfigProblems
from trainers.planning.strict_json import parse_object

SUBMIT = "/fine_tuning/jobs/submit"
OPENAI_SUBMIT = "/v1/fine_tuning/jobs"
JSON = {"Content-Type": "application/json"}


@pytest.fixture(autouse=True)
def _nothing_is_recorded(http: httpx.Client) -> Iterator[None]:
    before = http.get("/fine_tuning/jobs").json()
    yield
    assert http.get("/fine_tuning/jobs").json() == before


def refused(answer: httpx.Response, status: int = 422) -> dict[str, Any]:
    """The error of a response that must be one; checks the envelope."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    assert list(answer.json()) == ["error"]
    error: dict[str, Any] = answer.json()["error"]
    assert error.keys() >= {"message", "type", "param", "code"}
    assert ("errors" in error) == (status == 422)
    if status == 422:
        assert all(problem["message"] in error["message"] for problem in error["errors"])
    return error


@pytest.mark.parametrize(
    ("body", "says"),
    [
        (b"", "line 1 column 1"),
        (b'{"model": "m",\n "data": }', "line 2 column 10"),
        (b'{"model": "m"} trailing', "line 1 column 16"),
        (b"[]", "must be a JSON object, not an array"),
        (b'"text"', "not a string"),
        (b"12", "not a number"),
        (b"null", "not null"),
        (b"true", "not a boolean"),
        (b'{"metadata": {"x": NaN}}', "NaN is not JSON"),
        (b'{"metadata": {"x": -Infinity}}', "-Infinity is not JSON"),
        (b'{"metadata": {"x": 1e999}}', "metadata.x: is a number beyond double precision"),
        (b'{"metadata": {"x": 9223372036854775808}}', "metadata.x: is an integer beyond 64 bits"),
        (b'{"metadata": {"x": ' + b"9" * 5000 + b"}}", "an integer beyond 64 bits"),
        (b'{"metadata": {"x": 1, "x": 2}}', "the key 'x' appears twice"),
        (b'{"model": "a\\u0000b"}', "model: contains a NUL character"),
        (b'{"metadata": {"x": ["\\ud800"]}}', "metadata.x.0: contains a lone surrogate"),
        (b'{"metadata": {"\\udfff": 1}}', "metadata: the key '\\udfff' contains a lone surrogate"),
        (b'{"model": "\xff\xfe"}', "not UTF-8: byte 11 is 0xff"),
        ('{"model": "m"}'.encode("utf-16"), "not UTF-8"),
        (b'{"metadata": ' + b'{"x": ' * 70 + b"1" + b"}" * 71, "nested deeper than 64 levels"),
        (b"[" * 100_000, "nested deeper"),
        (b'{"metadata": ' + b'{"x":' * 100_000, "nested deeper"),
        (b'\xef\xbb\xbf{"model": "m"}', "BOM"),
    ],
)
def test_a_body_that_is_not_clean_json_is_refused_with_the_place(http: httpx.Client, body: bytes, says: str) -> None:
    for route in (SUBMIT, "/fine_tuning/jobs/cancel"):
        assert says in refused(http.post(route, content=body, headers=JSON))["message"]


@pytest.mark.parametrize(
    "content_type",
    [
        None,
        "text/plain",
        "application/x-www-form-urlencoded",
        "application/json; charset=latin-1",
        "multipart/form-data",
    ],
)
def test_a_body_of_another_type_gets_415(http: httpx.Client, content_type: str | None) -> None:
    headers = {"Content-Type": content_type} if content_type else {}
    assert "application/json" in refused(http.post(SUBMIT, content=b"{}", headers=headers), 415)["message"]


def test_a_body_that_says_it_is_too_large_gets_413(http: httpx.Client) -> None:
    answer = http.post(SUBMIT, content=b" " * (1 << 20) + b"{}", headers=JSON)
    assert refused(answer, 413)["code"] == "body_too_large"


def test_a_body_that_does_not_say_how_large_it_is_gets_413_once_it_is_too_large(server: Server) -> None:
    """Sent chunk by chunk and never ended: the answer comes when the limit is passed."""
    where = urlsplit(server.url)
    with socket.create_connection((where.hostname, where.port)) as connection:
        connection.settimeout(5)
        connection.sendall(
            f"POST {SUBMIT} HTTP/1.1\r\nHost: x\r\n"
            "Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
        )
        for _ in range((1 << 20) // 65536 + 1):
            connection.sendall(b"10000\r\n" + b" " * 65536 + b"\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 413")


def test_everything_wrong_is_reported_at_once(http: httpx.Client) -> None:
    request = {
        "mode": "m",
        "data": "/etc/passwd",
        "batch_size": 2,
        "fine_tuning_options": {"lr": "2e-5", "n_epochs": 0, "extras": {"optimizr": 1}},
        "overrides": "--nproc_per_node 0",
        "logger": {"filename": "../x"},
    }
    error = refused(http.post(SUBMIT, json=request))
    assert error["message"].startswith("9 problems: ")
    assert {problem["param"] for problem in error["errors"]} == {
        "model",
        "mode",
        "data",
        "batch_size",
        "fine_tuning_options.lr",
        "fine_tuning_options.n_epochs",
        "fine_tuning_options.extras.optimizr",
        "overrides",
        "logger.filename",
    }


def test_several_problems_read_as_one_sentence(http: httpx.Client) -> None:
    error = refused(http.post(SUBMIT, json={"model": "x y", "data": "/etc/passwd"}))
    assert ".;" not in error["message"]
    assert error["message"].count("; ") == 1


NAMES = [f"k{number}" for number in range(20_000)]


@pytest.mark.parametrize(
    "changes",
    [
        dict.fromkeys(NAMES, 1),
        {"fine_tuning_options": {"extras": dict.fromkeys(NAMES, 1)}},
        {"fine_tuning_options": {"extras": {"optimizer": dict.fromkeys(NAMES, 1)}}},
        {"fine_tuning_options": {"custom_training_options": {"lora_attn_modules": [1] * 20_000}}},
        {"metadata": {"texts": ["\0"] * 20_000}},
        {"x" * 500_000: 1},
        {"fine_tuning_options": {"extras": {"x" * 500_000: 1}}},
        {"fine_tuning_options": {"extras": {"optimizer": {"x" * 500_000: 1}}}},
        {"metadata": {"x" * 500_000: "\0"}},
    ],
)
def test_a_request_that_is_all_mistakes_gets_an_answer_of_bounded_length_and_soon(
    http: httpx.Client, config: dict[str, Any], changes: dict[str, Any]
) -> None:
    began = time.process_time()  # the server is in this process
    answer = http.post(SUBMIT, json=config | changes)
    assert time.process_time() - began < 2
    refused(answer)
    assert len(answer.content) < 50_000


@pytest.mark.parametrize("element", [1, "\0"])
def test_a_long_key_over_a_wide_list_takes_a_few_times_the_memory_of_the_body(element: int | str) -> None:
    body = json.dumps({"metadata": {"x" * 500_000: [element] * 400}}).encode()
    tracemalloc.start()
    try:
        with suppress(ConfigProblems):
            parse_object(body)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 10 * len(body)


def test_an_error_never_repeats_a_value_that_was_sent(http: httpx.Client, config: dict[str, Any]) -> None:
    secret = "sk-very-secret"
    request = config | {
        "model": {"key": secret},
        "overrides": 7,
        "fine_tuning_options": {"seed": secret, "lr": [secret]},
    }
    assert secret not in http.post(SUBMIT, json=request).text


@pytest.mark.parametrize(
    ("changes", "param", "says"),
    [
        ({"modle": "m"}, "modle", "did you mean model?"),
        ({"lora_rank": 8}, "lora_rank", "it belongs in fine_tuning_options.custom_training_options"),
        ({"fine_tuning_options": {"batchsize": 8}}, "fine_tuning_options.batchsize", "did you mean batch_size?"),
        ({"model": 7}, "model", "valid string"),
        ({"model": ""}, "model", "at least 1 character"),
        ({"metadata": []}, "metadata", "be an object"),
        ({"fine_tuning_options": []}, "fine_tuning_options", "be an object"),
        ({"fine_tuning_options": {"n_epochs": "3"}}, "fine_tuning_options.n_epochs", "valid integer"),
        ({"fine_tuning_options": {"n_epochs": 2.5}}, "fine_tuning_options.n_epochs", "valid integer"),
        ({"fine_tuning_options": {"shuffle": 1}}, "fine_tuning_options.shuffle", "valid boolean"),
        ({"fine_tuning_options": {"lr": "2e-5"}}, "fine_tuning_options.lr", "valid number"),
        ({"fine_tuning_options": {"lr": -1}}, "fine_tuning_options.lr", "greater than 0"),
        ({"fine_tuning_options": {"seed": 2**40}}, "fine_tuning_options.seed", "less than or equal to"),
        (
            {"fine_tuning_options": {"custom_training_options": {}}},
            "fine_tuning_options.custom_training_options",
            "can't tell full from LoRA",
        ),
        (
            {"fine_tuning_options": {"custom_training_options": {"finetuning_type": "qlora"}}},
            "fine_tuning_options.custom_training_options",
            "QLoRA, DoRA and QAT are keys of extras",
        ),
        (
            {"fine_tuning_options": {"custom_training_options": {"finetuning_type": "full", "lora_rank": 8}}},
            "fine_tuning_options.custom_training_options.lora_rank",
            "is a field of finetuning_type 'lora', and this is finetuning_type 'full'",
        ),
        (
            {"fine_tuning_options": {"custom_training_options": {"lora_rnk": 8}}},
            "fine_tuning_options.custom_training_options.lora_rnk",
            "did you mean lora_rank?",
        ),
        (
            {"fine_tuning_options": {"custom_training_options": {"fsdp_cpu_ofload": True}}},
            "fine_tuning_options.custom_training_options.fsdp_cpu_ofload",
            "did you mean fsdp_cpu_offload, of finetuning_type 'full'?",
        ),
        (
            {"fine_tuning_options": {"custom_training_options": {"use_dora": True}}},
            "fine_tuning_options.custom_training_options.use_dora",
            "it belongs in fine_tuning_options.extras",
        ),
        (
            {"fine_tuning_options": {"custom_training_options": {"finetuning_type": "lora", "sparsity": 1}}},
            "fine_tuning_options.custom_training_options.sparsity",
            "known fields: finetuning_type, lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output, lora_rank, "
            "lora_alpha",
        ),
        ({"fine_tuning_options": {"packed": True}}, "fine_tuning_options.packed", "in fine_tuning_options.extras"),
        (
            {"fine_tuning_options": {"packd": True}},
            "fine_tuning_options.packd",
            "packed, in fine_tuning_options.extras",
        ),
        ({"fine_tuning_options": {"epochs": 3}}, "fine_tuning_options.epochs", "did you mean n_epochs?"),
        ({"epochs": 3}, "epochs", "it belongs in fine_tuning_options, as n_epochs"),
        (
            {"fine_tuning_options": {"custom_training_options": {"lora_rank": 0}}},
            "fine_tuning_options.custom_training_options.lora_rank",
            "greater than or equal to 1",
        ),
        (
            {"fine_tuning_options": {"custom_training_options": {"lora_attn_modules": ["q_prj"]}}},
            "fine_tuning_options.custom_training_options.lora_attn_modules",
            "q_proj",
        ),
        ({"logger": {}}, "logger", "can't tell which logger"),
        ({"logger": {"log_type": "disk", "project": "p"}}, "logger.project", "is a field of log_type 'wandb'"),
        ({"logger": {"filename": "a/b.jsonl"}}, "logger.filename", "plain file name"),
        ({"logger": {"filename": "..\\x"}}, "logger.filename", "plain file name"),
        ({"overrides": "--nproc_per_node 0"}, "overrides", "--nproc_per_node 0"),
        ({"overrides": "--nproc_per_node 5"}, "overrides", "this cluster can never hold the job"),
        (
            {"fine_tuning_options": {"extras": {"optimizer": {"_component_": "subprocess.check_output"}}}},
            "fine_tuning_options.extras.optimizer._component_",
            "not on the list of components",
        ),
        ({"fine_tuning_options": {"extras": {"dtipe": "bf16"}}}, "fine_tuning_options.extras.dtipe", "dtype"),
        ({"model": "https://user:secret@host/model"}, "model", "credentials"),
        ({"model": "s3://[broken"}, "model", "URI"),
        ({"model": "org/my--model"}, "model", "'--'"),
        ({"model": "org/" + "b" * 97}, "model", "1 to 96"),
        ({"model": "/" + "x" * 1000}, "model", ""),
        ({"model": "~nobody-of-that-name/model"}, "model", ""),
        ({"data": "/" + "x" * 1000}, "data", ""),
        ({"data": "file://[broken"}, "data", ""),
        ({"data": "x" * 5000}, "data", "at most 4096 characters"),
    ],
)
def test_a_field_that_is_wrong_is_named(
    http: httpx.Client, config: dict[str, Any], changes: dict[str, Any], param: str, says: str
) -> None:
    error = refused(http.post(SUBMIT, json=config | changes))
    assert [problem["param"] for problem in error["errors"]] == [param]
    assert error["param"] == param
    assert says in error["message"]


@pytest.mark.parametrize("key", ["LoraFineTuneOptions", "FullFineTuneOptions", "DiskLogger", "literal[", "str", "none"])
@pytest.mark.parametrize(
    ("route", "home"),
    [
        (SUBMIT, ""),
        (SUBMIT, "fine_tuning_options."),
        (SUBMIT, "fine_tuning_options.custom_training_options."),
        (SUBMIT, "logger."),
        (OPENAI_SUBMIT, ""),
        (OPENAI_SUBMIT, "hyperparameters."),
        (OPENAI_SUBMIT, "metadata."),
    ],
)
def test_a_key_that_reads_like_a_word_of_the_validator_is_refused_by_its_own_name(
    http: httpx.Client, config: dict[str, Any], route: str, home: str, key: str
) -> None:
    body = config if route == SUBMIT else {"model": config["model"], "training_file": config["data"]}
    place = body
    for name in home.split(".")[:-1]:
        place = place.setdefault(name, {})
    place[key] = {}
    answer = http.post(route, json=body)
    assert answer.status_code == (422 if route == SUBMIT else 400), answer.text
    error = answer.json()["error"]
    assert [problem["param"] for problem in error["errors"]] == [home + key]
    assert error["param"] == home + key
    assert "it belongs" not in error["message"]


@pytest.mark.parametrize("field", ["data", "validation_data"])
def test_data_that_can_not_be_read_is_refused(
    http: httpx.Client, config: dict[str, Any], storage: Path, field: str
) -> None:
    (storage / "empty.jsonl").touch()
    (storage / f"{field}-link.jsonl").symlink_to("/etc/hostname")
    wrong = {
        str(storage / "missing.jsonl"): "no file",
        str(storage): "directory",
        str(storage / "empty.jsonl"): "empty",
        "/etc/hostname": "outside",
        str(storage / ".." / ".." / "etc" / "hostname"): "outside",
        str(storage / f"{field}-link.jsonl"): "outside",
        "ftp://host/rows.jsonl": "kind of URI",
        "s3://key:secret@bucket/rows.jsonl": "credentials",
    }
    for uri, says in wrong.items():
        error = refused(http.post(SUBMIT, json=config | {field: uri}))
        assert [problem["param"] for problem in error["errors"]] == [field]
        assert says in error["message"], uri


def test_a_model_directory_that_can_not_be_trained_is_refused(
    http: httpx.Client, config: dict[str, Any], storage: Path
) -> None:
    no_weights = make_tiny_model(storage / "no-weights")
    for weights in no_weights.glob("*.safetensors*"):
        weights.unlink()
    unknown = make_tiny_model(storage / "unknown")
    edit(unknown / "config.json", architectures=["ParrotForCausalLM"], model_type="parrot")
    wrong = {
        no_weights: "safetensors",
        unknown: "parrot",
        storage / "nowhere": "no model directory",
        Path("/etc"): "outside",
    }
    for directory, says in wrong.items():
        error = refused(http.post(SUBMIT, json=config | {"model": str(directory)}))
        assert error["param"] == "model"
        assert says in error["message"]


def test_an_adapter_on_a_tied_output_head_is_refused(http: httpx.Client, config: dict[str, Any], storage: Path) -> None:
    model = make_tiny_model(storage / "tied")
    options = {"custom_training_options": {"apply_lora_to_output": True}}
    error = refused(http.post(SUBMIT, json=config | {"model": str(model), "fine_tuning_options": options}))
    assert error["param"] == "fine_tuning_options.custom_training_options.apply_lora_to_output"


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("query", ["", "?job_id=", f"?job_id={'x' * 200}"])
def test_a_job_id_is_required(http: httpx.Client, query: str) -> None:
    for route in ("status", "tail"):
        assert refused(http.get(f"/fine_tuning/jobs/{route}{query}"))["param"] == "job_id"


@pytest.mark.parametrize("job_id", ["nope", "ftjob-01ARZ3NDEKTSV4RRFFQ69G5FAV", "%00", "..%2F..%2Fetc", "%ff", "a b"])
def test_a_job_nobody_submitted_gets_404(http: httpx.Client, job_id: str) -> None:
    for route in ("status", "tail"):
        error = refused(http.get(f"/fine_tuning/jobs/{route}?job_id={job_id}"), 404)
        assert (error["type"], error["code"]) == ("not_found_error", "unknown_job")
    assert refused(http.post("/fine_tuning/jobs/cancel", json={"job_id": "nope"}), 404)["code"] == "unknown_job"
    for route in ("/fine_tuning/jobs", "/v1/fine_tuning/jobs"):
        error = refused(http.get(f"{route}?after={job_id}"), 404)
        assert (error["type"], error["code"], error["param"]) == ("not_found_error", "unknown_after", "after")


def test_an_error_repeats_no_job_id_unescaped_and_says_what_to_do(http: httpx.Client) -> None:
    for answer in (
        http.get("/fine_tuning/jobs/status?job_id=a%0Ab%E2%80%AE"),
        http.post("/fine_tuning/jobs/cancel", json={"job_id": "a\nb\u202e"}),
        http.post("/v1/fine_tuning/jobs/a%0Ab%E2%80%AE/pause"),
    ):
        message = refused(answer, 404)["message"]
        assert message == r"there is no job a\nb\u202e; GET /fine_tuning/jobs lists the jobs"


@pytest.mark.parametrize("body", [{}, {"job_id": 7}, {"job_id": ""}, {"job_id": None}, {"job_id": "x", "force": True}])
def test_a_cancel_takes_a_job_id_and_nothing_else(http: httpx.Client, body: dict[str, Any]) -> None:
    wrong = "force" if "force" in body else "job_id"
    assert refused(http.post("/fine_tuning/jobs/cancel", json=body))["param"] == wrong


@pytest.mark.parametrize(
    "query", ["?limit=0", "?limit=101", "?limit=x", "?limit=" + "9" * 5000, "?after=", "?limit=1.5"]
)
def test_a_page_is_1_to_100_jobs(http: httpx.Client, query: str) -> None:
    assert refused(http.get(f"/fine_tuning/jobs{query}"))["param"] == query[1:].partition("=")[0]


@pytest.mark.parametrize("route", ["/fine_tuning/jobs", "/v1/fine_tuning/jobs", "/v1/files"])
def test_a_parameter_without_text_or_with_too_much_is_told_so(http: httpx.Client, route: str) -> None:
    for after, says in (("", "string should have at least 1 character"), ("x" * 300, "string should have at most")):
        error = http.get(route, params={"after": after}).json()["error"]
        assert error["message"].startswith(f"after: {says}")


@pytest.mark.parametrize("query", ["&after=-1", "&after=x", "&after=99999999999999999999", "&follow=maybe"])
def test_a_tail_starts_at_an_offset(http: httpx.Client, query: str) -> None:
    assert refused(http.get(f"/fine_tuning/jobs/tail?job_id=any{query}"))["param"] == query[1:].partition("=")[0]


def test_an_unknown_route_gets_the_same_envelope(http: httpx.Client) -> None:
    assert refused(http.get("/fine_tuning/jobs/statuses"), 404)["code"] == "unknown_route"


def test_the_wrong_method_gets_the_same_envelope_and_is_told_the_right_one(http: httpx.Client) -> None:
    answer = http.get(SUBMIT)
    assert refused(answer, 405)["code"] == "method_not_allowed"
    assert answer.headers["allow"] == "POST"


@pytest.mark.parametrize(
    ("path", "methods"),
    [
        ("/v1/files", "GET, HEAD, POST"),
        ("/v1/files/file-x", "DELETE, GET, HEAD"),
        ("/v1/webhook_endpoints/we_x", "DELETE, GET, HEAD, POST"),
        ("/v1/models/org/name", "GET, HEAD"),
        ("/healthz", "GET, HEAD"),
    ],
)
def test_the_wrong_method_is_told_all_of_the_right_ones(http: httpx.Client, path: str, methods: str) -> None:
    answer = http.put(path)
    assert answer.headers["allow"] == methods
    assert refused(answer, 405)["message"] == f"this route answers {methods} only"


@pytest.mark.parametrize(
    "path", ["/healthz", "/docs", "/openapi.json", "/fine_tuning/jobs", "/v1/models", "/v1/files", "/v1/files/file-x"]
)
def test_whatever_answers_a_get_answers_a_head_with_the_same_headers(http: httpx.Client, path: str) -> None:
    head, get = http.head(path), http.get(path)
    assert (head.status_code, head.content) == (get.status_code, b"")
    varying = {"date", "x-request-id"}
    assert {**head.headers, **dict.fromkeys(varying)} == {**get.headers, **dict.fromkeys(varying)}


def test_a_head_of_what_only_posts_is_a_405_and_does_nothing(http: httpx.Client) -> None:
    answer = http.head(SUBMIT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")
