"""What `limbeck inspect` shows: module paths with their shapes, and the teacher-student pairs that suggest themselves."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import nn

from limbeck.signals.anatomy import Anatomy, Row, Shape, anatomy


class Pair(NamedTuple):
    """A teacher's and a student's signal that belong together; shapes batch first; `bridge` when the shapes differ."""

    signal: str
    teacher: str
    teacher_shape: Shape
    student: str
    student_shape: Shape
    bridge: bool


@dataclass
class Inspection:
    """A model's rows and anatomy, and with a second model (the student) its anatomy and the proposed pairs."""

    rows: list[Row]
    anatomy: Anatomy
    other: Anatomy | None = None
    pairs: list[Pair] = field(default_factory=list)


def inspect(model: nn.Module, inputs: Any, other: nn.Module | None = None, other_inputs: Any = None) -> Inspection:
    """Look at one model, or at a teacher and a student side by side.

    Args:
        model: the model (the teacher).
        inputs: one batch as it takes it.
        other: the student, if there is one.
        other_inputs: the student's batch when it differs from the teacher's.
    """
    first = anatomy(model, inputs)
    if other is None:
        return Inspection(first.modules, first)
    second = anatomy(other, inputs if other_inputs is None else other_inputs)
    return Inspection(first.modules, first, second, pairs(first, second))


def pairs(teacher: Anatomy, student: Anatomy) -> list[Pair]:
    """Match each stage of the student with one of the teacher, in order, by relative depth and spatial resolution; then the embeddings."""
    found = []
    for j, i in enumerate(_align(teacher.stage_shapes, student.stage_shapes)):
        t, s = teacher.stage_shapes[i], student.stage_shapes[j]
        found.append(Pair("stages", teacher.stages[i], t, student.stages[j], s, t[1:] != s[1:]))
    if teacher.head and student.head and teacher.embedding_shape and student.embedding_shape:
        t, s = _flat(teacher.embedding_shape), _flat(student.embedding_shape)
        found.append(Pair("embedding", teacher.head, t, student.head, s, t[1:] != s[1:]))
    return found


def _flat(shape: Shape) -> Shape:
    return (shape[0], math.prod(shape[1:])) if len(shape) >= 4 else shape


def _cost(teacher: Shape, student: Shape, depth_t: float, depth_s: float) -> float:
    """Difference of relative depth, plus half a unit for each halving of the resolution (0.25 where only one has a resolution)."""
    cost = abs(depth_t - depth_s)
    if len(teacher) >= 3 and len(teacher) == len(student):
        size_t, size_s = (math.prod(x[2:]) if len(x) >= 4 else x[1] for x in (teacher, student))
        return cost + 0.25 * abs(math.log2(max(size_t, 1) / max(size_s, 1)))
    return cost + (0.25 if len(teacher) != len(student) else 0.0)


def _align(teacher: list[Shape], student: list[Shape]) -> list[int]:
    """For each student stage the teacher's, never going back, and always going on when the teacher has stages enough."""
    n, m = len(teacher), len(student)
    if not n or not m:
        return []
    step = 1 if n >= m else 0
    rows: list[list[tuple[float, list[int]]]] = []
    for j in range(m):
        row = []
        for i in range(n):
            cost = _cost(teacher[i], student[j], (i + 1) / n, (j + 1) / m)
            before: tuple[float, list[int]] = (0.0, [])
            if j:
                options = rows[-1][: i + 1 - step]
                before = min(options, key=lambda option: option[0]) if options else (math.inf, [])
            row.append((before[0] + cost, [*before[1], i]))
        rows.append(row)
    return min(rows[-1], key=lambda option: option[0])[1]
