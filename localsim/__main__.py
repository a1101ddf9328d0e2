"""`python -m localsim` is the same as `localsim`."""

from localsim.cli import main

raise SystemExit(main())
