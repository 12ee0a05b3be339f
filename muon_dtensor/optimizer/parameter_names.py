"""The role of a parameter in a model, from its name."""

import re

EMBEDDING_NAME = re.compile(
    r"(^|[._])(embed|embeds|embedding|embeddings|wte|wpe|vocab)($|[._])", re.IGNORECASE
)

HEAD_NAME = re.compile(
    r"(^|[._])(output|output_layer|score|unembed|unembedding|logits|proj_out|qa_outputs)$|^fc$",
    re.IGNORECASE,
)
"""Names of modules that are a model's last projection. Inside numbered layers these are hidden
matrices, such as a layer's `output`."""

HEAD_PART = re.compile(
    r"^(?!.*multi_?head)(\w+_)?(heads?|classifiers?|generator|predictions)$", re.IGNORECASE
)
"""Parts of the paths of a model's last projections, outside of numbered layers:
`classifier.out_proj`, `v_head.summary`, `lm_heads.0`, `cls.predictions.decoder`."""

WRAPPING = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""Prefixes that FSDP1, activation checkpointing and torch.compile add to names of parameters."""


def is_embedding_or_head(fqn: str) -> bool:
    """Whether a parameter is an embedding or a model's last projection, by its name."""
    path = ".".join(part for part in fqn.split(".")[:-1] if part not in WRAPPING)
    if not path:
        return False
    is_head = HEAD_NAME.search(path) or HEAD_PART.search(path.rpartition(".")[2])
    return bool(EMBEDDING_NAME.search(path) or (not is_numbered(path) and is_head))


def is_numbered(path: str) -> bool:
    """Whether a part of a path is a number, as in numbered layers."""
    return any(part.isdecimal() for part in path.split("."))
