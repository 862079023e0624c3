"""Project files that ``sdi init`` copies: each runs as it is."""

TEMPLATES = {
    "gpt": "a small looped language model that learns who lives where",
    "parity": "the model of the paper: is the number of ones in a string odd?",
    "blank": "a looped model in twenty lines of torch, to be replaced by yours",
}
