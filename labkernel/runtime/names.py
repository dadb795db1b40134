"""Random names for containers nobody named: an adjective and the surname of somebody who shaped computing."""

from __future__ import annotations

import random

_ADJECTIVES = """
able agile alert amber ample apt avid bold brave breezy bright brisk calm candid careful cheerful chirpy civil clear
clever cosy crisp curious dapper daring deft eager early earnest easy elegant exact fair fearless fine fluent fond frank
free fresh gentle genuine glad golden graceful handy happy hardy honest hopeful humble jolly jovial keen kind lively
loyal lucid lucky merry mild modest neat nimble noble patient peppy polite proud prudent quick quiet rapid ready robust
serene sharp shiny silent simple sleek smart snappy snug sober solid spry steady stoic sunny sure swift tidy tranquil
trusty upbeat vivid warm wise witty zesty
""".split()  # noqa: SIM905

_SURNAMES = """
allen babbage backus bartik berners boole borg brooks cerf church clarke codd conway cray curry dijkstra engelbart
feinler floyd gosper goldberg goldwasser granville hamilton hamming hoare holberton hollerith hopper huffman iverson
jacquard johnson kahn karp kay keller kernighan kilburn kleene knuth lamport lampson liskov lovelace mauchly mccarthy
mcilroy meltzer micali milner minsky moore naur neumann newell noether noyce perlis perlman pike postel rabin reddy
ritchie rivest scott shamir shannon shaw simon snyder stallman stearns strachey sutherland tarjan thompson torvalds
turing valiant vaughan wilkes wilkinson wing wirth yao zuse
""".split()  # noqa: SIM905

_random = random.SystemRandom()


def random_name(attempt: int = 0) -> str:
    """`keen_hopper`; after a few attempts that were taken, with a number at the end."""
    name = f"{_random.choice(_ADJECTIVES)}_{_random.choice(_SURNAMES)}"
    return name if attempt < 3 else f"{name}{_random.randrange(10 ** min(attempt, 9))}"
