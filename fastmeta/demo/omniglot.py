"""Omniglot's characters: N-way K-shot classification of characters never seen before."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

import fastmeta
from fastmeta.data import Episodes, omniglot
from fastmeta.demo.algorithms import ALGORITHMS, Trainer
from fastmeta.demo.confidence import Estimate, estimate
from fastmeta.demo.networks import omniglot_conv, omniglot_mlp
from fastmeta.demo.pictures import accuracy_picture, episode_picture
from fastmeta.demo.progress import Progress

FULL = 60_000  # meta-steps of the paper
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

    algorithm: str
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
    algorithm = args.algorithm or "maml"
    _, defaults, _ = ALGORITHMS[algorithm]
    inner_steps = args.inner_steps or defaults.inner_steps
    settings = Settings(
        algorithm=algorithm,
        network=args.network or "mlp",
        ways=args.ways or 5,
        shots=args.shots or 1,
        iterations=args.iterations or (FULL if args.full else 20_000),
        minutes=args.minutes,
        inner_lr=args.inner_lr or defaults.inner_lr,
        inner_steps=inner_steps,
        test_steps=args.test_steps or defaults.test_steps or inner_steps,
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
    shots = ALGORITHMS[settings.algorithm][1].train_shots or settings.shots
    shots = min(shots, images.shape[1] - queries)
    trained = (settings.ways, shots, queries)
    return Splits(
        train=Episodes(images[order[:first]], *trained, seed=settings.seed, rotations=True),
        validation=Episodes(images[order[first:second]], *size, seed=settings.seed + 1),
        test=Episodes(images[order[second:]], *size, seed=settings.seed + 2),
    )


def demonstrate(settings: Settings, splits: Splits) -> None:
    """Meta-train, test on new characters and draw one adapted task.

    **Source:** Finn, Abbeel, Levine (2017), Model-Agnostic Meta-Learning, section 5.2; of other
    algorithms their papers (docs/algorithms.md).
    """
    console = Console(soft_wrap=True)
    torch.manual_seed(settings.seed)
    network = omniglot_mlp if settings.network == "mlp" else omniglot_conv
    model = network(settings.ways).to(settings.device)
    _, _, make = ALGORITHMS[settings.algorithm]
    inner = {"inner_lr": settings.inner_lr, "inner_steps": settings.inner_steps}
    trainer = make(model, inner, settings.iterations)
    curve = meta_train(trainer, splits, settings)

    result = accuracy(trainer, splits.test, TEST_TASKS, settings)
    steps = f"{settings.test_steps} inner step{'s' if settings.test_steps > 1 else ''}"
    after = "" if settings.algorithm == "prototypical" else f"after {steps} "
    console.print(
        f"{settings.ways}-way {settings.shots}-shot, {settings.network}: {result.percent()} of the "
        f"query images right (95 % interval), {splits.test.queries} a class, {after}in each "
        f"of {TEST_TASKS} tasks made of characters that training never saw"
    )
    draw_task(trainer, splits.test, settings, title=f"A new task, {after or 'by its prototypes'}")
    console.print(f"One more test task is drawn in {settings.output}")
    if len(curve) > 1:
        path = settings.output.with_stem(f"{settings.output.stem}-curve")
        accuracy_picture(path, curve, result)
        console.print(f"How accuracy on validation characters grew is drawn in {path}")


def meta_train(trainer: Trainer, splits: Splits, settings: Settings) -> list[tuple[int, Estimate]]:
    """Train a model to tell characters apart by a handful of images.

    **Returns:** meta-steps and the accuracy on validation characters after them, a few times.
    """
    title, defaults, _ = ALGORITHMS[settings.algorithm]
    curve: list[tuple[int, Estimate]] = []
    progress = Progress(title, settings.iterations, defaults.tasks, settings.minutes)
    looks = 0
    executor = ""
    for _ in progress:
        out = trainer.step(*splits.train.sample(defaults.tasks))
        trainer.optimizer.zero_grad()
        out.loss.backward()
        trainer.optimizer.step()
        if trainer.schedule is not None:
            trainer.schedule.step()
        progress.loss(out.loss)
        executor = out.executor
        if progress.fraction_with_this * LOOKS >= looks + 1:
            looks = int(progress.fraction_with_this * LOOKS)
            seen = accuracy(trainer, splits.validation, VALIDATION_TASKS, settings)
            progress.note(f"validation accuracy {seen.percent()}")
            curve.append((progress.done + 1, seen))
    each = 1000 * progress.seconds / progress.done
    Console().print(
        f"{progress.done} meta-steps in {progress.seconds:.0f} s, {each:.2f} ms each, executor "
        f"{executor}"
    )
    return curve


def accuracy(trainer: Trainer, episodes: Episodes, tasks: int, settings: Settings) -> Estimate:
    """Share of query images that fresh tasks get right."""
    sizes = [min(TASKS_AT_ONCE, tasks - start) for start in range(0, tasks, TASKS_AT_ONCE)]
    steps = None if settings.algorithm == "prototypical" else settings.test_steps
    batches = map(episodes.sample, sizes)
    return estimate(fastmeta.evaluate(trainer.tested, batches, inner_steps=steps).values)


def draw_task(trainer: Trainer, episodes: Episodes, settings: Settings, title: str) -> None:
    """Draw a fresh task with what becomes of its query images."""
    (support_x, support_y), (query_x, query_y) = episodes.sample(1)
    scores = trainer.predict((support_x, support_y), (query_x, query_y), settings.test_steps)
    episode_picture(
        settings.output,
        title,
        support=(support_x[0], support_y[0]),
        query=(query_x[0], query_y[0]),
        probabilities=scores[0].softmax(-1),
    )
