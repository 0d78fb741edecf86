"""Data files become directories of tokens, or reports of what is wrong with them."""

import errno
import json
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from events.facts import DataReport
from tests.power_cut import PowerCut
from tests.tiny_models import make_tiny_model
from tests.trainers.data.support import PIECE, line, with_new_tokens
from trainers.data import dataset as dataset_module
from trainers.data import prepare as prepare_module
from trainers.data.cache import DataCache
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import TokenisedDataset
from trainers.data.encode import Chunk, Line, encode_lines
from trainers.data.prepare import DataInvalid, prepare, prepared
from trainers.data.rows import parse_row
from trainers.data.source import content_digest
from trainers.errors import UserError

Prepare = Callable[..., DataReport]


@pytest.fixture
def run(tmp_path: Path, tokenizer: ChatTokenizer) -> Prepare:
    """Prepares these lines into tmp_path/out; keyword arguments replace those of `prepare`."""

    def prepare_lines(lines: list[str], **arguments: Any) -> DataReport:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        cache = DataCache(tmp_path / "cache", 1 << 30)
        defaults: dict[str, Any] = {
            "tokenizer": tokenizer,
            "max_seq_len": 4096,
            "out_dir": tmp_path / "out",
            "cache": cache,
            "progress": lambda _: None,
        }
        return prepare(file.as_uri(), **(defaults | arguments))

    return prepare_lines


def test_every_row_is_there_in_order_with_its_tokens_and_mask(
    run: Prepare, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    lines = [line(PIECE * (i % 7), f"answer {i}") for i in range(1300)]  # more than two batches
    report = run(lines)
    dataset = TokenisedDataset(tmp_path / "out")
    expected = tokenizer.encode([parse_row(text.encode()) for text in lines])
    assert len(dataset) == report.rows == 1300
    assert dataset.lengths.tolist() == [len(ids) for ids, _ in expected]
    for i, (ids, mask) in enumerate(expected):
        tokens, trained = dataset[i]
        assert (tokens.dtype, trained.dtype) == (np.dtype(np.int32), np.dtype(np.bool_))
        assert np.array_equal(tokens, ids)
        assert np.array_equal(trained, mask)
    assert report.tokens == dataset.lengths.sum()
    assert report.trained_tokens == sum(mask.sum() for _, mask in expected)
    assert dataset.report == report


def test_prepared_data_survives_a_power_cut(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EXDEV, "no hard links here")

    power_cut = PowerCut(monkeypatch)
    run([line("a")])
    assert power_cut.leaves(tmp_path / "out")
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    run([line("a")])
    assert power_cut.leaves(tmp_path / "out")


def test_rows_in_error_keep_their_line_numbers_and_order(run: Prepare) -> None:
    good = line("a")
    lines = [good, "", "nope", good, line("b", keep_loss=[False, False]), *[good] * 600, "[]"]
    with pytest.raises(DataInvalid) as caught:
        run(lines)
    report = caught.value.report
    assert [error.line for error in report.errors] == [3, 5, 606]
    assert (report.rows, report.invalid_rows) == (602, 3)
    assert str(caught.value) == (
        "3 of 605 rows are invalid; the first is line 3: the line is not JSON: expected ident at column 2. "
        "Fix the lines that the job's log lists (GET /fine_tuning/jobs/tail), or submit it through "
        "/fine_tuning/jobs/submit with extras.max_invalid_fraction, which allows some."
    )


def test_a_token_without_an_embedding_makes_the_row_invalid(run: Prepare, tmp_path: Path) -> None:
    tokenizer = with_new_tokens(tmp_path / "grown")
    late = tokenizer._tokenizer.token_to_id("<late>")
    lines = [line("a"), line("<late>", "b"), line("a", "c")]
    report = run(lines, tokenizer=tokenizer, max_invalid_fraction=0.5)
    assert (report.rows, report.invalid_rows) == (2, 1)
    (error,) = report.errors
    assert error.line == 2
    assert error.message == (
        f"the token '<late>' ({late}) is beyond the model's embedding, which has {tokenizer.vocab_size} rows: "
        "resize the model's embeddings"
    )
    assert TokenisedDataset(tmp_path / "out")[1][0].max() < tokenizer.vocab_size


def test_a_token_without_an_embedding_does_no_harm_if_it_is_cut_off(run: Prepare, tmp_path: Path) -> None:
    report = run([line("a", f"{PIECE * 20}<late>")], tokenizer=with_new_tokens(tmp_path / "grown"), max_seq_len=40)
    assert (report.rows, report.truncated_rows) == (1, 1)


def test_the_first_twenty_errors_are_kept_and_all_are_counted(run: Prepare) -> None:
    with pytest.raises(DataInvalid) as caught:
        run([line("a"), *["nope"] * 30])
    assert len(caught.value.report.errors) == 20
    assert caught.value.report.invalid_rows == 30


def test_invalid_rows_are_left_out_if_the_job_allows_them(run: Prepare, tmp_path: Path) -> None:
    report = run([line("a"), "nope", line("b"), line("c")], max_invalid_fraction=0.25)
    assert (report.rows, report.invalid_rows) == (3, 1)
    assert len(TokenisedDataset(tmp_path / "out")) == 3
    assert [error.line for error in report.errors] == [2]


def test_one_row_more_than_allowed_is_too_many(run: Prepare) -> None:
    with pytest.raises(DataInvalid, match=r"2 of 4 rows are invalid \(25.00% are allowed\)"):
        run([line("a"), "nope", "nope", line("b")], max_invalid_fraction=0.25)


def test_data_without_a_valid_row_is_refused_whatever_is_allowed(run: Prepare) -> None:
    with pytest.raises(DataInvalid, match="2 of 2 rows are invalid; the first is line 1"):
        run(["nope", "nope"], max_invalid_fraction=1.0)


def test_data_of_blank_lines_is_refused(run: Prepare) -> None:
    with pytest.raises(UserError) as caught:
        run(["", "  "])
    assert caught.value.error.code == "data_empty"


def test_a_long_row_is_cut_off_and_counted(run: Prepare, tmp_path: Path) -> None:
    report = run([line("a", PIECE), line("a", PIECE * 20)], max_seq_len=40)
    dataset = TokenisedDataset(tmp_path / "out")
    assert report.truncated_rows == 1
    assert dataset.lengths[1] == 40
    assert dataset[1][1][-1]
    assert report.tokens == dataset.lengths.sum()
    assert report.trained_tokens == sum(dataset[i][1].sum() for i in range(2))


def test_a_row_that_is_cut_before_its_first_trained_token_is_an_error(run: Prepare, tokenizer: ChatTokenizer) -> None:
    text = line(PIECE * 20)
    ((_, mask),) = tokenizer.encode([parse_row(text.encode())])
    first = int(mask.argmax()) + 1
    with pytest.raises(DataInvalid, match=f"the first trained token is at {first}, max_seq_len is 40"):
        run([text], max_seq_len=40)
    assert run([text], max_seq_len=first).trained_tokens == 1


def test_the_histogram_counts_rows_by_powers_of_two_before_truncation(run: Prepare, tokenizer: ChatTokenizer) -> None:
    lines = [line("a"), line("b"), line(PIECE * 3), line("a", PIECE * 20)]
    lengths = [len(ids) for ids, _ in tokenizer.encode([parse_row(text.encode()) for text in lines])]
    report = run(lines, max_seq_len=64)
    assert sum(report.length_histogram.values()) == 4
    bounds = list(map(int, report.length_histogram))
    assert bounds == sorted(bounds)
    for bound, count in report.length_histogram.items():
        assert count == sum(int(bound) // 2 < length <= int(bound) for length in lengths)


def test_a_failure_leaves_nothing_behind(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid):
        run(["nope"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl"]
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_leftovers_of_a_killed_run_are_deleted(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / ".out-abcd").mkdir()
    (tmp_path / ".out-abcd" / "tokens.bin").write_bytes(b"half")
    run([line("a")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "data.jsonl", "out"]


def test_only_a_directory_that_is_complete_and_of_the_same_length_is_prepared(run: Prepare, tmp_path: Path) -> None:
    assert prepared(tmp_path / "out", 4096) is None
    report = run([line("a"), line("b")])
    assert prepared(tmp_path / "out", 4096) == report
    assert prepared(tmp_path / "out", 100) is None
    (tmp_path / "out" / "report.json").unlink()
    assert prepared(tmp_path / "out", 4096) is None


def test_existing_data_is_replaced(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokens.bin").write_bytes(b"half")
    assert run([line("a")]).rows == 1
    assert run([line("a"), line("b")]).rows == 2
    assert len(TokenisedDataset(tmp_path / "out")) == 2


@pytest.fixture
def tokenising(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The numbers of rows that were tokenised, chunk by chunk."""
    seen: list[int] = []

    def noted(tokenizer: ChatTokenizer, max_seq_len: int, lines: Sequence[Line], pairs: bool) -> Chunk:
        seen.append(len(lines))
        return encode_lines(tokenizer, max_seq_len, lines, pairs)

    monkeypatch.setattr(prepare_module, "encode_lines", noted)
    return seen


def test_a_second_job_on_the_same_data_starts_without_tokenising(
    run: Prepare, tmp_path: Path, tokenizer: ChatTokenizer, tokenising: list[int]
) -> None:
    lines = [line("a"), "nope", line("b")]
    first = run(lines, max_invalid_fraction=0.5)
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes((tmp_path / "data.jsonl").read_bytes())
    second = prepare(
        copy.as_uri(),
        tokenizer,
        max_seq_len=4096,
        out_dir=tmp_path / "second",
        cache=DataCache(tmp_path / "cache", 1 << 30),
        max_invalid_fraction=0.9,
        progress=lambda _: None,
    )
    assert tokenising == [3]
    assert second == first.model_copy(update={"uri": copy.as_uri()})
    assert TokenisedDataset(tmp_path / "second").report == second
    assert TokenisedDataset(tmp_path / "out").report == first
    for name in ("tokens.bin", "mask.bin", "offsets.bin"):
        assert (tmp_path / "out" / name).samefile(tmp_path / "second" / name)


def test_each_job_applies_its_own_limit_of_invalid_rows(run: Prepare, tokenising: list[int]) -> None:
    lines = [line("a"), "nope", line("b")]
    for allowed in (0.0, 0.1):
        with pytest.raises(DataInvalid, match=r"1 of 3 rows are invalid.*the first is line 2"):
            run(lines, max_invalid_fraction=allowed)
    assert run(lines, max_invalid_fraction=0.5).rows == 2
    assert tokenising == [3]


def test_other_content_lengths_and_templates_are_tokenised_again(
    run: Prepare, tmp_path: Path, tokenising: list[int]
) -> None:
    run([line("a")])
    run([line("b")])
    assert run([line("b")], max_seq_len=100).max_seq_len == 100
    model = make_tiny_model(tmp_path / "model")
    template = "{% for m in messages %}{{ m.role + m.content + eos_token }}{% endfor %}"
    (model / "chat_template.jinja").write_text(template)
    other = ChatTokenizer.from_dir(model)
    file = tmp_path / "data.jsonl"
    cache = DataCache(tmp_path / "cache", 1 << 30)
    prepare(file.as_uri(), other, max_seq_len=100, out_dir=tmp_path / "o", cache=cache, progress=print)
    assert tokenising == [1, 1, 1, 1]


def test_other_code_tokenises_again(run: Prepare, monkeypatch: pytest.MonkeyPatch, tokenising: list[int]) -> None:
    run([line("a")])
    monkeypatch.setattr(prepare_module, "_code", lambda: "another version")
    run([line("a")])
    assert tokenising == [1, 1]


def test_a_file_that_changes_while_it_is_read_is_refused_and_not_kept(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def append_and_digest(uri: str) -> str:
        digest = content_digest(uri)
        with (tmp_path / "data.jsonl").open("a") as file:
            file.write(line("late") + "\n")
        return digest

    monkeypatch.setattr(prepare_module, "content_digest", append_and_digest)
    with pytest.raises(UserError, match="changed while it was read") as caught:
        run([line("a")])
    assert caught.value.error.code == "data_changed"
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert not (tmp_path / "out").exists()


def test_large_files_are_tokenised_in_parallel_with_the_same_result(
    run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [line(f"{i} {PIECE}", PIECE * (i % 9)) for i in range(1500)]
    lines[700] = "nope"
    lines[900] = line(PIECE * 7000)  # a line that is longer than a chunk
    alone = run(lines, max_invalid_fraction=0.5, max_seq_len=64)
    monkeypatch.setattr(prepare_module, "_WORTH_PROCESSES", 1)
    monkeypatch.setattr(prepare_module, "usable_cores", lambda: 2)
    monkeypatch.setattr(prepare_module, "encode_lines", None)
    arguments = {"out_dir": tmp_path / "other", "cache": DataCache(tmp_path / "other-cache", 1 << 30)}
    assert run(lines, max_invalid_fraction=0.5, max_seq_len=64, **arguments) == alone
    assert alone.invalid_rows == 2
    assert [error.line for error in alone.errors] == [701, 901]
    for name in ("tokens.bin", "mask.bin", "offsets.bin"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_small_files_are_tokenised_in_this_process(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "usable_cores", lambda: 8)
    monkeypatch.setattr(prepare_module, "encode_in_parallel", None)
    assert run([line("a")] * 600).rows == 600


def test_trained_tokens_are_known_row_by_row(run: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "_COUNTED_AT_ONCE", 7)
    report = run([line("a", PIECE * (i % 5)) for i in range(40)], max_seq_len=30)
    dataset = TokenisedDataset(tmp_path / "out")
    assert dataset.trained.dtype == np.int64
    assert dataset.trained.tolist() == [dataset[i][1].sum() for i in range(40)]
    assert dataset.trained.sum() == report.trained_tokens


def test_progress_is_reported(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare_module, "_PROGRESS_S", 0.0)
    said: list[str] = []
    run([line("a")] * 10, progress=said.append)
    assert said[-1].startswith("read 10 rows (100% of the file), ")
    assert said[-1].endswith(" rows/s")


def test_the_error_with_its_report_crosses_processes(run: Prepare) -> None:
    with pytest.raises(DataInvalid) as caught:
        run(["nope"])
    copy = pickle.loads(pickle.dumps(caught.value))  # noqa: S301  -- our own bytes
    assert isinstance(copy, DataInvalid)
    assert (copy.report, copy.error) == (caught.value.report, caught.value.error)


def test_a_dataset_can_be_pickled_and_knows_its_bounds(run: Prepare, tmp_path: Path) -> None:
    run([line("a"), line("b")])
    dataset = pickle.loads(pickle.dumps(TokenisedDataset(tmp_path / "out")))  # noqa: S301  -- our own bytes
    assert np.array_equal(dataset[1][0], TokenisedDataset(tmp_path / "out")[1][0])
    with pytest.raises(IndexError):
        dataset[2]


MEASURE = """
import re, resource, sys
from pathlib import Path
from trainers.data.cache import DataCache
from trainers.data.chat import ChatTokenizer
from trainers.data.prepare import prepare
model, data, out = map(Path, sys.argv[1:])
cache = DataCache(out.with_suffix(".cache"), 1 << 30)
tokenizer = ChatTokenizer.from_dir(model)
rows = prepare(data.as_uri(), tokenizer, max_seq_len=2048, out_dir=out, cache=cache, progress=print).rows
assert "torch" not in sys.modules
# Not ru_maxrss of this process: it inherits that of the one it was forked from.
print(rows, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)  # of the largest process that tokenised
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Four times the data, about the same peaks: the 30 MB more of text are not kept; nor is 500 MB near."""
    model = make_tiny_model(tmp_path / "model")
    block = "".join(line(f"{i} " + PIECE * 40, PIECE * 10) + "\n" for i in range(500))
    peaks_mb = []
    for megabytes in (10, 40):
        copies = megabytes * 1_000_000 // len(block)
        file = tmp_path / f"{megabytes}.jsonl"
        with file.open("w") as out:
            out.writelines(block for _ in range(copies))
        command = [sys.executable, "-c", MEASURE, str(model), str(file), str(tmp_path / f"out{megabytes}")]
        result = subprocess.run(command, capture_output=True, text=True, check=True)
        said, child_kb = result.stdout.splitlines()[-2:]
        rows, peak_kb = map(int, said.split())
        assert rows == copies * 500
        peaks_mb.append((peak_kb / 1024, int(child_kb) / 1024))
    assert max(map(max, peaks_mb)) < 500
    assert all(after - before < 20 for before, after in zip(*peaks_mb, strict=True)), peaks_mb


def preference(ask: str, chosen: str = "yes", rejected: str = "no") -> str:
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {side: {"role": "assistant", "content": text} for side, text in sides.items()}
    return json.dumps({"dialog": [{"role": "user", "content": ask}], **answers})


def test_a_row_of_preferences_becomes_two_chosen_and_rejected(
    run: Prepare, tmp_path: Path, tokenizer: ChatTokenizer
) -> None:
    report = run([preference("a"), preference("b", "no", PIECE)], pairs=True)
    dataset = TokenisedDataset(tmp_path / "out")
    dialogs = [line("a", "yes"), line("a", "no"), line("b", "no"), line("b", PIECE)]
    expected = tokenizer.encode([parse_row(text.encode()) for text in dialogs])
    assert (report.rows, len(dataset)) == (2, 4)
    assert sum(report.length_histogram.values()) == 2
    for i, (ids, mask) in enumerate(expected):
        assert dataset[i][0].tolist() == ids.tolist()
        assert dataset[i][1].tolist() == mask.tolist()
    assert report.trained_tokens == sum(mask.sum() for _, mask in expected)


def test_bad_preferences_keep_their_line_numbers(run: Prepare) -> None:
    rows = [preference("a"), preference("a", "same", "same"), line("a"), preference("a", "", "no")]
    with pytest.raises(DataInvalid) as caught:
        run([*rows, preference(PIECE * 20)], pairs=True, max_seq_len=60)
    errors = {error.line: error.message for error in caught.value.report.errors}
    assert errors[2] == "chosen and rejected are the same: there is nothing to prefer"
    assert "leave extras.loss out" in errors[3]
    assert errors[5].startswith("truncation leaves nothing to train on")
    assert errors[5].endswith("(in chosen)")
    assert (caught.value.report.rows, caught.value.report.invalid_rows) == (5 - len(errors), len(errors))


def test_preferences_of_the_same_tokens_are_invalid_though_their_texts_differ(
    run: Prepare, tokenizer: ChatTokenizer, tmp_path: Path
) -> None:
    prompt = len(tokenizer.encode_prompt([{"role": "user", "content": "a"}]))
    cut = preference("a", PIECE + "yes", PIECE + "no")
    with pytest.raises(DataInvalid, match=f"leaves chosen and rejected the same, max_seq_len is {prompt + 3}"):
        run([cut], pairs=True, max_seq_len=prompt + 3)
    trimming = ChatTokenizer.from_dir(make_tiny_model(tmp_path / "trimming"))
    template = trimming.template.replace("message['content']", "message['content'] | trim")
    (tmp_path / "trimming" / "chat_template.jinja").write_text(template)
    with pytest.raises(DataInvalid, match="the same once the chat template has made text of them"):
        run([preference("a", "yes", "yes ")], pairs=True, tokenizer=ChatTokenizer.from_dir(tmp_path / "trimming"))
    assert run([cut, preference("a", "yes", "yes ")], pairs=True).rows == 2


def test_supervised_and_preference_jobs_on_one_file_share_no_tokens(run: Prepare) -> None:
    text = preference("a")
    assert run([text], pairs=True).rows == 1
    with pytest.raises(DataInvalid, match="line 1: the row has 'chosen'"):
        run([text])
