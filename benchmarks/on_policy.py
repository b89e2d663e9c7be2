"""The on-policy step of a language model: limbeck's distillspec, TRL's GKD, and the same in plain Hugging Face.

    python benchmarks/on_policy.py [--quick] [--rounds 5]

Every batch is written by the student: 8 prompts of 64 tokens, 64 new ones, teacher of 8 layers, student of 4, width 256, V = 32,000,
AdamW. Peer: the step of TRL's GKDTrainer (its `generate_on_policy_outputs` with Hugging Face's generate, its `generalized_jsd_loss` with
beta 0 on both models' logits, backward, AdamW), without accelerator. `plain` is the same step without TRL. Every arm has a process of its
own. Nobody stops early: there is no end token. The step's parts: writing, the teacher's pass (limbeck's without the output matrix, which
its loss reads chunk by chunk), and the rest: the student's passes, loss, update.

Checked first: value and gradient norm of the step's loss on the same written text agree between the arms. Times are process CPU time, one
thread; the median of the rounds, in which the arms take turns. Floor: the operations of writing with a cache, of the teacher's pass and of
the student's forward and backward pass, at the rate of a matrix product.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from language_parts import job, llama, program
from peers import Absent, need, version
from torch import Tensor, nn

TARGET = 1.5
OWN, PEER = ("limbeck", "plain"), "trl"


class Parts:
    """Seconds of process time by name."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    def of(self, name: str, act: Callable[[], Any]) -> Any:
        """Call, and note what it took."""
        begin = time.process_time()
        found = act()
        self.seconds[name] += time.process_time() - begin
        return found


PARTS = Parts()


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

    def ask() -> Tensor:
        with torch.no_grad():
            return teacher(input_ids=tokens, attention_mask=mask).logits[:, :-1]

    return loss(own, PARTS.of("teacher", ask), labels[:, 1:])


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
        GKDTrainer = need("trl.experimental.gkd").GKDTrainer
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
        tokens, labels = PARTS.of("generate", write)
        optimizer.zero_grad()
        whole_logits(student, teacher, tokens, labels, loss).backward()
        optimizer.step()

    return step, lambda tokens, labels: whole_logits(student, teacher, tokens, labels, loss), student


def _trl_loss(loss: Any, own: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    return loss(student_logits=own, teacher_logits=other, labels=labels, beta=0.0)


def limbeck_step(quick: bool, steps: int) -> tuple[Callable[[], Any], Callable[[Tensor, Tensor], Tensor], nn.Module]:
    """The same of limbeck: all `steps` at once through its engine."""
    from limbeck.data.batch import Batch
    from limbeck.knowledge.methods import distillspec
    from limbeck.knowledge.teachers import FrozenTeacher

    class Timed(FrozenTeacher):
        """Its time is noted."""

        def __call__(self, batch: Any) -> Any:
            return PARTS.of("teacher", partial(super().__call__, batch))

    from limbeck.knowledge.on_policy import own_text

    distillspec.own_text = lambda *given: PARTS.of("generate", partial(own_text, *given))
    teacher, student, prompts = pair_of(quick)
    vocabulary, _, _, batch, prompt, new = sizes_of(quick)
    data, task = job(vocabulary, prompt + new, written(quick, prompts)[0])
    method = distillspec.DistillSpec(on_policy=1.0, tokens=new, prompt=prompt, measured=0)
    live = Timed(teacher, ("law",), read=task.reader)
    made, loop = program(method, student, live, data, task, batch, steps)

    def run() -> None:
        loop.run()
        assert method.state["written"] == steps

    def loss(tokens: Tensor, labels: Tensor) -> Tensor:
        fixed = Batch({"input_ids": tokens}, labels, torch.arange(batch))
        return method._distance(made.models.student(fixed), live(fixed))

    return run, loss, student


def child(arm: str, quick: bool, steps: int) -> dict[str, Any]:
    """One arm: the check's figures, and seconds of a step and of its parts."""
    torch.set_num_threads(1)
    try:
        run, loss, student = limbeck_step(quick, steps) if arm == "limbeck" else hugging_face_step(quick, arm == PEER)
    except Absent as why:
        return {"absent": str(why)}
    student.train()
    value = loss(*written(quick, pair_of(quick)[2]))
    value.backward()
    norm = float(torch.stack([p.grad.norm() for p in student.parameters() if p.grad is not None]).norm())
    student.zero_grad()
    PARTS.seconds.clear()
    begin, wall = time.process_time(), time.perf_counter()
    for _ in range(1 if arm == "limbeck" else steps):
        run()
    spent = {"seconds": (time.process_time() - begin) / steps, "seconds_wall": (time.perf_counter() - wall) / steps}
    parts = {name: value / steps for name, value in PARTS.seconds.items()}
    return {"value": value.item(), "norm": norm, **spent, "parts": parts | {"rest": spent["seconds"] - sum(parts.values())}}


def floor_of(quick: bool) -> float:
    """Operations of a step that nothing can save."""
    from common import flops

    teacher, student, prompts = pair_of(quick)
    batch, new = sizes_of(quick)[3], sizes_of(quick)[5]
    tokens = written(quick, prompts)[0]

    def once(model: nn.Module, ids: Tensor) -> int:
        with torch.no_grad():
            return flops(lambda: model(input_ids=ids, use_cache=False))

    writing = once(student, prompts) + (new - 1) * once(student, torch.zeros(batch, 1, dtype=torch.long))
    return writing + once(teacher, tokens) + 3 * once(student, tokens)


def measure(quick: bool, rounds: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """All arms in processes of their own, in turn; figures and rows."""
    from common import absent, floor_ms, middle, quantile, rotated, row

    steps, names = 1 if quick else 2, (*OWN, PEER)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in rotated(names, number):
            if runs[name] and "absent" in runs[name][0]:
                continue
            if quick:
                runs[name].append(child(name, quick, steps))
                continue
            words = [sys.executable, __file__, "--arm", name, "--steps", str(steps), *(["--quick"] if quick else [])]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name}: {done.stderr}")
            runs[name].append(json.loads(done.stdout.strip().splitlines()[-1]))
    sizes = dict(zip(("vocabulary", "width", "layers", "batch", "prompt", "new"), sizes_of(quick)))
    limit = floor_ms(floor_of(quick))
    found, rows = {"sizes": sizes, "floor": limit}, []
    for name, made in runs.items():
        title = (
            f"on-policy step: tokens a second of limbeck over {'the plain step' if name == 'plain' else f'GKD of {version(PEER)} (peer)'}"
        )
        if "absent" in made[0]:
            found[name] = made[0]
            rows.append(absent(title, made[0]["absent"]))
            continue
        for field in ("value", "norm"):
            assert abs(made[0][field] / runs["limbeck"][0][field] - 1) < 1e-3, (name, field, made[0], runs["limbeck"][0])
        speeds = [theirs["seconds"] / own["seconds"] for own, theirs in zip(runs["limbeck"], made)]
        seconds = middle([run["seconds"] for run in made])
        parts = {part: round(middle([run["parts"][part] for run in made]), 3) for part in made[0]["parts"]}
        rate = round(sizes["batch"] * sizes["new"] / seconds, 1)
        wall = round(middle([run["seconds_wall"] for run in made]), 3)
        found[name] = {"step_s": round(seconds, 3), "step_s_wall": wall, "parts_s": parts, "tokens_a_second": rate}
        found[name]["limbeck_over"] = round(middle(speeds), 3)
        if name != "limbeck":
            own = found["limbeck"]
            told = [", ".join(f"{part} {value} s" for part, value in one.items()) for one in (own["parts_s"], parts)]
            text = f"{limit['gflop']:.0f} Gflop: {limit['ms'] / 1e3:.2f} s; limbeck takes {own['step_s']} s: {told[0]}"
            spread = [round(quantile(speeds, share), 3) for share in (0.25, 0.75)]
            note = f"{own['tokens_a_second']} against {rate} tokens/s; parts of the other: {told[1]}"
            target = TARGET if name == PEER else None
            rows.append(row(title, found[name]["limbeck_over"], target, higher=True, floor=text, iqr=spread, note=note))
    return found, rows


def main() -> None:
    """Print one line of JSON."""
    from common import parser, say

    options = parser(__doc__)
    options.add_argument("--rounds", type=int, default=5)
    options.add_argument("--arm", choices=(*OWN, PEER))
    options.add_argument("--steps", type=int, default=1)
    given = options.parse_args()
    if given.arm:
        print(json.dumps(child(given.arm, given.quick, given.steps)))
        return
    found, rows = measure(given.quick, 1 if given.quick else given.rounds)
    say("on_policy", given.quick, rows, **found)


if __name__ == "__main__":
    main()
