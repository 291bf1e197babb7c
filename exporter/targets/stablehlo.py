"""StableHLO for every supported jaxlib, including jaxlibs that are older than the exporting jax."""

from jaxlib.mlir import ir
from jaxlib.mlir.dialects import stablehlo

from precast.loaders.artifact.errors import PrecastError

# The version that the oldest supported jaxlib, 0.10.1, reads. jax itself targets readers at most four weeks old.
OLDEST_READER = "1.17.0"


def for_all_jaxlibs(module: bytes, where: str) -> bytes:
    """Rewrite a portable artifact (VHLO) in the version that the oldest supported jaxlib reads.

    A program without newer features can be written in an older version: https://openxla.org/stablehlo/compatibility.

    Args:
        module: the serialised module from jax.export.
        where: name of the program in messages.

    Raises:
        PrecastError: the program uses a newer feature.
    """
    requirement = stablehlo.StablehloCompatibilityRequirement
    version = stablehlo.get_version_from_compatibility_requirement(requirement.WEEK_4)
    if stablehlo.get_smaller_version(version, OLDEST_READER) == version:
        return module
    with ir.Context() as context:
        stablehlo.register_dialect(context)
        parsed = stablehlo.deserialize_portable_artifact(context, module)
        try:
            return bytes(stablehlo.serialize_portable_artifact(parsed, OLDEST_READER))
        except ValueError as error:
            raise PrecastError(
                f"{where}: cannot be written as StableHLO {OLDEST_READER} for the oldest supported jaxlib ({error}):"
                " please report this."
            ) from None
