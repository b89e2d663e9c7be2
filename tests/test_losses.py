"""Every loss against a slow formula written out here, in numpy and float64."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from limbeck import losses

torch.set_num_threads(1)
B, C = 5, 7


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def kl_np(p, q):
    return (p * (np.log(p) - np.log(q))).sum(-1)


def equal(value, expected, tolerance=1e-10):
    assert np.allclose(np.asarray(value.detach()), expected, rtol=tolerance, atol=tolerance), (value, expected)


@pytest.fixture
def logits():
    g = torch.Generator().manual_seed(3)
    return torch.randn(B, C, generator=g, dtype=torch.float64) * 2, torch.randn(B, C, generator=g, dtype=torch.float64) * 2


@pytest.fixture
def labels():
    return torch.tensor([0, 3, 6, 3, 2])


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
@pytest.mark.parametrize("direction", ["forward", "reverse", "jeffreys", "js"])
def test_kl_of_every_direction(logits, temperature, direction):
    s, t = logits
    p, q = softmax(t.numpy() / temperature), softmax(s.numpy() / temperature)
    m = (p + q) / 2
    expected = {
        "forward": kl_np(p, q),
        "reverse": kl_np(q, p),
        "jeffreys": kl_np(p, q) + kl_np(q, p),
        "js": (kl_np(p, m) + kl_np(q, m)) / 2,
    }[direction]
    for scale in (True, False):
        rows = expected * (temperature**2 if scale else 1)
        call = {"temperature": temperature, "direction": direction, "scale_temperature": scale}
        equal(losses.kl(s, t, **call), rows.mean())
        equal(losses.kl(s, t, reduction="sum", **call), rows.sum())
        equal(losses.kl(s, t, reduction="none", **call), rows)


def test_kl_with_separate_temperatures_and_one_per_row(logits):
    s, t = logits
    p, q = softmax(t.numpy() / 3), softmax(s.numpy() / 2)
    equal(losses.forward_kl(s, t, temperature=2.0, teacher_temperature=3.0), 4 * kl_np(p, q).mean())
    rows = torch.tensor([1.0, 2.0, 3.0, 4.0, 0.5], dtype=torch.float64)
    each = [float(losses.forward_kl(s[i : i + 1], t[i : i + 1], temperature=float(rows[i]))) for i in range(B)]
    equal(losses.forward_kl(s, t, temperature=rows), np.mean(each))
    equal(losses.forward_kl(s, t, temperature=torch.tensor(2.0)), float(losses.forward_kl(s, t, temperature=2.0)))


def test_fast_path_of_forward_kl_is_the_general_one_in_value_and_gradient(logits):
    s, t = logits[0].requires_grad_(), logits[1].requires_grad_()
    fast = losses.forward_kl(s, t, temperature=3.0)
    slow = losses.forward_kl(s, t, temperature=3.0, mask=torch.ones(B, dtype=torch.bool))
    equal(fast, float(slow.detach()))
    for a, b in zip(torch.autograd.grad(fast, (s, t)), torch.autograd.grad(slow, (s, t))):
        equal(a, b.numpy())


@pytest.mark.parametrize("beta", [0.1, 0.5, 0.9])
def test_generalised_jensen_shannon(logits, beta):
    p, q = softmax(logits[1].numpy()), softmax(logits[0].numpy())
    m = beta * p + (1 - beta) * q
    equal(losses.jensen_shannon(*logits, beta=beta), (beta * kl_np(p, m) + (1 - beta) * kl_np(q, m)).mean())


def test_limits_of_the_families(logits):
    forward, reverse = float(losses.forward_kl(*logits)), float(losses.reverse_kl(*logits))
    assert forward != pytest.approx(reverse, rel=0.01)
    assert float(losses.jensen_shannon(*logits, beta=1e-7)) / 1e-7 == pytest.approx(forward, rel=1e-4)
    assert float(losses.jensen_shannon(*logits, beta=1 - 1e-7)) / 1e-7 == pytest.approx(reverse, rel=1e-4)
    for near in (1e-3, 0.0):
        assert float(losses.alpha_divergence(*logits, alpha=1 - near)) == pytest.approx(forward, rel=1e-2 if near else 1e-12)
        assert float(losses.alpha_divergence(*logits, alpha=near)) == pytest.approx(reverse, rel=1e-2 if near else 1e-12)
    equal(losses.skew_kl(*logits, skew=0.0), forward)
    equal(losses.skew_kl(*logits, skew=0.0, reverse=True), reverse)


@pytest.mark.parametrize("alpha", [0.2, 0.5, 2.0, -1.0])
def test_alpha_divergence(logits, alpha):
    p, q = softmax(logits[1].numpy()), softmax(logits[0].numpy())
    equal(losses.alpha_divergence(*logits, alpha=alpha), ((1 - (p**alpha * q ** (1 - alpha)).sum(-1)) / (alpha * (1 - alpha))).mean(), 1e-9)


def test_skew_total_variation_entropy_bernoulli(logits):
    p, q = softmax(logits[1].numpy()), softmax(logits[0].numpy())
    equal(losses.skew_kl(*logits, skew=0.3), kl_np(p, 0.3 * p + 0.7 * q).mean())
    equal(losses.skew_kl(*logits, skew=0.3, reverse=True), kl_np(q, 0.7 * p + 0.3 * q).mean())
    equal(losses.total_variation(*logits), 0.5 * np.abs(p - q).sum(-1).mean())
    equal(losses.entropy(logits[1], 2.0), -(softmax(logits[1].numpy() / 2) * np.log(softmax(logits[1].numpy() / 2))).sum(-1).mean())
    a, b = 1 / (1 + np.exp(-logits[1].numpy() / 2)), 1 / (1 + np.exp(-logits[0].numpy() / 2))
    equal(losses.bernoulli_kl(*logits, temperature=2.0), 4 * (a * np.log(a / b) + (1 - a) * np.log((1 - a) / (1 - b))).mean())


def test_decoupled_kd(logits, labels):
    p, q = softmax(logits[1].numpy() / 2), softmax(logits[0].numpy() / 2)
    rows, parts = [], []
    for i, y in enumerate(labels.tolist()):
        rest = [c for c in range(C) if c != y]
        binary = kl_np(np.array([p[i, y], 1 - p[i, y]]), np.array([q[i, y], 1 - q[i, y]]))
        others = kl_np(p[i, rest] / p[i, rest].sum(), q[i, rest] / q[i, rest].sum())
        rows.append(4 * (1.5 * binary + 8 * others))
        parts.append(binary + (1 - p[i, y]) * others)
    equal(losses.decoupled_kd(*logits, labels, alpha=1.5, beta=8.0, temperature=2.0), np.mean(rows))
    equal(losses.forward_kl(*logits, temperature=2.0, scale_temperature=False), np.mean(parts))  # the paper's identity
    hidden = labels.clone()
    hidden[1] = -1
    equal(losses.decoupled_kd(*logits, hidden, alpha=1.5, beta=8.0, temperature=2.0), np.mean(rows[:1] + rows[2:]))


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_cross_entropy(logits, labels, smoothing):
    labels[4] = -1
    log_q = np.log(softmax(logits[0].numpy()))
    y = np.eye(C)[labels[:4]] * (1 - smoothing) + smoothing / C
    rows = -(y * log_q[:4]).sum(-1)
    weight = torch.tensor([1.0, 2.0, 3.0, 0.5, 9.0], dtype=torch.float64)
    equal(losses.cross_entropy(logits[0], labels, label_smoothing=smoothing), rows.mean())
    equal(losses.cross_entropy(logits[0], labels, label_smoothing=smoothing, reduction="sum"), rows.sum())
    equal(losses.cross_entropy(logits[0], labels, label_smoothing=smoothing, reduction="none"), [*rows, 0])
    equal(losses.cross_entropy(logits[0], labels, label_smoothing=smoothing, weight=weight), (rows * weight[:4].numpy()).sum() / 4)
    deep = losses.cross_entropy(logits[0].reshape(1, B, C), labels.reshape(1, B), label_smoothing=smoothing, reduction="none")
    assert deep.shape == (1, B)


def test_soft_and_binary_cross_entropy(logits):
    s, t = logits
    targets = torch.rand(B, C, dtype=torch.float64)
    equal(losses.soft_cross_entropy(s, targets, temperature=2.0), -(targets.numpy() * np.log(softmax(s.numpy() / 2))).sum(-1).mean())
    labels = (t > 0).double()
    labels[2] = -1
    p, keep = 1 / (1 + np.exp(-s.numpy())), [0, 1, 3, 4]
    y = labels.numpy()[keep] * 0.9 + 0.05
    equal(
        losses.binary_cross_entropy(s, labels, label_smoothing=0.1), -(y * np.log(p[keep]) + (1 - y) * np.log(1 - p[keep])).mean(-1).mean()
    )


@pytest.mark.parametrize("variant", ["code", "paper"])
def test_target_enhanced_cross_entropy(logits, labels, variant):
    s, t = logits
    q, p = softmax(s.numpy() / 2), softmax(t.numpy() / 2)
    rows = []
    for i, y in enumerate(labels.tolist()):
        total = 0.0
        for c in range(C):
            if variant == "code":
                w = (1 + p[i, c]) ** 1.5 - 1 if c == y else p[i, c] ** 1.5
            else:
                w = (1 + p[i, c]) ** 1.5 if c == y else p[i, c]
            total -= w * math.log(q[i, c])
        rows.append(total)
    equal(losses.target_enhanced_cross_entropy(s, t, labels, eps=1.5, temperature=2.0, variant=variant), np.mean(rows))
    mixed = torch.full((B, C), 0.05, dtype=torch.float64)
    mixed[torch.arange(B), labels] = 0.7
    equal(losses.target_enhanced_cross_entropy(s, t, mixed, eps=1.5, temperature=2.0, variant=variant), np.mean(rows))


def test_target_enhanced_cross_entropy_special_cases(logits, labels):
    s, t = logits
    soft = losses.soft_cross_entropy(s, torch.softmax(t, -1))
    equal(losses.target_enhanced_cross_entropy(s, t, labels, eps=1.0), float(soft))
    equal(losses.target_enhanced_cross_entropy(s, t, labels, eps=1.0, variant="paper"), float(soft + losses.cross_entropy(s, labels)))
    hidden = torch.full_like(labels, -1)
    equal(losses.target_enhanced_cross_entropy(s, t, hidden, eps=1.5), float(losses.soft_cross_entropy(s, torch.softmax(t, -1) ** 1.5)))


def ranking_np(scores, weights):
    """Scores and weights best first."""
    return sum(w * (math.log(np.exp(scores[k:]).sum()) - scores[k]) for k, w in enumerate(weights))


def ranked(t, y):
    return [y, *sorted((c for c in range(C) if c != y), key=lambda c: (-t[c], c))]


def test_plackett_luce(logits, labels):
    s, t = logits
    t[0, 4] = t[0, 2]  # a tie
    rows = []
    for i, y in enumerate(labels.tolist()):
        order = ranked(t[i].tolist(), y)
        rows.append(ranking_np(s[i].numpy()[order], softmax(t[i].numpy() / 4)[order]))
    equal(losses.plackett_luce(s, t, labels, temperature=4.0, reduction="none"), rows)
    equal(losses.plackett_luce(s, t, labels, temperature=4.0), np.mean(rows))
    hidden = labels.clone()
    hidden[0] = -1
    equal(losses.plackett_luce(s, t, hidden, temperature=4.0), np.mean(rows[1:]))


@pytest.mark.parametrize("topk", [1, 3, 6, 7, 50])
def test_plackett_luce_of_the_teachers_best(logits, labels, topk):
    s, t = logits
    rows = []
    for i, y in enumerate(labels.tolist()):
        kept = set(np.argsort(-t[i].numpy())[:topk].tolist()) | {y}
        order = [c for c in ranked(t[i].tolist(), y) if c in kept]
        rows.append(ranking_np(s[i].numpy()[order], softmax(t[i].numpy())[order]))
    equal(losses.plackett_luce(s, t, labels, topk=topk, reduction="none"), rows)


def test_plackett_luce_gradient_is_the_papers_formula(logits, labels):
    s, t = logits[0].requires_grad_(), logits[1]
    (grad,) = torch.autograd.grad(losses.plackett_luce(s, t, labels, reduction="sum"), s)
    expected = np.zeros((B, C))
    for i, y in enumerate(labels.tolist()):
        order, x = ranked(t[i].tolist(), y), s[i].detach().numpy()
        alpha = softmax(t[i].numpy())[order]
        for rank, c in enumerate(order):
            expected[i, c] = sum(alpha[k] * np.exp(x[c]) / np.exp(x[order[k:]]).sum() for k in range(rank + 1)) - alpha[rank]
    equal(grad, expected)


def test_plackett_luce_special_cases(logits, labels):
    s, t = logits
    first = torch.zeros(C, dtype=torch.float64)
    first[0] = 1
    equal(losses.plackett_luce(s, t, labels, alpha=first), float(losses.cross_entropy(s, labels)))
    relevance = t.scatter(1, labels[:, None], 99.0)
    equal(losses.plackett_luce(s, t, labels, alpha=torch.ones(C)), float(losses.list_mle(s, relevance)))


def test_ties_of_the_teacher_keep_the_order_of_the_classes():
    s = torch.randn(3, 500, dtype=torch.float64)
    tied = (torch.arange(500) % 2).double().expand(3, 500)
    parted = tied - torch.arange(500) * 1e-9  # the same order without ties
    labels = torch.tensor([4, 9, 499])
    equal(losses.plackett_luce(s, tied, labels), float(losses.plackett_luce(s, parted, labels)), 1e-5)
    equal(losses.list_mle(s, tied), float(losses.list_mle(s, parted)))


def test_list_mle_is_a_distribution_over_rankings():
    s = torch.randn(4, dtype=torch.float64)
    relevances = torch.tensor(list(itertools.permutations(range(4))), dtype=torch.float64)
    equal((-losses.list_mle(s.expand(24, 4), relevances, reduction="none")).exp().sum(), 1.0)


def test_feature_distances():
    s, t = torch.randn(4, 3, 6, dtype=torch.float64), torch.randn(4, 3, 6, dtype=torch.float64)
    a, b = s.numpy(), t.numpy()
    cosine = (a * b).sum(-1) / np.linalg.norm(a, axis=-1) / np.linalg.norm(b, axis=-1)
    equal(losses.mse(s, t), ((a - b) ** 2).mean())
    equal(losses.l1(s, t), np.abs(a - b).mean())
    equal(losses.cosine_distance(s, t), (1 - cosine).mean())
    equal(losses.normalized_mse(s, t), (2 - 2 * cosine).mean())
    mask = torch.rand(4, 3) > 0.5
    mask[0, 0] = True
    equal(losses.mse(s, t, mask=mask), ((a - b) ** 2).mean(-1)[mask.numpy()].mean())


def test_attention_transfer():
    s, t = torch.randn(2, 3, 4, 5, dtype=torch.float64), torch.randn(2, 6, 4, 5, dtype=torch.float64)

    def look(x):
        flat = (x.numpy() ** 2).sum(1).reshape(2, -1)
        return flat / np.linalg.norm(flat, axis=1, keepdims=True)

    equal(losses.attention_transfer(s, t), ((look(s) - look(t)) ** 2).mean())
    tokens = [x.flatten(2).mT for x in (s, t)]
    equal(losses.attention_transfer(*tokens), ((look(s) - look(t)) ** 2).mean())


def test_norm_and_direction_and_its_two_regimes():
    e = torch.eye(3, dtype=torch.float64)
    s = torch.tensor([[0.3, 0.4, 0.0], [3.0, 4.0, 0.0], [0.0, 0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    norm = torch.tensor([2.0, 2.0, 2.5], dtype=torch.float64)
    rows = losses.norm_and_direction(s, e, norm, reduction="none")
    equal(rows, [1 - 0.3 / 2, 1 - 4 / 5, 1 - 2 / 2.5])
    (grad,) = torch.autograd.grad(rows.sum(), s)
    equal(grad[0], [-1 / 2, 0, 0])  # shorter than the teacher: straight along the class mean
    equal((grad[1] * s[1]).sum(), 0.0)  # longer: only the direction is trained


def test_rkd():
    s, t = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)

    def huber(d):
        return np.where(np.abs(d) < 1, d * d / 2, np.abs(d) - 0.5).mean()

    def distances(x):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        return d / d[d > 0].mean()

    def angles(x):
        out = np.zeros((5, 5, 5))
        for i, j, k in itertools.product(range(5), repeat=3):
            u, v = x[j] - x[i], x[k] - x[i]
            if i not in (j, k):
                out[i, j, k] = u @ v / np.linalg.norm(u) / np.linalg.norm(v)
        return out

    equal(losses.rkd_distance(s, t), huber(distances(s.numpy()) - distances(t.numpy())))
    equal(losses.rkd_angle(s, t), huber(angles(s.numpy()) - angles(t.numpy())))


def test_similarity_preserving_correlation_cka(logits):
    s, t = torch.randn(5, 2, 3, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    gram = [x.flatten(1).numpy() @ x.flatten(1).numpy().T for x in (s, t)]
    gram = [g / np.linalg.norm(g, axis=1, keepdims=True) for g in gram]
    equal(losses.similarity_preserving(s, t), ((gram[0] - gram[1]) ** 2).sum() / 25)
    p, q = softmax(logits[0].numpy() / 2), softmax(logits[1].numpy() / 2)
    inter = np.mean([1 - np.corrcoef(p[i], q[i])[0, 1] for i in range(B)])
    intra = np.mean([1 - np.corrcoef(p[:, c], q[:, c])[0, 1] for c in range(C)])
    equal(losses.correlation(*logits, temperature=2.0, inter=1.5, intra=0.5), 4 * (1.5 * inter + 0.5 * intra), 1e-6)
    centre = np.eye(5) - 1 / 5
    k, l = (centre @ x.flatten(1).numpy() @ x.flatten(1).numpy().T @ centre for x in (s, t))
    equal(losses.cka(s, t), (k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))
    tall_x, tall_y = torch.randn(30, 3, dtype=torch.float64), torch.randn(30, 4, dtype=torch.float64)
    centre = np.eye(30) - 1 / 30
    k, l = (centre @ x.numpy() @ x.numpy().T @ centre for x in (tall_x, tall_y))
    equal(losses.cka(tall_x, tall_y), (k * l).sum() / np.linalg.norm(k) / np.linalg.norm(l))


def test_info_nce():
    q, k, bank = (torch.randn(n, 3, dtype=torch.float64) for n in (4, 4, 6))
    unit = [x.numpy() / np.linalg.norm(x.numpy(), axis=1, keepdims=True) for x in (q, k, bank)]
    sim = unit[0] @ unit[1].T / 0.2
    forth, back = (-np.log(np.diag(softmax(x))) for x in (sim, sim.T))
    equal(losses.info_nce(q, k, temperature=0.2), forth.mean())
    equal(losses.info_nce(q, k, temperature=0.2, symmetric=True), (forth.mean() + back.mean()) / 2)
    other = np.concatenate([np.diag(sim)[:, None], unit[0] @ unit[2].T / 0.2], 1)
    equal(losses.info_nce(q, k, temperature=0.2, negatives=bank), -np.log(softmax(other)[:, 0]).mean())
    equal(losses.info_nce(q, k, temperature=0.2, negatives=bank.expand(4, 6, 3)), -np.log(softmax(other)[:, 0]).mean())


def test_supervised_contrastive():
    z, labels = torch.randn(6, 3, dtype=torch.float64), torch.tensor([0, 1, 0, 2, -1, 0])
    u = z.numpy() / np.linalg.norm(z.numpy(), axis=1, keepdims=True)
    rows = []
    for i in (0, 2, 5):  # 1 and 3 have no partner, 4 no label
        den = sum(math.exp(u[i] @ u[a] / 0.5) for a in range(6) if a not in (i, 4))
        rows.append(np.mean([-math.log(math.exp(u[i] @ u[p] / 0.5) / den) for p in (0, 2, 5) if p != i]))
    equal(losses.supervised_contrastive(z, labels, temperature=0.5), np.mean(rows))
    equal(losses.supervised_contrastive(z, torch.arange(6)), 0.0)


def test_sinkhorn_scales_rows_then_columns():
    cost = torch.rand(4, 6, dtype=torch.float64)
    a, b = softmax(np.arange(4.0)), softmax(-np.arange(6.0))
    plan = np.exp(-cost.numpy() / 0.3)
    for _ in range(7):
        plan = plan / plan.sum(1, keepdims=True) * a[:, None]
        plan = plan / plan.sum(0, keepdims=True) * b
    masses = {"row_mass": torch.tensor(a), "column_mass": torch.tensor(b)}
    equal(losses.sinkhorn(cost, epsilon=0.3, iterations=7, **masses), plan)
    equal(losses.sinkhorn_distance(cost, epsilon=0.3, iterations=7, **masses), (plan * cost.numpy()).sum())
    settled = losses.sinkhorn(cost.expand(2, 4, 6), iterations=500)
    equal(settled.sum(-1), np.full((2, 4), 1 / 4))
    equal(settled.sum(-2), np.full((2, 6), 1 / 6))


def test_batch_transport(logits):
    s, t = logits
    p, q = softmax(s.numpy() / 2), softmax(t.numpy() / 2)
    cost = np.abs(p[:, None] - q[None]).sum(-1)
    plan = np.exp(-cost / 0.1)
    for _ in range(20):
        plan = plan / plan.sum(1, keepdims=True)
        plan = plan / plan.sum(0, keepdims=True)
    equal(losses.batch_transport(s, t), (plan * cost).sum())
    equal(losses.batch_transport(s, s.flip(0), epsilon=1e-3, iterations=100), 0.0, 1e-6)  # a permutation costs nothing
