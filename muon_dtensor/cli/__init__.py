"""The `muon-dtensor` command: demo, plan, calibrate, validate, train. Needs the `cli` extra."""
