"""What `test_processes.py` starts with a launcher: every job of a JSON file in turn, on every process.

A job is `{"recipe": ..., "out": ..., "resume": ...}`. With `"of"` its folder is first made of that finished run, see `stopped`.
"""

import json
import shutil
import sys
from pathlib import Path

import torch

from limbeck import processes
from limbeck.errors import UserError
from limbeck.recipe import resolve
from limbeck.run import execute
from limbeck.storage import tensors_fingerprint


def stopped(source, to, step=4):
    """A copy of a finished run as it was when its student had made so many steps."""
    shutil.copytree(source, to)
    shutil.rmtree(Path(to) / "student")
    (Path(to) / "summary.json").unlink()
    for path in (Path(to) / "checkpoints" / "student").iterdir():
        if path.name > f"step-{step:08d}":
            shutil.rmtree(path)


if __name__ == "__main__":
    torch.set_num_threads(1)
    for job in json.loads(Path(sys.argv[1]).read_text()):
        if "of" in job and processes.number() == 0:
            stopped(job["of"], job["out"])
        try:
            done = execute(resolve(job["recipe"]), job["out"], resume=job.get("resume", False), report=False)
            if "generator" in done.artifacts:
                print(f"generator of process {processes.rank()}: {tensors_fingerprint(done.generator.denoiser.network.state_dict())}")
        except UserError as error:
            print(f"process {processes.rank()}: {error.message}")
    processes.end()
