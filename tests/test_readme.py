"""What the README says is true: its generated table is up to date, its code runs, its links exist."""

import json
import re
import subprocess
import sys
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parent.parent


def test_generated_table_is_up_to_date():
    process = subprocess.run([sys.executable, "docs/tables.py", "--check"], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr


def test_evidence_is_sound_and_not_stale(limbeck):
    process = limbeck("evidence", "--check", cwd=ROOT)
    assert process.returncode == 0, process.stdout + process.stderr


def two_language_models():
    """Folders `big` and `small` of transformers and forty pairs, in the working folder, as a reader would have them."""
    from limbeck import zoo
    from limbeck.data.text import open_text
    from limbeck.knowledge.text_report import TextStudent

    data = open_text("stdlib-explain", tokenizer="bpe:320", length=64, train=40, test=8)
    for name, width in (("big", 32), ("small", 16)):
        tokens = zoo.Tokens(data.text.vocabulary, 512, "causal-lm", data.text.pad, data.text.bos, data.text.eos)
        TextStudent(zoo.build("llama", tokens=tokens, layers=1, width=width, heads=2), data.text.tokenizer).save(name)
    index = torch.arange(len(data.train))
    pairs = zip(data.train.prompt_texts(index), data.train.references(index))
    Path("pairs.jsonl").write_text("".join(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in pairs))


def test_python_blocks_run(tmp_path, monkeypatch):
    """The blocks are executed as they stand, with small networks for the names that a reader brings."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {
        "my_big_model": nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 3)),
        "my_small_model": nn.Sequential(nn.Flatten(), nn.Linear(16, 3)),
        "images": torch.rand(90, 1, 4, 4),
        "labels": torch.arange(90) % 3,
        "student_logits": torch.randn(4, 3, requires_grad=True),
        "teacher_logits": torch.randn(4, 3),
    }
    two_language_models()
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.S)
    assert len(blocks) == 3
    for block in blocks:
        exec(block, names)
    assert names["loss"].requires_grad


def test_links_exist():
    for file in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", file.read_text()):
            assert link.startswith("http") or (file.parent / link).exists(), f"{file.name}: {link}"


def test_commands_that_the_readme_names_exist():
    from limbeck.cli.app import COMMANDS

    for name in re.findall(r"`limbeck ([a-z]+)", (ROOT / "README.md").read_text()):
        assert name in COMMANDS, name
