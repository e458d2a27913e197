"""Short stories from a grammar: the same hero, name, place and thing from beginning to end."""

import random

import held_out
import words
from conversation import Exchange

SUBJECTS = [
    "fox", "bear", "cat", "dog", "mouse", "owl", "rabbit", "wolf", "horse", "duck", "frog",
    "goat", "hen", "lion", "tiger", "whale", "crab", "bee", "ant", "robot", "dragon", "king",
    "queen", "girl", "boy", "farmer", "baker", "wizard", "pirate", "giant", "squirrel",
    "elephant", "otter", "hedgehog", "penguin", "monkey", "snail", "raven", "donkey", "astronaut",
    "bird", "fish", "cow", "pig", "sheep", "goose", "deer", "camel", "zebra", "parrot", "eagle",
    "seal", "shark", "spider", "butterfly", "kitten", "puppy", "princess", "prince", "witch",
    "teacher", "doctor", "gardener", "shoemaker", "fisherman", "ghost", "snowman", "train",
    "star", "cloud", "tree", "computer", "child", "man", "woman", "unicorn", "dinosaur", "mole",
]
NAMES = [
    "Milo", "Luna", "Pip", "Nora", "Otto", "Ruby", "Finn", "Mira", "Toby", "Wanda", "Basil",
    "Clara", "Bruno", "Ida", "Leo", "Daisy", "Rufus", "Olive", "Max", "Tilda",
]
TRAITS = ["small", "brave", "curious", "kind", "clever", "shy", "happy", "quiet", "old", "young"]
PLACES = [
    "forest", "river", "village", "mountain", "garden", "castle", "island", "lake", "desert",
    "cave", "meadow", "harbour", "valley", "tower", "farm",
]
THINGS = [
    "key", "map", "lamp", "bell", "coin", "book", "stone", "feather", "boat", "kite", "ring",
    "mirror", "drum", "seed", "hat",
]
COLOURS = ["golden", "silver", "red", "blue", "green", "shiny", "tiny", "strange"]
FRIENDS = ["sparrow", "beetle", "neighbour", "lamb", "cricket", "miller", "hare", "shepherd"]

PLAIN_REQUESTS = [
    "Tell me a story about {a_hero}.",
    "Tell me a story about {a_hero}.",
    "Tell me a short story about {a_hero}.",
    "Write a story about {a_hero}.",
    "Write a short story about {a_hero}.",
    "Can you tell me a story about {a_hero}?",
    "I would like a story about {a_hero}.",
    "A story about {a_hero}, please.",
]
PLACE_REQUESTS = ["Tell me a story about {a_hero} in a {place}.", "Write a story about {a_hero} in a {place}."]
THING_REQUESTS = ["Tell me a story about {a_hero} and a {thing}.", "Write a story about {a_hero} who finds a {thing}."]

OPENINGS = [
    "Once upon a time there was {a_trait} {hero} named {name}, who lived near a {place}.",
    "Long ago, {a_trait} {hero} named {name} lived in a house by the {place}.",
    "In a {place} far away lived {a_trait} {hero}. The name of the {hero} was {name}.",
]
EVENTS = [
    "One morning {name} found a {colour} {thing} on the ground.",
    "One day {name} saw a {colour} {thing} under a tree.",
    "One night {name} dreamed of a {colour} {thing}, and in the morning it was there.",
]
MIDDLES = [
    "A {friend} came by and said that the {thing} was lost, so {name} gave it back.",
    "{name} showed the {thing} to a {friend}, and together they carried it through the {place}.",
    "But the {thing} was too heavy, so {name} asked a {friend} for help.",
    "{name} did not know what it was for, but a {friend} knew: the {thing} could grant one wish.",
]
ENDINGS = [
    "From that day on {name} and the {friend} were best friends.",
    "The {friend} thanked {name}, and they ate cake until the sun went down.",
    "{name} went home and told everyone about the {thing} and the {friend}.",
    "And so the {hero} and the {friend} lived happily near the {place}.",
]


def with_article(noun: str) -> str:
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def subject(rng: random.Random) -> str:
    """Often an invented word, so that the hero is copied from the request, whatever it is."""
    if rng.random() < 0.6:
        return rng.choice(SUBJECTS)
    while True:
        word = words.invented(rng).lower()
        if word not in held_out.SUBJECTS:
            return word


def exchange(rng: random.Random) -> Exchange:
    hero, place, thing = subject(rng), rng.choice(PLACES), rng.choice(THINGS)
    trait = rng.choice(TRAITS)
    words = {
        "hero": hero,
        "a_hero": with_article(hero),
        "a_trait": with_article(trait),
        "name": rng.choice(NAMES),
        "place": place,
        "thing": thing,
        "colour": rng.choice(COLOURS),
        "friend": rng.choice(FRIENDS),
    }
    requests = rng.choices([PLAIN_REQUESTS, PLACE_REQUESTS, THING_REQUESTS], [6, 1, 1])[0]
    parts = [rng.choice(choices) for choices in (OPENINGS, EVENTS, MIDDLES, ENDINGS)]
    return Exchange(
        rng.choice(requests).format(**words),
        " ".join(parts).format(**words),
        "The user wants a story about {a_hero}.".format(**words),
    )
