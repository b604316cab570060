"""What leaves the house: the model in its own library's format, with a card that says what was measured."""
