"""Builds fastmeta._C where a C++ compiler is at hand; where none is, fastmeta installs without it.

What happened is written to fastmeta/_build.json, from which `python -m fastmeta info` tells it.

FASTMETA_EXTENSION=0 leaves the extension out, =1 makes a failure to build it an error.

Where nvcc is found too (in CUDA_HOME or on PATH), fastmeta._cuda is built beside it, for the
architectures in FASTMETA_CUDA_ARCHS ("80;90;100") that nvcc knows. FASTMETA_CUDA=0 leaves it out,
=1 makes a failure an error.
"""

import json
import os
import platform
import shutil
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, PlatformError

sys.path.insert(0, str(Path(__file__).parent))  # a build front end need not

import cuda_build
from cuda_build import AGAIN, ExtensionError

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

SELDOM = {
    "lanes_baseline": ["-O2"], "plain": ["-O2"], "conv_baseline": ["-O2"], "conv_plain": ["-O2"],
}  # fmt: skip
"""Units that a processor with those sets runs only when told to; -O2 compiles them sooner."""


class BuildOptionalExtension(build_ext):
    """Tries to build, and records how that went."""

    def run(self) -> None:
        wish = wish_of("FASTMETA_EXTENSION")
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
        record["cuda"] = self.build_cuda(record["built"], inplace)
        # An editable install imports from the checkout, so its record belongs there.
        folder = Path("." if inplace else self.build_lib, "fastmeta")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "_build.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")

    def build_cuda(self, built: bool, inplace: bool) -> dict[str, object]:
        """Tries to build the CUDA kernels; how that went."""
        wish = wish_of("FASTMETA_CUDA")
        result = Path(self.get_ext_filename("fastmeta._cuda"))
        result = result if inplace else Path(self.build_lib, result)
        try:
            if wish == "0":
                raise ExtensionError(
                    "left out on request (FASTMETA_CUDA=0)", f"unset FASTMETA_CUDA and {AGAIN}"
                )
            if not built or self.compiler.compiler_type == "msvc":
                raise ExtensionError("needs fastmeta._C, built by g++ or clang", f"{AGAIN} then")
            nvcc = cuda_build.find_nvcc()
            architectures = cuda_build.known_architectures(nvcc)
            folder = Path(self.build_temp)
            unit, resources = cuda_build.compile_kernels(nvcc, architectures, folder)
            cuda_build.link(nvcc, [str(unit), *self.compile_host(architectures)], result)
        except ExtensionError as error:
            if wish == "1":
                raise
            result.unlink(missing_ok=True)
            print(f"fastmeta: going on without the CUDA kernels: {error}")
            return {"built": False, "reason": str(error), "remedy": error.remedy}
        return {"built": True, "compiler": nvcc, "resources": resources}

    def compile_host(self, architectures: list[str]) -> list[str]:
        """The C++ around the kernels, as object files."""
        import pybind11

        macros = [
            ("FASTMETA_VERSION", f'"{self.distribution.get_version()}"'),
            ("FASTMETA_CUDA_ARCHS", f'"{";".join(architectures)}"'),
        ]
        try:
            return self.compiler.compile(
                [*map(str, sorted(Path("csrc/cuda").glob("*.cpp"))), "csrc/network.cpp"],
                output_dir=str(Path(self.build_temp, "cuda")), macros=macros,
                include_dirs=[pybind11.get_include(), *self.include_dirs],
                extra_postargs=["-std=c++17", "-O2", "-g0", "-fvisibility=hidden"],
            )  # fmt: skip
        except CCompilerError as error:
            raise ExtensionError(
                "the C++ compiler failed on csrc/cuda", "run `pip install -v .` to see what it says"
            ) from error

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
            flags_of = INSTRUCTION_SETS | SELDOM
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


def wish_of(variable: str) -> str:
    """What a variable asks for: "0", "1", or "" where that is left open."""
    wish = os.environ.get(variable, "")
    if wish not in ("", "0", "1"):
        raise SystemExit(
            f"{variable}: was {wish!r}, but must be 0 (leave it out), 1 (fail without it) or unset "
            "(build it where possible)"
        )
    return wish


setup(
    ext_modules=[
        Extension(
            "fastmeta._C",
            sources=sorted(str(s) for s in Path("csrc").rglob("*.cpp") if s.parent.name != "cuda"),
            depends=["pyproject.toml", "setup.py", *sorted(map(str, Path("csrc").rglob("*.h")))],
            language="c++",
        )
    ],
    cmdclass={"build_ext": BuildOptionalExtension},
)
