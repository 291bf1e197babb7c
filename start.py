"""How the command ``precast`` starts: ready for Ctrl-C before it imports anything else."""

from precast.loaders.artifact import interrupt


def main() -> None:
    """Run the command line."""
    interrupt.install()
    from precast.cli import main as run

    try:
        run()
    finally:
        interrupt.ignore()
