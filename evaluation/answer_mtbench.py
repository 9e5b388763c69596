r"""
Stage 3, learning, of chat models: answers to MT-bench's 80 questions of two turns, for FastChat.

    python -m evaluation.answer_mtbench --model=out/tulu-r64/step_4000 --questions=question.jsonl
    cp -r out/tulu-r64/step_4000/mt_bench FASTCHAT/fastchat/llm_judge/data/
    # then FastChat's gen_judgment.py there

    prompt 1   BOS <|user|>\n What is ...? \n<|assistant|>\n
    answer 1   It is ... EOS                               sampled, at the category's temperature
    prompt 2   prompt 1, answer 1, EOS \n <|user|>\n And why? \n<|assistant|>\n
    answer 2   Because ... EOS

The judge is GPT-4, by its API and outside of this code: nothing here is a score. Prompts too long
for the model lose their beginning, which is counted. The answers do not depend on batch size or
number of GPUs; started again after a kill, it answers the questions that are left.
"""
import hashlib
import json
import time
from dataclasses import dataclass, field
from typing import NamedTuple

from configurator import configure, knob_table
from evaluation.evals import (begin_and_end, cut_left, digest, find_model, generate_items,
                              load_for_eval, open_items, read_items, start_ranks, without_eos)
from evaluation.scores import write_result
from runtime import RANK, one_line_errors, pick_dtype, print0, write_whole
from text.chat import special_names
from text.records import unescape
from text.tokenizer import text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
t = 1.0                  # judge W0 + t (W - W0): 0 is the base, 0.5 half way back to it
tokenizer = ''           # tokenizer file or folder; '' = the base's
questions = ''           # FastChat's fastchat/llm_judge/data/mt_bench/question.jsonl
# of one turn, as in training (this is Tulu's); \n is a new line, \t a tab, \\ a backslash
template = '<|user|>\\n{message}\\n<|assistant|>\\n'
separator = '\\n'        # between the EOS of an answer and the next turn
stop = ('<|user|>',)     # texts that end an answer, beside EOS
bos = None               # whether BOS stands in front; None = as the tokenizer does it
max_new_tokens = 1024    # of each answer; FastChat's
seed = 0
limit = 0                # only the first so many questions; 0 = all
batch_size = 64          # rows generated at once
model_id = ''            # the name that the judge's tables show; '' = run, step, name and t
name = 'mtbench'         # items go to eval_NAME.jsonl: another name for other settings
out_dir = ''             # for items and mt_bench/; '' = the checkpoint's folder, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_types = {'bos': bool}
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

# FastChat's llm_judge/common.py
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0,
                "reasoning": 0.0, "stem": 0.1, "humanities": 0.1}


# ----------------------------------------------------------------------------- questions
def read_questions(path):
    """FastChat's questions: dicts with question_id, category, turns. Raises ValueError."""
    if not path:
        raise ValueError("questions is not set: FastChat has them in "
                         "fastchat/llm_judge/data/mt_bench/question.jsonl")
    types = {"question_id": object, "category": str, "turns": list}
    asked = read_items(path, types, "questions")
    for number, question in enumerate(asked, 1):
        turns = question["turns"]
        has_turns = turns and all(isinstance(turn, str) for turn in turns)
        if question["category"] not in TEMPERATURES or not has_turns:
            raise ValueError(f"{path}, record {number}: expected a category out of "
                             f"{', '.join(TEMPERATURES)} and a list of turns, which are texts")
    return asked


class Form(NamedTuple):
    """How a conversation is written down."""
    template: str        # of a turn, with {message}
    separator: str       # between the EOS of an answer and the next turn
    bos: bool


def next_prompt(tok, history, message, form):
    """Ids that ask for the answer to `message`; history: ids of the turns and answers before."""
    text = form.template.replace("{message}", message)
    if not history:
        return tok.encode(text, bos=form.bos)
    return history + [tok.eos_id] + tok.encode(form.separator + text)


# ----------------------------------------------------------------------------- answers
@dataclass
class Conversation:
    history: list = field(default_factory=list)  # ids of its turns and answers so far
    answers: list = field(default_factory=list)
    cut: int = 0                                 # ids that its beginning lost
    truncated: int = 0                           # answers that max_new_tokens ended


def groups_of_questions(ids, questions, batch_size):
    """Yield (temperature, at most batch_size ids with it). A group gets all its turns before the
    next begins, so that a kill loses no more than a group."""
    # generate_each samples all its rows at one temperature
    by_temperature = {}
    for i in ids:
        temperature = TEMPERATURES[questions[i]["category"]]
        by_temperature.setdefault(temperature, []).append(i)
    for temperature, same in by_temperature.items():
        for start in range(0, len(same), batch_size):
            yield temperature, same[start:start + batch_size]


def answer_group(subject, questions, ids, form, stop, temperature, max_new_tokens, seed):
    """Yield (i, record) for the questions i of `ids`, which are answered together, turn by turn."""
    tok = subject.tokenizer
    ended = text_stopper(tok, stop, tok.stop_ids)
    room = subject.model.config.max_position_embeddings - max_new_tokens
    talks = {i: Conversation() for i in ids}

    for turn in range(max(len(questions[i]["turns"]) for i in ids)):
        # the prompts of this turn; a BOS stays in front of one that is cut
        asked = [i for i in ids if turn < len(questions[i]["turns"])]
        for i in asked:
            prompt = next_prompt(tok, talks[i].history, questions[i]["turns"][turn], form)
            talks[i].history, cut = cut_left(prompt, room, tok.bos_id if form.bos else None)
            talks[i].cut += cut
        # the random numbers belong to (seed, question, turn)
        seeds = [(seed * 1000 + i) * 10 + turn for i in asked]
        prompts = [talks[i].history for i in asked]
        answers = generate_items(subject, asked, prompts, max_new_tokens, temperature=temperature,
                                 stop=ended, batch_size=len(ids), seed=seeds)
        for i, samples in answers:
            new = samples[0]
            talk = talks[i]
            talk.truncated += not ended(new)
            text, new = cut_answer(tok, new, stop)
            talk.answers.append(text.strip())
            talk.history += new
            if len(talk.answers) == len(questions[i]["turns"]):
                truncated = talk.truncated / len(talk.answers)
                yield i, {"question_id": questions[i]["question_id"], "turns": talk.answers,
                          "tstamp": time.time(), "cut": talk.cut, "truncated": truncated}


def cut_answer(tok, new, stop):
    """(text, ids) of an answer, without EOS and without the text of `stop` that ended it."""
    # the first of the texts that end an answer
    text = tok.decode(without_eos(tok, new))
    places = [text.find(string) for string in stop if string in text]
    if places:
        text = text[:min(places)]
        new = tok.encode(text)
    return text, without_eos(tok, new)


def fastchat_line(record, model_id):
    """An answer as FastChat's gen_model_answer.py writes it; its id, random there, is a hash."""
    text = f"{model_id} {record['question_id']} {record['turns']}"
    answer_id = hashlib.sha256(text.encode()).hexdigest()[:22]
    return {"question_id": record["question_id"], "answer_id": answer_id, "model_id": model_id,
            "choices": [{"index": 0, "turns": record["turns"]}], "tstamp": record["tstamp"]}


def write_answers(folder, records, model_id):
    """Write FOLDER/mt_bench/model_answer/MODEL_ID.jsonl."""
    path = folder / "mt_bench" / "model_answer" / f"{model_id}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(fastchat_line(record, model_id)) + "\n" for record in records]
    write_whole(path, "".join(lines))
    print0(f"wrote {path}: {len(lines)} answers for FastChat's judge")


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        # the questions and how they are put
        template = unescape(template)
        stop = tuple(unescape(text) for text in stop)
        if "{message}" not in template:
            raise ValueError(f"template: expected {{message}} in it, found {template!r}")
        if min(batch_size, max_new_tokens) < 1 or limit < 0:
            raise ValueError("batch_size, max_new_tokens: at least 1; limit: at least 0")
        find_model(model, adapter)
        asked = read_questions(questions)
        data = digest(asked)
        asked = asked[:limit or None]

        # the model
        device = start_ranks(device)
        started = time.perf_counter()
        dtype = pick_dtype(dtype, device)
        subject = load_for_eval(model, adapter, device, dtype, tokenizer, out_dir, t)
        context = subject.model.config.max_position_embeddings
        if context <= max_new_tokens:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a question in "
                             f"the model's context of {context}")
        tok = subject.tokenizer
        bos = tok.adds_bos if bos is None else bos
        form = Form(template, unescape(separator), bos)
        special = [name for name in special_names(tok) if name in form.template + form.separator]
        if special:
            print0(f"WARNING: template: {', '.join(special)} are special tokens of this model; "
                   "here they are read as plain text, as prepare_data.py does")
        first = next_prompt(tok, [], asked[0]["turns"][0], form)
        print0(f"{len(asked)} questions, {begin_and_end(tok, bos)}; the first begins {first[:8]}")

        # the answers
        settings = {**form._asdict(), "stop": stop, "max_new_tokens": max_new_tokens, "seed": seed,
                    "data": data}
        items = open_items(subject, name, range(len(asked)), settings)
        for temperature, ids in groups_of_questions(items.todo, asked, batch_size):
            answers = answer_group(subject, asked, ids, form, stop, temperature, max_new_tokens,
                                   seed)
            for i, record in answers:
                items.finish(i, record)
        records = items.close().values()

        # what they lost, and the file of the judge
        seconds = time.perf_counter() - started
        for metric in ("truncated", "cut"):
            values = [min(1, record[metric]) for record in records]
            write_result(subject, f"{name}_{metric}", values, {**config, **settings}, seconds)
        if RANK == 0:
            if not model_id:
                model_id = f"{subject.run}-{subject.step}"
                if name != "mtbench":
                    model_id += f"-{name}"
                if t != 1:
                    model_id += f"-t{t:g}"
            write_answers(subject.folder, records, model_id)
