"""Sentence encoders: limbeck against sentence-transformers, in texts a second of encoding and of a step of layer-reduced distillation.

    python benchmarks/sentence.py [--quick]

Texts: docstrings of Python's standard library and the functions they belong to, up to 48 tokens. Teacher: a BERT of 6 layers, width 384
(the shape of all-MiniLM-L6-v2), random weights; student: its first 2 layers. Encoding: limbeck's `Embedding.embed` over a data set of
token ids, as `limbeck run` measures; sentence-transformers' `encode` of the same texts with the same tokenizer, batches of 32, lengths
sorted by itself; it also turns texts into tokens, which limbeck did when the data were opened, so its forward pass alone on limbeck's
batches is a third arm. Step: 16 pairs, so 32 texts, the teacher live, mean squared distance of the embeddings (`MSELoss` of
sentence-transformers), AdamW; limbeck's engine with that loss against a plain loop around sentence-transformers' model and loss.

Checked first: both give the same embeddings of the same tokens, and the same loss and gradient. Floor: the operations of the passes at
the rate of a matrix product.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from common import absent, floor_ms, flops, in_turn, milliseconds, over, parser, row, say
from peers import Absent, need, version
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck import schema
from limbeck.data.batch import Batch
from limbeck.data.text import open_text
from limbeck.engine.clock import Clock
from limbeck.engine.loop import Loop, Plan
from limbeck.knowledge.methods.kd import KD
from limbeck.knowledge.program import KnowledgeProgram
from limbeck.knowledge.teachers import FrozenTeacher
from limbeck.signals.signals import Signals
from limbeck.tasks.embedding import Embedding
from limbeck.zoo.sentence import SentenceEncoder, first_layers

BATCH = 16
TARGET = 1.0


@dataclass
class Imitate(KD):
    """Mean squared distance of the embeddings, a mean over both sides."""

    tasks: ClassVar[tuple[str, ...]] = ("embedding",)

    def loss(self, batch: Batch, student: Signals, teacher: Signals, clock: Clock) -> dict[str, Tensor]:
        """`mse`."""
        return {"mse": 0.5 * (F.mse_loss(student.query, teacher.query) + F.mse_loss(student.document, teacher.document))}


def encoder(vocabulary: int, quick: bool) -> nn.Module:
    """A BERT with random weights."""
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    wide, layers = (32, 2) if quick else (384, 6)
    config = BertConfig(
        vocab_size=vocabulary, hidden_size=wide, num_hidden_layers=layers, num_attention_heads=4 if quick else 12,
        intermediate_size=4 * wide, max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertModel(config)


def opened(net: SentenceEncoder, tokenizer: Any, folder: Path) -> Any:
    """The same network in sentence-transformers, from the folder that limbeck saves."""
    library = need("sentence_transformers")
    from transformers.utils import logging

    logging.set_verbosity_error()  # that the pooling layer, which no one uses, is not in the folder
    logging.disable_progress_bar()
    folder.mkdir()
    net.save(folder)
    tokenizer.save_pretrained(folder)
    made = library.SentenceTransformer(str(folder), device="cpu")
    made.max_seq_length = 48
    return made


def sides(batch: Batch) -> list[dict[str, Tensor]]:
    """Queries and documents."""
    return [dict(batch.inputs[side]) for side in ("query", "document")]


def limbeck_steps(teacher: nn.Module, student: nn.Module, data: Any, task: Any, steps: int) -> KnowledgeProgram:
    """limbeck's program."""
    training = schema.Training(steps=steps, batch=BATCH, lr=1e-4, weight_decay=0, schedule="constant", warmup=0, optimizer="adamw")
    frozen = FrozenTeacher(teacher, ("query", "document"), read=task.reader)
    return KnowledgeProgram(Imitate(), student, frozen, data, task, training)


def peer_steps(teacher: Any, student: Any, batches: list[Batch]) -> Callable[[], object]:
    """A plain loop around sentence-transformers' model and MSELoss."""
    losses = need("sentence_transformers.sentence_transformer.losses") if _new() else need("sentence_transformers.losses")
    loss = losses.MSELoss(student)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-4, weight_decay=0)
    student.train()

    def act() -> None:
        for batch in batches:
            optimizer.zero_grad()
            total = torch.zeros(())
            for side in sides(batch):
                with torch.no_grad():
                    target = teacher(dict(side))["sentence_embedding"]
                total = total + 0.5 * loss([dict(side)], target)
            total.backward()
            optimizer.step()

    return act


def _new() -> bool:
    try:
        need("sentence_transformers.sentence_transformer.losses")
    except Absent:
        return False
    return True


def measure(quick: bool, folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Figures and rows."""
    count, steps, rounds = (24, 1, 1) if quick else (128, 2, 9)
    options: dict[str, Any] = {"tokenizer": "bpe:1000", "length": 48, "train": count, "test": 8}
    if quick:
        options["packages"] = ["json", "email"]
    data = open_text("stdlib-retrieval", **options)
    task, tokenizer = Embedding(data.text), data.text.tokenizer
    base = encoder(len(tokenizer), quick)
    teacher, student = SentenceEncoder(base).eval(), SentenceEncoder(first_layers(base, 1 if quick else 2))
    batches = [data.train.batch(torch.arange(i * BATCH, (i + 1) * BATCH)) for i in range(max(steps, 1))]
    device = torch.device("cpu")
    peer = version("sentence-transformers")
    titles = {
        "encode": "texts a second of encoding",
        "forward": "the same, its forward pass alone on limbeck's batches",
        "step": "texts a second of a training step",
    }
    titles = {name: f"{text}, limbeck over {peer}" for name, text in titles.items()}
    try:
        theirs, learning = (opened(net, tokenizer, folder / name) for name, net in (("teacher", teacher), ("student", student)))
        peer_step = peer_steps(theirs.eval(), learning, batches)
    except Absent as why:
        return {}, [absent(text, str(why)) for text in titles.values()]
    with torch.no_grad():
        for side in sides(batches[0]):
            torch.testing.assert_close(teacher(**side), theirs(dict(side))["sentence_embedding"], rtol=1e-4, atol=1e-5)
    program = limbeck_steps(teacher, student, data, task, steps)
    program.train()
    mine = sum(program.losses("student", batches[0], Loop(program, Plan(program.training, steps)).clock).values())
    own = torch.autograd.grad(mine, [p for p in program.student.parameters() if p.requires_grad])  # type: ignore[arg-type]
    both = [(learning(dict(s))["sentence_embedding"], theirs(dict(s))["sentence_embedding"].detach()) for s in sides(batches[0])]
    other = sum(0.5 * F.mse_loss(a, b) for a, b in both)
    torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-7)
    for a, b in zip(own, torch.autograd.grad(other, [p for p in learning.parameters() if p.requires_grad], allow_unused=True)):  # type: ignore[arg-type]
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-6)

    texts = [
        tokenizer.decode(ids[mask.bool()], skip_special_tokens=True)
        for b in _all(data.train)
        for s in sides(b)
        for ids, mask in zip(s["input_ids"], s["attention_mask"])
    ]

    def forward() -> None:
        with torch.no_grad():
            for batch in _all(data.train):
                for side in sides(batch):
                    theirs(side)

    def run() -> Callable[[], object]:
        made = limbeck_steps(teacher, student, data, task, steps)
        return Loop(made, Plan(made.training, steps, watch=0)).run

    times = in_turn(
        {
            "encode": lambda: lambda: task.embed(teacher, data.train, BATCH, device),
            "encode_peer": lambda: lambda: theirs.encode(texts, batch_size=2 * BATCH, show_progress_bar=False),
            "forward_peer": lambda: forward,
            "step": run,
            "step_peer": lambda: peer_step,
        },
        rounds,
        warm=True,
    )
    limits = {"encode": floor_ms(flops(lambda: task.embed(teacher, data.train, BATCH, device)))}
    limits["step"] = floor_ms(flops(run()) / steps)
    found: dict[str, Any] = {"floors": limits}
    rows = []
    for name, arm, base_arm, number in (
        ("encode", "encode_peer", "encode", len(texts)),
        ("forward", "forward_peer", "encode", len(texts)),
        ("step", "step_peer", "step", 2 * BATCH * steps),
    ):
        gain = over(times, arm, base_arm)
        ms = {side: milliseconds(times[one])["ms"] for side, one in (("limbeck", base_arm), ("peer", arm))}
        rates = {side: round(1e3 * number / value, 1) for side, value in ms.items()}
        found[name] = gain | {"texts_per_second": rates}
        limit = limits["step" if name == "step" else "encode"]
        share = ms["limbeck"] / (steps if name == "step" else 1) / limit["ms"]
        text = f"{limit['gflop']:.1f} Gflop: {limit['ms']:.0f} ms; limbeck takes {share:.2f} of it"
        note = f"{rates['limbeck']} against {rates['peer']} texts/s"
        rows.append(
            row(titles[name], gain["ratio"], None if name == "forward" else TARGET, higher=True, floor=text, iqr=gain["iqr"], note=note)
        )
    return found, rows


def _all(split: Any) -> list[Batch]:
    return [split.batch(part) for part in torch.arange(len(split)).split(BATCH)]


def main() -> None:
    """Print one line of JSON."""
    given = parser(__doc__).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found, rows = measure(given.quick, Path(folder))
    say("sentence", given.quick, rows, **found)


if __name__ == "__main__":
    main()
