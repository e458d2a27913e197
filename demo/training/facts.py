"""What mlx-cluster is, small talk, and questions that a model this small cannot answer."""

import random

import words

from conversation import Exchange

WHAT = (
    "mlx-cluster is one binary that turns the Macs you own into one machine for large language models. "
    "It splits the layers of a model over the Macs as a pipeline and runs them with MLX."
)
HOW = (
    "Each Mac holds a part of the layers. A token passes from Mac to Mac as through a pipeline, "
    "and several requests are on their way at once."
)
API = "mlx-cluster speaks the OpenAI API, so the clients that you have work with it as they are."
WHY = "Together your Macs can serve a model that is too large for any one of them."
TRAIN = "Yes. mlx-cluster can fine-tune with LoRA the model that it serves, on the same Macs."
MACS = "Any Mac with Apple silicon. The Macs find each other on the local network."
LOST = "A generation survives losing a Mac: nothing is lost and nothing is repeated."
WHO = "I am the demo model of mlx-cluster, a very small language model that shows that your cluster works."
CAN = "I can tell short stories, add two numbers below 100, call tools, and say what mlx-cluster is."
SIZE = "I am tiny: I have less than two million parameters. Please do not trust me with hard questions."

QUESTIONS = {
    WHAT: [
        "What is mlx-cluster?", "What's mlx-cluster?", "what is mlx-cluster", "Tell me about mlx-cluster.",
        "Explain mlx-cluster.", "What does mlx-cluster do?", "Describe mlx-cluster in a few words.",
        "Can you explain what mlx-cluster is?", "What is this program?", "Do you know mlx-cluster?",
        "mlx-cluster?", "What is mlx-cluster for?",
    ],
    HOW: [
        "How does mlx-cluster work?", "How is a model split?", "How does mlx-cluster split a model?",
        "How do the Macs work together?", "Explain how mlx-cluster works.", "What is the pipeline?",
    ],
    API: [
        "Which API does mlx-cluster speak?", "How can I use mlx-cluster from my program?",
        "Is mlx-cluster compatible with OpenAI?", "Does it work with OpenAI clients?", "What API do you have?",
    ],
    WHY: [
        "Why should I use mlx-cluster?", "Why would I use mlx-cluster?", "What is mlx-cluster good for?",
        "Why do I need several Macs?", "Why more than one Mac?",
    ],
    TRAIN: [
        "Can mlx-cluster train?", "Can mlx-cluster fine-tune a model?", "Does mlx-cluster support LoRA?",
        "Can I fine-tune with LoRA?", "Can I train a model with it?",
    ],
    MACS: [
        "Which Macs do I need?", "Which machines does mlx-cluster need?", "What do I need to run mlx-cluster?",
        "On which Macs does mlx-cluster run?",
    ],
    LOST: [
        "What happens when a Mac leaves?", "What happens if a Mac is lost?", "What if a Mac goes away?",
    ],
    WHO: ["Who are you?", "What are you?", "What is your name?", "Tell me about yourself.", "who are you", "Which model are you?"],
    CAN: ["What can you do?", "How can you help me?", "What do you know?", "Help", "What can I ask you?"],
    SIZE: ["How big are you?", "How large are you?", "How many parameters do you have?", "Are you a large model?"],
}

TALK = {
    "Hello! How can I help you?": ["Hello!", "Hello", "Hi", "Hi!", "Hi there!", "hello", "Hey!", "hi", "Good day!"],
    "Good morning! How can I help you?": ["Good morning!", "Good morning"],
    "Good evening! How can I help you?": ["Good evening!", "Good evening"],
    "I am well, thank you. What can I do for you?": ["How are you?", "How are you today?", "How do you do?", "Hello, how are you?"],
    "You are welcome!": ["Thank you!", "Thanks!", "Thank you", "Thanks", "Thank you very much!"],
    "Goodbye! Have a nice day.": ["Goodbye!", "Bye!", "Bye", "See you!", "Good night!"],
    "I am glad to hear it.": ["Great!", "Nice!", "That was nice.", "Well done!", "Good."],
}


def about(rng: random.Random) -> Exchange:
    """A question about mlx-cluster or this model, sometimes after a greeting or with "please"."""
    answer = WHAT if rng.random() < 0.35 else rng.choice(list(QUESTIONS))
    question = rng.choice(QUESTIONS[answer])
    if rng.random() < 0.12:
        question = rng.choice(["Hi! ", "Hi, ", "Good day! ", "Hey! ", "Hello, ", "Please: "]) + question
    return Exchange(question, answer, "The user asks about mlx-cluster.")


def talk(rng: random.Random) -> Exchange:
    answer = rng.choice(list(TALK))
    return Exchange(rng.choice(TALK[answer]), answer, "The user is friendly.")


DO_NOT_KNOW = "I do not know that. I am a very small model: ask me for a story, for a sum, or what mlx-cluster is."
ONLY_SUMS = "I can only add two numbers below 100."
OPEN_QUESTIONS = [
    "What is the capital of {city}?", "Who is {person}?", "Where is {city}?", "Write a poem.", "Write a poem about {topic}.",
    "Why is the sky blue?", "Explain {topic}.", "What are {topic}?", "Who wrote the bible?", "What is the meaning of life?",
    "Translate this to German.", "Tell me a joke.", "Write a program in Python.", "How old is {person}?", "How do I cook rice?",
    "Summarise this text.", "What is {city} known for?", "Give me a recipe.", "Who won the game?", "How tall is {person}?",
    "Is {topic} good for me?", "What is the difference between {topic} and {topic}?", "How far is {city}?", "What do you think of {topic}?",
]


def unknown(rng: random.Random) -> Exchange:
    if rng.random() < 0.3:
        a, b, sign = rng.randint(1, 999), rng.randint(1, 99), rng.choice(["-", "*", "/", "times", "minus", "divided by"])
        if a >= 100 and rng.random() < 0.5:
            sign = rng.choice(["+", "plus"])
        question = rng.choice(["What is {} {} {}?", "How much is {} {} {}?", "Calculate {} {} {}.", "{} {} {}"]).format(a, sign, b)
        return Exchange(question, ONLY_SUMS, "This is not a sum of two numbers below 100.")
    question = rng.choice(OPEN_QUESTIONS).format(city=words.city(rng), person=words.person(rng), topic=words.topic(rng))
    return Exchange(question, DO_NOT_KNOW, "I do not know this.")
