"""The one training loop: clock, optimisers, checkpoints, callbacks. It knows a small protocol (`Program`) and no wing."""
