"""The compiled steps under the compiler's sanitizers, without Python: `make sanitize`."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import compiling

# Without optimisation nothing undefined is optimised away, and the units compile much faster.
FLAGS = ("-O0", "-g1", "-fno-sanitize-recover=all")
PROGRAMS = {
    "address,undefined": {"engines_agree": "120", "conv_agrees": "48", "pool_is_shared": "100"},
    "thread": {"engines_agree": "24", "conv_agrees": "12", "pool_is_shared": "100"},
}
# The thread sanitizer would have every forked child wait for a second before it ends.
OPTIONS = {"TSAN_OPTIONS": "atexit_sleep_ms=0"}


def main() -> int:
    if compiling.COMPILER is None:
        print("make sanitize: no C++ compiler; install g++, or set CXX to one", file=sys.stderr)
        return 1
    failed: list[str] = []
    for sanitizer, programs in PROGRAMS.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            flags = (*FLAGS, f"-fsanitize={sanitizer}")
            objects = compiling.compile_units(folder, *flags)
            for name, count in programs.items():
                program = compiling.link_program(name, objects, folder, *flags)
                print(f"{sanitizer}: {name} {count}", flush=True)
                run = subprocess.run([program, count], env={**os.environ, **OPTIONS})
                if run.returncode != 0:
                    failed.append(f"{name} under {sanitizer}")
    if failed:
        print("make sanitize:", "; ".join(failed), "failed", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
