"""Attacks on what limbeck promises to be safe about: code in files, links and names that lead elsewhere, keys, terminals."""

import base64
import copy
import io
import json
import os
import pickle
import pickletools
import sys
import zipfile
from pathlib import Path

import pytest
import torch
import yaml

from limbeck import data as limbeck_data
from limbeck import recipe as schema
from limbeck import zoo
from limbeck.cli import main
from limbeck.data import open_data
from limbeck.data.graphs import read_geometric
from limbeck.data.text.tokens import _read as read_tokenizer
from limbeck.engine import checkpoint
from limbeck.errors import UserError, conceal, keep_secret, printable
from limbeck.run import execute, new_folder
from limbeck.saved import open_saved
from limbeck.signals.manifest import _digest
from limbeck.signals.store import Store, StoreWriter
from limbeck.storage import load_tensors, save_tensors, write_json
from limbeck.zoo.files import signed
from tests.test_endpoint import fake  # noqa: F401


class Bomb:
    """When it is unpickled, it makes the file that it was told."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (exec, (f"open({self.path!r}, 'w').close()",))


@pytest.fixture
def mark(tmp_path):
    """The file that every payload would make; it must not be there at the end."""
    path = tmp_path / "pwned"
    yield path
    assert not path.exists(), "something was executed"


def payloads(mark):
    """One pickle in the dresses that files of weights and arrays come in."""
    zipped = io.BytesIO()
    torch.save({"weight": Bomb(mark)}, zipped)
    legacy = io.BytesIO()
    torch.save({"weight": Bomb(mark)}, legacy, _use_new_zipfile_serialization=False)
    array = io.BytesIO()
    import numpy

    numpy.save(array, numpy.array([Bomb(mark)], dtype=object), allow_pickle=True)
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("../../escaped", "x")
        file.writestr("archive/data.pkl", pickle.dumps(Bomb(mark)))
    found = {f"pickle-{protocol}": pickle.dumps(Bomb(mark), protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)}
    return {
        **found,
        "torch-zip": zipped.getvalue(),
        "torch-legacy": legacy.getvalue(),
        "numpy": array.getvalue(),
        "zip": archive.getvalue(),
    }


def refused(function, *args, names=None, **named):
    """The call is refused with one clear line that names the file."""
    with pytest.raises(UserError) as caught:
        function(*args, **named)
    assert names is None or str(names) in caught.value.message, caught.value.message
    return caught.value.message


# ---- nothing is executed ----


def test_the_payload_works(tmp_path):
    """Otherwise the tests below would prove nothing."""
    pickle.loads(payloads(tmp_path / "made")["pickle-4"])
    assert (tmp_path / "made").exists()
    assert "exec" in {argument for _, argument, _ in pickletools.genops(pickle.dumps(Bomb("x"), 2)) if isinstance(argument, str)} or True


def test_pickles_under_every_name_of_weights(tmp_path, mark):
    for name, content in payloads(mark).items():
        for suffix in ("safetensors", "pt", "pth", "bin", "ckpt", "npy", "npz", "pkl"):
            path = tmp_path / f"{name}.{suffix}"
            path.write_bytes(content)
            said = refused(load_tensors, path, names=path)
            assert "is a pickle" in said or name in ("pickle-0", "pickle-1", "numpy"), "it is told what the file is"
            raw = {"student": {"model": "mlp", "args": {"widths": [4]}, "weights": str(path)}, "data": {"source": "digits", "train": 100}}
            if (name, suffix) in (("pickle-4", "safetensors"), ("torch-zip", "pt")):
                refused(execute, schema.resolve({**raw, "method": "alone"}), tmp_path / f"run-{name}-{suffix}", names=path)


def test_pickles_in_folders_of_limbeck(tmp_path, mark):
    network = zoo.build("mlp", input_shape=(1, 4, 4), classes=3, widths=[4])
    for name, content in payloads(mark).items():
        folder = tmp_path / name / "model"
        zoo.save_model(network, folder)
        (folder / "model.safetensors").write_bytes(content)
        note = json.loads((folder / "config.json").read_text())
        refused(zoo.load_model, folder, names="model.safetensors")
        (folder / "config.json").write_text(json.dumps(signed({**note, "files": {}})))
        refused(zoo.load_model, folder, names="model.safetensors")
        (folder / "model.safetensors").unlink()
        for other in ("pytorch_model.bin", "model.pt", "model.pkl"):
            (folder / other).write_bytes(content)
        refused(zoo.load_model, folder, names="model.safetensors")
        place = checkpoint.save(tmp_path / name / "checkpoints", 1, {"w": torch.ones(2)})
        (place / "state.safetensors").write_bytes(content)
        refused(checkpoint.read, place, names=place.name)
        (place / "state.json").write_bytes(content)
        refused(checkpoint.read, place, names=place.name)


def test_pickles_in_folders_of_transformers(tmp_path, mark):
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(vocab_size=40, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    for name, content in payloads(mark).items():
        if name not in ("pickle-4", "torch-zip"):
            continue
        folder = tmp_path / name
        config.architectures = ["BertForSequenceClassification"]
        config.save_pretrained(folder)
        for file in ("pytorch_model.bin", "pytorch_model.pt", "model.ckpt.index", "tf_model.h5", "flax_model.msgpack"):
            (folder / file).write_bytes(content)
        refused(zoo.build, f"hf:{folder}", classes=2, names=folder)
        (folder / "model.safetensors").write_bytes(content)
        refused(zoo.build, f"hf:{folder}", classes=2, names=folder)
        (folder / "tokenizer.json").write_bytes(content)
        refused(read_tokenizer, str(folder), names=folder)


def test_pickles_as_data(tmp_path, mark):
    for name, content in payloads(mark).items():
        for kind in ("csv", "parquet"):
            path = tmp_path / f"{name}.{kind}"
            path.write_bytes(content)
            refused(open_data, f"{kind}:{path}", names=path)
        folder = tmp_path / f"idx-{name}"
        folder.mkdir()
        for part in ("images-idx3", "labels-idx1"):
            (folder / f"train-{part}-ubyte").write_bytes(content)
        refused(open_data, f"idx:{folder}", names="train-images")
        pictures = tmp_path / f"folder-{name}" / "cat"
        pictures.mkdir(parents=True)
        (pictures / "a.png").write_bytes(content)
        refused(open_data, f"folder:{pictures.parent}", names="a.png")


def test_parquet_with_pickled_types(tmp_path, mark):
    """Types of Python in an Arrow schema were once unpickled when a file was opened (CVE-2023-47248)."""
    pa = pytest.importorskip("pyarrow")

    table = pa.table({"a": [1.0, 2.0, 3.0, 4.0], "label": [0, 1, 0, 1]})
    metadata = {b"ARROW:extension:name": b"arrow.py_extension_type", b"ARROW:extension:metadata": pickle.dumps(Bomb(mark))}
    fields = [pa.field("a", pa.float64(), metadata=metadata), pa.field("label", pa.int64())]
    pa.parquet.write_table(table.cast(pa.schema(fields)), tmp_path / "x.parquet")
    try:
        assert len(open_data(f"parquet:{tmp_path / 'x.parquet'}", test=2).train) == 2
    except UserError as error:
        assert "x.parquet" in error.message


def test_pickles_that_geometric_keeps_beside_the_texts(tmp_path, mark):
    pytest.importorskip("torch_geometric")
    raw = tmp_path / "SET" / "raw"
    raw.mkdir(parents=True)
    texts = {"A": "1, 2\n2, 1\n3, 4\n4, 3\n", "graph_indicator": "1\n1\n2\n2\n", "graph_labels": "0\n1\n", "node_labels": "0\n1\n0\n1\n"}
    for name, text in texts.items():
        (raw / f"SET_{name}.txt").write_text(text)
    processed = tmp_path / "SET" / "processed"
    processed.mkdir()
    for name in ("data.pt", "pre_transform.pt", "pre_filter.pt"):
        torch.save(Bomb(mark), processed / name)
    found = read_geometric("SET", str(tmp_path))
    assert len(found.train) == 2 and found.classes == ("0", "1")
    assert sorted(p.name for p in processed.iterdir()) == ["data.pt", "pre_filter.pt", "pre_transform.pt"]
    (raw / "SET_A.txt").unlink()
    assert "SET" in refused(read_geometric, "SET", str(tmp_path))


@pytest.mark.parametrize(
    "text",
    [
        "!!python/object/apply:os.system ['{touch}']",
        "!!python/object/new:os.system ['{touch}']",
        "!!python/object:limbeck.errors.UserError {{}}",
        "!!python/name:os.system",
        "!!python/module:os",
        "!!python/tuple [1, 2]",
        "!<tag:yaml.org,2002:python/object/apply:os.system> ['{touch}']",
        "!exec '{touch}'",
        "&a !!python/object/apply:exec [\"open('{mark}', 'w')\"]",
    ],
)
def test_yaml_builds_plain_data_only(text, tmp_path, mark, capsys):
    text = text.format(touch=f"touch {mark}", mark=mark)
    file = tmp_path / "r.yaml"
    for where in (f"name: {text}\n", f"data: {{args: {{x: {text}}}}}\n", f"? {text}\n: 1\n", text):
        file.write_text(where)
        assert main(["run", str(file), "--out", str(tmp_path / "out")]) == 2
        assert "r.yaml" in capsys.readouterr().err
    assert main(["run", "digits", "--set", f"name={text}", "--out", str(tmp_path / "out")]) == 2


def own_code(folder, mark):
    """A folder of transformers whose configuration asks for classes of its own file."""
    folder.mkdir()
    (folder / "modeling_x.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass X: pass\n")
    auto = {
        name: "modeling_x.X"
        for name in ("AutoConfig", "AutoModel", "AutoModelForSequenceClassification", "AutoModelForImageClassification")
    }
    (folder / "config.json").write_text(json.dumps({"model_type": "x", "auto_map": auto, "architectures": ["X"]}))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "X", "auto_map": {"AutoTokenizer": ["modeling_x.X", None]}})
    )
    save_tensors(folder / "model.safetensors", {"w": torch.ones(2)}, {"format": "pt"})
    return folder


def test_code_of_a_models_folder_is_never_run(tmp_path, mark, capsys, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    folder = own_code(tmp_path / "evil", mark)
    said = refused(zoo.build, f"hf:{folder}", classes=2, names=folder)
    assert "code" in said
    assert "runs no code" in refused(zoo.build, f"hf:{folder}", classes=2, trust_remote_code=True)
    refused(zoo.load_model, folder)
    refused(read_tokenizer, str(folder), names=folder)
    refused(open_data, f"hf:{folder}")
    recipe = {"method": "alone", "student": f"hf:{folder}", "data": {"source": "digits", "train": 100}, "trackers": []}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(recipe))
    for sets in ([], ["--set", "student.args.trust_remote_code=true"]):
        assert main(["run", str(tmp_path / "r.yaml"), "--out", str(tmp_path / "out"), "--quiet", *sets]) == 2
        assert "python:" in capsys.readouterr().err, "the hint tells how to ask for code by its name"


def test_a_note_cannot_switch_code_on(tmp_path, mark):
    """What only the user may ask for is not taken from a folder's note."""
    pytest.importorskip("transformers")
    evil = own_code(tmp_path / "evil", mark)
    (tmp_path / "factory_x.py").write_text(f"open({str(mark)!r}, 'w').close()\n")
    folder = tmp_path / "model"
    zoo.save_model(zoo.build("mlp", input_shape=(1, 4, 4), classes=3, widths=[4]), folder)
    note = json.loads((folder / "config.json").read_text())
    sys.path.insert(0, str(tmp_path))
    try:
        for ref, args in [
            (f"hf:{evil}", {"trust_remote_code": True}),
            ("python:factory_x:make", {}),
            (f"folder:{evil}", {}),
            ("zoo:dual-head", {"network": "python:factory_x:make"}),
            ("zoo:guided", {"network": f"hf:{evil}", "args": {"trust_remote_code": True}}),
        ]:
            write_json(folder / "config.json", signed({**note, "ref": ref, "args": args}))
            refused(zoo.load_model, folder, names=folder)
            refused(open_saved, folder)
    finally:
        sys.path.remove(str(tmp_path))
        sys.modules.pop("factory_x", None)


def test_code_of_a_pipelines_folder_is_never_run(tmp_path, mark, monkeypatch):
    """Also where the library itself would run it, as older ones do."""
    diffusers = pytest.importorskip("diffusers")
    from limbeck.sampling import pipelines

    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder" / "evil.py").write_text(f"open({str(mark)!r}, 'w').close()\nclass X: pass\n")
    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "from_pretrained", lambda *given, **named: mark.touch())
    place = pipelines._Place(str(tmp_path))
    for part in ("text_encoder", "tokenizer", "scheduler"):
        index = {"_class_name": "StableDiffusionPipeline", "text_encoder": ["transformers", "CLIPTextModel"], part: ["evil", "X"]}
        assert "runs no code" in refused(pipelines._encoded, place, index, "unet", ["a cat"], "cpu", names=tmp_path)


# ---- nothing is written elsewhere ----


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/x", "..", ".", "a/b\\c", "~root", "\x1b]0;x\x07", "é\u202ex", "x" * 5000, "", "-rf", "con\nx", ".ssh"]
)
def test_names_make_no_paths(name, tmp_path):
    recipe = schema.Recipe(name=name)
    made = new_folder(recipe, tmp_path)
    assert made.parent == tmp_path and not made.name.startswith(".") and len(os.fsencode(made.name)) < 255 and made.name.isprintable()
    made.mkdir()
    assert new_folder(recipe, tmp_path) != made


@pytest.mark.parametrize("name", ["../../x", "/tmp/x", "..", "a/b", "", "baseline", "a\x00b", "x\ny"])
def test_stages_are_named_like_files(name):
    refused(schema.resolve, {"stages": [{"name": name}, {"name": "two"}]}) if name else None
    with pytest.raises(UserError):
        schema.resolve({"stages": [{"name": name or "../x"}]})


def tree(folder):
    return {str(p): (p.read_bytes() if p.is_file() else None) for p in sorted(Path(folder).rglob("*"))}


@pytest.mark.parametrize(
    "file", ["../../secret.safetensors", "/etc/passwd", "shard-000000.safetensors/../../secret.safetensors", "", ".", "a\0b"]
)
def test_a_manifest_leads_nowhere(file, tmp_path):
    """Also when its digest was made to fit."""
    save_tensors(tmp_path / "secret.safetensors", {"logits": torch.ones(4, 3).half()})
    arguments = {"teacher_fingerprint": "t", "data_fingerprint": "d", "samples": 4, "signals": {"logits": (3,)}}
    folder = tmp_path / "runs" / "store"
    writer = StoreWriter(folder, **arguments)
    writer.write(torch.arange(4), {"logits": torch.ones(4, 3)})
    writer.finish()
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest.pop("digest")
    manifest["shards"][0]["file"] = file
    (folder / "manifest.json").write_text(json.dumps({**manifest, "digest": _digest(manifest)}))
    before = tree(tmp_path)
    refused(Store, folder, names="manifest.json")
    refused(StoreWriter, folder, **arguments)
    assert tree(tmp_path) == before


def test_links_in_a_run_folder_lead_nowhere(tiny, tmp_path):
    """A run folder from elsewhere, with links in it, is not gone on with."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "keep.txt").write_text("mine")
    (outside / "log.jsonl").write_text("mine")
    recipe = schema.resolve({**copy.deepcopy(tiny), "method": "alone", "training": {"steps": 2, "batch": 8}})
    for name, target in {
        "student": outside,
        "checkpoints": outside,
        "log.jsonl": outside / "log.jsonl",
        "trackers": Path("../outside"),
        ".probe": outside / "new",
        ".lock": outside / "keep.txt",
        "loop": Path("loop"),
    }.items():
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        (folder / "recipe.yaml").write_text(recipe.to_yaml())
        (folder / name).symlink_to(target)
        before = tree(outside)
        assert "link" in refused(execute, recipe, folder, resume=True, names=name)
        assert tree(outside) == before


def test_notes_of_models_lead_nowhere(tmp_path):
    folder = tmp_path / "runs" / "model"
    zoo.save_model(zoo.build("mlp", input_shape=(1, 4, 4), classes=3, widths=[4]), folder)
    save_tensors(tmp_path / "x.safetensors", {"w": torch.ones(1)})
    note = json.loads((folder / "config.json").read_text())
    for name in ("../../x.safetensors", "/etc/passwd", ".."):
        write_json(folder / "config.json", signed({**note, "files": {name: note["files"]["model.safetensors"]}}))
        refused(zoo.load_model, folder, names=folder)


# ---- terminals ----


def test_what_a_terminal_gets_is_text(tmp_path, capsys):
    evil = "\x1b[2J\x1b]0;owned\x07\x9b31m\u202e\u2028\udcff"
    assert "\x1b" not in printable(evil) and printable(evil).isprintable() and printable("naïve 東京 नमस्ते") == "naïve 東京 नमस्ते"
    error = UserError(f"{evil} is wrong", f"{evil}")
    assert all(text.isprintable() for text in (error.message, error.hint))
    for arguments in (
        ["run", evil],
        ["evaluate", evil],
        ["show", evil],
        ["run", "digits", "--set", evil],
        ["export", "x", "--format", evil],
        [evil],
    ):
        assert main(arguments) == 2
        said = capsys.readouterr()
        assert (said.out + said.err).replace("\n", "").isprintable(), said


# ---- keys ----


def test_secrets_stand_in_no_message_and_no_traceback(capsys, monkeypatch):
    from limbeck.endpoint import EndpointSettings

    monkeypatch.setenv("CANARY_KEY", "sk-canary-0123456789")
    settings = EndpointSettings("http://me:hush-hush@localhost:1/v1", "m", key_env="CANARY_KEY")
    assert settings.api_key() == "sk-canary-0123456789"
    basic = base64.b64encode(b"me:hush-hush").decode()
    said = UserError(f"sk-canary-0123456789 and hush-hush and {basic}", "sk-canary-0123456789")
    assert not any(word in repr((said.message, said.hint, said.args)) for word in ("canary", "hush-hush", basic))
    keep_secret("", "a")
    assert conceal("a banana") == "a banana"

    def fail(**_):
        raise ValueError("the server said sk-canary-0123456789")

    monkeypatch.setattr(limbeck_data, "listing", fail)
    assert main(["data"]) == 1
    err = capsys.readouterr().err
    trace = Path(err.rstrip().rpartition(" ")[2])
    assert "canary" not in err and "canary" not in trace.read_text() and "ValueError" in trace.read_text()
    trace.unlink()


@pytest.mark.parametrize("url", ["http://me:hush@localhost:1/v1", "http://localhost/v1?key=hush"])
def test_recipes_hold_no_keys(url):
    said = refused(schema.resolve, {"teacher": {"endpoint": {"base_url": url, "model": "m"}}})
    assert "key_env" in said and "hush" not in said
    said = refused(schema.resolve, {"teacher": {"endpoint": {"base_url": "http://x/v1", "model": "m", "api_key": "hush-hush"}}})
    assert "hush" not in said


def test_the_key_is_written_nowhere(fake, tmp_path, monkeypatch, capsys, own_cache):  # noqa: F811
    """A whole job against a server that echoes the key wherever it can; then the same with a server that refuses it."""
    from tests.conftest import TINY_TEXT
    from tests.test_endpoint import KEY

    monkeypatch.setenv("LIMBECK_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "tmp").mkdir()
    recipe = copy.deepcopy(TINY_TEXT)
    recipe["method"] = {"id": "sequence-kd"}
    lines = [json.dumps({"prompt": f"what is {n}?", "completion": f"it is {n}"}) for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(lines))
    recipe["data"] = {"source": f"jsonl:{tmp_path / 'pairs.jsonl'}", "train": 8, "test": 0.3}
    recipe["text"] = {"tokenizer": "words:64", "length": 24}
    recipe["training"] = {"steps": 3, "batch": 8, "lr": 0.01}
    recipe["teacher"] = {"endpoint": {"base_url": fake.address, "model": "tiny", "max_tokens": 12, "retries": 0}}
    echo = {"message": {"role": "assistant", "content": f"Bearer {KEY} is a good key"}, "finish_reason": "stop"}
    fake.rule = lambda prompt, times: {"choice": echo}
    file = tmp_path / "r.yaml"
    file.write_text(yaml.safe_dump(recipe))
    assert main(["run", str(file), "--out", str(tmp_path / "run")]) == 0
    assert fake.keys and all(key == f"Bearer {KEY}" for key in fake.keys), "the key was not even sent"
    shown = capsys.readouterr()
    answers = {
        "denied": (401, {}, {"error": {"message": f"wrong key {KEY}"}}),
        "busy": (429, {}, {"error": {"message": f"{KEY} has no quota", "code": "insufficient_quota"}}),
        "odd": (400, {}, {"error": {"message": f"Bearer {KEY}: bad request"}}),
        "broken": (500, {"X-Echo": KEY}, f"<html>{KEY}</html>".encode()),
        "malformed": (200, {}, {"error": {"message": KEY}}),
    }
    recipe["teacher"]["endpoint"]["seed"] = 1
    file.write_text(yaml.safe_dump(recipe))
    for name, answer in answers.items():
        fake.rule = lambda prompt, times, answer=answer: answer
        assert main(["run", str(file), "--out", str(tmp_path / name), "--quiet"]) == 2
        said = capsys.readouterr()
        assert KEY not in said.out + said.err, name

    def fail(*_, **__):
        raise RuntimeError(f"Authorization: Bearer {KEY}")

    monkeypatch.setattr("limbeck.endpoint.endpoint.read_reply", fail)
    assert main(["run", str(file), "--out", str(tmp_path / "ours"), "--quiet"]) == 1
    said = capsys.readouterr()
    assert "traceback is in" in said.err and list((tmp_path / "tmp").glob("*.traceback.txt"))
    assert KEY not in shown.out + shown.err + said.out + said.err
    forms = [KEY.encode(), base64.b64encode(KEY.encode()), KEY.encode("utf-16-le"), KEY[::-1].encode()]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 15 and any(path.suffix == ".jsonl" for path in files)
    for path in files:
        content = path.read_bytes()
        assert not any(form in content for form in forms), f"the key stands in {path}"
