"""The command `ss-prune`, which is `python -m ss_pruning.cli`, too."""

import sys


def main() -> None:
    """Run the command line, or say what it needs."""
    try:
        from ss_pruning.cli.app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("click", "rich", "typer"):
            raise
        sys.exit(f"ss-prune needs {error.name}, which is not installed: pip install 'ss-pruning[cli]'")
    app()


if __name__ == "__main__":
    main()
