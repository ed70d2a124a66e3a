"""docs/FAMILIES.md lists what there is."""

import re
from pathlib import Path

from ardor.families import FAMILIES

DOC = Path(__file__).parents[2] / "docs" / "FAMILIES.md"


def test_every_family_is_in_the_table_and_nothing_else():
    rows = re.findall(r"^\| (`.*?`) \|", DOC.read_text(encoding="utf-8"), flags=re.MULTILINE)
    listed = {name for row in rows for name in re.findall(r"`(\w+)`", row)} - {"model_type"}
    assert listed == FAMILIES.keys()
