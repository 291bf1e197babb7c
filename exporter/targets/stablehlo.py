"""StableHLO that every supported jaxlib reads, also one older than the jax that exports."""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from precast.loaders.artifact.errors import PrecastError

# What the oldest supported jaxlib, 0.10.1, reads. jax writes for readers four weeks old at most.
OLDEST_READER = "1.17.0"


def for_all_jaxlibs(module: bytes, where: str) -> bytes:
    """The same portable artifact (VHLO), in a version that the oldest supported jaxlib reads.

    https://openxla.org/stablehlo/compatibility: a program that uses nothing newer can be written in an older version.

    Args:
        module: as jax.export has serialised it.
        where: what messages call it.

    Raises:
        PrecastError: for a program that uses something newer.
    """
    requirement = stablehlo.StablehloCompatibilityRequirement
    written = stablehlo.get_version_from_compatibility_requirement(requirement.WEEK_4)
    if stablehlo.get_smaller_version(written, OLDEST_READER) == written:
        return module
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        parsed = stablehlo.deserialize_portable_artifact(context, module)
        try:
            return stablehlo.serialize_portable_artifact(parsed, OLDEST_READER)
        except ValueError as error:
            raise PrecastError(
                f"{where}: cannot be written as StableHLO {OLDEST_READER}, which the oldest jaxlib that precast"
                f" supports reads ({error}): please report this."
            ) from None
