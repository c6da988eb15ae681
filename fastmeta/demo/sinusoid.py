"""MAML on sinusoids, beside a network trained on all tasks at once."""

import argparse
import copy
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fastmeta
from fastmeta.data import Sinusoid
from fastmeta.demo.confidence import estimate
from fastmeta.demo.networks import sinusoid_network
from fastmeta.demo.pictures import sinusoid_picture
from fastmeta.demo.progress import Progress

TASKS = 25  # of one meta-step
FULL = 70_000  # meta-steps of the paper
META_LR = 1e-3
TEST_TASKS = 600
VALIDATION_TASKS = 200
TEST_STEPS = (0, 1, 5, 10)
STEP_SIZES = (3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1, 0.3)  # tried for the jointly trained network

Batch = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    iterations: int
    inner_lr: float
    inner_steps: int
    seed: int
    device: str
    output: Path


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Check the arguments; returns the demonstration, ready to be called."""
    settings = Settings(
        iterations=args.iterations or (FULL if args.full else 8000),
        inner_lr=args.inner_lr or 0.01,
        inner_steps=args.inner_steps or 1,
        seed=args.seed,
        device=args.device,
        output=args.output,
    )
    return partial(demonstrate, settings)


def demonstrate(settings: Settings) -> None:
    """Train both networks, compare them on held-out tasks and draw three of these.

    **Source:** Finn, Abbeel, Levine (2017), Model-Agnostic Meta-Learning, section 5.1.
    """
    torch.manual_seed(settings.seed)
    maml = sinusoid_network().to(settings.device)
    joint = copy.deepcopy(maml)
    meta_train(maml, settings)
    joint_train(joint, settings)

    # Seeds of their own: validation and test tasks don't depend on how long the training was.
    validation = Sinusoid(seed=settings.seed + 1, device=settings.device).sample(VALIDATION_TASKS)
    held_out = Sinusoid(seed=settings.seed + 2, device=settings.device)
    curves = held_out.draw(TEST_TASKS)
    test = held_out.sample(curves)
    joint_lr = best_step_size(joint, validation)
    _show_table(
        maml=[errors(maml, test, settings.inner_lr, steps) for steps in TEST_STEPS],
        joint=[errors(joint, test, joint_lr, steps) for steps in TEST_STEPS],
        inner_lr=settings.inner_lr,
        joint_lr=joint_lr,
    )

    x = torch.linspace(-5, 5, 201, device=settings.device)[:, None]  # [X, 1]
    # Spread over the amplitudes, so that three different tasks are seen.
    shown = curves.amplitude.argsort()[TEST_TASKS // 6 :: TEST_TASKS // 3]  # [3]
    support = (test[0][0][shown], test[0][1][shown])
    sinusoid_picture(
        settings.output,
        x=x,
        truth=curves(x)[shown],
        support=support,
        before=predict(maml, support, x, settings.inner_lr, 0),
        after=predict(maml, support, x, settings.inner_lr, TEST_STEPS[-1]),
        joint=predict(joint, support, x, joint_lr, TEST_STEPS[-1]),
        steps=TEST_STEPS[-1],
    )
    Console().print(f"Three of the held-out tasks are drawn in {settings.output}", soft_wrap=True)


def meta_train(model: nn.Module, settings: Settings) -> None:
    """Train `model` so that a few inner steps on a new task go far."""
    tasks = Sinusoid(seed=settings.seed, device=settings.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=META_LR, fused=True)
    progress = Progress("MAML          ", settings.iterations, TASKS)
    executor = ""
    for _ in progress:
        support, query = tasks.sample(TASKS)
        out = fastmeta.maml_step(
            model,
            support,
            query,
            inner_lr=settings.inner_lr,
            inner_steps=settings.inner_steps,
            loss_fn=F.mse_loss,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        progress.loss(out.loss)
        executor = out.executor
    each = 1000 * progress.seconds / progress.done
    Console().print(
        f"{progress.done} meta-steps in {progress.seconds:.0f} s, {each:.2f} ms each, executor "
        f"{executor}"
    )


def joint_train(model: nn.Module, settings: Settings) -> None:
    """Train `model` on the same tasks as if all their examples were of one."""
    tasks = Sinusoid(seed=settings.seed, device=settings.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=META_LR, fused=True)
    progress = Progress("joint training", settings.iterations, TASKS)
    for _ in progress:
        (support_x, support_y), (query_x, query_y) = tasks.sample(TASKS)
        x = torch.cat([support_x, query_x], 1)  # [T, N + Q, 1]
        y = torch.cat([support_y, query_y], 1)
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        progress.loss(loss)


def best_step_size(model: nn.Module, validation: Batch) -> float:
    """Find the step size that serves `model` best when it is fine-tuned to a task."""
    means = [float(errors(model, validation, lr, TEST_STEPS[-1]).mean()) for lr in STEP_SIZES]
    # Too large a step ends in nan, which min would not pass over.
    finite = [mean if math.isfinite(mean) else math.inf for mean in means]
    return STEP_SIZES[finite.index(min(finite))]


def errors(model: nn.Module, batch: Batch, inner_lr: float, steps: int) -> Tensor:
    """Mean squared query error of every task after `steps` inner steps: [T]."""
    support, (query_x, query_y) = batch
    return (predict(model, support, query_x, inner_lr, steps) - query_y).square().mean((1, 2))


@torch.no_grad()  # pyright: ignore[reportUntypedFunctionDecorator]
def predict(
    model: nn.Module, support: tuple[Tensor, Tensor], x: Tensor, inner_lr: float, steps: int
) -> Tensor:
    """Predict at `x`, [T, Q, 1] or [Q, 1] for all, after `steps` inner steps: [T, Q, 1]."""
    x = x.expand(len(support[0]), *x.shape[-2:])
    if steps == 0:
        return model(x)
    tasks = fastmeta.adapt(model, support, inner_lr=inner_lr, inner_steps=steps, loss_fn=F.mse_loss)
    return tasks(x)


def _show_table(maml: list[Tensor], joint: list[Tensor], inner_lr: float, joint_lr: float) -> None:
    table = Table(
        title=f"Mean squared error on {TEST_TASKS} held-out tasks, with 95 % interval",
        caption=(
            f"Inner steps of {inner_lr:g} for MAML, and of {joint_lr:g} for joint training, the "
            f"best of {len(STEP_SIZES)} sizes on {VALIDATION_TASKS} other tasks."
        ),
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("trained by")
    for steps in TEST_STEPS:
        title = "before" if steps == 0 else f"{steps} step{'s' if steps > 1 else ''}"
        table.add_column(title, justify="right")
    table.add_row("MAML", *(str(estimate(values)) for values in maml))
    table.add_row("joint training", *(str(estimate(values)) for values in joint))
    Console().print(table)
