"""Project files that ``sdi init`` copies: each runs as it is."""

TEMPLATES = {
    "gpt": "a small looped language model that learns who lives where (word by word, two hops)",
    "parity": "the parity model of the paper: is the number of ones in a bit string odd?",
    "blank": "a looped model in twenty lines of plain torch on random data, to be replaced by yours",
}
