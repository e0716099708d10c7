"""`python -m lamina`, and `torchrun ... -m lamina`."""

from lamina.cli import main

main()
