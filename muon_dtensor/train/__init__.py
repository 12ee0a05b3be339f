"""Training runs around the optimizer, see docs/train.md; `checkpoints` and `job` need no extra."""
