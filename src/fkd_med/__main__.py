"""``python -m fkd_med`` is ``fkd``."""

from fkd_med.cli import entry_point

if __name__ == "__main__":
    entry_point()
