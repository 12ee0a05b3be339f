"""The order of a step's phases, and their lowering to events.

Note [Numbered buffers]
    The exchange buffers of a bucket are numbered in the order in which they are filled. Number 0
    holds the packed pieces. A collective receives into the next number. If it cannot send the
    buffer that was filled before, its send buffer has a number too. Results for several replicas
    are sent from one place. Number `wholes` holds the matrices that are orthogonalized in place,
    the last number holds the results to apply. A buffer is live from the first to the last event
    that names it. The executor, buffer placement, memory accounting and the simulation all use the
    same events.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from muon_dtensor.layout import MeshSpec
from muon_dtensor.planning.plan import Action, Bucket, Phase
from muon_dtensor.planning.strategies import Collective, Route, Strategy


@dataclass(frozen=True, slots=True)
class Hop:
    """One collective between numbered buffers; `index` counts the collectives of the bucket.

    `source`: the buffer that was filled before. It is the send buffer itself, or the send buffer is
    filled from it. `copies`: number of ranks to which each element is sent.
    """

    index: int
    collective: Collective
    source: int
    send: int
    recv: int
    copies: int = 1

    @property
    def repacks(self) -> bool:
        """Whether the send buffer is filled from `source`."""
        return self.send != self.source


@dataclass(frozen=True, slots=True)
class Content:
    """What a buffer holds.

    `done`: mesh dims along which the pieces of the matrices owned in this rank's replica have been
    sent towards their owners. It is empty before the first exchange and has all unshard dims at the
    owner. None: the pieces of all matrices that this rank stores.
    """

    done: tuple[str, ...] | None


@dataclass(frozen=True, slots=True)
class BufferSequence:
    """The buffers of a bucket and the collectives between them; see Note [Numbered buffers]."""

    contents: tuple[Content, ...]
    unshard: tuple[Hop, ...]
    reshard: tuple[Hop, ...]
    wholes: int

    @property
    def hops(self) -> tuple[Hop, ...]:
        return (*self.unshard, *self.reshard)

    @property
    def results(self) -> int:
        return len(self.contents) - 1


def buffer_sequence(strategy: Strategy, mesh: MeshSpec) -> BufferSequence:
    """Return the buffers and collectives of a bucket on this mesh, buffers in order of filling."""
    contents = [Content(())]
    hops: list[Hop] = []

    def add_hop(
        collective: Collective, received: Content, sent: Content | None = None, copies: int = 1
    ) -> None:
        """`sent`: content of a separate send buffer, if there is one."""
        source = len(contents) - 1
        contents.extend([sent, received] if sent else [received])
        send, recv = (source + 1, source + 2) if sent else (source, source + 1)
        hops.append(Hop(len(hops), collective, source, send, recv, copies))

    done: tuple[str, ...] = ()
    before: dict[tuple[str, ...], Content] = {}
    for collective in strategy.unshard:
        before[collective.mesh_dims] = Content(done)
        sent = Content(done) if done else None
        done = (*done, *collective.mesh_dims)
        add_hop(collective, Content(done), sent)
    num_unshard, wholes = len(hops), len(contents) - 1
    copies = mesh.num_ranks_along(strategy.replica_dims)
    for index, collective in enumerate(strategy.reshard(mesh.dim_names)):
        if collective.route is Route.TO_HOLDERS and collective.mesh_dims in before:
            sent = contents[-1] if index else None
            add_hop(collective, before[collective.mesh_dims], sent)
        else:
            add_hop(collective, Content(None), copies=copies)
    return BufferSequence(
        tuple(contents), tuple(hops[:num_unshard]), tuple(hops[num_unshard:]), wholes
    )


@dataclass(frozen=True, slots=True)
class Fill:
    """Update momenta, and write the directions of the packed pieces into a buffer."""

    buffer: int

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.buffer,)


@dataclass(frozen=True, slots=True)
class UpdateMomenta:
    """Update the momenta of parameters that have no packed pieces."""

    buffers = ()


@dataclass(frozen=True, slots=True)
class Repack:
    """Fill the send buffer of a collective from the buffer before it."""

    hop: Hop

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.hop.source, self.hop.send)


@dataclass(frozen=True, slots=True)
class Send:
    """Issue a collective."""

    hop: Hop

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.hop.send, self.hop.recv)


@dataclass(frozen=True, slots=True)
class Wait:
    """Wait for a collective."""

    hop: Hop

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.hop.send, self.hop.recv)


@dataclass(frozen=True, slots=True)
class Compute:
    """Orthogonalize the matrices of a buffer in place."""

    buffer: int

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.buffer,)


@dataclass(frozen=True, slots=True)
class Apply:
    """Decay the local shards, and update them by the results in a buffer."""

    buffer: int

    @property
    def buffers(self) -> tuple[int, ...]:
        return (self.buffer,)


Event = Fill | UpdateMomenta | Repack | Send | Wait | Compute | Apply

Program = tuple[tuple[Action, tuple[Event, ...]], ...]
"""The events of each action of a schedule, in order."""


def lower_phase(phase: Phase, sequence: BufferSequence) -> tuple[Event, ...]:
    """Return the events of one phase of a bucket."""

    def send(hop: Hop) -> tuple[Event, ...]:
        return (Repack(hop), Send(hop)) if hop.repacks else (Send(hop),)

    def finish(hops: Sequence[Hop]) -> Iterator[Event]:
        """Wait for the first hop, which an earlier phase has sent, then run the others."""
        for index, hop in enumerate(hops):
            if index:
                yield from send(hop)
            yield Wait(hop)

    match phase:
        case Phase.UNSHARD:
            first = send(sequence.unshard[0]) if sequence.unshard else ()
            return (Fill(0), *first, UpdateMomenta())
        case Phase.WAIT:
            return tuple(finish(sequence.unshard))
        case Phase.ORTHOGONALIZE:
            return (Compute(sequence.wholes),)
        case Phase.RESHARD:
            return send(sequence.reshard[0])
        case Phase.PASS_ON:
            received, passed_on, *_ = sequence.reshard
            return (Wait(received), *send(passed_on))
        case Phase.APPLY:
            unfinished = sequence.reshard[len(sequence.reshard) > 1 :]
            return (*finish(unfinished), Apply(sequence.results))


def lower(schedule: Sequence[Action], sequences: Mapping[int, BufferSequence]) -> Program:
    """Return the events of the actions on the buckets in `sequences`; skips other actions.

    `sequences`: by index of the bucket.
    """
    return tuple(
        (action, lower_phase(action.phase, sequences[action.bucket]))
        for action in schedule
        if action.bucket in sequences
    )


def phases_of(sequence: BufferSequence) -> tuple[Phase, ...]:
    """Return the phases of a bucket, in order."""
    return (
        Phase.UNSHARD,
        *[Phase.WAIT] * (len(sequence.unshard) > 0),
        Phase.ORTHOGONALIZE,
        *[Phase.RESHARD] * (len(sequence.reshard) > 0),
        *[Phase.PASS_ON] * (len(sequence.reshard) > 1),
        Phase.APPLY,
    )


def live_sets(sequence: BufferSequence) -> tuple[tuple[int, ...], ...]:
    """Return the distinct sets of buffers of one bucket that are live at the same time."""
    actions = [Action(phase, 0) for phase in phases_of(sequence)]
    lives = lifetimes(lower(actions, {0: sequence}))
    sets = (
        tuple(n for (_, n), life in lives.items() if life.first <= event <= life.last)
        for event in range(max(life.last for life in lives.values()) + 1)
    )
    return tuple(dict.fromkeys(sets))


@dataclass(slots=True)
class Lifetime:
    """Indices of the first and the last event of a program that name a buffer."""

    first: int
    last: int


BufferKey = tuple[int, int]
"""(index of the bucket, number of the buffer)."""


def lifetimes(program: Program) -> dict[BufferKey, Lifetime]:
    """Return the lifetime of every buffer; event indices count over the whole program."""
    lives: dict[BufferKey, Lifetime] = {}
    for index, (action, event) in enumerate(flat(program)):
        for number in event.buffers:
            life = lives.setdefault((action.bucket, number), Lifetime(index, index))
            life.last = index
    return lives


def flat(program: Program) -> Iterator[tuple[Action, Event]]:
    """Yield every event with its action."""
    for action, events in program:
        for event in events:
            yield action, event


def schedule(
    buckets: Sequence[Bucket], waves: Sequence[Sequence[int]], prefetch_count: int
) -> tuple[Action, ...]:
    """Return the order of phases; it is the same on every rank, so that collectives match.

    At most `prefetch_count + 1` unshards are unfinished at a time. While a wave is orthogonalized,
    the unshards of the next `prefetch_count` buckets, the first hop of the reshard of the previous
    bucket and the second hop of the one before are in flight. With `prefetch_count` 0 no collective
    is in flight during compute. `waves`: indices of buckets; the owners of one wave orthogonalize
    at the same time. So do the owners of several waves if they all differ: results are not awaited
    before the last of these waves.
    """
    actions: list[Action] = []
    order = [bucket for wave in waves for bucket in wave]
    num_issued = 0
    resharding: list[int] = []
    passed_on: list[int] = []

    def finish_reshards(num_pending: int) -> None:
        """Apply results, except of the last `num_pending` buckets and one in its second hop."""
        before = passed_on.copy()
        while len(resharding) > num_pending:
            bucket = resharding.pop(0)
            if len(buckets[bucket].reshard) < 2:
                actions.append(Action(Phase.APPLY, bucket))
                continue
            actions.append(Action(Phase.PASS_ON, bucket))
            apply_passed_on()
            passed_on.append(bucket)
        if passed_on == before:
            apply_passed_on()

    def apply_passed_on() -> None:
        actions.extend(Action(Phase.APPLY, bucket) for bucket in passed_on)
        passed_on.clear()

    def issue_up_to(count: int) -> None:
        nonlocal num_issued
        while num_issued < min(count, len(order)):
            actions.append(Action(Phase.UNSHARD, order[num_issued]))
            num_issued += 1

    busy: set[int] = set()
    done = 0
    for wave in waves:
        owners = {a.owner for bucket in wave for a in buckets[bucket].assignments}
        if prefetch_count and busy.isdisjoint(owners):
            busy |= owners
        else:
            busy = owners
            finish_reshards(min(prefetch_count, 1))  # the last one overlaps with this wave
        if prefetch_count == 0:
            apply_passed_on()
        for bucket in wave:
            issue_up_to(done + 1 + prefetch_count)
            if buckets[bucket].unshard:
                actions.append(Action(Phase.WAIT, bucket))
            done += 1
        actions += [Action(Phase.ORTHOGONALIZE, bucket) for bucket in wave]
        for bucket in wave:
            if buckets[bucket].reshard:
                actions.append(Action(Phase.RESHARD, bucket))
            resharding.append(bucket)
    finish_reshards(0)
    apply_passed_on()
    return tuple(actions)
