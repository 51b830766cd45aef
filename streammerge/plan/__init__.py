"""How a merge will run: pure integers and frozen data, from headers alone. No torch."""
