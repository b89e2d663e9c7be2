"""What of a training step is still held when the step is over."""

import gc
import weakref
from dataclasses import dataclass

import torch

from limbeck import recipe, zoo
from limbeck.data import open_data
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.tasks import Classification


def test_feature_maps_are_gone_before_the_next_step():
    """Nothing keeps the signals of a step: their maps would lie beside those of the next one."""
    seen, alive = [], []

    @dataclass
    class Watching(KD):
        student_wants = ("logits", "stages")
        teacher_wants = ("logits", "stages")

        def step(self, batch, models, clock):
            gc.collect()
            alive.append(sum(map_() is not None for map_ in seen))
            return super().step(batch, models, clock)

        def loss(self, batch, student, teacher, clock):
            seen.extend(weakref.ref(value) for side in (student, teacher) for value in side.stages)
            return {**super().loss(batch, student, teacher, clock), "map": student.stages[0].square().mean()}

    x, y = torch.rand(32, 3, 8, 8), torch.arange(32) % 4
    data = open_data((x, y), test=8)
    networks = [zoo.build("cnn", input_shape=(3, 8, 8), classes=4, width=4) for _ in range(2)]
    teacher = FrozenTeacher(networks[0], Watching.teacher_wants)
    training = recipe.Training(steps=4, batch=8)
    program = KnowledgeProgram(Watching(), networks[1], teacher, data, Classification(data.classes), training)
    Loop(program, Plan(training, 4)).run()
    assert len(seen) >= 8 and alive == [0] * 4
    assert program.vitals() == []
