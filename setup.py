"""What pyproject.toml cannot say: a wheel that carries kernels is one for a platform.

``make wheel`` makes one: the environment variable ``STEPFORGE_KERNELS`` names a folder that
``stepforge prebuild --output`` has filled, with guards in C++ too. Without it the package is pure
Python, whatever kernels lie in the checkout.
"""

import os
import shutil
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

KERNELS = os.environ.get("STEPFORGE_KERNELS")


class MaybeWithKernels(Distribution):
    """Has compiled parts if it carries kernels; setuptools builds such packages apart."""

    def has_ext_modules(self) -> bool:
        """Whether this is no pure Python."""
        return bool(KERNELS)


class BuildWithKernels(build_py):
    """Adds the kernels to the Python files."""

    def run(self) -> None:
        """Copies all that is to be installed."""
        super().run()
        if not KERNELS or self.editable_mode:
            return
        kernels = sorted(Path(KERNELS).glob("*/*.so"))
        if not kernels:
            raise SystemExit(
                f"STEPFORGE_KERNELS is {KERNELS!r}, which holds no kernels: "
                f"stepforge prebuild --output {KERNELS}"
            )
        to = Path(self.build_lib, "stepforge", "backends", "native", "kernels")
        shutil.rmtree(to, ignore_errors=True)  # an earlier build's
        for kernel in kernels:
            (to / kernel.parent.name).mkdir(parents=True, exist_ok=True)
            copy = shutil.copyfile(kernel, to / kernel.parent.name / kernel.name)
            copy.chmod(0o644)  # whatever the umask: who may change it decides what is run


class WheelForAnyPython(bdist_wheel):
    """Kernels know nothing of Python: their wheel is one for a platform, not for a version.

    The guards in C++ are for one Python and one torch. Their file is named by both, so that others
    leave it alone and use the guards in Python, or build their own.
    """

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of the wheel's name."""
        return "py3", "none", super().get_tag()[2]


setup(
    distclass=MaybeWithKernels,
    cmdclass={"build_py": BuildWithKernels, "bdist_wheel": WheelForAnyPython},
)
