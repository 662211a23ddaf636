"""Compiles the native library into the package, where there is a compiler; see pyproject.toml."""

import os
import runpy
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

NATIVE = Path("flashmoe", "native")
build = runpy.run_path(str(NATIVE / "build.py"))


class BuildNative(build_ext):
    """A plain shared library, loaded with ctypes: not a Python module, so no ABI in its name."""

    def get_ext_filename(self, fullname):
        return str(Path(*fullname.split(".")[:-1], build["LIBRARY"]))

    def build_extension(self, ext):
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        try:
            build["build_library"](target, compiler=os.environ.get("CXX"))
        except build["CompilationError"] as error:
            print(
                f"warning: flashmoe is installed without its native library: {error}",
                file=sys.stderr,
            )


class AnyPythonWheel(bdist_wheel):
    """Nothing in the wheel depends on the Python version, only on the platform."""

    def get_tag(self):
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("flashmoe.native.core", sources=[], optional=True)],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": AnyPythonWheel},
)
