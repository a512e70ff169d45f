"""`python -m fastrl`: the same as the console script."""

from fastrl.cli import main

if __name__ == "__main__":
    main()
