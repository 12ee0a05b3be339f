"""A hook of mkdocs: the README is the home page, and each public name has an API page."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import muon_dtensor

ROOT = Path(__file__).parents[1]

OTHERS = (
    "muon_dtensor.qk_clip.QKClip",
    "muon_dtensor.layout.declarations.Declaration",
    "muon_dtensor.islands.DiLoCo",
    "muon_dtensor.islands.sync_gradients",
    "muon_dtensor.islands.GradientSync",
    "muon_dtensor.islands.Mean",
    "muon_dtensor.islands.Median",
    "muon_dtensor.islands.TrimmedMean",
    "muon_dtensor.islands.Krum",
    "muon_dtensor.islands.MultiKrum",
    "muon_dtensor.islands.Bulyan",
    "muon_dtensor.islands.GeometricMedian",
    "muon_dtensor.islands.NearestNeighbourMixing",
    "muon_dtensor.train.checkpoints.Checkpoints",
    "muon_dtensor.train.checkpoints.training_state",
    "muon_dtensor.train.checkpoints.apply_training_state",
    "muon_dtensor.train.job.TrainConfig",
    "muon_dtensor.planning.outer.OuterPlan",
    "muon_dtensor.planning.plan.Plan",
    "muon_dtensor.planning.topology.Topology",
    "muon_dtensor.planning.presets.topology_of",
    "muon_dtensor.integrations.torch_optimizers.convert_state_dict",
    "muon_dtensor.integrations.torch_optimizers.load_checkpoint",
    "muon_dtensor.integrations.dion.convert_state_dict",
    "muon_dtensor.integrations.torchtitan.muon_optimizers",
    "muon_dtensor.integrations.transformers.MuonFactory",
)
"""Documented objects that `muon_dtensor` does not export."""


def home_page(readme: str) -> str:
    """The README: links are relative to docs/, those to other files are removed."""
    readme = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", readme)
    return re.sub(r"\[([^\]]+)\]\((?:tests|benchmarks)/[^)]+\)", r"\1", readme)


def page_of_docs(page: str) -> str:
    """A page of docs/: links to the README go to the home page, other links out are removed."""
    page = re.sub(r"\]\(\.\./README\.md(#[^)]*)?\)", r"](index.md\1)", page)
    return re.sub(r"\[([^\]]+)\]\(\.\./[^)]+\)", r"\1", page)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Called by mkdocs with all files of docs/: replace the pages and add the generated ones."""
    pages = {"index.md": home_page((ROOT / "README.md").read_text())}
    for path in (ROOT / "docs").glob("*.md"):
        pages[path.name] = page_of_docs(path.read_text())
    rows = ["# API reference", "", "| name | module |", "|---|---|"]
    for name in (*(f"muon_dtensor.{n}" for n in muon_dtensor.__all__ if n[0] != "_"), *OTHERS):
        module, _, short = name.rpartition(".")
        file = f"{name.removeprefix('muon_dtensor.')}.md"
        pages[f"api/{file}"] = f"# {short}\n\n::: {name}\n"
        rows.append(f"| [{short}]({file}) | `{module}` |")
    pages["api/index.md"] = "\n".join(rows) + "\n"
    for uri, text in pages.items():
        if existing := files.get_file_from_path(uri):
            files.remove(existing)
        files.append(File.generated(config, uri, content=text))
    return files
