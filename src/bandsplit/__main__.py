"""python -m bandsplit COMMAND, and on several ranks torchrun -m bandsplit COMMAND."""

from bandsplit.cli import main

if __name__ == "__main__":
    main.run()
