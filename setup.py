"""Builds the native CPU kernels where a C compiler is found; all else about the package is in pyproject.toml."""

import glob

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

FOLDER = "glmamba_monai/ops/native"


class BuildKernels(build_ext):
    """Builds a plain shared library: Python finds it by ctypes, so it needs no headers of Python."""

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return ext.export_symbols


setup(
    ext_modules=[
        Extension(
            "glmamba_monai.ops.native._kernels",
            sources=sorted(glob.glob(f"{FOLDER}/*.c")),
            depends=sorted(glob.glob(f"{FOLDER}/*.h")),
            # Fused multiply-add, and no bookkeeping of floating-point exceptions; results stay IEEE otherwise.
            extra_compile_args=[
                "-std=c11",
                "-O3",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
            ],
            export_symbols=["glmamba_interface", "glmamba_kernels"],
            optional=True,
        )
    ],
    cmdclass={"build_ext": BuildKernels},
)
