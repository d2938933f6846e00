"""Families of inverse preconditioners, built by composition."""

from llqr.structures.block import Block
from llqr.structures.catalogue import STRUCTURES
from llqr.structures.matrix import Structure
from llqr.structures.plan import Plan, make_plan
from llqr.structures.rules import Rule, rule_table, stacked
from llqr.structures.sides import Side, register_side

__all__ = [
    "STRUCTURES",
    "Block",
    "Plan",
    "Rule",
    "Side",
    "Structure",
    "make_plan",
    "register_side",
    "rule_table",
    "stacked",
]
