"""`DistributedConfig` and its factories: layouts of plain tensors, and how exchanges run."""
