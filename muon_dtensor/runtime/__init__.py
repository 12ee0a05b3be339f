"""The part that uses torch.distributed: describes tensors, compares ranks, executes plans."""
