"""Of what every output tensor is made: every question of names, ties and shapes ends here."""
