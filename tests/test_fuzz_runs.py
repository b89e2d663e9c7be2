"""Folders of runs that were altered since: measured again, gone on with or compared, or one clear line; never a traceback."""

import copy
import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from limbeck import recipe as schema
from limbeck.cli import main
from limbeck.engine.callbacks import read_log
from limbeck.errors import UserError
from limbeck.recorded import recipe_of, summary_of
from limbeck.report.card import model_card
from limbeck.report.page import Report, render_report
from limbeck.report.tables import run_table
from limbeck.run import execute
from limbeck.saved import measure, open_saved
from limbeck.trials import finished
from tests.conftest import TINY
from tests.fuzzing import altered, calm, fuzz, in_time, little_memory, twisted

RAW = {
    **copy.deepcopy(TINY),
    "method": "alone",
    "data": {"source": "digits", "train": 60, "test": 40},
    "training": {"steps": 2, "batch": 16},
    "teacher": {},
    "baseline": False,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run, and the bytes of its files."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    execute(schema.resolve(RAW), folder, report=False)
    return folder, {name: (folder / name).read_bytes() for name in ("summary.json", "log.jsonl", "recipe.yaml", "student/config.json")}


def with_file(run, name, content, function, *args, **named):
    folder, files = run
    (folder / name).write_bytes(content)
    try:
        with little_memory(2 << 30):
            return calm(function, *args, **named)
    finally:
        (folder / name).write_bytes(files[name])


def shown(folder):
    """What reads a summary and shows it."""
    summary = summary_of(folder)
    run_table(summary)
    model_card(summary, "")
    return summary


def bent(data, content, name):
    if name.endswith(".json") and data.draw(st.booleans()):
        return json.dumps(data.draw(twisted(json.loads(content)))).encode("utf-8", "surrogatepass")
    return data.draw(altered(content))


@given(data=st.data())
@fuzz(120)
def test_summaries(run, data):
    content = bent(data, run[1]["summary.json"], "summary.json")
    found = with_file(run, "summary.json", content, shown, run[0])
    assert isinstance(found, UserError) or found["metrics"]["student"][found["primary"]] is not None


@given(data=st.data())
@fuzz(150)
def test_logs(run, data):
    content = bent(data, run[1]["log.jsonl"], "log.jsonl")
    found = with_file(run, "log.jsonl", content, read_log, run[0] / "log.jsonl")
    assert not isinstance(found, UserError) and all(isinstance(record, dict) for record in found)


@given(record=twisted(
    {"phase": "student", "step": 1, "terms": {"ce": {"value": 1.0, "share": 1.0}}, "metrics": {"accuracy": 0.5}, "alarm": "x", "rate": 1.0}
))  # fmt: skip
@fuzz(6, 0.05)
def test_logs_on_a_page(tmp_path_factory, record):
    path = tmp_path_factory.getbasetemp() / "log.jsonl"
    path.write_bytes((json.dumps(record) + "\n").encode("utf-8", "surrogatepass") * 2)
    with in_time(60):
        calm(render_report, Report("x", {"method": "m", "metrics": {"student": {"accuracy": 0.1}}}, read_log(path)))


@given(data=st.data())
@fuzz(60)
def test_recipes_of_runs(run, data):
    content = data.draw(altered(run[1]["recipe.yaml"]))
    with_file(run, "recipe.yaml", content, recipe_of, run[0])


@given(data=st.data())
@fuzz(25, 0.1)
def test_measured_again(run, data):
    name = data.draw(st.sampled_from(["summary.json", "student/config.json", "recipe.yaml"]))
    content = bent(data, run[1][name], name)
    with_file(run, name, content, lambda: measure(open_saved(run[0])))


@given(data=st.data())
@fuzz(8, 0.03)
def test_gone_on_with(run, data, tmp_path_factory):
    """`limbeck compare` finds a run of its own in which something was altered."""
    folder = tmp_path_factory.mktemp("again") / "run"
    shutil.copytree(run[0], folder)
    if data.draw(st.booleans()):
        (folder / "summary.json").unlink()
    names = [str(p.relative_to(folder)) for p in sorted(folder.rglob("*")) if p.is_file() and not p.name.startswith(".")]
    name = data.draw(st.sampled_from(names))
    (folder / name).write_bytes(data.draw(altered((folder / name).read_bytes())))
    with little_memory(2 << 30):
        found = calm(finished, folder, schema.resolve(RAW))
    assert isinstance(found, UserError) or "student" in found["metrics"]
    shutil.rmtree(folder.parent)


@pytest.mark.parametrize("content", [b"", b"[]", b"{", b"null", b"\xff", b"[" * 100_000, b'{"metrics": {"student": {}}}'])
def test_evaluate_and_export(run, content, capsys):
    folder, files = run
    for name in ("summary.json", "student/config.json"):
        (folder / name).write_bytes(content)
        try:
            for arguments in (["evaluate", str(folder)], ["export", str(folder), "--format", "safetensors"]):
                assert main(arguments) == 2
                lines = capsys.readouterr().err.splitlines()
                assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: "), lines
                assert name.rpartition("/")[2] in lines[0]
        finally:
            (folder / name).write_bytes(files[name])
