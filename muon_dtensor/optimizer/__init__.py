"""`Muon` and what it is made of."""
