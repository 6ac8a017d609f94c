"""``python -m vistok``: the same command as ``vistok``."""

from vistok.cli import main

if __name__ == "__main__":
    main()
