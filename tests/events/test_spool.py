"""A job's log lines on disk."""

import json
import re
from pathlib import Path

import pytest

from events.spool import MAX_MESSAGE, Spool

TIME = "2026-11-22T12:00:00Z"


def lines(*messages: str) -> list[tuple[str, str]]:
    return [(TIME, message) for message in messages]


def numbered(first: int, count: int) -> list[tuple[str, str]]:
    return lines(*(f"line {number}" for number in range(first, first + count)))


def messages(spool: Spool, first: int = 0, limit: int = 10_000, max_bytes: int = 1 << 30) -> list[str]:
    return [line["message"] for line in spool.read(first, limit, max_bytes)[0]]


def test_lines_read_back_in_order_from_any_offset(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("rank-0", 0, lines("a", "b"))
    spool.append("rank-1", 0, lines("c"))
    assert messages(spool) == ["a", "b", "c"]
    assert spool.read(1, 1, 1000) == ([{"message": "b", "timestamp": TIME}], 2)
    assert spool.lines == 3


@pytest.mark.parametrize("seq", [0, 1, 2, 3])
def test_what_a_source_sends_again_is_there_once(tmp_path: Path, seq: int) -> None:
    spool = Spool(tmp_path)
    spool.append("rank-0", 0, numbered(0, 3))
    spool.append("rank-0", seq, numbered(seq, 3))
    assert messages(spool) == [f"line {number}" for number in range(seq + 3)]
    assert spool.next_seq("rank-0") == seq + 3


def test_sources_count_their_lines_apart(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("rank-0", 0, lines("a"))
    spool.append("rank-1", 0, lines("a"))
    assert messages(spool) == ["a", "a"]


@pytest.mark.parametrize("index", ["kept", "deleted", "torn"])
def test_a_reopened_spool_goes_on_where_it_was(tmp_path: Path, index: str) -> None:
    spool = Spool(tmp_path)
    for batch in range(40):
        spool.append("rank-0", batch * 100, numbered(batch * 100, 100))
    spool.append("rank-1", 0, lines("last"))
    file = tmp_path / "log.index"
    assert len(file.read_text().splitlines()) == 4
    if index == "deleted":
        file.unlink()
    elif index == "torn":
        file.write_bytes(file.read_bytes()[:-5])
    again = Spool(tmp_path)
    assert again.lines == 4001
    assert messages(again, first=2999, limit=2) == ["line 2999", "line 3000"]
    assert again.append("rank-0", 3950, numbered(3950, 60)) == [
        {"message": f"line {number}", "timestamp": TIME} for number in range(4000, 4010)
    ]
    assert again.append("rank-1", 0, lines("last")) == []
    assert messages(again, first=4000) == ["last", *(f"line {number}" for number in range(4000, 4010))]


@pytest.mark.parametrize("torn", [b'{"timestamp": "2026', b'{"a": 1}', b"\0\0\0\0", b"\0\0\n"])
def test_a_line_that_a_crash_tore_is_cut_off_and_can_be_sent_again(tmp_path: Path, torn: bytes) -> None:
    Spool(tmp_path).append("rank-0", 0, lines("a", "b"))
    with (tmp_path / "log.ndjson").open("ab") as file:
        file.write(torn)
    spool = Spool(tmp_path)
    spool.append("rank-0", 2, lines("c"))
    assert messages(spool) == messages(Spool(tmp_path)) == ["a", "b", "c"]


@pytest.mark.parametrize("lost", [b"", b"\0" * 1_000_000], ids=["cut off", "zeros"])
def test_an_index_that_knows_of_lines_the_file_has_lost_is_not_believed(tmp_path: Path, lost: bytes) -> None:
    Spool(tmp_path).append("rank-0", 0, numbered(0, 2500))
    file = tmp_path / "log.ndjson"
    file.write_bytes(b"".join(file.read_bytes().splitlines(keepends=True)[:10]) + lost)
    assert messages(Spool(tmp_path)) == [f"line {number}" for number in range(10)]
    Spool(tmp_path).append("rank-0", 10, lines(*(f"another line {number}" for number in range(10, 3010))))
    assert messages(Spool(tmp_path), first=2600, limit=1) == ["another line 2600"]


def test_a_very_long_line_is_cut_and_says_so(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("rank-0", 0, lines("x" * 1_000_000))
    assert messages(spool) == ["x" * MAX_MESSAGE + " … [cut: 1,000,000 characters]"]


def test_any_text_can_be_a_line(tmp_path: Path) -> None:
    odd = ["", "a\nb\r\x1b[2K\x00", "żółw 🐢", 'say "hi" \\', "\u2028", "half \ud83d"]
    spool = Spool(tmp_path)
    spool.append("rank-0", 0, lines(*odd))
    assert messages(spool) == messages(Spool(tmp_path)) == [*odd[:-1], "half ?"]


def test_a_read_stops_at_its_size_but_always_brings_a_line(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    spool.append("rank-0", 0, lines("x" * 1000, "y" * 1000, "z"))
    assert messages(spool, max_bytes=10) == ["x" * 1000]
    assert messages(spool, max_bytes=2200) == ["x" * 1000, "y" * 1000]


def test_the_file_is_plain_ndjson(tmp_path: Path) -> None:
    Spool(tmp_path).append("rank-0", 0, lines("a"))
    [record] = map(json.loads, (tmp_path / "log.ndjson").read_text().splitlines())
    assert record == {"timestamp": TIME, "message": "a", "source": "rank-0", "seq": 0}


def damaged(file: Path, begin: int, end: int) -> None:
    """What a power cut does to pages that the kernel hadn't written yet: the file has its size, and zeros there."""
    content = file.read_bytes()
    file.write_bytes(content[:begin] + b"\0" * (end - begin) + content[end:])


def read_to_end(spool: Spool, first: int = 0, limit: int = 10_000) -> dict[int, str]:
    """Messages by their offsets, over as many reads as it takes."""
    found: dict[int, str] = {}
    while first < spool.lines:
        some, after = spool.read(first, limit, 1 << 30)
        for line in some:
            assert line["timestamp"].startswith("20")
            found[first] = line["message"]
            first += lines_lost(line["message"]) or 1
        assert (first, bool(some)) == (after, True)
    return found


def lines_lost(message: str) -> int:
    """The number in a message that says that lines are lost; 0 for other messages."""
    said = re.fullmatch(r"\[lines of the log are lost here, at least ([\d,]+): its file is damaged\]", message)
    return int(said[1].replace(",", "")) if said else 0


@pytest.mark.parametrize("place", ["in a stretch", "at a mark", "over two marks", "at the start"])
@pytest.mark.parametrize("limit", [7, 700])
def test_lines_that_a_power_cut_took_are_told_and_all_others_keep_their_offsets(
    tmp_path: Path, place: str, limit: int, caplog: pytest.LogCaptureFixture
) -> None:
    spool = Spool(tmp_path)
    for first in range(0, 5000, 100):
        spool.append("rank-0", first, numbered(first, 100))
    file = tmp_path / "log.ndjson"
    starts = [0, *(number + 1 for number, byte in enumerate(file.read_bytes()) if byte == ord("\n"))]
    begin, end = {
        "in a stretch": (starts[1400] + 5, starts[1450] + 5),
        "at a mark": (starts[1990] + 5, starts[2010] + 5),
        "over two marks": (starts[1990] + 5, starts[3010] + 5),
        "at the start": (0, 4096),
    }[place]
    damaged(file, begin, end)
    lost = {number for number in range(5000) if starts[number] < end and starts[number + 1] > begin}
    again = Spool(tmp_path)
    assert again.lines == 5000
    found = read_to_end(again, limit=limit)
    assert {offset: message for offset, message in found.items() if message.startswith("line ")} == {
        offset: f"line {offset}" for offset in range(5000) if offset not in lost
    }
    gaps = [message for message in found.values() if not message.startswith("line ")]
    assert sum(map(lines_lost, gaps)) == len(lost)
    assert len(caplog.messages) == len(gaps)  # however often they are read
    assert again.read(4990, 1, 1000)[1] == 4991
    assert again.append("rank-0", 4950, numbered(4950, 60))[0]["message"] == "line 5000"
    assert read_to_end(Spool(tmp_path), 4998) == {offset: f"line {offset}" for offset in range(4998, 5010)}


def test_a_log_without_an_index_is_read_beyond_what_is_damaged(tmp_path: Path) -> None:
    Spool(tmp_path).append("rank-0", 0, numbered(0, 3000))
    (tmp_path / "log.index").unlink()
    damaged(tmp_path / "log.ndjson", 4096, 8192)
    found = list(read_to_end(Spool(tmp_path)).values())
    assert (found[0], found[-1]) == ("line 0", "line 2999")
    assert len([message for message in found if lines_lost(message)]) == 1


@pytest.mark.parametrize("mark", [b"\0" * 40 + b"\n", b"{}\n", b"[]\n", b'{"offset": "a", "byte": 7, "sources": {}}\n'])
def test_marks_that_a_power_cut_damaged_are_passed_over(tmp_path: Path, mark: bytes) -> None:
    spool = Spool(tmp_path)
    for first in range(0, 5000, 100):
        spool.append("rank-0", first, numbered(first, 100))
    index = tmp_path / "log.index"
    marks = index.read_bytes().splitlines(keepends=True)
    index.write_bytes(b"".join([marks[0], mark, *marks[2:]]))
    assert messages(Spool(tmp_path)) == [f"line {number}" for number in range(5000)]
