"""MAML for reinforcement learning: a policy that finds a new goal after one policy gradient step.

    python examples/policy.py

A point agent starts at the origin of a plane and sees only its own position; where the goal lies
differs from task to task, and only the rewards tell. From 20 episodes in each task, one REINFORCE
step adapts the policy. Prints the mean return on held-out goals before and after one, two and three
such updates, for the meta-trained policy and for one trained on all goals without adaptation, and
draws the paths of the former.

Method: Finn, Abbeel, Levine (2017), Model-Agnostic Meta-Learning, arXiv:1703.03400, section 5.3
(2D navigation), with Adam in place of TRPO for the meta-update.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastmeta

TASKS, EPISODES, HORIZON = 20, 20, 100  # goals in a meta-step, episodes for each, their length
INNER_LR, META_LR = 0.1, 1e-3
UPDATE_SIZES = torch.tensor([1.0, 0.5, 0.5])  # of the test's updates: the paper halves later ones
SEARCHED_LRS = (0.03, 0.1, 0.3, 1.0)  # for the policy that was trained without adaptation
TEST_GOALS, SHOWN_GOALS = 40, 5

Array = np.ndarray[Any, np.dtype[Any]]
Batch = tuple[Tensor, tuple[Tensor, Tensor]]
Policy = Callable[[Tensor], Tensor]  # the mean action, [T, E, 2], at positions [T, E, 2]


class Reinforce(nn.Module):
    """The policy gradient loss: minus log-likelihood of the actions, weighted by advantages.

    The network gives the mean of a Gaussian, whose standard deviation is a parameter of the loss.
    The inner loop moves the network alone; the meta-gradient reaches both.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.full((2,), -1.0))  # explores by 0.37

    def forward(self, mean: Tensor, targets: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the loss of one task from means [N, 2], actions [N, 2] and advantages [N]."""
        actions, advantages = targets
        z = (actions - mean) / self.log_std.exp()
        return ((z.square() / 2 + self.log_std).sum(-1) * advantages).mean()


def play(policy: Policy, std: Tensor, goals: Array) -> tuple[Batch, float]:
    """Play the episodes of all tasks at once; returns examples for the loss, and the mean return.

    The examples are positions [T, N, 2] with actions [T, N, 2] and advantages [T, N], N = H * E.
    """
    position = np.zeros((len(goals), EPISODES, 2), np.float32)
    running = np.ones((len(goals), EPISODES), bool)
    history: list[tuple[Array, ...]] = []
    for _ in range(HORIZON):
        with torch.no_grad():
            mean = policy(torch.from_numpy(position))
            action = torch.normal(mean, std.expand_as(mean)).numpy()
        moved = position + np.clip(action, -0.1, 0.1) * running[..., None]
        distance = np.linalg.norm(moved - goals[:, None], axis=-1)  # [T, E]
        history.append((position, action, -np.square(distance) * running, running))
        position, running = moved, running & (distance >= 0.01)
    positions, actions, rewards, played = (np.stack(step) for step in zip(*history, strict=True))

    def by_task(values: Array) -> Tensor:  # [H, T, E, ...] -> [T, H * E, ...]
        return torch.from_numpy(values).float().transpose(0, 1).flatten(1, 2)

    targets = by_task(actions), by_task(advantages(rewards, played))
    return (by_task(positions), targets), float(rewards.sum(0).mean())


def advantages(rewards: Array, played: Array) -> Array:
    """Compute advantages from rewards; all are [H, T, E], `played` is False after the end."""
    returns = rewards[::-1].cumsum(0)[::-1]  # from each time step to the end
    # The baseline is the mean of the task's episodes that are still running at this time step.
    baseline = returns.sum(2, keepdims=True) / played.sum(2, keepdims=True).clip(1)  # [H, T, 1]
    centred = (returns - baseline) * played  # what comes after the end has no weight
    return centred / (np.sqrt(np.square(centred).mean((0, 2), keepdims=True)) + 1e-8)


def draw_goals(tasks: int) -> Array:
    """Draw goals [T, 2], uniformly from the square [-0.5, 0.5]^2."""
    return (torch.rand(tasks, 2) - 0.5).numpy()


def train(steps: int, adapts: bool) -> tuple[nn.Module, Reinforce]:
    """Meta-train a policy; or train it as it is, on all goals at once."""
    policy = nn.Sequential(
        nn.Linear(2, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 2)
    )
    loss = Reinforce()
    optimizer = torch.optim.Adam([*policy.parameters(), *loss.parameters()], lr=META_LR)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        goals = draw_goals(TASKS)
        support, before = play(policy, loss.log_std.exp(), goals)
        query, after = support, before
        if adapts:
            adapted = fastmeta.adapt(policy, support, inner_lr=INNER_LR, loss_fn=loss)
            query, after = play(adapted, loss.log_std.exp(), goals)
        # The query episodes are those of the adapted policies, so that the gradient of the query
        # loss there is their policy gradient; the step carries it back through the inner update.
        # Both sets are constants of the step. As in the paper, the meta-gradient therefore lacks
        # one term: other initial weights would have collected other support episodes (E-MAML,
        # Stadie et al. 2018, adds it).
        out = fastmeta.maml_step(
            policy, support, query, inner_lr=INNER_LR, inner_steps=int(adapts), loss_fn=loss
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        if step % max(1, steps // 10) == 0:
            speed = f"{1000 * (time.perf_counter() - start) / step:.0f} ms each"
            print(f"meta-step {step:4d}  return {before:6.1f} -> {after:6.1f}  {speed}", flush=True)
    return policy, loss


def learn(
    policy: nn.Module, loss: Reinforce, goals: Array, inner_lr: float
) -> tuple[list[float], list[Policy]]:
    """Update the policy for each goal; returns mean returns and policies, before and after each."""
    batch, mean_return = play(policy, loss.log_std.exp(), goals)
    policies: list[Policy] = [policy]
    sets, returns = [batch], [mean_return]
    for updates in range(1, len(UPDATE_SIZES) + 1):
        # `adapt` begins at the initial policy: it repeats the earlier updates, each on the episodes
        # of its own time, and takes the new one. So every leaf of the support is [T, K, N, ...].
        leaves = zip(*((x, *y) for x, y in sets), strict=True)
        positions, actions, weights = (torch.stack(leaf, 1) for leaf in leaves)
        adapted = fastmeta.adapt(
            policy,
            support=(positions, (actions, weights)),
            inner_lr=inner_lr * UPDATE_SIZES[:updates],
            inner_steps=updates,
            loss_fn=loss,
            per_step_support=True,
        )
        batch, mean_return = play(adapted, loss.log_std.exp(), goals)
        policies.append(adapted)
        sets.append(batch)
        returns.append(mean_return)
    return returns, policies


def draw(file: Path, goals: Array, policies: list[Policy]) -> None:
    """Draw where the mean actions lead, for a few goals, after each update."""
    figure = Figure(figsize=(2.6 * SHOWN_GOALS, 3.2), layout="constrained")
    panels = figure.subplots(1, SHOWN_GOALS, sharex=True, sharey=True)
    for updates, policy in enumerate(policies):
        (positions, _), _ = play(policy, torch.zeros(2), goals)
        paths = positions[:, ::EPISODES]  # [T, H, 2], the first episode of each task
        for panel, path in zip(panels, paths, strict=False):
            panel.plot(*path.T, ".-", lw=1, ms=4, label=f"K = {updates}")
    for panel, goal in zip(panels, goals, strict=False):
        panel.plot(*goal, "k*", ms=12, zorder=5, label="goal")
        panel.set(aspect="equal", xlim=(-0.7, 0.7), ylim=(-0.7, 0.7))
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(file, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Train both policies, print the table and save the picture; returns the table."""
    parser = argparse.ArgumentParser(description="MAML with REINFORCE on 2-D navigation")
    parser.add_argument("--steps", type=int, default=300, help="meta-steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("policy.png"), help="the picture")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    print("MAML")
    maml = train(args.steps, adapts=True)
    print("without adaptation")
    plain = train(args.steps, adapts=False)

    goals = draw_goals(TEST_GOALS)
    returns, policies = learn(*maml, goals, INNER_LR)
    # The other policy gets the rate that is best for it on these very goals.
    others = [learn(*plain, goals, inner_lr)[0] for inner_lr in SEARCHED_LRS]
    best = max(others, key=lambda other: other[-1])
    table = {"MAML": returns, "trained without adaptation": best}
    print(f"Mean return on {TEST_GOALS} held-out goals, by the number of policy gradient updates")
    print(" " * 28 + "".join(f"{k:8d}" for k in range(len(returns))))
    for name, row in table.items():
        print(f"{name:28}" + "".join(f"{value:8.1f}" for value in row))
    draw(args.out, goals, policies)
    print(f"Paths of the meta-trained policy: {args.out}")
    return table


if __name__ == "__main__":
    main()
