"""`python -m udas`, for launchers such as torchrun."""

from udas.cli import main

main()
