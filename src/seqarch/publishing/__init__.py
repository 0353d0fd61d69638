"""The Sphinx side of the book and the tools that keep its notebooks in order. No chapter imports this."""
