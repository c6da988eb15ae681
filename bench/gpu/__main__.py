"""Every form of a meta-step on one device, checked before timed, as one table.

python -m bench.gpu                                   the first CUDA device
python -m bench.gpu --only "W5s, T=32" "W6, T=4"      the layered step, TRITON_INTERPRET=0
bash bench/gpu.sh                                     without a GPU, a dry run on the host

A form is timed only where its loss and meta-gradient agree with the plain loop in float64, at 25
tasks or fewer. Figures are medians: *ms* between events around each call, *waited* until the
host has the result. fastmeta is given other data at each call; a workload's floor is `floor.py`'s.
Convolutional networks are checked in float32 and timed with TF32 products for every side; a form
that is named TF32 is checked in both.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from bench import agreement, compare
from bench.gpu import floor, forms, timing
from bench.gpu.precision import allow_tf32
from bench.peers.peer import Form, NotServed, Peer, Step
from bench.workloads import WORKLOADS, Workload, mlp

Record = dict[str, Any]

CHECKED, CHECKED_OF_IMAGES = 25, 2
"""Tasks of the batch on which a form is checked."""
OF_TF32 = 2.0**-10
"""Between 1 and the next number of TF32."""
ROTATED = 3
"""Batches in turn."""


def workloads() -> dict[str, Workload]:
    """The goals' first, then the others from few tasks to many, then the convolutional ones."""
    tiny = Workload("tiny", lambda: mlp(2, 5, 3), 3, (2,), 3, 4, 5, 2)
    block = Workload("tiny block", tiny_block, 2, (1, 4, 4), 2, 2, 2, 1)
    found = [
        WORKLOADS["W1b"], WORKLOADS["W1c"], WORKLOADS["W2b"], WORKLOADS["W4"], WORKLOADS["W1"],
        WORKLOADS["W3"],
        *(WORKLOADS["W1b"].with_tasks(tasks) for tasks in (1, 100, 10_000)),
        *(WORKLOADS["W2"].with_tasks(tasks) for tasks in (32, 1000)),
        *(WORKLOADS["W4"].with_tasks(tasks) for tasks in (1, 1000)),
        WORKLOADS["W5s"], WORKLOADS["W6"].with_tasks(4), WORKLOADS["W5"].with_tasks(32),
    ]  # fmt: skip
    named = {f"{workload.name}, T={workload.tasks}": workload for workload in found}
    return named | {tiny.name: tiny, block.name: block}


def tiny_block() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 2, 3),
        nn.BatchNorm2d(2, track_running_stats=False),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def measure(
    workload: Workload, peers: Sequence[Peer], device: torch.device, seconds: float, limit: int
) -> list[Record]:
    """One record a form: timed, or why not."""
    torch.compiler.reset()
    checked = CHECKED_OF_IMAGES if workload.of_images else CHECKED
    small = workload.with_tasks(min(workload.tasks, checked))
    reference = agreement.reference(small)
    records: list[Record] = []
    for peer in peers:
        for name, form in peer.forms.items():
            if workload.name not in forms.ROUNDED.get(name, (workload.name,)):
                continue
            rounded = name in forms.ROUNDED
            record: Record = {"peer": peer.name, "role": peer.role, "form": name}
            records.append(record)
            try:
                if missing := peer.missing():
                    raise NotServed(missing)
                with compare._time_limit(limit):
                    allow_tf32(False)
                    _check(small, peer, form, device, reference, record)
                    allow_tf32(workload.of_images or rounded)
                    if rounded:
                        _check_rounded(small, peer, form, device, reference, record)
                    record |= _time(workload, peer, form, device, seconds)
            except Exception as reason:  # a peer may fail in any way, and the others go on
                record["why"] = compare._in_words(reason)
    allow_tf32(False)
    return records


def _step(
    workload: Workload, peer: Peer, form: Form, device: torch.device, dtype: torch.dtype, seed: int
) -> Step:
    made = workload.make(seed, dtype)
    if peer.name not in forms.OWN_DEVICE:
        made = pytree.tree_map(
            lambda x: x.to(device) if isinstance(x, torch.Tensor | nn.Module) else x, made
        )
    model, support, query = made
    return form(workload, copy.deepcopy(model), support, query)


def _check(
    workload: Workload, peer: Peer, form: Form, device: torch.device,
    reference: agreement.Reference, record: Record,
) -> None:  # fmt: skip
    if not peer.second_order:
        return
    for dtype in (torch.float32, torch.float64):
        step = _step(workload, peer, form, device, dtype, 0)
        loss, gradients = step.read(step.call())
        error = reference.error((loss, [g.cpu() for g in gradients]))
        record["error" if dtype == torch.float32 else "error_float64"] = error
        if error <= reference.tolerance(dtype):
            return
        if error > reference.tie:
            break
    raise NotServed(f"disagrees with float64 autograd by {error:.1e}")


def _check_rounded(
    workload: Workload, peer: Peer, form: Form, device: torch.device,
    reference: agreement.Reference, record: Record,
) -> None:  # fmt: skip
    step = _step(workload, peer, form, device, torch.float32, 0)
    loss, gradients = step.read(step.call())
    record["error_tf32"] = reference.error((loss, [g.cpu() for g in gradients]))
    if record["error_tf32"] > max(OF_TF32 * reference.roundings, reference.tie):
        raise NotServed(f"in TF32 it is off by {record['error_tf32']:.1e}")


def _time(
    workload: Workload, peer: Peer, form: Form, device: torch.device, seconds: float
) -> Record:
    batches = ROTATED if peer.role == "fastmeta" else 1
    calls = [
        _step(workload, peer, form, device, torch.float32, seed).call for seed in range(batches)
    ]
    waits = peer.name in forms.OWN_DEVICE
    return asdict(timing.times(calls, device, seconds, waits))


def table(results: dict[str, list[Record]], floors: dict[str, float]) -> str:
    """A row a workload: the floor, fastmeta's forms, then the best form of each peer, in ms."""
    peers = [peer for peer in forms.PEERS if peer.role != "fastmeta"]
    own = list(forms.FASTMETA.forms)
    header = ["workload", "floor", *(f"fastmeta {name}" for name in own), *(p.name for p in peers)]
    lines = [_row(header), _row(["---"] * len(header))]
    for name, records in results.items():
        cells = [_ms(next((r for r in records if r["form"] == form), None), "ms") for form in own]
        for peer in peers:
            timed = [r for r in records if r["peer"] == peer.name and "ms" in r]
            best = min(timed, key=lambda r: r["waited_ms"], default=None)
            cells.append(_ms(best, "waited_ms" if peer.name in forms.OWN_DEVICE else "ms"))
        lines.append(_row([name, f"{floors[name]:.4f}", *cells]))
    left_out = [
        f"- {name}: {r['peer']}, {r['form']}: {r['why']}"
        for name, records in results.items()
        for r in records
        if "why" in r
    ]
    return "\n".join(["Not timed:", *left_out, "", *lines])


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _ms(record: Record | None, kind: str) -> str:
    return "–" if record is None or "ms" not in record else f"{record[kind]:.4g}"


def about(device: torch.device) -> Record:
    """Machine and versions, on which the figures depend."""
    facts = {**compare.machine(torch.get_num_threads()), "device": str(device)}
    facts["cuda"] = torch.version.cuda
    if device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(device)
    root = Path(__file__).parent
    asked = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=False
    )
    return {**facts, "commit": asked.stdout.strip() or os.environ.get("FASTMETA_COMMIT", "")}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    known = workloads()
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=known,
        default=[n for n, w in known.items() if not (w.of_images or w.name == "tiny")],
    )
    parser.add_argument("--peers", nargs="+", default=[peer.name for peer in forms.PEERS])
    parser.add_argument("--seconds", type=float, default=0.5, help="of each form, per workload")
    parser.add_argument("--limit", type=int, default=40, help="seconds for a form in all")
    parser.add_argument("--deadline", type=float, default=240, help="seconds for everything")
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    args = parser.parse_args(arguments)
    end = time.monotonic() + args.deadline
    device = torch.device(args.device)
    peers = [peer for peer in forms.PEERS if peer.name in args.peers]
    results: dict[str, list[Record]] = {}
    floors: dict[str, float] = {}
    facts = about(device)
    # A compiler takes longer than all others together: it comes when these are done.
    slow = [peer for peer in peers if peer.name in forms.SLOW]
    quick = [peer for peer in peers if peer not in slow]
    for name, chosen in [(name, group) for group in (quick, slow) if group for name in args.only]:
        left = int(end - time.monotonic())
        names = ", ".join(peer.name for peer in chosen)
        if left < 5:
            print(f"... no time is left for {name}: {names}", file=sys.stderr)
            continue
        print(f"... {name}: {names}", file=sys.stderr, flush=True)
        workload = replace(known[name], name=name)
        model = workload.network()
        floors[name] = floor.milliseconds(workload, model, floor.multiprocessors(device))
        records = measure(workload, chosen, device, args.seconds, min(args.limit, left))
        results.setdefault(name, []).extend(records)
        if args.output:  # after each: a run may be cut short
            args.output.parent.mkdir(parents=True, exist_ok=True)
            whole = {**facts, "floors": floors, "results": results}
            args.output.write_text(json.dumps(whole, indent=1) + "\n")
    print(f"{facts['device']}, torch {torch.__version__}, {facts['date']}, {facts['commit'][:12]}")
    print(table(results, floors))


if __name__ == "__main__":
    main()
