"""Runs the `shoal` command for `python -m shoal`."""

from .cli import main

raise SystemExit(main())
