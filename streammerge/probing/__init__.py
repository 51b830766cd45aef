"""How fast this machine and its device are, by moments of real work, and which of the two a merge takes."""
