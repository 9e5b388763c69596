"""Small data of the tests' own, in the forms of the published sets: a clone needs no other files.

    word_problems(folder / "train.jsonl", 60)    {"question", "answer": "...\\n#### 42"}, as GSM8K
    stories(folder / "stories.txt", 40)          paragraphs parted by blank lines, as TinyStories
    programs(folder / "programs.jsonl")          six problems in HumanEval's form
    choice_items(folder, 40)                     HellaSwag, ARC-Challenge and WinoGrande
    mtbench_questions(folder / "q.jsonl")        two turns in each of MT-bench's categories
    byte_tokenizer(folder)                       tokenizer.json, byte-level BPE, no BOS in front

All texts were written here, or are made by templates; each is a pure function of its arguments.
"""
import json
import random
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from quickstart import toy_math


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def word_problems(path, count, seed=0):
    """GSM8K's form."""
    return write_lines(path, toy_math(count, seed))


# ----------------------------------------------------------------------------- stories
GIRLS_AND_BOYS = ["Lily", "Tom", "Mia", "Ben", "Sara", "Max"]
PLACES = ["park", "garden", "kitchen", "forest", "house"]
TOYS = ["red ball", "small box", "toy car", "yellow kite", "little boat"]
ANIMALS = ["dog", "cat", "bird", "frog", "rabbit"]


def stories(path, count, seed=0):
    """Short stories in the words of TinyStories."""
    rng = random.Random(seed)
    paragraphs = []
    for _ in range(count):
        name, friend = rng.sample(GIRLS_AND_BOYS, 2)
        place = rng.choice(PLACES)
        toy = rng.choice(TOYS)
        animal = rng.choice(ANIMALS)
        begins = (f"Once upon a time, there was a child named {name}. {name} liked to play in the "
                  f"{place}. One day, {name} saw a big {animal} with a {toy}.")
        goes_on = (f'"Can I play with your {toy}?" asked {name}. The {animal} was happy and said, '
                   f'"Yes, we can share."')
        ends = (f"{friend} came to the {place} too. They all played with the {toy} until it was "
                f"time to go home. {name} and {friend} told their mom about the {animal}, and she "
                f"smiled.")
        paragraphs += [begins, goes_on, ends]
    path.write_text("\n\n".join(paragraphs) + "\n")
    return path


# ----------------------------------------------------------------------------- programs
class Program(NamedTuple):
    name: str
    argument: str
    purpose: str
    examples: list   # (argument, result) as source
    body: str


PROGRAMS = [
    Program("longest_word", "words", """\
Return the longest of the given words, and the first of them if there are several.
    The list is never empty.""",
            [("['a', 'bcd', 'ef']", "'bcd'"), ("['xy', 'zz']", "'xy'")], """\
    return max(words, key=len)
"""),
    Program("digits_sum", "number", """\
Add up the decimal digits of a whole number, which may be negative;
    the sign is not counted.""",
            [("1203", "6"), ("-45", "9"), ("0", "0")], """\
    return sum(int(digit) for digit in str(abs(number)))
"""),
    Program("without_repeats", "values", """\
Return the values in their order, each only where it comes for the first time.""",
            [("[3, 1, 3, 2, 1]", "[3, 1, 2]"), ("[]", "[]")], """\
    seen = []
    for value in values:
        if value not in seen:
            seen.append(value)
    return seen
"""),
    Program("halvings", "number", """\
How often can a positive whole number be halved until it is odd?""",
            [("12", "2"), ("7", "0"), ("64", "6")], """\
    count = 0
    while number % 2 == 0:
        number //= 2
        count += 1
    return count
"""),
    Program("swap_case_of_vowels", "text", """\
Turn small vowels of an English text into capitals and capitals into small ones;
    all other characters stay.""",
            [("'Apple pie'", "'applE pIE'"), ("'xyz'", "'xyz'")], """\
    return ''.join(c.swapcase() if c in 'aeiouAEIOU' else c for c in text)
"""),
    Program("rising", "values", """\
Is each of the values larger than the one before it?""",
            [("[1, 2, 5]", "True"), ("[1, 1]", "False"), ("[]", "True")], """\
    return all(a < b for a, b in zip(values, values[1:]))
""")]


def program_records():
    """HumanEval's form; the ids are Own/0, Own/1, ..."""
    records = []
    for number, program in enumerate(PROGRAMS):
        shown = ""
        checks = ""
        for given, result in program.examples:
            shown += f"    >>> {program.name}({given})\n    {result}\n"
            checks += f"    assert candidate({given}) == {result}\n"
        head = f"\n\ndef {program.name}({program.argument}):\n"
        records.append({"task_id": f"Own/{number}",
                        "prompt": f'{head}    """ {program.purpose}\n{shown}    """\n',
                        "entry_point": program.name, "canonical_solution": program.body,
                        "test": f"\n\ndef check(candidate):\n{checks}\n"})
    return records


def programs(path):
    return write_lines(path, program_records())


# ----------------------------------------------------------------------------- choices
DOES = ["rolls the dough", "paints a fence", "climbs a ladder", "throws a ball", "washes the car",
        "plays the drums", "cuts the grass", "ties a rope", "folds the paper", "lifts a stone",
        "combs the horse", "rides a bike"]
THEN = ["and puts it on the table", "while the others watch", "with both hands", "until it is done",
        "near the water"]
TASKS = ("hellaswag", "arc_challenge", "winogrande")


def hellaswag_record(rng, number):
    first, *others = rng.sample(DOES, 5)
    endings = [f"{does} {rng.choice(THEN)}." for does in others]
    context = f"A man {first} in the yard."
    return {"ind": number, "activity_label": first.capitalize(), "ctx_a": context,
            "ctx_b": "then he", "ctx": f"{context} then he", "endings": endings,
            "source_id": f"own~{number}", "split": "val", "split_type": "indomain",
            "label": str(rng.randrange(4))}


def arc_record(rng, number):
    """Of one to four sentences: three shots fit into 512 tokens of stories260k, or do not."""
    things = rng.sample(["iron", "wood", "glass", "water", "sand", "salt"], 4)
    labels = ["1", "2", "3", "4"] if number % 5 == 4 else ["A", "B", "C", "D"]
    sentences = []
    for week, does in enumerate(rng.sample(DOES, rng.randint(0, 3)), 1):
        sentences.append(f"In week {week} a student of class {number} {does} and then writes down "
                         f"how warm the room is.")
    sentences.append("Which of these materials would be the best one to measure next?")
    choices = {"text": [f"a piece of {thing}" for thing in things], "label": labels}
    return {"id": f"own_{number}", "question": " ".join(sentences), "choices": choices,
            "answerKey": rng.choice(labels)}


def winogrande_record(rng, number):
    first, second = rng.sample(GIRLS_AND_BOYS, 2)
    does = rng.choice(DOES)
    sentence = f"{first} asked how {second} {does}, because _ wanted to learn it by day {number}."
    return {"sentence": sentence, "option1": first, "option2": second,
            "answer": rng.choice(["1", "2"])}


def choice_items(folder, count):
    """{task: file} with `count` items of each of the three sets of the forgetting evaluation."""
    files = {}
    for task, make in zip(TASKS, (hellaswag_record, arc_record, winogrande_record)):
        rng = random.Random(task)
        records = [make(rng, number) for number in range(count)]
        files[task] = write_lines(folder / f"{task}.jsonl", records)
    return files


# ----------------------------------------------------------------------------- chats
MTBENCH = [
    ("writing", "Write two lines about a rainy street.", "Now make them rhyme."),
    ("roleplay", "You are a lighthouse keeper. What did you do today?", "And what worries you?"),
    ("reasoning", "Ann is older than Bob, and Bob is older than Cy. Who is the youngest?",
     "Who is in the middle?"),
    ("math", "What is 12 times 11?", "Take away 32 and halve it."),
    ("coding", "Write a Python function that reverses a list.", "Do it without slices."),
    ("extraction", "List the colours in: a red hat on a blue chair.", "Now as a JSON list."),
    ("stem", "Why is the sky blue?", "And why is it red in the evening?"),
    ("humanities", "What is a sonnet?", "Name one who wrote them.")]


def mtbench_questions(path):
    """One of each category."""
    records = []
    for number, (category, first, second) in enumerate(MTBENCH, 901):
        records.append({"question_id": number, "category": category, "turns": [first, second]})
    return write_lines(path, records)


# ----------------------------------------------------------------------------- a tokenizer
def byte_tokenizer(folder):
    """tokenizer.json and tokenizer_config.json in a folder; 262 ids, of which 1 is BOS and 2 EOS."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *alphabet, "he", "Ġt", "Ġthe"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.BPE(vocab, [("h", "e"), ("Ġ", "t"), ("Ġt", "he")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
