"""The command line: muon-dtensor demo. Needs the `cli` extra."""
