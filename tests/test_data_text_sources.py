"""Texts of the user: files, streams, conversations; the token files that they become."""

import json
import os
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
import torch

from limbeck.data.text import open_text
from limbeck.data.text.table import Table, write_table
from limbeck.errors import UserError
from tests.test_data_text import hand_made

IGNORE = -100
WORDS = list("abcdefghij")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def words():
    return hand_made()


def sentence(i):
    return " ".join(WORDS[(i * 7 + k * k) % 10] for k in range(3 + i % 5))


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def samples(split):
    """Every sample as it comes out of batches."""
    return [split.batch(torch.tensor([i])).labels.tolist()[0] for i in range(len(split))]


# ---- records ----


def records(tmp_path, kind, rows):
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        return rows_file(path, rows)
    import pandas

    frame = pandas.DataFrame(rows)
    frame.to_csv(path, index=False) if kind == "csv" else frame.to_parquet(path)
    return path


@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_files_of_pairs(tmp_path, cache, words, kind):
    rows = [{"question": sentence(i), "answer": sentence(i + 1)} for i in range(200)]
    data = open_text(f"{kind}:{records(tmp_path, kind, rows)}", tokenizer=words, length=32)
    assert data.kind == "causal-lm" and len(data.train) + len(data.test) == 200 and 8 < len(data.test) < 35
    found = [
        pair for s in (data.train, data.test) for pair in zip(s.prompt_texts(torch.arange(len(s))), s.references(torch.arange(len(s))))
    ]
    assert sorted(found) == sorted((r["question"], r["answer"]) for r in rows)
    ids = words(rows[0]["question"])["input_ids"] + words(rows[0]["answer"])["input_ids"] + [1]
    everything = [s.batch(torch.tensor([i])).inputs["input_ids"].tolist()[0] for s in (data.train, data.test) for i in range(len(s))]
    assert ids in everything


def test_folder_with_parts(tmp_path, cache, words):
    for part, count in (("train", 20), ("test", 5), ("valid", 4)):
        rows_file(tmp_path / f"{part}.jsonl", [{"text": f"{sentence(i)} {part}"} for i in range(count)])
    data = open_text(f"jsonl:{tmp_path}", tokenizer=words, length=4, packing=False)
    assert data.valid is not None and len(open_text(f"jsonl:{tmp_path}", tokenizer=words, length=32, packing=False).test) == 5


def test_named_columns_and_nearest_names(tmp_path, cache, words):
    path = rows_file(tmp_path / "x.jsonl", [{"ask": sentence(i), "reply": sentence(i + 1)} for i in range(60)])
    with pytest.raises(UserError, match=r"no prompt . completion or query . document or text; its columns are ask, reply"):
        open_text(f"jsonl:{path}", tokenizer=words)
    with pytest.raises(UserError, match=r"no column 'replay' .*did you mean 'reply'"):
        open_text(f"jsonl:{path}", tokenizer=words, columns={"prompt": "ask", "completion": "replay"})
    with pytest.raises(UserError, match="unknown role of a column 'prompts'"):
        open_text(f"jsonl:{path}", tokenizer=words, columns={"prompts": "ask"})
    columns = {"prompt": "ask", "completion": "reply"}
    assert open_text(f"jsonl:{path}", tokenizer=words, columns=columns).kind == "causal-lm"
    assert open_text(f"jsonl:{path}", tokenizer=words, columns=columns, kind="seq2seq").kind == "seq2seq"
    made = open_text(f"jsonl:{path}", tokenizer=words, columns={"query": "ask", "document": "reply"}, kind="embedding")
    assert made.kind == "embedding" and made.train.texts(torch.tensor([0]))[0][1].split()[0] in WORDS


def test_broken_lines_are_named(tmp_path, cache, words):
    good = json.dumps({"text": "a b"})
    path = tmp_path / "x.jsonl"
    for broken, said in (
        ('{"text": "a"', "is no JSON"),
        ("[1]", "is a list"),
        ('{"txt": "a"}', "no 'text'"),
        ('{"text": 3}', "int, not a text"),
    ):
        path.write_text(f"{good}\n\n{good}\n{broken}\n{good}\n")
        with pytest.raises(UserError, match=said) as error:
            open_text(f"jsonl:{path}", tokenizer=words)
        assert "x.jsonl, line 4" in str(error.value)
    with pytest.raises(UserError, match="no file at"):
        open_text(f"jsonl:{tmp_path / 'none.jsonl'}", tokenizer=words)
    path.write_text("")
    with pytest.raises(UserError, match="has no row"):
        open_text(f"jsonl:{path}", tokenizer=words)
    table = tmp_path / "x.csv"
    table.write_text("prompt,completion\na,b\nc\n")
    with pytest.raises(UserError, match=r"x.csv, line 3, has another number of columns"):
        open_text(f"csv:{table}", tokenizer=words)


def test_empty_completions(tmp_path, cache, words):
    rows = [{"prompt": sentence(i), "completion": " " if i >= 40 else sentence(i)} for i in range(60)]
    path = rows_file(tmp_path / "x.jsonl", rows)
    with pytest.raises(UserError, match=r"completion of .*line 41 is empty .*drop_empty"):
        open_text(f"jsonl:{path}", tokenizer=words)
    data = open_text(f"jsonl:{path}", tokenizer=words, drop_empty=True)
    assert len(data.train) + len(data.test) == 40


def test_classes_of_texts(tmp_path, cache, words):
    rows = [{"text": sentence(i), "label": ["no", "yes"][i % 2]} for i in range(80)]
    path = rows_file(tmp_path / "x.jsonl", rows)
    data = open_text(f"jsonl:{path}", tokenizer=words, kind="classification", length=4)
    assert data.classes == ("no", "yes") and data.kind == "multiclass"
    batch = data.train.batch(torch.arange(4))
    assert batch.inputs["input_ids"].shape == (4, 4) and set(batch.labels.tolist()) <= {0, 1}
    text = words.decode(batch.inputs["input_ids"][0][batch.inputs["attention_mask"][0].bool()])
    assert any(r["text"].startswith(text) and r["label"] == data.classes[int(batch.labels[0])] for r in rows)


# ---- plain files ----


def test_text_files_come_whole(tmp_path, cache):
    for i in range(12):
        (tmp_path / f"{i:02d}.txt").write_text(f"file {i}\r\n" + "naïve text of it, line after line\n" * (20 + i))
    data = open_text(f"text:{tmp_path}", tokenizer="bpe:300", length=16)
    said = [data.text.tokenizer.decode(np.concatenate(s.windows(torch.arange(len(s)))).tolist()) for s in (data.train, data.test)]
    files = [{i for i in range(12) if f"file {i}\r\n" in text} for text in said]
    assert files[0] and files[1] and not files[0] & files[1] and files[0] | files[1] == set(range(12))
    assert open_text(f"text:{tmp_path}/0*.txt", tokenizer="bpe:300", length=16).fingerprint != data.fingerprint
    with pytest.raises(UserError, match="no text file"):
        open_text(f"text:{tmp_path}/*.none")
    (tmp_path / "13.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="not UTF-8"):
        open_text(f"text:{tmp_path}", tokenizer="bpe:300")


def test_one_large_file_is_read_in_pieces(tmp_path, cache, monkeypatch):
    from limbeck.data.text import foreign

    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {i} of the book\n" for i in range(3000)))
    whole = open_text(f"text:{path}", tokenizer="bpe:300", length=32)
    monkeypatch.setattr(foreign, "PIECE", 1000)
    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "other"))
    pieces = open_text(f"text:{path}", tokenizer=whole.text.tokenizer, length=32)
    read = [s.text.tokenizer.decode(np.asarray(s.tokens).tolist()) for s in (whole.train, whole.test, pieces.train, pieces.test)]
    assert read[0] == read[2] and read[1] == read[3] and read[0].endswith("<eos>") and read[0].count("<eos>") == 1
    assert read[0][:-5] + read[1][:-5] == path.read_text() and 0.08 < len(read[1]) / path.stat().st_size < 0.12


def test_large_files_among_others_stay_one_document(tmp_path, cache, monkeypatch):
    from limbeck.data.text import foreign

    monkeypatch.setattr(foreign, "PIECE", 500)
    for i in range(8):
        (tmp_path / f"{i}.txt").write_text("".join(f"line {n} of file {i}\n" for n in range(100 + i)))
    data = open_text(f"text:{tmp_path}", tokenizer="bpe:300", length=16)
    said = "".join(data.text.tokenizer.decode(np.asarray(s.tokens).tolist()) for s in (data.train, data.test))
    assert said.count("<eos>") == 8 and set(said.split("<eos>")[:-1]) == {(tmp_path / f"{i}.txt").read_text() for i in range(8)}


def test_special_tokens_in_texts_are_text(tmp_path, cache):
    path = rows_file(tmp_path / "x.jsonl", [{"prompt": f"x{i}", "completion": "stop <eos> here <pad>"} for i in range(40)])
    data = open_text(f"jsonl:{path}", tokenizer="bpe:300", length=64)
    for labels in samples(data.train):
        assert labels.count(data.text.eos) == 1 and labels[-1] == data.text.eos and data.text.pad not in labels


# ---- Hugging Face ----


def test_streaming_equals_in_memory(tmp_path, cache, words):
    import datasets

    rows = {"prompt": [sentence(i) for i in range(50)], "completion": [sentence(i + 3) for i in range(50)]}
    parts = datasets.DatasetDict(
        {"train": datasets.Dataset.from_dict(rows), "validation": datasets.Dataset.from_dict(rows).select(range(9))}
    )
    parts.save_to_disk(str(tmp_path / "saved"))
    one = open_text(f"hf:{tmp_path / 'saved'}", tokenizer=words, length=32)
    other = open_text(f"hf:{tmp_path / 'saved'}", tokenizer=words, length=32, streaming=True)
    assert len(one.train) == 50 and len(one.test) == 9
    assert samples(one.train) == samples(other.train) and one.fingerprint == other.fingerprint
    files = tmp_path / "files"
    files.mkdir()
    rows_file(files / "train.jsonl", [{"prompt": p, "completion": c} for p, c in zip(*rows.values())])
    drawn = [open_text(f"hf:{files}", tokenizer=words, length=32, streaming=s) for s in (False, True)]
    assert drawn[0].fingerprint == drawn[1].fingerprint and len(drawn[0].train) + len(drawn[0].test) == 50
    with pytest.raises(UserError, match="no folder"):
        open_text("hf:/no/such")


# ---- conversations ----

TEMPLATE = "{% for m in messages %}<{{ m.role }}> {{ m.content }} </s> {% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"


def chatter(template=TEMPLATE):
    tokenizer = hand_made(extra=["<user>", "<assistant>", "</s>", "<system>"])
    tokenizer.chat_template = template
    return tokenizer


def conversation(*contents):
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]}


def test_only_the_answers_of_a_conversation_are_scored(tmp_path, cache):
    path = tmp_path / "x.jsonl"
    rows_file(path, [conversation("a b", "c", "d", "e f")] * 40)
    data = open_text(f"jsonl:{path}", tokenizer=chatter(), chat=True, length=32)
    batch = data.train.batch(torch.tensor([0]))
    user, assistant, end = 13, 14, 15
    assert batch.inputs["input_ids"].tolist() == [[user, 3, 4, end, assistant, 5, end, user, 6, end, assistant, 7, 8, end]]
    i = IGNORE
    assert batch.labels.tolist() == [[i, i, i, i, i, 5, end, i, i, i, i, 7, 8, end]]
    ids, mask = data.train.prompts(torch.tensor([0]))
    assert ids.tolist() == [[user, 3, 4, end, assistant, 5, end, user, 6, end, assistant]] and mask.all()
    assert data.train.references(torch.tensor([0])) == ["e f"]
    other = data.train.subset(torch.tensor([0])).with_completions(["j"])
    assert other.batch(torch.tensor([0])).labels.tolist() == [[i, i, i, i, i, 5, end, i, i, i, i, 12, end]]
    short = open_text(f"jsonl:{path}", tokenizer=chatter(), chat=True, length=10, prompt_length=7)
    assert short.train.batch(torch.tensor([0])).labels.tolist() == [[i, 5, end, i, i, i, i, 7, 8, end][-10:]]
    assert short.train.cut == len(short.train)


def test_conversations_that_cannot_be(tmp_path, cache, words):
    path = rows_file(tmp_path / "x.jsonl", [conversation("a b", "c")] * 40)
    with pytest.raises(UserError, match="no chat template"):
        open_text(f"jsonl:{path}", tokenizer=words, chat=True)
    forgets = "{{ messages[-1].content }}{% if add_generation_prompt %} <assistant> {% endif %}"
    with pytest.raises(UserError, match="rewrites earlier turns"):
        open_text(f"jsonl:{path}", tokenizer=chatter(forgets), chat=True)
    for bad, said in (("hello", "no conversation"), ([{"role": "user", "content": "a"}], "no message of the assistant")):
        rows_file(path, [{"messages": bad}] * 40)
        with pytest.raises(UserError, match=said):
            open_text(f"jsonl:{path}", tokenizer=chatter(), chat=True)
    rows_file(path, [conversation("a", " ")] * 40)
    with pytest.raises(UserError, match=r"last answer of .*line 1 is empty"):
        open_text(f"jsonl:{path}", tokenizer=chatter(), chat=True)


# ---- token files ----


def folders(cache):
    return [p.parent for p in sorted((cache / "text").rglob("manifest.jsonl"))]


def test_torn_token_files_are_refused(tmp_path, cache, words):
    path = rows_file(tmp_path / "x.jsonl", [{"prompt": sentence(i), "completion": sentence(i)} for i in range(80)])
    open_text(f"jsonl:{path}", tokenizer=words)
    files = [f for folder in folders(cache) for f in folder.glob("*.flat")] + [
        f for folder in folders(cache) for f in folder.glob("*.ends")
    ]
    assert len(files) == 16
    for file in files:
        whole = file.read_bytes()
        for content in (whole[:-2], whole[:-1] + bytes([whole[-1] ^ 1])):
            file.write_bytes(content)
            with pytest.raises(UserError, match=f"token file .*{file.name} is torn .*remove"):
                open_text(f"jsonl:{path}", tokenizer=words)
        file.write_bytes(whole)
    open_text(f"jsonl:{path}", tokenizer=words)


def pieces_of(count, stop=None):
    """Pieces of three rows; dies after `stop` of them."""

    def pieces(done):
        for number, first in enumerate(range(done, count, 3)):
            if number == stop:
                raise KeyboardInterrupt
            rows = range(first, min(first + 3, count))
            yield len(rows), {"ids": [np.arange(i % 5) + i for i in rows], "text": [np.full(i % 3, i, np.uint8) for i in rows]}

    return pieces


COLUMNS = {"ids": "uint16", "text": "uint8"}


@pytest.mark.parametrize("tear", ["nothing", "flat", "ends", "manifest"])
def test_writing_goes_on_after_a_kill(tmp_path, tear):
    whole = write_table(tmp_path / "whole", COLUMNS, pieces_of(32))
    folder = tmp_path / "torn"
    for stop in (0, 2, 1):
        with pytest.raises(KeyboardInterrupt):
            write_table(folder, COLUMNS, pieces_of(32, stop))
        with pytest.raises(UserError, match="no complete token file"):
            Table(folder)
        if tear == "manifest" and (folder / "manifest.jsonl").exists():
            content = (folder / "manifest.jsonl").read_bytes()
            (folder / "manifest.jsonl").write_bytes(content[: max(0, len(content) - 9)])
        elif tear != "nothing":
            with (folder / f"ids.{tear}").open("ab") as file:
                file.write(b"half a piece")
    table = write_table(folder, COLUMNS, pieces_of(32))
    for name in ("ids.flat", "ids.ends", "text.flat", "text.ends"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert table.digest == whole.digest and len(table) == 32
    assert [table["ids"][i].tolist() for i in (0, 4, 31)] == [[], [4, 5, 6, 7], [31]]


def test_lost_bytes_behind_a_manifest_begin_anew(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write_table(tmp_path / "t", COLUMNS, pieces_of(32, 4))
    os.truncate(tmp_path / "t" / "ids.flat", 3)
    assert write_table(tmp_path / "t", COLUMNS, pieces_of(32)).digest == write_table(tmp_path / "w", COLUMNS, pieces_of(32)).digest


def test_killed_processes_leave_nothing_half_done(tmp_path):
    script = (
        "import sys, time, pathlib; sys.path.insert(0, '.')\n"
        "from tests.test_data_text_sources import COLUMNS, pieces_of\n"
        "from limbeck.data.text.table import write_table\n"
        "def slow(done):\n"
        "    for piece in pieces_of(90)(done):\n"
        "        yield piece\n"
        "        time.sleep(0.01)\n"
        "write_table(pathlib.Path(sys.argv[1]), COLUMNS, slow)\n"
    )
    folder, manifest = tmp_path / "t", tmp_path / "t" / "manifest.jsonl"
    process = subprocess.Popen([sys.executable, "-c", script, str(folder)])
    end = time.time() + 60
    while time.time() < end and (not manifest.exists() or manifest.read_text().count("\n") < 4):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert '"done"' not in manifest.read_text()
    assert write_table(folder, COLUMNS, pieces_of(90)).digest == write_table(tmp_path / "w", COLUMNS, pieces_of(90)).digest


def test_memory_stays_flat(tmp_path, cache, words):
    def peak(count):
        path = tmp_path / f"{count}.jsonl"
        with path.open("w") as file:
            for i in range(count):
                file.write(json.dumps({"text": sentence(i) * 5}) + "\n")
        tracemalloc.start()
        data = open_text(f"jsonl:{path}", tokenizer=words, length=32)
        top = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert isinstance(data.train.tokens, np.memmap)
        return top, path.stat().st_size

    peak(300)
    (small, one), (large, other) = peak(1500), peak(8000)
    assert other > 5 * one and large < 1.3 * small + 200_000
