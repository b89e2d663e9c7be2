"""The same from Python: own modules, own data of every kind, Hugging Face models, every kind of teacher."""

import copy

import pytest
import torch
from torch import nn

import limbeck as library
from limbeck.storage import tensors_fingerprint

FAST = {"steps": 12, "batch": 16, "baseline": False, "trackers": [], "device": "cpu", "threads": 1}


def mlp(width=16, classes=3):
    torch.manual_seed(width)
    return nn.Sequential(nn.Linear(5, width), nn.ReLU(), nn.Linear(width, classes))


def points(n=90):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 5, generator=generator)
    return x, (x[:, 0] > 0).long() + (x[:, 1] > 0).long()


@pytest.mark.parametrize("form", ["tensors", "dataset", "loader", "parts", "hf"])
def test_data_of_every_kind(form, tmp_path):
    from torch.utils.data import DataLoader, TensorDataset

    x, y = points()
    if form == "hf":
        datasets = pytest.importorskip("datasets")
        data = datasets.Dataset.from_dict({"x": x.tolist(), "label": y.tolist()})
    else:
        data = {
            "tensors": (x, y),
            "dataset": TensorDataset(x, y),
            "loader": DataLoader(TensorDataset(x, y), batch_size=16),
            "parts": {"train": (x[:60], y[:60]), "test": (x[60:], y[60:])},
        }[form]
    teacher, student = mlp(32), mlp(4)
    before = tensors_fingerprint(teacher.state_dict()), tensors_fingerprint(student.state_dict())
    result = library.distill(teacher=teacher, student=student, data=data, out=tmp_path / "out", **FAST)
    assert (tensors_fingerprint(teacher.state_dict()), tensors_fingerprint(student.state_dict())) == before, (
        "an object of the user's was changed"
    )
    assert tensors_fingerprint(result.student.state_dict()) != before[1]
    assert (tmp_path / "out/report.html").is_file()
    assert result.summary["metrics"]["student"]["accuracy"] > 0


class Wrapped(nn.Module):
    """Outputs as other people's models give them."""

    def __init__(self, form, width):
        super().__init__()
        self.net, self.form = mlp(width), form

    def forward(self, x):
        logits = self.net(x)
        return {"tuple": (logits, x), "dict": {"logits": logits, "x": x}}[self.form]


@pytest.mark.parametrize("form", ["tuple", "dict"])
def test_outputs_of_other_shapes(form, tmp_path):
    library.distill(teacher=Wrapped(form, 16), student=Wrapped(form, 4), data=points(), out=tmp_path / "out", **FAST)


def test_hugging_face_teacher_and_student(tmp_path):
    """A BERT-type classifier from a local folder teaches a smaller one; the student's folder opens with transformers alone."""
    transformers = pytest.importorskip("transformers")
    common = {"vocab_size": 50, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 3}
    teacher = transformers.BertForSequenceClassification(transformers.BertConfig(hidden_size=32, num_hidden_layers=2, **common))
    teacher.save_pretrained(tmp_path / "teacher")
    student = transformers.BertForSequenceClassification(transformers.BertConfig(hidden_size=16, num_hidden_layers=1, **common))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 50, (64, 8), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    data = {"train": (inputs, ids[:, 0] % 3), "test": (inputs, ids[:, 0] % 3)}
    result = library.distill(teacher=f"hf:{tmp_path / 'teacher'}", student=student, data=data, out=tmp_path / "out", **FAST)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "out/student").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, result.student(**inputs).logits)
    assert "kd" in (tmp_path / "out/student/README.md").read_text()


def run(tiny, tmp_path, **changes):
    return library.run_recipe({**tiny, "baseline": False, **changes}, out=tmp_path / "out")


@pytest.mark.parametrize("teacher", [{"kind": "ema", "decay": 0.9}, {"kind": "history"}])
def test_teachers_without_a_network(tiny, tmp_path, teacher):
    result = run(tiny, tmp_path, teacher=teacher)
    assert "teacher" not in result.summary["metrics"] or teacher["kind"] == "ema"


def test_ensemble_with_weights(tiny, tmp_path):
    """The teacher's row is the weighted mean of the members' probabilities."""
    network = tiny["teacher"]
    other = copy.deepcopy(network)
    other["train"]["seed"] = 1
    result = run(tiny, tmp_path, teacher={"models": {"a": network, "b": other}, "weights": {"a": 3, "b": 1}})
    alone = run(tiny, tmp_path / "a", teacher=network), run(tiny, tmp_path / "b", teacher=other)
    from limbeck.storage import load_tensors

    said = [load_tensors(r.folder / "predictions.safetensors")["logits.teacher"].softmax(1) for r in (result, *alone)]
    torch.testing.assert_close(said[0], 0.75 * said[1] + 0.25 * said[2], atol=1e-5, rtol=1e-4)


def test_online_teacher_learns_from_labels(tiny, tmp_path):
    """With kd, an online teacher gets the labels' loss as a term of its own, and the given recipe's teacher starts untrained."""
    teacher = {"kind": "online", **{k: v for k, v in tiny["teacher"].items() if k != "train"}}
    tiny["training"] |= {"steps": 150}
    result = run(tiny, tmp_path, teacher=teacher)
    assert '"teacher"' in (tmp_path / "out/log.jsonl").read_text()
    assert result.summary["metrics"]["teacher"]["accuracy"] > 0.5


def test_moving_average_by_hand():
    from limbeck.knowledge.teachers import MovingAverageTeacher

    student = nn.Linear(2, 2)
    teacher = MovingAverageTeacher(student, 0.9)
    first = student.weight.detach().clone()
    with torch.no_grad():
        student.weight += 1
    teacher.after_step(student)
    torch.testing.assert_close(teacher.network.weight, 0.9 * first + 0.1 * (first + 1))


def test_router_weights_each_sample():
    """A router gives each sample its own teacher: the logits are that teacher's probabilities."""
    from limbeck.data import Batch
    from limbeck.knowledge.teachers import EnsembleTeacher, FrozenTeacher

    a, b = FrozenTeacher(nn.Linear(5, 3)), FrozenTeacher(nn.Linear(5, 3))
    batch = Batch(torch.randn(2, 5))
    said = EnsembleTeacher({"a": a, "b": b}, lambda batch: torch.tensor([[1.0, 0.0], [0.0, 1.0]]))(batch)
    torch.testing.assert_close(said.logits.softmax(1)[0], a(batch).logits.softmax(1)[0])
    torch.testing.assert_close(said.logits.softmax(1)[1], b(batch).logits.softmax(1)[1])


def test_multilabel_and_binary(tmp_path):
    x, _ = points()
    labels = torch.stack([x[:, 0] > 0, x[:, 1] > 0, x[:, 2] > 0], 1).float()
    result = library.distill(teacher=mlp(32), student=mlp(4), data=(x, labels), out=tmp_path / "m", **FAST)
    assert "map" in result.summary["metrics"]["student"]
    result = library.distill(
        teacher=mlp(32, 1), student=mlp(4, 1), data=(x, (x[:, 0] > 0).long()), task="binary", out=tmp_path / "b", **FAST
    )
    assert result.summary["metrics"]["student"]["accuracy"] > 0


def test_losses_alone_in_somebodys_loop():
    from limbeck.losses import forward_kl

    student, teacher = mlp(4), mlp(16)
    x, _ = points()
    with torch.no_grad():
        t = teacher(x)
    forward_kl(student(x), t, temperature=2.0).backward()
    assert all(p.grad is not None for p in student.parameters())


def test_a_users_own_method(tmp_path):
    """Method 185 in one class, given as an object."""
    from dataclasses import dataclass

    from limbeck import Card, Distiller, setting

    @dataclass
    class Squared(Distiller):
        """Match the logits themselves."""

        card = Card(id="squared", title="t", year=2026, wing="knowledge", family="mine", claim="c", equation="(s - t)^2")
        weight: float = setting(1.0, "weight", above=0)

        def loss(self, batch, student, teacher, clock):
            return {"squared": self.weight * (student.logits - teacher.logits).square().mean()}

    result = library.distill(teacher=mlp(32), student=mlp(4), data=points(), method=Squared(weight=2.0), out=tmp_path / "out", **FAST)
    assert result.summary["method"] == "squared"
