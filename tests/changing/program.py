"""Programs of changes: drawn from a seed, run step by step beside plain autograd, and shortened."""

from __future__ import annotations

import contextlib
import random
from dataclasses import dataclass, replace
from unittest import mock

import torch
from torch import Tensor, nn

from changing import code, data, layers, losses, tensors, torchs  # noqa: F401  (each registers its kinds)
from changing.kinds import KINDS, Change, Kind
from changing.world import LOSSES, NETWORKS, READERS, TORCHS, World
from fastmeta.plan import timing

STEP = "step"
NORMS = (nn.GroupNorm, nn.modules.batchnorm._BatchNorm)


@dataclass(frozen=True)
class Program:
    """A world, and what happens in it: steps, `+kind` for a change, `-kind` for the way back."""

    seed: int
    network: str
    middles: tuple[str, str]
    loss: str
    events: tuple[str, ...]

    def __str__(self) -> str:
        parts = f"{self.network} with {' and '.join(self.middles)}, loss {self.loss!r}"
        return f"seed {self.seed}: {parts}; {', '.join(self.events)}"

    def parts(self) -> set[str]:
        """All that kinds may need."""
        images = set() if self.network == "vector" else {"images"}
        return {self.network, *self.middles, self.loss, *images}


def applicable(parts: set[str]) -> list[Kind]:
    """The kinds that a world of these parts serves, those that need something before the rest."""
    return [kind for kind in KINDS.values() if kind.needs <= parts]


def draw(seed: int) -> Program:
    """A program of three to seven steps, with up to three changes before each but the first."""
    chance = random.Random(seed)
    network = chance.choice(NETWORKS)
    middles = [
        chance.choice(TORCHS[:5]),
        chance.choice(READERS if chance.random() < 0.6 else TORCHS),
    ]
    if network == "vector":
        middles = ["ReLU" if name == "ListConv" else name for name in middles]
    chance.shuffle(middles)
    loss = chance.choice(LOSSES) if chance.random() < 0.4 else "cross_entropy"
    program = Program(seed, network, (middles[0], middles[1]), loss, ())
    served = applicable(program.parts())
    own = [kind for kind in served if kind.needs]
    events, made = [STEP], []
    for _ in range(chance.randint(2, 6)):
        for _ in range(chance.randint(0, 3)):
            if len(made) > chance.randint(0, 2):
                events.append(f"-{made.pop(chance.randrange(len(made)))}")
            else:
                kind = chance.choice(own if chance.random() < 0.8 else served)
                if kind.name not in made:
                    made.append(kind.name)
                    events.append(f"+{kind.name}")
        events.append(STEP)
    return replace(program, events=tuple(events))


def alone(kind: Kind, network: str) -> Program:
    """The program of one change: before it, after it, and after the way back."""
    needs = kind.needs
    middles = [name for name in (*TORCHS, *READERS) if name in needs] or ["ReLU"]
    loss = next((name for name in LOSSES if name in needs), "cross_entropy")
    events = (STEP, f"+{kind.name}", STEP, f"-{kind.name}", STEP)
    return Program(0, network, (middles[0], "ReLU"), loss, events)


def networks(kind: Kind) -> list[str]:
    """The networks that the kind is tried on alone."""
    images = {"images", "ListConv", "image"} & kind.needs
    named = [name for name in NETWORKS if name in kind.needs]
    return named or (["image"] if images else ["vector", "image"])


class Outside(Exception):
    """Plain autograd itself can't compute a step; the message says why."""


@dataclass(frozen=True)
class Seen:
    """A step's loss and meta-gradient by plain autograd, and what else computed it."""

    loss: Tensor
    gradient: Tensor
    executor: str

    def equals(self, other: Seen) -> bool:
        """Whether two steps gave the same numbers, but for rounding and the parameters' order."""
        gradients = self.gradient.sort().values, other.gradient.sort().values
        pairs = (self.loss, other.loss), gradients
        return self.gradient.shape == other.gradient.shape and all(
            torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in pairs
        )


class Fault(Exception):
    """A step that is not plain autograd's; the message says how."""


def run(program: Program) -> list[Seen]:
    """Every step beside plain autograd, and the model as it was after each.

    **Raises** `Fault` or, where the changes have made a model that torch can't run, `Outside`.
    """
    seen: list[Seen] = []
    ways_back: dict[str, Change] = {}
    world = World(program.network, program.middles, program.loss, program.seed)
    # The clock would choose between executors: a fault of one must be there in every run.
    drawn = random.Random(program.seed)
    chosen = mock.patch.object(timing, "factor", side_effect=lambda *_: drawn.uniform(0.1, 3))
    with world, chosen:
        for event in program.events:
            name = event[1:]
            if event == STEP:
                seen.append(checked(world))
            elif event[0] == "+" and name not in ways_back:
                ways_back[name] = changing(world, KINDS[name])
                next(ways_back[name], None)
            elif event[0] == "-" and name in ways_back:
                next(ways_back.pop(name), None)
    return seen


def changing(world: World, kind: Kind) -> Change:
    """Makes a change, then takes it back; nothing where another took away what it changes."""
    with contextlib.suppress(AttributeError, IndexError, ValueError):
        yield from kind.make(world)


def failure(program: Program) -> str | None:
    """How a step differs from plain autograd; None where none does."""
    try:
        run(program)
    except Fault as fault:
        return str(fault)
    except Outside:
        return None
    return None


def minimal(program: Program) -> Program:
    """The program without what its failure does not need."""
    i = 0
    while i < len(program.events):
        events = program.events[:i] + program.events[i + 1 :]
        if failure(shorter := replace(program, events=events)):
            program = shorter
        else:
            i += 1
    return program


def checked(world: World) -> Seen:
    """One step beside plain autograd."""
    try:
        loss, expected = world.reference()
    except Exception as error:
        raise Outside(str(error)) from error
    state = [(p, p.detach().clone()) for p in (*world.model.parameters(), *world.model.buffers())]
    try:
        found_loss, found, executor = world.step()
    except Exception as error:  # whatever it is, plain autograd computed this step
        raise Fault(f"raises {type(error).__name__}: {error}") from error
    now = [*world.model.parameters(), *world.model.buffers()]
    if [id(tensor) for tensor in now] != [id(tensor) for tensor, _ in state]:
        raise Fault(f"{executor} exchanges the model's tensors")
    if any(not torch.equal(tensor, before) for tensor, before in state):
        raise Fault(f"{executor} changes the model")
    leaves = world.leaves() if world.grad else []
    gradient, found_gradient = (flat(gs, leaves) for gs in (expected, found))
    allowed = tolerance(world, leaves)
    for what, a, b in (("loss", found_loss, loss), ("meta-gradient", found_gradient, gradient)):
        error = apart(a, b)
        if not (error <= allowed or error <= 16 * rounding(world, what, b)):
            raise Fault(f"{executor}: {what} off by {error:.1e}, allowed {allowed:.1e}")
    return Seen(loss, gradient, executor)


def apart(found: Tensor, expected: Tensor) -> float:
    """The relative error."""
    if not expected.numel():
        return 0.0
    return float((found - expected).norm() / expected.norm().clamp(min=1e-2))


def rounding(world: World, what: str, expected: Tensor) -> float:
    """The part of plain autograd's own result that the last digit of the parameters decides.

    The most of a few draws: one may leave alone what is decided.
    """
    parameters = [*world.model.parameters()]
    before = [p.detach().clone() for p in parameters]
    most = 0.0
    for _ in range(8):
        with torch.no_grad():
            for p in parameters:
                p.mul_(1 + torch.finfo(p.dtype).eps * torch.randn_like(p).clamp(-2, 2))
        loss, gradients = world.reference()
        with torch.no_grad():
            for p, value in zip(parameters, before, strict=True):
                p.copy_(value)
        moved = loss if what == "loss" else flat(gradients, world.leaves() if world.grad else [])
        most = max(most, apart(moved, expected))
    return most


def flat(gradients: list[Tensor | None], leaves: list[Tensor]) -> Tensor:
    """One row of numbers; zeros where nothing arrives."""
    pairs = zip(gradients, leaves, strict=True)
    rows = [(torch.zeros_like(p) if g is None else g).detach().double().flatten() for g, p in pairs]
    return torch.cat(rows) if rows else torch.zeros(0, dtype=torch.float64)


def tolerance(world: World, leaves: list[Tensor]) -> float:
    """The worst that rounding does: every product on the longest way, and in it the longest sum.

    A norm divides by as little as the root of its eps. In float32 rounding may turn a corner of an
    activation: one example's share of the whole.
    """
    eps = torch.finfo(next(world.model.parameters()).dtype).eps
    products = 4 * sum(leaf.dim() > 1 for leaf in leaves) * 3
    pixels = world.side**2 if world.of_images else 1
    longest = world.tasks * (max(world.support, world.query) + world.tasks) * pixels
    norms = [m.eps for m in world.model.modules() if isinstance(m, NORMS)]
    divided = max([eps_of_norm**-0.5 for eps_of_norm in norms], default=1.0)
    share = 1 / (world.tasks * min(world.support, world.query)) if eps > 1e-9 else 0.0
    return eps * max(products, 12) * longest * divided + share
