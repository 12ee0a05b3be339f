"""Random parameters and options of plans."""

from hypothesis import strategies as st

from muon_dtensor.layout import Layout, MeshSpec
from muon_dtensor.layout.declarations import Declaration
from muon_dtensor.layout.matrices import matrices_of
from muon_dtensor.planning.plan import EXACT_STRATEGIES, STRATEGIES, ParamSpec, PlanOptions
from muon_dtensor.planning.presets import PRESETS

INTERLEAVED = (
    Declaration("(i part) h -> part i h", (("part", 3),)),
    Declaration("(i part) h -> (i part) h", (("part", 3),), (2, 1), "part"),
)


@st.composite
def random_params(draw) -> tuple[list[ParamSpec], PlanOptions]:
    names = draw(st.permutations(["a", "b", "c"]))[: draw(st.integers(1, 3))]
    sizes = draw(st.lists(st.integers(1, 4), min_size=len(names), max_size=len(names)))
    mesh = MeshSpec.of(**dict(zip(names, sizes, strict=True)))
    specs = []
    for index in range(draw(st.integers(1, 6))):
        ndim = draw(st.integers(2, 3))
        shape = tuple(draw(st.lists(st.integers(0, 17), min_size=ndim, max_size=ndim)))
        cuts: list[list[str]] = [[] for _ in range(ndim)]
        for name in draw(st.permutations(names)):
            where = draw(st.integers(-1, ndim - 1))
            if where >= 0:
                cuts[where].append(name)
        layout = Layout(mesh, shape, tuple(map(tuple, cuts)))
        matrices = matrices_of(shape)
        if ndim == 2 and shape[0] % 3 == 0 and draw(st.booleans()):
            matrices = draw(st.sampled_from(INTERLEAVED)).matrices(shape)
        shards_momentum = draw(st.booleans())
        specs.append(
            ParamSpec(
                f"p{index}",
                layout,
                "float32",
                matrices,
                shards_momentum=shards_momentum,
            )
        )
    cap = draw(st.sampled_from([1, 50, 400, 10**9]))
    exact = draw(st.booleans())
    strategy = draw(st.sampled_from(EXACT_STRATEGIES if exact else STRATEGIES))
    prefetch_count = draw(st.integers(0, 3))
    topology = PRESETS[draw(st.sampled_from(sorted(PRESETS)))]
    options = PlanOptions(cap, prefetch_count, strategy=strategy, exact=exact, topology=topology)
    return specs, options
