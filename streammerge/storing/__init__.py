"""Merges whose results go to a store: by one process, or by several that do a part each."""
