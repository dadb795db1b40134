"""One click grammar for the terminal and the magics."""
