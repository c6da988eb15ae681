"""MAML on the Omniglot characters: N-way K-shot classification of characters never seen before."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor, nn

import fastmeta
from fastmeta.data import Episodes, omniglot
from fastmeta.demo.confidence import Estimate, estimate
from fastmeta.demo.networks import not_batch_norm, omniglot_conv, omniglot_mlp
from fastmeta.demo.pictures import accuracy_picture, episode_picture
from fastmeta.demo.progress import Progress

TASKS = 32  # of one meta-step
FULL = 60_000  # meta-steps of the paper
META_LR = 1e-3
TEST_TASKS = 600
VALIDATION_TASKS = 200
TASKS_AT_ONCE = 50  # of an evaluation: every task has weights of its own in memory
LOOKS = 10  # at the validation accuracy, in one run
# Of 1,623 characters; a smaller copy of the data is divided in the same proportion.
CHARACTERS, TRAINING, VALIDATION = 1623, 1100, 100
SPLIT_SEED = 0  # the same characters are held out, whatever --seed says


@dataclass(frozen=True)
class Settings:
    """What the command line decides."""

    network: str
    ways: int
    shots: int
    iterations: int
    minutes: float | None
    inner_lr: float
    inner_steps: int
    test_steps: int
    seed: int
    device: str
    output: Path


@dataclass(frozen=True)
class Splits:
    """Episodes of characters for training, validation and test; no character is in two of them."""

    train: Episodes
    validation: Episodes
    test: Episodes


def prepare(args: argparse.Namespace) -> Callable[[], None]:
    """Check the arguments and read the data; returns the demonstration, ready to be called."""
    if args.data is None:
        raise ValueError(
            "--data: not given. Omniglot is published at github.com/brendenlake/omniglot: download "
            "python/images_background.zip and python/images_evaluation.zip into one folder and "
            "name that folder"
        )
    inner_steps = args.inner_steps or 1
    settings = Settings(
        network=args.network or "mlp",
        ways=args.ways or 5,
        shots=args.shots or 1,
        iterations=args.iterations or (FULL if args.full else 20_000),
        minutes=args.minutes,
        inner_lr=args.inner_lr or 0.4,
        inner_steps=inner_steps,
        test_steps=args.test_steps or inner_steps,
        seed=args.seed,
        device=args.device,
        output=args.output,
    )
    images = omniglot(args.data).images.to(settings.device)
    return partial(demonstrate, settings, split(images, settings, queries=args.queries or 1))


def split(images: Tensor, settings: Settings, queries: int) -> Splits:
    """Divide the characters, [C, E, H, W], into training (with rotations), validation and test."""
    characters = len(images)
    generator = torch.Generator().manual_seed(SPLIT_SEED)
    order = torch.randperm(characters, generator=generator).to(images.device)
    first = round(characters * TRAINING / CHARACTERS)
    second = first + round(characters * VALIDATION / CHARACTERS)
    images = images[:, :, None]  # [C, E, 1, H, W]
    size = (settings.ways, settings.shots, queries)
    return Splits(
        train=Episodes(images[order[:first]], *size, seed=settings.seed, rotations=True),
        validation=Episodes(images[order[first:second]], *size, seed=settings.seed + 1),
        test=Episodes(images[order[second:]], *size, seed=settings.seed + 2),
    )


def demonstrate(settings: Settings, splits: Splits) -> None:
    """Meta-train, test on new characters and draw one adapted task.

    **Source:** Finn, Abbeel, Levine (2017), Model-Agnostic Meta-Learning, section 5.2.
    """
    console = Console(soft_wrap=True)
    torch.manual_seed(settings.seed)
    network = omniglot_mlp if settings.network == "mlp" else omniglot_conv
    model = network(settings.ways).to(settings.device)
    curve = meta_train(model, splits, settings)

    result = accuracy(model, splits.test, TEST_TASKS, settings)
    steps = f"{settings.test_steps} inner step{'s' if settings.test_steps > 1 else ''}"
    console.print(
        f"{settings.ways}-way {settings.shots}-shot, {settings.network}: {result.percent()} of the "
        f"query images right (95 % interval), {splits.test.queries} a class, after {steps} in each "
        f"of {TEST_TASKS} tasks made of characters that training never saw"
    )
    draw_task(model, splits.test, settings, title=f"A new task, after {steps}")
    console.print(f"One more test task is drawn in {settings.output}")
    if len(curve) > 1:
        path = settings.output.with_stem(f"{settings.output.stem}-curve")
        accuracy_picture(path, curve, result)
        console.print(f"How accuracy on validation characters grew is drawn in {path}")


def meta_train(model: nn.Module, splits: Splits, settings: Settings) -> list[tuple[int, Estimate]]:
    """Train `model` so that a few inner steps on a handful of images tell characters apart.

    **Returns:** meta-steps and the accuracy on validation characters after them, a few times.
    """
    curve: list[tuple[int, Estimate]] = []
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=META_LR, fused=True)
    progress = Progress("MAML", settings.iterations, TASKS, settings.minutes)
    looks = 0
    executor = ""
    for _ in progress:
        support, query = splits.train.sample(TASKS)
        out = fastmeta.maml_step(
            model,
            support,
            query,
            inner_lr=settings.inner_lr,
            inner_steps=settings.inner_steps,
            loss_fn=F.cross_entropy,
            adapt=not_batch_norm,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        progress.loss(out.loss)
        executor = out.executor
        if progress.fraction_with_this * LOOKS >= looks + 1:
            looks = int(progress.fraction_with_this * LOOKS)
            seen = accuracy(model, splits.validation, VALIDATION_TASKS, settings)
            progress.note(f"validation accuracy {seen.percent()}")
            curve.append((progress.done + 1, seen))
    each = 1000 * progress.seconds / progress.done
    Console().print(
        f"{progress.done} meta-steps in {progress.seconds:.0f} s, {each:.2f} ms each, executor "
        f"{executor}"
    )
    return curve


def accuracy(model: nn.Module, episodes: Episodes, tasks: int, settings: Settings) -> Estimate:
    """Share of query images that the adapted networks of `tasks` fresh tasks get right."""
    parts: list[Tensor] = []
    for start in range(0, tasks, TASKS_AT_ONCE):
        support, query = episodes.sample(min(TASKS_AT_ONCE, tasks - start))
        right = predict(model, support, query[0], settings).argmax(-1) == query[1]  # [T, Q]
        parts.append(right.double().mean(1))
    return estimate(torch.cat(parts))


@torch.no_grad()  # pyright: ignore[reportUntypedFunctionDecorator]
def predict(
    model: nn.Module, support: tuple[Tensor, Tensor], x: Tensor, settings: Settings
) -> Tensor:
    """Logits, [T, Q, ways], of the networks adapted to each task for its images [T, Q, ...]."""
    tasks = fastmeta.adapt(
        model,
        support,
        inner_lr=settings.inner_lr,
        inner_steps=settings.test_steps,
        loss_fn=F.cross_entropy,
        adapt=not_batch_norm,
    )
    return tasks(x)


def draw_task(model: nn.Module, episodes: Episodes, settings: Settings, title: str) -> None:
    """Draw a fresh task with what the adapted network makes of its query images."""
    (support_x, support_y), (query_x, query_y) = episodes.sample(1)
    logits = predict(model, (support_x, support_y), query_x, settings)
    episode_picture(
        settings.output,
        title,
        support=(support_x[0], support_y[0]),
        query=(query_x[0], query_y[0]),
        probabilities=logits[0].softmax(-1),
    )
