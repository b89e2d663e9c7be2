"""What a review of the language core found, each fault as a test: reading, adapters, exits, mixtures, cut batches, stages, chance."""

import copy
import json
import math

import pytest
import torch

from limbeck import recipe as schema
from limbeck import zoo
from limbeck.data.batch import Batch
from limbeck.engine.clock import Clock
from limbeck.engine.session import Session
from limbeck.errors import UserError
from limbeck.evaluation.statistics import higher_is_better
from limbeck.knowledge import models
from limbeck.knowledge.methods.ernie_tiny import ErnieTiny
from limbeck.knowledge.methods.modular_star_encoder import ModularStarEncoder
from limbeck.knowledge.program import KnowledgeProgram, _placed
from limbeck.knowledge.teachers import Teacher
from limbeck.losses import vocabulary
from limbeck.method import make
from limbeck.models import open_recipe_data, task_of
from limbeck.signals.language import LanguageReader, settle
from limbeck.tasks.embedding import Embedding
from limbeck.zoo import Tokens, build
from limbeck.zoo.files import signed
from limbeck.zoo.language import open_language
from limbeck.zoo.sentence import SentenceEncoder, head
from tests.conftest import TINY_TEXT
from tests.test_language_core import batch, program

TOKENS = Tokens(vocabulary=50, length=32, kind="causal-lm", pad=0, bos=1, eos=2)
PAIRS = Tokens(vocabulary=50, length=32, kind="embedding", pad=0, bos=1, eos=2)
CLASSES = Tokens(vocabulary=50, length=32, kind="classification", pad=0, bos=1, eos=2, classes=3)
DOMAINS = {"data": {"source": "stdlib-domains", "train": 200, "test": 50, "valid": 50}, "text": {"tokenizer": "bpe:320", "length": 24}}


def llama():
    return build("llama", tokens=TOKENS, width=16, heads=2)


class Functional(torch.nn.Module):
    """Multiplies with its output matrix without calling it, and gives a tuple."""

    def __init__(self):
        super().__init__()
        self.inner = llama()

    def get_output_embeddings(self):
        return self.inner.get_output_embeddings()

    def forward(self, **inputs):
        return (torch.nn.functional.linear(self.inner.model(**inputs).last_hidden_state, self.inner.lm_head.weight),)


class Tripled(Functional):
    """Does something behind its output matrix that nobody announced."""

    def forward(self, **inputs):
        return (3 * self.inner(**inputs).logits,)


# ---- reading ----


def test_texts_of_which_nothing_is_scored_can_be_tried_on_a_model():
    some = batch()
    some.labels[:] = -100
    assert settle(llama(), some, "causal-lm", 50, "student") is None
    odd = Tripled()
    assert settle(odd, some, "causal-lm", 50, "student") and odd.limbeck_dense, "all positions are compared, scored or not"


def test_an_output_matrix_that_is_not_called():
    model, some = Functional(), batch()
    own = model(**some.inputs)[0][:, :-1][some.labels[:, 1:] != -100]
    said = LanguageReader(model, ("law",), kind="causal-lm", vocabulary=50)(some)
    assert torch.allclose(said.law.logits(), own)
    assert "whole logits" in settle(model, some, "causal-lm", 50, "student")


def test_a_teacher_is_settled_before_it_is_trained(monkeypatch):
    """A law without the factor behind the matrix would train another function than the one that is measured."""
    recipe = schema.resolve({**copy.deepcopy(TINY_TEXT), "baseline": False})
    data = open_recipe_data(recipe.data, None, recipe)
    spec = recipe.teacher.models["teacher"]
    spec.train.steps = 1
    odd = Tripled()
    odd.inner = build("llama", tokens=Tokens(data.text.vocabulary, 48, "causal-lm", 0, 1, 2), width=16, heads=2)
    seen = []
    fit = Session.fit

    def watched(self, made, *words, **options):
        seen.append(made.pair.student_signals.law.dense)
        return fit(self, made, *words, **options)

    monkeypatch.setattr(Session, "fit", watched)
    session = Session()
    models.schooled(spec, odd, recipe, data, session, "teacher")
    assert seen[0] is not None and any("whole logits" in note for note in session.notes)


# ---- adapters and sentence encoders on disk ----


def moved(model):
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p)
    return model.eval()


def test_an_adapter_goes_on_learning_after_it_was_loaded(tmp_path):
    made = moved(zoo.adapt(llama(), rank=2))
    zoo.save_model(made, tmp_path)
    ids = torch.randint(3, 50, (2, 5))
    again = zoo.load_model(tmp_path)
    assert torch.allclose(again.eval()(ids).logits, made(ids).logits, atol=1e-6)
    learns = {name for name, p in again.named_parameters() if p.requires_grad}
    assert learns == {name for name, p in made.named_parameters() if p.requires_grad} and learns
    inside = copy.deepcopy(made).train()
    torch.nn.init.zeros_(next(p for n, p in inside.named_parameters() if "lora_B" in n))
    found = zoo.load_model(tmp_path, model=inside)
    assert found is inside and sum(p.requires_grad for p in found.parameters()) == len(learns)
    assert torch.allclose(found.eval()(ids).logits, made(ids).logits, atol=1e-6)
    with pytest.raises(UserError, match="does not fit"):
        zoo.load_model(tmp_path, model=zoo.adapt(llama(), rank=3))


def test_an_adapter_of_a_sentence_encoder_is_saved_with_its_network(tmp_path):
    made = moved(zoo.adapt(build("bert", tokens=PAIRS, width=16, heads=2), rank=2, kind="embedding"))
    zoo.save_model(made, tmp_path)
    ids = torch.randint(3, 50, (2, 5))
    assert torch.allclose(zoo.load_model(tmp_path).eval()(input_ids=ids), made(input_ids=ids), atol=1e-6)


def test_the_network_beside_an_adapter_is_checked_too(tmp_path):
    zoo.save_model(zoo.adapt(llama(), rank=2), tmp_path)
    path = tmp_path / "base" / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="altered"):
        zoo.load_model(tmp_path)


def test_an_adapter_without_safetensors_is_refused(tmp_path):
    """peft would open a pickle in its place, or look for the file on the hub."""
    zoo.save_model(zoo.adapt(llama(), rank=2), tmp_path)
    weights = tmp_path / "adapter_model.safetensors"
    torch.save(dict(zoo.adapt(llama(), rank=2).state_dict()), tmp_path / "adapter_model.bin")
    weights.unlink()
    note = json.loads((tmp_path / "limbeck.json").read_text())
    (tmp_path / "limbeck.json").write_text(json.dumps(signed({**note, "files": {}})))
    with pytest.raises(UserError, match=r"adapter_model\.safetensors"):
        zoo.load_model(tmp_path, model=llama())


@pytest.mark.parametrize("made", [lambda: None, lambda: head(16, 8), lambda: torch.nn.Linear(16, 8)])
def test_projections_come_back_as_they_were(tmp_path, made):
    encoder = build("bert", tokens=PAIRS, width=16, heads=2).encoder
    whole, ids = SentenceEncoder(encoder, "cls", made()).eval(), torch.randint(3, 50, (2, 5))
    zoo.save_model(whole, tmp_path)
    assert torch.allclose(zoo.load_model(tmp_path).eval()(ids), whole(ids), atol=1e-6)
    assert (tmp_path / "modules.json").is_file() == (whole.projection is None)


def test_projections_that_could_not_be_opened_again_are_not_saved(tmp_path):
    encoder = build("bert", tokens=PAIRS, width=16, heads=2).encoder
    odd = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.ReLU())
    with pytest.raises(UserError, match="cannot be saved"):
        zoo.save_model(SentenceEncoder(encoder, "cls", odd), tmp_path)
    zoo.save_model(SentenceEncoder(encoder), tmp_path / "whole")
    zoo.save_model(SentenceEncoder(encoder, "mean", head(16, 8)), tmp_path / "whole")
    assert not (tmp_path / "whole" / "modules.json").exists(), "sentence-transformers would open it without its projection"
    (tmp_path / "whole" / "sentence.json").write_text("{")
    with pytest.raises(UserError, match="torn"):
        zoo.load_model(tmp_path / "whole")


def test_no_classifier_is_made_up(tmp_path):
    """A folder for three classes is not one for four, and a pre-trained encoder has no classifier, unless a new head is asked for."""
    zoo.save_model(build("bert", tokens=CLASSES, width=16, heads=2), tmp_path / "three")
    assert open_language(str(tmp_path / "three"), CLASSES).config.num_labels == 3
    four = Tokens(50, 32, "classification", 0, 1, 2, 4)
    with pytest.raises(UserError, match="has 3 classes, but the data has 4"):
        open_language(str(tmp_path / "three"), four)
    assert open_language(str(tmp_path / "three"), four, new_head=True).classifier.out_features == 4
    build("bert", tokens=PAIRS, width=16, heads=2).encoder.save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"has no weights for .*classifier"):
        open_language(str(tmp_path / "bare"), CLASSES)
    assert open_language(str(tmp_path / "bare"), PAIRS)
    zoo.save_model(llama(), tmp_path / "lm")
    assert torch.equal(open_language(str(tmp_path / "lm"), TOKENS).lm_head.weight, zoo.load_model(tmp_path / "lm").lm_head.weight)


# ---- methods ----


def test_exits_that_cannot_be_cut_out_are_refused():
    """Behind the last layer of a Llama stands a norm: an exit in the middle is trained without it and would be cut out with it."""
    some = Batch({"query": {"input_ids": torch.randint(3, 50, (2, 5))}}, None, None)
    student = build("llama", tokens=PAIRS, layers=3, width=16, heads=2)
    for module in student.modules():
        if "RMSNorm" in type(module).__name__:
            torch.nn.init.uniform_(module.weight, 0.5, 2)
    with pytest.raises(UserError, match="cannot be cut out"):
        ModularStarEncoder(exits=[1, 3]).wrap(student, some)
    assert ModularStarEncoder(exits=[3]).wrap(student, some).exits == (3,)
    assert ModularStarEncoder(exits=[1, 3]).wrap(build("bert", tokens=PAIRS, layers=3, width=16, heads=2), some).exits == (1, 3)


def ddk(teacher=None, **settings):
    recipe = schema.resolve({**copy.deepcopy(TINY_TEXT), **copy.deepcopy(DOMAINS), "method": {"id": "ddk", "samples": 2, **settings}})
    data = open_recipe_data(recipe.data, None, recipe)
    task, session = task_of(recipe, data), Session()
    networks = models.teacher_networks(recipe, data, session, {})
    student, made = models.make_student(recipe, data, session, {}), make("ddk", recipe.method.settings)
    teacher = teacher or models.make_teacher(recipe.teacher, made, networks, student, data, session, task)
    return KnowledgeProgram(made, student, teacher, data, task, recipe.training, seed=0)


def test_the_first_shares_of_domains_are_those_of_the_student_before_it_learns():
    """r_0 = softmax(l_s / l_t) at step 0; the first update multiplies it by exp of the ratios at the end of the first interval."""
    made = ddk(interval=2, smooth=0.5)
    method = made.method

    def ratios():
        made.student.eval()
        found = []
        for rows in method._held:
            some = made.data.valid.batch(rows)
            both = [read(some).law for read in (made.models.student, made.teacher)]
            own, other = (vocabulary.cross_entropy(law, made.task.targets(some.labels)).detach().double().exp() for law in both)
            found.append((own / other).clamp_max(method.most))
        return torch.stack(found)

    first = ratios().softmax(0)
    assert torch.allclose(method.state["shares"].double(), first, atol=1e-4)
    made.train()
    with torch.no_grad():  # as if it had learned something
        for p in made.student.parameters():
            p.add_(0.02 * torch.randn_like(p))
    method._models = made.models
    method.after_step(Clock(1, made.steps_per_epoch, made.total))
    psi = first * ratios().exp()
    assert torch.allclose(method.state["shares"].double(), 0.5 * psi / psi.sum() + 0.5 / len(psi), atol=1e-4)


def test_ddk_wants_the_teacher_itself():
    """Stored outputs are found by position in the training split, and would answer for validation texts with those of others."""
    with pytest.raises(UserError, match="ddk measures the teacher on validation texts"):
        ddk(Teacher())


@pytest.mark.parametrize("made", ["distillspec", "ddk"])
def test_text_that_replaces_a_part_does_not_take_the_weight_of_what_it_replaced(made):
    """Parts of a batch weigh by their scored tokens; a term on other texts weighs the same in each part."""
    whole = program({"id": "distillspec", "ratio": 0.5, "tokens": 4}) if made == "distillspec" else ddk(sampling="uniform")
    whole.train()
    clock = Clock(0, whole.steps_per_epoch, whole.total)
    some = next(iter(whole.batches(0, 0)))
    def terms(part):
        torch.manual_seed(3)
        if made == "ddk":
            whole.method.state["taken"].zero_()
        return {name: float(value.detach()) for name, value in whole.losses("student", part, clock).items()}

    for part in whole.parts(some, 4):
        part.extra["share"] = torch.tensor(7.0)
        found, plain = terms(part), terms(Batch(part.inputs, part.labels, part.index))
        assert found["forward"] == pytest.approx(plain["forward"], rel=1e-5)
        assert found["ce"] == pytest.approx(plain["ce"] * (7 if made == "distillspec" else 1), rel=1e-5)


def test_matrices_of_stages_must_agree():
    first, second = ErnieTiny(), ErnieTiny()
    for method, width in ((first, 8), (second, 12)):
        method.parts = torch.nn.ModuleDict({"W": torch.nn.Linear(4, width, bias=False)})
    with pytest.raises(UserError, match="same width"):
        second.follow(first)


# ---- the program and the recipe ----


def test_state_comes_back_to_the_device_on_which_it_was_set_up():
    """Checkpoints are read on the CPU; the meta device stands for another one."""
    fresh = {"t": torch.zeros((), device="meta"), "taken": torch.zeros(2), "deep": {"x": torch.zeros(1, device="meta")}, "n": 1}
    saved = {"t": torch.ones(()), "taken": torch.ones(2), "deep": {"x": torch.ones(1)}, "n": 5, "history": [1.0], "late": torch.ones(3)}
    found = _placed(saved, fresh)
    assert found["t"].device.type == found["deep"]["x"].device.type == "meta"
    assert found["taken"].device.type == found["late"].device.type == "cpu" and found["n"] == 5 and found["history"] == [1.0]


@pytest.mark.parametrize("names", [("a", "a"), ("stage-2", None), ("baseline", None), ("../up", None)])
def test_stages_do_not_share_a_folder(names):
    """The second of two stages of one name would find the first one's checkpoint, take itself for done, and learn nothing."""
    with pytest.raises(UserError, match="stage"):
        schema.resolve({**copy.deepcopy(TINY_TEXT), "stages": [{"name": name} if name else {} for name in names]})
    assert len(schema.resolve({**copy.deepcopy(TINY_TEXT), "stages": [{"name": "a"}, {}]}).stages) == 2


def test_label_smoothing_makes_another_teacher():
    """What a kept network is found by holds everything that its loss depends on, the length of the texts too."""
    raw = {
        **copy.deepcopy(TINY_TEXT),
        "data": {"source": "stdlib-windows", "train": 24, "test": 12},
        "teacher": {"model": "bert", "args": {"layers": 1, "width": 16, "heads": 2}, "train": {"steps": 1}},
        "student": {"model": "bert", "args": {"layers": 1, "width": 16, "heads": 2}},
        "method": "kd",
    }

    def folder(**changes):
        recipe = schema.resolve({**copy.deepcopy(raw), **changes})
        data = open_recipe_data(recipe.data, None, recipe)
        torch.manual_seed(0)
        network = build("bert", tokens=models_tokens(data), layers=1, width=16, heads=2)
        return models.kept_at(recipe.teacher.models["teacher"], network, recipe, data, Session())[0]

    assert folder() == folder()
    assert folder(label_smoothing=0.1) != folder()
    assert folder(text={"tokenizer": "bpe:320", "length": 24}) != folder()


def models_tokens(data):
    """As for every length, so that only the data differ."""
    return Tokens(data.text.vocabulary, 64, "classification", data.text.pad, data.text.bos, data.text.eos, len(data.classes))


def test_writing_needs_prompts():
    raw = {**copy.deepcopy(TINY_TEXT), "data": {"source": "stdlib-text", "train": 20, "test": 10}}
    raw["text"]["write"] = 4
    recipe = schema.resolve(raw)
    with pytest.raises(UserError, match="no prompts"):
        task_of(recipe, open_recipe_data(recipe.data, None, recipe))


def test_chance_among_the_candidates_that_there_are():
    task = Embedding(None, pool=500)
    draw = torch.Generator().manual_seed(0)
    ranks = torch.stack([torch.randperm(40, generator=draw)[0] + 1 for _ in range(20000)])
    assert task.chance(None, 40) == pytest.approx(float((1 / ranks).mean()), rel=0.05)
    assert task.chance(None, 5000) == pytest.approx((math.log(500) + 0.5772) / 500, rel=0.01)
    collapsed = torch.ones(40, 4)
    assert task.figures(collapsed, collapsed)["mrr"] < task.chance(None, 40), "an encoder that says one vector is no better than chance"


@pytest.mark.parametrize("name", ["bits_per_byte", "nll@code", "worst_nll", "domain_nll", "kl", "perplexity"])
def test_smaller_is_better(name):
    assert not higher_is_better(name)


@pytest.mark.parametrize(
    "name",
    ["mrr", "mrr@exit2", "recall@1", "ndcg@10", "alpha", "acceptance", "agreement", "rouge_l", "exact_match", "speedup"],
)
def test_larger_is_better(name):
    assert higher_is_better(name)


def test_notes_hold_plain_data(tmp_path):
    """What is written beside an adapter can be read without limbeck."""
    zoo.save_model(zoo.adapt(llama(), rank=2), tmp_path)
    note = json.loads((tmp_path / "limbeck.json").read_text())
    assert note["base"] == "base" and set(note["base_files"]) == {"model.safetensors"}
    assert set(note["files"]) == {"adapter_model.safetensors"}
