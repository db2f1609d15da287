"""`python -m flows` is `vit`."""

from flows.cli import main

if __name__ == "__main__":
    main()
