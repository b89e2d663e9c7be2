"""Language: training from stored top-64 distributions, the on-policy step, and decoding with a distilled draft.

    python benchmarks/language.py [--quick] [--peer PYTHON] [--rounds 3]

stored: a Llama-like teacher of about eight times the student's forward cost, V = 32,000, texts of 128 random tokens. A step with the live
teacher over one from the store of its 64 likeliest tokens; the bound is 1 + F_T / (3 F_S), forward passes measured. Bytes are of the disk.

on_policy: distillspec with every batch written by the student: 8 prompts of 64 tokens, 64 new ones, teacher of 8 layers, student of 4,
width 256, V = 32,000, AdamW. Peer: the step of TRL's GKDTrainer (its `generate_on_policy_outputs` with Hugging Face's generate, its
`generalized_jsd_loss` with beta 0 on both models' logits, backward, AdamW), without accelerator. `plain` is the same step without TRL.
Every arm has a process of its own. Nobody stops early: there is no end token.

speculative: a target of 8 layers and a draft of one, trained on Python's standard library here; the draft alone or distilled from the
target, for the same steps. Sampling at temperature 1, gamma 4; wall time, because that is what speculation is for.

Checked first: the loss and its gradient from a store that holds everything are the live teacher's, and the 64 tokens are the likeliest;
value and gradient norm of the step's loss on the same written text agree between the arms. Times are process CPU time, one thread; the
median of the rounds, in which the arms take turns.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TARGETS = {"share_of_bound": 0.95, "bytes_a_token": 400, "over_trl": 1.5, "over_plain_decoding": 1.0, "over_undistilled": 1.1}
OWN, PEER = ("limbeck", "plain"), "trl"


def llama(vocabulary: int, layers: int, width: int, length: int, seed: int) -> nn.Module:
    """A model with random weights, the same in every process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 4}
    special = {"pad_token_id": 0, "bos_token_id": None, "eos_token_id": None}
    inner = 8 * width // 3
    config = LlamaConfig(vocab_size=vocabulary, max_position_embeddings=length, intermediate_size=inner, **sizes, **special)
    return LlamaForCausalLM(config)


def job(vocabulary: int, length: int, texts: Tensor, labels: Tensor | None = None) -> tuple[Any, Any]:
    """Data of whole rows of tokens, and the task."""
    from limbeck.data import Data
    from limbeck.data.split import TensorSplit
    from limbeck.data.text import Text
    from limbeck.tasks import Language

    text = Text(None, "causal-lm", length, vocabulary, pad=0, eos=None)  # type: ignore[arg-type]
    split = TensorSplit({"input_ids": texts}, texts if labels is None else labels)
    return Data("tokens", split, split, None, (length,), (), "causal-lm", "tokens", text=text), Language(text)


def program(method: Any, student: nn.Module, teacher: Any, data: Any, task: Any, batch: int, steps: int, lr: float = 1e-3) -> Any:
    """A training of limbeck's engine, not begun."""
    from limbeck import schema
    from limbeck.engine.loop import Loop, Plan
    from limbeck.knowledge.program import KnowledgeProgram

    training = schema.Training(steps=steps, batch=batch, lr=lr, weight_decay=0, schedule="constant", warmup=0)
    made = KnowledgeProgram(method, student, teacher, data, task, training)
    return made, Loop(made, Plan(training, steps, watch=0))


# ---- stored ----


def write_store(folder: Path, teacher: Any, data: Any, task: Any, form: str, k: int | None) -> Any:
    """Store a teacher as `limbeck cache` does, and open it."""
    from limbeck.knowledge.caching import _tokens, _write
    from limbeck.knowledge.teachers import StoredLanguageTeacher, scored_counts
    from limbeck.signals.store import Store, StoreWriter

    starts = torch.cat([torch.zeros(1, dtype=torch.int64), scored_counts(data.train, task).cumsum(0)])
    marks = {"teacher_fingerprint": "t", "data_fingerprint": "d", "samples": int(starts[-1])}
    writer = StoreWriter(folder, **marks, signals={"logits": (task.text.vocabulary,)}, form=form, k=k)  # type: ignore[arg-type]
    _write(writer, _tokens(writer, teacher, data, 4, torch.device("cpu"), starts, k), ())
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
    from common import middle, spent

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
        }
        times = in_turn(arms, rounds, spent)
    ratios = {
        "speedup": [a / b for a, b in zip(times["live"], times["stored"])],
        "forward": [a / b for a, b in zip(times["teacher"], times["student"])],
    }
    speedup, cost = (middle(values) for values in ratios.values())
    bound = 1 + cost / 3
    shares = [a / (1 + c / 3) for a, c in zip(*ratios.values())]
    return {
        "speedup": round(speedup, 3),
        "forward_cost": round(cost, 2),
        "bound_measured": round(bound, 3),
        "share_of_bound": round(middle(shares), 3),
        "step_ms": {name: round(1e3 * middle(values) / steps, 1) for name, values in times.items()},
        "bytes_a_token": round(size / len(stored_teacher.store), 1),
        "top": 64,
    }


def in_turn(
    arms: dict[str, Callable[[], Callable[[], Any]]], rounds: int, clock: Callable[[Callable[[], Any]], float]
) -> dict[str, list[float]]:
    """Seconds of each arm, made anew for each round, in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in arms}
    for number in range(rounds):
        for name in sorted(arms, reverse=number % 2 > 0):
            times[name].append(clock(arms[name]()))
    return times


# ---- on policy ----


def sizes_of(quick: bool) -> tuple[int, int, int, int, int, int]:
    """Vocabulary, width, layers of the student (the teacher has twice as many), batch, tokens of a prompt, new tokens."""
    return (400, 32, 1, 2, 6, 6) if quick else (32_000, 256, 4, 8, 64, 64)


def pair_of(quick: bool) -> tuple[nn.Module, nn.Module, Tensor]:
    """(teacher, student, prompts), the same in every process."""
    vocabulary, width, layers, batch, prompt, new = sizes_of(quick)
    teacher, student = (llama(vocabulary, count, width, prompt + new, seed) for seed, count in enumerate((2 * layers, layers)))
    return teacher.eval(), student, torch.randint(1, vocabulary, (batch, prompt), generator=torch.Generator().manual_seed(5))


def written(quick: bool, prompts: Tensor) -> tuple[Tensor, Tensor]:
    """(tokens, labels) of a fixed text behind the prompts, for the check."""
    vocabulary, _, _, batch, prompt, new = sizes_of(quick)
    texts = torch.randint(1, vocabulary, (batch, new), generator=torch.Generator().manual_seed(6))
    tokens = torch.cat([prompts, texts], 1)
    return tokens, tokens.masked_fill(torch.arange(prompt + new) < prompt, -100)


def whole_logits(student: nn.Module, teacher: nn.Module, tokens: Tensor, labels: Tensor, loss: Any) -> Tensor:
    """The loss of GKD's trainer: both models' logits, shifted."""
    mask = torch.ones_like(tokens)
    own = student(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    with torch.no_grad():
        other = teacher(input_ids=tokens, attention_mask=mask).logits[:, :-1]
    return loss(own, other, labels[:, 1:])


def plain_loss(own: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """Forward KL, a mean over what is scored."""
    rows = F.kl_div(torch.log_softmax(own, -1), torch.log_softmax(other, -1), reduction="none", log_target=True).sum(-1)
    kept = labels != -100
    return (rows * kept).sum() / kept.sum()


def hugging_face_step(quick: bool, trl: bool) -> tuple[Callable[[], Any], Callable[[Tensor, Tensor], Tensor], nn.Module]:
    """(a step, the loss of a fixed text, the student) with Hugging Face's generate; with TRL's own functions, or without TRL."""
    from transformers import GenerationConfig

    teacher, student, prompts = pair_of(quick)
    new = sizes_of(quick)[-1]
    options = {"do_sample": True, "temperature": 1.0, "top_k": 0, "use_cache": True, "pad_token_id": 0, "eos_token_id": None}
    config = GenerationConfig(max_new_tokens=new, min_new_tokens=new, **options)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-3, weight_decay=0)
    given = {"prompts": prompts, "prompt_attention_mask": torch.ones_like(prompts)}
    loss: Any = plain_loss
    if trl:
        from trl.experimental.gkd import GKDTrainer

        loss = partial(_trl_loss, GKDTrainer.generalized_jsd_loss)

    def write() -> tuple[Tensor, Tensor]:
        student.eval()
        with torch.no_grad():
            if trl:
                tokens, _, labels = GKDTrainer.generate_on_policy_outputs(student, given, config)
            else:
                tokens = student.generate(prompts, attention_mask=given["prompt_attention_mask"], generation_config=config)
                labels = tokens.masked_fill(torch.arange(tokens.shape[1]) < prompts.shape[1], -100)
        student.train()
        assert int((labels != -100).sum()) == prompts.shape[0] * new
        return tokens, labels

    def step() -> None:
        tokens, labels = write()
        optimizer.zero_grad()
        whole_logits(student, teacher, tokens, labels, loss).backward()
        optimizer.step()

    return step, lambda tokens, labels: whole_logits(student, teacher, tokens, labels, loss), student


def _trl_loss(loss: Any, own: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    return loss(student_logits=own, teacher_logits=other, labels=labels, beta=0.0)


def limbeck_step(quick: bool, steps: int) -> tuple[Callable[[], Any], Callable[[Tensor, Tensor], Tensor], nn.Module]:
    """The same of limbeck: all `steps` at once through its engine."""
    from limbeck.data.batch import Batch
    from limbeck.knowledge.methods.distillspec import DistillSpec
    from limbeck.knowledge.teachers import FrozenTeacher

    teacher, student, prompts = pair_of(quick)
    vocabulary, _, _, batch, prompt, new = sizes_of(quick)
    data, task = job(vocabulary, prompt + new, written(quick, prompts)[0])
    method = DistillSpec(on_policy=1.0, tokens=new, prompt=prompt, measured=0)
    live = FrozenTeacher(teacher, ("law",), read=task.reader)
    made, loop = program(method, student, live, data, task, batch, steps)

    def run() -> None:
        loop.run()
        assert method.state["written"] == steps

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        fixed = Batch({"input_ids": tokens}, labels, torch.arange(batch))
        return method._distance(made.models.student(fixed), live(fixed))

    return run, loss, student


def child(arm: str, quick: bool, steps: int) -> dict[str, Any]:
    """One arm: the check's figures, and seconds of a step."""
    torch.set_num_threads(1)
    try:
        run, loss, student = limbeck_step(quick, steps) if arm == "limbeck" else hugging_face_step(quick, arm == PEER)
    except ImportError as error:
        return {"absent": str(error).splitlines()[0]}
    student.train()
    value = loss(*written(quick, pair_of(quick)[2]))
    value.backward()
    norm = float(torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm())
    student.zero_grad()
    begin = time.process_time()
    for _ in range(1 if arm == "limbeck" else steps):
        run()
    return {"value": value.item(), "norm": norm, "seconds": (time.process_time() - begin) / steps}


def on_policy(quick: bool, rounds: int, peer: str | None) -> dict[str, Any]:
    """All arms in processes of their own, in turn."""
    from common import middle

    steps = 1 if quick else 2
    pythons = {name: sys.executable for name in OWN} | ({PEER: peer} if peer else {})
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in pythons}
    for number in range(rounds):
        for name in sorted(pythons, reverse=number % 2 > 0):
            words = [pythons[name], __file__, "--arm", name, "--steps", str(steps), *(["--quick"] if quick else [])]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    sizes = dict(zip(("vocabulary", "width", "layers", "batch", "prompt", "new"), sizes_of(quick)))
    found: dict[str, Any] = {"sizes": sizes}
    for name, made in runs.items():
        if "absent" in made[0]:
            found[name] = made[0]
            continue
        for field in ("value", "norm"):
            assert abs(made[0][field] / runs["limbeck"][0][field] - 1) < 1e-3, (name, field, made[0], runs["limbeck"][0])
        speeds = [other["seconds"] / own["seconds"] for own, other in zip(runs["limbeck"], made)]
        seconds = middle([run["seconds"] for run in made])
        rate = round(sizes["batch"] * sizes["new"] / seconds, 1)
        found[name] = {"step_s": round(seconds, 3), "tokens_a_second": rate, "limbeck_over": round(middle(speeds), 3)}
    return found


# ---- speculative ----


def speculative(quick: bool, rounds: int) -> dict[str, Any]:
    """A distilled draft and one that was trained alone, before a trained target."""
    from common import middle

    from limbeck.data.text import open_text
    from limbeck.decoding import speculative_report
    from limbeck.knowledge.methods.alone import Alone
    from limbeck.knowledge.methods.token_level_kd import TokenLevelKD
    from limbeck.knowledge.teachers import FrozenTeacher, Teacher
    from limbeck.tasks import Language

    length, steps, own, prompts, new = (32, 3, 3, 2, 6) if quick else (128, 400, 400, 12, 64)
    shapes = ((1, 32), (1, 16)) if quick else ((8, 192), (1, 64))
    options = {"train": 40 if quick else 4000, "test": 16 if quick else 64, "packages": ["json", "email", "http", "asyncio"]}
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


def main() -> None:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--peer")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=("stored", "on_policy", "speculative"))
    parser.add_argument("--arm", choices=(*OWN, PEER))
    parser.add_argument("--steps", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.arm:
        print(json.dumps(child(options.arm, options.quick, options.steps)))
        return
    from common import facts

    rounds = 1 if options.quick else options.rounds
    parts = {
        "stored": lambda: stored(options.quick, rounds),
        "on_policy": lambda: on_policy(options.quick, rounds, options.peer),
        "speculative": lambda: speculative(options.quick, rounds),
    }
    found = {}
    for name, measure in parts.items():
        if options.only in (None, name):
            found[name] = measure()
            print(name, found[name], file=sys.stderr, flush=True)
    print(json.dumps({"benchmark": "language", "quick": options.quick, "targets": TARGETS, **found, **facts()}))


if __name__ == "__main__":
    main()
