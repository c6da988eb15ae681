"""Builds fastmeta._C where a C++ compiler is at hand; where none is, fastmeta installs without it.

What happened is written to fastmeta/_build.json, from which `python -m fastmeta info` tells it.

FASTMETA_EXTENSION=0 leaves the extension out, =1 makes a failure to build it an error.
"""

import json
import os
import platform
import shutil
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError, PlatformError

INSTRUCTION_SETS = {
    "lanes_avx2": ["-mavx2", "-mfma"],
    "conv_avx2": ["-mavx2", "-mfma"],
    "lanes_avx512": [
        "-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl",
        "-mprefer-vector-width=512",
    ],
    "conv_avx512": [
        "-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl",
        "-mprefer-vector-width=512",
    ],
}  # fmt: skip

SELDOM = ("lanes_baseline", "plain", "conv_baseline", "conv_plain")
"""Units that a processor with those sets runs only when told to; -O2 compiles them sooner."""

AGAIN = "run `pip install .` again"


class ExtensionError(BaseError):
    """Why the extension was not built, and what a person can do about it."""

    def __init__(self, reason: str, remedy: str) -> None:
        super().__init__(reason)
        self.remedy = remedy


class BuildOptionalExtension(build_ext):
    """Tries to build, and records how that went."""

    def run(self) -> None:
        wish = os.environ.get("FASTMETA_EXTENSION", "")
        if wish not in ("", "0", "1"):
            raise SystemExit(
                f"FASTMETA_EXTENSION: was {wish!r}, but must be 0 (leave the extension out), "
                "1 (fail without it) or unset (build it where possible)"
            )
        # setuptools forgets `inplace` on its way out through an exception.
        inplace = self.inplace
        try:
            if wish == "0":
                raise ExtensionError(
                    "left out on request (FASTMETA_EXTENSION=0)",
                    f"unset FASTMETA_EXTENSION and {AGAIN}",
                )
            super().run()
            record = {
                "built": True,
                "compiler": " ".join(self.compiler_command()),
                "flags": self.extensions[0].extra_compile_args,
            }
        except ExtensionError as error:
            if wish == "1":
                raise
            record = {"built": False, "reason": str(error), "remedy": error.remedy}
            print(f"fastmeta: going on without the compiled extension: {error}")
            self.leave_out_extension(inplace)
        # An editable install imports from the checkout, so its record belongs there.
        folder = Path("." if inplace else self.build_lib, "fastmeta")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def build_extension(self, ext: Extension) -> None:
        self.check_tools()
        import pybind11
        from pybind11.setup_helpers import ParallelCompile

        ext.include_dirs.append(pybind11.get_include())
        ext.define_macros.append(("FASTMETA_VERSION", f'"{self.distribution.get_version()}"'))
        if self.compiler.compiler_type == "msvc":
            ext.extra_compile_args = ["/std:c++17", "/O2", "/EHsc"]
        else:
            # Hidden by default: pybind11's own types must not meet those of another module.
            ext.extra_compile_args = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden"]
            # Nobody asks what a square root leaves in errno, and looking keeps it off vectors.
            ext.extra_compile_args.append("-fno-math-errno")
            # GCC notes that vectors are passed otherwise than it once did; none is passed.
            ext.extra_compile_args += ["-Wno-psabi", "-pthread"]
            ext.extra_link_args.append("-pthread")
            self.give_units_their_flags(ext)
        try:
            with ParallelCompile():  # a unit a core
                super().build_extension(ext)
        except CCompilerError as error:
            # The error itself is the whole command line; what matters went to the build's output.
            raise ExtensionError(
                f"the C++ compiler {self.compiler_command()[0]!r} failed",
                "run `pip install -v .` to see what it says",
            ) from error
        except PlatformError as error:
            raise ExtensionError(f"no C++ compiler: {error}", f"install one and {AGAIN}") from error

    def give_units_their_flags(self, ext: Extension) -> None:
        """Each instruction set is one translation unit, compiled for it and chosen at run time."""
        flags_of = {}
        if platform.machine().lower() in ("x86_64", "amd64"):
            ext.define_macros.append(("FASTMETA_X86", None))
            flags_of = INSTRUCTION_SETS | {unit: ["-O2"] for unit in SELDOM}
        else:
            ext.sources = [s for s in ext.sources if Path(s).stem not in INSTRUCTION_SETS]
        compile_one = self.compiler._compile

        def compile_with_flags(obj, src, ext_name, cc_args, extra_postargs, pp_opts):
            flags = [*extra_postargs, *flags_of.get(Path(src).stem, ())]
            compile_one(obj, src, ext_name, cc_args, flags, pp_opts)

        self.compiler._compile = compile_with_flags

    def check_tools(self) -> None:
        """Finds what is missing by looking for it, because a compiler only says `exit code 1`."""
        compiler = self.compiler_command()[0]
        # MSVC is found by setuptools itself, which says so where it is missing.
        if compiler != "msvc" and shutil.which(compiler) is None:
            raise ExtensionError(
                f"no C++ compiler: {compiler!r} was not found",
                f"install g++ or clang and {AGAIN}",
            )
        if not any(Path(folder, "Python.h").exists() for folder in self.include_dirs):
            raise ExtensionError(
                "Python's headers (Python.h) were not found",
                "install them (python3-dev or python3-devel where Python comes from the system) "
                f"and {AGAIN}",
            )
        try:
            import pybind11  # noqa: F401
        except ImportError:
            raise ExtensionError(
                "pybind11 was not found, and build isolation is off",
                f"`pip install pybind11`, or leave out --no-build-isolation, and {AGAIN}",
            ) from None

    def compiler_command(self) -> list[str]:
        """The C++ compiler with its flags, as setuptools will call it."""
        return list(getattr(self.compiler, "compiler_so_cxx", [self.compiler.compiler_type]))

    def leave_out_extension(self, inplace: bool) -> None:
        # One from an earlier build would be packed into the wheel, or imported from the checkout.
        for ext in self.extensions:
            stale = self.get_ext_filename(self.get_ext_fullname(ext.name))
            Path(self.build_lib, stale).unlink(missing_ok=True)
            if inplace:
                Path(stale).unlink(missing_ok=True)
        self.extensions = []


setup(
    ext_modules=[
        Extension(
            "fastmeta._C",
            sources=sorted(map(str, Path("csrc").rglob("*.cpp"))),
            depends=["pyproject.toml", "setup.py", *sorted(map(str, Path("csrc").rglob("*.h")))],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildOptionalExtension},
)
