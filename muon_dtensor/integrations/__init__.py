"""Integrations with other packages. Each is optional and imported by its own module only."""
