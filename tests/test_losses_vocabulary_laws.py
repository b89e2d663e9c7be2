"""Laws, stored top-k, losses row by row, measures, memory, and what bad input is told."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from limbeck.errors import UserError
from limbeck.losses.vocabulary import KINDS, Law, Sparse, agreement, chunk_rows, cross_entropy, divergence, facts, overlap, rowwise, top_k
from limbeck.losses.vocabulary import chunks as chunks_module

N, V = 6, 17
BUCKET = ("forward", "reverse", "js", "skew", "tv")


def law(seed=0, width=4, n=N, v=V, leaves=False, **more):
    draw = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(*size, generator=draw, dtype=torch.float64).requires_grad_(leaves) for size in ((n, width), (v, width), (v,))]
    return Law(*tensors, **more)


def of(given):
    return [given.hidden, given.weight, given.bias]


def agree(value, exact, leaves, rtol=1e-9, atol=1e-11):
    torch.testing.assert_close(value, exact, rtol=rtol, atol=atol)
    sides = [torch.autograd.grad(side.sum(), leaves, retain_graph=True) for side in (value, exact)]
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b, rtol=rtol, atol=atol)


# ---- laws ----


def test_a_law_counts_indexes_and_cuts():
    given = law(vocabulary=15, scale=2.0, softcap=3.0)
    assert (len(given), given.width, given.dtype) == (N, 15, torch.float64)
    whole = 3 * torch.tanh(2 * (given.hidden @ given.weight.t() + given.bias)[:, :15] / 3)
    torch.testing.assert_close(given.logits(), whole)
    mask = torch.arange(N) % 2 == 0
    for index in (mask, slice(1, 3), torch.tensor([5, 0]), [2, 2]):
        torch.testing.assert_close(given[index].logits(), whole[index])
        torch.testing.assert_close(given.logits(index), whole[index])
        torch.testing.assert_close(Law(dense=whole)[index].logits(), whole[index])
    torch.testing.assert_close(given[-1].logits(), whole[-1:])
    assert Law(dense=whole.half()).logits().dtype is torch.float32
    assert not law(leaves=True).detach().logits().requires_grad
    stored = top_k(given, 4)
    assert len(stored[mask]) == 3 and torch.equal(stored[2].ids, stored.ids[2:3]) and stored.detach().width == 15


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Law(torch.randn(2, 3)), "lacks `weight`"),
        (lambda: Law(weight=torch.randn(2, 3)), "lacks `hidden`"),
        (lambda: Law(torch.randn(2, 3), torch.randn(5, 4)), r"\(2, 3\).*\(5, 4\)"),
        (lambda: Law(torch.randn(1, 2, 3), torch.randn(5, 3)), "flatten"),
        (lambda: Law(torch.randn(2, 3), torch.randn(5, 3), torch.randn(4)), "bias"),
        (lambda: Law(torch.randn(2, 3), torch.randn(5, 3), softcap=0.0), "softcap"),
        (lambda: Law(torch.randn(2, 3), torch.randn(5, 3), vocabulary=6), "vocabulary is 6"),
        (lambda: Law(torch.randn(2, 3), torch.randn(5, 3), dense=torch.randn(2, 5)), "`dense`"),
        (lambda: Law(dense=torch.randn(2, 5), scale=2.0), "scale"),
        (lambda: Law(dense=torch.randn(5)), "dense"),
        (lambda: Law(dense=torch.ones(2, 5).long()), "dense"),
        (lambda: Law(torch.ones(2, 3).long(), torch.randn(5, 3)), "floats"),
        (lambda: law()[N], "row 6"),
        (lambda: Sparse(torch.zeros(2, 3).long(), torch.zeros(2, 4), 9), r"\(2, 3\).*\(2, 4\)"),
        (lambda: Sparse(torch.zeros(2, 3), torch.zeros(2, 3), 9), "integers"),
        (lambda: Sparse(torch.zeros(2, 3).long(), torch.zeros(2, 3), 2), "3 entries"),
        (lambda: top_k(law(), V + 1), "top_k"),
        (lambda: divergence(law(), law(1), "forwards"), "did you mean 'forward'"),
        (lambda: divergence(law(), law(1, v=V + 1)), "17 tokens.*18"),
        (lambda: divergence(law(), law(1, n=N + 1)), "6 rows.*7"),
        (lambda: divergence(law(), law(1), temperature=0.0), "temperature"),
        (lambda: divergence(law(), law(1), temperature=torch.ones(3)), "temperature"),
        (lambda: divergence(law(), law(1), "js", beta=1.5), "beta.*1.5"),
        (lambda: divergence(law(), law(1), "js", skew=0.5), "number of the divergence 'js' 'skew'"),
        (lambda: divergence(law(), law(1), "skew", skew=1.0), "skew"),
        (lambda: divergence(law(), law(1), "alpha", alpha=torch.ones(2)), "tensor"),
        (lambda: divergence(law(), law(1), "alpha-beta", alpha=-0.5), "-0.5"),
        (lambda: divergence(law(), law(1), "alpha-beta", alpha=0, beta=0), "both 0"),
        (lambda: divergence(law(), law(1), "interpolated"), "needs `progress`"),
        (lambda: divergence(law(), law(1), "interpolated", progress=1.1), "progress"),
        (lambda: divergence(law(), law(1), "decoupled"), "needs `targets`"),
        (lambda: divergence(law(), law(1), targets=torch.zeros(N).long()), "no `targets`"),
        (lambda: divergence(law(), law(1), rest="renormalise"), "Sparse"),
        (lambda: divergence(law(), top_k(law(1), 3), rest="zero"), "treatment of the rest"),
        (lambda: divergence(law(), top_k(law(1), 3), "reverse", rest="renormalise"), "renormalised"),
        (lambda: divergence(law(), top_k(law(1, v=V - 1), 3)), "17 tokens.*16"),
        (lambda: divergence(law(), Sparse(torch.full((N, 2), V), torch.zeros(N, 2), V)), "stored ids run from 17"),
        (lambda: divergence(law(), law(1), weight=torch.ones(N + 1)), "one weight a row"),
        (lambda: divergence(law(), law(1), reduction="avg"), "reduction"),
        (lambda: divergence(law(), law(1), reduction="sum", total=3), "total"),
        (lambda: divergence(law(), law(1), total=-1), "total"),
        (lambda: divergence(law(), law(1), total=torch.ones(2)), "total"),
        (lambda: divergence(law(), law(1), chunk=0), "chunk"),
        (lambda: cross_entropy(law(), torch.full((N,), -100)), "masked positions"),
        (lambda: cross_entropy(law(), torch.full((N,), V)), "vocabulary has 17"),
        (lambda: cross_entropy(law(), torch.zeros(N)), "token numbers"),
        (lambda: cross_entropy(law(), torch.zeros(N - 1).long()), "one token a row"),
        (lambda: cross_entropy(law(), torch.zeros(N).long(), label_smoothing=2.0), "smoothing"),
        (lambda: facts(law(), torch.zeros(N)), "targets"),
        (lambda: overlap(law(), law(1, v=V + 1)), "17 tokens"),
        (lambda: rowwise(lambda z: z.sum(), law()), "one value a row"),
        (lambda: rowwise(lambda z, y: z.sum(1), law(), torch.ones(2)), "another input 2"),
        (lambda: chunk_rows(0, 3), "at least one token"),
    ],
)
def test_bad_input_is_told_in_words(make, words):
    with pytest.raises(UserError, match=words) as error:
        make()
    assert error.value.hint and len(error.value.message) < 200


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in BUCKET])
def test_kinds_that_a_top_k_does_not_define(kind):
    more = {"targets": torch.zeros(N).long()} if kind == "decoupled" else {"progress": 0.5} if kind == "interpolated" else {}
    with pytest.raises(UserError, match="needs all the teacher's logits"):
        divergence(law(), top_k(law(1), 3), kind, **more)


# ---- a stored top-k ----


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_top_k(chunk):
    given = law(softcap=3.0, vocabulary=15)
    stored = top_k(given, 5, chunk)
    logs, ids = given.logits().log_softmax(1).topk(5, 1)
    assert torch.equal(stored.ids, ids) and stored.width == 15
    torch.testing.assert_close(stored.logs, logs)


@pytest.mark.parametrize("kind", BUCKET)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_a_top_k_of_everything_is_the_teacher(kind, temperature):
    student, teacher = law(leaves=True), law(1)
    exact = divergence(student, teacher, kind, temperature=temperature)
    agree(divergence(student, top_k(teacher, V), kind, temperature=temperature, chunk=2), exact, of(student))
    if kind == "forward":
        stored = top_k(teacher, V)
        agree(divergence(student, stored, temperature=temperature, rest="renormalise"), exact, of(student))


def bucket_laws(z, stored, temperature):
    """The laws over k tokens and a tail, in probabilities."""
    q = (z / temperature).softmax(1)
    own = q.gather(1, stored.ids)
    s = torch.cat([own, 1 - own.sum(1, keepdim=True)], 1)
    mass = stored.logs.exp()
    t = torch.cat([mass, 1 - mass.sum(1, keepdim=True)], 1) ** (1 / temperature)
    return s, t / t.sum(1, keepdim=True)


@pytest.mark.parametrize("kind", BUCKET)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("k", [1, 5])
def test_one_bucket_for_the_tail(kind, temperature, k):
    student, stored = law(leaves=True, softcap=2.0, scale=1.5), top_k(law(1), k)
    s, t = bucket_laws(student.logits(), stored, temperature)
    kl = lambda p, q: (p * (p / q).log()).sum(1)  # noqa: E731
    m = {"js": (s + t) / 2, "skew": 0.1 * t + 0.9 * s}.get(kind)
    exact = {
        "forward": lambda: kl(t, s),
        "reverse": lambda: kl(s, t),
        "js": lambda: (kl(t, m) + kl(s, m)) / 2,
        "skew": lambda: kl(t, m),
        "tv": lambda: (s - t).abs().sum(1) / 2,
    }[kind]()
    weight = torch.linspace(0.2, 1, N, dtype=torch.float64)
    value = divergence(student, stored, kind, temperature=temperature, weight=weight, total=4, chunk=4)
    agree(value, (exact * weight).sum() / 4, of(student))
    agree(divergence(student, stored, kind, temperature=temperature, reduction="none"), exact, of(student))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_head_alone(temperature):
    student, stored = law(leaves=True), top_k(law(1), 4)
    t = (stored.logs / temperature).softmax(1)
    exact = (t * (t.log() - (student.logits() / temperature).log_softmax(1).gather(1, stored.ids))).sum(1).mean()
    agree(divergence(student, stored, temperature=temperature, rest="renormalise", chunk=2), exact, of(student))
    rows = divergence(student, stored, temperature=torch.full((N,), temperature), rest="renormalise", reduction="none")
    torch.testing.assert_close(rows.mean(), exact)


@pytest.mark.parametrize("kind", BUCKET)
def test_what_the_bucket_does_not_see(kind):
    """Order of the stored tokens; how the student spreads its mass over the tail. Coarser laws are never further apart."""
    student, teacher = law(leaves=True), law(1)
    stored = top_k(teacher, 5)
    order = torch.tensor([3, 0, 4, 1, 2])
    value = divergence(student, stored, kind, reduction="none")
    agree(divergence(student, Sparse(stored.ids[:, order].int(), stored.logs[:, order], V), kind, reduction="none"), value, of(student))
    z = student.logits().detach()
    tail = torch.ones_like(z).scatter_(1, stored.ids, 0).bool()
    flat = torch.where(tail, (z.masked_fill(~tail, -math.inf).logsumexp(1, keepdim=True) - math.log(V - 5)), z)
    torch.testing.assert_close(divergence(Law(dense=flat), stored, kind, reduction="none"), value.detach())
    last = divergence(student, teacher, kind, reduction="none") + 1e-7
    for k in (12, 5, 1):
        coarse = divergence(student, top_k(teacher, k), kind, reduction="none")
        assert (coarse <= last).all()
        last = coarse + 1e-7


@pytest.mark.parametrize("kind", BUCKET)
def test_stored_in_half_precision_and_extreme(kind):
    student, teacher = law(leaves=True), law(1)
    stored = top_k(teacher, 6)
    exact = divergence(student, stored, kind)
    rough = divergence(student, Sparse(stored.ids.to(torch.int32), stored.logs.half(), V), kind)
    assert rough.item() == pytest.approx(exact.item(), rel=5e-3, abs=1e-3)
    z = (torch.randn(3, V) * 1e4).requires_grad_()
    sure = Sparse(torch.tensor([[0, 1], [2, 3], [4, 5]]), torch.tensor([[0.0, -50.0], [-1e4, 0.0], [-0.7, -math.inf]]), V)
    for rest in ("bucket", "renormalise") if kind == "forward" else ("bucket",):
        value = divergence(Law(dense=z), sure, kind, rest=rest)
        assert value.isfinite() and torch.autograd.grad(value, z)[0].isfinite().all()


def test_a_tail_far_below_the_head_keeps_its_logarithm():
    z = torch.zeros(1, V)
    z[0, 3] = 1e3
    stored = Sparse(torch.tensor([[3]]), torch.tensor([[math.log(0.5)]]), V)
    exact = 0.5 * math.log(0.5) + 0.5 * (math.log(0.5) - (math.log(V - 1) - 1e3))
    value = divergence(Law(dense=z.requires_grad_()), stored)
    assert value.item() == pytest.approx(exact, rel=1e-6)
    (gradient,) = torch.autograd.grad(value, z)
    torch.testing.assert_close(gradient, torch.full((1, V), -0.5 / (V - 1)).index_fill(1, torch.tensor([3]), 0.5))


# ---- any function, a chunk at a time ----


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_rowwise(chunk):
    student, teacher, y = law(leaves=True, softcap=2.0), law(1, leaves=True), torch.rand(N, dtype=torch.float64)

    def odd(z, u, y):
        return (z.softmax(1) - u.softmax(1)).square().sum(1) * y + z.amax(1)

    exact = odd(student.logits(), teacher.logits(), y)
    agree(rowwise(odd, student, teacher, y, chunk=chunk), exact, of(student) + of(teacher))
    assert not rowwise(odd, student.detach(), teacher.detach(), y).requires_grad
    empty = rowwise(odd, student[:0], teacher[:0], y[:0])
    assert empty.shape == (0,) and torch.autograd.grad(empty.sum(), student.weight)[0].abs().max() == 0


# ---- measures ----


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_facts(chunk):
    given, targets = law(leaves=True, softcap=2.0), torch.arange(N)
    z = given.logits().detach()
    found = facts(given, targets, chunk=chunk)
    logs = z.log_softmax(1)
    torch.testing.assert_close(found["entropy"], -(logs.exp() * logs).sum(1))
    torch.testing.assert_close(found["log_normaliser"], z.logsumexp(1))
    torch.testing.assert_close(found["log_probability"], logs.gather(1, targets[:, None]).squeeze(1))
    assert torch.equal(found["argmax"], z.argmax(1)) and "log_probability" not in facts(given)
    assert all(not value.requires_grad and value.shape == (N,) for value in found.values())


@pytest.mark.parametrize("chunk", [1, 4, None])
def test_overlap_and_agreement(chunk):
    p, q = law(leaves=True), law(1, width=7)
    a, b = p.logits().softmax(1), q.logits().softmax(1)
    torch.testing.assert_close(overlap(p, q, chunk=chunk), torch.minimum(a, b).sum(1).detach())
    torch.testing.assert_close(overlap(p, q), 1 - divergence(p, q, "tv", reduction="none").detach())
    assert torch.equal(agreement(p, q, chunk=chunk), a.argmax(1) == b.argmax(1)) and agreement(p, p).all()


# ---- chunks and memory ----


def test_chunk_rows():
    assert chunk_rows(32768, 1024) == 512 and chunk_rows(32768, 100) == 100 and chunk_rows(32768, 520) == 260
    assert 100 <= chunk_rows(151936, 512) <= 110 and chunk_rows(10**9, 5) == 1 and chunk_rows(5, 0) == 1
    assert chunk_rows(151936, 4096, 2**36) > 800 and chunk_rows(151936, 4096, 2**24) == 1
    for n in (1, 7, 511, 513, 4096):
        size = chunk_rows(100_000, n)
        assert size * 100_000 * 4 <= 64 * 2**20 and size <= n


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for made in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(made, torch.Tensor):
                self.most = max(self.most, made.numel())
        return result


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_tensor_of_all_logits(reduction, monkeypatch):
    monkeypatch.setattr(chunks_module, "BLOCK", 512)
    student, teacher, y = law(n=32, v=300, leaves=True), law(1, n=32, v=300), torch.zeros(32).long()
    with Largest() as seen:
        for kind in KINDS:
            more = {"targets": y} if kind == "decoupled" else {"progress": 0.5} if kind == "interpolated" else {}
            divergence(student, teacher, kind, chunk=4, reduction=reduction, **more).sum().backward()
        divergence(student, top_k(teacher, 5, chunk=4), chunk=4, reduction=reduction).sum().backward()
        cross_entropy(student, y, chunk=4, reduction=reduction).sum().backward()
        facts(student, chunk=4), overlap(student, teacher, chunk=4), agreement(student, teacher, chunk=4)
        rowwise(lambda z: z.amax(1), student, chunk=4).sum().backward()
    assert 0 < seen.most <= 4 * 300


# ---- what is refused, and the other kernels ----


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_second_derivative_is_refused(reduction):
    student = law(leaves=True)
    value = divergence(student, law(1), reduction=reduction).sum()
    (first,) = torch.autograd.grad(value, student.hidden, create_graph=True)
    with pytest.raises(UserError, match="no second derivative"):
        first.square().sum().backward()


def test_a_changed_input_is_noticed():
    student = law()
    student.hidden.requires_grad_()
    value = divergence(student, law(1), reduction="none")
    student.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        value.sum().backward()


def test_triton_is_not_imported_on_a_cpu():
    code = "import sys, torch\nfrom limbeck.losses.vocabulary import Law, divergence\nx = Law(dense=torch.zeros(1, 3))\n"
    code += "divergence(x, x)\nassert not any('triton' in m and 'limbeck' in m for m in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.skipif(
    not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1", reason="needs CUDA, or triton with TRITON_INTERPRET=1"
)
def test_triton_kernels_are_the_chunked_form():
    pytest.importorskip("triton")
    from limbeck.losses.vocabulary import dense, fused_triton

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for n, v, spread in ((3, 7, 1.0), (2, 9000, 3.0), (3, 64, 1e4)):
        z, u = (torch.randn(n, v, generator=torch.Generator().manual_seed(i)).mul(spread).to(device) for i in range(2))
        for kind, kernel in fused_triton.KERNELS.items():
            for shape in [{}] if kind != "js" else [{}, {"beta": 0.2}, {"beta": 0}, {"beta": 1}]:
                ours, theirs = z.clone(), z.clone()
                own = {"tv": dense.total_variation}.get(kind) or getattr(dense, kind)
                values = kernel(theirs, u.clone(), True, **shape)
                torch.testing.assert_close(values, own(ours, u.clone(), True, **shape), rtol=1e-4, atol=1e-6)
                torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-6)
                assert torch.equal(kernel(z.clone(), u.clone(), False, **shape), values)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("kind", ["forward", "reverse", "js", "tv"])
def test_cuda_agrees_with_cpu(kind):
    student, teacher = law(leaves=True, n=40, v=3000), law(1, n=40, v=3000)
    sides = []
    for device in ("cpu", "cuda"):
        leaves = [leaf.detach().float().to(device).requires_grad_() for leaf in of(student)]
        value = divergence(Law(*leaves), Law(*(leaf.float().to(device) for leaf in of(teacher))), kind)
        sides.append([value.cpu(), *(gradient.cpu() for gradient in torch.autograd.grad(value, leaves))])
    for a, b in zip(*sides):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_a_loss_beside_others():
    """Both losses on one law, under another graph, as methods use them."""
    body = torch.nn.Linear(3, 4).double()
    x, teacher, y = torch.randn(N, 3, dtype=torch.float64), law(1), torch.randint(V, (N,))
    weight = law().weight.requires_grad_()
    student = Law(body(x), weight)
    loss = 0.3 * cross_entropy(student, y) + 0.7 * divergence(student, teacher, "js", beta=0.4)
    z, t = body(x) @ weight.t(), teacher.logits().softmax(1)
    m = 0.4 * t + 0.6 * z.softmax(1)
    js = 0.4 * (t * (t / m).log()).sum(1) + 0.6 * (z.softmax(1) * (z.log_softmax(1) - m.log())).sum(1)
    agree(loss, 0.3 * F.cross_entropy(z, y) + 0.7 * js.mean(), [weight, *body.parameters()])
