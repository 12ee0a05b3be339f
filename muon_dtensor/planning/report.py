"""A plan with its analyses; `Muon.plan` returns one."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
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
    """A plan with its cached analyses. Prints as one screen of text."""

    plan: Plan
    adamw_numels: tuple[int, ...] = ()
    """Elements of each parameter that AdamW steps, in this rank's shard. Not part of the plan."""
    recognized: Mapping[str, str] = field(default_factory=dict, compare=False)
    """What parameters hold, by name, where it was recognized. Not part of the plan."""

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
        """The distinct meshes of the parameters, in the order of the parameters."""
        return self.plan.meshes

    @property
    def owners(self) -> dict[str, tuple[int, ...]]:
        """Per parameter, the global ranks that orthogonalize its matrices, in matrix order."""
        return self.plan.owners

    def spec(self, assignment: Assignment) -> ParamSpec:
        """Return the parameter of this matrix."""
        return self.plan.spec(assignment)

    def matrix(self, assignment: Assignment) -> Matrix:
        """Return the matrix."""
        return self.plan.matrix(assignment)

    def holders(self, assignment: Assignment) -> dict[int, Region]:
        """Return {home: its piece of this matrix}; see `Layout.holders`."""
        return self.plan.holders(assignment)

    @cached_property
    def traffic(self) -> tuple[BucketTraffic, ...]:
        """What each bucket sends, computes and buffers at each position."""
        return plan_traffic(self.plan)

    @cached_property
    def cost(self) -> PlanCost:
        """Bytes, flops and buffers of every rank, and the lower bound of bytes."""
        return plan_cost(self.plan, self.traffic)

    @cached_property
    def prediction(self) -> Prediction:
        """The predicted time of a step on the topology of the options."""
        return simulate(self.plan, self.traffic)

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the JSON text, in hex: equal digests are equal plans."""
        return serialize.digest(self.plan)

    def headline(self) -> str:
        """Return the plan as one line."""
        return render.headline(self.plan, self.cost, self.prediction, self.digest)

    def summary(self) -> str:
        """Return the plan as one screen of text, as `str(report)` does."""
        return render.summary(
            self.plan, self.cost, self.prediction, self.digest, self.adamw_numels, self.recognized
        )

    def explain(self, fqn: str) -> str:
        """Return what a step does with one parameter. Raises ValueError for an unknown name."""
        return render.explain(self.plan, fqn, self.recognized.get(fqn, ""))

    def to_json(self) -> str:
        """Return the plan as JSON; `from_json` returns an equal plan."""
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
    adamw_numels: Sequence[int] = (),
    recognized: Mapping[str, str] | None = None,
) -> PlanReport:
    """Plan one step and report on it; arguments and errors as for `planner.plan_update`."""
    plan = plan_update(params, options, owners)
    return PlanReport(plan, tuple(adamw_numels), dict(recognized or {}))
