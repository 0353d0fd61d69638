"""Modules that two or more chapters use. Import a family by name: `seqarch.layers.rnn`, `seqarch.layers.attention`."""
