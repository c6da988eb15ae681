"""The layers' rules in torch's operators beside the general path and the plain loop; ANIL.

python -m bench.layered              networks, each by the rules, the general path and the loop
python -m bench.layered --anil       W6 and W5 with only the head adapting, beside the plain loop
python -m bench.layered --only resnet12,W5
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta
from bench import cores, rounds
from bench.general import LOOPS, step_function
from bench.workloads import WORKLOADS, Pair, Workload, conv4

RULES, GENERIC, CHOSEN = "rules", 'fastmeta, executor="generic"', "fastmeta"


class Residual(nn.Module):
    """A block of ResNet-12: three convolutions beside a projection, then pooling."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        widths = (inputs, outputs, outputs)
        self.convs = nn.ModuleList(nn.Conv2d(w, outputs, 3, padding=1, bias=False) for w in widths)
        self.norms = nn.ModuleList(
            nn.BatchNorm2d(outputs, track_running_stats=False) for _ in range(4)
        )
        self.project = nn.Conv2d(inputs, outputs, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = F.leaky_relu(self.norms[0](self.convs[0](x)), 0.1)
        h = F.leaky_relu(self.norms[1](self.convs[1](h)), 0.1)
        h = self.norms[2](self.convs[2](h)) + self.norms[3](self.project(x))
        return F.max_pool2d(F.leaky_relu(h, 0.1), 2)


def resnet12() -> nn.Module:
    blocks = [Residual(*pair) for pair in ((3, 16), (16, 32), (32, 64), (64, 128))]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 5))


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


def _image(name: str, network: Callable[[], nn.Module], steps: int = 5) -> Workload:
    return Workload(name, network, 5, (3, 32, 32), 4, 5, 75, steps)


OURS = {
    "resnet12": _image("resnet12", resnet12),
    "group-norm": _image("group-norm", group_norm),
    "separable": _image("separable", separable),
    **{name: WORKLOADS[name] for name in ("W2", "W3", "W5", "W5b", "W5s", "W6")},
}


def by_rules(
    workload: Workload, model: nn.Module, support: Pair, query: Pair, **options: object
) -> Callable[[], Tensor]:
    """A meta-step by the layers' rules, where the compiled step could serve too."""
    options = {"loss_fn": workload.loss_fn, "executor": "layered", **options}
    options |= {"inner_lr": workload.inner_lr, "inner_steps": workload.steps}

    def step() -> Tensor:
        with mock.patch("fastmeta.executors.layered.not_compiled", return_value="asked for"):
            out = fastmeta.maml_step(model, support, query, **options)  # pyright: ignore
        out.loss.backward()
        assert out.executor == "layered-torch"
        return out.loss.detach()

    return step


def network_row(workload: Workload, seconds: float) -> dict[str, float]:
    """Milliseconds of each contender, on models of their own."""
    calls: dict[str, Callable[[], object]] = {RULES: by_rules(workload, *workload.make())}
    for contender in (GENERIC, CHOSEN, LOOPS[1]):
        calls[contender] = step_function(contender, workload, *workload.make())
    return {name: timing.ms for name, timing in rounds.times(calls, seconds).items()}


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
    """The same, of a step in which the last layer alone adapts."""
    calls: dict[str, Callable[[], object]] = {}
    gradients: list[Tensor] = []
    for name in ("loop", RULES, CHOSEN):
        model, support, query = workload.make()
        assert isinstance(model, nn.Sequential)
        head = [name for name, _ in model.named_parameters()][-2:]
        if name == "loop":
            calls[name] = anil_loop(model, support, query, workload)
        elif name == RULES:
            calls[name] = by_rules(workload, model, support, query, adapt=head)
        else:
            calls[name] = chosen(workload, model, support, query, head)
        calls[name]()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))  # pyright: ignore
    for other in gradients[1:]:
        if float((other - gradients[0]).norm()) > 1e-3 * float(gradients[0].norm()):
            raise SystemExit(f"{workload.name}: disagrees with autograd; not timed")
    return {name: timing.ms for name, timing in rounds.times(calls, seconds).items()}


def chosen(
    workload: Workload, model: nn.Module, support: Pair, query: Pair, adapt: list[str]
) -> Callable[[], Tensor]:
    """A meta-step as the plan chooses, in which these parameters adapt."""

    def step() -> Tensor:
        out = fastmeta.maml_step(
            model, support, query, inner_lr=workload.inner_lr, inner_steps=workload.steps,
            loss_fn=workload.loss_fn, adapt=adapt,
        )  # fmt: skip
        out.loss.backward()
        return out.loss.detach()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="workloads, comma-separated")
    parser.add_argument("--anil", action="store_true")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="per contender")
    args = parser.parse_args()
    cores.restrict(args.threads)
    row = anil_row if args.anil else network_row
    names = args.only.split(",") if args.only else ("W5", "W6") if args.anil else list(OURS)
    for i, name in enumerate(names):
        found = row(OURS[name], args.seconds)
        if not i:
            print("| workload | " + " | ".join(f"{contender}, ms" for contender in found) + " |")
            print("|---" * (len(found) + 1) + "|")
        print(f"| {name} | " + " | ".join(f"{ms:.1f}" for ms in found.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
