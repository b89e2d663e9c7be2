"""Texts: windows, pairs and retrieval rows; embedded sources; tokenizers."""

import json

import numpy as np
import pytest
import torch

from limbeck.data import Batches
from limbeck.data.split import TensorSplit
from limbeck.data.text import (
    PairSplit,
    Ragged,
    RetrievalSplit,
    Text,
    WindowSplit,
    check_tokenizers,
    is_text,
    listing,
    mark_of,
    open_text,
)
from limbeck.data.text.rows import Corpus, divide
from limbeck.data.text.stdlib import functions, library_files
from limbeck.data.text.tokens import load_tokenizer, sample
from limbeck.errors import UserError
from limbeck.tasks.embedding import Embedding

PACKAGES = ("asyncio", "email", "html", "http", "json", "logging", "wsgiref")
IGNORE = -100


@pytest.fixture(scope="module")
def words():
    """A hand-made tokenizer: pad 0, eos 1, then a, b, c, ... as words."""
    return hand_made()


def hand_made(extra=(), **special):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *"abcdefghij", *extra])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=backend, **special)


def text_of(tokenizer, kind="causal-lm", length=8):
    return Text(tokenizer, kind, length, len(tokenizer), (), mark_of(tokenizer), 0, 1)


def pairs(tokenizer, rows, kind="causal-lm", length=8, prompt_length=None):
    ids = lambda t: tokenizer(t, add_special_tokens=False)["input_ids"]  # noqa: E731
    columns = {
        "prompt": Ragged.of([ids(p) for p, _ in rows]),
        "completion": Ragged.of([[*ids(c), 1] for _, c in rows]),
        "prompt_text": Ragged.texts(p for p, _ in rows),
        "completion_text": Ragged.texts(c for _, c in rows),
    }
    return PairSplit(columns, text_of(tokenizer, kind, length), prompt_length)


# ---- windows ----


def test_windows_reproduce_the_documents():
    data = open_text("stdlib-text", packages=PACKAGES, length=64, tokenizer="bpe:512")
    split = data.train
    tokens = np.concatenate(split.windows(torch.arange(len(split))))
    said = data.text.tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    files = {f.name: f for f in library_files(PACKAGES)}
    where = divide({p: sum(len(f.text) for f in files.values() if f.package == p) for p in PACKAGES}, {"test": 0.1, "valid": 0.0}, 0)
    joined = "".join(f.text + "<eos>" for f in files.values() if where[f.package] == "train")
    assert joined.startswith(said.rstrip("\ufffd"))
    assert len(joined) - len(said) < 64 * 20


def test_window_batches_are_their_own_labels():
    data = open_text("stdlib-text", packages=PACKAGES, length=64, tokenizer="bpe:512")
    batch = data.train.batch(torch.tensor([5, 2]))
    assert set(batch.inputs) == {"input_ids"} and batch.inputs["input_ids"].shape == (2, 64)
    assert torch.equal(batch.labels, batch.inputs["input_ids"]) and batch.labels.dtype == torch.int64
    assert torch.equal(data.train.subset(torch.tensor([5, 2])).batch(torch.arange(2)).labels, batch.labels)
    first, again = Batches(data.train, 8, seed=3), Batches(data.train, 8, seed=3)
    assert torch.equal(first.batch_at(1, 4).labels, next(iter(again.epoch(1, start=4))).labels)


def test_bytes_of_windows_are_those_of_the_scored_tokens():
    data = open_text("stdlib-text", packages=PACKAGES, length=64, tokenizer="bpe:512")
    special = set(data.text.tokenizer.all_special_ids)
    for i in (0, 7, len(data.test) - 1):
        ids = [t for t in data.test.windows(torch.tensor([i]))[0][1:].tolist() if t not in special]
        tokens = data.text.tokenizer.convert_ids_to_tokens(ids)
        assert int(data.test.bytes[i]) == sum(len(t) for t in tokens)  # a byte-level tokenizer writes one character a byte
    assert int(data.test.subset(torch.tensor([3])).bytes[0]) == int(data.test.bytes[3])


def test_windows_without_packing_begin_with_documents():
    documents = Ragged.of([[5, 6, 7, 8, 1], [9, 1], [3, 1]])
    text = text_of(hand_made(), length=4)
    split = WindowSplit(documents, text, packing=False)
    assert [w.tolist() for w in split.windows(torch.arange(len(split)))] == [[5, 6, 7, 8], [9, 1], [3, 1]]
    batch = split.batch(torch.tensor([0, 1]))
    assert batch.labels.tolist() == [[5, 6, 7, 8], [9, 1, IGNORE, IGNORE]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    packed = WindowSplit(documents, text)
    assert [w.tolist() for w in packed.windows(torch.arange(len(packed)))] == [[5, 6, 7, 8], [1, 9, 1, 3]]


def test_no_window_has_two_domains():
    documents = Ragged.of([[5] * 7, [6] * 3, [7] * 9])
    split = WindowSplit(documents, text_of(hand_made(), length=4), numbers=np.array([0, 0, 1]))
    assert split.domains.tolist() == [0, 0, 1, 1]
    assert [w.tolist() for w in split.windows(torch.arange(4))] == [[5] * 4, [5, 5, 5, 6], [7] * 4, [7] * 4]
    assert split.subset(torch.tensor([3, 0])).domains.tolist() == [1, 0]


def test_one_short_document_is_one_short_window():
    split = WindowSplit(Ragged.of([[5, 6, 1]]), text_of(hand_made(), length=8))
    assert len(split) == 1 and split.batch(torch.tensor([0])).labels.tolist() == [[5, 6, 1]]


# ---- pairs ----


def test_labels_of_causal_pairs(words):
    batch = pairs(words, [("a b", "c"), ("a", "b c d")]).batch(torch.tensor([0, 1]))
    assert batch.inputs["input_ids"].tolist() == [[3, 4, 5, 1, 0], [3, 4, 5, 6, 1]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]
    assert batch.labels.tolist() == [[IGNORE, IGNORE, 5, 1, IGNORE], [IGNORE, 4, 5, 6, 1]]
    assert "attention_mask" not in pairs(words, [("a b", "c")]).batch(torch.tensor([0])).inputs


def test_labels_of_seq2seq_pairs(words):
    split = pairs(words, [("a b", "c"), ("a", "b c d")], kind="seq2seq", length=3)
    batch = split.batch(torch.tensor([1, 0]))
    assert batch.inputs["input_ids"].tolist() == [[3, 0], [3, 4]]
    assert batch.inputs["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch.labels.tolist() == [[4, 5, 6], [5, 1, IGNORE]]  # cut at 3: no end token then
    assert split.cut == 1
    assert split.prompts(torch.tensor([0, 1]))[0].tolist() == [[3, 4], [3, 0]]


def test_long_pairs_are_cut(words):
    split = pairs(words, [("a b c d e f g h", "i j"), ("a", "b c d e f g h i j"), ("a", "b")], length=6, prompt_length=4)
    batch = split.batch(torch.tensor([0, 1, 2]))
    assert batch.inputs["input_ids"][0].tolist() == [7, 8, 9, 10, 11, 12]  # e f g h | i j, the end token is cut
    assert batch.labels[1].tolist() == [IGNORE, 4, 5, 6, 7, 8]
    assert split.cut == 2 and split.subset(torch.tensor([2])).cut == 0
    with pytest.raises(UserError, match="no room"):
        pairs(words, [("a", "b")], length=6, prompt_length=6)


def test_prompts_and_references_for_writing(words):
    split = pairs(words, [("a b", "c"), ("a", "b c d")])
    ids, mask = split.prompts(torch.tensor([0, 1]))
    assert ids.tolist() == [[3, 4], [0, 3]] and mask.tolist() == [[1, 1], [0, 1]]
    assert split.references(torch.tensor([1, 0])) == ["b c d", "c"]
    assert split.prompt_texts(torch.tensor([1])) == ["a"]


def test_other_completions(words):
    split = pairs(words, [("a b", "c"), ("a", "b c d"), ("c", "d")]).subset(torch.tensor([2, 0]))
    other = split.with_completions(["j", "i h"])
    assert other.references(torch.arange(2)) == ["j", "i h"] and other.prompt_texts(torch.arange(2)) == ["c", "a b"]
    assert other.batch(torch.arange(2)).labels.tolist() == [[IGNORE, 12, 1, IGNORE, IGNORE], [IGNORE, IGNORE, 11, 10, 1]]
    assert split.references(torch.arange(2)) == ["d", "c"]
    with pytest.raises(UserError, match="1 completions for 2 prompts"):
        split.with_completions(["j"])
    with pytest.raises(UserError, match="row 1 is empty"):
        split.with_completions(["j", " "])


def test_bytes_of_pairs_are_those_of_the_completions():
    data = open_text("stdlib-explain", packages=PACKAGES, length=256, tokenizer="bpe:512")
    split = data.test
    index = torch.arange(len(split))
    whole = [i for i in range(len(split)) if split.subset(torch.tensor([i])).cut == 0]
    assert len(whole) > 10
    references = split.references(index)
    assert [int(split.bytes[i]) for i in whole] == [len(references[i].encode()) for i in whole]


# ---- embedded sources ----


@pytest.mark.parametrize("source", ["stdlib-docstrings", "stdlib-completion", "stdlib-explain", "stdlib-retrieval"])
def test_no_text_is_in_two_parts(source):
    data = open_text(source, packages=PACKAGES, tokenizer="bpe:512", valid=0.1)
    seen = []
    for split in (data.train, data.test, data.valid):
        index = torch.arange(len(split))
        rows = split.texts(index) if isinstance(split, RetrievalSplit) else list(zip(split.prompt_texts(index), split.references(index)))
        assert len(rows) == len(split) > 0 and all(p.strip() and c.strip() for p, c in rows)
        seen.append(set(rows))
    if source == "stdlib-retrieval":
        for side in (0, 1):
            texts = [r[side] for rows in seen for r in rows]
            assert len(texts) == len(set(texts))


def test_packages_are_in_one_part_only():
    sizes = {f"p{i}": 10 + i for i in range(40)}
    shares = {"test": 0.2, "valid": 0.1}
    parts = divide(sizes, shares, 0)
    assert parts == divide(sizes, shares, 0) and parts != divide(sizes, shares, 1)
    for part, share in shares.items():
        assert 0.6 * share < sum(sizes[n] for n in sizes if parts[n] == part) / sum(sizes.values()) < 1.4 * share
    assert {n for n in parts if parts[n] == "test"} == {n for n, p in divide(sizes, {"test": 0.2, "valid": 0.0}, 0).items() if p == "test"}


def test_train_and_test_windows_come_from_other_packages():
    data = open_text("stdlib-text", packages=PACKAGES, length=64, tokenizer="bpe:512", valid=0.15)
    joined = {f.package: "" for f in library_files(PACKAGES)}
    for f in library_files(PACKAGES):
        joined[f.package] += f.text + "<eos>"
    homes = {}
    for part, split in (("train", data.train), ("test", data.test), ("valid", data.valid)):
        for i in range(0, len(split), 5):
            said = data.text.tokenizer.decode(split.windows(torch.tensor([i]))[0].tolist()[8:-8], skip_special_tokens=False).strip("\ufffd")
            found = {p for p, t in joined.items() if said in t}
            if len(found) == 1:
                homes.setdefault(found.pop(), set()).add(part)
    assert len(homes) > 4 and all(len(parts) == 1 for parts in homes.values())
    assert {p for parts in homes.values() for p in parts} == {"train", "test", "valid"}


def test_functions_of_a_file():
    from limbeck.data.text.stdlib import File

    source = '''
class A:
    def f(self, x):
        """Say it.

        More.
        """
        y = x
        return y

    def g(self): return 1

def h():
    """Only words."""
'''
    found = list(functions(File("p", "p.py", source)))
    assert len(found) == 1
    assert found[0].signature == "def f(self, x):" and found[0].docstring == "Say it.\n\nMore." and found[0].body == "y = x\nreturn y"


def test_explanations_go_on_where_the_prompt_ends():
    data = open_text("stdlib-explain", packages=PACKAGES, tokenizer="bpe:512")
    paragraphs = set()
    for file in library_files(PACKAGES):
        paragraphs |= {" ".join(f.docstring.split("\n\n")[0].split()) for f in functions(file)}
    index = torch.arange(min(50, len(data.train)))
    for prompt, rest in zip(data.train.prompt_texts(index), data.train.references(index)):
        assert prompt.rsplit('"""', 1)[1] + rest in paragraphs


def test_windows_with_classes():
    data = open_text("stdlib-windows", packages=("email", "http", "wsgiref", "json"), tokenizer="bpe:512", length=32)
    assert data.kind == "multiclass" and data.classes == ("email", "http", "json", "wsgiref") and isinstance(data.train, TensorSplit)
    assert set(data.train.labels.tolist()) == set(data.test.labels.tolist()) == {0, 1, 2, 3}
    batch = data.train.batch(torch.arange(3))
    assert batch.inputs["input_ids"].shape == batch.inputs["attention_mask"].shape == (3, 32) and batch.labels.shape == (3,)
    rows = [set(map(tuple, s.inputs["input_ids"].tolist())) for s in (data.train, data.test)]
    assert len(rows[0] & rows[1]) < 0.02 * len(rows[1])


def test_domains_and_their_mix():
    args = {"domains": ["encodings", "licences", "numbers"], "most": 60_000, "tokenizer": "bpe:512", "length": 64}
    data = open_text("stdlib-domains", **args)
    assert data.text.domains == ("encodings", "licences", "numbers")
    assert set(data.train.domains.tolist()) == set(data.test.domains.tolist()) == {0, 1, 2}
    numbers = data.train.windows((data.train.domains == 2).nonzero()[:3, 0])
    assert all(set(data.text.tokenizer.decode(w.tolist(), skip_special_tokens=True)) <= set("0123456789.-+e \n") for w in numbers)
    skewed = open_text("stdlib-domains", **args, train=200, mix={"licences": 0.8, "numbers": 0.2})
    assert torch.bincount(skewed.train.domains, minlength=3).tolist() == [0, 160, 40]
    assert len(skewed.test) == len(data.test) and skewed.fingerprint != data.fingerprint
    with pytest.raises(UserError, match="unknown domain 'licence'"):
        open_text("stdlib-domains", **args, mix={"licence": 1.0})
    with pytest.raises(UserError, match=r"sum to 0.5"):
        open_text("stdlib-domains", **args, mix={"numbers": 0.5})


def test_tables_in_words():
    data = open_text("tables-in-words", tokenizer="words:600", explain="tree")
    assert data.kind == "seq2seq" and len(data.train) + len(data.test) == 178
    prompt = data.train.prompt_texts(torch.arange(1))[0]
    assert prompt.startswith("alcohol ") and prompt.count(" ; ") == 12
    assert set(data.train.references(torch.arange(len(data.train)))) == {"class-0", "class-1", "class-2"}
    right = [a == r for a, r in zip(data.test.teacher_answers, data.test.references(torch.arange(len(data.test))))]
    assert sum(right) / len(right) > 0.85
    for reason, text in zip(data.test.rationales, data.test.prompt_texts(torch.arange(len(data.test)))):
        values = {part.split()[0]: float(part.split()[1]) for part in text.split(" ; ")}
        assert 1 <= reason.count(" , ") + 1 <= 3 and "class" not in reason
        for step in reason.split(" , "):
            name, way, *_, limit = step.split()
            difference = values[name] - float(limit)
            assert difference <= 0.02 * abs(float(limit)) if way == "at" else difference >= -0.02 * abs(float(limit))
    counts = torch.bincount(data.test.classes, minlength=3)
    assert counts.tolist() == [15, 17, 12]  # a quarter of 59, 71 and 48
    binned = open_text("tables-in-words", tokenizer="words:600", bins=6, train=40)
    assert set(binned.train.prompt_texts(torch.arange(1))[0].split()[1::3]) <= {f"level-{i}" for i in range(1, 7)}
    assert len(binned.train) == 40 and binned.train.rationales == [None] * 40


def test_fingerprints_are_equal_exactly_when_the_samples_are():
    args = {"packages": ("html", "http", "json", "wsgiref"), "tokenizer": "bpe:512", "length": 64}
    one = open_text("stdlib-text", **args)
    assert one.fingerprint == open_text("stdlib-text", **args).fingerprint
    others = [
        open_text("stdlib-text", **(args | change)).fingerprint
        for change in ({"length": 32}, {"tokenizer": "bpe:400"}, {"test": 0.4}, {"train": 50}, {"packing": False}, {"test": 10})
    ]
    assert len({one.fingerprint, *others}) == 7
    assert len(open_text("stdlib-text", **args, train=50).train) == 50
    all_of_it = open_text("stdlib-text", **args, train=len(one.train))
    assert all_of_it.fingerprint == one.fingerprint


# ---- tokenizers ----


def corpus(texts=("aa bb cc " * 50,)):
    from limbeck.data.text.rows import Row

    return Corpus("own", ["own", list(texts)], {"train": lambda: iter([Row(text=t) for t in texts])}, "text", "causal-lm")


def test_trained_tokenizers_are_kept_and_keep_every_byte(own_cache):
    tokenizer = load_tokenizer("bpe:300", corpus())
    assert tokenizer.pad_token_id == 0 and tokenizer.eos_token_id == 1 and tokenizer.bos_token_id == 2 and len(tokenizer) <= 300
    for text in ("naïve 数据\t\n  x , y .", "don't <eos> stop", " a", ""):
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.decode(ids) == text and 1 not in ids
    kept = sorted((own_cache / "text" / "tokenizers").rglob("tokenizer.json"))
    again = load_tokenizer("bpe:300", corpus())
    assert mark_of(again) == mark_of(tokenizer) and sorted((own_cache / "text" / "tokenizers").rglob("tokenizer.json")) == kept
    assert mark_of(load_tokenizer("bpe:264", corpus())) != mark_of(tokenizer)


def test_padding_a_batch_does_not_change_the_mark(words):
    before = mark_of(words)
    words(["a", "a b c"], padding=True, truncation=True, max_length=2)
    assert mark_of(words) == before


def test_sample_is_spread_over_a_stream():
    texts = [f"{i:05d}" * 20 for i in range(2000)]
    kept = list(sample(texts, 20_000))
    assert 60 <= len(kept) <= 200 and kept == [t for t in texts if t in set(kept)] == list(sample(texts, 20_000))
    assert len({int(t[:5]) // 500 for t in kept}) == 4


def test_a_tokenizer_without_padding(tmp_path):
    bare = hand_made(pad_token=None)
    with pytest.raises(UserError, match=r"no padding token .*tokenizer_pad: eos"):
        load_tokenizer(bare, corpus())
    with_eos = load_tokenizer(bare, corpus(), pad="eos")
    assert with_eos.pad_token_id == with_eos.eos_token_id == 1 and bare.pad_token_id is None
    bare.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match="no padding token"):
        load_tokenizer(f"hf:{tmp_path / 'own'}", corpus())
    assert load_tokenizer(str(tmp_path / "own"), corpus(), pad="eos").pad_token_id == 1


@pytest.mark.parametrize("name", ["bpe:12", "bpe:many", "words:3", "bert", "hf:/no/such/folder", "/no/such"])
def test_tokenizers_that_cannot_be(name):
    with pytest.raises(UserError) as error:
        load_tokenizer(name, corpus())
    assert error.value.hint


def test_minilm_tokenizer_puts_its_own_tokens_around_texts():
    data = open_text("stdlib-retrieval", packages=PACKAGES, tokenizer="minilm", length=16)
    batch = data.train.batch(torch.arange(4))
    for side in ("query", "document"):
        ids, mask = batch.inputs[side]["input_ids"], batch.inputs[side]["attention_mask"]
        assert ids.shape == mask.shape and ids.shape[1] <= 16 and batch.labels is None
        last = ids[torch.arange(4), mask.sum(1) - 1]
        assert set(ids[:, 0].tolist()) == {data.text.tokenizer.cls_token_id} and set(last.tolist()) == {data.text.tokenizer.sep_token_id}
    assert data.train.cut > 0 and data.text.sizes is None


def test_tokenizers_of_two_models(words):
    check_tokenizers(words, hand_made())
    check_tokenizers(text_of(words), text_of(hand_made()))
    with pytest.raises(UserError, match=r"teacher's tokenizer has 13 tokens, the student's 14 .*universal-logit"):
        check_tokenizers(words, hand_made(extra="z"))
    with pytest.raises(UserError, match=r"1 of 14 tokens have other ids"):
        check_tokenizers(hand_made(extra="z"), hand_made(extra="y"))


def test_what_is_a_text():
    assert is_text("stdlib-text") and is_text("jsonl:x") and not is_text("digits") and not is_text("csv:x") and is_text("csv:x", True)
    assert not is_text("folder:x", True)


@pytest.mark.parametrize(
    "source, args, said",
    [
        ("stdlib-txt", {}, "unknown texts 'stdlib-txt'"),
        ("stdlib-text", {"kind": "seq2seq"}, "not for seq2seq"),
        ("stdlib-text", {"packages": ("no_such_thing",)}, "no_such_thing"),
        ("stdlib-text", {"lines": 3}, "lines"),
        ("stdlib-text", {"length": 1}, "length is 1"),
        ("stdlib-text", {"chat": True}, "takes no chat"),
        ("tables-in-words", {"table": "vine"}, "unknown table 'vine'"),
        ("stdlib-explain", {"test": 1.5}, "test is 1.5"),
        ("stdlib-text", {"packages": ("json",)}, "too few packages"),
    ],
)
def test_bad_input(source, args, said):
    with pytest.raises(UserError) as error:
        open_text(source, **args)
    assert said in str(error.value) and error.value.hint


def test_describe_is_json():
    data = open_text("tables-in-words", tokenizer="words:600")
    assert json.loads(json.dumps(data.describe()))["kind"] == "seq2seq" and data.text.length == 128 and data.input_shape == (128,)


def test_listing_tells_the_task():
    rows = {row["name"]: row for row in listing()}
    assert len(rows) == 9 and all(is_text(name) and len(row["source"]) > 20 for name, row in rows.items())
    small = {"packages": ("html", "http", "json", "wsgiref"), "tokenizer": "bpe:300"}
    for name in ("stdlib-completion", "stdlib-retrieval"):
        assert open_text(name, **small).kind == rows[name]["task"]


def test_pairs_are_embedded_in_order_of_length_and_given_in_their_own():
    """A row is the embedding of its own text; batches are padded less than in the split's order."""

    class Sums(torch.nn.Module):
        padded = 0

        def forward(self, input_ids, attention_mask):
            self.padded += int((attention_mask == 0).sum())
            ids = (input_ids * attention_mask).double()
            return torch.stack([ids.sum(1), (ids**2).sum(1)], 1)

    data = open_text("stdlib-retrieval", packages=PACKAGES, tokenizer="bpe:300", length=120, train=60, test=4)
    split, task, model = data.train.subset(torch.arange(59, -1, -1)), Embedding(data.text), Sums()
    found = task.embed(model, split, 8, torch.device("cpu"))
    sizes = split.batch(torch.arange(60)).inputs
    lengths = sum(sizes[side]["attention_mask"].sum(1) for side in ("query", "document"))
    assert torch.equal(lengths[split.by_length()], lengths.sort()[0]) and split.cut
    for side in ("query", "document"):
        alone = [Sums()(**split.batch(torch.tensor([i])).inputs[side])[0] for i in range(60)]
        assert torch.equal(found[side][0], torch.stack(alone).float())
    plain, sums = Sums(), task.reading(model, ())
    sums.model = plain
    for index in torch.arange(60).split(8):
        sums(split.batch(index))
    assert model.padded < 0.8 * plain.padded
