"""Plan a step from layouts. Standard library only: no torch, no process group, no GPU."""
