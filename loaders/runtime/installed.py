"""Describe this machine and what is installed on it."""

import importlib.util

from jaxlib.version import __version__ as jaxlib_version

from precast import kernels

from ..artifact.machine import Machine, cpu_features, nvidia_gpus, processor_family


def _is_installed(package: str) -> bool:
    """Whether a package could be imported; it is not."""
    try:
        return importlib.util.find_spec(package) is not None
    except (ImportError, ValueError):  # something in this process refuses it
        return False


def this_machine(*, cuda: bool = True) -> Machine:
    """The machine and what is installed on it, for the choice of a target.

    Args:
        cuda: whether to look for GPUs and what they need, which takes 50 ms where there are any.
    """
    gpus = nvidia_gpus() if cuda else ()
    return Machine(
        machine=processor_family(),
        features=cpu_features(),
        jaxlib=jaxlib_version,
        kernel_abi=kernels.ABI_VERSION,
        kernels=tuple(sorted(kernels.targets())),
        tensorflow=_is_installed("tensorflow"),
        gpus=gpus,
        cuda_plugin=_cuda_plugin() if gpus else "",
    )


def _cuda_plugin() -> str:
    from . import cuda  # slow to import, and needed only where there is a GPU

    plugin = cuda.find_plugin()
    return "" if plugin is None else plugin.version
