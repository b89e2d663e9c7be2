"""Images a second of whole training on the pairs of the literature: limbeck against torchdistill, each with its own data loading.

    python benchmarks/throughput.py [--pair NAME] [--method kd|review|crd] [--quick] [--device cuda]

Pairs on random pictures of CIFAR-100's shape: R32x4 to R8x4, WRN-40-2 to 16-2, VGG13 to VGG8, R50 to MobileNetV2; on a GPU also
ViT-small to ViT-tiny at 224. Methods: kd (T = 4, 0.9 soft); `review`: kd and the pooled distance of all stages through 1x1 convolutions
(the loss of ReviewKD without its fusion); `crd`: kd and CRD's contrast over memory banks with 256 negatives. On one core a batch has 16
samples (8 for R50) and an arm makes two steps a round, so that all of it ends within minutes; on a GPU 256.

limbeck: its engine, batches cut from one tensor. torchdistill: its `DistillationBox`, the data loader that it builds (for crd with its
own `CRDDatasetWrapper`), its `MetricLogger` with the loss read each step, as in its examples; of its published classes nothing is
replaced. Checked first: loss and gradient of the student agree on a batch (for crd with the same negatives). Target: not slower. Floor:
the operations of the teacher's forward and the student's forward and backward pass at the rate of a matrix product.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import TASK, absent, floor_ms, flops, in_turn, middle, milliseconds, over, parser, resnets, row, say
from own_steps import Contrast, Taps, bridges
from pairs import PAIRS, PAIRS_GPU, PairOf
from peer_steps import ALPHA, TEMPERATURE, Job, torchdistill_box
from peers import Absent, need, version
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from limbeck.data.data import Data
from limbeck.data.split import TensorSplit
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.recipe import Training

METHODS = {"kd": "kd", "review": "taps", "crd": "crd"}
LEVELS = (4, 2, 1)


class Pictures(Dataset[tuple[Tensor, int]]):
    """Pictures one at a time, made float as a picture data set does; with what torchdistill's wrapper asks for."""

    def __init__(self, inputs: Tensor, labels: Tensor) -> None:
        self.inputs, self.targets, self.classes = inputs, labels.tolist(), list(TASK.classes)

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, number: int) -> tuple[Tensor, int]:
        return self.inputs[number].float().div_(255), self.targets[number]


def job_of(pair: PairOf, method: str, samples: int, device: str) -> Job:
    """Networks, stages and widths."""
    torch.manual_seed(0)
    teacher, student = (net.to(device) for net in pair.make())
    job = Job(teacher, student, METHODS[method], levels=LEVELS if method == "review" else (), samples=samples)
    paths = [[f"stages.{i}" for i in range(len(net.stages))] for net in (teacher, student)]  # type: ignore[arg-type]
    shapes = [seen(net, [*own, "pool"], pair.size, device) for net, own in zip((teacher, student), paths)]
    if method == "review":
        common = [(b, a) for a, b in zip(*paths) if shapes[0][a][2:] == shapes[1][b][2:]]
        job.student_stages, job.teacher_stages = (tuple(side) for side in zip(*common))  # type: ignore[assignment]
        job.bridges = bridges([(shapes[1][b][1], shapes[0][a][1]) for b, a in common]).to(device)
    if method == "crd":
        job.teacher_embedding, job.student_embedding = (("pool", shape["pool"][1:].numel()) for shape in shapes)  # type: ignore[attr-defined]
    return job


def seen(net: nn.Module, paths: list[str], size: int, device: str) -> dict[str, torch.Size]:
    """Shapes of what modules put out."""
    found: dict[str, torch.Size] = {}
    hooks = [net.get_submodule(p).register_forward_hook(lambda m, a, out, p=p: found.__setitem__(p, out.shape)) for p in paths]
    with torch.no_grad():
        net.eval()(torch.zeros(2, 3, size, size, device=device))
    for hook in hooks:
        hook.remove()
    return found


# ---- the two arms ----


def limbeck_program(job: Job, split: TensorSplit, batch: int, steps: int, device: str) -> KnowledgeProgram:
    """limbeck's program of the job."""

    class OwnTaps(Taps):
        """With this job's places."""

        levels, paths = job.levels, (job.student_stages, job.teacher_stages)

    class OwnContrast(Contrast):
        """With this job's sizes."""

    OwnContrast.job = job
    teacher, student, _ = job.models()
    data = Data("random", split, split, input_shape=tuple(split.inputs.shape[1:]), classes=TASK.classes)
    options: dict[str, Any] = {"temperature": TEMPERATURE, "alpha": ALPHA}
    method = {"kd": KD, "taps": OwnTaps, "crd": OwnContrast}[job.kind](**options)
    training = Training(steps=steps, batch=batch, optimizer="sgd", lr=0.01, nesterov=False, schedule="cosine", warmup=0)
    frozen = FrozenTeacher(teacher, method.wants()[1])
    return KnowledgeProgram(method, student, frozen, data, TASK, training, device=device)


def limbeck_arm(job: Job, split: TensorSplit, batch: int, steps: int, device: str) -> Callable[[], object]:
    """Steps of limbeck's engine, as `limbeck run` makes them."""
    program = limbeck_program(job, split, batch, steps, device)
    return Loop(program, Plan(program.training, steps, watch=0)).run


def peer_arm(job: Job, pictures: Pictures, batch: int, steps: int, device: str) -> Callable[[], object]:
    """An epoch of torchdistill in the manner of its examples."""
    box = torchdistill_box(job, steps, pictures, batch, device)
    logger = need("torchdistill.misc.log", stand_in=True).MetricLogger(delimiter="  ")

    def run() -> None:
        for done, (inputs, labels, more) in enumerate(logger.log_every(box.train_data_loader, 10**9), 1):
            inputs, labels = inputs.to(device), labels.to(device)
            loss = box.forward_process(inputs, labels, more)
            box.post_forward_process(loss=loss)
            logger.update(loss=loss.item(), lr=box.optimizer.param_groups[0]["lr"])
            if done == steps:
                return

    return run


def check(job: Job, split: TensorSplit, batch: int, device: str) -> None:
    """Equal loss and student's gradient on one batch."""
    program = limbeck_program(job, split, batch, 2, device)
    program.train()
    one = split.batch(torch.arange(batch)).to(device)
    more = None
    if job.kind == "crd":
        method = program.method
        assert isinstance(method, Contrast)
        type(method).fixed = method.places(one)
        more = {"pos_idx": one.index, "contrast_idx": type(method).fixed}
    loss = sum(program.losses("student", one, Loop(program, Plan(program.training, 2)).clock).values())
    ours = torch.autograd.grad(loss, list(program.student.parameters()))  # type: ignore[arg-type]
    box = torchdistill_box(job, 2, device=device)
    theirs = box.forward_process(one.inputs, one.labels, more)
    student = box.student_model if job.kind == "kd" else box.student_model.model
    torch.testing.assert_close(loss, theirs.reshape(()), rtol=1e-5, atol=1e-6)
    least = 1e-6 * max(float(a.abs().max()) for a in ours)  # a bias before a batch norm has no gradient but rounding
    for a, b in zip(ours, torch.autograd.grad(theirs.sum(), list(student.parameters()))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5 * float(a.abs().max()) + least)


def floor_of(job: Job, inputs: Tensor) -> dict[str, float]:
    """Operations of a step that nothing can save."""
    teacher, student, _ = job.models()

    def act() -> None:
        with torch.no_grad():
            teacher(inputs)
        F.cross_entropy(student.train()(inputs), torch.zeros(len(inputs), dtype=torch.long, device=inputs.device)).backward()

    return floor_ms(flops(act))


def measure(name: str, pair: PairOf, method: str, quick: bool, device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of one pair and method, and its row."""
    batch = 4 if quick else pair.batch if device == "cpu" else pair.batch_gpu
    rounds, steps = (1, 1) if quick else (7, 2) if device == "cpu" else (5, 30)
    samples = 512 if not quick else 128
    torch.manual_seed(0)
    inputs = torch.randint(256, (samples, 3, pair.size, pair.size), dtype=torch.uint8)
    labels = torch.randint(len(TASK.classes), (samples,))
    split, pictures, job = TensorSplit(inputs, labels), Pictures(inputs, labels), job_of(pair, method, samples, device)
    what = f"{name}, {method}: images a second, limbeck over {version('torchdistill')}"
    arms: dict[str, Callable[[], Callable[[], object]]] = {"limbeck": partial(limbeck_arm, job, split, batch, steps, device)}
    try:
        check(job, split, batch, device)
        arms["torchdistill"] = partial(peer_arm, job, pictures, batch, steps, device)
    except Absent as why:
        return {}, absent(what, str(why))
    times = in_turn(arms, rounds, warm=not quick)
    limit = floor_of(job, split.batch(torch.arange(batch)).to(device).inputs)
    found: dict[str, Any] = {"batch": batch, "floor": limit}
    for arm in arms:
        step = milliseconds(times[arm], steps)
        found[arm] = step | {"images_per_second": round(1e3 * batch / step["ms"], 1), "over_floor": round(step["ms"] / limit["ms"], 2)}
    found["limbeck_over_torchdistill"] = gain = over(times, "torchdistill", "limbeck")
    own = found["limbeck"]
    text = f"{limit['gflop']} Gflop a step, {limit['ms']:.0f} ms at the rate of a matrix product; limbeck takes {own['over_floor']} of it"
    return found, row(what, gain["ratio"], 1.0, higher=True, floor=text, iqr=gain["iqr"], note=f"{own['images_per_second']} images/s")


def main() -> None:
    """Print one line of JSON."""
    options = parser(__doc__, cuda=True)
    pairs = PAIRS | PAIRS_GPU
    options.add_argument("--pair", choices=[*pairs])
    options.add_argument("--method", choices=[*METHODS])
    given = options.parse_args()
    results, rows = {}, []
    chosen = [given.pair] if given.pair else [*(list(PAIRS)[:1] if given.quick else PAIRS), *(PAIRS_GPU if given.device == "cuda" else ())]
    for name in chosen:
        for method in [given.method] if given.method else METHODS:
            pair = copy.copy(pairs[name])
            if given.quick:
                pair.make = partial(resnets, 8, 8, 1)
            figures, line = measure(name, pair, method, given.quick, given.device)
            results[f"{name}, {method}"] = figures
            rows.append(line)
    gains = [figures["limbeck_over_torchdistill"]["ratio"] for figures in results.values() if figures]
    if gains and not given.quick:
        rows.append(row("all pairs and methods: the median of the gains", round(middle(gains), 4), 1.0, higher=True))
    if given.device == "cpu":
        rows.append(absent("ViT-small to ViT-tiny at 224, batch 256: images a second", "needs a GPU: `--device cuda`"))
    say("throughput", given.quick, rows, pairs=results)


if __name__ == "__main__":
    main()
