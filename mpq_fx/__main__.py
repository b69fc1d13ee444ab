"""python -m mpq_fx == mpq"""

from __future__ import annotations

from mpq_fx.cli import main

main()
