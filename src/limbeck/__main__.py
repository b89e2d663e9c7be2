"""`python -m limbeck` is the command line."""

from limbeck.cli import entry

entry()
