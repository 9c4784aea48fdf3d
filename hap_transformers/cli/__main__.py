"""Runs the `hap` command by `python -m hap_transformers.cli`."""

from .app import main


if __name__ == "__main__":
    main()
