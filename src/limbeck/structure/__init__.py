"""From a trained network to a smaller one: pruned, quantised, searched or converted, and recovered by distillation."""
