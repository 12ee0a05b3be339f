"""Many ranks in one machine, an oracle, and meters: what the tests share."""
