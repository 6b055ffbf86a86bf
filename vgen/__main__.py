"""`python -m vgen`."""

from vgen.cli import main

if __name__ == "__main__":
    main()
