r"""GSM8K as PEFT's method comparison asks and judges it: --harness=peft of eval_gsm8k.py.

    Question: Janet's ducks ... Think step by step.\nAnswer:       no worked examples
    -> " She sells 9 * 2 = $18. The answer is: 18"                 18, compared as a number

Source: huggingface/peft, method_comparison/MetaMathQA (run.py, utils.py), whose public table has
the learning and forgetting of some 60 methods on Llama-3.2-3B; config/peft_metamath.py repeats it.
"""
from decimal import Decimal, DecimalException

PROMPT = "Question: {question} Think step by step.\nAnswer:"
# what an answer stands behind; the first of these that occurs counts, at its last place
DELIMITERS = ("The answer is: ", "The answer is ", "The final answer is: ",
              "The final answer is ", "#### ")


def extract_answer(text):
    """The answer in a text, as written; None where no delimiter occurs."""
    text = text.strip().rstrip(".!?")
    for delimiter in DELIMITERS:
        if delimiter in text:
            answer = text.rpartition(delimiter)[2].strip()
            line = answer.split("\n", 1)[0]
            return line.strip(" .!?$%")
    return None


def number_of(text):
    """The number that an answer says, as 0.5 or 1/2; None for anything else."""
    above, slash, below = text.partition("/")
    try:
        number = Decimal(above.strip())
        if slash:
            number /= Decimal(below.strip())
        return float(number)
    except DecimalException:
        return None


def is_right(output, answer):
    """Does an output say the answer of GSM8K's record? As numbers where both are, else as text."""
    said = extract_answer(output)
    gold = extract_answer(answer)
    if said is None or gold is None:
        return False
    values = number_of(said), number_of(gold)
    if None in values:
        return said == gold
    return values[0] == values[1]
