"""Recipes of other tools, as documents of this one."""
