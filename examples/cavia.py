"""CAVIA: five context parameters tell the tasks apart, and the network is shared by all of them.

    python examples/cavia.py

The inner loop moves a context vector that stands beside the input and starts from zero in every
task; the weights are meta-learned and do not adapt. On the sinusoids of the MAML paper, beside
MAML, which moves all weights of the same network without a context. Prints the mean squared error
on held-out tasks after 0, 1, 2 and 5 inner steps.

Method: Zintgraf, Shiarlis, Kurin, Hofmann, Whiteson (2019), Fast context adaptation via
meta-learning, arXiv:1810.03642, section 5.1.
"""

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastmeta

CONTEXT = 5
TASKS, SHOTS = 25, 10  # of a meta-step, points of a set
META_LR, SHRINKS_BY, SHRINKS_EVERY = 1e-3, 0.9, 5000
INNER_LR = {"CAVIA": 1.0, "MAML": 0.01}
INNER_STEPS = 2  # in training
TEST_TASKS, TEST_STEPS = 1000, (0, 1, 2, 5)
TEST_BATCH, TEST_POINTS = 100, 100


class Contextual(nn.Module):
    """A network that reads a context beside its input."""

    def __init__(self) -> None:
        super().__init__()
        # Adapts and is not meta-learned: it is left out of the optimizer, so it stays zero.
        self.context = nn.Parameter(torch.zeros(CONTEXT))
        self.layers = network(1 + CONTEXT)

    def forward(self, x: Tensor) -> Tensor:
        """Predict [N, 1] from [N, 1]."""
        return self.layers(torch.cat([x, self.context.expand(x.shape[0], -1)], 1))


def network(inputs: int) -> nn.Sequential:
    """Two hidden layers of 40 units."""
    return nn.Sequential(
        nn.Linear(inputs, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 1)
    )


def train(name: str, steps: int) -> fastmeta.MAML:
    """Meta-train a network of one of the two kinds."""
    contextual = name == "CAVIA"
    model = Contextual() if contextual else network(1)
    learner = fastmeta.MAML(
        model,
        inner_lr=INNER_LR[name],
        inner_steps=INNER_STEPS,
        loss_fn=F.mse_loss,
        adapt="context" if contextual else None,
    )
    learned = [p for n, p in model.named_parameters() if n != "context"]
    optimizer = torch.optim.Adam(learned, lr=META_LR)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, SHRINKS_EVERY, SHRINKS_BY)
    tasks = fastmeta.data.Sinusoid(shots=SHOTS, queries=SHOTS, seed=0)
    start, losses = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        out = learner(*tasks.sample(TASKS))
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        schedule.step()
        losses += float(out.loss.detach())
        if step % max(1, steps // 5) == 0:
            speed = f"{1000 * (time.perf_counter() - start) / step:.2f} ms each"
            mean = losses / max(1, steps // 5)
            print(f"{name}  meta-step {step:5d}  loss {mean:.3f}  {speed}", flush=True)
            losses = 0.0
    return learner


def test(learner: fastmeta.MAML) -> list[fastmeta.Evaluation]:
    """Evaluate after each of `TEST_STEPS` inner steps, on the same held-out tasks."""
    results: list[fastmeta.Evaluation] = []
    for inner_steps in TEST_STEPS:
        tasks = fastmeta.data.Sinusoid(shots=SHOTS, queries=TEST_POINTS, seed=1)
        batches = (tasks.sample(TEST_BATCH) for _ in range(0, TEST_TASKS, TEST_BATCH))
        results.append(
            fastmeta.evaluate(learner, batches, metric=F.mse_loss, inner_steps=inner_steps)
        )
    return results


def main(arguments: Sequence[str] | None = None) -> dict[str, list[float]]:
    """Train both and print a table; returns the means."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=50_000, help="meta-steps (50000)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (0)")
    args = parser.parse_args(arguments)
    table: dict[str, list[fastmeta.Evaluation]] = {}
    for name in INNER_LR:
        torch.manual_seed(args.seed)
        table[name] = test(train(name, args.steps))
    print(f"Mean squared error on {TEST_TASKS} held-out tasks, by the number of inner steps")
    print("      " + "".join(f"{steps:>15}" for steps in TEST_STEPS))
    for name, row in table.items():
        cells = (f"{each.mean:.2f} ± {each.half_width:.2f}" for each in row)
        print(f"{name:6}" + "".join(f"{cell:>15}" for cell in cells))
    return {name: [each.mean for each in row] for name, row in table.items()}


if __name__ == "__main__":
    main()
