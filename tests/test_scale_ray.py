"""Labelling and comparing with Ray: the same bytes and figures as one process gives, whoever is killed on the way.

One cluster of two processors serves the whole file; commands that are typed in this process find it, others are given its address.
"""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import yaml

from limbeck.cli import main
from tests.conftest import TINY, TINY_TEXT

ray = pytest.importorskip("ray")
psutil = pytest.importorskip("psutil")

torch.set_num_threads(1)

SLOW = {**TINY, "teacher": {"model": "mlp", "args": {"widths": [2048, 2048]}, "train": {"steps": 1}}, "data": {"source": "digits"}}
SLOW["training"] = {**TINY["training"], "batch": 10}
"""A teacher that takes its time, so that there is a middle to be killed in."""

PARTS = ["--shard-rows", "24", "--signals", "logits,embedding"]


@pytest.fixture(scope="module")
def cluster():
    """Its address."""
    from limbeck.scaling.cluster import OBJECTS, require

    require().init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, object_store_memory=OBJECTS)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with recipes, a cache of its own, and stores that `--engine local` wrote."""
    folder, before, cache = tmp_path_factory.mktemp("ray"), Path.cwd(), os.environ["LIMBECK_CACHE"]
    os.environ["LIMBECK_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    for name, recipe in (("slow", SLOW), ("tiny", TINY), ("text", TINY_TEXT)):
        Path(f"{name}.yaml").write_text(yaml.safe_dump(recipe))
    assert main(["cache", "slow.yaml", "--out", "slow-local", *PARTS, "--quiet"]) == 0
    yield folder
    os.chdir(before)
    os.environ["LIMBECK_CACHE"] = cache


def files(folder):
    """Every file of a store and its bytes; nothing else may be there."""
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def shards(folder):
    """How many shards the manifest of an unfinished store names."""
    try:
        return len(json.loads((Path(folder) / "manifest.json").read_text())["shards"])
    except (OSError, ValueError):
        return 0


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def labellers():
    """Process ids of the workers that label."""
    return [p.pid for p in psutil.process_iter(["cmdline"]) if any("MapWorker" in word for word in p.info["cmdline"] or [])]


def test_a_killed_worker_loses_and_doubles_nothing(place, cluster, capsys):
    """kill -9 of a worker in the middle: its shards are made by another one, and the bytes are those of one process."""
    killed = []

    def kill():
        until(lambda: shards("killed") >= 3)
        killed.extend(labellers()[:1])
        os.kill(killed[0], signal.SIGKILL)

    thread = threading.Thread(target=kill)
    thread.start()
    code = main(["cache", "slow.yaml", "--out", "killed", *PARTS, "--engine", "ray", "--workers", "2", "--quiet"])
    thread.join()
    said = capsys.readouterr()
    assert code == 0, said.err
    assert killed and not psutil.pid_exists(killed[0])
    assert "2 workers with 1 processors, 1 threads each" in said.err and said.out.startswith("1347 samples")
    assert files("killed") == files("slow-local")


@pytest.mark.slow
def test_a_killed_driver_is_gone_on_with_by_any_engine(place, cluster, capsys):
    """kill -9 of the command itself: what was committed is not labelled again, whichever engine goes on."""
    words = ["cache", "slow.yaml", "--out", "driver", *PARTS]
    command = [sys.executable, "-m", "limbeck", *words, "--engine", "ray", "--workers", "1", "--address", cluster]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until(lambda: shards("driver") >= 8 or process.poll() is not None)
    process.kill()
    process.wait()
    done = shards("driver")
    assert 8 <= done < 57, "it was not killed in the middle"
    until(lambda: not labellers())  # Ray ends the workers of a lost command
    torn = sorted(Path("driver").glob("shard-*"))[1]
    torn.write_bytes(torn.read_bytes()[:-1])
    before = {path.name: path.stat().st_mtime_ns for path in Path("driver").glob("shard-*")}
    subprocess.run(["cp", "-r", "driver", "driver-local"], check=True)
    assert main([*words, "--engine", "ray", "--workers", "1"]) == 0
    assert f"cache: step {(done - 1) * 24} of 1347 (resumed)" in capsys.readouterr().err
    assert files("driver") == files("slow-local")
    again = {name for name, when in before.items() if (Path("driver") / name).stat().st_mtime_ns != when}
    assert torn.name in again and len(again) <= 2, "only the torn shard, and one that was moved but not yet in the manifest"
    assert main(["cache", "slow.yaml", "--out", "driver-local", *PARTS]) == 0
    assert files("driver-local") == files("slow-local")


@pytest.mark.slow
def test_next_token_distributions(place, cluster, capsys):
    """Rows are scored tokens; shards end in the middle of samples and batches."""
    words = ["cache", "text.yaml", "--form", "topk", "--top-k", "8", "--shard-rows", "100", "--quiet", "--out"]
    assert main([*words, "text-local"]) == 0
    assert main([*words, "text-ray", "--engine", "ray", "--workers", "1"]) == 0
    assert len(files("text-local")) > 10 and files("text-ray") == files("text-local")


def test_a_comparison_is_the_same_whoever_computes(place, cluster, capsys):
    def compared(out, *words):
        assert main(["compare", "tiny.yaml", "--methods", "alone,kd", "--seeds", "2", "--json", "--out", out, *words]) == 0
        return without_time(json.loads(capsys.readouterr().out)), {
            str(path.relative_to(out)): path.read_bytes() for path in sorted(Path(out).glob("runs/*/*/*.safetensors"))
        }

    alone = compared("one")
    assert len(alone[0]["rows"]) == 4 and len(alone[1]) == 4
    assert compared("ray", "--engine", "ray", "--workers", "1") == alone
    assert not list(Path("ray").rglob("*.tmp"))


def without_time(value):
    """JSON without the keys that tell time."""
    if isinstance(value, dict):
        return {key: without_time(item) for key, item in value.items() if key != "seconds"}
    return [without_time(item) for item in value] if isinstance(value, list) else value


# ---- what a worker refuses; no cluster is needed for that ----


@pytest.fixture
def job(place, tmp_path):
    """What the command would send to a worker that labels the slow store."""
    from limbeck import recipe as schema
    from limbeck.knowledge.caching_ray import Job
    from limbeck.scaling.site import shared_site
    from limbeck.signals.manifest import Manifest

    manifest = Manifest.read(place / "slow-local")
    with shared_site(tmp_path, 1) as site:
        yield Job(schema.load("slow.yaml", []).data_as_written(), "cpu", ("logits", "embedding"), None, manifest, site)


def labelled(job, first=0, stop=2):
    from limbeck.knowledge.caching_ray import Labeller

    return [{name: value[0] for name, value in note.items()} for note in Labeller(job)({"first": [first], "stop": [stop]})]


def test_a_worker_writes_shards_of_its_own(job, place):
    notes = labelled(job, 55, 57)
    assert [note["shard"] for note in notes] == [55, 56] and not any(note["error"] for note in notes)
    for note in notes:
        kept = json.loads((place / "slow-local/manifest.json").read_text())["shards"][note["shard"]]
        written = Path(job.site.shared) / note["file"]
        assert kept["sha256"] == note["sha256"] and written.read_bytes() == (place / "slow-local" / kept["file"]).read_bytes()


def test_attempts_are_counted_on_the_disk(job):
    """A task whose process dies each time is given up after the third retry, with a way to go on."""
    from limbeck.knowledge.caching_ray import RETRIES, Labeller

    for _ in range(RETRIES + 1):
        next(Labeller(job)({"first": [3], "stop": [5]}))  # as a process that dies after its first shard
    [note] = labelled(job, 3, 5)
    assert note["error"] == "user" and "killed 4 times" in note["message"] and "goes on where it stopped" in note["hint"]
    assert not labelled(job, 5, 6)[0]["error"], "other tasks are not concerned"


@pytest.mark.parametrize(
    ("change", "message", "hint"),
    [
        (lambda job, site: (job, {"token": "0" * 16}), "does not see what was written to", "all machines share"),
        (lambda job, site: (job, {"here": "/nowhere/at/all"}), "cannot be entered", "all machines share"),
        (lambda job, site: (job, {"versions": {**site.versions, "torch": "1.0"}}), "the command runs with 1.0", "same versions"),
        (lambda job, site: (job, {"environment": {"LIMBECK_CACHE": str(Path(site.shared) / "empty")}}), "is not in", "share that folder"),
        (lambda job, site: ({"device": "cuda"}, {}), "would compute on cpu", "--worker-gpus"),
        (lambda job, site: ({"manifest": {"data": "x" * 16}}, {}), "finds another data", "the same on all machines"),
        (lambda job, site: ({"manifest": {"teacher": "x" * 16}}, {}), "finds another teacher", "the same on all machines"),
    ],
    ids=["folder", "working folder", "versions", "cache", "device", "data", "teacher"],
)
def test_machines_that_do_not_fit_are_refused(job, change, message, hint, monkeypatch):
    from dataclasses import replace

    monkeypatch.setenv("LIMBECK_CACHE", os.environ["LIMBECK_CACHE"])
    changed, site = change(job, job.site)
    if not isinstance(changed, dict):
        changed = {}
    if "manifest" in changed:
        changed["manifest"] = job.manifest.model_copy(update=changed["manifest"])
    notes = labelled(replace(job, site=replace(job.site, **site), **changed))
    assert notes[0]["error"] == "user" and message in notes[0]["message"] and hint in notes[0]["hint"], notes


# ---- bad input ----

WRONG = """
cache tiny.yaml --out x --engine rai => unknown engine 'rai' => did you mean 'ray'
cache tiny.yaml --out x --workers 2 => --workers is for --engine ray => leave it away
cache tiny.yaml --out x --address auto => --address is for --engine ray => leave it away
cache tiny.yaml --out x --engine ray --workers 0 => --workers => cache --help
cache tiny.yaml --out x --engine ray --worker-cpus 0 => --worker-cpus is 0.0 => more than 0
cache tiny.yaml --out x --engine ray --worker-gpus -1 => --worker-gpus is -1.0 => give 0
cache tiny.yaml --out x --shard-rows 0 => --shard-rows => cache --help
cache tiny.yaml --out x --engine ray --address 127.0.0.1:9 => nobody answers at 127.0.0.1:9 => ray start --head
compare tiny.yaml --methods kd --engine ray --address ray://10.0.0.1:10001 => Ray Client => --address auto
compare tiny.yaml --methods kd --engine ray --address nonsense => is no address => HOST:PORT
compare tiny.yaml --methods kd --engine ray --address 127.0.0.1:9 => nobody answers at 127.0.0.1:9 => ray start --head
compare tiny.yaml --methods kd --engine loca => unknown engine => did you mean 'local'
compare tiny.yaml --methods kd --workers 0 => --workers => compare --help
"""


@pytest.mark.parametrize("line", WRONG.strip().splitlines())
def test_bad_input_is_named_before_anything_is_written(place, line, capsys, monkeypatch):
    words, message, hint = line.split(" => ")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # as in a process that is in no cluster
    before = set(place.rglob("*"))
    assert main(words.split()) == 2
    said = capsys.readouterr().err
    assert message in said and hint in said, said
    assert set(place.rglob("*")) == before


def test_without_ray(place, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    for words in (["cache", "tiny.yaml", "--out", "x"], ["compare", "tiny.yaml", "--methods", "kd"]):
        assert main([*words, "--engine", "ray"]) == 2
        assert "pip install 'limbeck[ray]'" in capsys.readouterr().err


def test_a_worker_that_no_machine_has_room_for(place, cluster, capsys):
    assert main(["cache", "slow.yaml", "--out", "room", *PARTS, "--engine", "ray", "--worker-cpus", "64"]) == 2
    said = capsys.readouterr().err
    assert "a worker needs 64 processors and 0 GPUs" in said and "has 2 and 0" in said and "--worker-cpus" in said


@pytest.mark.parametrize(
    ("missing", "shard", "batch", "workers", "lengths"),
    [
        (range(100), 1024, 32, 2, [1] * 100),  # a shard is many batches
        (range(100), 1000, 500, 2, [4] * 25),  # eight batches a task
        (range(100), 10, 500, 2, [6] * 16 + [4]),  # but every worker gets tasks
        ([0, 1, 5, 6, 7], 10, 500, 1, [1] * 5),
        ([*range(40), *range(50, 53)], 1000, 500, 1, [4] * 10 + [3]),  # never over a gap
        ([7], 1000, 500, 8, [1]),
    ],
)
def test_tasks(missing, shard, batch, workers, lengths):
    from limbeck.knowledge.caching_ray import tasks_of

    tasks = tasks_of(list(missing), shard, batch, workers)
    assert [len(task) for task in tasks] == lengths
    assert [number for task in tasks for number in task] == list(missing)


@pytest.mark.parametrize(("first", "end", "starts"), [(0, 50, [0, 8, 16, 24, 32, 40, 42]), (11, 26, [8, 16, 24]), (45, 50, [40, 42])])
def test_batches_begin_where_training_begins_them(first, end, starts):
    """Whoever labels which rows: batches begin at multiples of their size, the last one ends with the data; rows come once, in order."""
    import limbeck
    from limbeck.knowledge.labelling import Labelling
    from limbeck.signals import Signals

    data, seen = limbeck.open_data("digits", train=50), []

    def teacher(batch):
        seen.append(batch.index.tolist())
        return Signals(logits=batch.index.float().unsqueeze(1))

    labels = Labelling(teacher, data, ("logits",), 8, torch.device("cpu"), "", "", {"logits": (1,)}, 50, "samples")
    rows = [(index, said["logits"]) for index, said in labels.pieces(first, end)]
    assert torch.cat([index for index, _ in rows]).tolist() == list(range(first, end))
    assert torch.cat([value for _, value in rows]).flatten().tolist() == list(range(first, end))
    assert [batch[0] for batch in seen] == starts and all(len(batch) == 8 for batch in seen)
