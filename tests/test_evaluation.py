"""Cost, agreement, statistics and comparison against formulas worked out by hand."""

import json
import math

import pytest
import torch
from scipy import stats
from torch import nn

from limbeck.errors import UserError
from limbeck.evaluation import statistics
from limbeck.evaluation.agreement import agreement, disagreements
from limbeck.evaluation.comparison import Comparison
from limbeck.evaluation.cost import cost

torch.set_num_threads(1)


def test_cost_of_a_linear_layer_is_exact():
    found = cost(nn.Linear(10, 5), torch.randn(7, 10), repeats=5)
    assert found.params == 55
    assert found.flops == 2 * 10 * 5
    assert found.bytes == 55 * 4
    assert found.peak_memory == 55 * 4 + 5 * 4
    assert found.latency_ms > 0 and found.latency_iqr_ms >= 0
    json.dumps(found.as_dict(), allow_nan=False)


def test_flops_of_a_convolution():
    model = nn.Conv2d(3, 8, 5, stride=2, padding=2)
    assert cost(model, torch.randn(1, 3, 16, 16), repeats=1).flops == 2 * (3 * 5 * 5) * 8 * 8 * 8


def test_cost_leaves_modes_as_they_were_and_statistics_untouched():
    model = nn.Sequential(nn.BatchNorm1d(4), nn.Dropout(), nn.Linear(4, 2)).train()
    model[1].eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    cost(model, torch.randn(3, 4), repeats=1)
    assert [m.training for m in model] == [True, False, True]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize("batch", [1, 4])
def test_cost_takes_dicts_and_tuples(batch):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, a, b):
            return self.layer(a + b)

    a = torch.randn(2, 4)
    for inputs in ((a, a), {"a": a, "b": a}):
        found = cost(Two(), inputs, repeats=1, batch=batch)
        assert found.flops == 16 and found.batch == batch


def test_tied_weights_are_counted_once():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    found = cost(model, torch.randn(1, 4), repeats=1)
    assert found.params == 16 and found.bytes == 64


def test_agreement():
    p, q = torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([[0.25, 0.75], [0.9, 0.1]])
    found = agreement(q.log(), p.log())
    assert found["kl"] == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)) / 2, abs=1e-6)
    assert 0 < found["js"] < math.log(2)
    same = agreement(p.log(), p.log() + 3)
    assert same["top1"] == 1 and same["kl"] == pytest.approx(0, abs=1e-6)
    far = agreement(torch.tensor([[1e4, 0.0]]), torch.tensor([[0.0, 1e4]]))
    assert far["js"] == pytest.approx(math.log(2)) and math.isfinite(far["kl"])


def test_disagreements_come_most_confident_first():
    teacher = torch.tensor([[5.0, 0], [1, 0], [5, 0], [9, 0]])
    student = torch.tensor([[0.0, 5], [0, 1], [5, 0], [0, 9]])
    assert disagreements(student, teacher, torch.zeros(4).long()).tolist() == [3, 0, 1]
    assert disagreements(student, teacher, None, 1).tolist() == [3]


def test_summary_against_the_formula():
    values = [0.91, 0.93, 0.90, 0.95, 0.92]
    found = statistics.summary(values)
    sd = math.sqrt(sum((v - sum(values) / 5) ** 2 for v in values) / 4)
    assert found["sd"] == pytest.approx(sd)
    low, high = stats.t.interval(0.95, 4, loc=sum(values) / 5, scale=sd / math.sqrt(5))
    assert found["interval"] == pytest.approx([low, high])
    assert statistics.summary([0.1])["interval"] is None
    assert statistics.summary([])["n"] == 0


def test_paired_against_scipy():
    a, b = [0.91, 0.93, 0.90, 0.95, 0.89], [0.90, 0.90, 0.91, 0.91, 0.88]
    found, expected = statistics.paired(a, b), stats.ttest_rel(a, b)
    assert found["p"] == pytest.approx(expected.pvalue)
    assert found["interval"] == pytest.approx(list(expected.confidence_interval(0.95)))
    assert (found["wins"], found["losses"], found["n"]) == (4, 1, 5)


def test_equal_values_give_no_nan():
    same = statistics.paired([0.5] * 3, [0.5] * 3)
    assert same["p"] == 1 and same["interval"] == [0, 0] and statistics.verdict(0, same["interval"]) == statistics.NOT_REPRODUCED
    shifted = statistics.paired([0.5] * 3, [0.25] * 3)
    assert shifted["p"] == 0 and shifted["interval"] == [0.25, 0.25]
    one = statistics.paired([0.9], [0.5])
    assert one["interval"] is None and one["p"] is None and statistics.verdict(one["difference"], None) == statistics.NOT_REPRODUCED
    json.dumps([same, shifted, one], allow_nan=False)


def test_verdict_respects_the_direction():
    assert statistics.verdict(0.1, [0.05, 0.15]) == "reproduced"
    assert statistics.verdict(0.1, [0.05, 0.15], higher_is_better=False) == "not reproduced at this scale"
    assert statistics.verdict(-0.1, [-0.15, -0.05], higher_is_better=False) == "reproduced"
    assert statistics.verdict(0.1, [-0.05, 0.25]) == "not reproduced at this scale"
    assert statistics.higher_is_better("accuracy") and not statistics.higher_is_better("val_nll")


def comparison():
    made = Comparison()
    for seed in range(3):
        made.add("base", seed, {"accuracy": 0.80 + 0.01 * seed, "ece": 0.1}, seconds=2.0)
        made.add("kd", seed, {"accuracy": 0.90 + 0.02 * seed, "ece": 0.05}, label="Hinton | KD", seconds=3.0)
    made.add("kd", 7, {"accuracy": 0.1}, status="failed")
    made.add("kd", 8, {"accuracy": 0.95, "ece": float("nan")})
    return made


def test_comparison_pairs_common_seeds_and_leaves_failures_out():
    base, kd = comparison().table("accuracy")
    assert (base["n"], base["difference"], kd["n"], kd["failed"], kd["common"]) == (3, None, 4, 1, 3)
    assert kd["difference"] == pytest.approx(0.11)
    assert kd["interval"] is not None and kd["verdict"] == "reproduced" and kd["wins"] == 3
    assert comparison().table("ece")[1]["wins"] == 3
    with pytest.raises(UserError, match="accuracy"):
        comparison().table("acuracy")


def test_comparison_files(tmp_path):
    import pandas

    made = comparison()
    made.to_csv(tmp_path / "a.csv")
    made.to_json(tmp_path / "a.json")
    frame = pandas.read_csv(tmp_path / "a.csv")
    assert len(frame) == 8 and frame["accuracy"].iloc[1] == 0.9
    assert Comparison.from_json(json.loads((tmp_path / "a.json").read_text())).table("accuracy") == made.table("accuracy")
    assert "Hinton \\| KD" in made.to_markdown()
    pytest.importorskip("pyarrow")
    made.to_parquet(tmp_path / "a.parquet")
    assert len(pandas.read_parquet(tmp_path / "a.parquet")) == 8


def test_an_empty_comparison_is_no_crash():
    assert Comparison().table() == [] and Comparison().to_json()["tables"] == {}
