"""`python -m reftrain`."""

from reftrain.cli import main

main()
