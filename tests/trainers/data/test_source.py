"""Where data may be read from, and how files are split into lines."""

import os
from pathlib import Path

import fsspec
import pytest

from trainers.data import source
from trainers.data.dialog import MAX_ROW_BYTES
from trainers.data.source import check_data_uri, data_size, open_lines
from trainers.errors import InfrastructureError, UserError
from trainers.settings import Settings


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A data root with one file, and beside it a directory that is none."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.jsonl").write_text("{}\n")
    inside = tmp_path / "root"
    inside.mkdir()
    (inside / "a b.jsonl").write_text("{}\n")
    return inside


@pytest.fixture
def settings(root: Path) -> Settings:
    return Settings(data_roots=(root,))


def code_of(uri: str, settings: Settings) -> str:
    with pytest.raises(UserError) as caught:
        check_data_uri(uri, settings)
    return caught.value.error.code


def lines_of(path: Path, data: bytes) -> list[tuple[int, bytes]]:
    path.write_bytes(data)
    return list(open_lines(path.as_uri()))


class TestCheckDataUri:
    def test_every_spelling_of_a_local_path_gets_one_normal_form(self, root: Path, settings: Settings) -> None:
        file = root / "a b.jsonl"
        normal = file.as_uri()
        for spelling in (
            "a b.jsonl",
            "./x/../a b.jsonl",
            str(file),
            f"file://{file}",
            normal,
            f"file://localhost{file}",
        ):
            assert check_data_uri(spelling, settings) == normal

    def test_a_file_whose_name_is_no_utf8_can_be_read_through_a_link(self, root: Path, settings: Settings) -> None:
        odd = os.fsdecode(os.fsencode(root) + b"/caf\xe9.jsonl")
        Path(odd).write_text("{}\n")
        (root / "link").symlink_to(odd)
        assert list(open_lines(check_data_uri("link", settings))) == [(1, b"{}")]

    def test_the_normal_form_can_be_read(self, settings: Settings) -> None:
        uri = check_data_uri("a b.jsonl", settings)
        assert list(open_lines(uri)) == [(1, b"{}")]
        assert data_size(uri) == 3

    def test_a_relative_path_is_looked_up_in_every_root(self, root: Path, tmp_path: Path) -> None:
        both = Settings(data_roots=(root, tmp_path / "outside"))
        assert check_data_uri("secret.jsonl", both) == (tmp_path / "outside" / "secret.jsonl").as_uri()

    @pytest.mark.parametrize("uri", ["s3://bucket/a.jsonl", "gs://bucket/a.jsonl", "hf://datasets/o/n@main/a.jsonl"])
    def test_remote_uris_are_taken_without_a_look(self, uri: str, settings: Settings) -> None:
        assert check_data_uri(uri, settings) == uri

    @pytest.mark.parametrize(
        "uri", ["../outside/secret.jsonl", "/etc/passwd", "file:///etc/passwd", "/no/such/file", "/"]
    )
    def test_paths_outside_the_roots_are_refused_whether_they_exist_or_not(self, uri: str, settings: Settings) -> None:
        assert code_of(uri, settings) == "path_outside_roots"

    def test_percent_signs_do_not_lead_out(self, settings: Settings, root: Path) -> None:
        assert code_of(f"file://{root}/%2e%2e/outside/secret.jsonl", settings) == "path_outside_roots"

    @pytest.mark.parametrize("directory", [False, True])
    def test_a_link_that_leads_out_is_refused(self, root: Path, settings: Settings, directory: bool) -> None:
        outside = root.parent / "outside"
        (root / "link").symlink_to(outside if directory else outside / "secret.jsonl")
        assert code_of("link/secret.jsonl" if directory else "link", settings) == "path_outside_roots"

    def test_a_link_that_stays_inside_is_followed(self, root: Path, settings: Settings) -> None:
        (root / "link").symlink_to(root / "a b.jsonl")
        assert check_data_uri("link", settings) == (root / "a b.jsonl").as_uri()

    def test_a_loop_of_links_is_not_found(self, root: Path, settings: Settings) -> None:
        (root / "loop").symlink_to(root / "loop")
        assert code_of("loop", settings) == "data_not_found"

    @pytest.mark.parametrize("uri", ["missing.jsonl", "a\0b", "x" * 300, "a b.jsonl/c"])
    def test_a_missing_file_is_named(self, uri: str, settings: Settings) -> None:
        assert code_of(uri, settings) == "data_not_found"

    def test_a_directory_is_refused(self, root: Path, settings: Settings) -> None:
        (root / "sub").mkdir()
        assert code_of("sub", settings) == "data_is_directory"

    def test_a_pipe_is_refused(self, root: Path, settings: Settings) -> None:
        os.mkfifo(root / "pipe")
        assert code_of("pipe", settings) == "data_not_a_file"

    def test_an_empty_file_is_refused(self, root: Path, settings: Settings) -> None:
        (root / "empty").touch()
        assert code_of("empty", settings) == "data_empty"

    @pytest.mark.parametrize(
        "uri",
        [
            *("http://x/a.jsonl", "ftp://x/a", "file://host/a", "x://a"),
            *("simplecache::s3://b/a", "s3://b/a::b", "gs://b/a::file:///etc/passwd"),
        ],
    )
    def test_other_schemes_are_refused(self, uri: str, settings: Settings) -> None:
        assert code_of(uri, settings) == "unsupported_scheme"

    def test_credentials_are_refused_and_not_repeated(self, settings: Settings) -> None:
        with pytest.raises(UserError) as caught:
            check_data_uri("s3://AKIA:hunter2@bucket/a.jsonl", settings)
        assert caught.value.error.code == "credentials_in_uri"
        assert "hunter2" not in str(caught.value)

    def test_a_remote_uri_without_a_file_is_refused(self, settings: Settings) -> None:
        assert code_of("s3://", settings) == "data_not_found"


class TestOpenLines:
    def test_blank_lines_are_skipped_and_counted(self, tmp_path: Path) -> None:
        assert lines_of(tmp_path / "f", b"a\n\n  \r\nb\n\nc") == [(1, b"a"), (4, b"b"), (6, b"c")]

    def test_a_byte_order_mark_and_dos_line_ends_are_taken_off(self, tmp_path: Path) -> None:
        assert lines_of(tmp_path / "f", b"\xef\xbb\xbfa\r\nb\r\n") == [(1, b"a"), (2, b"b")]
        assert lines_of(tmp_path / "f", b"\xef\xbb\xbfa\n\xef\xbb\xbf\n\xef\xbb\xbfb") == [(1, b"a"), (3, b"b")]

    @pytest.mark.parametrize("block", [1, 2, 3, 5, 64])
    def test_lines_do_not_depend_on_where_blocks_end(
        self, tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source, "_BLOCK_BYTES", block)
        data = b"one\n\ntwo\r\nthree\nfour"
        assert lines_of(tmp_path / "f", data) == [(1, b"one"), (3, b"two"), (4, b"three"), (5, b"four")]

    def test_a_line_without_end_is_cut(self, tmp_path: Path) -> None:
        lines = lines_of(tmp_path / "f", b"a\n" + b"x" * (2 * MAX_ROW_BYTES) + b"\nb\n")
        assert [(number, len(line)) for number, line in lines] == [(1, 1), (2, MAX_ROW_BYTES + 1), (3, 1)]

    @pytest.mark.parametrize("length", [9, 10, 11, 25, 38, 100])
    def test_no_more_of_a_long_line_is_given_than_shows_that_it_is_too_long(
        self, tmp_path: Path, length: int, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(source, "MAX_ROW_BYTES", 10)
        monkeypatch.setattr(source, "_BLOCK_BYTES", 40)
        lines = lines_of(tmp_path / "f", b"a\n" + b"x" * length + b"\nb\n" + b"y" * length)
        kept = min(length, 11)
        assert [len(line) for _, line in lines] == [1, kept, 1, kept]

    def test_any_file_system_of_fsspec_is_read(self) -> None:
        uri = "memory://test_source/a.jsonl"
        with fsspec.open(uri, "wb") as file:
            file.write(b"a\nb\n")
        assert list(open_lines(uri)) == [(1, b"a"), (2, b"b")]
        assert data_size(uri) == 4

    def test_a_missing_object_is_a_users_error(self) -> None:
        with pytest.raises(UserError) as caught:
            list(open_lines("memory://test_source/missing.jsonl"))
        assert caught.value.error.code == "data_not_found"
        assert data_size("memory://test_source/missing.jsonl") is None

    def test_an_empty_object_is_a_users_error(self) -> None:
        with fsspec.open("memory://test_source/empty.jsonl", "wb") as file:
            file.write(b"")
        with pytest.raises(UserError) as caught:
            list(open_lines("memory://test_source/empty.jsonl"))
        assert caught.value.error.code == "data_empty"

    def test_a_storage_that_does_not_answer_is_not_the_users_fault(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")  # the discard port: nobody listens
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "AKIAEXAMPLE")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hunter2")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        with pytest.raises(InfrastructureError) as caught:
            list(open_lines("s3://bucket/a.jsonl"))
        assert caught.value.error.code == "data_unreachable"
        assert "hunter2" not in str(caught.value)
