"""Layouts in, collectives out. Standard library only: no torch, no process group, no GPU."""
