"""Stored teacher outputs: forms, resuming, checksums, fingerprints, random access."""

import shutil

import pytest
import torch
from torch import nn

from limbeck.errors import UserError
from limbeck.signals.store import Store, StoreWriter, dense_logits, model_fingerprint, plan_bytes

torch.set_num_threads(1)

N, C, D = 50, 12, 5


@pytest.fixture
def rows():
    generator = torch.Generator().manual_seed(0)
    return {"logits": 4 * torch.randn(N, C, generator=generator), "embedding": torch.randn(N, D, generator=generator)}


def writer(folder, **changes):
    arguments = dict(
        teacher_fingerprint="teacher-a", data_fingerprint="data-a", samples=N, signals={"logits": (C,), "embedding": (D,)}, shard_size=16
    )
    return StoreWriter(folder, **{**arguments, **changes})


def fill(store, rows, first=0, last=N, batch=7):
    for i in range(first, last, batch):
        index = torch.arange(i, min(i + batch, last))
        store.write(index, {name: value[index % N] for name, value in rows.items()})


def whole(folder, rows, **changes):
    store = writer(folder, **changes)
    fill(store, rows)
    store.finish()
    return folder


@pytest.mark.parametrize("ram_limit", [10**9, 0], ids=["memory", "mapped"])
@pytest.mark.parametrize(("form", "tolerance"), [("float32", 0.0), ("float16", 2**-10)])
def test_round_trip_at_random_rows(tmp_path, rows, form, tolerance, ram_limit):
    store = Store(whole(tmp_path / "s", rows, form=form), ram_limit=ram_limit)
    assert store.in_memory == bool(ram_limit) and len(store) == N
    index = torch.tensor([49, 3, 3, 17, 0, 31, 32, 16, 15])
    read = store.read(index)
    for name, value in rows.items():
        assert read[name].dtype == torch.float32
        assert ((read[name].double() - value[index].double()).abs() <= tolerance * value[index].double().abs() + 1e-7).all()
    said = store.signals(index)
    assert torch.equal(said.logits, read["logits"]) and torch.equal(said.embedding, read["embedding"])


@pytest.mark.parametrize("ram_limit", [10**9, 0], ids=["memory", "mapped"])
def test_top_k_keeps_probabilities(tmp_path, rows, ram_limit):
    store = Store(whole(tmp_path / "s", rows, form="topk", k=3), ram_limit=ram_limit)
    index = torch.tensor([40, 2, 33])
    read = store.read(index)
    assert read["logits.values"].dtype == torch.float16 and read["logits.indices"].dtype == torch.int16
    assert store.bytes_per_sample == 3 * 2 + 3 * 2 + 4 + D * 2
    true = rows["logits"][index].double().softmax(-1)
    kept, places = true.topk(3)
    assert torch.equal(read["logits.indices"].long(), places)
    torch.testing.assert_close(read["logits.rest"].double(), 1 - kept.sum(-1), rtol=1e-3, atol=1e-6)
    dense = store.dense_logits(index).double().softmax(-1)
    torch.testing.assert_close(dense.gather(-1, places), kept, rtol=1e-2, atol=1e-3)
    others = dense.scatter(-1, places, 0.0)
    torch.testing.assert_close(others.sum(-1), 1 - kept.sum(-1), rtol=1e-2, atol=1e-3)
    assert torch.allclose(others.amax(-1), others.sum(-1) / (C - 3))
    assert torch.equal(store.signals(index).logits, store.dense_logits(index))


def test_dense_logits_of_all_classes_are_the_logits():
    logits = torch.randn(4, 6)
    values, indices = logits.topk(6)
    assert torch.equal(dense_logits(values, indices, torch.zeros(4), 6), logits)


def test_killed_and_resumed_equals_undisturbed_byte_for_byte(tmp_path, rows):
    whole(tmp_path / "straight", rows)
    first = writer(tmp_path / "killed")
    fill(first, rows, last=42)
    del first  # as after SIGKILL: nothing is flushed
    (tmp_path / "killed" / ".shard-000002.safetensors.abc.tmp").write_bytes(b"half")
    (tmp_path / "killed" / "shard-000002.safetensors").write_bytes(b"renamed, but not in the manifest")
    with pytest.raises(UserError, match=r"not finished: 32 of 50.*goes on where it stopped"):
        Store(tmp_path / "killed")
    again = writer(tmp_path / "killed")
    assert again.next_index == 32
    fill(again, rows, first=28)  # rows that are stored already are left out
    again.finish()
    files = sorted(p.name for p in (tmp_path / "straight").iterdir())
    assert files == sorted(p.name for p in (tmp_path / "killed").iterdir()) and len(files) == 5
    for name in files:
        assert (tmp_path / "straight" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()
    assert writer(tmp_path / "killed").finished


def test_resume_after_a_torn_shard_starts_at_it(tmp_path, rows):
    folder = whole(tmp_path / "s", rows)
    path = folder / "shard-000001.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    again = writer(folder)
    assert again.next_index == 16 and not again.finished
    fill(again, rows, first=16)
    again.finish()
    torch.testing.assert_close(Store(folder).read(torch.arange(N))["embedding"], rows["embedding"], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("ram_limit", [10**9, 0])
def test_an_altered_byte_names_the_shard(tmp_path, rows, ram_limit):
    folder = whole(tmp_path / "s", rows)
    path = folder / "shard-000002.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"shard-000002\.safetensors is torn or was altered"):
        Store(folder, ram_limit=ram_limit)
    Store(folder, verify=False, ram_limit=ram_limit)
    path.unlink()
    with pytest.raises(UserError, match="shard-000002"):
        Store(folder, ram_limit=ram_limit)
    path.write_bytes(b"\x80\x04pickle")
    with pytest.raises(UserError, match="is a pickle"):
        Store(folder, verify=False, ram_limit=ram_limit)


def test_another_teacher_or_other_data_are_refused(tmp_path, rows):
    folder = whole(tmp_path / "s", rows)
    Store(folder, teacher_fingerprint="teacher-a", data_fingerprint="data-a")
    with pytest.raises(UserError, match=r"another teacher: .*teacher-a there, teacher-b now"):
        Store(folder, teacher_fingerprint="teacher-b")
    with pytest.raises(UserError, match=r"another data: .*data-a there, data-b now"):
        Store(folder, data_fingerprint="data-b")
    with pytest.raises(UserError, match=r"another teacher fingerprint: 'teacher-a' there, 'teacher-b' now"):
        writer(folder, teacher_fingerprint="teacher-b")
    with pytest.raises(UserError, match="another form"):
        writer(folder, form="float32")
    with pytest.raises(UserError, match="no stored teacher outputs"):
        Store(tmp_path / "nowhere")


def test_sizes_are_known_before_and_room_is_checked(tmp_path, rows, monkeypatch):
    folder = whole(tmp_path / "s", rows)
    store = Store(folder)
    assert store.bytes_per_sample == 2 * (C + D)
    planned = plan_bytes(N, {"logits": (C,), "embedding": (D,)}, shard_size=16)
    actual = sum(p.stat().st_size for p in folder.iterdir())
    assert N * store.bytes_per_sample < actual <= planned < actual + 6000
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 5))
    with pytest.raises(UserError, match="GB are free"):
        writer(tmp_path / "full" / "deep")
    assert not (tmp_path / "full").exists()


def test_views_have_their_own_rows(tmp_path, rows):
    store = writer(tmp_path / "s", views=2, form="float32")
    fill(store, rows)
    fill(store, {name: -value for name, value in rows.items()}, first=N, last=2 * N)
    store.finish()
    read = Store(tmp_path / "s")
    index = torch.tensor([4, 0])
    assert torch.equal(read.key(index, 1), index + N)
    assert torch.equal(read.read(read.key(index, 1))["logits"], -rows["logits"][index])


def test_what_cannot_be_written_is_refused(tmp_path, rows):
    store = writer(tmp_path / "s")
    with pytest.raises(UserError, match="the next is 0"):
        store.write(torch.tensor([3, 4]), rows)
    with pytest.raises(UserError, match=r"unknown signal to store 'embedding'"):
        store.write(torch.arange(2), {"logits": rows["logits"][:2]})
    with pytest.raises(UserError, match="shape"):
        store.write(torch.arange(2), {"logits": rows["logits"][:2, :3], "embedding": rows["embedding"][:2]})
    with pytest.raises(UserError, match="float16 cannot hold"):
        store.write(torch.arange(2), {"logits": rows["logits"][:2] * 1e6, "embedding": rows["embedding"][:2]})
    with pytest.raises(UserError, match="2 rows were announced and 3 given"):
        store.write(torch.arange(2), {name: value[:3] for name, value in rows.items()})
    with pytest.raises(UserError, match="0 of 50"):
        store.finish()
    for arguments in ({"form": "topk"}, {"form": "topk", "k": 13}, {"form": "int8"}, {"signals": {}}):
        with pytest.raises(UserError):
            writer(tmp_path / "t", **arguments)
    with pytest.raises(UserError, match="larger than the one"):
        Store(whole(tmp_path / "u", rows)).read(torch.tensor([N]))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        writer(tmp_path / "file" / "below")


def test_numbered_stages_and_paths_become_signals(tmp_path):
    store = writer(tmp_path / "s", samples=2, signals={"stages[1]": (2, 3), "at:body.0": (4,)}, form="float32")
    store.write(torch.arange(2), {"stages[1]": torch.ones(2, 2, 3), "at:body.0": torch.ones(2, 4)})
    store.finish()
    said = Store(tmp_path / "s").signals(torch.tensor([1]))
    assert said.stages[0] is None and said.stages[1].shape == (1, 2, 3) and said.at["body.0"].shape == (1, 4)


def test_model_fingerprint_follows_weights_and_class():
    torch.manual_seed(0)
    a, b = nn.Linear(3, 2), nn.Linear(3, 2)
    assert model_fingerprint(a) == model_fingerprint(a) != model_fingerprint(b)
    b.load_state_dict(a.state_dict())
    assert model_fingerprint(a) == model_fingerprint(b) != model_fingerprint(nn.Sequential(a))
    with torch.no_grad():
        b.bias[0] += 1e-6
    assert model_fingerprint(a) != model_fingerprint(b)


def test_shards_of_others_are_taken_once_and_gaps_are_filled_in_order(tmp_path, rows):
    """What a worker wrote beside the store is moved in; rows fill the gaps; the result is that of one writer, byte for byte."""
    whole(tmp_path / "straight", rows)
    (tmp_path / "mixed").mkdir()

    def part(number):
        made = tmp_path / "mixed" / f".part-{number}"
        made.write_bytes((tmp_path / "straight" / f"shard-{number:06d}.safetensors").read_bytes())
        return made

    first = writer(tmp_path / "mixed")
    digests = [shard.sha256 for shard in writer(tmp_path / "straight").manifest().shards]
    first.commit(2, digests[2], part(2))
    first.commit(0, digests[0], part(0))
    first.commit(0, digests[0], part(0))
    assert first.missing() == [1, 3] and first.stored == 32 and first.next_index == 16
    assert not list((tmp_path / "mixed").glob(".part-*"))
    with pytest.raises(UserError, match="32 of 50"):
        first.finish()
    again = writer(tmp_path / "mixed")
    assert again.missing() == [1, 3] and again.next_index == 16
    again.write(torch.arange(16, 20), {name: value[16:20] for name, value in rows.items()})
    again.commit(1, digests[1], part(1))  # somebody else was faster
    assert again.next_index == 48
    fill(again, rows)  # everything again: only the gap is taken
    again.finish()
    files = {path.name: path.read_bytes() for path in (tmp_path / "straight").iterdir()}
    assert files == {path.name: path.read_bytes() for path in (tmp_path / "mixed").iterdir()}


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m["shards"][1].update(file="../elsewhere.safetensors"),
        lambda m: m["shards"].reverse(),
        lambda m: m["shards"].append(dict(m["shards"][0])),
        lambda m: m["shards"][0].update(count=15),
        lambda m: m.update(samples="50"),
        lambda m: m.update(k=7),
        lambda m: m.update(preprocessing="other"),
        lambda m: m.update(more=1),
        lambda m: m["signals"].update(logits=[-1]),
        lambda m: m.pop("shards"),
        lambda m: m.pop("digest"),
    ],
)
def test_an_altered_manifest_is_refused(tmp_path, rows, change):
    import json

    folder = whole(tmp_path / "s", rows)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    for open_it in (Store, writer):
        with pytest.raises(UserError, match=r"manifest\.json"):
            open_it(folder)
