"""A data file becomes a directory of tokens, or a report of what is wrong with it."""

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from events.facts import DataReport
from tests.tiny_models import make_tiny_model
from trainers.data import prepare as prepare_module
from trainers.data.chat import ChatTokenizer
from trainers.data.dataset import TokenisedDataset
from trainers.data.dialog import parse_row
from trainers.data.prepare import DataInvalid, prepare
from trainers.errors import UserError

Prepare = Callable[..., DataReport]
PIECE = "the children read a story about the sea "


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    return ChatTokenizer.from_dir(make_tiny_model(tmp_path_factory.mktemp("model")))


@pytest.fixture
def run(tmp_path: Path, tokenizer: ChatTokenizer) -> Prepare:
    """Prepares these lines into tmp_path/out; keyword arguments replace those of `prepare`."""

    def prepare_lines(lines: list[str], **arguments: object) -> DataReport:
        file = tmp_path / "data.jsonl"
        file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        defaults = {"max_seq_len": 4096, "out_dir": tmp_path / "out", "progress": lambda _: None}
        return prepare(file.as_uri(), tokenizer, **(defaults | arguments))

    return prepare_lines


def line(ask: str, answer: str = "yes", **more: object) -> str:
    dialog = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
    return json.dumps({"dialog": dialog, **more})


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
        assert (tokens.dtype, trained.dtype) == (np.int32, np.bool_)
        assert np.array_equal(tokens, ids)
        assert np.array_equal(trained, mask)
    assert report.tokens == dataset.lengths.sum()
    assert report.trained_tokens == sum(mask.sum() for _, mask in expected)
    assert dataset.report == report


def test_rows_in_error_keep_their_line_numbers_and_order(run: Prepare) -> None:
    good = line("a")
    lines = [good, "", "nope", good, line("b", keep_loss=[False, False]), *[good] * 600, "[]"]
    with pytest.raises(DataInvalid) as caught:
        run(lines)
    report = caught.value.report
    assert [error.line for error in report.errors] == [3, 5, 606]
    assert (report.rows, report.invalid_rows) == (602, 3)
    assert str(caught.value) == (
        "3 of 605 rows are invalid; the first is line 3: the line is not JSON: expected ident at line 1 column 2"
    )


def test_the_first_twenty_errors_are_kept_and_all_are_counted(run: Prepare) -> None:
    with pytest.raises(DataInvalid) as caught:
        run([line("a"), *["nope"] * 30])
    assert len(caught.value.report.errors) == 20
    assert caught.value.report.invalid_rows == 30


def test_invalid_rows_are_left_out_where_the_job_allows_them(run: Prepare, tmp_path: Path) -> None:
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


def test_a_long_row_loses_its_end_and_is_counted(run: Prepare, tmp_path: Path) -> None:
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


def test_what_failed_leaves_nothing_behind(run: Prepare, tmp_path: Path) -> None:
    with pytest.raises(DataInvalid):
        run([line("a"), "nope"])
    assert [path.name for path in tmp_path.iterdir()] == ["data.jsonl"]


def test_what_a_killed_run_left_is_cleared_away(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / ".out-abcd").mkdir()
    (tmp_path / ".out-abcd" / "tokens.bin").write_bytes(b"half")
    run([line("a")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data.jsonl", "out"]


def test_a_directory_that_is_complete_is_kept_as_it_is(run: Prepare, tmp_path: Path) -> None:
    first = run([line("a"), line("b")])
    assert run([line("c")]) == first
    assert len(TokenisedDataset(tmp_path / "out")) == 2


def test_a_directory_that_is_incomplete_or_for_other_settings_is_replaced(run: Prepare, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "tokens.bin").write_bytes(b"half")
    assert run([line("a")]).rows == 1
    assert run([line("a"), line("b")], max_seq_len=100).rows == 2


def test_progress_says_how_far_it_is(run: Prepare, monkeypatch: pytest.MonkeyPatch) -> None:
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
import re, sys
from pathlib import Path
from trainers.data.chat import ChatTokenizer
from trainers.data.prepare import prepare
model, data, out = map(Path, sys.argv[1:])
rows = prepare(data.as_uri(), ChatTokenizer.from_dir(model), max_seq_len=2048, out_dir=out, progress=print).rows
assert "torch" not in sys.modules
# Not ru_maxrss: a process inherits that of the one it was forked from.
print(rows, re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def test_memory_does_not_grow_with_the_file(tmp_path: Path) -> None:
    """Four times the data, about the same peak: the 30 MB more of text are not kept; nor is 500 MB near."""
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
        rows, peak_kb = map(int, result.stdout.splitlines()[-1].split())
        assert rows == copies * 500
        peaks_mb.append(peak_kb / 1024)
    assert max(peaks_mb) < 500
    assert peaks_mb[1] - peaks_mb[0] < 20, peaks_mb
