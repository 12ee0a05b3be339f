"""Shared by the tests: ranks as threads or processes, an oracle, and meters."""
