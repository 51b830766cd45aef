"""Adapters as files have them: formats, names and configurations, read into an ``Adapter``."""
