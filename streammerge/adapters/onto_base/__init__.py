"""Adapters beside a base: where every part of one belongs there, and what it changes there."""
