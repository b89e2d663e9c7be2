"""Methods side by side: rows of measured runs in, means with intervals and paired differences out. It runs nothing itself."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from limbeck import storage
from limbeck.errors import UserError, unknown
from limbeck.evaluation import statistics

FIXED = ("method", "label", "seed", "status", "seconds")


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) else None


@dataclass
class Comparison:
    """Results of methods x seeds.

    Attributes:
        rows: one per method and seed: `{"method", "label", "seed", "metrics": {name: value}, "seconds", "status"}`; a row whose
            status is not "done" is kept and shown, and counts in no mean.
        reference: the method that the others are set against; the first row's method when empty.
        metric: the figure that tables and pages show first; the first one of the first finished row when empty.
        notes: whatever a page should say beside the table (budget, data, machine).
        failed: of runs that were not finished, how each ended; not written, rows have their status.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    reference: str = ""
    metric: str = ""
    notes: dict[str, Any] = field(default_factory=dict)
    failed: list[dict[str, Any]] = field(default_factory=list)

    def add(self, method: str, seed: int, metrics: Mapping[str, float], *, label: str = "", seconds: float | None = None,
            status: str = "done") -> None:  # fmt: skip
        """Append one run."""
        self.rows.append(
            {"method": method, "label": label or method, "seed": seed, "metrics": dict(metrics), "seconds": seconds, "status": status}
        )

    @property
    def methods(self) -> list[str]:
        """Method ids, in the order of their first row."""
        return list(dict.fromkeys(row["method"] for row in self.rows))

    @property
    def metrics(self) -> list[str]:
        """Names of all figures, in the order of their first appearance."""
        return list(dict.fromkeys(name for row in self.rows for name in row.get("metrics") or {}))

    @property
    def main_metric(self) -> str:
        """The figure shown first ("" when no row has any)."""
        return self.metric or next(iter(self.metrics), "")

    @property
    def main_reference(self) -> str:
        """The method the others are set against ("" without rows)."""
        return self.reference or next(iter(self.methods), "")

    def values(self, method: str, metric: str) -> dict[int, float]:
        """Seed -> value for the finished runs of a method; figures that are not finite are left out."""
        found: dict[int, float] = {}
        for row in self.rows:
            value = _number((row.get("metrics") or {}).get(metric))
            if row["method"] == method and row.get("status", "done") == "done" and value is not None:
                found[row["seed"]] = value
        return found

    def table(self, metric: str = "") -> list[dict[str, Any]]:
        """One line per method.

        Returns:
            `method`, `label`, `n` (finished seeds), `failed`, `mean`, `sd`, `interval` (95 %), `seconds` (mean per run), and
            `difference`, `difference_interval`, `p`, `wins`, `common` (seeds shared with the reference), `verdict`: the paired
            comparison with the reference method over common seeds; None for the reference itself and without common seeds. `wins`
            counts the seeds in which the method is the better one.
        """
        metric = metric or self.main_metric
        if metric and self.metrics and metric not in self.metrics:
            raise unknown("metric", metric, self.metrics)
        if self.rows and self.main_reference not in self.methods:
            raise unknown("reference method", self.main_reference, self.methods)
        up = statistics.higher_is_better(metric)
        reference = self.values(self.main_reference, metric)
        lines = []
        for method in self.methods:
            own = [row for row in self.rows if row["method"] == method]
            values = self.values(method, metric)
            seconds = [s for row in own if row.get("status", "done") == "done" and (s := _number(row.get("seconds"))) is not None]
            line: dict[str, Any] = {
                "method": method,
                "label": own[0].get("label") or method,
                **statistics.summary(list(values.values())),
                "failed": sum(row.get("status", "done") != "done" for row in own),
                "seconds": statistics.summary(seconds)["mean"],
            }
            common = sorted(set(values) & set(reference))
            line |= dict.fromkeys(("difference", "difference_interval", "p", "wins", "common", "verdict"))
            if method != self.main_reference and common:
                pair = statistics.paired([values[s] for s in common], [reference[s] for s in common])
                line |= {
                    "difference": pair["difference"],
                    "difference_interval": pair["interval"],
                    "p": pair["p"],
                    "wins": pair["wins"] if up else pair["losses"],
                    "common": len(common),
                    "verdict": statistics.verdict(pair["difference"], pair["interval"], up),
                }
            lines.append(line)
        return lines

    def records(self) -> list[dict[str, Any]]:
        """The rows made flat: the fixed columns, then one column per figure."""
        names = self.metrics
        return [{key: row.get(key) for key in FIXED} | {n: (row.get("metrics") or {}).get(n) for n in names} for row in self.rows]

    def to_csv(self, path: str | Path) -> None:
        """Write the flat rows as CSV, floats with all their digits."""
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=[*FIXED, *self.metrics], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.records())
        storage.write_text(path, buffer.getvalue())

    def to_parquet(self, path: str | Path) -> None:
        """Write the flat rows as Parquet (needs the `parquet` extra)."""
        import pandas

        buffer = io.BytesIO()
        try:
            pandas.DataFrame(self.records(), columns=[*FIXED, *self.metrics]).to_parquet(buffer, engine="pyarrow", index=False)
        except ImportError:
            raise UserError("writing Parquet needs pyarrow", "pip install 'limbeck[parquet]', or write CSV") from None
        storage.write_bytes(path, buffer.getvalue())

    def to_json(self, path: str | Path | None = None) -> dict[str, Any]:
        """Rows, and the table of every figure, as plain data; written to `path` when given. What is not finite becomes null."""
        rows = [
            {**row, "metrics": {n: _number(v) for n, v in (row.get("metrics") or {}).items()}, "seconds": _number(row.get("seconds"))}
            for row in self.rows
        ]
        value = {
            "metric": self.main_metric,
            "reference": self.main_reference,
            "rows": rows,
            "tables": {name: self.table(name) for name in self.metrics},
            "notes": self.notes,
        }
        if path is not None:
            storage.write_json(path, value)
        return value

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_json` described."""
        return cls(list(value["rows"]), value.get("reference", ""), value.get("metric", ""), dict(value.get("notes") or {}))

    def to_markdown(self, metric: str = "") -> str:
        """The table of one figure as a Markdown table."""
        metric = metric or self.main_metric
        lines = [
            f"| method | seeds | {metric} (mean ± sd) | 95 % interval | difference to {self.main_reference} | p | wins |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for line in self.table(metric):
            cells = [str(line["label"]), str(line["n"]), *cells_of(line)]
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        return "\n".join(lines) + "\n"


def _interval(value: list[float] | None, sign: str = "") -> str:
    return "" if value is None else f"[{value[0]:{sign}.4f}, {value[1]:{sign}.4f}]"


def cells_of(line: Mapping[str, Any]) -> list[str]:
    """Five texts for a line of `Comparison.table`: mean ± sd, interval, difference with interval, p, wins."""
    if line["mean"] is None:
        mean = "no finished run"
    else:
        mean = f"{line['mean']:.4f}" + (f" ± {line['sd']:.4f}" if line["sd"] is not None else "")
    if line["difference"] is None:
        return [mean, _interval(line["interval"]), "", "", ""]
    difference = f"{line['difference']:+.4f} {_interval(line['difference_interval'], '+')}".strip()
    p = "" if line["p"] is None else "<0.0001" if line["p"] < 1e-4 else f"{line['p']:.4f}"
    return [mean, _interval(line["interval"]), difference, p, f"{line['wins']}/{line['common']}"]
