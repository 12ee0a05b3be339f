"""The table of recognized families, as the documentation prints it."""

from collections.abc import Iterator

from muon_dtensor.recognition import KNOWN


def rows() -> Iterator[str]:
    """Yield the rows of the table in docs/parameters.md, one for each entry of `KNOWN`."""
    yield "| library | family | class | weights |"
    yield "|---|---|---|---|"
    for known in KNOWN:
        classes = f"`{known.classes}`".replace("|", "`, `")
        if "(" in classes:
            classes = f"`*{known.classes.rpartition(')')[2]}`"
        weights = "; ".join(
            f"`{weight.names}` {weight.holds}".replace("|", "`, `") for weight in known.weights
        )
        yield f"| {known.package} | {known.family} | {classes} | {weights} |"
