"""Look after data sets: python src/data.py COMMAND, with --help for each command."""

from bandsplit.cli import data, entry

if __name__ == "__main__":
    entry.run(data.main)
