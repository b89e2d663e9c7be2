"""The log of answers: what a kill leaves behind, what an altered byte does, one writer at a time."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from limbeck.endpoint import Answer, Endpoint, EndpointSettings, Request, ResponseLog, TokenLog
from limbeck.endpoint.answers import answer_of
from limbeck.errors import UserError


def record(number, text="said", logs=None):
    fields = {"key": f"{number:016x}", "id": f"id{number}", "model": "tiny", "text": f"{text} {number}", "finish_reason": "stop"}
    return {**fields, "prompt_tokens": 3, "completion_tokens": None, "logprobs": logs, "seconds": 0.25}


def write(path, records):
    log = ResponseLog(path)
    with log.writing():
        assert all(log.append(one) for one in records)
    return path.read_bytes()


CONTENT = [record(n, "words that matter") for n in range(4)]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The bytes of a log with `CONTENT`; written once, because every line is synced."""
    return write(tmp_path_factory.mktemp("written") / "log.jsonl", CONTENT)


def read(path):
    log = ResponseLog(path)
    log.read()
    return {one["key"]: one for one in log.records()}


def test_what_was_written_is_read(tmp_path):
    path = tmp_path / "deep" / "log.jsonl"
    odd = [record(0, "líne\nfeed \u2028 \ud800 \x00"), record(1, logs=[TokenLog("a", -0.5, (("a", -0.5), ("b", -1e-300)))])]
    content = write(path, odd)
    found = read(path)
    assert content.count(b"\n") == 2 and found[odd[0]["key"]] == odd[0]
    assert answer_of("me", found[odd[1]["key"]]) == Answer("me", "said 1", "stop", 3, None, odd[1]["logprobs"])
    assert all(json.loads(line)["sha256"] for line in content.splitlines())


def test_append_outside_writing_is_refused_and_the_first_of_two_answers_holds(tmp_path):
    log = ResponseLog(tmp_path / "log.jsonl")
    assert not log.append(record(0)) and not log.path.exists() and len(log) == 0
    write(log.path, [record(0), record(0, "other")])
    assert read(log.path) == {record(0)["key"]: record(0)}


def test_a_torn_last_line_is_dropped_noted_and_cut_off(tmp_path):
    path = tmp_path / "log.jsonl"
    content = write(path, [record(n) for n in range(3)])
    first = content.index(b"\n") + 1
    for cut in range(first, 2 * first):
        path.write_bytes(content[:cut])
        assert list(read(path)) == [record(0)["key"]] and path.read_bytes() == content[:cut]  # a reader changes nothing
        log = ResponseLog(path)
        with log.writing():
            assert log.append(record(7)) and (log.note is None) == (cut == first)
        assert list(read(path)) == [record(0)["key"], record(7)["key"]]


def test_an_altered_line_names_file_and_line(tmp_path):
    path = tmp_path / "log.jsonl"
    content = write(path, [record(n) for n in range(3)])
    path.write_bytes(content.replace(b"said 1", b"sung 1"))
    with pytest.raises(UserError, match=r"log\.jsonl, line 2 is not an answer as it was written.*restore the file, or delete that line"):
        read(path)
    settings = EndpointSettings("http://127.0.0.1:9/v1", "tiny")
    with pytest.raises(UserError, match="line 2"):
        Endpoint(settings, path).ask([Request("a", "b")])
    with pytest.raises(UserError, match="line 2"):
        Endpoint(settings, path).estimate([Request("a", "b")])
    path.write_bytes(b'{"foreign": 1}\n')
    with pytest.raises(UserError, match="line 1"):
        read(path)
    path.write_bytes(content)
    assert len(read(path)) == 3  # the lock was given back, nothing was changed


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_mutation_of_bytes_gives_a_wrong_answer(tmp_path, written, data):
    path = tmp_path / "log.jsonl"
    content = bytearray(written)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, max(0, len(content) - 1)))
        kind = data.draw(st.sampled_from(["set", "flip", "insert", "delete", "cut", "copy", "swap"]))
        other = data.draw(st.integers(0, max(0, len(content) - 1)))
        if not content:
            break
        if kind == "set":
            content[at] = data.draw(st.integers(0, 255))
        elif kind == "flip":
            content[at] ^= 1 << data.draw(st.integers(0, 7))
        elif kind == "insert":
            content[at:at] = data.draw(st.binary(min_size=1, max_size=4))
        elif kind == "delete":
            del content[at : at + data.draw(st.integers(1, 400))]
        elif kind == "cut":
            del content[at:]
        elif kind == "copy":
            content[at:at] = content[other : other + 50]
        else:
            content[at], content[other] = content[other], content[at]
    path.write_bytes(bytes(content))
    truth = {one["key"]: one for one in CONTENT}
    try:
        found = read(path)
    except UserError as error:
        assert "log.jsonl, line" in str(error)
    else:
        assert found.items() <= truth.items()


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10**6), byte=st.integers(0, 255))
def test_one_changed_byte_before_the_last_line_is_always_seen(tmp_path, written, at, byte):
    path = tmp_path / "log.jsonl"
    content = bytearray(written)
    at %= content.rindex(b"\n", 0, len(content) - 1)
    if content[at] == byte:
        return
    content[at] = byte
    path.write_bytes(bytes(content))
    with pytest.raises(UserError, match="line"):
        read(path)


def test_lines_of_another_writer_are_seen_and_a_replaced_file_is_read_anew(tmp_path):
    path = tmp_path / "log.jsonl"
    log = ResponseLog(path)
    log.read()
    assert len(log) == 0
    write(path, [record(0)])
    log.read()
    assert record(0)["key"] in log
    path.unlink()
    write(path, [record(1), record(2)])
    log.read()
    assert {one["id"] for one in log.records()} == {"id1", "id2"}
    path.unlink()
    log.read()
    assert len(log) == 0


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"), ResponseLog(tmp_path / "file" / "log").writing():
        pass
    (tmp_path / "folder").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        ResponseLog(tmp_path / "folder").read()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    path = tmp_path / "log.jsonl"
    log, whole = ResponseLog(path), os.write
    with log.writing():
        log.append(record(0))
        with monkeypatch.context() as patch:
            calls = []

            def full(file, content):
                calls.append(1)
                if len(calls) == 1:
                    return whole(file, content[:20])
                raise OSError(28, "No space left on device")

            patch.setattr(os, "write", full)
            with pytest.raises(UserError, match=r"the disk is full at the log .*log\.jsonl: No space left"):
                log.append(record(1))
        assert log.append(record(2))
    assert [one["id"] for one in read(path).values()] == ["id0", "id2"]


PROGRAM = """
import sys
sys.path.insert(0, {tests!r})
from test_endpoint_log import record
from limbeck.endpoint import ResponseLog
log = ResponseLog({path!r})
with log.writing():
    print("go", flush=True)
    for n in range(len(log), 10**6):
        log.append(record(n, "x" * 5000))
"""


def test_a_kill_at_any_moment_loses_nothing_that_was_kept(tmp_path):
    path, before = tmp_path / "log.jsonl", 0
    program = PROGRAM.format(tests=os.path.dirname(__file__), path=str(path))
    for turn in range(2):
        writer = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        assert writer.stdout.readline() == b"go\n"
        if turn == 0:
            with pytest.raises(UserError, match="another run"), ResponseLog(path).writing():
                pass
        time.sleep(0.15)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        writer.stdout.close()
        found = read(path)
        assert len(found) > before and list(found.values()) == [record(n, "x" * 5000) for n in range(len(found))]
        before = len(found)
