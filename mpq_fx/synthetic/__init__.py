"""no data  ->  batches to tune with, which say that nobody's data made them

distill.py   images (any one floating input) whose batch norm statistics are the trained ones
tokens.py    sequences that a causal language model writes itself, and random ones
origin.py    what a batch knows of where it came from, and what a plan says of it
probe.py     how a model is called without leaving a trace in it
"""

from __future__ import annotations

from mpq_fx.synthetic.distill import distilled
from mpq_fx.synthetic.origin import Arguments, Keywords, Origin, origin_of
from mpq_fx.synthetic.tokens import random_tokens, sampled

METHODS = {"distilled": distilled, "sampled": sampled, "random_tokens": random_tokens}

__all__ = [
    "METHODS",
    "Arguments",
    "Keywords",
    "Origin",
    "distilled",
    "origin_of",
    "random_tokens",
    "sampled",
]
