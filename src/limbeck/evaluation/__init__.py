"""Measuring what a distillation kept and what it costs: cost, agreement, statistics over seeds, comparison, evidence."""
