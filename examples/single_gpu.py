"""Muon on one device: no process group, no config.

    torchrun --nproc-per-node 1 examples/single_gpu.py

or plain `python examples/single_gpu.py`.
"""

from common import data, make_model, pick_device, print_losses, print_rank_0, train

from muon_dtensor import Muon, group_parameters


def main() -> None:
    device = pick_device()
    model = make_model(device)
    # Muon steps matrices. `group_parameters` assigns embedding, output head and norms to AdamW;
    # `show` prints the algorithm of each parameter. A model with only matrices needs no groups:
    # Muon(model.named_parameters(), lr=0.02).
    groups = group_parameters(model, lr=0.02, adamw={"lr": 3e-3}, show=True)
    optimizer = Muon(groups, momentum=0.95)
    print_rank_0(optimizer.plan)
    print_losses(train(model, optimizer, data(device)))


if __name__ == "__main__":
    main()
