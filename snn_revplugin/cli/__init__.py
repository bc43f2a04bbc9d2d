"""The command line, ``snn-revplugin``: needs what the extra ``cli`` brings."""

import sys

# What the extra brings, by the names it is imported under.
EXTRA = ("typer", "rich", "matplotlib", "sklearn")


def main() -> None:
    """Entry point of ``snn-revplugin``."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in EXTRA:
            raise
        sys.exit(
            f"snn-revplugin needs {package}, which is not installed: pip install"
            " 'snn-revplugin[cli]'"
        )
    app()
