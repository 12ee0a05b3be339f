"""A value other than the default for every option of a Muon param group."""

from typing import Any

OTHER_VALUES: dict[str, Any] = {
    "lr": 0.2,
    "weight_decay": 0.3,
    "momentum": 0.5,
    "nesterov": False,
    "ns_coefficients": (3.0, -3.2, 1.2),
    "eps": 1e-3,
    "ns_steps": 3,
    "adjust_lr_fn": "match_rms_adamw",
    "orthogonalizer": "polar_express",
    "capturable": True,
    "normuon_beta": 0.9,
    "cautious_weight_decay": True,
    "momentum_bits": 8,
    "weight_rounding": "compensated",
    "rounding_seed": 7,
}
