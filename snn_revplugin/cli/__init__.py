"""The command line, ``snn-revplugin``: needs what the extra ``cli`` brings."""

import sys

# What the extra brings, by the names it is imported under.
EXTRA = ("typer", "rich", "matplotlib", "sklearn")


def main() -> None:
    """Entry point of ``snn-revplugin``."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRA:
            raise
        sys.exit(f"snn-revplugin needs {error.name}, which is not installed: pip install 'snn-revplugin[cli]'")
    app()
