"""`python -m sage_kernels`: the command line, where the package is not installed."""

from sage_kernels.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
