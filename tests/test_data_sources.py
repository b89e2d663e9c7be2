"""Files and Python objects as data, and every mistake that a user can make with them."""

import gzip

import numpy
import pandas
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from limbeck.data import Batches, DatasetSplit, LoaderSplit, TensorSplit, open_data
from limbeck.errors import UserError

torch.set_num_threads(1)


def fails(match, *args, **kwargs):
    with pytest.raises(UserError, match=match) as caught:
        open_data(*args, **kwargs)
    assert caught.value.hint


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + b"".join(n.to_bytes(4, "big") for n in array.shape) + array.astype("uint8").tobytes()


def idx_folder(folder, zipped=False, samples=20):
    pack, end = (gzip.compress, ".gz") if zipped else (bytes, "")
    for part, count in (("train", samples), ("t10k", 10)):
        pixels = numpy.arange(count * 12).reshape(count, 3, 4) % 256
        (folder / f"{part}-images-idx3-ubyte{end}").write_bytes(pack(idx(pixels)))
        (folder / f"{part}-labels-idx1-ubyte{end}").write_bytes(pack(idx(numpy.arange(count) % 5)))
    return folder


def picture_folder(folder, parts=("",), size=(6, 6), mode="RGB", count=5):
    from PIL import Image

    for part in parts:
        for name, grey in (("cat", 40), ("dog", 200)):
            (folder / part / name).mkdir(parents=True)
            for i in range(count):
                Image.new(mode, size, (grey + i,) * 3 if mode == "RGB" else grey + i).save(folder / part / name / f"{i}.png")
    return folder


@pytest.fixture
def table(tmp_path):
    frame = pandas.DataFrame({"a": range(40), "b": [x * 0.5 for x in range(40)], "kind": ["red", "blue"] * 20})
    frame.to_csv(tmp_path / "t.csv", index=False)
    frame.to_parquet(tmp_path / "t.parquet")
    return tmp_path


@pytest.mark.parametrize("zipped", [False, True])
def test_idx(tmp_path, zipped):
    data = open_data(f"idx:{idx_folder(tmp_path, zipped)}")
    assert (len(data.train), len(data.test), data.input_shape, len(data.classes)) == (20, 10, (1, 3, 4), 5)
    assert data.train.batch(torch.tensor([1])).inputs[0, 0, 0, 0] == pytest.approx(12 / 255)


def test_idx_mistakes(tmp_path):
    fails("no folder", f"idx:{tmp_path / 'nowhere'}")
    fails("has no train-images", f"idx:{tmp_path}")
    path = idx_folder(tmp_path) / "train-images-idx3-ubyte"
    whole = path.read_bytes()
    path.write_bytes(whole[:-5])
    fails("truncated", f"idx:{tmp_path}")
    path.write_bytes(b"\x89PNG" + whole)
    fails("not an IDX file", f"idx:{tmp_path}")
    path.write_bytes(gzip.compress(whole)[:-20])
    fails("cannot be read", f"idx:{tmp_path}")
    path.write_bytes(idx(numpy.zeros((7, 3, 4))))
    fails("belong together|has shape", f"idx:{tmp_path}")


def test_fashion_mnist_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr("limbeck.data.embedded.FASHION_FOLDER", tmp_path / "none")
    fails("apt-get install dataset-fashion-mnist", "fashion-mnist")


def test_folder_of_pictures(tmp_path):
    data = open_data(f"folder:{picture_folder(tmp_path)}", test=4)
    assert data.classes == ("cat", "dog") and data.input_shape == (3, 6, 6) and data.images and len(data.test) == 4
    grey = open_data(f"folder:{tmp_path}", test=4, size=4, channels=1)
    assert grey.input_shape == (1, 4, 4) and grey.fingerprint != data.fingerprint


def test_folder_with_parts(tmp_path):
    data = open_data(f"folder:{picture_folder(tmp_path, ('train', 'test', 'val'), mode='L')}")
    assert (len(data.train), len(data.test), len(data.valid), data.input_shape) == (10, 10, 10, (1, 6, 6))


def test_big_folder_is_read_when_asked_for(tmp_path, monkeypatch):
    picture_folder(tmp_path, ("train", "test"))
    small = open_data(f"folder:{tmp_path}")
    monkeypatch.setattr("limbeck.data.folder.IN_MEMORY", 0)
    big = open_data(f"folder:{tmp_path}")
    assert isinstance(big.train, DatasetSplit) and torch.equal(big.train.labels, small.train.labels)
    index = torch.tensor([3, 8])
    assert torch.equal(big.train.batch(index).inputs, small.train.batch(index).inputs)


def test_folder_mistakes(tmp_path):
    from PIL import Image

    fails("no folder", f"folder:{tmp_path / 'nowhere'}")
    fails("no class folders", f"folder:{tmp_path}")
    (tmp_path / "empty").mkdir()
    fails("no pictures", f"folder:{tmp_path}")
    picture_folder(tmp_path)
    fails("class 'empty' has no sample", f"folder:{tmp_path}", test=2)
    (tmp_path / "empty").rmdir()
    Image.new("RGB", (9, 5)).save(tmp_path / "dog" / "wide.png")
    fails("differ in size: 6 x 6 and 9 x 5", f"folder:{tmp_path}")
    assert open_data(f"folder:{tmp_path}", size=6).input_shape == (3, 6, 6)
    path = tmp_path / "cat" / "0.png"
    path.write_bytes(path.read_bytes()[:50])
    fails("not a readable picture", f"folder:{tmp_path}", size=6)
    fails("channels is 2", f"folder:{tmp_path}", channels=2)


def test_folder_with_a_strange_test_class(tmp_path):
    picture_folder(tmp_path, ("train", "test"))
    (tmp_path / "test" / "dgo").mkdir()
    fails("'dgo'.*'dog'", f"folder:{tmp_path}")


@pytest.mark.parametrize("kind", ["csv", "parquet"])
def test_tables(table, kind):
    data = open_data(f"{kind}:{table / f't.{kind}'}", label="kind", test=10)
    assert data.classes == ("blue", "red") and data.input_shape == (2,) and len(data.train) == 30
    assert torch.allclose(data.train.inputs.mean(0), torch.zeros(2), atol=1e-5)
    assert open_data(f"{kind}:{table / f't.{kind}'}", label="kind", columns=["b"]).input_shape == (1,)


def test_table_mistakes(table):
    fails("no label column 'knd'.*'kind'", f"csv:{table / 't.csv'}", label="knd")
    fails("no column named like a label", f"csv:{table / 't.csv'}")
    fails("'kind' is not numeric", f"csv:{table / 't.csv'}", label="a", test=4)
    fails("no column 'c'", f"csv:{table / 't.csv'}", label="kind", columns=["c"])
    fails("no file", f"csv:{table / 'u.csv'}")
    path = table / "bad.csv"
    path.write_text("")
    fails("not a readable CSV", f"csv:{path}")
    path.write_text("a,label\n")
    fails("no rows", f"csv:{path}")
    path.write_bytes(b"a,label\n\xff\xfe\x00,1\n")
    fails("not a readable CSV", f"csv:{path}")
    path.write_text("a,label\n1,x\n,y\n3,x\n4,y\n")
    fails("train data has NaN or infinity in inputs, first in sample 1", f"csv:{path}")
    path.write_text("a,label\n1,x\n2,\n")
    fails("label of sample 1 is missing", f"csv:{path}")
    path.write_text("a,label\n1,0.5\n2,1\n")
    fails("fractions", f"csv:{path}")
    whole = (table / "t.parquet").read_bytes()
    (table / "t.parquet").write_bytes(whole[: len(whole) // 2])
    fails("not a readable Parquet", f"parquet:{table / 't.parquet'}", label="kind")


def rows(count=20, **columns):
    import datasets

    return datasets.Dataset.from_dict({**columns, "label": [i % 2 for i in range(count)]})


def test_datasets_of_numbers_and_lists(tmp_path):
    made = rows(a=[float(i) for i in range(20)], b=list(range(20)))
    data = open_data(made, test=4)
    assert data.input_shape == (2,) and torch.allclose(data.train.inputs.mean(0), torch.zeros(2), atol=1e-5)
    made.save_to_disk(str(tmp_path / "saved"))
    assert open_data(f"hf:{tmp_path / 'saved'}", test=4).fingerprint == data.fingerprint
    assert open_data(rows(v=[[1.0, 2.0, 3.0]] * 20), test=4).input_shape == (3,)
    fails("cannot be made a tensor", rows(v=[[1.0] * (1 + i % 2) for i in range(20)]))


def test_datasets_of_tokens():
    data = open_data(rows(input_ids=[[5] * (1 + i % 3) for i in range(20)], text=["x"] * 20), test=4)
    inputs = data.example(3).inputs
    assert set(inputs) == {"input_ids", "attention_mask"} and data.input_shape == (3,)
    assert torch.equal(inputs["attention_mask"], (inputs["input_ids"] == 5).long())


def test_datasets_of_pictures(monkeypatch):
    import datasets
    from PIL import Image

    names = datasets.ClassLabel(names=["night", "day"])
    features = datasets.Features({"image": datasets.Image(), "label": names})
    content = {"image": [Image.new("L", (5, 4), i) for i in range(20)], "label": [i % 2 for i in range(20)]}
    made = datasets.DatasetDict({p: datasets.Dataset.from_dict(content, features) for p in ("train", "validation", "test")})
    data = open_data(made)
    assert data.classes == ("night", "day") and data.input_shape == (1, 4, 5) and len(data.valid) == 20 and data.images
    monkeypatch.setattr("limbeck.data.hub.IN_MEMORY", 0)
    lazy = open_data(made, size=8, channels=3, train=10)
    assert not isinstance(lazy.train, TensorSplit) and lazy.input_shape == (3, 8, 8) and len(lazy.train) == 10
    assert next(Batches(lazy.train, 4).epoch(0)).inputs.max() <= 1


def test_datasets_mistakes(tmp_path):
    fails("'label'", rows(a=list(range(20))), label="lable")
    fails("no column that can be an input", rows(text=["x"] * 20))
    fails("no folder", f"hf:{tmp_path / 'nowhere'}")
    (tmp_path / "junk").mkdir()
    fails("cannot be opened", f"hf:{tmp_path / 'junk'}")


def test_tensors_and_arrays():
    x, y = torch.rand(20, 3), torch.arange(20) % 4
    data = open_data({"train": (x, y), "test": (x[:8], y[:8])}, classes=("a", "b", "c", "d"))
    assert len(data.test) == 8 and data.classes[3] == "d" and data.kind == "multiclass"
    assert open_data((x.numpy().astype("float64"), y.numpy())).train.inputs.dtype == torch.float32
    many = open_data((x, torch.rand(20, 5).round()))
    assert many.kind == "multilabel" and len(many.classes) == 5
    assert open_data(x).classes == () and open_data(x).train.labels is None
    assert open_data((x, y % 2), kind="binary").kind == "binary"
    words = open_data(({"input_ids": torch.ones(20, 6, dtype=torch.long)}, y))
    assert words.input_shape == (6,) and words.example(2).inputs["input_ids"].shape == (2, 6)


def test_datasets_and_loaders_of_torch():
    x, y = torch.rand(24, 3), torch.arange(24) % 3
    pairs = [(a, int(b)) for a, b in zip(x, y)]
    assert isinstance(open_data(TensorDataset(x, y)).train, TensorSplit)
    data = open_data({"train": pairs, "test": DataLoader(pairs, batch_size=5)})
    assert isinstance(data.train, DatasetSplit) and data.test.batch_size == 5
    assert torch.equal(data.train.labels, y) and torch.equal(data.train.batch(torch.tensor([4, 2])).inputs, x[[4, 2]])
    hidden = open_data(pairs, test=6, labelled=6)
    assert int(next(Batches(hidden.train, 18).epoch(0)).labelled.sum()) == 6
    triples = open_data([{"x": a, "y": b, "weight": 1.0} for a, b in pairs], test=6)
    assert set(triples.example().inputs) == {"x", "weight"}
    custom = DataLoader(
        pairs, batch_size=4, collate_fn=lambda items: {"x": torch.stack([i[0] for i in items]), "label": [i[1] for i in items]}
    )
    assert open_data(custom, test=6).example(2).inputs.shape == (2, 3)


class Stream(IterableDataset):
    def __iter__(self):
        return iter([(torch.full((2,), float(i)), i % 3) for i in range(10)])


def test_iterable_loader_keeps_its_own_order():
    loader = DataLoader(Stream(), batch_size=4)
    data = open_data({"train": loader, "test": loader})
    batches = Batches(data.train, 4)
    assert isinstance(data.train, LoaderSplit) and len(data.train) == 10 and batches.steps_per_epoch == 3 and len(data.classes) == 3
    whole, tail = list(batches.epoch(0)), list(batches.epoch(0, 1))
    assert len(tail) == 2 and torch.equal(tail[0].inputs, whole[1].inputs) and len(data.example(2)) == 2
    with pytest.raises(UserError, match="no batch positions"):
        batches.batch_at(0, 0)
    fails("cannot be split", loader)
    fails("cannot be hidden", {"train": loader, "test": loader}, labelled=3)


def test_general_mistakes():
    x, y = torch.rand(20, 3), torch.arange(20) % 4
    fails("unknown data 'digit'.*'digits'", "digit")
    fails("unknown kind of data 'cvs'.*'csv'", "cvs:file")
    fails("takes no argument 'size'", "digits", size=3)
    fails("'classes' is 'many'", "glyphs", classes="many")
    fails("95 classes", "glyphs", classes=95)
    fails("unknown kind", "iris", kind="multi")
    fails("asks for 5000 samples, but there are only 1347", "digits", train=5000)
    fails("leaves none to train on", (x, y), test=20)
    fails("test is 0", (x, y), test=0)
    fails("train is 1.5", (x, y), train=1.5)
    fails("the train data is empty", (x[:0], y[:0]))
    fails("labels has shape", (x, y[:5]))
    fails("class '1' has no sample", (x, (y > 1).long() * 2))
    fails("test data has the label 3", {"train": (x, y % 3), "test": (x, y)})
    fails("without a label", (x, y), labelled=3)
    fails("no labels", x, labelled=3)
    fails("labels are fractions", (x, y + 0.5))
    fails("cannot be read as data", 5)
    fails("parts", {"training": (x, y)})
    x[3, 1] = torch.inf
    fails("test data has NaN or infinity in inputs, first in sample 3", {"train": (torch.rand(20, 3), y), "test": (x, y)})
    fails("cannot be joined", [(torch.zeros(1 + i % 2), 0) for i in range(9)])
    fails("train data has NaN.*sample 3", list(zip(x, y)))
