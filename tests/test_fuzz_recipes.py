"""Recipes and overrides that nobody would write: a checked recipe or one clear line, never a traceback, never a hang."""

import copy
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from limbeck import models
from limbeck import recipe as schema
from limbeck.cli import main
from limbeck.data.augment import Augment
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.method import make
from limbeck.storage import fingerprint
from limbeck.trials import parse_arm
from tests.conftest import TINY, TINY_PAIRS, TINY_TEXT
from tests.fuzzing import SCALARS, VALUES, altered, calm, fuzz, in_time, little_memory, places, twisted

RICH = {
    **TINY,
    "stages": [{"name": "one", "training": {"steps": 3}, "data": {"labelled": 10}}, {"method": "alone"}],
    "evaluation": {"every": 1, "patience": 2, "attack": {"eps": 0.1, "step": 0.01}},
    "structure": {"budget": {"params": "40%"}},
    "generate": {"steps": [1, 2], "interval": [0.1, 2.0]},
    "condense": {"per_class": 1, "students": {"steps": 3}, "networks": ["cnn"], "baselines": ["random-real"]},
    "scene": {"rivals": ["kd"], "label": 3},
    "checkpoints": {"every_steps": 2},
}
TEXTS = [path.read_bytes() for path in schema.embedded().values()] + [yaml.safe_dump(RICH).encode()]
RAW = [TINY, TINY_TEXT, TINY_PAIRS, RICH]


def written_and_read(recipe):
    """A recipe that was taken can be written, read again as the same, fingerprinted and put into JSON."""
    if not isinstance(recipe, schema.Recipe):
        return
    text = recipe.to_yaml()
    again = schema.resolve(schema.parse_yaml(text, "again"))
    assert again.to_yaml() == text
    fingerprint(recipe.data_as_written())
    text.encode("utf-8")


@given(data=st.data())
@fuzz(150)
def test_bytes(data, tmp_path_factory):
    content = data.draw(altered(data.draw(st.sampled_from(TEXTS))))
    path = tmp_path_factory.getbasetemp() / "fuzz.yaml"
    path.write_bytes(content)
    calm(lambda: written_and_read(schema.load(path)))


@given(data=st.data())
@fuzz(200)
def test_structure(data):
    raw = data.draw(twisted(data.draw(st.sampled_from(RAW))))
    calm(lambda: written_and_read(schema.resolve(raw)))


@given(content=st.binary(max_size=200) | st.text(max_size=100).map(lambda t: t.encode("utf-8", "surrogatepass")))
@fuzz(150)
def test_any_bytes(content):
    calm(lambda: written_and_read(schema.resolve(schema.parse_yaml(content.decode("utf-8", "replace"), "fuzz"))))


def dotted(raw):
    return st.sampled_from([".".join(map(str, place)) for place in places(raw) if place])


CHANGES = st.one_of(
    st.tuples(dotted(RICH), VALUES.map(lambda v: yaml.safe_dump(v, default_flow_style=True) if "\ud800" not in str(v) else "\ud800")).map(
        "=".join
    ),
    st.tuples(dotted(RICH), st.text(max_size=12)).map("=".join),
    st.text(max_size=20),
    st.sampled_from(
        [
            "=",
            "a",
            ".=1",
            "data.=1",
            "stages.0.x.y=1",
            "stages.-1=1",
            "stages.99=1",
            "stages.00.name=x",
            "method.id.x=1",
            "seed.x=1",
            "data=&a [*a]",
            "data=[",
            "data={a: 1, a: 2}",
            "name=!!python/object/apply:os.system [id]",
            "\0=\0",
        ]
    ),
)


@given(changes=st.lists(CHANGES, min_size=1, max_size=3))
@fuzz(250)
def test_overrides(changes):
    before = copy.deepcopy(RICH)
    calm(lambda: written_and_read(schema.resolve(RICH, changes=changes)))
    assert before == RICH, "an override changed what it was given"


@given(text=st.text(max_size=20) | CHANGES.map("kd@".__add__) | CHANGES.map(lambda c: c.replace(".", ";")))
@fuzz(100)
def test_arms_of_a_comparison(text):
    calm(parse_arm, text)


BOMB = "data:\n args:\n  a0: &a0 [x, x]\n" + "".join(f"  a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40))


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (BOMB, "values"),
        ("data:\n args: &a\n  x: *a\n", "inside itself"),
        ("stages: &a [*a]", "inside itself"),
        ("data: {args: {a: " + "[" * 20000 + "]" * 20000 + "}}", "inside each other"),
        ("student: {model: cnn, train: " + "{first: " * 400 + "{steps: 3}" + "}" * 400 + "}", "inside each other"),
        ("seed: 0x" + "f" * 100_000, "64 bits"),
        ("seed: " + ":".join(["59"] * 50_000), "64 bits"),
        ("seed: 99999999999999999999", "64 bits"),
        ("data: {args: {a: !!binary /w==}}", "binary"),
        ("data: {args: {a: !!set {x, y}}}", "set"),
        ("name: !!timestamp 2020-01-01", "timestamp"),
        ('name: "a\\0b"', "x00"),
        ('name: "a\\ud800b"', "ud800"),
        ('name: "\\e[31mred"', "x1b"),
        ("about: " + "x" * 300_000, "characters"),
        ("training: {epochs: .inf}", "epochs"),
        ("training: {lr: .nan}", "lr"),
        ("data: 'csv:" + "a" * 5000 + "'", "name"),
        ("data: csv:~nobody-of-that-name/x.csv", "home"),
    ],
)
def test_what_blows_up_is_refused_at_once(text, word):
    with in_time(5), little_memory(), pytest.raises(UserError, match=word):
        schema.resolve(schema.parse_yaml(text, "r.yaml"))


@pytest.mark.parametrize(
    "word", ["1e3", "1E-5", "2020-01-01", "yes", "null", "0x1f", "1:30", "~", "&a", "*a", "- x", "é\u2028x", " x ", "#", "'"]
)
def test_words_stay_words_when_a_recipe_is_written(word):
    recipe = schema.resolve({**TINY, "name": word, "student": {"model": "mlp", "args": {"widths": word}}})
    again = schema.resolve(schema.parse_yaml(recipe.to_yaml(), "again"))
    assert again == recipe and again.name == word


def test_a_part_used_twice_is_written_twice():
    raw = schema.parse_yaml("a: &x {b: [1]}\nc: *x\n", "r")
    assert raw == {"a": {"b": [1]}, "c": {"b": [1]}}
    recipe = schema.resolve(schema.parse_yaml("student: {model: cnn, args: {a: &x [1], b: *x}}", "r"))
    assert "&" not in recipe.to_yaml()


@pytest.mark.parametrize(
    "content", [BOMB.encode(), b"\xff\xfe\0", b"name: \x1b[31m", b"- 1", b"", b"\xef\xbb\xbfname: 1e3", b"a: b: c", b"? [a]\n: 1"]
)
def test_command_line(content, tmp_path, capsys):
    file = tmp_path / "r.yaml"
    file.write_bytes(content)
    assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[0].startswith("error: ") and lines[1].startswith("hint: ")
    assert all(line.isprintable() for line in lines) and not (tmp_path / "out").exists()


def test_a_real_command_line(tmp_path):
    (tmp_path / "\x1b[31mr.yaml").write_bytes(BOMB.encode())
    done = subprocess.run([sys.executable, "-m", "limbeck", "run", "\x1b[31mr.yaml"], cwd=tmp_path, capture_output=True, timeout=60)
    assert done.returncode == 2 and b"\x1b" not in done.stderr and done.stderr.startswith(b"error: \\x1b[31mr.yaml, line")
    assert done.stderr.count(b"\n") == 2


PARTS = {
    "method": {"id": "kd", "settings": {"temperature": 2.0, "alpha": 0.5}},
    "student": {"model": "cnn", "args": {"width": 4, "depth": 2}},
    "data": {"source": "digits", "train": 60, "valid": 0.2, "test": 40, "labelled": 20, "seed": 1, "augment": ["shift:1"], "args": {}},
    "task": "auto",
    "label_smoothing": 0.1,
}


def prepared(raw):
    """What a run does before its first step: the method, the data, the task, the student, one look at a batch."""
    recipe = schema.resolve(raw)
    make(recipe.method.id, recipe.method.settings)
    if recipe.data.source.startswith(("hf:", "python:")) or recipe.student.model.startswith(("hf:", "python:", "timm:")):
        return  # the network, or the user's own code
    data = models.open_recipe_data(recipe.data, None, recipe)
    models.task_of(recipe, data)
    Augment(list(recipe.data.augment))(data.example(2).inputs)
    network = models.build(recipe.student, data, recipe.seed, "student")
    models.check_input(network, data, Session(), "student")


@given(raw=twisted(PARTS, values=SCALARS | st.lists(SCALARS, max_size=2)))
@fuzz(30, 0.2)
def test_what_a_run_prepares(raw):
    with little_memory():
        calm(prepared, raw)
