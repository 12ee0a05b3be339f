"""A plan with its analyses: what `Muon.plan` returns."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from muon_dtensor.layout import Matrix, MeshSpec, Region
from muon_dtensor.planning import render, serialize
from muon_dtensor.planning.cost import PlanCost, plan_cost
from muon_dtensor.planning.plan import Action, Assignment, Bucket, ParamSpec, Plan, PlanOptions
from muon_dtensor.planning.planner import plan_update
from muon_dtensor.planning.simulate import Prediction, simulate
from muon_dtensor.planning.traffic import BucketTraffic, plan_traffic


@dataclass(frozen=True)
class PlanReport:
    """A plan and what can be computed from it, each analysis once. Prints as one screen of text."""

    plan: Plan

    @property
    def params(self) -> tuple[ParamSpec, ...]:
        return self.plan.params

    @property
    def buckets(self) -> tuple[Bucket, ...]:
        return self.plan.buckets

    @property
    def schedule(self) -> tuple[Action, ...]:
        return self.plan.schedule

    @property
    def options(self) -> PlanOptions:
        return self.plan.options

    @property
    def meshes(self) -> tuple[MeshSpec, ...]:
        """The meshes of the parameters, each once, in the order of the parameters."""
        return self.plan.meshes

    @property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """Per parameter the global ranks that orthogonalize its matrices, in matrix order."""
        return self.plan.owners

    def spec(self, assignment: Assignment) -> ParamSpec:
        """The parameter that holds this matrix."""
        return self.plan.spec(assignment)

    def matrix(self, assignment: Assignment) -> Matrix:
        """The matrix itself."""
        return self.plan.matrix(assignment)

    def holders(self, assignment: Assignment) -> dict[int, Region]:
        """Which positions of one replica hold which piece of this matrix."""
        return self.plan.holders(assignment)

    @cached_property
    def traffic(self) -> tuple[BucketTraffic, ...]:
        """What each bucket moves, computes and holds."""
        return plan_traffic(self.plan)

    @cached_property
    def cost(self) -> PlanCost:
        """Bytes, flops and buffers of every rank, and the lower bounds."""
        return plan_cost(self.plan, self.traffic)

    @cached_property
    def prediction(self) -> Prediction:
        """How long a step takes on the topology of the options."""
        return simulate(self.plan, self.traffic)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the JSON text, in hex: equal digests are equal plans."""
        return serialize.digest(self.plan)

    def headline(self) -> str:
        """The plan on one line."""
        return render.headline(self.plan, self.cost, self.prediction, self.digest)

    def summary(self) -> str:
        """The plan as one screen of text; the same as `str(report)`."""
        return render.summary(self.plan, self.cost, self.prediction, self.digest)

    def explain(self, fqn: str) -> str:
        """All that happens to one parameter. Raises ValueError for an unknown name."""
        return render.explain(self.plan, fqn)

    def to_json(self) -> str:
        """The plan as JSON; `from_json` reads it back to an equal plan."""
        return serialize.to_json(self.plan)

    @classmethod
    def from_json(cls, text: str) -> "PlanReport":
        """Inverse of `to_json`. Raises ValueError for invalid text or an invalid plan."""
        return cls(serialize.from_json(text))

    def __str__(self) -> str:
        return self.summary()


def plan_report(
    params: Sequence[ParamSpec],
    options: PlanOptions | None = None,
    owners: Mapping[str, int] | None = None,
) -> PlanReport:
    """Plan one step and report on it; arguments and errors as for `planner.plan_update`."""
    return PlanReport(plan_update(params, options, owners))
