"""`python -m opt_cli` is `opt-lm`."""

from opt_cli.main import main

main()
