"""The role of a parameter in a model, from its name."""

import re

EMBEDDING_NAME = re.compile(
    r"(^|[._])(embed|embeds|embedding|embeddings|wte|wpe|vocab)($|[._])", re.IGNORECASE
)

HEAD_NAME = re.compile(
    r"(^|[._])(output|output_layer|score|unembed|unembedding|logits|proj_out|qa_outputs)$|^fc$",
    re.IGNORECASE,
)
"""Modules that are a model's last projection, outside numbered layers: a layer's own `output` is a
hidden matrix."""

HEAD_PART = re.compile(
    r"^(?!.*multi_?head)(\w+_)?(heads?|classifiers?|generator|predictions)$", re.IGNORECASE
)
"""Parts of a module's path under which a model's last projections lie, outside numbered layers:
`classifier.out_proj`, `v_head.summary`, `lm_heads.0`, `cls.predictions.decoder`."""

WRAPPING = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
"""What FSDP1, activation checkpointing and torch.compile put into the names of what they wrap."""


def is_embedding_or_head(fqn: str) -> bool:
    """Whether a parameter's name says that it is an embedding or a model's last projection."""
    path = ".".join(part for part in fqn.split(".")[:-1] if part not in WRAPPING)
    if not path:
        return False
    is_head = HEAD_NAME.search(path) or HEAD_PART.search(path.rpartition(".")[2])
    return bool(EMBEDDING_NAME.search(path) or (not is_numbered(path) and is_head))


def is_numbered(path: str) -> bool:
    """Whether a path leads into numbered layers."""
    return any(part.isdecimal() for part in path.split("."))
