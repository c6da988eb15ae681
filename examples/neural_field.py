"""Meta-learn the start of a neural field: a network that becomes a given image in two steps.

    python examples/neural_field.py --data FOLDER_OF_MNIST
    python examples/neural_field.py --data FOLDER_OF_OMNIGLOT --dataset omniglot

Each image is a task: a SIREN maps a pixel's coordinates to its grey value. MAML finds weights from
which a few gradient steps fit any image of the data set, and one learning rate for each parameter
tensor. Prints the reconstruction quality (PSNR) on held-out images after 0 to 8 inner steps, beside
a random start with its own best learning rates, and draws the reconstructions.

Method: Tancik et al. (2021), Learned Initializations for Optimizing Coordinate-Based Neural
Representations, arXiv:2012.02189. Network: Sitzmann et al. (2020), Implicit Neural Representations
with Periodic Activation Functions, arXiv:2006.09661.
"""

import argparse
import copy
import math
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import Tensor, nn

import fastmeta
from fastmeta.data import mnist, omniglot

TASKS = 4  # images in one meta-step
INNER_STEPS = 2  # in meta-training
META_LR, RATES_LR = 5e-4, 1e-3
TEST_STEPS = (0, 1, 2, 4, 8)
TEST_IMAGES, SEARCH_IMAGES, SHOWN_IMAGES = 100, 10, 8
SEARCHED_LRS = (1e-4, 3e-4, 1e-3, 3e-3, 0.01, 0.03, 0.1)  # for the random start
HELD_OUT_CHARACTERS = 400  # of Omniglot's 1,623

Batch = tuple[Tensor, Tensor]
Rule = fastmeta.inner.InnerOptimizer


class Siren(nn.Module):
    """A network with sine activations, 2 -> 64 -> 64 -> 64 -> 1: coordinates to grey value."""

    def __init__(self, width: int = 64, frequency: float = 30.0) -> None:
        super().__init__()
        self.frequency = frequency
        layers = [nn.Linear(i, o) for i, o in pairwise([2, width, width, width, 1])]
        nn.init.uniform_(layers[0].weight, -1 / 2, 1 / 2)
        bound = math.sqrt(6 / width) / frequency  # gives the argument of each sine unit variance
        for layer in layers[1:]:
            nn.init.uniform_(layer.weight, -bound, bound)
        self.hidden, self.output = nn.ModuleList(layers[:-1]), layers[-1]

    def forward(self, x: Tensor) -> Tensor:
        """Compute grey values [..., 1] at coordinates [..., 2]."""
        for layer in self.hidden:
            x = torch.sin(self.frequency * layer(x))
        return self.output(x)


def load_images(dataset: str, folder: Path) -> tuple[Tensor, Tensor]:
    """Read images to learn from and held-out images in random order, each uint8 [M, 28, 28]."""
    if dataset == "mnist":
        train, test = mnist(folder)[0], mnist(folder, train=False)[0]
    else:
        images = omniglot(folder).images  # [C, E, 28, 28]
        images = images[torch.randperm(len(images))]
        test = images[:HELD_OUT_CHARACTERS].flatten(0, 1)
        train = images[HELD_OUT_CHARACTERS:].flatten(0, 1)
    return train[torch.randperm(len(train))], test[torch.randperm(len(test))]


def as_tasks(images: Tensor) -> Batch:
    """Turn images [T, H, W] into tasks: coordinates [T, HW, 2] and grey values [T, HW, 1]."""
    rows, columns = (torch.linspace(-1, 1, size) for size in images.shape[1:])
    coordinates = torch.cartesian_prod(rows, columns)  # [HW, 2]
    return coordinates.expand(len(images), -1, -1), images.flatten(1).unsqueeze(-1) / 255


def meta_train(model: nn.Module, rates: dict[str, Tensor], images: Tensor, steps: int) -> None:
    """Train the model's parameters and the learning rates of the inner loop."""
    weights = {"params": list(model.parameters()), "lr": META_LR}
    optimizer = torch.optim.Adam([weights, {"params": list(rates.values()), "lr": RATES_LR}])
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    start = time.perf_counter()
    for step in range(1, steps + 1):
        tasks = as_tasks(images[torch.randint(len(images), (TASKS,))])
        out = fastmeta.maml_step(
            model,
            support=tasks,
            query=tasks,  # every pixel serves both: the aim is to store the image
            inner_lr=rates,
            inner_steps=INNER_STEPS,
            loss_fn=F.mse_loss,
        )
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
        decay.step()
        if step % max(1, steps // 10) == 0:
            quality = -10 * math.log10(out.loss.item())
            speed = 1000 * (time.perf_counter() - start) / step
            print(f"meta-step {step:5d}  PSNR {quality:4.1f} dB  {speed:.0f} ms each", flush=True)


def reconstruct(
    model: nn.Module, tasks: Batch, inner_lr: Any, steps: int, rule: Rule | None = None
) -> Tensor:
    """Fit the model to each image by `steps` inner steps; returns the grey values [T, HW, 1]."""
    adapted = fastmeta.adapt(
        model, tasks, inner_lr=inner_lr, inner_steps=steps, inner_optimizer=rule, loss_fn=F.mse_loss
    )
    return adapted(tasks[0])


def psnr(prediction: Tensor, truth: Tensor) -> float:
    """Compute the peak signal-to-noise ratio in dB, averaged over images [T, HW, 1]."""
    return float(-10 * (prediction - truth).square().mean((1, 2)).log10().mean())


def best_psnr(model: nn.Module, search: Batch, test: Batch, steps: int, rule: Rule) -> float:
    """Compute the PSNR on `test` with the learning rate that is best on `search`."""

    def quality(tasks: Batch, inner_lr: float) -> float:
        return psnr(reconstruct(model, tasks, inner_lr, steps, rule), tasks[1])

    return quality(test, max(SEARCHED_LRS, key=lambda inner_lr: quality(search, inner_lr)))


def draw(path: Path, rows: dict[str, Tensor]) -> None:
    """Draw rows of square images [T, HW, 1], with a label to the left of each row."""
    figure = Figure(figsize=(SHOWN_IMAGES, len(rows)), layout="constrained")
    panels = figure.subplots(len(rows), SHOWN_IMAGES)
    for row, (label, images) in zip(panels, rows.items(), strict=True):
        row[0].set_ylabel(label)
        for panel, image in zip(row, images, strict=False):
            side = math.isqrt(len(image))
            panel.imshow(image.detach().view(side, side).numpy(), cmap="gray", vmin=0, vmax=1)
            panel.set(xticks=[], yticks=[])
    figure.savefig(path, dpi=100)


def main(argv: list[str] | None = None) -> dict[str, list[float]]:
    """Meta-train, print the table and save the picture; returns the table."""
    parser = argparse.ArgumentParser(description="A meta-learned SIREN")
    parser.add_argument("--data", type=Path, required=True, help="folder of the published files")
    parser.add_argument("--dataset", choices=["mnist", "omniglot"], default="mnist")
    parser.add_argument("--steps", type=int, default=3000, help="meta-steps (%(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("neural_field.png"), help="the picture")
    args = parser.parse_args(argv)

    torch.manual_seed(args.seed)
    train, test = load_images(args.dataset, args.data)
    random_start = Siren()
    model = copy.deepcopy(random_start)
    rates: dict[str, Tensor] = {
        name: nn.Parameter(torch.tensor(0.01)) for name, _ in model.named_parameters()
    }
    meta_train(model, rates, train, args.steps)

    search, tasks = as_tasks(train[:SEARCH_IMAGES]), as_tasks(test[:TEST_IMAGES])
    images = {f"K = {k}": reconstruct(model, tasks, rates, k) for k in TEST_STEPS}
    table = {"meta-learned start": [psnr(image, tasks[1]) for image in images.values()]}
    rules = {"gradient descent": fastmeta.inner.SGD(), "Adam": fastmeta.inner.Adam()}
    for name, rule in rules.items():
        row = [best_psnr(random_start, search, tasks, k, rule) for k in TEST_STEPS]
        table[f"random start, {name}"] = row

    print(f"PSNR in dB on {TEST_IMAGES} held-out images, by the number of inner steps")
    print(" " * 30 + "".join(f"{k:8d}" for k in TEST_STEPS))
    for name, row in table.items():
        print(f"{name:30}" + "".join(f"{quality:8.1f}" for quality in row))
    draw(args.out, images | {"truth": tasks[1]})
    print(f"Reconstructions from the meta-learned start: {args.out}")
    return table


if __name__ == "__main__":
    main()
