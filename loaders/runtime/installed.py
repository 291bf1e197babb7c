"""A description of this machine and of the installed packages that a target may need."""

import importlib.util

from jaxlib.version import __version__ as jaxlib_version

from precast import kernels

from ..artifact.machine import Machine, cpu_features, nvidia_gpus, processor_family


def _is_installed(package: str) -> bool:
    """Return True if a package can be imported, without importing it."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # this process has blocked the package in sys.modules
        return False


def this_machine(*, cuda: bool = True) -> Machine:
    """Describe this machine, so that a target can be chosen for it.

    Args:
        cuda: look for GPUs and for jax's CUDA plugin. The search takes 50 ms on a machine with GPUs.
    """
    gpus = nvidia_gpus() if cuda else ()
    return Machine(
        machine=processor_family(),
        features=cpu_features(),
        jaxlib=jaxlib_version,
        kernel_abi=kernels.ABI_VERSION,
        kernels=tuple(sorted(kernels.targets())),
        isa=kernels.isa(),
        tensorflow=_is_installed("tensorflow"),
        gpus=gpus,
        cuda_plugin=_cuda_plugin() if gpus else "",
    )


def _cuda_plugin() -> str:
    from . import cuda  # slow to import, and needed only with a GPU

    plugin = cuda.find_plugin()
    return "" if plugin is None else plugin.version
