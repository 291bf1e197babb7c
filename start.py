"""The entry point of the command ``precast``. It installs the handler for Ctrl-C before it imports anything else."""

from precast.loaders.artifact import interrupt
from precast.loaders.console.streams import open_closed_streams


def main() -> None:
    """Run the command line."""
    # Open closed streams first. Otherwise the handler's pipe would occupy their file descriptors.
    open_closed_streams()
    interrupt.install()
    from precast.loaders.collection import no_collection

    # Imports create no garbage, and a search for garbage would take a tenth of their time.
    with no_collection():
        from precast.cli import main as run

    try:
        run()
    finally:
        interrupt.ignore()
