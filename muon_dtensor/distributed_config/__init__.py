"""How plain tensors lie on a mesh, and how exchanges run: `DistributedConfig` and its factories."""
