"""`python -m bonsai_lora` is the `bonsai-lora` command."""

import sys

from bonsai_lora.cli.main import main

sys.exit(main())
