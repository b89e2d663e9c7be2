"""Data files that nobody wrote on purpose: IDX, CSV, Parquet, pictures, texts. Samples or one clear line, in little time and memory."""

import gzip
import io
import struct

import numpy as np
import pandas
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from limbeck.data import open_data
from limbeck.data.idx import read_idx
from limbeck.data.text import open_text
from limbeck.errors import UserError
from tests.fuzzing import altered, calm, fuzz, in_time, little_memory


def idx(values):
    return struct.pack(f">BBBB{values.ndim}I", 0, 0, 8, values.ndim, *values.shape) + values.astype(np.uint8).tobytes()


DRAW = np.random.default_rng(0)
IMAGES = idx(DRAW.integers(0, 255, (12, 4, 4)))
LABELS = idx(np.arange(12) % 3)
FRAME = pandas.DataFrame({"a": DRAW.normal(size=12), "b": np.arange(12), "label": [f"c{i % 3}" for i in range(12)]})
CSV = FRAME.to_csv(index=False).encode()
PARQUET = FRAME.to_parquet()
TEXTS = pandas.DataFrame({"text": [f"a täxt of {i} words\nand lines" for i in range(12)], "label": [f"c{i % 3}" for i in range(12)]})
PAIRS = pandas.DataFrame({"prompt": [f"what is {i}?" for i in range(12)], "completion": [f"it is {i}" for i in range(12)]})


def picture(kind):
    file = io.BytesIO()
    Image.fromarray(DRAW.integers(0, 255, (6, 6), dtype=np.uint8)).save(file, format=kind)
    return file.getvalue()


PICTURES = {kind: picture(kind) for kind in ("PNG", "JPEG", "BMP", "GIF", "TIFF", "WEBP", "PPM")}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def sound(data):
    """What was taken is usable: finite inputs, labels inside the classes, names that can be shown and written."""
    if isinstance(data, UserError):
        return
    batch = data.train.batch(torch.arange(min(2, len(data.train))))
    inputs = batch.inputs if isinstance(batch.inputs, torch.Tensor) else next(iter(batch.inputs.values()))
    assert torch.isfinite(inputs.float()).all() and len(data.test) > 0
    if data.train.labels is not None:
        assert int(data.train.labels.min()) >= -1 and int(data.train.labels.max()) < max(len(data.classes), 1)
    for name in data.classes:
        name.encode("utf-8")


@given(data=st.data())
@fuzz(150)
def test_idx(place, data):
    folder = place / "idx"
    folder.mkdir(exist_ok=True)
    images, labels = IMAGES, LABELS
    zipped = data.draw(st.booleans())
    if data.draw(st.booleans()):
        images = data.draw(altered(images))
    else:
        labels = data.draw(altered(labels))
    images = gzip.compress(images, 1, mtime=0) if zipped else images
    if zipped and data.draw(st.booleans()):
        images = data.draw(altered(images))
    (folder / "train-images-idx3-ubyte").write_bytes(images)
    (folder / "train-labels-idx1-ubyte").write_bytes(labels)
    with little_memory():
        sound(calm(open_data, f"idx:{folder}"))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        b"\0\0\x08\x03" + b"\xff" * 12,
        b"\0\0\x08\x01" + struct.pack(">I", 2**32 - 1),
        b"\0\0\x08\x02" + struct.pack(">II", 0, 2**32 - 1),
        b"\0\0\x0d\x01" + struct.pack(">I", 1) + b"\0\0\0\0",
        gzip.compress(b"\0" * (1 << 30), 1),
        gzip.compress(gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 0))),
        gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 1) + b"a")[:-6],
    ],
    ids=range(9),
)
def test_idx_sizes_that_lie(place, content):
    """Also one gigabyte of zeros in a megabyte of gzip."""
    (place / "lie").write_bytes(content)
    with in_time(20), little_memory(400 << 20):
        if not isinstance(found := calm(read_idx, place / "lie"), UserError):
            assert found.numel() == 0


TABLES = {"csv": CSV, "parquet": PARQUET}


@pytest.mark.parametrize("kind", TABLES)
@given(data=st.data())
@fuzz(100)
def test_tables(place, kind, data):
    path = place / f"table.{kind}"
    path.write_bytes(data.draw(altered(TABLES[kind])))
    with little_memory():
        sound(calm(open_data, f"{kind}:{path}"))


CELLS = st.one_of(
    st.sampled_from(
        ["", "nan", "inf", "-inf", "1e999", "1e308", "0x10", "1_000", "9" * 400, "true", " 1", "\0", "\x1b[31m", "=1+1", "é", "\ud800"]
    ),
    st.text(max_size=5),
    st.integers(-5, 5).map(str),
    st.floats().map(str),
)


@given(
    head=st.lists(st.sampled_from(["a", "b", "label", "y", "", "Unnamed: 0", "\0", '"', "a"]) | st.text(max_size=4), max_size=4),
    rows=st.lists(st.lists(CELLS, max_size=5), max_size=12),
    separator=st.sampled_from([",", ";", "\t", "|"]),
    end=st.sampled_from(["\n", "\r\n", "\r", "\n\n"]),
    label=st.sampled_from([None, "label", "a", "", "nowhere"]),
)
@fuzz(120)
def test_ragged_tables(place, head, rows, separator, end, label):
    path = place / "ragged.csv"
    path.write_bytes(end.join(separator.join(row) for row in [head, *rows]).encode("utf-8", "surrogatepass"))
    with little_memory():
        sound(calm(open_data, f"csv:{path}", label=label))


@given(data=st.data())
@fuzz(80)
def test_pictures(place, data):
    folder = place / "pictures"
    kind = data.draw(st.sampled_from(sorted(PICTURES)))
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for number in range(3):
            (folder / name / f"{number}.png").write_bytes(PICTURES["PNG"])
    (folder / "cat" / "1.png").write_bytes(data.draw(altered(PICTURES[kind])))
    with little_memory():
        sound(calm(open_data, f"folder:{folder}", size=data.draw(st.sampled_from([None, 4]))))


TEXT_FILES = {
    "txt": ("text", "\n".join(TEXTS["text"]).encode()),
    "jsonl": ("jsonl", PAIRS.to_json(orient="records", lines=True).encode()),
    "csv": ("csv", TEXTS.to_csv(index=False).encode()),
    "parquet": ("parquet", PAIRS.to_parquet()),
}


@pytest.mark.parametrize("suffix", TEXT_FILES)
@given(data=st.data())
@fuzz(60, 0.3)
def test_texts(place, suffix, data, tmp_path_factory):
    kind, content = TEXT_FILES[suffix]
    path = place / f"texts.{suffix}"
    path.write_bytes(data.draw(altered(content)))
    options = data.draw(st.sampled_from([{}, {}, {"kind": "classification"}, {"chat": True}])) if suffix != "txt" else {}
    with little_memory():
        sound(calm(open_text, f"{kind}:{path}", tokenizer="words:40", length=16, test=0.3, **options))
