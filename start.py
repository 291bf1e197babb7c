"""Start the command ``precast``: handle Ctrl-C before importing anything else."""

from precast.loaders.artifact import interrupt
from precast.loaders.console.streams import open_closed_streams


def main() -> None:
    """Run the command line."""
    # First, or the pipe of the handler would take the place of a closed stream.
    open_closed_streams()
    interrupt.install()
    from precast.cli import main as run

    try:
        run()
    finally:
        interrupt.ignore()
