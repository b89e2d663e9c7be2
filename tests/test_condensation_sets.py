"""Synthetic sets, problems, experts and protocols: what they promise, and the mistakes on the way."""

import copy
import json

import pytest
import torch
import torch.nn.functional as F

from limbeck import models
from limbeck import recipe as schema
from limbeck.condensation import job
from limbeck.condensation.experts import Buffer, Schooling
from limbeck.condensation.functional import Functional
from limbeck.condensation.methods.datm import DATM
from limbeck.condensation.methods.distribution_matching import DistributionMatching
from limbeck.condensation.methods.fyi import FYI, mirrored
from limbeck.condensation.methods.gradient_matching import GradientMatching
from limbeck.condensation.methods.infer import INFER
from limbeck.condensation.methods.ncfm import NCFM
from limbeck.condensation.methods.trajectory_matching import TrajectoryMatching
from limbeck.condensation.problem import Problem
from limbeck.condensation.students import Lessons, StudentsProgram, lessons, train_students
from limbeck.condensation.synthetic import SyntheticSet
from limbeck.data import open_data
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Interrupted
from limbeck.engine.session import Session, seed_everything
from limbeck.errors import UserError
from limbeck.signals import Reader

torch.set_num_threads(1)
CLOCK = Clock(0, 10, 10)


def problem(per_class=2, session=None, student=None, **condense):
    data = open_data("digits", train=300, valid=60)
    spec = schema.Condense(per_class=per_class, **condense)
    inner = student or schema.Model(model="convnet", args={"width": 4, "depth": 2})
    return Problem(data, spec, inner, session or Session())


# ---- the set ----


def small_set(**options):
    torch.manual_seed(0)
    return SyntheticSet(torch.randn(4, 1, 8, 8), torch.tensor([0, 0, 1, 1]), ("a", "b"), **options)


def test_canvases_are_cut_into_enlarged_quadrants():
    made = small_set(factor=2)
    x, y = made.decode()
    assert x.shape == (16, 1, 8, 8) and y.tolist() == [0] * 8 + [1] * 8 and len(made) == 16
    quadrant = made.images[1:2, :, 4:, :4]
    assert torch.allclose(x[4 + 2], F.interpolate(quadrant, size=(8, 8), mode="bilinear", align_corners=False)[0])
    with pytest.raises(UserError, match="cannot be cut"):
        small_set(factor=3)


def test_patterns_are_added_and_gradients_reach_them():
    compose = torch.tensor([[0, -1], [0, 1], [3, 0]])
    made = small_set(patterns=torch.ones(2, 1, 8, 8) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1), compose=compose)
    x, y = made.decode()
    assert torch.allclose(x[0], made.images[0]) and torch.allclose(x[1], made.images[0] + 2) and torch.allclose(x[2], made.images[3] + 1)
    assert y.tolist() == [0, 0, 1] and torch.equal(made.of_class(1), x[2:])
    x[:2].sum().backward()
    assert float(made.patterns.grad[1].sum()) == 64 and float(made.patterns.grad[0].abs().sum()) == 0


@pytest.mark.parametrize(("format", "error", "size"), [("uint8", 1 / 255, 1), ("float16", 1e-3, 2), ("float32", 0.0, 4)])
def test_a_stored_set_is_close_and_its_bytes_are_counted(format, error, size, tmp_path):
    made = small_set(format=format, logits=torch.randn(4, 2), lr=0.03)
    stored = made.as_stored()
    images = made.images.detach()
    reach = float(images.max() - images.min())
    assert float((stored.images.detach() - images).abs().max()) <= error * reach * 0.51 + 1e-7 * (error > 0) + (
        1e-3 if format == "float16" else 0
    )
    assert made.bytes()["images"] == 4 * 64 * size and made.bytes()["labels"] == 4 and made.bytes()["soft labels"] == 16
    made.save(tmp_path)
    opened = SyntheticSet.load(tmp_path)
    assert torch.equal(opened.images, stored.images) and float(opened.lr) == pytest.approx(0.03) and opened.how == made.how
    assert (tmp_path / "sheet.png").read_bytes().startswith(b"\x89PNG")


def test_a_torn_set_is_named(tmp_path):
    small_set().save(tmp_path)
    content = bytearray((tmp_path / "set.safetensors").read_bytes())
    content[-3] ^= 1
    (tmp_path / "set.safetensors").write_bytes(bytes(content))
    with pytest.raises(UserError, match="altered"):
        SyntheticSet.load(tmp_path)
    (tmp_path / "set.json").write_text("{")
    with pytest.raises(UserError, match="damaged"):
        SyntheticSet.load(tmp_path)
    with pytest.raises(UserError, match="no synthetic set"):
        SyntheticSet.load(tmp_path / "nothing")


def test_stored_views_are_a_function_of_seed_and_epoch():
    made = small_set().with_views(seed=7, mix="cutmix", alpha=1.0, augment=["shift:1"])
    torch.manual_seed(1)
    first, order = made.view(3)
    state = torch.get_rng_state()
    second, again = made.view(3)
    assert torch.equal(first, second) and torch.equal(order, again) and torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, made.view(4)[0])
    with pytest.raises(UserError, match="stored labels"):
        made.store_views(torch.zeros(2, 3, 2))
    made.store_views(torch.randn(5, 4, 2), temperature=4.0)
    assert made.bytes()["soft labels"] == 5 * 4 * 2 * 2 and made.soft and not made.hard().soft
    given = lessons(made, 10)
    batch = next(iter(given.epoch(8, 0)))  # five epochs are stored: the eighth is the third again
    assert torch.equal(batch.x, made.view(3)[0]) and torch.equal(batch.y, made.view_logits[3].float())


def test_it_opens_as_other_peoples_data():
    pytest.importorskip("datasets")
    made = small_set(mean=torch.full((1, 1, 1), 0.4), std=torch.full((1, 1, 1), 0.2), logits=torch.randn(4, 2))
    x, y, z = made.torch_dataset()[2]
    assert torch.allclose(x, made.images[2] * 0.2 + 0.4) and int(y) == 1 and z.shape == (2,)
    rows = made.hf_dataset()
    assert rows.features["label"].names == ["a", "b"] and len(rows) == 4 and "logits" in rows.column_names


# ---- the problem ----


def test_standardised_units_and_their_bounds():
    own = problem()
    x, y = own.all()
    assert float(x.mean()) == pytest.approx(0, abs=1e-4) and float(x.std(correction=0)) == pytest.approx(1, abs=1e-4)
    low, high = own.pixel_bounds()
    assert float(x.min()) == pytest.approx(float(low), abs=1e-5) and float(x.max()) == pytest.approx(float(high), abs=1e-5)
    torch.manual_seed(0)
    some = own.real(3, 5)
    of_three = x[y == 3]
    assert len(some) == 5 and all(any(torch.equal(a, b) for b in of_three) for a in some)
    assert len(own.real(3, 10_000)) == len(own.of_class(3))


def test_methods_of_one_seed_begin_with_the_same_samples():
    a, b = problem(), problem()
    torch.manual_seed(5)
    first = a.initial("real")
    torch.manual_seed(9)
    assert torch.equal(first.images, b.initial("real").images) and first.labels.tolist() == [c for c in range(10) for _ in range(2)]
    assert len({tuple(i.flatten().tolist()) for i in b.initial("kmeans").images.detach()}) == 20


def test_problems_that_cannot_be_posed():
    with pytest.raises(UserError, match="fewer than the 200"):
        problem(per_class=200)
    with pytest.raises(UserError, match="changes pictures"):
        Problem(open_data("wine"), schema.Condense(siamese="crop"), schema.Model(model="mlp"), Session())
    with pytest.raises(UserError, match=r"no training sample|no sample"):
        x = torch.rand(40, 1, 4, 4)
        data = open_data({"train": (x, torch.arange(40) % 3), "test": (x, torch.arange(40) % 3)})
        data.train.labels[data.train.labels == 1] = -1
        Problem(data, schema.Condense(), schema.Model(model="mlp"), Session())


# ---- students ----


def test_students_together_learn_what_each_learns_alone():
    """The stacked forward pass (vmap) gives each network the weights that it gets by itself."""
    own = problem()
    made = own.initial("real")
    training = schema.Training(steps=8, batch=64, optimizer="sgd", lr=0.05, nesterov=False, warmup=0)
    torch.manual_seed(0)
    networks = [own.network() for _ in range(3)]
    alone = copy.deepcopy(networks)
    rates = [0.01, 0.05, 0.1]
    assert StudentsProgram(networks, lessons(made, 64), training, rates).stacked
    train_students(networks, lessons(made, 64), training, rates)
    for network, rate, together in zip(alone, rates, networks):
        assert not StudentsProgram([network], lessons(made, 64), training, [rate]).stacked
        train_students([network], lessons(made, 64), training, [rate])
        for a, b in zip(network.parameters(), together.parameters()):
            assert torch.allclose(a, b, atol=1e-5)


def test_a_student_that_diverges_does_not_stop_the_others():
    own = problem()
    training = schema.Training(steps=30, batch=64, optimizer="sgd", lr=0.05, warmup=0)
    networks = [own.network() for _ in range(3)]
    train_students(networks, lessons(own.initial("real"), 64), training, [0.05, 1e8, 0.05])
    assert all(bool(torch.isfinite(p).all()) for n in (networks[0], networks[2]) for p in n.parameters())


def test_no_gradient_is_left_on_the_images():
    own = problem()
    made = own.initial("real")
    train_students([own.network()], lessons(made, 64), schema.Training(steps=2, warmup=0), [0.01])
    assert made.images.grad is None


def test_lessons_are_in_an_order_of_their_own():
    given = Lessons(torch.arange(10.0)[:, None], torch.arange(10), 4, seed=3)
    seen = torch.cat([batch.y for batch in given.epoch(2, 0)])
    assert len(seen) == 8 and len(set(seen.tolist())) == 8
    assert torch.equal(next(iter(given.epoch(2, 1))).y, seen[4:])


# ---- methods against formulas ----


def test_distribution_matching_against_a_loop(monkeypatch):
    own = problem()
    made, method = own.initial("noise"), DistributionMatching(batch_real=10**6)
    network = own.network()
    monkeypatch.setattr(own, "network", lambda reuse=None, outputs=None: network)
    found = method.losses("set", made, own, CLOCK)["means"]
    features = lambda x: network.pool(network.stages(x))  # noqa: E731
    x, y = own.all()
    expected = sum(((features(x[y == c]).mean(0) - features(made.of_class(c)).mean(0)) ** 2).sum() for c in range(10))
    assert float(found) == pytest.approx(float(expected), rel=1e-4)
    found.backward()
    assert made.images.grad is not None and all(p.grad is None for p in network.parameters())


def test_gradient_matching_by_finite_differences(monkeypatch):
    """The gradient of the distance of gradients reaches the images (a gradient of a gradient)."""
    own = problem(per_class=1)
    made, method = own.initial("noise"), GradientMatching(batch_real=4, outer_loop=1, inner_loop=1)
    method.prepare(own)
    made.double()
    own._standard = own.all()[0].double()
    real = {c: own.at(own.of_class(c)[:4]) for c in range(10)}
    monkeypatch.setattr(own, "real", lambda c, n: real[c])
    network = own.network().double()
    monkeypatch.setattr(own, "network", lambda reuse=None, outputs=None: network)
    loss = method.losses("set", made, own, CLOCK)["gradients"]
    loss.backward()
    gradient, step = made.images.grad.clone(), 1e-5
    direction = torch.randn_like(gradient)
    with torch.no_grad():
        made.images += step * direction
    above = float(method.losses("set", made, own, CLOCK)["gradients"].detach())
    with torch.no_grad():
        made.images -= 2 * step * direction
    below = float(method.losses("set", made, own, CLOCK)["gradients"].detach())
    assert (above - below) / (2 * step) == pytest.approx(float((gradient * direction).sum()), rel=1e-3)


def test_the_frequency_network_climbs():
    own = problem()
    made, method = own.initial("noise"), NCFM(batch_real=16, frequencies=64, models=0, minmax=True, lr_frequencies=0.5)
    seed_everything(0)
    method.prepare(own)
    optimizers = method.optimizers(made)
    values = []
    for _ in range(15):
        method.losses("set", made, own, CLOCK)
        torch.manual_seed(1)
        loss = method.losses("frequencies", made, own, CLOCK)["ascent"]
        values.append(float(loss.detach()))
        optimizers["frequencies"].zero_grad()
        loss.backward()
        optimizers["frequencies"].step()
        method._renew = lambda problem: None
    assert values[-1] > values[0]


def test_mirrored_matching_sees_both_sides():
    """With FYI a set and its mirror image have the same loss; without it they have not."""
    own = problem(per_class=1)
    x = own.initial("real").images.detach()
    assert torch.equal(mirrored(x)[10:], x.flip(-1))

    def loss(method, images):
        made = own.make(images, own.labels())
        method.prepare(own)
        torch.manual_seed(0)
        return float(method.losses("set", made, own, CLOCK)["means"].detach())

    fyi = FYI(base="distribution-matching", base_settings={"batch_real": 20})
    plain = DistributionMatching(batch_real=20)
    assert loss(fyi, x) == pytest.approx(loss(fyi, x.flip(-1)), rel=1e-4)
    assert loss(plain, x) != pytest.approx(loss(plain, x.flip(-1)), rel=1e-3)
    for base in ("krr-st", "fyi", "random-real", "sre2l"):
        with pytest.raises(UserError, match="cannot wrap"):
            FYI(base=base)
    with pytest.raises(UserError, match="mirrors pictures"):
        FYI().prepare(Problem(open_data("wine"), schema.Condense(), schema.Model(model="mlp"), Session()))


TINY_EXPERTS = {
    "experts": 2,
    "epochs": 4,
    "expert_batch": 64,
    "expert_lr": 0.05,
    "syn_steps": 3,
    "expert_epochs": 2,
    "max_start": 2,
    "lr_images": 5.0,
}


def test_constant_and_full_memory_point_the_same_way():
    own = problem()
    found = {}
    for use in ("full", "constant"):
        method = TrajectoryMatching(memory_use=use, **TINY_EXPERTS)
        method.prepare(own)
        made = method.begin(own)
        torch.manual_seed(0)
        method.losses("set", made, own, CLOCK)["trajectory"].backward()
        found[use] = made.images.grad.flatten(), float(made.lr.grad)
    assert float(F.cosine_similarity(found["full"][0], found["constant"][0], 0)) > 0.95
    assert found["full"][1] * found["constant"][1] > 0


def test_windows_widen_and_bad_ones_are_refused():
    method = DATM(min_start=2, start_now=4, max_start=10, expand_over=6, epochs=20, expert_epochs=2)
    ends = [method.starts(Clock(step, 10, 10))[1] for step in range(8)]
    assert ends == [4, 5, 6, 7, 8, 9, 10, 10]
    with pytest.raises(UserError, match="beyond the experts"):
        TrajectoryMatching(**{**TINY_EXPERTS, "max_start": 4}).prepare(problem())
    with pytest.raises(UserError, match="not above"):
        TrajectoryMatching(**{**TINY_EXPERTS, "min_start": 3}).prepare(problem())


def test_a_step_beyond_the_threshold_changes_nothing():
    own = problem()
    method = DATM(**{**TINY_EXPERTS, "threshold": 1e-9, "rho": 0.05})
    method.prepare(own)
    made = method.begin(own)
    optimizer = method.optimizers(made)["set"]
    before = {k: v.clone() for k, v in made.state_dict().items()}
    for _ in range(2):
        optimizer.zero_grad()
        method.losses("set", made, own, CLOCK)["trajectory"].backward()
        optimizer.step()
        method.after_step(made, own, CLOCK)
    assert all(torch.equal(v, before[k]) for k, v in made.state_dict().items())
    assert all(float(b.abs().sum()) == 0 for s in optimizer.state.values() for b in s.values())


def test_consensus_labels_come_from_experts_that_are_right():
    own = problem()
    method = DATM(**{**TINY_EXPERTS, "rho": 0.05})
    method.prepare(own)
    made = method.begin(own)
    x, y = made.decode()
    z = method._last_logits(x.detach())
    for i in range(len(x)):
        right = [z[e, i] for e in range(len(z)) if int(z[e, i].argmax()) == int(y[i])] or list(z[:, i])
        assert torch.allclose(made.logits[i], torch.stack(right).mean(0), atol=1e-5)


def test_a_rate_that_turns_negative_is_kept_positive_and_told():
    own = problem()
    method = TrajectoryMatching(**TINY_EXPERTS)
    method.prepare(own)
    made = method.begin(own)
    with torch.no_grad():
        made.lr.fill_(-0.1)
    assert method.alarms() == []
    method.after_step(made, own, CLOCK)
    assert float(made.lr) == pytest.approx(1e-6) and "negative" in method.alarms()[0] and method.alarms() == []


def test_a_pattern_is_shared_by_all_classes():
    raw = {"student": "convnet", "data": {"source": "digits", "train": 300}, "condense": {"per_class": 5}, "teacher": None}
    own = problem(per_class=5)
    own.teachers = {name: own.network() for name in "abcd"}
    made = INFER().begin(own)
    assert len(made.images) == 30 and made.patterns.shape[0] == 12 and len(made) == 10 * 3 * 5 and raw
    by_pattern = {p: sorted({int(made.labels[i]) for i, q in made.compose.tolist() if q == p}) for p in range(12)}
    assert all(classes == list(range(10)) for classes in by_pattern.values())
    own.per_class = 1
    with pytest.raises(UserError, match="do not pay"):
        INFER().begin(own)


# ---- experts ----


def schooling(**changes):
    return Schooling(**{"count": 2, "epochs": 2, "batch": 64, "lr": 0.05, **changes})


def test_experts_are_the_weights_after_every_epoch(tmp_path):
    own = problem()
    buffer = Buffer(own, schooling(), tmp_path).make()
    path = buffer.trajectory(0)
    assert path.shape == (3, buffer.functional.size) and not torch.equal(path[0], buffer.trajectory(1)[0])
    x, y = own.all()
    losses = [float(F.cross_entropy(buffer.functional(w, x), y)) for w in path]
    assert losses[2] < losses[1] < losses[0]
    more = Buffer(own, schooling(count=3), tmp_path)
    before = (tmp_path / "expert-000.safetensors").stat().st_mtime_ns
    more.make()
    assert (tmp_path / "expert-000.safetensors").stat().st_mtime_ns == before and more.trajectory(2).shape == path.shape


def test_an_interrupted_buffer_goes_on_with_equal_bits(tmp_path):
    whole = Buffer(problem(), schooling(), tmp_path / "whole").make()

    from limbeck.engine.callbacks import Callback

    class Stop(Callback):
        def log(self, record):
            if record["phase"] == "expert-1" and record["step"] >= 5:
                raise KeyboardInterrupt

    session = Session(checkpoints=schema.Checkpoints(every_steps=1), callbacks=[Stop()])
    with pytest.raises((KeyboardInterrupt, Interrupted)):
        Buffer(problem(session=session), schooling(), tmp_path / "cut").make()
    index = json.loads((tmp_path / "cut" / "index.json").read_text())
    assert list(index["experts"]) == ["0"]  # the finished one is kept
    resumed = Buffer(problem(session=Session(digest="another run")), schooling(), tmp_path / "cut").make()
    for number in range(2):
        assert torch.equal(whole.trajectory(number), resumed.trajectory(number))


def test_torn_experts_are_named_and_made_again_alone(tmp_path):
    own = problem()
    Buffer(own, schooling(), tmp_path).make()
    kept = Buffer(own, schooling(), tmp_path).trajectory(1)
    file = tmp_path / "expert-001.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(UserError, match="expert-001") as caught:
        Buffer(own, schooling(), tmp_path).trajectory(1)
    assert "only this one" in caught.value.hint
    file.unlink()
    assert torch.equal(Buffer(own, schooling(), tmp_path).make().trajectory(1), kept)


def test_experts_of_something_else_are_refused(tmp_path):
    Buffer(problem(), schooling(), tmp_path).make()
    wide = schema.Model(model="convnet", args={"width": 8, "depth": 2})
    with pytest.raises(UserError, match="another network"):
        Buffer(problem(student=wide), schooling(), tmp_path).trajectory(0)
    with pytest.raises(UserError, match="another schooling"):
        Buffer(problem(), schooling(lr=0.1), tmp_path).make()
    data = open_data("digits", train=200, valid=60)
    other = Problem(data, schema.Condense(), schema.Model(model="convnet", args={"width": 4, "depth": 2}), Session())
    with pytest.raises(UserError, match="another data"):
        Buffer(other, schooling(), tmp_path).make()
    with pytest.raises(UserError, match="other shapes"):
        Functional(problem().network()).flatten(problem(student=wide).network())


# ---- protocol ----


def protocol_of(**condense):
    raw = {
        "student": {"model": "convnet", "args": {"width": 4, "depth": 2}},
        "data": {"source": "digits", "train": 300, "valid": 60},
        "condense": {"per_class": 1, "students": {"steps": 10}, "seeds": 2, **condense},
    }
    recipe = schema.resolve(raw)
    own = job.open_problem(recipe, models.open_recipe_data(recipe.data), Session(), {})
    return own.protocol(recipe), own


def test_scores_are_repeatable_and_leave_the_random_state_alone():
    protocol, own = protocol_of()
    made = own.initial("real").as_stored()
    torch.manual_seed(4)
    state = torch.get_rng_state()
    first = protocol.score(made)
    assert torch.equal(state, torch.get_rng_state())
    again, _ = protocol_of()
    assert again.score(made).accuracies == first.accuracies and len(first.accuracies) == 2


def test_the_rate_is_chosen_on_validation_and_the_test_is_not_looked_at(monkeypatch):
    protocol, own = protocol_of(lrs=[1e-9, 0.1])
    looked = []
    original = protocol._part
    monkeypatch.setattr(protocol, "_part", lambda name: looked.append(name) or original(name))
    score = protocol.score(own.initial("real").as_stored())
    assert score.lr == 0.1 and looked == ["valid", "measured"]
    with pytest.raises(UserError, match="no validation split"):
        recipe = schema.resolve({"student": "convnet", "data": "digits", "condense": {"lrs": [0.1, 0.2]}})
        job.open_problem(recipe, models.open_recipe_data(recipe.data), Session(), {}).protocol(recipe)


def test_a_set_with_targets_is_probed():
    protocol, own = protocol_of()
    made = own.make(own.initial("real").images, torch.zeros(10, dtype=torch.long), targets=torch.randn(10, 6))
    made.how = {**made.how, "loss": "mse", "probe_classes": [0, 1, 2]}
    score = protocol.score(made)
    assert all(0.4 < a <= 1 for a in score.accuracies)


def test_a_reader_is_not_needed_to_know_the_features():
    """Features of a teacher are those that any reader of it gives."""
    own = problem()
    own.teachers = {"a": own.network().eval()}
    index = own.of_class(2)[:5]
    expected = Reader(own.teachers["a"], ("embedding",))(own.at(index)).embedding
    assert torch.allclose(own.features(index, "teacher"), expected)
    own.teachers = {}
    with pytest.raises(UserError, match="the recipe names none"):
        own.features(index, "teacher")
