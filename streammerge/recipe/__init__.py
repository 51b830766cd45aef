"""What the user asks for: types, YAML, per-tensor rules. No torch, no files."""
