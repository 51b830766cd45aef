"""Adapters without a base: planned from their headers, and combined to one adapter."""
