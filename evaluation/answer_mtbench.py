"""
Stage 3, learning, of chat models: answers to MT-bench's 80 two-turn questions, in the file that FastChat's judge reads.

    python -m evaluation.answer_mtbench --model=out/tulu-r64/step_4000 --questions=mt-bench/question.jsonl
    cp -r out/tulu-r64/step_4000/mt_bench FASTCHAT/fastchat/llm_judge/data/    # then FastChat's gen_judgment.py there

The judge is GPT-4, by its API and outside of this code: nothing here is a score. Temperatures are FastChat's, by
category. The answers do not depend on batch or number of GPUs; started again, it goes on with the questions left.
"""
import hashlib
import json
import time
from functools import partial

from configurator import configure, knob_table
from evaluation.evals import cut_left, digest, evaluate, load_for_eval, read_items, start_ranks, write_result
from runtime import RANK, one_line_errors, pick_dtype, print0, write_whole
from text.tokenizer import text_stopper

# -----------------------------------------------------------------------------
model = ''               # model folder, checkpoint folder out/RUN/step_N, or PEFT folder
adapter = ''             # PEFT folder whose base is `model`
tokenizer = ''           # tokenizer file or folder; '' = the base's
questions = ''           # FastChat's fastchat/llm_judge/data/mt_bench/question.jsonl
template = '<|user|>\\n{message}\\n<|assistant|>\\n'  # of one turn, as in training (this is Tulu's); \n for a new line
separator = '\\n'        # between the EOS of an answer and the next turn
stop = ('<|user|>',)     # texts that end an answer, beside EOS
bos = True               # put the beginning-of-sequence token in front
max_new_tokens = 1024    # of each answer; FastChat's
seed = 0
limit = 0                # only the first so many questions; 0 = all
batch_size = 64          # rows generated at once
model_id = ''            # the name that the judge's tables show; '' = run and step
name = 'mtbench'         # items go to eval_NAME.jsonl: another name keeps items of other settings apart
out_dir = ''             # for items and mt_bench/; '' = the checkpoint's folder, or out/MODEL
device = 'auto'          # auto | cpu | cuda | cuda:N
dtype = 'auto'           # auto = bf16 on GPUs that have it, else fp32
_choices = {'dtype': ('auto', 'float32', 'bfloat16', 'float64')}

TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "extraction": 0.0, "math": 0.0, "coding": 0.0, "reasoning": 0.0,
                "stem": 0.1, "humanities": 0.1}  # FastChat llm_judge/common.py


def next_prompt(tok, history, message):
    """Ids that ask for the answer to `message`; history: ids of the turns before and their answers, [] at the first."""
    text = template.replace("{message}", message)
    return history + [tok.eos_id] + tok.encode(separator + text) if history else tok.encode(text, bos=bos)


def answer_questions(asked, subject, ids, finish):
    """Answer all turns of asked[i], i in ids, batch_size questions of one temperature together; the random numbers
    belong to (seed, question, turn)."""
    by_temperature = {}
    for i in ids:
        by_temperature.setdefault(TEMPERATURES[asked[i]["category"]], []).append(i)
    for temperature, group in by_temperature.items():
        for start in range(0, len(group), batch_size):  # what is finished is kept: not all first turns before any second
            answer_together(asked, subject, group[start:start + batch_size], temperature, finish)


def answer_together(asked, subject, group, temperature, finish):
    """Answer asked[i], i in group, turn by turn."""
    tok, room = subject.tokenizer, subject.model.config.max_position_embeddings - max_new_tokens
    ended = text_stopper(tok, stop, {tok.eos_id})
    history, turns = {i: [] for i in group}, {i: [] for i in group}
    cut, truncated = dict.fromkeys(group, 0), dict.fromkeys(group, 0)

    for turn in range(max(len(asked[i]["turns"]) for i in group)):
        going = [i for i in group if turn < len(asked[i]["turns"])]
        for i in going:
            prompt = next_prompt(tok, history[i], asked[i]["turns"][turn])
            history[i], lost = cut_left(prompt, room, tok.bos_id if bos else None)
            cut[i] += lost
        answers = subject.model.generate_each([history[i] for i in going], max_new_tokens, temperature, stop=ended,
                                              batch_size=batch_size, seed=[(seed * 1000 + i) * 10 + turn for i in going])
        for p, (new,) in answers:
            i = going[p]
            truncated[i] += not ended(new)
            text = tok.decode(new)
            end = min([at for s in stop if (at := text.find(s)) >= 0], default=None)
            turns[i].append(text[:end].strip())
            new = tok.encode(text[:end]) if end is not None else new  # an answer without the text that ended it
            history[i] += new[:-1] if new[-1:] == [tok.eos_id] else new
            if len(turns[i]) == len(asked[i]["turns"]):
                finish(i, {"question_id": asked[i]["question_id"], "turns": turns[i], "tstamp": time.time(),
                           "cut": cut[i], "truncated": truncated[i] / len(turns[i])})


def fastchat_line(record, model_id):
    """An answer as FastChat's gen_model_answer.py writes it; its random answer_id is a hash here."""
    text = f"{model_id} {record['question_id']} {record['turns']}"
    return {"question_id": record["question_id"], "answer_id": hashlib.sha256(text.encode()).hexdigest()[:22],
            "model_id": model_id, "choices": [{"index": 0, "turns": record["turns"]}], "tstamp": record["tstamp"]}


if __name__ == "__main__":
    with one_line_errors():
        config = configure(globals())
        print0(knob_table(globals()))
        template, separator = (text.replace("\\n", "\n") for text in (template, separator))
        if not questions:
            raise ValueError("questions is not set: FastChat has them in fastchat/llm_judge/data/mt_bench/question.jsonl")
        if "{message}" not in template:
            raise ValueError(f"template: expected {{message}} in it, found {template!r}")
        asked = read_items(questions, ("question_id", "category", "turns"), "questions")
        for number, question in enumerate(asked, 1):
            if question["category"] not in TEMPERATURES or not isinstance(question["turns"], list) or not question["turns"]:
                raise ValueError(f"{questions}, record {number}: expected a category out of {', '.join(TEMPERATURES)} and a "
                                 f"list of turns")
        data, asked = digest(asked), asked[:limit or None]
        device, started = start_ranks(device), time.perf_counter()
        subject = load_for_eval(model, adapter, device, pick_dtype(dtype, device), tokenizer, out_dir)
        if subject.model.config.max_position_embeddings <= max_new_tokens:
            raise ValueError(f"max_new_tokens={max_new_tokens} leaves no room for a question in the model's context of "
                             f"{subject.model.config.max_position_embeddings}")
        model_id = model_id or f"{subject.run}-{subject.step}"
        print0(f"{len(asked)} questions, " + (f"BOS (id {subject.tokenizer.bos_id}) in front" if bos else "no BOS in front") +
               f"; the first begins {next_prompt(subject.tokenizer, [], asked[0]['turns'][0])[:8]}")
        settings = {"template": template, "separator": separator, "stop": stop, "bos": bos, "max_new_tokens": max_new_tokens,
                    "seed": seed, "data": data}
        records = evaluate(subject, name, range(len(asked)), settings, partial(answer_questions, asked, subject)).values()
        for metric in ("truncated", "cut"):
            write_result(subject, f"{name}_{metric}", [min(1, record[metric]) for record in records], {**config, **settings},
                         time.perf_counter() - started)
        if RANK == 0:
            path = subject.folder / "mt_bench" / "model_answer" / f"{model_id}.jsonl"
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, "".join(json.dumps(fastchat_line(record, model_id)) + "\n" for record in records))
            print0(f"wrote {path}: {len(records)} answers for FastChat's judge")
