"""Language: training from stored top-64 distributions, and decoding with a distilled draft. The on-policy step is in `on_policy.py`.

    python benchmarks/language.py [--quick] [--rounds 5] [--only stored|speculative]

stored: a Llama-like teacher of about eight times the student's forward cost, V = 32,000, texts of 128 random tokens. A step with the live
teacher over one from the store of its 64 likeliest tokens; the bound is 1 + F_T / (3 F_S), forward passes measured in the same round.
Bytes are of the disk.

speculative: a target of 8 layers and a draft of one, trained on Python's standard library here; the draft alone or distilled from the
target, for the same steps. Sampling at temperature 1, gamma 4; wall time, because that is what speculation is for. Floor: what the
acceptance rate allows when a draft costs nothing.

Checked first: the loss and its gradient from a store that holds everything are the live teacher's, and the 64 tokens are the likeliest.
Times are process CPU time, one thread; the median of the rounds, in which the arms take turns.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import in_turn, middle, parser, quantile, row, say
from language_parts import job, llama, program
from torch import nn

TARGETS = {"share_of_bound": 0.95, "bytes_a_token": 400, "over_plain_decoding": 1.0, "over_undistilled": 1.1}


# ---- stored ----


def write_store(folder: Path, teacher: Any, data: Any, task: Any, form: str, k: int | None) -> Any:
    """Store a teacher as `limbeck cache` does, and open it."""
    from limbeck.knowledge.labelling import Labelling
    from limbeck.knowledge.teachers import StoredLanguageTeacher, scored_counts
    from limbeck.signals.store import Store, StoreWriter

    starts = torch.cat([torch.zeros(1, dtype=torch.int64), scored_counts(data.train, task).cumsum(0)])
    shapes, rows = {"logits": (task.text.vocabulary,)}, int(starts[-1])
    labels = Labelling(teacher, data, ("law",), 4, torch.device("cpu"), "t", "d", shapes, rows, "tokens", k, starts)
    marks = {"teacher_fingerprint": "t", "data_fingerprint": "d", "samples": rows}
    writer = StoreWriter(folder, **marks, signals=shapes, form=form, k=k)  # type: ignore[arg-type]
    for index, said in labels.pieces(0, rows):
        writer.write(index, said)
    writer.finish()
    return StoredLanguageTeacher(Store(folder, teacher_fingerprint="t", data_fingerprint="d"), data.train, task)


def check_store() -> None:
    """A store of everything gives the live teacher's loss and gradient; one of the top tokens their ids and probabilities."""
    from limbeck.knowledge.methods.token_level_kd import TokenLevelKD
    from limbeck.knowledge.teachers import FrozenTeacher

    torch.manual_seed(1)
    data, task = job(300, 12, torch.randint(1, 300, (6, 12)))
    teacher, student = (llama(300, 1, width, 12, seed) for width, seed in ((32, 0), (16, 1)))
    live, batch = FrozenTeacher(teacher, ("law",), read=task.reader), data.train.batch(torch.tensor([4, 1]))
    with tempfile.TemporaryDirectory() as folder:
        whole, top = (write_store(Path(folder) / form, live, data, task, form, k) for form, k in (("float32", None), ("topk", 8)))
        found = []
        for source in (live, whole):
            made, _ = program(TokenLevelKD(), student, source, data, task, 2, 1)
            loss = sum(made.losses("student", batch, None).values())
            found.append([loss, *torch.autograd.grad(loss, [p for p in student.parameters() if p.requires_grad])])
        for a, b in zip(*found):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
        kept, true = top(batch).law, torch.log_softmax(live(batch).law.logits(), -1).topk(8)
        assert torch.equal(kept.ids, true.indices)
        torch.testing.assert_close(kept.logs, true.values, rtol=2e-3, atol=2e-3)


def stored(quick: bool, rounds: int) -> dict[str, Any]:
    """Live teacher against the store."""
    from limbeck.knowledge.methods.token_level_kd import TokenLevelKD
    from limbeck.knowledge.teachers import FrozenTeacher

    check_store()
    vocabulary, length, batch, samples, steps, sizes = (
        (500, 16, 2, 4, 2, ((2, 64), (1, 32))) if quick else (32_000, 128, 4, 16, 8, ((6, 512), (2, 128)))
    )
    torch.manual_seed(0)
    data, task = job(vocabulary, length, torch.randint(1, vocabulary, (samples, length)))
    network, student = (llama(vocabulary, *size, length, seed) for seed, size in enumerate(sizes))
    live = FrozenTeacher(network, ("law",), read=task.reader)
    part = data.train.batch(torch.arange(batch))

    def passes(model: nn.Module) -> None:
        with torch.no_grad():
            for _ in range(steps):
                model(**part.inputs, use_cache=False)

    with tempfile.TemporaryDirectory() as folder:
        stored_teacher = write_store(Path(folder) / "top", live, data, task, "topk", 64)
        size = sum(file.stat().st_size for file in (Path(folder) / "top").iterdir())
        arms: dict[str, Callable[[], Callable[[], Any]]] = {
            "live": lambda: program(TokenLevelKD(), student, live, data, task, batch, steps)[1].run,
            "stored": lambda: program(TokenLevelKD(), student, stored_teacher, data, task, batch, steps)[1].run,
            "teacher": lambda: partial(passes, network),
            "student": lambda: partial(passes, student),
            "update": lambda: updates(student, steps),
        }
        both = in_turn(arms, rounds, warm=not quick)
    times = {name: [one[0] for one in values] for name, values in both.items()}
    ratios = {
        "speedup": [a / b for a, b in zip(times["live"], times["stored"])],
        "forward": [a / b for a, b in zip(times["teacher"], times["student"])],
    }
    speedup, cost = (middle(values) for values in ratios.values())
    bound = 1 + cost / 3
    shares = [a / (1 + c / 3) for a, c in zip(*ratios.values())]
    sides = zip(times["teacher"], times["student"], times["update"])
    fuller = [(t + 3 * s + u) / (3 * s + u) for t, s, u in sides]
    with_update = [a / b for a, b in zip(ratios["speedup"], fuller)]
    return {
        "speedup": round(speedup, 3),
        "forward_cost": round(cost, 2),
        "bound_with_update": round(middle(fuller), 3),
        "share_with_update": round(middle(with_update), 3),
        "iqr_with_update": [round(quantile(with_update, share), 3) for share in (0.25, 0.75)],
        "bound_measured": round(bound, 3),
        "share_of_bound": round(middle(shares), 3),
        "iqr": [round(quantile(shares, share), 3) for share in (0.25, 0.75)],
        "step_ms": {name: round(1e3 * middle(values) / steps, 1) for name, values in times.items()},
        "bytes_a_token": round(size / len(stored_teacher.store), 1),
        "top": 64,
    }


def updates(student: nn.Module, steps: int) -> Callable[[], Any]:
    """The optimiser's part of the steps alone, which no cache can save."""
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-9, weight_decay=0)
    for parameter in student.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()

    def act() -> None:
        for _ in range(steps):
            optimizer.step()

    return act


# ---- speculative ----


def speculative(quick: bool, rounds: int) -> dict[str, Any]:
    """A distilled draft and one that was trained alone, before a trained target."""
    from limbeck.data.text import open_text
    from limbeck.decoding import speculative_report
    from limbeck.knowledge.methods.alone import Alone
    from limbeck.knowledge.methods.token_level_kd import TokenLevelKD
    from limbeck.knowledge.teachers import FrozenTeacher, Teacher
    from limbeck.tasks import Language

    length, steps, own, prompts, new = (32, 3, 3, 2, 6) if quick else (128, 400, 400, 12, 64)
    shapes = ((1, 32), (1, 16)) if quick else ((8, 192), (1, 64))
    options = {"train": 40 if quick else 3600, "test": 16 if quick else 64, "packages": ["json", "email", "http", "asyncio"]}
    data = open_text("stdlib-text", tokenizer="bpe:512", length=length, **options)
    task, size = Language(data.text), len(data.text.tokenizer)
    target = llama(size, *shapes[0], 2 * length, 0)
    program(Alone(), target, Teacher(), data, task, 8, steps)[1].run()
    drafts, marks = {}, {}
    for name, method in (("undistilled", Alone()), ("distilled", TokenLevelKD())):
        drafts[name] = llama(size, *shapes[1], 2 * length, 1)
        teacher = FrozenTeacher(target, ("law",), read=task.reader) if name == "distilled" else Teacher()
        program(method, drafts[name], teacher, data, task, 8, own, 3e-3)[1].run()
    for model in (target, *drafts.values()):
        model.eval()
    ids = data.test.batch(torch.arange(prompts)).inputs["input_ids"][:, :16]
    seconds: dict[str, list[float]] = {name: [] for name in (*drafts, "plain")}
    for number in range(rounds):
        for name in sorted(drafts, reverse=number % 2 > 0):
            report = speculative_report(target, drafts[name], list(ids), (4,), new_tokens=new, temperature=1.0, vocabulary=size)
            block = report.blocks[0]
            seconds[name].append(block.seconds_per_token)
            seconds["plain"].append(report.plain_seconds_per_token)
            marks[name] = {"alpha": round(report.alpha, 3), "block_efficiency": round(block.block_efficiency, 3)}
    plain = middle(seconds["plain"])
    for name in drafts:
        marks[name] |= {"ms_a_token": round(1e3 * middle(seconds[name]), 3), "over_plain": round(plain / middle(seconds[name]), 3)}
    over = [a / b for a, b in zip(seconds["undistilled"], seconds["distilled"])]
    return {**marks, "plain_ms_a_token": round(1e3 * plain, 3), "over_undistilled": round(middle(over), 3), "gamma": 4}


def rows_of(found: dict[str, Any]) -> list[dict[str, Any]]:
    """Lines of the table."""
    rows = []
    if kept := found.get("stored"):
        text = f"bound {kept['bound_measured']}; reached {kept['speedup']}"
        title = f"stored top-{kept['top']}: speed-up of a step, as a share of the bound"
        rows.append(row(title, kept["share_of_bound"], TARGETS["share_of_bound"], higher=True, floor=text, iqr=kept["iqr"]))
        text = f"bound {kept['bound_with_update']}: (F_T + 3 F_S + update) / (3 F_S + update); reached {kept['speedup']}"
        title = f"stored top-{kept['top']}: the same, of the bound that counts the optimiser's update"
        rows.append(row(title, kept["share_with_update"], None, higher=True, floor=text, iqr=kept["iqr_with_update"]))
        text = f"{kept['top'] * 4 + 4}: half-precision values, 16-bit ids, the rest"
        rows.append(row(f"stored top-{kept['top']}: bytes a token on disk", kept["bytes_a_token"], TARGETS["bytes_a_token"], floor=text))
    if spoken := found.get("speculative"):
        own = spoken["distilled"]
        text = f"{own['block_efficiency']} tokens a pass of the target: the gain were the draft free"
        title = "speculative decoding with a distilled draft over plain decoding of the target"
        rows.append(row(title, own["over_plain"], TARGETS["over_plain_decoding"], higher=True, floor=text))
        title = "speculative decoding with a distilled draft over the same draft trained alone"
        rows.append(row(title, spoken["over_undistilled"], TARGETS["over_undistilled"], higher=True))
    return rows


def main() -> None:
    """Print one line of JSON."""
    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--only", choices=("stored", "speculative"))
    given = options.parse_args()
    parts = {
        "stored": lambda: stored(given.quick, 1 if given.quick else given.rounds),
        "speculative": lambda: speculative(given.quick, 1 if given.quick else 3),
    }
    found = {}
    for name, measure in parts.items():
        if given.only in (None, name):
            found[name] = measure()
            print(name, found[name], file=sys.stderr, flush=True)
    say("language", given.quick, rows_of(found), targets=TARGETS, **found)


if __name__ == "__main__":
    main()
