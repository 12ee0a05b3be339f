"""Other people's stacks, each optional: a module here imports its stack, and no other."""
