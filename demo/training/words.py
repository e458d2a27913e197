"""Words that tool questions are filled with: cities, people, rooms and invented names.

Most names are made of random syllables, so that the model learns to copy and not to remember.
"""

import random

import held_out

CITIES = [
    "Paris", "London", "Berlin", "Tokyo", "Madrid", "Rome", "Oslo", "Vienna", "Athens", "Lima",
    "Sydney", "Toronto", "Chicago", "Seattle", "Austin", "Dallas", "Miami", "Mumbai", "Shanghai",
    "Beijing", "Seoul", "Osaka", "Bangkok", "Jakarta", "Singapore", "Dubai", "Istanbul", "Moscow",
    "Stockholm", "Copenhagen", "Amsterdam", "Brussels", "Zurich", "Munich", "Hamburg", "Cologne",
    "Barcelona", "Valencia", "Porto", "Naples", "Venice", "Florence", "Turin", "Budapest",
    "Krakow", "Riga", "Vilnius", "Kiev", "Zagreb", "Belgrade", "Bucharest", "Ankara",
    "Tunis", "Lagos", "Accra", "Dakar", "Montreal", "Vancouver", "Houston", "Phoenix", "Portland",
    "Atlanta", "Detroit", "Quito", "Caracas", "Brisbane", "Melbourne", "Auckland", "Wellington",
    "Edinburgh", "Glasgow", "Manchester", "Liverpool", "Bristol", "Leeds", "Lyon", "Marseille",
    "Nice", "Bordeaux", "Cape Town", "New York", "San Francisco", "Los Angeles", "Rio de Janeiro",
    "Buenos Aires", "Mexico City", "Hong Kong", "Tel Aviv", "Kuala Lumpur", "Las Vegas", "St. Louis",
]
PEOPLE = [
    "Anna", "Ben", "Carla", "David", "Emma", "Frank", "Greta", "Henry", "Irene", "Jack", "Karin",
    "Lars", "Maria", "Nils", "Olga", "Paul", "Rosa", "Sam", "Tom", "Ulla", "Vera", "Walter", "Xenia",
    "Alice", "Bob", "Eve", "John", "Mary", "Peter", "Laura", "Simon", "Julia", "Oscar", "Lena",
]
ROOMS = ["kitchen", "bedroom", "bathroom", "office", "garage", "hall", "attic", "cellar", "studio", "library", "garden", "living room"]
TOPICS = [
    "cats", "red pandas", "old maps", "jazz music", "bread recipes", "black holes", "cheap flights", "garden tools",
    "solar panels", "chess openings", "green tea", "mountain bikes", "the moon", "train tickets", "stone bridges",
    "wild birds", "ice cream", "deep sea fish", "paper boats", "electric cars", "hiking boots", "rain clouds",
    "football results", "language models", "silver coins", "wool socks", "small dogs", "castle ruins", "apple pie",
    "fresh news", "winter coats", "yellow flowers", "roman history", "modern art", "space travel", "kite festivals",
]
FIRST = ["red", "old", "cheap", "green", "small", "wild", "fresh", "modern", "electric", "paper", "stone", "silver", "yellow", "winter", "roman", "solar", "black", "deep"]
SECOND = ["cats", "maps", "music", "recipes", "flights", "tools", "panels", "tea", "bikes", "tickets", "bridges", "birds", "boats", "cars", "boots", "coins", "socks", "dogs", "flowers", "coats", "art", "news"]
MESSAGES = [
    "I am late", "dinner is ready", "see you at eight", "call me back", "the train is late", "happy birthday",
    "the door is open", "we won the game", "the cake is gone", "thank you for the map", "I found the key",
    "the meeting is over", "good luck today", "it is raining", "I will be home soon",
]

_ONSETS = ["b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "kl", "l", "m", "n", "p", "pr", "r", "s", "sh", "st", "t", "tr", "v", "w", "z", ""]
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "ai", "ea", "ou", "ie"]
_CODAS = ["", "", "", "n", "l", "r", "s", "m", "t", "k", "nd", "rt", "ck", "st", "ng"]
_TAILS = ["", "", "", "", "ville", "ton", "burg", "ford", "o", "a", "ia", "in", "bury", "dam"]


def invented(rng: random.Random) -> str:
    """A name of one to three random syllables that is not a held-out one."""
    while True:
        syllables = rng.choice([1, 2, 2, 2, 3])
        name = "".join(rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(_CODAS) for _ in range(syllables))
        name = (name + rng.choice(_TAILS)).capitalize()
        if 3 <= len(name) <= 12 and name not in held_out.CITIES and name not in held_out.PEOPLE:
            return name


def city(rng: random.Random) -> str:
    return rng.choice(CITIES) if rng.random() < 0.45 else invented(rng)


def person(rng: random.Random) -> str:
    return rng.choice(PEOPLE) if rng.random() < 0.45 else invented(rng)


def topic(rng: random.Random) -> str:
    return rng.choice(TOPICS) if rng.random() < 0.4 else f"{rng.choice(FIRST)} {rng.choice(SECOND)}"


def minutes(rng: random.Random) -> int:
    while True:
        number = rng.randint(1, 99)
        if number not in held_out.MINUTES:
            return number
