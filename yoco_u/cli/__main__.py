import sys

from yoco_u.cli import main

sys.exit(main())
