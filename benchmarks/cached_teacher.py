"""A teacher that is asked once: online, from limbeck's store, and from plain logits in memory.

    python benchmarks/cached_teacher.py [--quick]

The bound of the speed-up is 1 + F_T / (3 F_S): forward cost of teacher and student, measured and in multiply-adds.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from pathlib import Path

import torch
from common import CLASSES, SHAPE, TASK, facts, middle, resnets, spent
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from limbeck.data.batch import Batch
from limbeck.data.split import TensorSplit
from limbeck.knowledge.teachers import FrozenTeacher, StoredTeacher, Teacher
from limbeck.signals.signals import Signals
from limbeck.signals.store import Store, StoreWriter


class InMemory(Teacher):
    """Logits held in a tensor."""

    def __init__(self, logits: Tensor) -> None:
        self.logits = logits

    def __call__(self, batch: Batch) -> Signals:
        return Signals(logits=self.logits[batch.index])


def main() -> None:
    """Kill and resume, equal outputs, times; print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    quick = parser.parse_args().quick
    torch.set_num_threads(1)
    rounds, size, samples, shard = (1, 2, 8, 3) if quick else (5, 8, 64, 20)
    network, student = resnets(8 if quick else 32, 8, 1 if quick else 4)
    split = TensorSplit(torch.randn(samples, *SHAPE), torch.randint(CLASSES, (samples,)))
    online = FrozenTeacher(network)
    logits = torch.cat([online(split.batch(part)).logits for part in torch.arange(samples).split(size)])

    with tempfile.TemporaryDirectory() as folder:

        def writer(name: str, count: int = samples, rows: int = shard) -> StoreWriter:
            marks = {"teacher_fingerprint": "t", "data_fingerprint": "d"}
            return StoreWriter(Path(folder) / name, **marks, samples=count, signals={"logits": (CLASSES,)}, shard_size=rows)

        first, asked = writer("killed"), samples // 2
        first.write(torch.arange(asked), {"logits": logits[:asked]})
        del first  # as a kill leaves it: what was buffered is gone
        again = writer("killed")
        lost = asked - again.next_index
        assert 0 <= lost < shard
        start = again.next_index
        again.write(torch.arange(start, samples), {"logits": logits[start:]})
        again.finish()
        store = Store(Path(folder) / "killed")
        torch.testing.assert_close(store.dense_logits(torch.arange(samples)), logits, rtol=1e-3, atol=1e-3)
        count = 1000 if quick else 50000
        many, speed = writer("many", count, 4096), torch.randn(count, CLASSES)

        def write() -> None:
            for rows in torch.arange(count).split(512):
                many.write(rows, {"logits": speed[rows]})
            many.finish()

        writing = spent(write)
        large = Store(Path(folder) / "many")
        picks = [torch.randint(count, (size,)) for _ in range(200)]
        reading = spent(lambda: [large.signals(pick) for pick in picks]) / len(picks)

        batches = [split.batch(part) for part in torch.arange(samples).split(size)][:2]
        teachers: dict[str, Teacher] = {"online": online, "memory": InMemory(logits), "store": StoredTeacher(store)}
        learners = {name: copy.deepcopy(student).train() for name in teachers}
        optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for name, model in learners.items()}

        def steps(name: str) -> None:
            for batch in batches:
                said = teachers[name](batch).logits
                mine = learners[name](batch.inputs)
                loss = 0.9 * TASK.soft_loss(mine, said, 4.0) + 0.1 * TASK.hard_loss(mine, batch.labels)
                loss.backward()
                optimizers[name].step()
                optimizers[name].zero_grad()

        times: dict[str, list[float]] = {name: [] for name in (*teachers, "teacher_forward", "student_forward")}
        for _ in range(rounds + 1):
            for name in teachers:
                times[name].append(spent(lambda name=name: steps(name)))
            with torch.no_grad():
                times["teacher_forward"].append(spent(lambda: network(batches[0].inputs)))
                times["student_forward"].append(spent(lambda: student(batches[0].inputs)))
    ms = {name: middle(values[1:]) * 1e3 for name, values in times.items()}
    flops = []
    for model in (network, student):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(batches[0].inputs)
        flops.append(counter.get_total_flops())
    bound = 1 + ms["teacher_forward"] / (3 * ms["student_forward"])
    gains = {name: ms["online"] / ms[name] for name in ("memory", "store")}
    result = {
        "target": 0.95,
        "batch": size,
        "ms": {name: round(value / (1 if "forward" in name else len(batches)), 2) for name, value in ms.items()},
        "speedup": {name: round(value, 3) for name, value in gains.items()},
        "bound_measured": round(bound, 3),
        "bound_flops": round(1 + flops[0] / (3 * flops[1]), 3),
        "share_of_bound": round(gains["store"] / bound, 3),
        "bytes_per_sample": store.bytes_per_sample,
        "rows_written_per_second": round(count / writing),
        "read_ms_per_batch": round(1e3 * reading, 4),
        "lost_rows_after_kill": lost,
        "shard": shard,
    }
    print(json.dumps({"benchmark": "cached_teacher", "quick": quick, **result, **facts()}))


if __name__ == "__main__":
    main()
