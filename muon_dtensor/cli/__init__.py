"""The `muon-dtensor` command: demo, plan, calibrate, validate. Needs the `cli` extra."""
