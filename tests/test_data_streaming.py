"""Sets larger than memory: every row once an epoch, an order that is arithmetic, the same batches after a stop, and students from them."""

import io
import json
import random

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from limbeck.data import Batches, open_data
from limbeck.data.shards import ParquetRows
from limbeck.data.streaming import StreamSplit
from limbeck.errors import UserError
from limbeck.recipe import resolve
from limbeck.run import execute
from tests.joint_runs import stopped


def shards(folder, rows=103, files=3, group=10, labels=4, prefix="train"):
    """A table of `rows` rows in several files of small row groups: x0 is the row's number, x1 its square root."""
    folder.mkdir(exist_ok=True)
    for part, numbers in enumerate(np.array_split(np.arange(rows), files)):
        table = pa.table({"x0": numbers.astype(np.float64), "x1": np.sqrt(numbers), "label": [f"c{n % labels}" for n in numbers]})
        pq.write_table(table, folder / f"{prefix}-{part}.parquet", row_group_size=group)
    return folder


def plain(folder, buffer=16):
    """A split whose inputs are the rows' numbers."""
    decode = lambda table: (torch.tensor(table["x0"].to_pylist()).unsqueeze(1), None)  # noqa: E731
    return StreamSplit(ParquetRows(sorted(folder.glob("*.parquet"))), decode, buffer)


def seen(batches):
    return [batch.inputs[:, 0].tolist() for batch in batches]


def flat(lists):
    return [item for one in lists for item in one]


def test_every_row_comes_once_an_epoch_and_carries_its_number(tmp_path):
    split = plain(shards(tmp_path / "s"))
    batches = list(Batches(split, 8, seed=1, drop_last=False).epoch(0))
    assert sorted(flat(seen(batches))) == list(range(103)) and len(batches) == 13
    for batch in batches:
        assert batch.index.tolist() == batch.inputs[:, 0].long().tolist()
    assert [len(batch) for batch in Batches(split, 8, seed=1).epoch(0)] == [8] * 12 == [8] * Batches(split, 8, seed=1).steps_per_epoch


def test_epochs_differ_seeds_differ_and_neither_depends_on_what_was_read_before(tmp_path):
    split = plain(shards(tmp_path / "s"))
    orders = {(seed, epoch): seen(Batches(split, 8, seed=seed).epoch(epoch)) for seed in (1, 2) for epoch in (0, 1)}
    assert len({str(order) for order in orders.values()}) == 4
    torch.manual_seed(5)
    before = torch.get_rng_state()
    assert seen(Batches(split, 8, seed=2).epoch(1)) == orders[2, 1]
    assert torch.equal(torch.get_rng_state(), before)
    unshuffled = seen(Batches(split, 8, shuffle=False).epoch(3))
    assert flat(unshuffled) == list(range(103))


@pytest.mark.parametrize("buffer", [1, 5, 16, 40, 1000])
@pytest.mark.parametrize("start", [0, 1, 2, 5, 11])
def test_an_epoch_goes_on_at_any_step(tmp_path, buffer, start):
    split = plain(shards(tmp_path / "s"), buffer)
    assert seen(Batches(split, 8, seed=3).epoch(1, start)) == seen(Batches(split, 8, seed=3).epoch(1))[start:]


def test_a_window_mixes_its_rows_and_no_others(tmp_path):
    split = plain(shards(tmp_path / "s", rows=96, files=2, group=12), buffer=24)
    order = flat(seen(Batches(split, 8, seed=0).epoch(0)))
    groups = [int(row) // 12 for row in order]
    for first in range(0, 96, 24):  # two whole row groups a window
        assert len(set(groups[first : first + 24])) == 2
        assert order[first : first + 24] != sorted(order[first : first + 24])


def test_only_the_row_groups_that_are_needed_are_read(tmp_path, monkeypatch):
    split = plain(shards(tmp_path / "s"), 16)
    read = []
    piece = ParquetRows.piece
    monkeypatch.setattr(ParquetRows, "piece", lambda rows, number: read.append(number) or piece(rows, number))
    next(Batches(split, 8, seed=1).epoch(0, 10))
    assert len(read) <= 3  # of 12: those of one window, the place before it is found by counting


def test_held_out_rows_are_spread_and_never_trained_on(tmp_path):
    split = plain(shards(tmp_path / "s"))
    test, rest = split.hold_out(10)
    valid, rest = rest.hold_out(5)
    parts = [test.inputs[:, 0].tolist(), valid.inputs[:, 0].tolist(), flat(seen(Batches(rest, 8, drop_last=False, seed=4).epoch(2)))]
    assert sorted(flat(parts)) == list(range(103)) and len(rest) == 88
    assert parts[0][0] == 0 and parts[0][-1] == 102
    assert all(len(set(batch.index.tolist())) == len(batch) for batch in Batches(rest, 8, seed=4).epoch(0))
    whole = rest.batch(torch.arange(88))
    assert sorted(whole.inputs[:, 0].tolist()) == sorted(parts[2])
    numbered = {int(i): float(x) for batch in Batches(rest, 8, seed=4).epoch(0) for i, x in zip(batch.index, batch.inputs[:, 0])}
    assert all(whole.inputs[i, 0] == x for i, x in numbered.items())  # a row has one number, however it is reached
    again = rest.batch(torch.tensor([80, 3, 80, 0]))
    assert torch.equal(again.inputs, whole.inputs[[80, 3, 80, 0]])


def test_a_table_is_scaled_by_its_own_moments_and_its_classes_are_found(tmp_path):
    data = open_data(f"stream:{shards(tmp_path / 's')}", test=13)
    assert data.classes == ("c0", "c1", "c2", "c3") and data.input_shape == (2,) and len(data.test) == 13
    held = np.linspace(0, 102, 13).astype(int)
    rows = np.stack([np.arange(103.0), np.sqrt(np.arange(103.0))], 1)
    own = np.delete(rows, held, 0)  # test rows have no part in mean and deviation
    scaled = (rows - own.mean(0)) / own.std(0)
    batch = data.train.batch(torch.arange(90))
    numbers = np.delete(np.arange(103), held)
    assert torch.allclose(batch.inputs, torch.tensor(scaled[numbers], dtype=torch.float32), atol=1e-4)
    assert torch.equal(batch.labels, torch.from_numpy(numbers % 4))
    assert torch.allclose(data.test.inputs, torch.tensor(scaled[held], dtype=torch.float32), atol=1e-4)


def test_named_test_files_are_the_test_part_and_content_changes_the_fingerprint(tmp_path):
    folder = shards(tmp_path / "s")
    shards(folder, rows=20, files=1, prefix="test")
    data = open_data(f"stream:{folder}")
    assert len(data.train) == 103 and len(data.test) == 20
    assert open_data(f"stream:{folder}").fingerprint == data.fingerprint
    shards(folder, rows=103, files=3, labels=3)
    assert open_data(f"stream:{folder}", classes=["c0", "c1", "c2", "c3"]).fingerprint != data.fingerprint


def png(value):
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "png")
    return {"bytes": file.getvalue(), "path": None}


def test_pictures_in_parquet_are_decoded_batch_by_batch(tmp_path):
    (tmp_path / "p").mkdir()
    pq.write_table(pa.table({"image": [png(n) for n in range(40)], "label": [n % 2 for n in range(40)]}), tmp_path / "p" / "a.parquet")
    data = open_data(f"stream:{tmp_path / 'p'}", test=8)
    assert data.input_shape == (1, 4, 4) and data.images and data.classes == ("0", "1")
    for batch in Batches(data.train, 8, seed=0).epoch(0):
        values = (batch.inputs[:, 0, 0, 0] * 255).round().long()
        assert torch.equal(batch.labels, values % 2) and batch.inputs.dtype == torch.float32


def test_a_hub_stream_gives_the_same_batches_after_a_stop(tmp_path):
    import datasets

    rows = {"x": [float(n) for n in range(90)], "label": [n % 3 for n in range(90)]}
    types = datasets.Features({"x": datasets.Value("float32"), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    datasets.Dataset.from_dict(rows, features=types).save_to_disk(tmp_path / "saved", num_shards=3)
    data = open_data(f"stream:hf:{tmp_path / 'saved'}", rows=90, test=10, buffer=20)
    assert len(data.train) == 80 and data.classes == ("a", "b", "c")
    batches = Batches(data.train, 8, seed=2)
    whole = seen(batches.epoch(1))
    assert len({round(x, 4) for batch in whole for x in batch}) == 80 and seen(batches.epoch(0)) != whole
    assert seen(batches.epoch(1, 4)) == whole[4:]
    with pytest.raises(UserError, match="no row numbers"):
        data.train.batch(torch.tensor([5]))
    with pytest.raises(UserError, match="has the classes a, b, c"):
        open_data(f"stream:hf:{tmp_path / 'saved'}", rows=90, test=10, classes=["a", "b"])


def test_a_student_learns_from_a_stream_and_a_stopped_run_ends_alike(tmp_path, tiny, limbeck):
    from sklearn.datasets import load_digits

    digits = load_digits()
    (tmp_path / "digits").mkdir()
    for part in range(3):
        own = slice(part, 1500, 3)
        table = {f"p{n}": digits.data[own, n] for n in range(64) if digits.data[:, n].std() > 0} | {"label": digits.target[own]}
        pq.write_table(pa.table(table), tmp_path / "digits" / f"train-{part}.parquet", row_group_size=100)
    tiny["data"] = {"source": f"stream:{tmp_path / 'digits'}", "test": 200, "args": {"buffer": 128}}
    tiny["teacher"]["train"] = {"steps": 60, "lr": 0.01}
    tiny |= {"baseline": False, "checkpoints": {"every_steps": 10, "keep": 9}}
    tiny["training"] |= {"steps": 60}
    (tmp_path / "r.yaml").write_text(json.dumps(tiny))
    done = limbeck("run", tmp_path / "r.yaml", "--out", tmp_path / "whole", "--quiet")
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["metrics"]["student"]["accuracy"] > 0.5 and summary["data"]["train"] == 1300
    stopped(tmp_path / "whole", tmp_path / "again", step=30)
    execute(resolve(tiny), tmp_path / "again", resume=True, report=False)
    weights = [(tmp_path / out / "student" / "model.safetensors").read_bytes() for out in ("whole", "again")]
    assert weights[0] == weights[1]


def test_a_teachers_outputs_for_a_stream_can_be_stored(tmp_path, tiny, limbeck):
    tiny["data"] = {"source": f"stream:{shards(tmp_path / 's', rows=400, group=50)}", "test": 40}
    tiny |= {"baseline": False, "training": {"steps": 10, "batch": 32}}
    (tmp_path / "r.yaml").write_text(json.dumps(tiny))
    stored = limbeck("cache", tmp_path / "r.yaml", "--out", tmp_path / "store")
    assert stored.returncode == 0, stored.stderr
    figures = []
    for name in ("live", "stored"):
        figures.append(execute(resolve(tiny), tmp_path / name, report=False).summary["metrics"]["student"]["nll"])
        tiny["teacher"]["store"] = str(tmp_path / "store")
    assert figures[1] == pytest.approx(figures[0], rel=1e-3)  # kept in half precision


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"buffer": 0}, "buffer is 0"),
        ({"label": "lable"}, "no label column 'lable'"),
        ({"columns": ["x9"]}, "no column 'x9'"),
        ({"classes": ["c0"]}, "which is none of its 1"),
        ({"labelled": 5}, "cannot be hidden"),
        ({"train": 50}, "cannot be cut"),
        ({"rows": 103}, "rows is for stream:hf:"),
        ({"config": "en"}, "config is for stream:hf:"),
        ({"size": 8}, "are for pictures"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, change, words):
    with pytest.raises(UserError, match=words):
        open_data(f"stream:{shards(tmp_path / 's')}", test=10, **change)


@pytest.mark.parametrize("label", [None, 0])
def test_a_label_that_is_no_class_is_said_also_where_it_counts_as_false(tmp_path, label):
    (tmp_path / "s").mkdir()
    pq.write_table(pa.table({"x": [float(n) for n in range(20)], "label": [1, 2] * 9 + [1, label]}), tmp_path / "s" / "a.parquet")
    with pytest.raises(UserError, match=f"class {label}, which is none of its 2"):
        open_data(f"stream:{tmp_path / 's'}", test=4, classes=[1, 2])  # the last row is held out, so it is read now


@pytest.mark.parametrize("kind", ["table", "pictures"])
def test_altered_shards_give_rows_or_one_line(tmp_path, kind):
    """Bytes of footers, pages and pictures; an altered footer once ended the whole process inside pyarrow."""
    draw, path = random.Random(1), tmp_path / "x.parquet"
    columns = {"x0": np.arange(24.0)} if kind == "table" else {"image": [png(n) for n in range(24)]}
    table = pa.table(columns | {"label": [f"c{n % 3}" for n in range(24)]})
    pq.write_table(table, path, row_group_size=6, compression="none", use_dictionary=False)
    sound, answers = path.read_bytes(), set()
    for _ in range(60):
        altered = bytearray(sound)
        for _ in range(draw.randint(1, 3)):
            altered[draw.randrange(len(altered))] = draw.randrange(256)
        path.write_bytes(altered)
        try:
            answers.add(sum(map(len, Batches(open_data(f"stream:{path}", test=4).train, 4, seed=0).epoch(0))))
        except UserError as error:
            answers.add(error.message.isprintable())
    assert {20, True} <= answers and False not in answers


def test_broken_and_foreign_shards_are_named(tmp_path):
    folder = shards(tmp_path / "s")
    with pytest.raises(UserError, match="no Parquet files"):
        open_data(f"stream:{tmp_path / 'nothing'}")
    pq.write_table(pa.table({"y": [1.0]}), folder / "train-9.parquet")
    with pytest.raises(UserError, match="other columns"):
        open_data(f"stream:{folder}")
    (folder / "train-9.parquet").write_bytes(b"PAR1 torn")
    with pytest.raises(UserError, match=r"train-9.*not a readable Parquet file"):
        open_data(f"stream:{folder}")
