"""Small steps of every kind, for a checker that makes each of them slow.

compute-sanitizer --tool memcheck python -m bench.gpu.small
"""

from __future__ import annotations

import itertools
import os
import sys

import torch
import torch.nn.functional as F
from torch import nn

import fastmeta


def networks() -> list[nn.Module]:
    return [
        nn.Sequential(nn.Linear(3, 7), nn.ReLU(), nn.Linear(7, 5)),
        nn.Sequential(nn.Linear(3, 9), nn.BatchNorm1d(9), nn.SiLU(), nn.Linear(9, 5, bias=False)),
        nn.Sequential(nn.Linear(3, 33), nn.Tanh(), nn.Linear(33, 20), nn.GELU(), nn.Linear(20, 5)),
    ]


def main(device: str = "cuda") -> None:
    for form, storage in itertools.product(("primal", "dual"), ("", "workspace")):
        os.environ["FASTMETA_FORM"] = form
        os.environ["FASTMETA_CUDA_STORAGE"] = storage
        for threads in ("32", "256"):
            os.environ["FASTMETA_CUDA_THREADS"] = threads
            for model in networks():
                model.to(device)
                for learned in (None, "layer"):
                    maml = fastmeta.MAML(
                        model, inner_steps=2, executor="fused", learn_inner_lr=learned
                    )
                    x, q = (torch.randn(3, n, 3, device=device) for n in (4, 6))
                    y, p = (torch.randint(5, (3, n), device=device) for n in (4, 6))
                    maml((x, y), (q, p)).loss.backward()
        with torch.no_grad():
            model = networks()[0].to(device)
            targets = torch.randn(3, 4, 5, device=device)
            batch = (torch.randn(3, 4, 3, device=device), targets)
            out = fastmeta.maml_step(model, batch, batch, loss_fn=F.mse_loss, executor="fused")
    print(f"{out.executor}: done")


if __name__ == "__main__":
    main(*sys.argv[1:])
