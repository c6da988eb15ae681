"""The layers' rules in torch's operators beside the general path and the plain loop; ANIL.

python -m bench.layered              networks, each by the rules, the general path and the loop
python -m bench.layered --anil       W6 and W5 with only the head adapting, beside the plain loop
python -m bench.layered --low        networks with memory="low", by the rules and by jvp
python -m bench.layered --only resnet12,W5
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from bench import cores, measure, rounds
from bench.executors import rules_alone
from bench.general import LOOPS, step_function
from bench.residual import RESIDUAL
from bench.workloads import WORKLOADS, Pair, StridedConv4, Workload, conv4

RULES, GENERIC, CHOSEN = "rules", "generic", "as chosen"
EXECUTORS = {RULES: "layered", GENERIC: "generic", CHOSEN: "auto"}


def group_norm() -> nn.Module:
    model = conv4(3, 32, 32, 5)
    for i, layer in enumerate(model):
        if isinstance(layer, nn.BatchNorm2d):
            model[i] = nn.GroupNorm(8, 32)
    return model


def separable() -> nn.Module:
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1)]
    for inputs, outputs, stride in ((32, 64, 1), (64, 128, 2), (128, 128, 2)):
        layers += [
            nn.Conv2d(inputs, inputs, 3, stride, 1, groups=inputs, bias=False),
            nn.BatchNorm2d(inputs, track_running_stats=False), nn.ReLU(),
            nn.Conv2d(inputs, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs, track_running_stats=False), nn.SiLU(),
        ]  # fmt: skip
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))


def smooth(model: nn.Module, activation: Callable[[], nn.Module]) -> nn.Module:
    """A network with another activation in the place of ReLU."""
    for name, part in model.named_modules():
        if isinstance(part, nn.ReLU):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, activation())
    return model


def strided_silu() -> nn.Module:
    return smooth(StridedConv4(), nn.SiLU)


def small_groups() -> nn.Module:
    model = conv4(1, 32, 28, 5)
    for i, layer in enumerate(model):
        if isinstance(layer, nn.BatchNorm2d):
            model[i] = nn.GroupNorm(8, 32)
    return model


def _image(name: str, network: Callable[[], nn.Module], steps: int = 5) -> Workload:
    return Workload(name, network, 5, (3, 32, 32), 4, 5, 75, steps)


OURS = {
    "resnet12": RESIDUAL["resnet12"],
    "group-norm": _image("group-norm", group_norm),
    "separable": _image("separable", separable),
    "strided-silu": replace(WORKLOADS["W5s"], name="strided-silu", network=strided_silu),
    "strided-silu-K5": replace(WORKLOADS["W5s"], network=strided_silu, steps=5),
    **{
        f"W5-{kind.__name__}": replace(
            WORKLOADS["W5"],
            name=f"W5-{kind.__name__}",
            network=lambda kind=kind: smooth(conv4(1, 64, 28, 5), kind),
        )
        for kind in (nn.Tanh, nn.GELU)
    },
    "small-groups": replace(WORKLOADS["W5s"], name="small-groups", network=small_groups),
    "separable-T32": replace(_image("", separable, 1), tasks=32, query=5),
    **{name: WORKLOADS[name] for name in ("W2", "W3", "W5", "W5b", "W5s", "W6")},
}


def step(
    contender: str, workload: Workload, model: nn.Module, support: Pair, query: Pair, **options: Any
) -> Callable[[], Tensor]:
    """A meta-step by the layers' rules, even where the compiled step could serve, or otherwise."""
    options = {"loss_fn": workload.loss_fn, "executor": EXECUTORS[contender], **options}
    options |= {"inner_lr": workload.inner_lr, "inner_steps": workload.steps}

    def run() -> Tensor:
        with rules_alone() if contender == RULES else nullcontext():
            out = fastmeta.maml_step(model, support, query, **options)
        out.loss.backward()
        assert contender != RULES or out.executor == "layered-torch"
        return out.loss.detach()

    return run


def network_row(workload: Workload, seconds: float) -> dict[str, float]:
    """Milliseconds of each contender, on models of their own."""
    calls: dict[str, Callable[[], object]] = {
        c: step(c, workload, *workload.make()) for c in EXECUTORS
    }
    calls[LOOPS[1]] = step_function(LOOPS[1], workload, *workload.make())
    return {f"{name}, ms": timing.ms for name, timing in rounds.times(calls, seconds).items()}


def low_row(workload: Workload, seconds: float) -> dict[str, float]:
    """Milliseconds with `memory="low"`, and MB above the bare process."""
    contenders = (RULES, GENERIC)
    calls: dict[str, Callable[[], object]] = {
        c: step(c, workload, *workload.make(), memory="low") for c in contenders
    }
    found = {f"{name}, ms": timing.ms for name, timing in rounds.times(calls, seconds).items()}
    for contender in contenders:
        arguments = ("--peak-of", workload.name, "--contender", contender)
        result = measure.in_fresh_process("bench.layered", *arguments)
        found[f"{contender}, MB"] = result["megabytes"]
    return found


def anil_loop(
    model: nn.Sequential, support: Pair, query: Pair, workload: Workload
) -> Callable[[], Tensor]:
    """Task by task: the body once over each set, then the inner loop over the head's weights."""
    body, head = model[:-1], model[-1]
    assert isinstance(head, nn.Linear)

    def step() -> Tensor:
        total = torch.zeros(())
        for sx, sy, qx, qy in zip(*support, *query, strict=True):
            features, weights = body(sx), [head.weight, head.bias]
            for _ in range(workload.steps):
                loss = workload.loss_fn(F.linear(features, *weights), sy)
                gradients = torch.autograd.grad(loss, weights, create_graph=True)
                weights = [
                    w - workload.inner_lr * g for w, g in zip(weights, gradients, strict=True)
                ]
            loss = workload.loss_fn(F.linear(body(qx), *weights), qy) / workload.tasks
            loss.backward()
            total += loss.detach()
        return total

    return step


def anil_row(workload: Workload, seconds: float) -> dict[str, float]:
    """The time of a step in which the last layer alone adapts."""
    check_anil(workload.with_tasks(1))
    calls: dict[str, Callable[[], object]] = {
        name: call for name, (_, call) in anil_calls(workload, torch.float32).items()
    }
    return {f"{name}, ms": timing.ms for name, timing in rounds.times(calls, seconds).items()}


def anil_calls(
    workload: Workload, dtype: torch.dtype
) -> dict[str, tuple[nn.Module, Callable[[], Tensor]]]:
    """Every contender with a model of its own."""
    calls: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {}
    for name in ("loop", *EXECUTORS):
        model, support, query = workload.make(dtype=dtype)
        assert isinstance(model, nn.Sequential)
        if name == "loop":
            call = anil_loop(model, support, query, workload)
        else:
            head = [parameter for parameter, _ in model.named_parameters()][-2:]
            call = step(name, workload, model, support, query, adapt=head)
        calls[name] = (model, call)
    return calls


def check_anil(workload: Workload) -> None:
    """Refuses to time what does not agree with float64 autograd."""
    reference: Tensor | None = None
    for name, (model, call) in anil_calls(workload, torch.float64).items():
        call()
        found = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        reference = found if reference is None else reference
        if float((found - reference).norm()) > 1e-9 * float(reference.norm()):
            raise SystemExit(f"{workload.name}: {name} disagrees with autograd; not timed")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="workloads, comma-separated")
    parser.add_argument("--anil", action="store_true")
    parser.add_argument("--low", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.peak_of:
        torch.set_num_threads(1)
        workload = OURS[args.peak_of]
        call = step(args.contender, workload, *workload.make(), memory="low")
        print(json.dumps({"megabytes": measure.peak_above_start(call)}))
        return
    cores.restrict(args.threads)
    row = anil_row if args.anil else low_row if args.low else network_row
    names = args.only.split(",") if args.only else ("W5", "W6") if args.anil else list(OURS)
    for i, name in enumerate(names):
        found = row(OURS[name], args.seconds)
        if not i:
            print("| workload | " + " | ".join(found) + " |")
            print("|---" * (len(found) + 1) + "|")
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
