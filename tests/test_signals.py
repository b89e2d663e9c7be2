"""Readers: taps, early stop, copies, exceptions, and where logits are found."""

import copy
import pickle
import time
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from limbeck.errors import UserError
from limbeck.signals import Reader, Signals, anatomy, call, logits_of, shape_of

torch.set_num_threads(1)


class Counted(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.count = inner, 0

    def forward(self, x):
        self.count += 1
        return self.inner(x)


class Net(nn.Module):
    """Two resolutions, one ReLU for both, a head of its own."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(1, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        self.relu = nn.ReLU()
        self.late = Counted(nn.Conv2d(6, 6, 1))
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(6, 3)

    def parts(self, x):
        first = torch.relu(self.a(x))
        second = torch.relu(self.b(first))
        late = self.late.inner(second)
        embedding = late.mean((2, 3))
        return first, second, late, embedding, self.head(embedding)

    def forward(self, x):
        return self.head(self.drop(self.late(self.relu(self.b(self.relu(self.a(x))))).mean((2, 3))))


def hook_count(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net().eval()


@pytest.fixture
def x():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))


def test_taps_equal_a_forward_by_hand(net, x):
    first, second, late, embedding, logits = net.parts(x)
    said = Reader(net, ["logits", "output", "embedding", "stages", "at:late", "b", "relu#0", "relu"])(x)
    assert torch.equal(said.logits, logits) and torch.equal(said.output, logits)
    assert torch.equal(said.embedding, embedding)
    assert [s.shape for s in said.stages] == [first.shape, late.shape]
    assert torch.equal(said.stages[0], first) and torch.equal(said.stages[1], late)
    assert torch.equal(said.at["late"], late) and torch.equal(said.at["relu#0"], first) and torch.equal(said.at["relu"], second)
    assert set(said.at) == {"late", "b", "relu#0", "relu"}


def test_all_calls_of_a_module(net, x):
    first, second, *_ = net.parts(x)
    values = Reader(net, ["relu"], all=True)(x).at["relu"]
    assert len(values) == 2 and torch.equal(values[0], first) and torch.equal(values[1], second)


def test_single_stage_keeps_its_place(net, x):
    said = Reader(net, ["stages[-1]"])(x)
    assert said.stages[0] is None and torch.equal(said.stages[1], net.parts(x)[2])
    with pytest.raises(UserError, match=r"stages\[7\].*2 stages"):
        Reader(net, ["stages[7]"])(x)


def test_logits_only_installs_no_hooks_and_is_cheap(net, x):
    reader = Reader(net, ["logits"])
    assert torch.equal(reader(x).logits, net(x)) and hook_count(net) == 0
    identity = nn.Identity()
    reader, small = Reader(identity, ["logits"]), torch.zeros(1)

    def seconds(function):
        best = 1.0
        for _ in range(15):
            start = time.perf_counter()
            for _ in range(2000):
                function(small)
            best = min(best, time.perf_counter() - start)
        return best / 2000

    assert seconds(reader) - seconds(identity) < 10e-6  # about 1 us on an idle machine; room for a busy one


def test_early_stop_does_not_run_later_layers(net, x):
    known = anatomy(net, x)
    net.late.count = 0
    said = Reader(net, ["stages[0]", "b"], anatomy=known, stop_early=True)(x)
    assert net.late.count == 0 and said.output is None
    assert torch.equal(said.stages[0], net.parts(x)[0]) and torch.equal(said.at["b"], net.b(net.parts(x)[0]))
    ran = []
    net.head.register_forward_hook(lambda *_: ran.append(1))
    said = Reader(net, ["embedding"], anatomy=known, stop_early=True)(x)
    assert net.late.count == 1 and not ran and torch.equal(said.embedding, net.parts(x)[3])
    Reader(net, ["embedding", "logits"], anatomy=known, stop_early=True)(x)
    assert net.late.count == 2


def test_early_stop_makes_its_own_dry_pass_and_spares_other_callers(net, x):
    reader = Reader(net, ["relu"], stop_early=True)
    said = reader(x)
    assert torch.equal(said.at["relu"], net.parts(x)[1])
    assert torch.equal(net(x), net.parts(x)[4])  # the hooks act only inside the reader


def test_early_stop_passes_through_a_model_that_catches_exceptions(x):
    class Guarded(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Net()

        def forward(self, x):
            try:
                return self.inner(x)
            except Exception:
                return None

    model = Guarded().eval()
    assert Reader(model, ["inner.a"], stop_early=True)(x).output is None
    assert model.inner.late.count == 1  # the dry pass only


def test_gradient_kept_or_not(net, x):
    assert Reader(net, ["embedding", "logits"])(x).embedding.requires_grad
    said = Reader(net, ["embedding", "logits"], grad=False)(x)
    assert not said.embedding.requires_grad and not said.logits.requires_grad
    assert not Reader(net, ["logits"], grad=False)(x).logits.requires_grad
    loss = Reader(net, ["stages"])(x).stages[0].sum()
    loss.backward()
    assert net.a.weight.grad is not None and net.head.weight.grad is None


def test_hooks_leave_with_the_reader(net, x):
    with Reader(net, ["embedding", "stages", "b"]) as reader:
        reader(x)
        held = hook_count(net)
        reader(x)
        assert held > 0 and hook_count(net) == held
    assert hook_count(net) == 0
    assert torch.equal(reader(x).embedding, net.parts(x)[3])
    reader.close()
    assert hook_count(net) == 0


def test_an_exception_in_the_model_leaves_the_reader_usable(net, x):
    reader = Reader(net, ["a", "embedding"], anatomy=anatomy(net, x))
    with pytest.raises(RuntimeError):
        reader(torch.zeros(2, 5, 8, 8))
    assert torch.equal(reader(x).embedding, net.parts(x)[3])
    net.train()
    with pytest.raises(RuntimeError):
        anatomy(net, torch.zeros(2, 5, 8, 8))
    assert net.training and net.a.training
    reader.close()
    assert hook_count(net) == 0


def test_copies_of_the_model_do_not_write_to_the_reader(net, x):
    reader = Reader(net, ["late"], stop_early=True)
    reader(x)
    student = copy.deepcopy(net)
    again = pickle.loads(pickle.dumps(net))
    reader._tape.active = True
    assert torch.equal(student(x), net.parts(x)[4]) and torch.equal(again(x), net.parts(x)[4])
    assert reader._tape.values == {}
    reader._tape.active = False
    twin = copy.deepcopy(reader)
    with torch.no_grad():
        net.a.weight.zero_()
    assert torch.equal(twin(x).at["late"], student.parts(x)[2])


def test_unknown_path_names_the_nearest(net):
    with pytest.raises(UserError, match=r"unknown module path 'lat' in Net.*'late'"):
        Reader(net, ["lat"])
    with pytest.raises(UserError, match="'logits'"):
        Reader(net, ["logit"])


def test_functional_head_is_named_when_asked_for(x):
    class Functional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Linear(64, 5)
            self.weight = nn.Parameter(torch.randn(3, 5))

        def forward(self, x):
            return torch.relu(self.body(x.flatten(1))) @ self.weight.T

    model = Functional()
    assert anatomy(model, x).head is None
    with pytest.raises(UserError, match="no classifier head module"):
        Reader(model, ["embedding"])(x)
    assert Reader(model, ["stages"])(x).stages[0].shape == (2, 5)


def test_a_module_that_did_not_run_is_named(net, x):
    net.idle = nn.Linear(1, 1)
    with pytest.raises(UserError, match=r"'idle' of Net gave no tensor"):
        Reader(net, ["idle"])(x)
    with pytest.raises(UserError, match="2 calls"):
        Reader(net, ["relu#5"])(x)


def test_attention_of_multihead_layers_is_read_without_changing_the_output():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    model = nn.Sequential(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Flatten(), nn.Linear(40, 3)).eval()
    x = torch.randn(2, 5, 8)
    said = Reader(model, ["attention", "logits"])(x)
    assert [a.shape for a in said.attention] == [(2, 2, 5, 5)] * 2
    torch.testing.assert_close(said.attention[0].sum(-1), torch.ones(2, 2, 5))
    torch.testing.assert_close(said.logits, model(x))
    with pytest.raises(UserError, match="no attention modules"):
        Reader(Net(), ["attention"])(torch.randn(2, 1, 8, 8))


def test_conv_head_and_its_flat_embedding():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 3, 1), nn.Flatten())
    x = torch.randn(2, 1, 8, 8)
    assert anatomy(model, x).head == "3"
    assert Reader(model, ["embedding"])(x).embedding.shape == (2, 4)


def test_tuple_outputs_and_dict_inputs():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.line = nn.Linear(4, 4)

        def forward(self, x, scale=None):
            y = self.line(x)
            return (y if scale is None else y * scale), None

    model, x = Block(), torch.randn(2, 4)
    assert torch.equal(Reader(nn.Sequential(model), ["0"])(x).at["0"], model.line(x))
    assert torch.equal(call(model, {"x": x, "scale": 2.0})[0], model.line(x) * 2)
    assert torch.equal(call(model, (x, 2.0))[0], call(model, [x, 2.0])[0])
    assert torch.equal(Reader(model, ["logits"])({"x": x}).logits, model.line(x))


@dataclass
class Answer:
    score: Tensor
    logits: Tensor


def test_logits_of():
    t = torch.zeros(2, 3)
    for output in (t, (t, 1), [None, t], {"logits": t, "loss": t[0]}, {"out": t, "aux": t}, Answer(t[0], t), {"whatever": t}):
        assert logits_of(output) is t
    with pytest.raises(UserError, match="a dict with 'first', 'second'"):
        logits_of({"first": t, "second": t})
    for output in (None, 3, ()):
        with pytest.raises(UserError, match="no logits"):
            logits_of(output)
    assert shape_of((None, t)) == (2, 3) and shape_of(None) is None


def test_signals_say_what_was_not_read():
    with pytest.raises(AttributeError, match=r"'embedding' was not read.*logits"):
        _ = Signals(logits=1).embedding
