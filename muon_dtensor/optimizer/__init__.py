"""`Muon` and its parts: options, parameter table, planned step, state, metrics."""
