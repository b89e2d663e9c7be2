"""What all tests share: one thread, a cache folder of their own, no experiment trackers."""

import os
import subprocess
import sys

import pytest
import torch

os.environ["LIMBECK_NO_TRACKERS"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")
torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """Trained teachers of the tests are kept for the session, away from the user's."""
    folder = tmp_path_factory.mktemp("cache")
    os.environ["LIMBECK_CACHE"] = str(folder)
    return folder


TINY = {
    "name": "tiny",
    "method": {"id": "kd"},
    "teacher": {"model": "mlp", "args": {"widths": [32]}, "train": {"steps": 60, "lr": 0.01, "data": {"labelled": None}}},
    "student": {"model": "mlp", "args": {"widths": [8]}},
    "data": {"source": "digits", "train": 300, "labelled": 60},
    "training": {"steps": 40, "batch": 32, "lr": 0.01},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}
"""A recipe of seconds; tests copy and change it."""


TINY_TEXT = {
    "name": "tiny-text",
    "method": {"id": "token-level-kd"},
    "teacher": {"model": "llama", "args": {"layers": 1, "width": 32, "heads": 2}, "train": {"steps": 20, "batch": 8, "lr": 0.01}},
    "student": {"model": "llama", "args": {"layers": 1, "width": 16, "heads": 2}},
    "data": {"source": "stdlib-explain", "train": 64, "test": 16},
    "text": {"tokenizer": "bpe:320", "length": 48},
    "training": {"steps": 20, "batch": 8, "lr": 0.01},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}
"""The same of a language model."""

TINY_PAIRS = {
    **TINY_TEXT,
    "name": "tiny-pairs",
    "method": {"id": "alone"},
    "teacher": {"model": "bert", "args": {"layers": 2, "width": 32, "heads": 2}, "train": {"steps": 20, "batch": 8, "lr": 0.01}},
    "student": {"model": "bert", "args": {"layers": 2, "width": 16, "heads": 2}},
    "data": {"source": "stdlib-retrieval", "train": 64, "test": 16},
}
"""The same of a sentence encoder."""


TINY_DENOISING = {
    "name": "tiny-denoising",
    "method": {"id": "alone"},
    "task": "denoising",
    "teacher": {"model": "dit", "args": {"dim": 16, "depth": 4, "heads": 2}, "train": {"steps": 20, "batch": 16, "lr": 0.01}},
    "student": {"model": "dit", "args": {"dim": 16, "depth": 2, "heads": 2}},
    "data": {"source": "digits", "train": 200, "test": 64},
    "training": {"steps": 20, "batch": 16, "lr": 0.01},
    "generate": {"teacher_steps": [2]},
    "threads": 1,
    "device": "cpu",
    "trackers": [],
}
"""The same of a diffusion transformer."""


@pytest.fixture
def tiny():
    """A fresh copy of the tiny recipe."""
    import copy

    return copy.deepcopy(TINY)


@pytest.fixture
def tiny_file(tiny, tmp_path):
    """The tiny recipe as a file."""
    import yaml

    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny))
    return path


@pytest.fixture
def limbeck():
    """Type a command as a user does: `limbeck("run", "digits")` -> completed process with text output."""

    def type_command(*words, cwd=None, timeout=120, **env):
        return subprocess.run(
            [sys.executable, "-m", "limbeck", *map(str, words)],
            capture_output=True,
            text=True,
            cwd=cwd,
            timeout=timeout,
            env={**os.environ, **env},
        )

    return type_command


def saved_bytes(run):
    """Greatest number of bytes that autograd keeps at once while `run` runs."""
    now, most = 0, 0

    class Kept:
        def __init__(self, tensor):
            nonlocal now, most
            self.tensor, self.size = tensor, tensor.numel() * tensor.element_size()
            now += self.size
            most = max(most, now)

        def __del__(self):
            nonlocal now
            now -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        run()
    return most
