"""Files that limbeck wrote and that were altered since: found and named, or the change is in a place that is no data.

What counts as no data: white space and the spelling of numbers and letters in JSON (the parsed value is the same), and whole lines that
are missing from a log of answers (their questions are asked again).
"""

import json
import shutil

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from limbeck import zoo
from limbeck.data.text.ragged import encoded
from limbeck.data.text.table import Table, write_table
from limbeck.endpoint.log import FIELDS, ResponseLog
from limbeck.engine import checkpoint
from limbeck.errors import UserError
from limbeck.knowledge.asking import Written, _Kept
from limbeck.signals.store import Store, StoreWriter
from limbeck.storage import load_tensors, save_tensors
from tests.fuzzing import altered, calm, fuzz, little_memory, twisted

STATE = {
    "step": 7,
    "model": {"w": torch.arange(12.0).view(3, 4), "b": torch.ones(2, dtype=torch.int64)},
    "random": (1, [2.5, None], {3: "x"}),
}
ARGUMENTS = {
    "teacher_fingerprint": "t",
    "data_fingerprint": "d",
    "samples": 10,
    "signals": {"logits": (4,), "embedding": (2, 3)},
    "shard_size": 4,
}


def rows():
    draw = torch.Generator().manual_seed(0)
    return {"logits": torch.randn(10, 4, generator=draw), "embedding": torch.randn(10, 2, 3, generator=draw)}


def write_store(folder, **more):
    writer = StoreWriter(folder, **{**ARGUMENTS, **more})
    first = writer.next_index
    if first < 10:
        writer.write(torch.arange(first, 10), {name: value[first:] for name, value in rows().items()})
    writer.finish()


def record(number):
    logs = [["a", -0.5, [["b", -1.0]]]]
    return dict(zip(FIELDS, (f"k{number}", str(number), "m", f"täxt {number}\n", "stop", 3, 4, logs, 0.25), strict=True))


def write_table_of_words(folder):
    texts = ["one", "two two", "", "drei"]

    def pieces(first):
        for number in range(first, len(texts), 2):
            found = texts[number : number + 2]
            yield len(found), {"text": [encoded(t) for t in found]}

    write_table(folder, {"text": "uint8"}, pieces, note={"kind": "words"})


def make(kind, folder):
    if kind == "store":
        write_store(folder)
    elif kind == "checkpoint":
        checkpoint.save(folder.parent, 7, STATE).rename(folder)
    elif kind == "table":
        write_table_of_words(folder)
        (folder / "lock").unlink(missing_ok=True)
    elif kind == "model":
        zoo.save_model(zoo.build("mlp", input_shape=(1, 4, 4), classes=3, widths=[5]), folder, extra={"classes": ["a", "b", "c"]})
        (folder / "README.md").unlink()
    else:
        log = ResponseLog(folder / "log.jsonl")
        with log.writing():
            for number in range(4):
                log.append(record(number))
        (folder / "log.jsonl.lock").unlink(missing_ok=True)


def content(kind, folder):
    """What a reader gets: something that can be compared."""
    if kind == "store":
        index = torch.arange(10)
        found = [Store(folder, ram_limit=limit, teacher_fingerprint="t", data_fingerprint="d").read(index) for limit in (0, 10**9)]
        assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
        return {name: value.tolist() for name, value in found[0].items()}
    if kind == "checkpoint":
        return repr(checkpoint.read(folder))
    if kind == "table":
        table = Table(folder)
        return [table["text"].text(row) for row in range(len(table))], table.note
    if kind == "model":
        return {name: value.tolist() for name, value in zoo.load_model(folder).state_dict().items()}, zoo.read_note(folder)
    log = ResponseLog(folder / "log.jsonl")
    log.read()
    return list(log.records())


KINDS = ("store", "checkpoint", "table", "model", "log")


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Of each kind: the folder, its files' bytes, and what a reader gets."""
    made = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp("whole") / kind
        make(kind, folder)
        files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        made[kind] = folder, files, content(kind, folder)
    return made


def same_json(before, after):
    try:
        return json.loads(after) == json.loads(before)
    except (ValueError, RecursionError):
        return False


def judge(kind, name, before, after, found, expected):
    """An answer to altered bytes is an error that names the file or its folder, or what was written in the first place."""
    if isinstance(found, UserError):
        assert name in found.message or kind in found.message, found.message
        return
    if kind == "log":
        lines = after.split(b"\n")[:-1]
        assert set(lines) <= set(before.split(b"\n")[:-1]), "an altered line was taken"
        assert all(item in expected for item in found) and len(found) == len(set(lines))
        return
    assert kind == "model" or found == expected, "altered content was taken"
    if kind == "table" and name == "manifest.jsonl":
        assert after.splitlines()[: len(before.splitlines())] == before.splitlines()
    else:
        assert after == before or same_json(before, after), "the change was not seen"


def open_and_judge(one, kind, name, after):
    """Open a whole thing of which one file has other bytes, put it back, and judge what came of it."""
    folder, files, expected = one
    (folder / name).write_bytes(after)
    try:
        with little_memory():
            found = calm(content, kind, folder)
    finally:
        (folder / name).write_bytes(files[name])
    judge(kind, name, files[name], after, found, expected)


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@fuzz(120)
def test_altered_bytes(whole, kind, data):
    files = whole[kind][1]
    name = data.draw(st.sampled_from(sorted(files)))
    if data.draw(st.integers(0, 9)) == 0:  # a file of the same kind from elsewhere
        after = files[data.draw(st.sampled_from(sorted(files)))]
    else:
        after = data.draw(altered(files[name]))
    open_and_judge(whole[kind], kind, name, after)


JSON_FILES = [("store", "manifest.json"), ("checkpoint", "state.json"), ("model", "config.json")]


@pytest.mark.parametrize(("kind", "name"), JSON_FILES)
@given(data=st.data())
@fuzz(120)
def test_twisted_notes(whole, kind, name, data):
    after = json.dumps(data.draw(twisted(json.loads(whole[kind][1][name])))).encode()
    open_and_judge(whole[kind], kind, name, after)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [b"", b"[" * 100_000, b"\xff\xfe", b"{}", b"[]", b"null", b'"x"', b"0", b"\0" * 4096])
def test_notes_that_are_something_else(whole, kind, text):
    folder, files, _ = whole[kind]
    for name in files:
        (folder / name).write_bytes(text + b"\n" if kind == "log" else text)
        try:
            found = calm(content, kind, folder)
        finally:
            (folder / name).write_bytes(files[name])
        assert isinstance(found, UserError)


@given(data=st.data())
@fuzz(80)
def test_texts_that_a_teacher_wrote(data, tmp_path_factory):
    """What was altered, and what stands behind it, is written again; what is taken is what was written."""
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    path.unlink(missing_ok=True)
    texts = [Written(f"täxt {n}\n", n % 2 == 0) for n in range(6)]
    _Kept(path, 2, 6).add(texts)
    path.write_bytes(data.draw(altered(path.read_bytes())))
    found = calm(_Kept, path, 2, 6).texts
    assert all(item in texts for item in found)


@given(data=st.data())
@fuzz(60)
def test_a_writer_goes_on_from_what_is_whole(whole, data, tmp_path_factory):
    """A store of which something was altered is refused, or mended to the bytes that it had (of the manifest: to what it says)."""
    _source, files, _ = whole["store"]
    folder = tmp_path_factory.mktemp("again")
    for name, before in files.items():
        change = data.draw(st.sampled_from(("same", "same", "same", "altered", "gone")))
        if change != "gone":
            (folder / name).write_bytes(before if change == "same" else data.draw(altered(before)))
    found = calm(write_store, folder)
    if not isinstance(found, UserError):
        after = {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix != ".lock" and p.is_file()}
        said = [json.loads(side.pop("manifest.json")) for side in (after, dict(files))]  # its white space is no data
        assert said[0] == said[1] and after == {name: content for name, content in files.items() if name != "manifest.json"}
    shutil.rmtree(folder)


def test_shards_of_another_store_are_found(whole, tmp_path):
    folder, _files, _ = whole["store"]
    write_store(tmp_path / "b", data_fingerprint="other", samples=10)
    writer = StoreWriter(tmp_path / "c", **{**ARGUMENTS, "teacher_fingerprint": "u"})
    writer.write(torch.arange(10), {name: value + 1 for name, value in rows().items()})
    writer.finish()
    name = "shard-000001.safetensors"
    shutil.copytree(folder, tmp_path / "a")
    (tmp_path / "a" / name).write_bytes((tmp_path / "c" / name).read_bytes())
    with pytest.raises(UserError, match=name):
        Store(tmp_path / "a")
    shutil.copy(tmp_path / "c" / "manifest.json", tmp_path / "a" / "manifest.json")
    with pytest.raises(UserError, match="another teacher"):
        Store(tmp_path / "a", teacher_fingerprint="t")


@given(data=st.data())
@fuzz(200)
def test_safetensors_without_a_checksum(data, tmp_path_factory):
    """Any bytes under that name: tensors or one clear line, and no memory for sizes that lie."""
    path = tmp_path_factory.getbasetemp() / "any.safetensors"
    if not path.with_suffix(".whole").exists():
        save_tensors(path.with_suffix(".whole"), {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(3, dtype=torch.int8)})
    before = path.with_suffix(".whole").read_bytes()
    size = int.from_bytes(before[:8], "little")
    if data.draw(st.booleans()):
        after = data.draw(altered(before))
    else:
        header = json.dumps(data.draw(twisted(json.loads(before[8 : 8 + size])))).encode()
        after = len(header).to_bytes(8, "little") + header + before[8 + size :]
    path.write_bytes(after)
    with little_memory():
        calm(load_tensors, path)
