"""Training runs around the optimizer: checkpoints."""
