"""``python -m node`` is ``edgemesh``: for environments without the installed script."""

import sys

from node.cli import main

sys.exit(main())
