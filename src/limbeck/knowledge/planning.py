"""What a recipe will cost, before it runs: sizes are counted, a few steps are timed on copies, and nothing is kept."""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from limbeck import places
from limbeck import recipe as schema
from limbeck.data import Batches, Data
from limbeck.data.batch import Batch
from limbeck.engine import sharding
from limbeck.engine.checkpoint import pack
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Loop, Plan
from limbeck.engine.session import Session, seed_everything
from limbeck.evaluation import at_scale
from limbeck.evaluation.cost import count_flops, stored_bytes
from limbeck.knowledge import models
from limbeck.knowledge.labelling import flat
from limbeck.knowledge.looking import inner, recipe_networks
from limbeck.knowledge.methods.alone import Alone
from limbeck.knowledge.program import KnowledgeProgram, steps_of
from limbeck.knowledge.teachers import EnsembleTeacher, FrozenTeacher, Teacher, scored_counts
from limbeck.signals import Pair, anatomy
from limbeck.signals.inspection import pairs
from limbeck.signals.store import plan_bytes
from limbeck.signals.stored_form import Form, Layout
from limbeck.tasks import Task

DRY_SECONDS = 0.5
"""About how long each phase is timed, after a few steps to warm up."""

KEPT_TOP = {"classification": 8, "language": 64}
"""Logits a row (a sample, or a scored token) in the top-k form whose size is told."""

RANDOM = 25_000
"""Bytes of the generators' states in a checkpoint, about."""


@dataclass
class Phase:
    """One training of a run.

    Attributes:
        name: as in the log.
        steps, batch: optimiser steps, samples in each.
        step_ms: measured wall time of a step; None when the phase will not run (`kept`).
        seconds: of the whole phase.
        kept: where its result is kept already.
        memory: bytes by use: weights, gradients, optimiser, activations (what one backward pass holds).
        gathered: bytes of the weights that are whole at one moment of a step when models are sharded.
        checkpoint: bytes of one checkpoint.
    """

    name: str
    steps: int
    batch: int
    step_ms: float | None = None
    seconds: float = 0.0
    kept: str | None = None
    memory: dict[str, int] = field(default_factory=dict)
    checkpoint: int = 0
    gathered: int = 0


@dataclass
class Forecast:
    """What `limbeck plan` tells; `as_dict` is its JSON.

    Attributes:
        models: `params`, `flops`, `bytes` by role; FLOPs are those of `example`.
        phases: the trainings in order.
        example: what one sample is; tokens of a text.
        scale: the teacher's share of a step's FLOPs, passes over the data, and the bytes on each card by number of processes, whole (ddp)
            and sharded (fsdp), see `limbeck.evaluation.at_scale`.
        store: bytes of the teacher's stored outputs by form, in all and for each of `rows` (samples, or scored tokens), and the bound of
            the gain in speed; empty where nothing can be stored.
        files: what a run writes, with the bytes where they are known.
        pairs: the proposed teacher-student pairs.
        reads: the signals that the method reads from the student and from the teacher.
        parts: parameters of what the method trains beside the student (bridges).
    """

    method: str
    device: str
    data: dict[str, Any]
    models: dict[str, dict[str, int]]
    phases: list[Phase]
    example: dict[str, int]
    store: dict[str, Any]
    scale: dict[str, Any]
    files: dict[str, int | None]
    pairs: list[Pair]
    reads: dict[str, list[str]]
    parts: int
    notes: list[str]

    @property
    def seconds(self) -> float:
        """Of all trainings."""
        return sum(phase.seconds for phase in self.phases)

    @property
    def memory(self) -> int:
        """Bytes at the phase that needs most."""
        return max((sum(phase.memory.values()) for phase in self.phases), default=0)

    def as_dict(self) -> dict[str, Any]:
        """Plain data."""
        found = {key: value for key, value in vars(self).items() if key not in ("phases", "pairs")}
        return {
            **found,
            "phases": [vars(phase) for phase in self.phases],
            "pairs": [pair._asdict() for pair in self.pairs],
            "seconds": self.seconds,
            "memory": self.memory,
            "disk": sum(value or 0 for value in self.files.values()),
        }


def plan(recipe: schema.Recipe, session: Session, processes: Sequence[int] = (1, 8, 64)) -> Forecast:
    """Build everything that the recipe names, train nothing, and measure a few steps of each phase on copies.

    An untrained teacher costs what a trained one does, so it stands in for it.

    Args:
        recipe: checked.
        session: where it is measured.
        processes: numbers of processes for which the bytes on each card are told.

    Raises:
        UserError: whatever would also stop the run at its beginning.
        Interrupted: after Ctrl-C.
    """
    models.make_method(recipe.method)  # a recipe of another wing is told first
    data = models.open_recipe_data(recipe.data, None, recipe)
    task = models.task_of(recipe, data)
    networks, start = recipe_networks(recipe, data)
    for role, network in (*networks.items(), ("student", start)):
        network.to(session.device)
        models.check_input(network, data, session, role)
    example = data.to(session.device).example(1)
    sizes = {role: _sizes(network, task.cost_inputs(network, example)) for role, network in (*_roles(networks).items(), ("student", start))}
    phases: list[Phase] = []
    if recipe.teacher.kind != "online":
        for (name, spec), role in zip(recipe.teacher.models.items(), _roles(networks)):
            if spec.train:
                phases.append(_schooling(spec, networks[name], recipe, data, session, role))
    if recipe.student.train:
        phases.append(_schooling(recipe.student, start, recipe, data, session, "start"))

    bench = _Bench(recipe, data.to(session.device), task, session)
    program, total = None, 0
    for number, stage in enumerate(recipe.stages or [schema.Stage()], 1):
        method = models.make_method(stage.method or recipe.method)
        training = schema.Training.model_validate({**recipe.training.model_dump(), **stage.training})
        source = stage.teacher or recipe.teacher
        own = networks if stage.teacher is None else recipe_networks(recipe.model_copy(update={"teacher": source}), data)[0]
        own = {name: copy.deepcopy(network).to(session.device).requires_grad_(True) for name, network in own.items()}
        stored = source.kind == "stored" or bool(source.store and source.kind == "auto")
        network = copy.deepcopy(start)
        # a store is bound to the trained teacher, which is not at hand here: only its data is compared
        method.task = task
        teacher = models.make_teacher(source, method, {} if stored else own, network, bench.data, session, task)
        own_data, steps = bench.data, _steps(training, bench.data)
        if method.labelled_only and data.hidden_labels is not None:
            own_data = bench.data.only_labelled()
        name = "student" if not recipe.stages or len(recipe.stages) == 1 else stage.name or f"stage-{number}"
        phase, program = bench.phase(name, method, network, teacher, own_data, training, steps)
        phases.append(phase)
        total += steps
    assert program is not None
    plain = recipe.training.model_copy(update={"labelled_share": None})
    if recipe.baseline:
        phases.append(bench.phase("baseline", Alone(), copy.deepcopy(start), Teacher(), bench.data.only_labelled(), plain, total)[0])
    if recipe.ceiling and data.hidden_labels is not None:
        phases.append(bench.phase("ceiling", Alone(), copy.deepcopy(start), Teacher(), bench.data.with_all_labels(), plain, total)[0])

    wants = program.method.wants()
    frozen = (recipe.teacher.kind if recipe.teacher.kind != "auto" else program.method.teacher_kind) in ("frozen", "stored")
    store = _store(networks, wants[1], data, task, sizes, session) if networks and frozen and not recipe.data.augment else {}
    return Forecast(
        method=program.method.card.id,
        device=str(session.device),
        data=data.describe(),
        models=sizes,
        phases=phases,
        example={} if data.text is None else {"tokens": _tokens(example)},
        store=store,
        scale=_scale(phases, sizes, store, processes),
        files=_files(recipe, phases, sizes, data, task),
        pairs=_pairs(networks, start, data, task, session),
        reads={"student": list(wants[0]), "teacher": list(wants[1])},
        parts=sum(p.numel() for p in program.method.parts.parameters()),
        notes=list(session.notes),
    )


def _roles(networks: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    return {"teacher" if len(networks) == 1 else f"teacher-{name}": network for name, network in networks.items()}


def _sizes(network: nn.Module, example: Any) -> dict[str, int]:
    return {"params": sum(p.numel() for p in network.parameters()), "flops": count_flops(network, example), "bytes": stored_bytes(network)}


def _steps(training: Any, data: Data) -> int:
    return steps_of(training, Batches(data.train, min(training.batch, len(data.train))).steps_per_epoch)


def _schooling(spec: schema.Model, network: nn.Module, recipe: schema.Recipe, data: Data, session: Session, role: str) -> Phase:
    """The phase in which a model is trained first; nothing when its result is kept already."""
    assert spec.train is not None
    if role == "start":  # its own seed follows the run's, see `models.make_student`
        spec = spec.model_copy(update={"train": spec.train.model_copy(update={"seed": recipe.seed})})
    assert spec.train is not None
    own = models.school_data(spec, recipe, data)
    folder, _ = models.kept_at(spec, network, recipe, own, session)
    steps = _steps(spec.train, own)
    if folder.is_dir():
        return Phase(role, steps, min(spec.train.batch, len(own.train)), kept=str(folder))
    bench = _Bench(recipe, own.to(session.device), models.task_of(recipe, own), session, spec.train.data.get("augment"))
    method = models.make_method(spec.train.method)
    return bench.phase(role, method, copy.deepcopy(network), Teacher(), bench.data, spec.train, steps)[0]


class _Bench:
    """Measures phases on what they share: data on its device, task, augmentation."""

    def __init__(self, recipe: schema.Recipe, data: Data, task: Any, session: Session, augment: Any = None) -> None:
        self.recipe, self.data, self.task, self.session = recipe, data, task, session
        self.augment = recipe.data.augment if augment is None else augment

    def phase(
        self, name: str, method: Any, network: nn.Module, teacher: Teacher, data: Data, training: Any, steps: int
    ) -> tuple[Phase, KnowledgeProgram]:
        """Time a few steps of one training, and count what it holds in memory."""
        device = self.session.device
        seed_everything(self.recipe.seed, f"{name} plan")
        program = KnowledgeProgram(method, network, teacher, data, self.task, training, augment=self.augment, total=steps, device=device)
        size = min(training.batch, len(data.train))
        held = _held(program)
        began = time.perf_counter()
        self._run(program, training, 3)
        count = max(3, min(50, int(DRY_SECONDS / max((time.perf_counter() - began) / 3, 1e-6))))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        began = time.perf_counter()
        self._run(program, training, count)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        step = (time.perf_counter() - began) / count
        modules = program.modules()
        optimizers = program.optimizers().values()
        learned = sum(p.nbytes for o in optimizers for group in o.param_groups for p in group["params"])
        state = sum(t.nbytes for o in optimizers for s in o.state.values() for t in s.values() if isinstance(t, torch.Tensor))
        weights = {id(m): stored_bytes(m) for m in (*modules.values(), *teacher.networks().values())}
        memory = {"weights": sum(weights.values()), "gradients": learned, "optimiser": state, "activations": held}
        memories: dict[str, torch.Tensor] = {}
        pack(program.memory(), memories)
        checkpoint = sum(stored_bytes(m) for m in modules.values()) + state + sum(t.nbytes for t in memories.values()) + RANDOM
        parts = [block for m in (*modules.values(), *teacher.networks().values()) for block in sharding.blocks(m)]
        # a sharded model gathers two blocks at a time, and its outermost weights (embeddings, output matrix) for the whole step
        outermost = sum(weights.values()) - sum(map(stored_bytes, parts))
        gathered = 2 * max(map(stored_bytes, parts), default=0) + max(outermost, 0)
        return Phase(name, steps, size, step * 1e3, step * steps, None, memory, checkpoint, gathered), program

    def _run(self, program: KnowledgeProgram, training: Any, count: int) -> None:
        with torch.random.fork_rng(devices=[]):
            Loop(program, Plan(training=training, total=count, watch=0, log_every=count, precision=self.session.precision), "plan").run()


def _held(program: KnowledgeProgram) -> int:
    """Bytes that autograd keeps of one step for its backward pass, weights left out; tensors that share storage count once."""
    own = {p.untyped_storage().data_ptr() for m in program.modules().values() for p in m.parameters()}
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        place = tensor.untyped_storage().data_ptr()
        if place not in own:
            seen[place] = max(seen.get(place, 0), tensor.untyped_storage().nbytes())
        alive.append(tensor)  # so that no storage is used again while others are counted
        return tensor

    alive: list[torch.Tensor] = []
    clock = Clock(0, program.steps_per_epoch, program.total)
    program.train()
    batch = next(iter(program.batches(0, 0)))
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        for turn in program.turns(clock):
            program.losses(turn, batch, clock)
    return sum(seen.values())


def _tokens(example: Batch) -> int:
    """Tokens of the sample that sizes are told of; of pairs of texts those of the document."""
    inputs = example.inputs.get("document", example.inputs)
    return int(inputs["input_ids"].shape[-1])


def _store(
    networks: Mapping[str, nn.Module],
    wants: tuple[str, ...],
    data: Data,
    task: Task,
    sizes: Mapping[str, Mapping[str, int]],
    session: Session,
) -> dict[str, Any]:
    """Bytes of `limbeck cache`, and how much faster a step can become at best: a student's step costs 3 forward passes, a teacher's 1."""
    if task.family not in KEPT_TOP:
        return {}
    shapes, rows = _stored(networks, wants, data, task, session)
    row = "token" if task.family == "language" else "sample"
    found: dict[str, Any] = {"signals": list(shapes), "samples": len(data.train), "rows": rows, "row": row, "row_bytes": {}}
    forms: dict[Form, int | None] = {"float16": None}
    if "logits" in shapes:
        found["k"] = forms["topk"] = min(KEPT_TOP[task.family], max(1, shapes["logits"][-1] // 2))
    for form, k in forms.items():
        found[form] = plan_bytes(rows, shapes, form, k)
        found["row_bytes"][form] = Layout(shapes, form, k).bytes_per_sample
    cost = sum(row["flops"] for role, row in sizes.items() if role != "student")
    found["speed_bound"] = 1 + cost / (3 * sizes["student"]["flops"]) if sizes["student"]["flops"] else None
    return found


def _stored(
    networks: Mapping[str, nn.Module], wants: tuple[str, ...], data: Data, task: Task, session: Session
) -> tuple[dict[str, tuple[int, ...]], int]:
    """(shapes of what would be stored, number of rows): a row is a sample, or of a language model a scored token."""
    if task.family == "language":
        return {"logits": (task.text.vocabulary,)}, int(scored_counts(data.train, task).sum())
    teacher: Teacher
    if len(networks) == 1:
        wants = tuple(name for name in wants if name not in ("attention", "output")) or ("logits",)
        teacher = FrozenTeacher(copy.deepcopy(next(iter(networks.values()))), wants, read=task.reader)
    else:
        wants = ("logits",)
        teacher = EnsembleTeacher({name: FrozenTeacher(copy.deepcopy(network), read=task.reader) for name, network in networks.items()})
    said = flat(teacher(data.example(2).to(session.device)), wants)
    return {name: tuple(value.shape[1:]) for name, value in said.items()}, len(data.train)


def _scale(
    phases: Sequence[Phase], sizes: Mapping[str, Mapping[str, int]], store: Mapping[str, Any], processes: Sequence[int]
) -> dict[str, Any]:
    """What changes with size: the teacher's part in a step, what a disk must give, and bytes on each card."""
    phase = max((p for p in phases if p.step_ms is not None), key=lambda p: sum(p.memory.values()))
    student = next((p for p in phases if p.name not in ("baseline", "ceiling", "start") and not p.name.startswith("teacher")), phase)
    teacher = sum(row["flops"] for role, row in sizes.items() if role != "student")
    found: dict[str, Any] = {"teacher_share": at_scale.teacher_share(teacher, sizes["student"]["flops"]), "phase": phase.name, "cards": []}
    if store and student.step_ms:
        rows = store["rows"] * student.batch / max(store.get("samples", store["rows"]), 1) / (student.step_ms / 1e3)
        found |= {"rows_a_second": rows, "passes": student.steps * student.batch / store["samples"]}
        found["read_bytes_a_second"] = {form: size * rows for form, size in store["row_bytes"].items()}
    held, state = phase.memory["activations"], sum(size for use, size in phase.memory.items() if use != "activations")
    for count in processes:
        ddp = at_scale.on_a_card(0, state, held / count, count, frozen_bytes=1)
        fsdp = at_scale.on_a_card(0, state, held / count, count, count > 1, frozen_bytes=1, gathered=phase.gathered)
        found["cards"].append({"processes": count, "ddp": round(ddp), "fsdp": round(fsdp)})
    return found


def _files(
    recipe: schema.Recipe, phases: list[Phase], sizes: Mapping[str, Mapping[str, int]], data: Data, task: Task
) -> dict[str, int | None]:
    """What the run's folder and the cache will hold; None where the size is small or unknown."""
    schools = {"start", *(role for role in sizes if role != "student")}
    found: dict[str, int | None] = {"recipe.yaml": None, "log.jsonl": None}
    for phase in phases:
        if phase.name not in schools:
            found[f"checkpoints/{phase.name}/"] = phase.checkpoint * recipe.checkpoints.keep
        elif phase.kept is None:
            place = f"{places.cache_folder() / 'models'}/ ({phase.name})"
            found[place] = sizes["student" if phase.name == "start" else phase.name]["bytes"]
    roles = 1 + bool(recipe.baseline) + bool(recipe.ceiling and data.hidden_labels is not None) + any(role != "student" for role in sizes)
    found["student/"] = sizes["student"]["bytes"]
    if task.family == "classification":
        found["predictions.safetensors"] = len(data.test) * (4 * len(data.classes) * roles + 8)
    return {**found, "summary.json": None, "report.html": None}


def _pairs(networks: Mapping[str, nn.Module], student: nn.Module, data: Data, task: Task, session: Session) -> list[Pair]:
    example = data.example(2).to(session.device)
    small, *large = (anatomy(inner(network), task.cost_inputs(network, example)) for network in (student, *networks.values()))
    return [pair for one in large for pair in pairs(one, small)]
