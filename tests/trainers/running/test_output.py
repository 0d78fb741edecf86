"""Everything that a process prints, by any means, arrives line by line."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

CAPTURE = """
import json, logging, os, subprocess, sys, threading, time, warnings
from trainers.running.output import OutputCapture
delivered = []
def sink(lines):
    delivered.extend([message for _, message in lines])
capture = OutputCapture(sink)
{body}
capture.close()
print(json.dumps(delivered))
"""


def captured(body: str) -> list[str]:
    """The lines that a process running `body` delivers to its sink."""
    program = CAPTURE.format(body=textwrap.dedent(body))
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    lines: list[str] = json.loads(done.stdout)
    return lines


def test_print_logging_warnings_subprocesses_and_c_code_arrive_in_the_order_they_were_written() -> None:
    lines = captured(
        """
        print("from print")
        print("from stderr", file=sys.stderr)
        logging.warning("from logging")
        subprocess.run(["echo", "from a subprocess"])
        os.write(2, b"from C\\n")
        warnings.warn("from warnings")
        """
    )
    assert lines[:5] == ["from print", "from stderr", "WARNING:root:from logging", "from a subprocess", "from C"]
    assert any("from warnings" in line for line in lines)


def test_a_line_without_an_end_is_delivered_at_close() -> None:
    assert captured("sys.stdout.write('no newline')") == ["no newline"]


def test_a_progress_bar_leaves_its_last_state() -> None:
    assert captured("print('\\r 10%\\r 50%\\r100%')") == ["100%"]


def test_bytes_that_are_not_utf8_do_not_stop_it() -> None:
    assert captured("os.write(1, b'caf\\xe9\\n'); print('after')") == ["caf\ufffd", "after"]


def test_a_line_of_any_length_is_delivered_in_pieces_of_bounded_size() -> None:
    lines = captured("print('x' * 300_000)")
    assert sum(map(len, lines)) == 300_000
    assert max(map(len, lines)) <= 2 * 64 * 1024


def test_ten_thousand_lines_from_four_threads_all_arrive() -> None:
    lines = captured(
        """
        def write(name):
            for i in range(2500):
                os.write(1, f"{name} {i}\\n".encode())
        threads = [threading.Thread(target=write, args=(name,)) for name in "abcd"]
        [thread.start() for thread in threads]
        [thread.join() for thread in threads]
        """
    )
    for name in "abcd":
        assert [line for line in lines if line.startswith(name)] == [f"{name} {i}" for i in range(2500)]


def test_a_line_is_delivered_while_the_process_goes_on() -> None:
    lines = captured(
        """
        print("now")
        deadline = time.monotonic() + 30
        while not delivered and time.monotonic() < deadline:
            time.sleep(0.001)
        delivered.append("seen" if delivered else "late")
        """
    )
    assert lines == ["now", "seen"]


def test_after_a_flush_every_line_so_far_has_been_handed_over() -> None:
    lines = captured(
        """
        for number in range(200):
            print(number)
            if number % 50 == 7:
                capture.flush()
                seen = len(delivered)
                print(f"{number} {seen}")
        """
    )
    assert [line for line in lines if " " in line] == ["7 8", "57 59", "107 110", "157 161"]


def test_a_child_that_keeps_the_pipe_open_does_not_hold_up_the_end() -> None:
    assert captured(
        "child = subprocess.Popen(['sleep', '30']); print('done')\nimport atexit; atexit.register(child.kill)"
    ) == ["done"]


def test_when_the_sink_fails_the_lines_go_to_the_original_stderr(tmp_path: Path) -> None:
    program = textwrap.dedent(
        """
        from trainers.running.output import OutputCapture
        def sink(lines):
            raise ConnectionError("log is gone")
        capture = OutputCapture(sink)
        print("precious")
        capture.close()
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert "precious" in done.stderr
    assert "log is gone" in done.stderr


def test_a_process_whose_output_goes_to_a_file_is_captured_too(tmp_path: Path) -> None:
    log = tmp_path / "process.log"
    program = CAPTURE.format(body="print('hello')")
    with log.open("w") as file:
        subprocess.run([sys.executable, "-c", program], stdout=file, stderr=file, check=True, timeout=60)
    assert json.loads(log.read_text()) == ["hello"]


@pytest.mark.parametrize("tee", [True, False])
def test_with_tee_the_original_stdout_gets_everything_too(tee: bool) -> None:
    program = (
        "from trainers.running.output import OutputCapture\n"
        f"capture = OutputCapture(lambda lines: None, tee={tee})\n"
        "print('hello')\n"
        "capture.close()"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == ("hello\n" if tee else "")


@pytest.mark.parametrize("sink", ["print_nothing", "fail"])
def test_a_full_disk_behind_the_original_output_does_not_stop_the_process(sink: str) -> None:
    program = textwrap.dedent(
        f"""
        import os
        from trainers.running.output import OutputCapture
        delivered = []
        def print_nothing(lines):
            delivered.extend(lines)
        def fail(lines):
            delivered.extend(lines)
            raise ConnectionError("log is gone")
        report = os.dup(1)
        full = os.open("/dev/full", os.O_WRONLY)
        os.dup2(full, 1), os.dup2(full, 2)
        capture = OutputCapture({sink}, tee=True)
        for _ in range(20):
            os.write(1, b"x" * 16383 + b"\\n")  # several times what a pipe holds
        capture.close()
        os.write(report, str(len(delivered)).encode())
        """
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "20"


def test_a_process_with_a_thousand_open_files_is_captured_too() -> None:
    program = CAPTURE.replace("capture = ", "many = [os.dup(0) for _ in range(1100)]\ncapture = ", 1)
    program = "import resource\nresource.setrlimit(resource.RLIMIT_NOFILE, (2000, 2000))\n" + program
    body = 'print("one"); time.sleep(0.2); print("two")'
    done = subprocess.run(
        [sys.executable, "-c", program.format(body=body)], capture_output=True, text=True, check=True, timeout=60
    )
    assert json.loads(done.stdout) == ["one", "two"]
