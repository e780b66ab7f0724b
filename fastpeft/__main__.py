"""`python -m fastpeft`, which torchrun needs."""

from fastpeft.cli import main

if __name__ == "__main__":
    main()
