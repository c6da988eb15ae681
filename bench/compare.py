"""fastmeta beside every other way to do MAML, one thread, interleaved, checked before timed.

python -m bench.compare                              all workloads and peers
python -m bench.compare --only W1b "W3 at T=1"       some workloads
python -m bench.compare --peers "JAX jit" "fastmeta fused" --output FILE.json

Each peer comes in several forms, and its figure is that of the fastest. A form is timed only
where its loss and its meta-gradient agree with the plain loop in float64, and where it keeps to
the threads allowed. How times are taken stands in `bench/rounds.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import importlib.metadata
import json
import os
import platform
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from bench import agreement, cores, rounds, table
from bench.peers import PEERS
from bench.peers.peer import Form, NotServed, Peer, Step
from bench.table import Record
from bench.workloads import WORKLOADS, Workload

MLPS = (
    "W1", "W1b", "W1b at T=1", "W1c", "W1r", "W2", "W2b", "W3", "W3 at T=1", "W3 at T=4", "W4",
    "W7", "W7s", "W8", "W8b",
)  # fmt: skip
WITH_NORMS_AND_SUMS = ("LayerNorm", "residual")
PACKAGES = (
    "fastmeta", "torch", "numpy", "learn2learn", "higher", "torchopt", "torchmeta", "jax", "jaxlib",
)  # fmt: skip


def compare(
    workload: Workload,
    peers: Sequence[Peer],
    seconds: float,
    threads: int = 1,
    first_call_limit: int = 300,
) -> list[Record]:
    """One record a form: timed, or why not."""
    # Compiled code of the workload before would be tried first at every call.
    torch.compiler.reset()
    reference = agreement.reference(workload)
    records: list[Record] = []
    calls: dict[str, Callable[[], object]] = {}
    for peer in peers:
        about: Record = {"peer": peer.name, "role": peer.role}
        if missing := peer.missing():
            records.append({**about, "form": "", "why": missing})
            continue
        for name, form in peer.forms.items():
            record = {**about, "form": name}
            records.append(record)
            try:
                step = _checked(workload, peer, form, reference, first_call_limit, record)
                record["cores_used"] = cores.used(step.call)
                if record["cores_used"] > 1.1 * threads:
                    raise NotServed(f"uses {record['cores_used']:.1f} cores, not {threads}")
                calls[f"{peer.name}, {name}"] = step.call
            except Exception as reason:  # a peer may fail in any way, and the others go on
                record["why"] = _in_words(reason)
    timings = rounds.times(calls, seconds)
    for record in records:
        if timing := timings.get(f"{record['peer']}, {record['form']}"):
            record |= asdict(timing)
    return records


def _checked(
    workload: Workload,
    peer: Peer,
    form: Form,
    reference: agreement.Reference,
    limit: int,
    record: Record,
) -> Step:
    """The step over float32 data; **raises** `NotServed` where its numbers are not the oracle's.

    What is found on the way goes into the record, whatever comes of it.
    """
    step, result, first_call = _first(workload, form, torch.float32, limit)
    record |= {"first_call_s": first_call, "error": None, "error_float64": None, "tolerance": None}
    if not peer.second_order:
        return step
    record["tolerance"] = reference.tolerance(torch.float32)
    for dtype, name in ((torch.float32, "error"), (torch.float64, "error_float64")):
        if dtype == torch.float64:
            _, result, _ = _first(workload, form, dtype, limit)
        record[name] = error = reference.error(result)
        tolerance = reference.tolerance(dtype)
        if error <= tolerance:
            return step
        if dtype == torch.float64 or error > reference.tie:
            break
    raise NotServed(
        f"disagrees with float64 autograd by {error:.1e}, where rounding explains {tolerance:.1e}"
    )


def _first(
    workload: Workload, form: Form, dtype: torch.dtype, limit: int
) -> tuple[Step, Any, float]:
    """The step, what its first call gave, and how long it took to get there."""
    model, support, query = workload.make(dtype=dtype)
    with _time_limit(limit):
        start = time.perf_counter()
        step = form(workload, copy.deepcopy(model), support, query)
        output = step.call()
        seconds = time.perf_counter() - start
    return step, step.read(output), seconds


@contextlib.contextmanager
def _time_limit(seconds: int) -> Iterator[None]:
    """Breaks off a hopeless compilation; where the system has alarms."""
    if not hasattr(signal, "SIGALRM"):
        yield
        return

    def ring(*_: object) -> None:
        raise TimeoutError(f"its first call took over {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _in_words(reason: BaseException) -> str:
    """The first line of what went wrong; a compiler wraps what stopped it."""
    cause: BaseException | None = reason
    while cause is not None and not isinstance(cause, TimeoutError):
        cause = cause.__cause__ or cause.__context__
    reason = cause or reason
    line = next(iter(str(reason).splitlines()), "")
    known = isinstance(reason, (NotServed, TimeoutError))
    return line if known else f"{type(reason).__name__}: {line}"


def machine(threads: int) -> Record:
    """Machine and versions, on which the figures depend."""
    versions: dict[str, str] = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return {
        "date": datetime.date.today().isoformat(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "versions": versions,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=WORKLOADS,
        metavar="WORKLOAD",
        default=MLPS + WITH_NORMS_AND_SUMS,
    )
    parser.add_argument("--peers", nargs="+", choices=PEERS, default=list(PEERS), metavar="PEER")
    parser.add_argument("--seconds", type=float, default=2.0, help="of each form, per workload")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit", type=int, default=300, help="seconds for a form's first call")
    parser.add_argument("--output", type=Path, help="write the records as JSON")
    return parser.parse_args()


def main() -> None:
    args = _arguments()
    cores.restrict(args.threads)
    about = machine(args.threads)
    print(f"{about['processor']}, {args.threads} thread(s), {about['date']}")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()))
    results: dict[str, list[Record]] = {}
    # A compilation that was broken off leaves files behind which would break the next run.
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = cache
        for name in args.only:
            print(f"... {name}", file=sys.stderr, flush=True)
            results[name] = compare(
                WORKLOADS[name],
                [PEERS[peer] for peer in args.peers],
                args.seconds,
                args.threads,
                args.limit,
            )
            if args.output:  # after every workload: a long run may be cut short
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps({**about, "results": results}, indent=1) + "\n")
    print(f"\n{table.summary(results)}\n\n{table.forms(results)}\n\nNot timed:\n")
    print(table.left_out(results) or "- nothing")


if __name__ == "__main__":
    main()
