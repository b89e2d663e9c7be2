"""Splits, draws, order of batches, hidden labels, augmentation."""

import subprocess
import sys

import pytest
import torch
from torch.utils.data import Dataset

from limbeck.data import Augment, Batch, Batches, DatasetSplit, TensorSplit, as_batch, listing, open_data
from limbeck.data.choose import hide, stratified
from limbeck.errors import UserError

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def digits():
    return open_data("digits")


class Noisy(Dataset):
    """Items with randomness of their own, as an augmenting user dataset has."""

    def __len__(self):
        return 23

    def __getitem__(self, index):
        return torch.full((3,), float(index)) + 0.1 * torch.rand(3), index % 3


def same(one: Batch, other: Batch) -> bool:
    return torch.equal(one.inputs, other.inputs) and torch.equal(one.labels, other.labels) and torch.equal(one.index, other.index)


def test_importing_is_light():
    heavy = {"sklearn", "transformers", "datasets", "matplotlib", "pandas", "torchvision"}
    upper = tuple(f"limbeck.{name}" for name in ("run", "cli", "method", "engine", "knowledge"))
    code = f"import sys, limbeck.data, limbeck.zoo; bad = {heavy} & set(sys.modules); assert not bad, bad;"
    code += f"up = [m for m in sys.modules if m.startswith({upper})]; assert not up, up"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_digits_are_scikit_learns_and_need_no_import_of_it():
    """Importing scikit-learn takes longer than reading its file by a hundred times; every run of the first recipe would wait for it."""
    code = "import sys; from limbeck.data.embedded import digits; digits(); print('sklearn' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "False"
    from sklearn.datasets import load_digits

    from limbeck.data.embedded import digits

    own, theirs = digits().train, load_digits()
    assert torch.equal(own.inputs, torch.from_numpy(theirs.images).float().div(16)[:, None])
    assert torch.equal(own.labels, torch.from_numpy(theirs.target).long())


def test_digits_are_split_evenly_and_without_overlap(digits):
    assert (len(digits.train), len(digits.test), digits.input_shape, digits.images) == (1347, 450, (1, 8, 8), True)
    counts = torch.bincount(digits.test.labels)
    assert counts.min() >= 43 and counts.max() <= 47
    assert digits.train.inputs.min() == 0 and digits.train.inputs.max() == 1
    whole = open_data("digits", test=450, train=1347)
    assert torch.equal(whole.train.inputs, digits.train.inputs)


def test_parts_are_disjoint_and_cover():
    inputs = torch.arange(200.0)[:, None]
    labels = torch.arange(200) % 4
    data = open_data((inputs, labels), test=40, valid=0.25, seed=3)
    seen = torch.cat([p.inputs[:, 0] for p in (data.train, data.test, data.valid)]).long()
    assert sorted(seen.tolist()) == list(range(200))
    assert (len(data.test), len(data.valid), len(data.train)) == (40, 40, 120)
    for part in (data.train, data.test, data.valid):
        assert torch.bincount(part.labels).unique().numel() == 1
    smaller = open_data((inputs, labels), test=40, train=12, seed=3)
    assert torch.equal(smaller.test.inputs, data.test.inputs), "the test part does not depend on the others"


def test_draws_repeat_and_follow_the_seed(digits):
    assert open_data("digits").fingerprint == digits.fingerprint
    assert open_data("digits", seed=1).fingerprint != digits.fingerprint
    assert open_data("digits", labelled=50).fingerprint != digits.fingerprint
    labels = torch.tensor([0] * 90 + [1] * 10)
    assert torch.bincount(labels[stratified(labels, 100, 20, 0)]).tolist() == [18, 2]
    assert torch.equal(stratified(labels, 100, 20, 5), stratified(labels, 100, 20, 5))
    assert not torch.equal(stratified(labels, 100, 20, 5), stratified(labels, 100, 20, 6))
    assert len(stratified(None, 50, 7, 0).unique()) == 7


def test_hidden_labels():
    data = open_data("digits", labelled=103)
    known = data.train.labels >= 0
    assert data.labelled == 103 and int(known.sum()) == 103
    assert sorted(torch.bincount(data.train.labels[known]).tolist()) == [10] * 7 + [11] * 3
    assert torch.equal(data.train.labels[known], data.hidden_labels[known])
    assert torch.equal(data.with_all_labels().train.labels, data.hidden_labels) and data.with_all_labels().labelled == 1347
    small = data.only_labelled()
    assert len(small.train) == 103 and (small.train.labels >= 0).all()
    assert len({data.fingerprint, small.fingerprint, data.with_all_labels().fingerprint}) == 3
    assert torch.equal(hide(data.hidden_labels, 20, 0), hide(data.hidden_labels, 20, 0))


def test_batch_carries_positions(digits):
    index = torch.tensor([5, 0, 7])
    batch = digits.train.batch(index)
    assert torch.equal(batch.index, index) and torch.equal(batch.inputs, digits.train.inputs[index])
    assert torch.equal(batch.labels, digits.train.labels[index])
    assert len(digits.example(4)) == 4
    assert torch.equal(digits.train.subset(index).inputs, batch.inputs)


@pytest.mark.parametrize("shuffle", [True, False])
def test_epoch_visits_every_sample_once(digits, shuffle):
    batches = Batches(digits.train, 100, shuffle=shuffle, drop_last=False)
    seen = torch.cat([b.index for b in batches.epoch(2)])
    assert sorted(seen.tolist()) == list(range(1347)) and batches.steps_per_epoch == 14 == len(batches)
    assert torch.equal(seen, torch.arange(1347)) is not shuffle


def test_drop_last_by_default_only_when_shuffling(digits):
    assert Batches(digits.train, 100).steps_per_epoch == 13
    assert Batches(digits.train, 100, shuffle=False).steps_per_epoch == 14
    assert Batches(digits.train, 5000).steps_per_epoch == 1


@pytest.mark.parametrize("share", [None, 0.5])
@pytest.mark.parametrize("start", [0, 1, 5])
def test_resuming_in_the_middle_is_exact(share, start):
    data = open_data("digits", labelled=60)
    whole = list(Batches(data.train, 64, seed=9, labelled_share=share).epoch(3))
    fresh = Batches(data.train, 64, seed=9, labelled_share=share)
    tail = list(fresh.epoch(3, start))
    assert len(tail) == len(whole) - start and all(map(same, tail, whole[start:]))
    assert same(fresh.batch_at(3, start), whole[start])


def test_order_is_a_function_of_seed_and_epoch(digits):
    batches = Batches(digits.train, 64, seed=1)
    later = batches.batch_at(7, 2)
    assert not same(batches.batch_at(6, 2), later) and not same(Batches(digits.train, 64, seed=2).batch_at(7, 2), later)
    torch.rand(10)
    assert same(batches.batch_at(7, 2), later)
    state = torch.get_rng_state()
    list(batches.epoch(0))
    assert torch.equal(state, torch.get_rng_state()), "the order takes nothing from the global generator"


def test_labelled_share_is_kept_in_each_batch():
    data = open_data("digits", labelled=50)
    batches = Batches(data.train, 40, labelled_share=0.25)
    seen = []
    for batch in batches.epoch(0):
        assert int(batch.labelled.sum()) == 10 and len(batch) == 40
        seen.append(batch.index[10:])
    unlabelled = torch.cat(seen)
    assert len(unlabelled.unique()) == len(unlabelled), "no repeats within one round of the unlabelled"
    first_round = torch.cat([batches.batch_at(0, s).index[:10] for s in range(5)])
    assert sorted(first_round.tolist()) == (data.train.labels >= 0).nonzero()[:, 0].tolist()


def test_labelled_share_needs_both_kinds(digits):
    with pytest.raises(UserError, match="no unlabelled samples"):
        Batches(digits.train, 10, labelled_share=0.5)
    with pytest.raises(UserError, match="one side empty"):
        Batches(digits.train, 10, labelled_share=1.0)
    with pytest.raises(UserError, match="no labels"):
        Batches(TensorSplit(torch.zeros(9, 2)), 4, labelled_share=0.5)


def test_workers_change_no_bit():
    split = DatasetSplit(Noisy())
    alone = list(Batches(split, 4, seed=2).epoch(1))
    ahead = list(Batches(split, 4, seed=2, workers=2).epoch(1, 2))
    assert all(map(same, ahead, alone[2:])) and len(ahead) == 3
    state = torch.get_rng_state()
    list(Batches(split, 4).epoch(0))
    assert torch.equal(state, torch.get_rng_state())


def test_opening_leaves_the_generators_alone():
    state = torch.get_rng_state()
    one, other = open_data(Noisy(), test=5), open_data(Noisy(), test=5)
    assert torch.equal(state, torch.get_rng_state()) and one.fingerprint == other.fingerprint
    assert open_data({"train": Noisy(), "test": Noisy()}).fingerprint != one.fingerprint


def test_batches_refuse_nonsense(digits):
    with pytest.raises(UserError, match="batch size"):
        Batches(digits.train, 0)
    with pytest.raises(UserError, match="no samples"):
        Batches(TensorSplit(torch.zeros(0, 2)), 4)
    with pytest.raises(IndexError):
        Batches(digits.train, 64).batch_at(0, 21)


def test_uint8_pictures_come_out_as_floats():
    split = TensorSplit(torch.tensor([[0, 255]], dtype=torch.uint8), torch.tensor([1]))
    assert split.batch(torch.tensor([0])).inputs.tolist() == [[0.0, 1.0]]


def test_as_batch_reads_common_forms():
    x, y = torch.rand(4, 2), torch.tensor([[0], [1], [2], [0]])
    assert as_batch((x, y, "more")).labels.tolist() == [0, 1, 2, 0] and as_batch((x, y, "more")).extra == {"item_2": "more"}
    assert torch.equal(as_batch({"x": x, "label": y}).inputs, x)
    assert set(as_batch({"input_ids": x, "labels": y}).inputs) == {"input_ids"}
    assert as_batch(x).labels is None
    with pytest.raises(UserError, match="'target'"):
        as_batch({"x": x, "target": y}, "targte")


def test_tables_are_scaled_by_the_training_part():
    data = open_data("wine")
    assert torch.allclose(data.train.inputs.mean(0), torch.zeros(13), atol=1e-5)
    assert torch.allclose(data.train.inputs.std(0, correction=0), torch.ones(13), atol=1e-5)
    assert data.test.inputs.mean(0).abs().max() > 0.01 and not data.images


def test_glyphs_hold_out_whole_drawings():
    data = open_data("glyphs", classes=94, jitters=2, size=12)
    assert data.input_shape == (1, 12, 12) and len(data.classes) == 94 and data.classes[10] == "LATIN CAPITAL LETTER A"
    assert len(data.train) == 3 * len(data.test) == 94 * 18
    rows = {r.numpy().tobytes() for r in data.train.inputs}
    assert sum(r.numpy().tobytes() in rows for r in data.test.inputs) < 0.02 * len(data.test)
    assert data.fingerprint == open_data("glyphs", classes=94, jitters=2, size=12).fingerprint
    assert open_data("glyphs", characters="aoe", jitters=2).classes[0] == "LATIN SMALL LETTER A"


def test_listing_tells_the_truth():
    for row in listing():
        if row["available"] and row["name"] not in ("fashion-mnist", "stdlib-graphs"):  # syntax trees differ between versions
            data = open_data(row["name"])
            assert (len(data.train) + len(data.test), len(data.classes), list(data.input_shape)) == (
                row["samples"],
                row["classes"],
                row["shape"],
            )


@pytest.mark.parametrize("step", ["shift:2", "flip", "noise:0.1", "rotate:20", "scale:0.2", "cutout:3", "brightness"])
def test_augmentations_change_pictures_and_repeat(step):
    x = torch.rand(16, 3, 10, 8)
    augment = Augment([step])
    torch.manual_seed(4)
    one = augment(x)
    torch.manual_seed(4)
    assert torch.equal(augment(x), one) and one.shape == x.shape and not torch.equal(one, x)
    assert Augment(augment.describe()).describe() == augment.describe()


def test_shift_moves_whole_pixels():
    x = torch.zeros(50, 1, 5, 5)
    x[:, 0, 2, 2] = 1
    torch.manual_seed(0)
    moved = Augment(["shift:1"])(x)
    assert (moved.flatten(1).sum(1) == 1).all() and (moved[:, 0, 1:4, 1:4].flatten(1).sum(1) == 1).all()
    assert moved.mean(0)[0, 1:4, 1:4].gt(0).all()


def test_augment_touches_training_batches_only(digits):
    data = digits.with_augment(Augment([{"noise": 0.5}]))
    batch = next(Batches(data.train, 8).epoch(0))
    assert not torch.equal(batch.inputs, digits.train.inputs[batch.index])
    assert torch.equal(data.train.batch(torch.arange(3)).inputs, digits.train.inputs[:3])


def test_augment_errors():
    with pytest.raises(UserError, match="'rotate'"):
        Augment(["rotat:3"])
    with pytest.raises(UserError, match="amount"):
        Augment(["shift:much"])
    with pytest.raises(UserError, match="pictures"):
        Augment(["flip"])(torch.zeros(4, 3))
