"""`python -m gradstore_cli`."""

from . import main

main()
