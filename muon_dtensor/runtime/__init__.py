"""The only home of torch.distributed: describes tensors, moves bytes, obeys plans."""
